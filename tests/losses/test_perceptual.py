"""LPIPS: `vgg16` is the published metric, `mini` ranks damage as a person would."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from hieratok.errors import CheckpointError, ConfigError
from hieratok.losses.mini import MINI_WEIGHTS, load_mini
from hieratok.losses.perceptual import LPIPS


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Eight 64 x 64 pieces of the two photographs that come with scikit-learn, at half size."""
    from sklearn.datasets import load_sample_images

    pieces = []
    for pixels in load_sample_images().images:
        photo = Image.fromarray(pixels).reduce(2)
        pieces += [photo.crop((x, y, x + 64, y + 64)) for x, y in ((90, 30), (120, 60), (200, 120), (60, 140))]
    return pieces


def as_batch(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def blurred(image: Image.Image, strength: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(strength))


def noisy(image: Image.Image, strength: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, strength, (64, 64, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).round().astype(np.uint8))


def compressed(image: Image.Image, strength: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=100 - strength)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize(
    ("damage", "strengths"),
    [(blurred, (0.4, 0.7, 1.0, 1.5, 2.5)), (noisy, (3, 8, 16, 32, 64)), (compressed, (20, 50, 75, 90, 97))],
)
def test_the_mini_distance_rises_with_the_damage(photographs, damage, strengths):
    originals = as_batch(photographs)
    lpips = LPIPS("mini")
    distances = torch.stack([lpips(as_batch([damage(p, s) for p in photographs]), originals) for s in strengths])
    assert (distances[0] > 0).all()
    assert (distances.diff(dim=0) > 0).all(), f"not monotonic for every image: {distances}"


def test_an_image_is_at_no_distance_from_itself(photographs):
    images = as_batch(photographs)
    assert LPIPS("mini")(images, images).abs().max() == 0


def test_the_distance_has_a_gradient_to_the_first_image_only(photographs):
    a, b = as_batch(photographs[:2]).requires_grad_(), as_batch(photographs[2:4]).requires_grad_()
    lpips = LPIPS("mini").train()
    lpips(a, b).sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0
    assert b.grad is None and all(p.grad is None for p in lpips.parameters()) and not lpips.training


def test_the_shipped_network_is_small_and_its_card_names_its_accuracy():
    assert MINI_WEIGHTS.stat().st_size <= 3_000_000
    card = (MINI_WEIGHTS.parent / "mini_card.md").read_text()
    assert "top-1 accuracy" in card and load_mini().sha256 in card


def random_vgg16(path: Path):
    """A seeded random VGG16 in torchvision's layout, saved to `path`; the module is returned."""
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.vgg16(weights=None)
    convolutions = {k: v for k, v in network.state_dict().items() if k.startswith("features.")}
    if path.suffix == ".safetensors":
        save_file(convolutions, path)
    else:
        torch.save(convolutions, path)
    return network


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_with_the_same_backbone_weights_vgg16_equals_torchmetrics(photographs, tmp_path, suffix):
    from torchmetrics.functional.image.lpips import _LPIPS

    network = random_vgg16(tmp_path / f"vgg{suffix}")
    reference = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    slices = [m for i in range(1, 6) for m in getattr(reference.net, f"slice{i}")]
    for target, source in zip(slices, network.features, strict=False):
        target.load_state_dict(source.state_dict())

    a, b = as_batch(photographs[:4]), as_batch(photographs[4:])
    with torch.no_grad():
        expected = reference(a, b).flatten()
        actual = LPIPS("vgg16", tmp_path / f"vgg{suffix}")(a, b)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_files_that_are_not_the_network_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no weights of VGG16 at"):
        LPIPS("vgg16", tmp_path / "none.pth")
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match="does not hold"):
        LPIPS("vgg16", tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match="does not hold the mini network"):
        LPIPS("mini", tmp_path / "wrong.safetensors")
    with pytest.raises(ConfigError, match="mini, vgg16"):
        LPIPS("alex")


@pytest.mark.parametrize("channels_of_weights", [1, 24])
def test_the_distance_of_unit_vectors_and_its_gradient_are_those_of_the_formula(channels_of_weights):
    from hieratok.losses.perceptual import CACHED_NUMBERS, UnitDistance

    torch.manual_seed(0)
    maps = torch.randn(5, 24, 65, 40, requires_grad=True)  # more than one part on a CPU, the last one smaller
    assert maps[0].numel() * 2 < CACHED_NUMBERS < maps.numel()
    targets, weights = torch.randn(5, 24, 65, 40), torch.rand(1, channels_of_weights, 1, 1)
    upstream = torch.rand(5)

    ours = UnitDistance.apply(maps, targets, weights)
    (gradient,) = torch.autograd.grad(ours, maps, upstream)

    def unit(x):
        return x / (x.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()

    formula = ((unit(maps) - unit(targets)).square() * weights).sum(dim=1).mean(dim=(1, 2))
    (expected,) = torch.autograd.grad(formula, maps, upstream)
    torch.testing.assert_close(ours, formula)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)


def test_in_fp16_small_gradients_survive_until_the_loss_scale_lifts_them():
    from hieratok.losses.perceptual import UnitDistance

    torch.manual_seed(0)
    maps, targets = torch.rand(2, 8, 128, 128), torch.rand(2, 8, 128, 128)
    half = maps.half().requires_grad_()
    full = half.detach().float().requires_grad_()
    weights, scale = torch.tensor([[[[0.1]]]]), 2.0**16
    (UnitDistance.apply(half, targets.half(), weights).mean() * scale).backward()
    (UnitDistance.apply(full, targets.half().float(), weights).mean() * scale).backward()
    error = (half.grad.float() - full.grad).norm() / full.grad.norm()
    assert error < 1e-3


@pytest.mark.parametrize("network", ["mini", "vgg16"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_holds_no_weights_is_refused_with_its_name(tmp_path, network, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"no weights at all")
    with pytest.raises(CheckpointError, match="weights"):
        LPIPS(network, path)


def test_downloaded_weights_are_read_safely(monkeypatch):
    from torchvision.models import VGG16_Weights

    asked = {}

    def get_state_dict(self, **settings):
        asked.update(settings)
        return {}

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", get_state_dict)
    with pytest.raises(CheckpointError, match="does not hold"):
        LPIPS("vgg16")
    assert asked["weights_only"] is True


def test_a_pickle_of_weights_is_never_run(tmp_path):
    import pickle

    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    path = tmp_path / "vgg16.pth"
    path.write_bytes(pickle.dumps({"features.0.weight": Attack()}, protocol=2))
    with pytest.raises(CheckpointError):
        LPIPS("vgg16", path)
    assert not canary.exists()
