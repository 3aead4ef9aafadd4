"""The schedulers of diffusers that each objective can be sampled with, set to the constants it was trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from ..config import suggest
from ..errors import ConfigError
from ..losses.diffusion import BETA_END, BETA_START, NUM_TIMESTEPS

CHAIN = {"num_train_timesteps": NUM_TIMESTEPS, "beta_start": BETA_START, "beta_end": BETA_END,
         "beta_schedule": "linear"}  # fmt: skip


def ddpm(learns_variance: bool) -> DDPMScheduler:
    """Ancestral sampling; over evenly spaced steps from the first to the last, as DiT's respaced chain."""
    variance = "learned_range" if learns_variance else "fixed_small"
    return DDPMScheduler(**CHAIN, variance_type=variance, clip_sample=False, timestep_spacing="linspace")


def ddim(_: bool) -> DDIMScheduler:
    """Deterministic."""
    return DDIMScheduler(**CHAIN, clip_sample=False, timestep_spacing="trailing")


def dpm(_: bool) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order: good in 20 steps."""
    return DPMSolverMultistepScheduler(**CHAIN)


def flow_euler(_: bool) -> FlowMatchEulerDiscreteScheduler:
    """Euler's method along the velocity."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS)


def flow_dpm(_: bool) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ along the velocity."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=NUM_TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True
    )


# By objective; the first of each is the default of an evaluation, with so many steps.
SCHEDULERS: dict[str, dict[str, Callable[[bool], Any]]] = {
    "ddpm": {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm},
    "flow": {"euler": flow_euler, "dpm++": flow_dpm},
}
DEFAULT_STEPS = {"ddpm": 250, "ddim": 50, "dpm++": 20, "euler": 50}
# What a saved pipeline holds: quick, and for DDPM one that diffusers' own `DiTPipeline` can use.
SAVED = {"ddpm": "ddim", "flow": "euler"}


def make_scheduler(name: str | None, objective: str, learns_variance: bool) -> Any:
    """A scheduler by name; None is the default of an objective.

    Raises:
        ConfigError: no such scheduler for this objective.
    """
    known = SCHEDULERS[objective]
    name = name or next(iter(known))
    if name not in known:
        raise ConfigError(f"sampling.scheduler '{name}' does not go with a {objective} model{suggest(name, known)}")
    return known[name](learns_variance)


def objective_of(scheduler: Any) -> str:
    """What a model was trained for, from the scheduler that it was saved with."""
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.get("use_flow_sigmas")
    return "flow" if flow else "ddpm"
