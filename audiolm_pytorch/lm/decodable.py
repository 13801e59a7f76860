"""What the decode loop asks of a model, and what it gives."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from audiolm_pytorch.conditioning.tensors import Conditions
from audiolm_pytorch.nn.kv_cache import CachePositions, KVCache
from audiolm_pytorch.nn.transformer import ConditionTensors
from audiolm_pytorch.tokens.layout import TokenLayout

__all__ = ["Decoded", "TokenModel"]


@dataclass(frozen=True)
class Decoded:
    """Completed streams.

    Attributes:
        streams: Tokens `[b, f, levels]` int64 of every predicted stream, prompts included; -1 past an item's length.
        lengths: Frames `[b]` int64 of each, on the CPU.
    """

    streams: dict[str, Tensor]
    lengths: dict[str, Tensor]


@runtime_checkable
class TokenModel(Protocol):
    """What the decode loop asks of a model; an `nn.Module` is in eval mode meanwhile."""

    @property
    def layout(self) -> TokenLayout:
        """What the model reads and writes."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def new_cache(self, batch: int, num_positions: int) -> KVCache:
        """Allocate a cache."""

    def condition_tensors(self, conditioning: Conditions | None, batch: int) -> ConditionTensors:
        """What stands before the sequence and beside it."""

    def hidden(
        self,
        ids: Tensor,
        mask: Tensor,
        condition_tensors: ConditionTensors | None = None,
        cache: KVCache | None = None,
        cache_positions: CachePositions | None = None,
    ) -> Tensor:
        """Final states `[b, n, d]` of rows `[b, n, columns]`."""

    def logits(self, hidden: Tensor, head: int) -> Tensor:
        """Logits `[..., num_logits]` of one head."""
