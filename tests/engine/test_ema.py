"""The average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hieratok.engine.ema import EMA


@pytest.fixture
def model() -> nn.Module:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    return model


def fill(model: nn.Linear, value: float) -> None:
    nn.init.constant_(model.weight, value)


def test_it_moves_by_one_minus_the_decay(model):
    ema = EMA(model, decay=0.5)
    fill(model, 3.0)
    ema.update(model, step=1000)  # by then the decay has its full value
    assert ema.tensors["weight"].tolist() == [[2.0, 2.0]]
    ema.update(model, step=1001)
    assert ema.tensors["weight"].tolist() == [[2.5, 2.5]]


def test_the_decay_rises_with_the_steps(model):
    ema = EMA(model, decay=0.9999)
    fill(model, 12.0)
    ema.update(model, step=1)  # decay 2 / 11
    assert ema.tensors["weight"][0, 0].item() == pytest.approx(1 * 2 / 11 + 12 * 9 / 11)


def test_a_short_run_is_not_dominated_by_its_beginning(model):
    ema = EMA(model, decay=0.9999)
    fill(model, 2.0)
    for step in range(1, 41):
        ema.update(model, step)
    assert ema.tensors["weight"][0, 0].item() == pytest.approx(2.0, abs=1e-3)


def test_the_model_holds_the_average_inside_the_block_and_its_own_weights_after_it(model):
    ema = EMA(model, decay=0.5)
    fill(model, 3.0)
    with ema.applied(model):
        assert model.weight.tolist() == [[1.0, 1.0]]
    assert model.weight.tolist() == [[3.0, 3.0]]
    assert ema.tensors["weight"].tolist() == [[1.0, 1.0]]


def test_an_exception_inside_the_block_does_not_leave_the_average_in_the_model(model):
    ema = EMA(model, decay=0.5)
    fill(model, 3.0)
    with pytest.raises(RuntimeError, match="halfway"), ema.applied(model):
        raise RuntimeError("halfway")
    assert model.weight.tolist() == [[3.0, 3.0]]


def test_the_optimizer_goes_on_with_the_same_parameters_after_the_block(model):
    ema = EMA(model, decay=0.5)
    parameter = model.weight
    with ema.applied(model):
        assert model.weight is parameter
    assert model.weight is parameter


def test_a_saved_average_is_taken_over_and_not_shared(model):
    ema = EMA(model, decay=0.5)
    saved = {"weight": torch.full((1, 2), 7.0)}
    ema.load(saved)
    fill(model, 9.0)
    ema.update(model, step=1000)
    assert ema.tensors["weight"].tolist() == [[8.0, 8.0]]
    assert saved["weight"].tolist() == [[7.0, 7.0]]
