"""Frozen networks give maps of features: those of the network itself, on the latent's grid, and differentiable."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hieratok.errors import CheckpointError, ConfigError, MissingDependencyError
from hieratok.files import sha256_of
from hieratok.losses.foundation import load_foundation
from hieratok.losses.mini import MINI_WEIGHTS, load_mini

# Networks of timm with random weights; test_vit has patches of 16, 6 blocks and a native side of 160.
VIT = {"embed_dim": 32, "depth": 8, "num_heads": 2, "img_size": 64}


def random_network(name: str, **arguments) -> nn.Module:
    """Seeded; every parameter is drawn, since timm starts some at 0 or 1, which would hide a mistake."""
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, **arguments).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def save_folder(network: nn.Module, folder: Path, **options) -> Path:
    """As timm writes it for the hub."""
    timm.models.save_for_hf(network, str(folder), safe_serialization=True, **options)
    return folder


def save_weights(network: nn.Module, path: Path) -> Path:
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def images_of(side: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def resized(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def as_map(tokens: Tensor, num_dropped: int, side: int) -> Tensor:
    """Tokens `(B, N, C)` in raster order, without the first ones, as `(B, C, side, side)`."""
    return tokens[:, num_dropped:].transpose(1, 2).unflatten(2, (side, side))


def test_mini_gives_its_maps_of_stride_2_to_16():
    foundation, images = load_foundation("mini", image_size=64, grid_side=8), images_of(64)
    maps = foundation.layers(images)
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 4]
    assert [m.shape[1] for m in maps] == foundation.layer_channels == [32, 64, 128, 192]
    for ours, expected in zip(maps, load_mini().features(images)[1:], strict=True):
        assert torch.equal(ours, expected)
    assert (foundation.name, foundation.sha256) == ("mini", sha256_of(MINI_WEIGHTS))


@pytest.mark.parametrize(
    ("grid_side", "side", "channels"), [(8, 8, 128), (7, 8, 128), (4, 4, 192), (2, 4, 192), (16, 16, 64), (64, 4, 192)]
)
def test_minis_map_is_the_deepest_that_is_as_fine_as_the_grid_or_else_the_deepest(grid_side, side, channels):
    foundation = load_foundation("mini", image_size=64, grid_side=grid_side)
    assert foundation(images_of(64)).shape == (2, channels, side, side)
    assert foundation.channels == channels


def test_mini_is_read_from_a_file_too(tmp_path):
    tensors = {name: tensor * 0.5 for name, tensor in load_file(MINI_WEIGHTS).items()}
    save_file(tensors, tmp_path / "other.safetensors")
    other = load_foundation("mini", tmp_path / "other.safetensors", image_size=64, grid_side=8)
    assert other.sha256 == sha256_of(tmp_path / "other.safetensors")
    assert not torch.equal(other(images_of(64)), load_foundation("mini", image_size=64, grid_side=8)(images_of(64)))


@pytest.mark.parametrize("grid_side", [3, 4, 6])  # 48 pixels, 64, which is the image as it is, and 96
def test_the_map_of_a_vit_in_a_folder_lies_on_the_grid_and_is_timms_own(tmp_path, grid_side):
    save_folder(random_network("vit_tiny_patch16_224", **VIT), tmp_path / "small-vit")
    foundation = load_foundation(str(tmp_path / "small-vit"), image_size=64, grid_side=grid_side)
    images = images_of(64)

    own = timm.create_model(f"local-dir:{tmp_path / 'small-vit'}", pretrained=True, dynamic_img_size=True).eval()
    seen = images if grid_side == 4 else resized(images, 16 * grid_side)
    expected = as_map(own.forward_features(seen), 1, grid_side)
    assert foundation.channels == 32
    torch.testing.assert_close(foundation(images), expected, rtol=1e-5, atol=1e-5)
    assert foundation.name == "small-vit"
    assert foundation.sha256 == sha256_of(tmp_path / "small-vit" / "model.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_map_of_a_vit_by_name_with_a_file_of_weights_is_timms_own(tmp_path, suffix):
    own = random_network("test_vit", dynamic_img_size=True)
    path = save_weights(own, tmp_path / f"weights{suffix}")  # with its classifier, which is left out
    foundation = load_foundation("timm:test_vit.r160_in1k", path, image_size=64, grid_side=5)
    expected = as_map(own.forward_features(resized(images_of(64), 80)), 1, 5)
    torch.testing.assert_close(foundation(images_of(64)), expected, rtol=1e-5, atol=1e-5)
    assert (foundation.name, foundation.sha256) == ("timm:test_vit.r160_in1k", sha256_of(path))


def test_weights_whose_positions_are_of_another_grid_are_converted_by_timm(tmp_path):
    path = save_weights(random_network("test_vit", img_size=96), tmp_path / "weights.safetensors")
    foundation = load_foundation("timm:test_vit", path, image_size=64, grid_side=4)
    own = timm.create_model("test_vit", dynamic_img_size=True).eval()
    own.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(load_file(path), own))
    expected = as_map(own.forward_features(images_of(64)), 1, 4)
    torch.testing.assert_close(foundation(images_of(64)), expected, rtol=1e-5, atol=1e-5)


def test_class_and_register_tokens_are_dropped(tmp_path):
    own = random_network("vit_tiny_patch16_224", **VIT, reg_tokens=4)
    foundation = load_foundation(str(save_folder(own, tmp_path / "vit")), image_size=64, grid_side=4)
    torch.testing.assert_close(foundation(images_of(64)), as_map(own.forward_features(images_of(64)), 5, 4))


@pytest.mark.parametrize(("depth", "blocks"), [(12, (3, 6, 9, 12)), (8, (2, 4, 6, 8)), (6, (2, 3, 5, 6)), (2, (1, 2))])
def test_the_layers_of_a_vit_follow_each_quarter_of_its_blocks_through_the_final_norm(tmp_path, depth, blocks):
    own = random_network("vit_tiny_patch16_224", **{**VIT, "depth": depth})
    foundation = load_foundation(str(save_folder(own, tmp_path / "vit")), image_size=64, grid_side=4)
    after: list[Tensor] = []
    for block in own.blocks:
        block.register_forward_hook(lambda module, inputs, output: after.append(output))
    own.forward_features(images_of(64))

    maps = foundation.layers(images_of(64))
    assert foundation.layer_channels == [32] * len(blocks)
    for ours, number in zip(maps, blocks, strict=True):
        torch.testing.assert_close(ours, as_map(own.norm(after[number - 1]), 1, 4))
    assert torch.equal(maps[-1], foundation(images_of(64)))


def test_the_layers_of_a_convolutional_network_are_its_last_four_maps(tmp_path):
    own = random_network("test_resnet", features_only=True)
    path = save_weights(random_network("test_resnet"), tmp_path / "weights.safetensors")
    foundation = load_foundation("timm:test_resnet", path, image_size=64, grid_side=4)
    expected = own(images_of(64))[-4:]
    for ours, theirs in zip(foundation.layers(images_of(64)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert foundation.layer_channels == [m.shape[1] for m in expected]
    assert [m.shape[-1] for m in expected] == [16, 8, 4, 2]
    assert torch.equal(foundation(images_of(64)), foundation.layers(images_of(64))[2])


def test_images_are_fed_in_minus_one_to_one_or_by_the_networks_own_mean_and_deviation(tmp_path):
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.4)
    own = random_network("vit_tiny_patch16_224", **VIT)
    folder = str(save_folder(own, tmp_path / "vit", data_config={"mean": mean, "std": std}))
    half = load_foundation(folder, image_size=64, grid_side=4, normalize="half")
    network = load_foundation(folder, image_size=64, grid_side=4, normalize="network")
    images = images_of(64)
    by_hand = ((images + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(network(images), half(by_hand), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(network(images), half(images), atol=0.1)


@pytest.fixture(params=["mini", "vit", "resnet"])
def foundation(request, tmp_path):
    if request.param == "mini":
        return load_foundation("mini", image_size=64, grid_side=4)
    network = random_network("test_resnet") if request.param == "resnet" else random_network("test_vit", img_size=64)
    return load_foundation(str(save_folder(network, tmp_path / "network")), image_size=64, grid_side=4)


def test_the_network_is_frozen_and_stays_in_evaluation_mode(foundation):
    before = {name: tensor.clone() for name, tensor in foundation.state_dict().items()}
    assert not any(module.training for module in foundation.modules())
    nn.ModuleList([foundation]).train()
    assert not any(module.training for module in foundation.modules())
    assert not any(parameter.requires_grad for parameter in foundation.parameters())
    images = images_of(64)
    assert torch.equal(foundation(images), foundation(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in foundation.state_dict().items())


def test_gradients_flow_to_the_images_from_every_layer(foundation):
    images = images_of(64).requires_grad_()
    for features in [*foundation.layers(images), foundation(images)]:
        (gradient,) = torch.autograd.grad(features.square().mean(), images, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum(dim=(1, 2, 3)).min() > 0


def test_under_autocast_the_maps_are_still_float32_and_nearly_the_same(foundation):
    images = images_of(64)
    exact = foundation.layers(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = foundation.layers(images)
        assert foundation(images).dtype == torch.float32
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.float32
        assert 0 < (a - b).norm() / b.norm() < 0.1


def test_an_unknown_spec_is_refused_with_the_choices(tmp_path):
    for spec in ("dino", "", str(tmp_path / "none"), str(MINI_WEIGHTS)):
        with pytest.raises(ConfigError, match="neither mini, nor timm:NAME, nor a folder"):
            load_foundation(spec, image_size=64, grid_side=4)
    with pytest.raises(ConfigError, match="no network 'tset_vit'; near it: test_vit"):
        load_foundation("timm:tset_vit", image_size=64, grid_side=4)
    with pytest.raises(ConfigError, match="no weights 'test_vit.nonsense'"):
        load_foundation("timm:test_vit.nonsense", image_size=64, grid_side=4)
    with pytest.raises(ConfigError, match="normalize 'none'"):
        load_foundation("mini", image_size=64, grid_side=4, normalize="none")  # type: ignore[arg-type]


def test_a_file_of_another_network_is_refused_with_both_names(tmp_path):
    path = save_weights(random_network("test_resnet"), tmp_path / "resnet.safetensors")
    with pytest.raises(CheckpointError, match="resnet.safetensors does not hold the weights of test_vit"):
        load_foundation("timm:test_vit", path, image_size=64, grid_side=4)
    with pytest.raises(CheckpointError, match="resnet.safetensors does not hold the mini network"):
        load_foundation("mini", path, image_size=64, grid_side=4)
    with pytest.raises(CheckpointError, match="no weights of test_vit at"):
        load_foundation("timm:test_vit", tmp_path / "none.pth", image_size=64, grid_side=4)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_file_that_differs_by_one_tensor_is_refused(tmp_path, change):
    tensors = random_network("test_vit").state_dict()
    if change == "missing":
        del tensors["blocks.5.mlp.fc2.bias"]
    elif change == "unexpected":
        tensors["blocks.6.norm1.bias"] = torch.zeros(64)
    else:
        tensors["norm.weight"] = torch.zeros(63)
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="does not hold the weights of test_vit"):
        load_foundation("timm:test_vit", tmp_path / "weights.safetensors", image_size=64, grid_side=4)


def test_a_folder_that_is_no_network_of_timm_is_refused(tmp_path):
    good = save_folder(random_network("test_vit", img_size=64), tmp_path / "good")
    settings = {"image_size": 64, "grid_side": 4}

    folder = tmp_path / "bad"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="no config.json"):
        load_foundation(str(folder), **settings)
    for text in ("not json", "[]", json.dumps({"model_type": "vit"})):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="no config.json that names the architecture"):
            load_foundation(str(folder), **settings)
    (folder / "config.json").write_text(json.dumps({"architecture": "ViTForEverything"}))
    with pytest.raises(CheckpointError, match="'ViTForEverything', which is no network of timm"):
        load_foundation(str(folder), **settings)
    shutil.copy(good / "config.json", folder)
    with pytest.raises(CheckpointError, match="holds none of model.safetensors"):
        load_foundation(str(folder), **settings)
    save_weights(random_network("test_resnet"), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        load_foundation(str(folder), **settings)
    with pytest.raises(ConfigError, match="leave out the file"):
        load_foundation(str(good), MINI_WEIGHTS, **settings)


def test_a_folders_pickle_is_read_as_tensors_or_not_at_all(tmp_path):
    good = save_folder(random_network("test_vit", img_size=64), tmp_path / "good")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(good / "config.json", pickled)
    torch.save(load_file(good / "model.safetensors"), pickled / "pytorch_model.bin")
    settings = {"image_size": 64, "grid_side": 4}
    a, b = (load_foundation(str(folder), **settings)(images_of(64)) for folder in (good, pickled))
    assert torch.equal(a, b)

    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"norm.weight": Attack()}, protocol=2))
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        load_foundation(str(pickled), **settings)
    assert not canary.exists()


def test_a_folders_config_cannot_lead_to_another_file(tmp_path):
    folder = save_folder(random_network("test_vit", img_size=64), tmp_path / "network")
    expected = load_foundation(str(folder), image_size=64, grid_side=4)(images_of(64))
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"file": "/elsewhere.npz", "hf_hub_id": "someone/else", "custom_load": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_foundation(str(folder), image_size=64, grid_side=4)(images_of(64)), expected)


def test_a_network_that_cannot_look_at_such_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="image_size 8 is below 16"):
        load_foundation("mini", image_size=8, grid_side=1)
    folder = save_folder(random_network("gmlp_ti16_224"), tmp_path / "mixer")  # its side is built into its weights
    with pytest.raises(ConfigError, match="mixer cannot look at images of 64 pixels"):
        load_foundation(str(folder), image_size=64, grid_side=4)


def test_without_timm_the_message_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    for spec in ("timm:test_vit", str(tmp_path)):
        with pytest.raises(MissingDependencyError, match=r"pip install 'hieratok\[foundation\]'"):
            load_foundation(spec, image_size=64, grid_side=4)
    assert load_foundation("mini", image_size=64, grid_side=4).name == "mini"


@pytest.fixture
def hub_cache(monkeypatch, tmp_path) -> Path:
    """The hub's cache on this disk, empty, and no way to the hub itself."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_without_a_file_the_weights_are_the_hubs(hub_cache, tmp_path):
    own = random_network("test_vit", dynamic_img_size=True)
    repository = hub_cache / "models--timm--test_vit.r160_in1k"
    for folder in ("refs", "snapshots/0123"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    save_weights(own, repository / "snapshots" / "0123" / "model.safetensors")

    foundation = load_foundation("timm:test_vit.r160_in1k", image_size=64, grid_side=4)
    expected = as_map(own.forward_features(images_of(64)), 1, 4)
    torch.testing.assert_close(foundation(images_of(64)), expected, rtol=1e-5, atol=1e-5)
    again = load_foundation("timm:test_vit.r160_in1k", image_size=64, grid_side=2)
    assert len(foundation.sha256) == 64 and foundation.sha256 == again.sha256  # of the weights, whatever the grid


def test_where_the_hub_is_out_of_reach_the_message_asks_for_a_file(hub_cache):
    with pytest.raises(
        CheckpointError,
        match="cannot get the weights of test_vit.r160_in1k.*give a local file of them as foundation_weights",
    ):
        load_foundation("timm:test_vit.r160_in1k", image_size=64, grid_side=4)
