"""The VF loss is its formula, trains the projection and the latents, and leaves the frozen network alone."""

import copy
import math

import numpy as np
import pytest
import torch

from hieratok.errors import ConfigError
from hieratok.losses.alignment import (
    Alignment,
    AlignmentConfig,
    marginal_cosine,
    marginal_distance,
    resize_features,
)
from hieratok.losses.foundation import load_foundation

BATCH, CHANNELS, IMAGE, GRID = 2, 3, 16, 2  # mini's map for such a grid has 128 channels and a stride of 8


def alignment_of(latent_channels: int = CHANNELS, image_size: int = IMAGE, grid_side: int = GRID, **fields):
    torch.manual_seed(0)
    return Alignment(AlignmentConfig(**fields), latent_channels, image_size, grid_side)


def images_of(side: int = IMAGE) -> torch.Tensor:
    return torch.rand(BATCH, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents_of(side: int = GRID, channels: int = CHANNELS) -> torch.Tensor:
    return torch.randn(BATCH, channels, side, side, generator=torch.Generator().manual_seed(2))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def formula_cos(projected: np.ndarray, features: np.ndarray, margin: float) -> float:
    """Position by position, of float64 `(B, C, h, w)`."""
    costs = [
        max(0.0, 1 - margin - cosine(projected[b, :, y, x], features[b, :, y, x]))
        for b, y, x in np.ndindex(projected.shape[0], *projected.shape[2:])
    ]
    return sum(costs) / len(costs)


def formula_distance(projected: np.ndarray, features: np.ndarray, margin: float) -> float:
    """Pair by pair, of float64 `(B, C, h, w)`."""
    costs = []
    for z, f in zip(projected, features, strict=True):
        positions = list(np.ndindex(z.shape[1:]))
        for i in positions:
            for j in positions:
                gap = cosine(z[:, *i], z[:, *j]) - cosine(f[:, *i], f[:, *j])
                costs.append(max(0.0, abs(gap) - margin))
    return sum(costs) / len(costs)


@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.5, 0.25), (0.98, 0.6)])
def test_the_terms_are_those_of_the_formula(margins):
    rng = np.random.default_rng(0)
    projected, features = rng.normal(size=(2, 2, 5, 3, 4))
    z, f = torch.from_numpy(projected).float(), torch.from_numpy(features).float()
    cos, distance = marginal_cosine(z, f, margins[0]), marginal_distance(z, f, margins[1])
    assert cos.item() == pytest.approx(formula_cos(projected, features, margins[0]), rel=1e-5)
    assert distance.item() == pytest.approx(formula_distance(projected, features, margins[1]), rel=1e-5)


def test_two_positions_worked_by_hand():
    z = torch.tensor([[2.0, 0.0], [0.0, 3.0]]).view(1, 2, 1, 2)  # (2, 0) and (0, 3): at right angles
    f = torch.tensor([[1.0, 4.0], [0.0, 0.0]]).view(1, 2, 1, 2)  # (1, 0) and (4, 0): alike
    assert marginal_cosine(z, f, 0.0).item() == pytest.approx(0.5)  # 0 and 1
    assert marginal_cosine(z, f, 0.5).item() == pytest.approx(0.25)  # 0 and 1 - 0.5
    assert marginal_distance(z, f, 0.0).item() == pytest.approx(0.5)  # |0 - 1| for two of four pairs
    assert marginal_distance(z, f, 0.25).item() == pytest.approx(0.375)


def test_what_lies_within_the_margin_costs_nothing_and_has_no_gradient():
    angles = torch.tensor([0.0, math.acos(0.6), math.acos(0.4)])
    z = torch.stack([angles.cos(), angles.sin()]).view(1, 2, 1, 3).requires_grad_()
    f = torch.tensor([[1.0], [0.0]]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    cost = marginal_cosine(z, f, 0.5)
    assert cost.item() == pytest.approx(0.1 / 3, rel=1e-5)  # only the last is below 0.5, by 0.1
    cost.backward()
    assert (z.grad[..., :2] == 0).all() and z.grad[..., 2].abs().min() > 0
    # The similarities are 0.6, 0.4 and that of the last two, where the features' are 1.
    between = 0.6 * 0.4 + 0.8 * math.sqrt(1 - 0.16)
    assert 1 - between < 0.45 < 0.6
    assert marginal_distance(z, f, 0.45).item() == pytest.approx(2 * 0.15 / 9, rel=1e-5)


@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.98, 0.6)])  # the second cuts some positions and some pairs
def test_gradients_to_latents_and_projection_are_the_finite_differences_of_the_formula(margins):
    weights = (0.7, 1.3)
    alignment = alignment_of(
        cos_weight=weights[0], distance_weight=weights[1], cos_margin=margins[0], distance_margin=margins[1]
    )
    latents = latents_of().requires_grad_()
    output = alignment(latents, images_of())
    output.total.backward()

    features = alignment.foundation(images_of()).double().numpy()
    arrays = {
        "latents": latents.detach().double().numpy(),
        "projection": alignment.projection.weight.detach().double().numpy()[:, :, 0, 0],
    }

    def total() -> float:
        projected = np.einsum("cd,bdhw->bchw", arrays["projection"], arrays["latents"])
        cos, distance = formula_cos(projected, features, margins[0]), formula_distance(projected, features, margins[1])
        return weights[0] * cos + weights[1] * distance

    assert output.total.item() == pytest.approx(total(), rel=1e-5)
    ours = {"latents": latents.grad.numpy(), "projection": alignment.projection.weight.grad.numpy()[:, :, 0, 0]}
    step = 1e-6
    for name, array in arrays.items():
        expected = np.zeros_like(array)
        for index in list(np.ndindex(array.shape)):
            kept = array[index]
            array[index] = kept + step
            above = total()
            array[index] = kept - step
            expected[index] = (above - total()) / (2 * step)
            array[index] = kept
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(ours[name], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_the_total_is_the_weighted_sum_of_the_terms_which_are_detached():
    output = alignment_of(cos_weight=0.5, distance_weight=3.0)(latents_of(), images_of())
    terms = output.terms
    assert list(terms) == ["alignment_cos", "alignment_distance"]
    assert not any(term.requires_grad for term in terms.values()) and output.total.requires_grad
    assert min(term.item() for term in terms.values()) > 0
    assert output.total.item() == pytest.approx(0.5 * terms["alignment_cos"] + 3 * terms["alignment_distance"])


def test_a_latent_whose_projection_is_the_features_costs_nothing():
    alignment = alignment_of(latent_channels=128, cos_margin=0.0, distance_margin=0.0)
    with torch.no_grad():
        alignment.projection.weight.copy_(torch.eye(128).view(128, 128, 1, 1))
    features = alignment.foundation(images_of())
    assert alignment(features, images_of()).total.item() == pytest.approx(0, abs=1e-6)
    assert alignment(5 * features, images_of()).total.item() == pytest.approx(0, abs=1e-6)  # only directions count
    assert alignment(-features, images_of()).terms["alignment_cos"].item() == pytest.approx(2)


def test_a_latent_of_zeros_has_a_finite_gradient():
    alignment, latents = alignment_of(), torch.zeros(BATCH, CHANNELS, GRID, GRID, requires_grad=True)
    alignment(latents, images_of()).total.backward()
    assert latents.grad.isfinite().all() and alignment.projection.weight.grad.isfinite().all()


def test_training_brings_the_loss_down():
    alignment, latents = alignment_of(cos_margin=0.0, distance_margin=0.0), latents_of().requires_grad_()
    optimizer = torch.optim.Adam([latents, *alignment.parameters()], lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        output = alignment(latents, images_of())
        output.total.backward()
        optimizer.step()
        losses.append(output.total.item())
    assert losses[-1] < 0.1 * losses[0]


def test_only_the_projection_is_trained_and_saved():
    alignment = alignment_of()
    assert list(alignment.state_dict()) == ["projection.weight"]
    assert [name for name, _ in alignment.named_parameters()] == ["projection.weight"]
    assert alignment.projection.weight.shape == (128, CHANNELS, 1, 1)
    other = alignment_of()
    with torch.no_grad():
        other.projection.weight.zero_()
    other.load_state_dict(alignment.state_dict())
    assert torch.equal(other.projection.weight, alignment.projection.weight)


def test_the_frozen_network_gets_no_gradient_and_stays_in_evaluation_mode():
    alignment, images = alignment_of().train().requires_grad_(True), images_of().requires_grad_()
    before = copy.deepcopy(alignment.foundation.state_dict())
    alignment(latents_of(), images).total.backward()
    assert not any(module.training for module in alignment.foundation.modules())
    assert all(p.grad is None and not p.requires_grad for p in alignment.foundation.parameters())
    assert images.grad is None and alignment.projection.weight.grad is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in alignment.foundation.state_dict().items())


def test_the_frozen_network_is_moved_with_the_projection():
    alignment = torch.nn.ModuleDict({"alignment": alignment_of()}).to("meta")["alignment"]
    assert {p.device.type for p in [*alignment.parameters(), *alignment.foundation.parameters()]} == {"meta"}


@pytest.mark.parametrize(("grid_side", "side"), [(6, 8), (3, 4), (40, 4)])  # of the latent, and of the network's map
def test_features_on_another_grid_are_interpolated_to_the_latents(grid_side, side):
    alignment, images = alignment_of(image_size=64, grid_side=grid_side), images_of(64)
    features = alignment.foundation(images)
    assert features.shape[-1] == side
    latents = latents_of(grid_side)
    matched = torch.nn.functional.interpolate(features, size=(grid_side,) * 2, mode="bilinear", antialias=True)
    expected = marginal_cosine(alignment.projection(latents), matched, 0.5)
    torch.testing.assert_close(alignment(latents, images).terms["alignment_cos"], expected.detach())


def test_shrinking_does_not_alias_and_a_grid_of_the_same_size_is_left_alone():
    ramp = torch.arange(8.0) ** 2
    features = (ramp.view(8, 1) + 10 * ramp.view(1, 8)).view(1, 1, 8, 8)
    assert resize_features(features, (8, 8)) is features
    kernel = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8  # a triangle two pixels to each side
    inner = torch.stack([kernel @ ramp[i : i + 4] for i in (1, 3)])
    expected = inner.view(2, 1) + 10 * inner.view(1, 2)
    torch.testing.assert_close(resize_features(features, (4, 4))[0, 0, 1:3, 1:3], expected)


def test_under_autocast_the_loss_is_float32_and_that_of_float32():
    projected, features = latents_of(4, 32).bfloat16(), latents_of(4, 32).flip(0)
    expected = [f(projected.float(), features, 0.1) for f in (marginal_cosine, marginal_distance)]
    alignment = alignment_of()
    features_exact = alignment.foundation(images_of())
    with torch.autocast("cpu", torch.bfloat16):
        actual = [f(projected, features, 0.1) for f in (marginal_cosine, marginal_distance)]
        output = alignment(latents_of(), images_of())
        features_rounded = alignment.foundation(images_of())
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert output.total.dtype == torch.float32 and not torch.equal(features_exact, features_rounded)
    by_hand = marginal_cosine(alignment.projection(latents_of()), features_rounded, 0.5)
    assert torch.equal(output.terms["alignment_cos"], by_hand.detach())


def test_the_config_is_that_of_va_vae_and_off():
    config = AlignmentConfig()
    assert (config.weight, config.cos_weight, config.distance_weight) == (0, 1, 1)
    assert (config.cos_margin, config.distance_margin, config.adaptive_max) == (0.5, 0.25, 1e8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight", -0.1),
        ("weight", math.inf),
        ("cos_weight", math.nan),
        ("distance_weight", -1.0),
        ("cos_margin", 2.1),
        ("cos_margin", math.nan),
        ("distance_margin", -0.1),
        ("adaptive_max", 0.0),
        ("adaptive_max", math.inf),
        ("normalize", "imagenet"),
        ("foundation", ""),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"loss\.alignment\.{field} "):
        AlignmentConfig(**{field: value})


def test_a_weight_on_two_terms_that_are_off_is_refused():
    with pytest.raises(ConfigError, match="cos_weight and loss.alignment.distance_weight are both 0"):
        AlignmentConfig(weight=0.1, cos_weight=0, distance_weight=0)
    with pytest.raises(ConfigError, match="neither mini"):
        alignment_of(foundation="dinov9")


def test_the_image_is_normalised_as_the_config_says(tmp_path):
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2, img_size=32)
    folder = str(tmp_path / "vit")
    data = {"mean": (0.1,) * 3, "std": (0.2,) * 3}
    timm.models.save_for_hf(network, folder, safe_serialization=True, data_config=data)
    for normalize in ("half", "network"):
        alignment = alignment_of(image_size=32, foundation=folder, normalize=normalize)
        expected = load_foundation(folder, image_size=32, grid_side=GRID, normalize=normalize)(images_of(32))
        assert torch.equal(alignment.foundation(images_of(32)), expected)
        assert alignment.projection.weight.shape == (32, CHANNELS, 1, 1)
