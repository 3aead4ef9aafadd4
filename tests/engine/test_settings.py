"""The `train` section: what is refused before anything is begun, and how long a run is."""

from __future__ import annotations

import pytest

from hieratok.engine.settings import TrainConfig
from hieratok.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0), ("accumulation", -1), ("log_every", 0), ("checkpoint_every", 0), ("max_minutes", -3.0),
        ("max_minutes", 0.0), ("epochs", 0.0), ("learning_rate", 0.0), ("learning_rate", float("nan")),
        ("learning_rate", float("inf")), ("final_learning_rate", -1e-6), ("weight_decay", float("nan")),
        ("max_grad_norm", -1.0), ("picture_every", -1), ("ema_decay", 1.0), ("ema_decay", -0.1), ("warmup_ratio", 1.0),
        ("betas", (0.9,)), ("betas", (0.9, 1.0)), ("keep_checkpoints", 1),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"train.{name}"):
        TrainConfig(**{name: value})


def test_a_run_of_no_steps_is_refused():
    with pytest.raises(ConfigError, match="train.steps is 0"):
        TrainConfig(epochs=None, steps=0)


@pytest.mark.parametrize(("epochs", "steps"), [(None, None), (1.0, 10)])
def test_the_length_is_given_once(epochs, steps):
    with pytest.raises(ConfigError, match="one of train.epochs and train.steps"):
        TrainConfig(epochs=epochs, steps=steps)


def test_epochs_count_the_images_and_round_up():
    assert TrainConfig(epochs=2, batch_size=256).total_steps(1000) == 8  # 2000 / 256 = 7.8
    assert TrainConfig(epochs=0.001, batch_size=256).total_steps(1000) == 1
    assert TrainConfig(epochs=None, steps=7).total_steps(1000) == 7


def test_a_process_sees_its_part_of_a_micro_batch():
    assert TrainConfig(batch_size=48, accumulation=2).micro_batch_size(world_size=4) == 6
    with pytest.raises(ConfigError, match="train.batch_size 48 is not divisible by train.accumulation 5 x 2 processes"):
        TrainConfig(batch_size=48, accumulation=5).micro_batch_size(world_size=2)
