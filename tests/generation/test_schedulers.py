"""Every scheduler leads to what the generator knows, at the times that it was trained at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from hieratok.errors import ConfigError
from hieratok.generation.pipeline import HieraTokPipeline
from hieratok.generation.schedulers import DEFAULT_STEPS, SAVED, SCHEDULERS, make_scheduler, objective_of
from hieratok.models.dit import DiT

EACH = [(objective, name) for objective, known in SCHEDULERS.items() for name in known]
BARS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
LATENTS = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(5))


class Knowing(DiT):
    """The exact answer to latents that are a Gaussian of deviation `spread` around `LATENTS[class]`."""

    spread = 0.0

    def forward(self, hidden_states: Any, timestep: Any, class_labels: Any, return_dict: bool = True) -> Any:
        noisy, mean = hidden_states.double(), LATENTS[class_labels].double()
        if self.learns_variance:
            kept = BARS[timestep.long()].view(-1, 1, 1, 1)
            noise = (1 - kept).sqrt() * (noisy - kept.sqrt() * mean) / (kept * self.spread**2 + 1 - kept)
            answer = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)  # the smallest variance
        else:
            t = (timestep.double() / 1000).view(-1, 1, 1, 1)
            total = (1 - t) ** 2 * self.spread**2 + t**2
            away = (noisy - (1 - t) * mean) / total
            answer = t * away - (mean + (1 - t) * self.spread**2 * away)  # E[noise | x_t] - E[x_0 | x_t]
        return Transformer2DModelOutput(sample=answer.float())


@pytest.fixture
def draw(make_dit, tiny_model, generators):
    """Latents of the knowing generator by a scheduler."""

    def drawn(objective: str, name: str, labels: list[int], steps: int | None = None, spread: float = 0.0) -> Any:
        model = make_dit(objective, Knowing, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
        model.spread = spread
        pipeline = HieraTokPipeline(model, tiny_model, make_scheduler(name, objective, model.learns_variance))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            labels, 1.0, steps or DEFAULT_STEPS[name], generators(*range(len(labels))), output_type="latent"
        ).images

    return drawn


@pytest.mark.parametrize(("objective", "name"), EACH)
@pytest.mark.parametrize("steps", [None, 12])
def test_latents_that_are_known_exactly_are_reproduced(draw, objective, name, steps):
    found = draw(objective, name, [0, 1, 2, 3, 4], steps)
    # DPM-Solver begins a flow at time 0.999 with pure noise, which leaves a thousandth of (noise - latents).
    torch.testing.assert_close(found, LATENTS, atol=6e-3 if (objective, name) == ("flow", "dpm++") else 1e-3, rtol=0)


@pytest.mark.parametrize(("objective", "name"), EACH)
def test_a_known_distribution_is_reproduced_with_its_mean_and_deviation(draw, objective, name):
    spread = 0.5
    found = draw(objective, name, [3] * 100, spread=spread) - LATENTS[3]
    # 100 x 64 numbers: standard errors of 0.006 of the mean and 1% of the deviation; the rest is the steps' size.
    assert found.mean().item() == pytest.approx(0.0, abs=0.02)
    assert found.std().item() == pytest.approx(spread, rel=0.06)


def test_250_steps_of_ddpm_are_at_the_times_of_the_respaced_chain():
    # Improved DDPM's respacing: the first and the last step of 1000, and between them strides of 999 / 249, rounded.
    stride, expected, current = 999 / 249, [], 0.0
    for _ in range(250):
        expected.append(round(current))
        current += stride
    scheduler = make_scheduler("ddpm", "ddpm", learns_variance=True)
    scheduler.set_timesteps(250)
    assert scheduler.timesteps.tolist() == expected[::-1]
    assert len(set(expected)) == 250 and (expected[0], expected[-1]) == (0, 999)


def test_a_respaced_step_has_the_variance_of_the_shorter_chain():
    scheduler = make_scheduler("ddpm", "ddpm", learns_variance=True)
    scheduler.set_timesteps(250)
    times = scheduler.timesteps.tolist()
    for now, before in zip(times[:-1], times[1:], strict=True):
        beta = 1 - BARS[now] / BARS[before]  # of the respaced chain
        smallest = beta * (1 - BARS[before]) / (1 - BARS[now])
        for fraction, variance in ((-1.0, smallest), (1.0, beta)):
            found = scheduler._get_variance(now, torch.tensor(fraction)).item()
            assert found == pytest.approx(np.log(variance.item()), abs=1e-3)


@pytest.mark.parametrize(("objective", "name"), EACH)
def test_no_scheduler_clips_latents(draw, objective, name):
    assert (LATENTS.abs() > 2).any()
    found = draw(objective, name, [0, 1, 2, 3, 4], 12)
    assert found.abs().max().item() == pytest.approx(LATENTS.abs().max().item(), abs=0.01)


@pytest.mark.parametrize(("objective", "name"), EACH)
def test_a_scheduler_begins_in_noise_and_ends_nearly_clean(objective, name):
    scheduler = make_scheduler(name, objective, True)
    scheduler.set_timesteps(DEFAULT_STEPS[name])
    assert len(scheduler.timesteps) == DEFAULT_STEPS[name]
    assert 999 <= scheduler.timesteps[0] <= 1000 and scheduler.timesteps[-1] <= 50
    assert getattr(scheduler, "init_noise_sigma", 1.0) == 1.0


@pytest.mark.parametrize(("objective", "name"), EACH)
def test_the_objective_is_known_from_the_scheduler_also_from_its_file(objective, name, tmp_path):
    scheduler = make_scheduler(name, objective, True)
    scheduler.save_pretrained(tmp_path)
    assert objective_of(scheduler) == objective_of(type(scheduler).from_pretrained(tmp_path)) == objective


def test_none_is_the_default_and_what_does_not_go_with_the_objective_is_refused():
    assert SAVED.keys() == SCHEDULERS.keys() and DEFAULT_STEPS.keys() == {name for _, name in EACH}
    for objective in SCHEDULERS:
        default = make_scheduler(None, objective, True)
        assert type(default) is type(make_scheduler(next(iter(SCHEDULERS[objective])), objective, True))
    with pytest.raises(ConfigError, match="sampling.scheduler 'euler' does not go with a ddpm model"):
        make_scheduler("euler", "ddpm", True)
    with pytest.raises(ConfigError, match="did you mean 'ddim'"):
        make_scheduler("dddim", "ddpm", True)
