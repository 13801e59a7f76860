"""Layers, positions and attention against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audiolm_pytorch.nn.attention import AttentionContext, SelfAttention, attend
from audiolm_pytorch.nn.layers import Dropout, GatedFeedForward, RMSNorm
from audiolm_pytorch.nn.positions import RotaryPositions, rotate
from audiolm_pytorch.nn.transformer import visible_positions


def test_rms_norm_has_the_gradient_of_its_formula():
    """Our backward pass equals that of torch's RMSNorm."""
    own, oracle = RMSNorm(12).double(), nn.RMSNorm(12, eps=1e-6).double()
    weight = torch.rand(12, dtype=torch.double) + 0.5
    x = torch.randn(3, 5, 12, dtype=torch.double)
    results = []
    for norm in (own, oracle):
        norm.weight.data.copy_(weight)
        y = x.clone().requires_grad_()
        (norm(y) * x.cos()).sum().backward()
        results.append((norm(x).detach(), y.grad, norm.weight.grad))
    for mine, reference in zip(*results):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-5)


def test_norm_and_feed_forward_accept_vectors() -> None:
    """A vector `[d]` has the gradients of a batch of one vector."""
    layer, x = nn.Sequential(RMSNorm(6), GatedFeedForward(6, 10)), torch.randn(6)
    grads = [torch.autograd.grad(layer(part).square().sum(), list(layer.parameters())) for part in (x, x[None])]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_a_hook_of_the_last_projection_is_called_in_training() -> None:
    """For example a hook that adds the output of an adapter."""
    layer, x = GatedFeedForward(6, 10), torch.randn(3, 6)
    expected = 2 * layer(x)
    layer.down.register_forward_hook(lambda down, inputs, output: 2 * output)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("p", [0.0001, 0.1, 0.5, 0.999, 1.0])
def test_dropout_has_its_probability(p: float) -> None:
    """The share of zeros is `p`, and the mean stays the same; probabilities near 0 and 1 are not rounded."""
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(2**20))
    assert abs((y == 0).double().mean() - p) < (2e-3 if 0.01 < p < 0.99 else 1e-4)
    assert abs(y.mean() - float(p < 1)) < 0.1


@pytest.mark.slow
def test_dropout_compiles_without_a_graph_break() -> None:
    y = torch.compile(Dropout(0.3), backend="aot_eager", fullgraph=True)(torch.ones(1000))
    assert abs((y == 0).double().mean() - 0.3) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gated_feed_forward_equals_its_formula(dtype: torch.dtype) -> None:
    """Output and gradients equal those of autograd, and gradients equal finite differences."""
    torch.manual_seed(0)
    layer = GatedFeedForward(6, 10).to(dtype)
    x = torch.randn(3, 5, 6, dtype=dtype, requires_grad=True)
    value, gate = layer.up(x).chunk(2, dim=-1)
    expected = layer.down(nn.functional.silu(gate) * value)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()])
    result = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(layer(x), expected)
    for one, other in zip(result, wanted):
        torch.testing.assert_close(one, other)
    if dtype == torch.float64:
        torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("layer", [RMSNorm(6), GatedFeedForward(6, 10)], ids=["norm", "feed-forward"])
def test_second_derivatives_raise_errors(layer: nn.Module) -> None:
    """Our backward passes have no derivative, so a gradient penalty must not return wrong numbers."""
    x = torch.randn(2, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_rotary_scores_depend_on_distance_only():
    """Shifting all positions changes no score."""
    rotary = RotaryPositions(16)
    queries, keys = torch.randn(1, 6, 16), torch.randn(1, 6, 16)

    def scores(shift):
        cos, sin = rotary(torch.arange(6)[None] + shift)
        return rotate(queries, cos, sin) @ rotate(keys, cos, sin).mT

    torch.testing.assert_close(scores(0), scores(1000), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(scores(0), queries @ keys.mT, atol=1e-2)


def test_attention_equals_the_formula():
    """Softmax of masked scaled products, written out."""
    attention = SelfAttention(24, heads=2, dim_head=12)
    x = torch.randn(2, 7, 24)
    cos, sin = RotaryPositions(12)(torch.arange(7)[None])
    q, k, v = (part.unflatten(-1, (2, 12)).transpose(1, 2) for part in attention.to_qkv(x).chunk(3, dim=-1))
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).mT / 12**0.5
    weights = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf")).softmax(-1)
    wanted = attention.to_out((weights @ v).transpose(1, 2).flatten(2))
    context = AttentionContext(angles=(cos, sin), bias=None, is_causal=True)
    torch.testing.assert_close(attention(x, context), wanted, atol=1e-5, rtol=1e-4)


def test_plain_product_of_bfloat16_agrees_with_the_fused_kernel():
    """The faster method on a CPU computes the same attention."""
    q, k, v = torch.randn(3, 2, 2, 40, 16).bfloat16()
    fused = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(attend(q, k, v, is_causal=True).float(), fused, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("padding", [None, [0, 0], [0, 2], [5, 3]])
@pytest.mark.parametrize("num_rows", [1, 3, 7])
def test_every_row_attends_to_its_own_past(num_rows, padding):
    """The mask equals a loop over rows and keys. A padding row attends to itself alone."""
    mask = visible_positions(num_rows, None if padding is None else torch.tensor(padding))
    assert mask.shape == (1 if padding is None else 2, 1, num_rows, num_rows) and mask.dtype == torch.bool
    for item, first in enumerate(padding or [0]):
        for row in range(num_rows):
            readable = [first <= key <= row or key == row for key in range(num_rows)]
            assert mask[item, 0, row].tolist() == readable
