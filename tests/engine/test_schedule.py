"""The learning rate over a run."""

from __future__ import annotations

import math

import pytest

from hieratok.engine.schedule import warmup_cosine

PEAK, FINAL, WARMUP = 4e-4, 4e-6, 0.1


def rate(progress: float) -> float:
    return warmup_cosine(progress, PEAK, FINAL, WARMUP)


def test_it_rises_linearly_from_zero_to_the_peak():
    assert rate(0.0) == 0.0
    assert rate(0.025) == pytest.approx(PEAK / 4)
    assert rate(0.1) == pytest.approx(PEAK)


def test_it_falls_along_a_cosine_to_the_final_rate():
    assert rate(0.55) == pytest.approx((PEAK + FINAL) / 2)  # half of what follows the warm-up
    assert rate(0.325) == pytest.approx(FINAL + (PEAK - FINAL) * (1 + math.sqrt(0.5)) / 2)
    assert rate(1.0) == pytest.approx(FINAL)


def test_it_never_rises_after_the_warm_up():
    rates = [rate(i / 1000) for i in range(100, 1001)]
    assert rates == sorted(rates, reverse=True)


def test_progress_beyond_the_ends_is_taken_as_the_end():
    assert rate(-0.5) == rate(0.0)
    assert rate(1.5) == rate(1.0)


def test_without_warm_up_it_begins_at_the_peak():
    assert warmup_cosine(0.0, PEAK, FINAL, 0.0) == pytest.approx(PEAK)
