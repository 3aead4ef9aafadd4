"""HieraTok and the autoencoders of diffusers behind one face, and from the folders they were saved in."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderRAE, AutoencoderTiny, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from hieratok.engine.run_folder import load_autoencoder
from hieratok.errors import CheckpointError, ConfigError
from hieratok.models.autoencoder import Autoencoder, as_autoencoder, decode_scales, sample_moments, state_sha256
from hieratok.models.tokenizer import HieraTok


def kl() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, norm_num_groups=4, sample_size=24,
    )  # fmt: skip


def dc() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=5, attention_head_dim=8, encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), encoder_out_shortcut=False, decoder_in_shortcut=False,
    )  # fmt: skip


def rae() -> AutoencoderRAE:
    """Its encoder resizes images to 28 px; its decoder paints 32."""
    return AutoencoderRAE(
        encoder_type="dinov2", encoder_hidden_size=64, encoder_patch_size=7, encoder_num_hidden_layers=1,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, patch_size=8, encoder_input_size=28,
    )  # fmt: skip


def tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip


# name: model, size to give (None: the model knows), size, shape of the latents, whether it has no posterior
KINDS = {
    "AutoencoderKL": (kl, None, 24, (3, 12, 12), False),
    "AutoencoderDC": (dc, 16, 16, (5, 8, 8), True),
    "AutoencoderRAE": (rae, None, 32, (64, 4, 4), True),
    "AutoencoderTiny": (tiny, 16, 16, (4, 8, 8), True),
}


@pytest.fixture(params=["HieraTok", *KINDS])
def kind(request, tiny_model):
    torch.manual_seed(0)
    if request.param == "HieraTok":
        return Autoencoder(tiny_model), (32, (4, 4, 4), False)
    make, given, size, shape, deterministic = KINDS[request.param]
    return Autoencoder(make().eval(), given), (size, shape, deterministic)


def images(size: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_tokenizer_says_what_it_is_and_encodes_and_decodes(kind):
    tokenizer, (size, shape, deterministic) = kind
    channels, side, _ = shape
    assert tokenizer.name == type(tokenizer.model).__name__
    assert (tokenizer.image_size, tokenizer.latent_shape, tokenizer.deterministic) == (size, shape, deterministic)
    assert tokenizer.sides == ((1, 2, 4) if tokenizer.name == "HieraTok" else (side,))
    encoded = tokenizer.encode(images(size))
    assert encoded.shape == (2, channels * (1 if deterministic else 2), side, side)
    assert encoded.dtype == torch.float32 and not encoded.requires_grad
    latents = tokenizer.mode(encoded)
    assert latents.shape == (2, *shape) and torch.equal(latents, encoded[:, :channels])
    scales = tokenizer.decode(latents)
    assert len(scales) == len(tokenizer.sides) and scales[-1].shape == (2, 3, size, size)
    assert not scales[-1].requires_grad


def test_what_is_encoded_is_the_models_own_mean_and_variance(tiny_model):
    for model, size in ((tiny_model, 32), (kl().eval(), 24)):
        with torch.no_grad():
            distribution = model.encode(images(size)).latent_dist
        encoded = Autoencoder(model).encode(images(size))
        assert torch.equal(encoded, torch.cat([distribution.mean, distribution.logvar], dim=1))
        noise = torch.randn_like(distribution.mean)
        expected = distribution.mean + distribution.std * noise
        torch.testing.assert_close(sample_moments(encoded, noise), expected)


def test_half_precision_weights_are_given_what_they_take():
    tokenizer = Autoencoder(kl().eval().to(torch.bfloat16))
    encoded = tokenizer.encode(images(24))
    assert encoded.dtype == torch.float32 and tokenizer.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer.mode(encoded))[0].shape == (2, 3, 24, 24)


def test_a_model_of_images_in_0_to_1_is_given_and_gives_such(tiny_model):
    model = rae().eval()
    tokenizer, pixels = Autoencoder(model), images(32)
    with torch.no_grad():
        latents = model.encode((pixels + 1) / 2).latent
        painted = model.decode(latents).sample
    torch.testing.assert_close(tokenizer.encode(pixels), latents)
    torch.testing.assert_close(tokenizer.decode(latents)[0], 2 * painted - 1)
    torch.testing.assert_close(decode_scales(model, latents)[0], 2 * painted - 1)


@pytest.mark.parametrize("make", [kl, tiny])
def test_a_model_of_images_around_0_is_given_them_as_they_are(make):
    model = make().eval()
    tokenizer, pixels = Autoencoder(model, 24), images(24)
    with torch.no_grad():
        encoded = model.encode(pixels)
        latents = encoded.latents if make is tiny else encoded.latent_dist.mean
        painted = model.decode(latents).sample
    assert torch.equal(tokenizer.mode(tokenizer.encode(pixels)), latents)
    assert torch.equal(tokenizer.decode(latents)[0], painted)


def test_the_adapter_is_put_on_once(tiny_model):
    tokenizer = as_autoencoder(tiny_model)
    assert tokenizer.model is tiny_model and as_autoencoder(tokenizer) is tokenizer


def test_what_cannot_serve_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="does not say the size of its images; give image_size"):
        Autoencoder(dc())
    with pytest.raises(ConfigError, match="image_size is 64, this tokenizer's is 32"):
        Autoencoder(tiny_model, 64)
    assert Autoencoder(tiny_model, 32).image_size == 32
    assert Autoencoder(kl(), 32).latent_shape == (3, 16, 16)  # a convolutional one works at any size
    transformer = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4)
    with pytest.raises(ConfigError, match="DiTTransformer2DModel has no encode; give an autoencoder"):
        Autoencoder(transformer, 32)
    flat = rae().eval()
    flat.reshape_to_2d = False
    with pytest.raises(ConfigError, match="a generator needs square maps"):
        _ = Autoencoder(flat).latent_shape


def test_the_hash_tells_two_tokenizers_apart(kind):
    tokenizer, _ = kind
    before = tokenizer.state_sha256()
    assert before == state_sha256(tokenizer.model) and len(before) == 64
    next(tokenizer.model.parameters()).data.view(-1)[0] += 1
    assert tokenizer.state_sha256() != before


# From folders


@pytest.mark.parametrize("name", KINDS)
def test_an_autoencoder_of_diffusers_is_loaded_from_its_folder(name, tmp_path):
    make, given, size, shape, _ = KINDS[name]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path, given)
    assert type(loaded.model) is type(model) and not loaded.model.training
    assert (loaded.image_size, loaded.latent_shape) == (size, shape)
    assert loaded.state_sha256() == state_sha256(model)


def test_a_hieratok_is_loaded_from_its_folder(tiny_model, tmp_path):
    tiny_model.train().save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert type(loaded.model) is HieraTok and not loaded.model.training
    assert loaded.state_sha256() == state_sha256(tiny_model)
    with pytest.raises(ConfigError, match="image_size is 48, this tokenizer's is 32"):
        load_autoencoder(tmp_path, 48)


def test_without_a_size_of_its_own_an_autoencoder_needs_one(tmp_path):
    dc().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="give image_size"):
        load_autoencoder(tmp_path)


def test_an_empty_folder_and_one_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no autoencoder could be loaded from .*nowhere.*give the folder"):
        load_autoencoder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds neither a saved model"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
def test_a_damaged_configuration_is_refused_by_name(tmp_path, text):
    kl().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_autoencoder(tmp_path)


def test_a_model_that_is_no_autoencoder_is_refused(tmp_path):
    model = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no encode; give an autoencoder"):
        load_autoencoder(tmp_path)


def test_a_class_that_nobody_knows_is_refused(tmp_path):
    kl().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderNobody"}))
    with pytest.raises(CheckpointError, match="no autoencoder could be loaded from"):
        load_autoencoder(tmp_path)


def test_a_file_of_weights_that_is_cut_off_or_missing_is_refused(tmp_path):
    kl().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="no autoencoder could be loaded from"):
        load_autoencoder(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no autoencoder could be loaded from"):
        load_autoencoder(tmp_path)


def test_an_autoencoder_of_which_a_weight_is_missing_is_refused_by_its_name(tmp_path):
    kl().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing in .*: decoder\.conv_in\.weight"):
        load_autoencoder(tmp_path)
