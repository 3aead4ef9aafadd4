"""The generator is DiT: its sizes are the paper's, its beginning is the identity, and its folder gives it back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hieratok.errors import CheckpointError, ConfigError
from hieratok.models.attention import ATTENTION_BACKENDS
from hieratok.models.dit import DiT, sinusoidal_positions
from hieratok.models.presets import DIT_PRESETS, build_dit, dit_fields

SMALL = {"sample_size": 4, "in_channels": 3, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_classes": 5}


def make(**changes) -> DiT:
    """A small network that is no longer at its beginning: every weight is drawn anew."""
    torch.manual_seed(0)
    model = DiT(**{**SMALL, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch: int = 2, channels: int = 3, side: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(batch, channels, side, side, generator=generator)
    return noisy, torch.rand(batch, generator=generator) * 1000, torch.arange(batch) % 5


# Sizes


@pytest.mark.parametrize(("preset", "millions"), [("dit-b", 130), ("dit-l", 458), ("dit-xl", 675)])
def test_the_papers_generators_have_the_papers_parameters(preset, millions):
    with torch.device("meta"):
        model = build_dit({"preset": preset})
    assert (model.config.sample_size, model.config.in_channels, model.config.patch_size) == (16, 16, 1)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)  # Table 6


@pytest.mark.parametrize("preset", DIT_PRESETS)
def test_every_preset_builds(preset):
    with torch.device("meta"):
        assert build_dit({"preset": preset}).config.hidden_size == DIT_PRESETS[preset]["hidden_size"]


@pytest.mark.parametrize("out_channels", [None, 3, 6])
@pytest.mark.parametrize(("patch_size", "side"), [(1, 2), (1, 5), (2, 4), (2, 6)])
def test_the_answer_has_the_shape_of_the_latents(out_channels, patch_size, side):
    model = make(sample_size=side, patch_size=patch_size, out_channels=out_channels)
    answer = model(*inputs(batch=2, side=side))
    assert answer.sample.shape == (2, out_channels or 6, side, side)
    assert model.learns_variance == (out_channels != 3)
    assert torch.equal(model(*inputs(batch=2, side=side), return_dict=False)[0], answer.sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 5, "patch_size": 2}, "sample_size 5 is not divisible by patch_size 2"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size 30 is not divisible by 4"),
        ({"hidden_size": 36, "num_heads": 8}, "hidden_size 36 is not divisible by num_heads 8"),
        ({"out_channels": 4}, "out_channels 4 is neither in_channels 3 nor twice as many"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_dit({**SMALL, **changes})


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'dit-xl'"):
        dit_fields({"preset": "dit-xxl"})
    with pytest.raises(ConfigError, match="did you mean 'num_layers'"):
        dit_fields({"num_layer": 3})


# What it computes


def test_at_the_beginning_the_answer_is_zero_and_every_block_is_the_identity():
    torch.manual_seed(0)
    model = DiT(**SMALL)
    assert not model(*inputs()).sample.any()
    tokens, condition = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in model.blocks:
        assert torch.equal(block(tokens, condition, model.layout), tokens)


def test_every_parameter_learns():
    model = make()
    model(*inputs()).sample.square().sum().backward()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize(("patch_size", "side"), [(1, 3), (2, 4), (2, 6)])
def test_unpatchify_puts_every_number_back_where_the_patches_took_it_from(patch_size, side):
    numbers_of_a_patch = patch_size**2 * 4
    model = DiT(
        sample_size=side, patch_size=patch_size, in_channels=4, out_channels=4,
        hidden_size=numbers_of_a_patch, num_layers=1, num_heads=1,
    )  # fmt: skip
    # The convolution as the identity: hidden channel (row, column, channel) is that number of the patch.
    weight = torch.zeros(patch_size, patch_size, 4, 4, patch_size, patch_size)
    for row, column, channel in np.ndindex(patch_size, patch_size, 4):
        weight[row, column, channel, channel, row, column] = 1
    model.patch_embed.weight.data.copy_(weight.view_as(model.patch_embed.weight))
    latents = torch.randn(3, 4, side, side)
    assert torch.equal(model.unpatchify(model.patch_embed(latents).flatten(2).transpose(1, 2)), latents)


def test_positions_are_dits_sines_and_cosines():
    side, width = 3, 16
    expected = np.zeros((side * side, width))
    for row, column in np.ndindex(side, side):
        for k in range(width // 4):
            rate = 10_000 ** (-k / (width // 4))
            waves = [math.sin(column * rate), math.cos(column * rate), math.sin(row * rate), math.cos(row * rate)]
            expected[row * side + column, k :: width // 4] = waves
    assert sinusoidal_positions(side, width).shape == (1, side * side, width)
    np.testing.assert_allclose(sinusoidal_positions(side, width)[0], expected, atol=1e-7)


def test_a_time_is_embedded_as_in_dit():
    model, seen = make(), []
    model.time_embed.up.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    times = torch.tensor([0.0, 1.0, 250.5, 999.0])
    model.time_embed(times)
    rates = np.exp(-np.log(10_000) * np.arange(128) / 128)
    angles = times.double().numpy()[:, None] * rates
    np.testing.assert_allclose(seen[0], np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=1e-4)


def test_any_label_from_the_number_of_classes_on_means_no_class():
    model = make(num_classes=3)
    noisy, times, _ = inputs(1)
    none, *others = (model(noisy, times, torch.tensor([label])).sample for label in (3, 4, 1000))
    assert all(torch.equal(other, none) for other in others)
    assert all(not torch.allclose(model(noisy, times, torch.tensor([label])).sample, none) for label in range(3))


def test_the_answer_depends_on_time_class_and_place_and_not_on_the_batch():
    model = make().eval()
    noisy, times, labels = inputs(3)
    whole = model(noisy, times, labels).sample
    torch.testing.assert_close(whole[1:2], model(noisy[1:2], times[1:2], labels[1:2]).sample, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, model(noisy, times + 100, labels).sample, atol=1e-3)
    assert not torch.allclose(whole, model(noisy, times, (labels + 1) % 5).sample, atol=1e-3)
    turned = model(noisy.transpose(2, 3), times, labels).sample.transpose(2, 3)
    assert not torch.allclose(whole, turned, atol=1e-3)


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_attention_backends_agree(backend):
    model, other = make(attention_backend="matmul"), make(attention_backend=backend)
    torch.testing.assert_close(other(*inputs()).sample, model(*inputs()).sample, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    model, gradients = make().train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        assert model.gradient_checkpointing == checkpointing
        model.zero_grad()
        model(*inputs()).sample.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


def test_under_autocast_the_answer_stays_float32_and_near():
    model = make().eval()
    expected = model(*inputs()).sample
    with torch.autocast("cpu", torch.bfloat16):
        answer = model(*inputs()).sample
    assert answer.dtype == torch.float32
    assert (answer - expected).norm() < 0.03 * expected.norm()
    assert model.to(torch.bfloat16)(inputs()[0].bfloat16(), *inputs()[1:]).sample.dtype == torch.bfloat16


# On disk


def test_a_saved_model_comes_back_bit_for_bit_with_its_statistics_and_positions(tmp_path):
    model = make(latents_mean=[0.5, -1.0, 2.0], latents_std=[1.0, 2.0, 0.25]).eval()
    model.save_pretrained(tmp_path)
    assert "position" not in load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = DiT.from_pretrained(tmp_path)
    assert torch.equal(loaded.position, model.position) and loaded.position.any()
    assert torch.equal(loaded(*inputs()).sample, model(*inputs()).sample)
    assert loaded.config.latents_mean == [0.5, -1.0, 2.0] and loaded.config.out_channels == 6
    normal = loaded.normalize_latents(inputs()[0])
    torch.testing.assert_close(normal[:, 2], (inputs()[0][:, 2] - 2.0) / 0.25)
    torch.testing.assert_close(loaded.denormalize_latents(normal), inputs()[0])


@pytest.mark.parametrize("fault", ["missing", "left over"])
def test_weights_that_are_missing_or_left_over_are_refused(tmp_path, fault):
    make().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    if fault == "missing":
        del tensors["blocks.1.modulation.weight"]
    else:
        tensors["blocks.2.modulation.weight"] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blocks\.[12]\.modulation\.weight"):
        DiT.from_pretrained(tmp_path)


def test_only_safetensors_are_read(tmp_path):
    make().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), tmp_path / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        DiT.from_pretrained(tmp_path)


def test_latents_cannot_be_normalised_before_their_statistics_are_known():
    with pytest.raises(ValueError, match="no latents_mean and latents_std"):
        make().normalize_latents(inputs()[0])
