"""Runs the convolutions of published models on chunks of long audio: equal results, in bounded memory.

An output of a stack of convolutions depends on a bounded range of inputs. A chunk is therefore computed together with
this range on either side, whose outputs are cut off. Recurrent layers and norms over time depend on the whole input and
run on all of it.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import groupby
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["FRAMEWISE", "Span", "apply_chunked", "chunked_forward", "run_layers", "span_of"]

# 11 s at 24 kHz; the widest layers of the published codecs (96 channels) then have 100 MB per tensor.
CHUNK_SAMPLES = 2**18


class Span(NamedTuple):
    """How the outputs of a stack of convolutions relate to its inputs.

    Attributes:
        reach: Upper bound of the distance, in inputs, from an output to the inputs that it depends on.
        scale: Inputs per output, for example 320 for an encoder and 1/320 for its decoder.
    """

    reach: Fraction
    scale: Fraction


FRAMEWISE = Span(Fraction(0), Fraction(1))


def span_of(layers: Iterable[nn.Module]) -> Span:
    """The span of layers that run one after another.

    Parallel residual branches are counted as if they ran in sequence, which only increases the bound.
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


def apply_chunked(
    function: Callable[[Tensor], Tensor], inputs: Tensor, span: Span, chunk_samples: int | None = None
) -> Tensor:
    """Apply a function along the last axis, in chunks if the input is long; equal to `function(inputs)` up to rounding.

    Args:
        function: `[..., n] -> [..., m]` with the given span; it may pad both ends.
        inputs: `[..., n]`.
        span: Span of the function.
        chunk_samples: Samples per chunk, on the side of the function that has more; None for `CHUNK_SAMPLES`.
    """
    unit, out = span.scale.numerator, span.scale.denominator
    chunk = max(1, (chunk_samples or CHUNK_SAMPLES) // max(unit, out))
    # one unit more: chunks begin on whole units, the inputs that they depend on may begin inside a unit
    reach = ceil(span.reach / unit) + 1 if span.reach else 0
    total = ceil(Fraction(inputs.shape[-1], unit))
    if total <= chunk + reach:
        return function(inputs)
    outputs = []
    for start in range(0, total, chunk):
        stop, first = start + chunk, max(0, start - reach)
        output = function(inputs[..., first * unit : min(total, stop + reach) * unit])
        end = None if stop >= total else (stop - first) * out
        outputs.append(output[..., (start - first) * out : end])
    return torch.cat(outputs, dim=-1)


def run_layers(stack: nn.Module, hidden: Tensor) -> Tensor:
    """Run a stack on `[b, d, n]`: its convolutions in chunks, recurrent layers and norms over time on the whole input.

    The stack's forward must be its `layers` one after another; a stack without `layers` is called directly.
    """
    layers = getattr(stack, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return stack(hidden)
    for needs_all, group in groupby(layers, _needs_all_time):
        run = nn.Sequential(*group)
        hidden = run(hidden) if needs_all else apply_chunked(run, hidden, span_of(run))
    return hidden


def chunked_forward(stack: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replace the forward of a stack by `run_layers`; calls with more arguments use the original forward."""
    if args or any(value is not None for value in kwargs.values()):
        return type(stack).forward(stack, hidden_states, *args, **kwargs)
    return run_layers(stack, hidden_states)


def _needs_all_time(layer: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase | nn.GroupNorm) for module in layer.modules())
