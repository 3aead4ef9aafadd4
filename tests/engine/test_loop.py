"""The engine's step, where fp16's loss scale overflows: on a CPU here, whose arithmetic is the same."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from hieratok.data.bad import BadSamples
from hieratok.data.loader import Batch
from hieratok.engine import loop
from hieratok.engine.learner import Learner
from hieratok.engine.loop import Engine
from hieratok.engine.settings import TrainConfig
from hieratok.errors import NonFiniteError

BATCH = Batch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1), torch.zeros(1), ["a.png"], [0], [])


@pytest.fixture
def engine(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    config = TrainConfig(epochs=None, steps=100, batch_size=1, precision="fp16", ema_decay=0.9, tensorboard=False)
    optimizers = [torch.optim.AdamW([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1)]
    return Engine(config, tmp_path, Accelerator(cpu=True), model, optimizers, total_steps=100, model_config={},
                  bad=BadSamples(1, 1.0))  # fmt: skip


def step(engine: Engine, scale: float) -> None:
    loss = engine.model(torch.ones(1, 4)).sum() * scale
    engine.backward(loss, {}, BATCH)
    engine.optimizer_step(engine.clip_gradients())


def test_a_step_that_overflows_changes_no_weight_of_any_optimizer_and_halves_the_scale(engine):
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    average = {name: t.clone() for name, t in engine.ema.tensors.items()}
    engine.model.weight.register_hook(lambda grad: grad * torch.inf)  # the bias's gradient stays finite

    step(engine, 1.0)

    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(engine.ema.tensors[name], average[name])
    assert engine.scaler.get_scale() == 2.0**15
    assert engine.step == 1


def test_a_step_after_it_trains_again(engine):
    hook = engine.model.weight.register_hook(lambda grad: grad * torch.nan)
    step(engine, 1.0)
    hook.remove()
    before = engine.model.weight.detach().clone()
    step(engine, 1.0)
    assert not torch.equal(engine.model.weight, before)
    assert math.isfinite(float(engine._sums["grad_norm"]))


def test_overflowing_for_ever_stops_the_run(engine, tmp_path):
    engine.model.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(NonFiniteError, match="gradient norm"):
        for _ in range(loop.MOST_OVERFLOWS + 1):
            step(engine, 1.0)
    assert "a.png" in (tmp_path / "nonfinite.json").read_text()


@pytest.fixture
def other(engine) -> Learner:
    """A second network that learns in the same steps."""
    torch.manual_seed(1)
    network = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return engine.add(Learner("other", network, [optimizer], engine.config, engine.accelerator))


def step_of_both(engine: Engine, other: Learner) -> None:
    for network, name in ((engine.model, "loss"), (other.network, "loss_other")):
        engine.backward(network(torch.ones(1, 4)).sum(), {}, BATCH, name=name)
    engine.optimizer_step(engine.clip_gradients())


def test_an_overflow_in_one_network_leaves_the_other_learning(engine, other):
    before = [p.detach().clone() for p in (engine.model.weight, other.network.weight)]
    other.network.weight.register_hook(lambda grad: grad * torch.inf)
    step_of_both(engine, other)
    assert not torch.equal(engine.model.weight, before[0]) and torch.equal(other.network.weight, before[1])
    assert engine.scaler.get_scale() == 2.0**15
    assert "grad_norm" in engine._sums and "grad_norm_other" not in engine._sums


def test_a_network_that_overflows_for_ever_stops_the_run_whatever_the_others_do(engine, other):
    other.network.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(NonFiniteError, match="gradient norm_other"):
        for _ in range(loop.MOST_OVERFLOWS + 1):
            step_of_both(engine, other)


def test_a_network_that_steps_ahead_of_the_others_takes_one_step_all_the_same(engine, other):
    before = other.network.weight.detach().clone()
    engine.backward(other.network(torch.ones(1, 4)).sum(), {}, BATCH, name="loss_other")
    engine.change_weights(engine.clip_gradients("other"))
    ahead = other.network.weight.detach().clone()
    assert not torch.equal(ahead, before) and engine.step == 0
    step(engine, 1.0)
    assert torch.equal(other.network.weight, ahead) and engine.step == 1
    assert engine._counts["grad_norm"] == engine._counts["grad_norm_other"] == 1


def test_a_network_without_gradients_has_not_begun(engine, other):
    step(engine, 1.0)
    assert other.began is None and engine.clip_gradients("other") == {}
    step_of_both(engine, other)
    assert other.began == (1, 0.0)
