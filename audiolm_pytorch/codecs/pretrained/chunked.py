"""Long audio through other people's convolutions in pieces: the same numbers, in memory that does not grow with it.

A stack of convolutions sees only so far. A piece that is computed with that much of its neighbours on either side,
which is then cut off, holds what the whole would hold. Recurrent layers and norms over time see everything: they run
whole.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import groupby
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["FRAMEWISE", "Span", "forward_in_pieces", "in_pieces", "run_layers", "span_of"]

# Samples a piece: 11 s at 24 kHz; the widest layers of the published codecs (96 channels) then hold 100 MB a tensor.
PIECE_SAMPLES = 2**18


class Span(NamedTuple):
    """How outputs of a stack of convolutions lie over its inputs.

    Attributes:
        reach: An output depends on no input further away than this many inputs (an upper bound).
        scale: Inputs per output: 320 for an encoder of that stride, 1/320 for its decoder.
    """

    reach: Fraction
    scale: Fraction


FRAMEWISE = Span(Fraction(0), Fraction(1))


def span_of(layers: Iterable[nn.Module]) -> Span:
    """Bound what the outputs of convolutions, applied one after another, depend on.

    Args:
        layers: Modules that hold their convolutions in the order of use (residual branches may come one by one: that
            only widens the bound).

    Returns:
        The span of the whole.
    """
    reach, scale = Fraction(0), Fraction(1)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Conv1d):
                reach += (module.kernel_size[0] - 1) * module.dilation[0] * scale
                scale *= module.stride[0]
            elif isinstance(module, nn.ConvTranspose1d):
                reach += ((module.kernel_size[0] - 1) * module.dilation[0] // module.stride[0] + 1) * scale
                scale /= module.stride[0]
    return Span(reach, scale)


def in_pieces(
    function: Callable[[Tensor], Tensor], inputs: Tensor, span: Span, piece_samples: int | None = None
) -> Tensor:
    """Apply a function of bounded reach along the last axis, piece by piece where the input is long.

    Args:
        function: `[..., n] -> [..., m]` with m / n as the span says; both ends may be padded as it likes.
        inputs: `[..., n]`.
        span: What the outputs depend on.
        piece_samples: Samples a piece, counted on the longer side of the function; `PIECE_SAMPLES` if not given.

    Returns:
        What `function(inputs)` gives, up to rounding.
    """
    unit, out = span.scale.numerator, span.scale.denominator
    piece = max(1, (piece_samples or PIECE_SAMPLES) // max(unit, out))
    # one unit more: pieces begin on whole units, what they need may begin inside one
    reach = ceil(span.reach / unit) + 1 if span.reach else 0
    total = ceil(Fraction(inputs.shape[-1], unit))
    if total <= piece + reach:
        return function(inputs)
    outputs = []
    for start in range(0, total, piece):
        stop, first = start + piece, max(0, start - reach)
        last = stop >= total
        part = function(inputs[..., first * unit : min(total, stop + reach) * unit])
        outputs.append(part[..., (start - first) * out : None if last else (stop - first) * out])
    return torch.cat(outputs, dim=-1)


def run_layers(stack: nn.Module, hidden: Tensor) -> Tensor:
    """Run the `layers` of a stack: convolutions in pieces, what sees all of time whole.

    Args:
        stack: A module whose forward is its `layers` one after another; one without `layers` is called as it is.
        hidden: `[b, d, n]`.

    Returns:
        What the stack gives, up to rounding.
    """
    layers = getattr(stack, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return stack(hidden)
    for sees_all, group in groupby(layers, _sees_all):
        run = nn.Sequential(*group)
        hidden = run(hidden) if sees_all else in_pieces(run, hidden, span_of(run))
    return hidden


def forward_in_pieces(stack: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stand in for the forward of a stack of convolutions; calls with more than the input go to the original."""
    if args or any(value is not None for value in kwargs.values()):
        return type(stack).forward(stack, hidden_states, *args, **kwargs)
    return run_layers(stack, hidden_states)


def _sees_all(layer: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase | nn.GroupNorm) for module in layer.modules())
