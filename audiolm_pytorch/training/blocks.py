"""Transformer blocks of a module in training: compiled, or computed again in the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from audiolm_pytorch.nn.transformer import Transformer
from audiolm_pytorch.training.task import LoopSettings

__all__ = ["block_settings", "transformers_of"]


def transformers_of(module: nn.Module) -> list[Transformer]:
    """Return all transformers in a module."""
    return [part for part in module.modules() if isinstance(part, Transformer)]


@contextmanager
def block_settings(module: nn.Module, settings: LoopSettings) -> Iterator[None]:
    """Apply `checkpoint_blocks` and `compile` to all transformers of a module inside a `with` statement.

    Each block is compiled for itself: blocks of equal sizes share the compiled code, and FSDP2 gathers weights between
    blocks, which a single graph would not allow.
    """
    transformers = transformers_of(module)
    for name in ("checkpoint_blocks", "compile"):
        if getattr(settings, name) and not transformers:
            raise ValueError(f"{name}=True is for transformers, but {type(module).__name__} has none; set {name}=False")
    before = [transformer.checkpoint_blocks for transformer in transformers]
    blocks = [block for transformer in transformers for block in transformer.blocks] if settings.compile else []
    for transformer in transformers:
        transformer.checkpoint_blocks = transformer.checkpoint_blocks or settings.checkpoint_blocks
    for block in blocks:
        # not Module.compile, which would also compile the hooks of FSDP2
        block.forward = torch.compile(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
        for transformer, value in zip(transformers, before):
            transformer.checkpoint_blocks = value
