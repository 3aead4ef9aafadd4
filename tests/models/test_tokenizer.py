"""The model keeps the paper's promises: causality, commuting decodes, one class for every variant."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hieratok.errors import CheckpointError
from hieratok.models.scales import ATTENTION_PATTERNS
from hieratok.models.tokenizer import HieraTok

VARIANTS = [
    {"scales": [4]},
    {"scales": [1, 2, 4]},
    {"scales": [1, 3, 4]},
    {"scales": [1, 2, 4], "downsampler": "interpolation"},
    {"scales": [1, 2, 4], "attention_pattern": "scale_independent"},
    {"scales": [1, 2, 4], "attention_pattern": "full", "downsampler": "interpolation"},
    {"scales": [1, 2, 4], "pixel_head": "per_scale"},
]


def images(batch=3, side=32, seed=0):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_variant_reconstructs_each_scale_at_its_own_resolution(tiny_fields, changes):
    model = HieraTok(**{**tiny_fields, **changes}).eval()
    output = model(images())
    assert [tuple(s.shape) for s in output.scales] == [(3, 3, 8 * s, 8 * s) for s in model.config.scales]
    assert output.sample is output.scales[-1]
    assert tuple(output.latents.shape) == (3, 4, 4, 4)  # the same for every set of scales (App. C.1)


def test_other_sizes_work_too():
    model = HieraTok(
        image_size=48, patch_size=4, latent_channels=3, scales=[1, 5, 12],
        encoder_num_layers=1, encoder_hidden_size=24, encoder_num_heads=3,
        decoder_num_layers=1, decoder_hidden_size=16, decoder_num_heads=2,
    )  # fmt: skip
    assert [s.shape[-1] for s in model(images(2, 48)).scales] == [4, 20, 48]


def test_encoding_does_not_depend_on_the_scales(tiny_fields):
    multi, single = HieraTok(**tiny_fields).eval(), HieraTok(**{**tiny_fields, "scales": [4]}).eval()
    single.encoder.load_state_dict(multi.encoder.state_dict())
    a, b = (model.encode(images()).latent_dist for model in (multi, single))
    assert torch.equal(a.mean, b.mean) and torch.equal(a.logvar, b.logvar)


@pytest.mark.parametrize("pattern", ["scale_causal", "scale_independent"])
@pytest.mark.parametrize("downsampler", ["conv", "interpolation"])
@pytest.mark.parametrize("max_scale", [1, 2, 4])
def test_decoding_up_to_a_scale_gives_the_image_of_the_full_decode(tiny_fields, pattern, downsampler, max_scale):
    torch.manual_seed(0)
    model = HieraTok(**{**tiny_fields, "attention_pattern": pattern, "downsampler": downsampler}).eval()
    latents = torch.randn(2, 4, 4, 4)
    partial, full = model.decode(latents, max_scale=max_scale), model.decode(latents)
    assert partial.sample.shape[-1] == 8 * max_scale
    for a, b in zip(partial.scales, full.scales, strict=False):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_decoding_up_to_a_scale_does_only_the_work_of_those_scales(tiny_model):
    seen = []
    tiny_model.decoder.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    for branch in tiny_model.decoder.downsampler.branches:
        branch.register_forward_hook(lambda module, args, output: seen.append(f"branch {module.side}"))
    tiny_model.decode(torch.randn(1, 4, 4, 4), max_scale=1)
    assert seen == ["branch 1", 1]


def token_gradients(model, scale):
    """For the image of one scale: the gradient's size at each token entering the decoder's transformer."""
    entering = []

    def keep(module, args):
        entering.append(args[0].detach().requires_grad_())
        return (entering[0], *args[1:])

    handle = model.decoder.transformer.register_forward_pre_hook(keep)
    output = model.decode(torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
    handle.remove()
    output.scales[scale].square().sum().backward()
    return entering[0].grad.abs().sum(dim=(0, 2))


@pytest.mark.parametrize("backend", ["prefix", "mask", "matmul"])
def test_no_coarse_image_depends_on_a_finer_token(tiny_fields, backend):
    torch.manual_seed(0)
    model = HieraTok(**{**tiny_fields, "attention_backend": backend}).eval()
    for scale, (_, end) in enumerate(model.layout.spans):
        gradients = token_gradients(model, scale)
        assert (gradients[:end] > 0).all(), "every own and coarser token is used"
        assert (gradients[end:] == 0).all(), "no finer token is"


def test_under_full_attention_coarse_images_do_depend_on_finer_tokens(tiny_fields):
    torch.manual_seed(0)
    model = HieraTok(**{**tiny_fields, "attention_pattern": "full"}).eval()
    assert (token_gradients(model, 0) > 0).all()
    with pytest.raises(ValueError, match="scale_causal or scale_independent"):
        model.decode(torch.randn(1, 4, 4, 4), max_scale=1)


def test_under_independent_attention_an_image_depends_on_its_own_scale_only(tiny_fields):
    torch.manual_seed(0)
    model = HieraTok(**{**tiny_fields, "attention_pattern": "scale_independent"}).eval()
    for scale, (start, end) in enumerate(model.layout.spans):
        gradients = token_gradients(model, scale)
        assert (gradients[start:end] > 0).all()
        assert (gradients[:start] == 0).all() and (gradients[end:] == 0).all()


@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
def test_every_parameter_learns(tiny_fields, pattern):
    torch.manual_seed(0)
    model = HieraTok(**{**tiny_fields, "attention_pattern": pattern, "pixel_head": "per_scale"})
    output = model(images())
    sum(scale.square().sum() for scale in output.scales).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_generators_make_a_sample_independent_of_its_batch(tiny_fields):
    torch.manual_seed(0)
    model = HieraTok(**{**tiny_fields, "decoder_drop_path_rate": 0.5, "decoder_num_layers": 6}).train()

    def run(chosen):
        generators = [torch.Generator().manual_seed(seed) for seed in chosen]
        return model(images()[chosen], generator=generators).sample

    together, alone = run([0, 1, 2]), run([1])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(run([0, 1, 2])[0], run([2, 1, 0])[0])


def test_drop_path_drops_whole_branches_and_keeps_the_mean(tiny_fields):
    model = HieraTok(**{**tiny_fields, "decoder_drop_path_rate": 0.5, "decoder_num_layers": 3}).train()
    keeps = model.decoder.transformer._draw_keeps(torch.zeros(4000, 1, 1), torch.Generator().manual_seed(0))
    assert torch.equal(keeps[0][0].unique(), torch.tensor([1.0]))  # the rate rises from zero
    assert torch.equal(keeps[2][0].unique(), torch.tensor([0.0, 2.0]))
    assert keeps[2][1].mean().item() == pytest.approx(1, abs=0.1)
    assert model.eval().decoder.transformer._draw_keeps(torch.zeros(4, 1, 1), None) == [None] * 3


def test_gradient_checkpointing_changes_no_gradient(tiny_fields):
    model = HieraTok(**{**tiny_fields, "decoder_drop_path_rate": 0.5}).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        assert model.decoder.transformer.gradient_checkpointing == checkpointing
        model.zero_grad()
        model(images(), generator=torch.Generator().manual_seed(0)).sample.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_near(tiny_model, dtype):
    expected = tiny_model(images(), sample_posterior=False).sample
    with torch.autocast("cpu", dtype):
        output = tiny_model(images(), sample_posterior=False)
    assert output.sample.dtype == torch.float32 and output.posterior.mean.dtype == torch.float32
    torch.testing.assert_close(output.sample, expected, atol=0.03, rtol=0.05)
    converted = tiny_model.to(dtype)(50 * images().to(dtype), sample_posterior=False)
    assert converted.sample.isfinite().all()


@pytest.mark.slow
def test_compiled_equals_eager(tiny_model):
    expected = tiny_model(images(), sample_posterior=False)
    tiny_model.compile_repeated_blocks(fullgraph=True)
    output = tiny_model(images(), sample_posterior=False)
    for a, b in zip(output.scales, expected.scales, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_it_is_loaded_as_it_was_saved(tiny_model, tmp_path):
    tiny_model.register_to_config(latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 3.0, 4.0])
    tiny_model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = HieraTok.from_pretrained(tmp_path)
    assert torch.equal(loaded(images(), False).sample, tiny_model(images(), False).sample)
    assert loaded.config.latents_std == [1.0, 2.0, 3.0, 4.0]


def test_it_loads_through_automodel_and_as_the_vae_of_a_pipeline(tiny_model, tmp_path):
    from diffusers import AutoModel, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=1, num_embeds_ada_norm=1001,
    )  # fmt: skip
    DiTPipeline(transformer=transformer, vae=tiny_model, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["hieratok", "HieraTok"]

    loaded = AutoModel.from_pretrained(str(tmp_path), subfolder="vae")
    assert isinstance(loaded, HieraTok)
    assert torch.equal(loaded(images(), False).sample, tiny_model(images(), False).sample)

    pipeline = DiTPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    sample = pipeline([1], num_inference_steps=2, output_type="np").images
    assert sample.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("damage", ["missing", "extra"])
def test_weights_that_are_missing_or_left_over_are_refused(tiny_model, tmp_path, damage):
    tiny_model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        del tensors["decoder.project.weight"]
    else:
        tensors["decoder.another.weight"] = torch.zeros(1)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"decoder\.(project|another)\.weight"):
        HieraTok.from_pretrained(tmp_path)


def test_a_pickled_model_is_refused(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        HieraTok.from_pretrained(tmp_path)


def test_normalised_latents_have_the_stored_statistics_removed(tiny_model):
    latents = torch.randn(2, 4, 4, 4)
    with pytest.raises(ValueError, match="latents_mean"):
        tiny_model.normalize_latents(latents)
    tiny_model.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 4.0, 8.0])
    normalised = tiny_model.normalize_latents(latents)
    torch.testing.assert_close(normalised[:, 3], (latents[:, 3] - 4) / 8)
    torch.testing.assert_close(tiny_model.denormalize_latents(normalised), latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 33}, "image_size 33 is not divisible by patch_size 8"),
        ({"downsampler": "max"}, "conv, interpolation"),
        ({"attention_pattern": "causal"}, "scale_causal, scale_independent, full"),
        ({"pixel_head": "two"}, "shared nor per_scale"),
        ({"image_size": 48, "scales": None}, "no power of two"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_by_name(tiny_fields, changes, message):
    with pytest.raises(ValueError, match=message):
        HieraTok(**{**tiny_fields, **changes})


def test_images_and_latents_of_another_size_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\)"):
        tiny_model.encode(images(1, 64))
    with pytest.raises(ValueError, match=r"\(B, 4, 4, 4\)"):
        tiny_model.decode(torch.zeros(1, 4, 8, 8))


def test_the_posterior_starts_as_loud_as_the_configuration_says(tiny_fields):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    for log_variance in (0.0, -6.0):
        model = HieraTok(**tiny_fields, initial_log_variance=log_variance).eval()
        posterior = model.encode(images).latent_dist
        torch.testing.assert_close(posterior.logvar.mean().item(), log_variance, atol=0.2, rtol=0)
