"""Every backend computes the same function as a softmax over masked scores, written out plainly here."""

import math

import pytest
import torch

from hieratok.models.attention import ATTENTION_FORMS, Attention
from hieratok.models.scales import ATTENTION_PATTERNS, ScaleLayout


def reference_attention(q, k, v, mask):
    """Eq. 6 and 7 read literally, in float64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for row in range(q.shape[2]):
        seen = mask[row].nonzero().flatten()
        scores = (q[:, :, row, None] * k[:, :, seen]).sum(-1) / math.sqrt(q.shape[-1])
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        out[:, :, row] = (weights[..., None] * v[:, :, seen]).sum(2)
    return out.float()


@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("sides", [(4,), (1, 2, 4), (1, 3, 4)])
def test_each_form_agrees_with_the_written_out_softmax(pattern, form, sides):
    torch.manual_seed(0)
    layout = ScaleLayout(sides)
    q, k, v = torch.randn(3, 2, 3, layout.num_tokens, 8)
    expected = reference_attention(q, k, v, layout.attention_mask(pattern))
    torch.testing.assert_close(ATTENTION_FORMS[form](q, k, v, layout, pattern), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_each_form_has_the_gradients_of_the_first(pattern, form):
    torch.manual_seed(0)
    layout = ScaleLayout((1, 2, 4))
    qkv = torch.randn(3, 2, 3, layout.num_tokens, 8, requires_grad=True)
    weights = torch.randn(2, 3, layout.num_tokens, 8)

    def gradient(name):
        (ATTENTION_FORMS[name](*qkv, layout, pattern) * weights).sum().backward()
        gradient, qkv.grad = qkv.grad, None
        return gradient

    torch.testing.assert_close(gradient(form), gradient("prefix"), atol=1e-5, rtol=0)


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="auto, prefix, mask, matmul"):
        Attention(8, 2, False, backend="flash")


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="hidden_size 10 is not divisible by num_heads 4"):
        Attention(10, 4, False, backend="auto")
