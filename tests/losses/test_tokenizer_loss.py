"""The training loss against its terms computed one by one."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from hieratok.errors import ConfigError
from hieratok.losses import TokenizerLoss, TokenizerLossConfig
from hieratok.losses.perceptual import LPIPS
from hieratok.losses.reconstruction import resize_images


@pytest.fixture
def reconstruction(tiny_model):
    torch.manual_seed(0)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    return tiny_model(images), images


def test_it_is_the_weighted_sum_of_its_terms(reconstruction):
    output, images = reconstruction
    config = TokenizerLossConfig(l1=1.0, mse=0.4, lpips=0.7, kl=1e-3, scale_weights=[0.5, 1.0, 2.0])
    loss = TokenizerLoss(config, [1, 2, 4], 32)(output, images)

    lpips = LPIPS("mini")
    expected = 1e-3 * output.posterior.kl().mean()
    for weight, image in zip([0.5, 1.0, 2.0], output.scales, strict=True):
        target = F.adaptive_avg_pool2d(images, image.shape[-1])
        expected = expected + weight * ((image - target).abs().mean() + 0.4 * (image - target).square().mean())
    expected = expected + 2.0 * 0.7 * lpips(output.sample, images).mean()  # the only scale of 32 px
    torch.testing.assert_close(loss.total, expected)
    assert set(loss.terms) == {
        "l1",
        "mse",
        "lpips",
        "kl",
        "lpips/4",
        *(f"{t}/{s}" for t in ("l1", "mse") for s in (1, 2, 4)),
    }


def test_kl_is_summed_over_a_sample_and_averaged_over_the_batch(reconstruction):
    output, images = reconstruction
    mean, logvar = output.posterior.mean, output.posterior.logvar
    expected = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
    loss = TokenizerLoss(TokenizerLossConfig(), [1, 2, 4], 32)(output, images)
    torch.testing.assert_close(loss.terms["kl"], expected)


def test_a_perfect_reconstruction_at_every_scale_costs_only_its_kl():
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    perfect = SimpleNamespace(
        scales=tuple(resize_images(images, side) for side in (8, 16, 32)),
        posterior=SimpleNamespace(kl=lambda: torch.tensor([2.0, 4.0])),
    )
    loss = TokenizerLoss(TokenizerLossConfig(kl=0.5), [1, 2, 4], 32)(perfect, images)
    assert loss.total.item() == pytest.approx(0.5 * 3.0, abs=1e-6)


def test_a_term_without_weight_is_left_out(reconstruction):
    output, images = reconstruction
    loss = TokenizerLoss(TokenizerLossConfig(mse=0.0, lpips=0.0), [1, 2, 4], 32)
    assert loss.lpips is None
    assert set(loss(output, images).terms) == {"l1", "l1/1", "l1/2", "l1/4", "kl"}


def test_area_resizing_averages_the_area_a_pixel_covers():
    images = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize_images(images, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resize_images(images, 4) is images


def test_fields_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ConfigError, match="2 numbers for the 3 scales"):
        TokenizerLoss(TokenizerLossConfig(scale_weights=[1.0, 1.0]), [1, 2, 4], 32)
    with pytest.raises(ConfigError, match="lpips_min_size 64 must lie between 16"):
        TokenizerLoss(TokenizerLossConfig(lpips_min_size=64), [1, 2, 4], 32)
