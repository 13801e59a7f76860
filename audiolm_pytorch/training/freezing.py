"""Freezing of parameters by name during a training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from torch import nn

from audiolm_pytorch.checks.types import typed

__all__ = ["frozen_parameters"]


@contextmanager
@typed
def frozen_parameters(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Freeze parameters of a module by name.

    A name is that of a parameter, or whole parts of it: "embedding" and "blocks.0" freeze
    "transformer.embedding.weight" and all of "transformer.blocks.0".
    """
    trainable = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    frozen: dict[str, nn.Parameter] = {}
    for part in names:
        found = {name: weight for name, weight in trainable.items() if f".{part}." in f".{name}."}
        if not found:
            parts = sorted({one for name in trainable for one in name.split(".") if not one.isdigit()})
            similar = get_close_matches(part, [*trainable, *parts]) or parts
            raise ValueError(f"freeze: no trainable parameter has the name {part!r}; use {', '.join(similar)}")
        frozen |= found
    if len(frozen) == len(trainable):
        raise ValueError(f"freeze={list(names)} leaves no parameter to train; freeze fewer")
    try:
        for weight in frozen.values():
            weight.requires_grad_(False)
        yield
    finally:
        for weight in frozen.values():
            weight.requires_grad_(True)
