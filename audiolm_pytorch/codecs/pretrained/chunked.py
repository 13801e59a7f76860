"""Run the convolutions of published models on chunks of long audio, to limit memory without changing the results.

Each chunk is extended on both sides by the neighbouring inputs that influence its outputs; the outputs for these
neighbours are dropped. Recurrent layers and norms over time run on the whole input, because their outputs depend on
the whole input.
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
    """Range of inputs that influence an output of a stack of convolutions, and ratio of input steps to output steps.

    Attributes:
        reach: Number of input steps on each side that can influence an output; the true number may be smaller.
        scale: Input steps per output step, for example 320 for an encoder and 1/320 for a decoder.
    """

    reach: Fraction
    scale: Fraction


FRAMEWISE = Span(Fraction(0), Fraction(1))


def span_of(layers: Iterable[nn.Module]) -> Span:
    """Compute `reach` and `scale` of layers that run one after another.

    Parallel residual branches are counted as if they ran one after another, which can only increase `reach`.
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
    """Compute `function(inputs)` in chunks of the last axis if the input is long; chunks change only rounding errors.

    The function can change the length of the last axis, and can pad both ends of its input. A chunk has at most
    `chunk_samples` input steps and output steps; None for `CHUNK_SAMPLES`.
    """
    unit, out = span.scale.numerator, span.scale.denominator
    chunk = max(1, (chunk_samples or CHUNK_SAMPLES) // max(unit, out))
    # Add one unit, because chunks begin on whole units, but the inputs that they need can begin inside a unit.
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
    """Run the layers of a stack on `hidden [b, d, n]`; all layers except RNNs and norms over time run in chunks.

    `stack.forward` must run `stack.layers` one after another. A stack without `layers` is called directly.
    """
    layers = getattr(stack, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return stack(hidden)
    for needs_all, group in groupby(layers, _needs_all_time):
        run = nn.Sequential(*group)
        hidden = run(hidden) if needs_all else apply_chunked(run, hidden, span_of(run))
    return hidden


def chunked_forward(stack: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute `stack.forward` in chunks, or without chunks if arguments besides `hidden_states` are passed."""
    if args or any(value is not None for value in kwargs.values()):
        return type(stack).forward(stack, hidden_states, *args, **kwargs)
    return run_layers(stack, hidden_states)


def _needs_all_time(layer: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase | nn.GroupNorm) for module in layer.modules())
