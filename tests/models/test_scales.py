"""Geometry of the scales: where tokens lie and what they may see."""

import pytest
import torch

from hieratok.models.scales import ATTENTION_PATTERNS, ScaleLayout


def test_the_papers_five_scales_make_341_tokens():
    assert ScaleLayout.checked([1, 2, 4, 8, 16], 16).num_tokens == 341  # Table 7
    assert ScaleLayout.checked([16], 16).num_tokens == 256
    assert ScaleLayout.checked([1, 2, 4, 8, 12, 16], 16).num_tokens == 341 + 144  # Table 4


def test_spans_tile_the_sequence_coarse_to_fine():
    layout = ScaleLayout((1, 2, 4))
    assert layout.spans == ((0, 1), (1, 5), (5, 21))


def test_split_undoes_join():
    layout = ScaleLayout((1, 3, 4))
    maps = [torch.randn(2, 5, s, s) for s in layout.sides]
    assert all(torch.equal(a, b) for a, b in zip(layout.split(layout.join(maps)), maps, strict=True))


def test_a_causal_token_sees_its_own_and_all_coarser_scales():
    mask = ScaleLayout((1, 2)).attention_mask("scale_causal")
    assert mask[0].tolist() == [True, False, False, False, False]
    assert mask[1:].all()


def test_an_independent_token_sees_its_own_scale_only():
    mask = ScaleLayout((1, 2)).attention_mask("scale_independent")
    assert mask[0].tolist() == [True, False, False, False, False]
    assert mask[3].tolist() == [False, True, True, True, True]


def test_full_attention_hides_nothing():
    assert ScaleLayout((1, 2)).attention_mask("full").all()


@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
def test_every_token_sees_itself(pattern):
    assert ScaleLayout((1, 2, 4)).attention_mask(pattern).diagonal().all()


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ([1, 2, 5], "must end in the side"),
        ([2, 1, 4], "increasing"),
        ([0, 4], "increasing"),
        ([], "increasing"),
        ([1, 1, 4], "increasing"),
    ],
)
def test_impossible_scales_are_refused_with_the_numbers(scales, message):
    with pytest.raises(ValueError, match=message):
        ScaleLayout.checked(scales, 4)


def test_an_unknown_max_scale_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"none of the scales \[1, 2, 4\]"):
        ScaleLayout((1, 2, 4)).up_to(3)
