"""Discriminators: published structure, logits that mean what they say, and frozen networks that stay outside."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hieratok.errors import ConfigError
from hieratok.losses.adversarial import discriminator_loss
from hieratok.losses.discriminators import (
    DISCRIMINATORS,
    Blur,
    Discriminators,
    PatchGANDiscriminator,
    StyleGANDiscriminator,
    build_discriminator,
    minibatch_std,
)

WIDTH = 1 / 16  # of the published channels


def images_of(side: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def made(kind: str, side: int, **settings) -> nn.Module:
    torch.manual_seed(0)
    return build_discriminator(kind, side, width=settings.pop("width", WIDTH), **settings)


@pytest.mark.parametrize(
    ("kind", "side", "num_logits"),
    [
        ("stylegan", 8, 1), ("stylegan", 32, 1), ("stylegan", 64, 1), ("stylegan", 128, 1),
        ("patchgan", 24, 1), ("patchgan", 32, 4), ("patchgan", 64, 36), ("patchgan", 128, 196),
        # mini's maps have sides 16, 8, 4, 2 of 32 pixels, 32, 16, 8, 4 of 64; the larger are averaged down to S / 8
        ("dino", 32, 3 * 16 + 4), ("dino", 64, 3 * 64 + 16),
    ],
)  # fmt: skip
def test_logits_are_float32_and_one_row_for_each_image(kind, side, num_logits):
    network = made(kind, side)
    logits = network(images_of(side))
    assert logits.shape == (2, num_logits) and logits.dtype == torch.float32
    assert network.name == kind
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(images_of(side)).dtype == torch.float32


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_under_autocast_logits_are_nearly_those_of_float32(kind):
    network = made(kind, 32, width=1 / 8).eval()
    images = images_of(32, batch=4)
    full = network(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(images)
    assert (half - full).norm() < 0.05 * full.norm()


def test_the_blur_of_a_point_is_the_binomial_filter():
    point = torch.zeros(1, 2, 7, 7)
    point[0, 1, 3, 3] = 64.0
    blurred = Blur()(point, padding=2)
    assert blurred.shape == (1, 2, 8, 8)
    expected = torch.zeros(8, 8)
    expected[2:6, 2:6] = torch.tensor([[1.0, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]])
    torch.testing.assert_close(blurred[0, 1], expected)
    assert blurred[0, 0].abs().max() == 0


def test_a_strided_blur_is_every_other_pixel_of_the_blur():
    maps = torch.randn(2, 3, 8, 8)
    blur = Blur()
    torch.testing.assert_close(blur(maps, padding=1, stride=2), blur(maps, padding=1)[:, :, ::2, ::2])


@pytest.mark.parametrize(("batch", "size"), [(8, 4), (4, 4), (6, 3), (2, 2), (10, 2)])
def test_the_minibatch_deviation_is_that_of_numpy_over_groups_of_neighbours(batch, size):
    maps = torch.randn(batch, 5, 4, 3)
    numbers = maps.double().numpy().reshape(batch // size, size, 5, 4, 3)
    expected = np.repeat(np.sqrt(numbers.var(axis=1) + 1e-8).mean(axis=(1, 2, 3)), size)
    actual = minibatch_std(maps)
    assert actual.shape == (batch, 1, 4, 3)
    np.testing.assert_allclose(actual.numpy(), np.broadcast_to(expected.reshape(-1, 1, 1, 1), (batch, 1, 4, 3)), 1e-5)


@pytest.mark.parametrize("batch", [1, 5])
def test_the_minibatch_deviation_of_groups_of_one_is_zero(batch):
    assert minibatch_std(torch.randn(batch, 5, 4, 4)).abs().max() == 0


def test_equal_samples_have_a_finite_gradient_through_the_minibatch_deviation():
    maps = torch.ones(4, 2, 4, 4, requires_grad=True)
    minibatch_std(maps).sum().backward()
    assert maps.grad is not None and maps.grad.isfinite().all()


def test_stylegan_has_the_published_channels():
    with torch.device("meta"):
        network = StyleGANDiscriminator(512)
    assert network.from_rgb.out_channels == 32
    assert [block.down.out_channels for block in network.blocks] == [64, 128, 256, 512, 512, 512, 512]
    assert network.conv.in_channels == 513 and network.hidden.in_features == 512 * 16
    with torch.device("meta"):
        narrow = StyleGANDiscriminator(128, width=0.1, max_channels=128)
    assert [block.down.out_channels for block in narrow.blocks] == [16, 16, 16, 16, 16]  # 12.8 as a multiple of 8


def test_twice_as_wide_up_to_512_channels_it_has_the_layers_that_stylegan2_prints_for_1024_pixels():
    # Numbers of parameters of FromRGB, then of Conv0, Conv1_down and Skip of each block, configuration F.
    printed = [128, 9248, 18496, 2048, 36928, 73856, 8192, 147584, 295168, 32768, 590080, 1180160, 131072]
    with torch.device("meta"):
        network = StyleGANDiscriminator(1024, width=2, max_channels=256)
    layers = [network.from_rgb] + [m for block in network.blocks for m in (block.conv, block.down, block.skip)]
    assert [sum(p.numel() for p in layer.parameters()) for layer in layers[: len(printed)]] == printed


def test_he_weights_keep_the_size_of_the_signal_from_block_to_block():
    torch.manual_seed(0)
    network = StyleGANDiscriminator(64, width=1 / 8)
    x = F.leaky_relu(network.from_rgb(torch.randn(4, 3, 64, 64)), 0.2)
    sizes = [x.square().mean()]
    for block in network.blocks:
        sizes.append((x := block(x)).square().mean())
    # The first blur takes most of white noise away. Weights without the factor of 2 would halve the rest each time.
    assert 0.5 * sizes[1] < sizes[-1] < 2 * sizes[1]


@pytest.mark.parametrize("side", [4, 24, 48, 100])
def test_stylegan_refuses_sides_that_do_not_halve_down_to_four_and_names_the_remedy(side):
    with pytest.raises(ConfigError, match=rf"power of two of at least 8, not {side}.*patchgan"):
        build_discriminator("stylegan", side)


def test_patchgan_refuses_sides_that_leave_no_patch_and_names_the_smallest():
    with pytest.raises(ConfigError, match="3 strided layers needs images of at least 24 pixels, not 23"):
        PatchGANDiscriminator(23)
    assert PatchGANDiscriminator(24, WIDTH)(images_of(24)).shape == (2, 1)
    assert PatchGANDiscriminator(16, WIDTH, num_layers=2)(images_of(16)).shape == (2, 4)


def test_patchgan_has_pix2pix_layers():
    with torch.device("meta"):
        network = PatchGANDiscriminator(256)
    convolutions = [layer for layer in network.layers if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 1]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 1, 1]
    assert {c.kernel_size for c in convolutions} == {(4, 4)}


@pytest.mark.parametrize("kind", ["patchgan", "dino"])
def test_logits_of_an_image_do_not_depend_on_its_company(kind):
    network = made(kind, 32).eval()
    images = images_of(32, batch=4)
    alone = network(images[:1])
    torch.testing.assert_close(network(images)[:1], alone)
    torch.testing.assert_close(network(images + torch.randn(4, 1, 1, 1).index_fill(0, torch.tensor(0), 0))[:1], alone)


def test_stylegan_judges_an_image_by_its_group_and_by_no_other():
    network = made("stylegan", 16)
    images = images_of(16, batch=8)
    changed = images.clone()
    changed[7] = 0
    before, after = network(images), network(changed)
    torch.testing.assert_close(before[:4], after[:4])
    assert (before[4:7] != after[4:7]).all()


class TestOverFrozenFeatures:
    def test_what_is_saved_and_trained_are_the_heads(self):
        network = made("dino", 32)
        assert all(name.startswith("heads.") for name in network.state_dict())
        assert all(name.startswith("heads.") for name, _ in network.named_parameters())
        assert [type(module).__name__ for module in network.children()] == ["ModuleList"]
        frozen = {id(p) for p in network.foundation.parameters()}
        assert frozen and not frozen & {id(p) for p in network.parameters()}

    def test_gradients_reach_the_images_and_the_heads_but_no_frozen_weight(self):
        network = made("dino", 32)
        images = images_of(32).requires_grad_()
        network.train()(images).square().mean().backward()
        assert images.grad is not None and (images.grad.flatten(1).norm(dim=1) > 0).all()
        assert all(
            p.grad is not None and p.grad.norm() > 0 for name, p in network.named_parameters() if "bias" not in name
        )
        assert all(p.grad is None and not p.requires_grad for p in network.foundation.parameters())

    def test_every_level_of_features_has_its_logits(self):
        network = made("dino", 64).eval()
        images = images_of(64)
        logits = network(images)
        with torch.no_grad():
            network.heads[2].head.bias += 1
        moved = network(images) - logits
        expected = torch.zeros(2, 3 * 64 + 16)
        expected[:, 128:192] = 1
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)

    def test_the_frozen_network_moves_with_the_heads_and_stays_in_evaluation_mode(self):
        network = made("dino", 32).double().train()
        assert {p.dtype for p in network.foundation.parameters()} == {torch.float64}
        assert not any(module.training for module in network.foundation.modules())
        assert Discriminators([32], "dino", width=WIDTH).to("meta").networks[0](images_of(32).to("meta")).is_meta

    def test_convolutions_of_a_head_have_a_largest_singular_value_of_one(self):
        network = made("dino", 32)
        for _ in range(50):  # each pass is one step of the power iteration
            network(images_of(32, batch=1))
        for layer in (layer for head in network.heads for layer in (head.project, head.conv, head.head)):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() == pytest.approx(1, abs=0.02)

    def test_a_saved_discriminator_judges_as_before(self):
        network, other = made("dino", 32).eval(), build_discriminator("dino", 32, width=WIDTH).eval()
        assert not torch.equal(other(images_of(32)), network(images_of(32)))
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(images_of(32)), network(images_of(32)))

    def test_images_that_the_foundation_cannot_look_at_are_refused(self):
        with pytest.raises(ConfigError, match="8 is below 16"):
            build_discriminator("dino", 8)


class TestSeveralScales:
    def test_per_scale_each_side_has_its_own_discriminator(self):
        torch.manual_seed(0)
        networks = Discriminators([8, 32], "stylegan", "per_scale", WIDTH)
        images = [images_of(8), images_of(32)]
        expected = [network(batch) for network, batch in zip(networks.networks, images, strict=True)]
        assert len(expected) == 2 and all(map(torch.equal, networks(images), expected))

    def test_shared_the_one_discriminator_judges_images_enlarged_to_its_side(self):
        torch.manual_seed(0)
        networks = Discriminators([8, 32], "patchgan", "shared", WIDTH)
        images = [images_of(8), images_of(32)]
        (single,) = networks.networks
        enlarged = F.interpolate(images[0], scale_factor=4, mode="bilinear", align_corners=False, antialias=False)
        small, large = networks(images)
        torch.testing.assert_close(small, single(enlarged))
        assert torch.equal(large, single(images[1]))

    def test_gradients_reach_the_images_of_every_scale(self):
        networks = Discriminators([16, 32], "stylegan", "shared", WIDTH)
        images = [images_of(16).requires_grad_(), images_of(32).requires_grad_()]
        sum(logits.sum() for logits in networks(images)).backward()
        assert all(batch.grad.norm() > 0 for batch in images)

    def test_what_makes_no_sense_is_refused(self):
        for sides in ([], [32, 16], [16, 16]):
            with pytest.raises(ConfigError, match="ascend"):
                Discriminators(sides, "stylegan")
        with pytest.raises(ConfigError, match="did you mean 'shared'"):
            Discriminators([16], "stylegan", "share")
        with pytest.raises(ConfigError, match=r"discriminator.kind is 'style'; did you mean 'stylegan'"):
            Discriminators([16], "style")
        with pytest.raises(ValueError, match="shorter"):
            Discriminators([8, 16], "stylegan", width=WIDTH)([images_of(8)])


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_a_discriminator_learns_to_tell_sharp_images_from_blurred_ones(kind):
    network = made(kind, 32, width=1 / 32 if kind == "stylegan" else 1 / 8).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)

    def pair(step: int) -> tuple[Tensor, Tensor]:
        real = images_of(32, batch=8, seed=step)
        return real, F.avg_pool2d(real, 3, 1, 1) * math.sqrt(3)

    for step in range(40):
        real, fake = pair(step)
        loss = discriminator_loss("hinge", network(real), network(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = pair(1000)
    with torch.no_grad():
        on_real, on_fake = network(real), network(fake)
    assert (on_real.mean(dim=1) > 0).all() and (on_fake.mean(dim=1) < 0).all()
    assert loss < 0.5
