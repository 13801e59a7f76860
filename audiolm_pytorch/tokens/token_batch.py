"""Tokens of one stream for several items of unequal length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.tokens.streams import Stream, checked_streams

__all__ = ["GrowingTokens", "TokenBatch", "batches_of_streams"]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Tokens of one stream.

    Attributes:
        ids: `[b, f, levels]` int64; -1 past the length of an item.
        lengths: Number of frames `[b]` int64 of every item, on the CPU.
    """

    ids: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        """Number of items."""
        return len(self.ids)

    @classmethod
    def empty(cls, batch: int, levels: int) -> "TokenBatch":
        """Return a batch of items without frames."""
        return cls(torch.zeros(batch, 0, levels, dtype=torch.long), torch.zeros(batch, dtype=torch.long))

    @classmethod
    def of_items(cls, items: Sequence[Tensor]) -> "TokenBatch":
        """Build a batch from the tokens `[f_i, levels]` of every item."""
        lengths = torch.tensor([len(tokens) for tokens in items])
        return cls(pad_sequence(list(items), batch_first=True, padding_value=-1), lengths)

    def items(self) -> list[Tensor]:
        """Tokens `[f_i, levels]` of every item."""
        return [tokens[:count] for tokens, count in zip(self.ids, self.lengths.tolist())]

    def expand(self, batch: int) -> "TokenBatch":
        """Repeat a batch of one item to `batch` items. A batch of `batch` items is returned unchanged."""
        return TokenBatch(self.ids.expand(batch, -1, -1), self.lengths.expand(batch))

    def truncate(self, lengths: Tensor) -> "TokenBatch":
        """Keep at most `lengths[i]` frames of item i."""
        counts = self.lengths.minimum(lengths).tolist()
        return TokenBatch.of_items([tokens[:count] for tokens, count in zip(self.ids, counts)])


class GrowingTokens:
    """The known tokens of one stream. Frames can be appended, and old frames dropped; frames keep their indices."""

    def __init__(self, batch: TokenBatch, device: torch.device) -> None:
        self._items = [tokens.to(device) for tokens in batch.items()]
        self._first = torch.zeros(len(batch), dtype=torch.long)

    @property
    def counts(self) -> Tensor:
        """Number of frames `[b]` of every item, including dropped frames."""
        return self._first + torch.tensor([len(tokens) for tokens in self._items])

    def append(self, item: int, tokens: Tensor) -> None:
        """Add frames `[f, levels]` to the end of an item."""
        if len(tokens):
            self._items[item] = torch.cat((self._items[item], tokens.to(self._items[item])))

    def between(self, items: Tensor, starts: Tensor, stops: Tensor) -> TokenBatch:
        """Select frames `starts[i]` to `stops[i]` (exclusive) of item `items[i]`, for every i."""
        first = self._first[items]
        spans = zip(items.tolist(), (starts - first).tolist(), (stops - first).tolist())
        return TokenBatch.of_items([self._items[item][start:stop] for item, start, stop in spans])

    def all(self) -> TokenBatch:
        """All frames that are not dropped."""
        return TokenBatch.of_items(self._items)

    def drop_before(self, frames: Tensor) -> None:
        """Drop the frames of item i before frame `frames[i]`, except the last frame, which later windows may repeat."""
        dropped = (frames.minimum(self.counts - 1) - self._first).clamp(min=0)
        for item, count in enumerate(dropped.tolist()):
            if count:
                # Copy, because a slice would keep the whole tensor in memory.
                self._items[item] = self._items[item][count:].clone()
        self._first = self._first + dropped


def batches_of_streams(
    streams: Sequence[Stream], tokens: Mapping[str, Tensor], lengths: Mapping[str, int | Tensor]
) -> dict[str, TokenBatch]:
    """Check tokens and convert them to batches by stream name.

    Args:
        tokens: Tokens `[b, f, levels]` (or `[b, f]` for one level) of some of the streams, by name.
        lengths: Unpadded frames by stream name, `[b]` or one int; a stream without an entry has no padding.
    """
    if not tokens and not lengths:
        return {}
    present = [stream for stream in streams if stream.name in tokens]
    # If names are unknown, check against all streams, so that the error lists the possible names.
    checked, counts = checked_streams(present if len(present) == len(tokens) > 0 else streams, tokens, lengths)
    batches: dict[str, TokenBatch] = {}
    for (name, ids), count in zip(checked.items(), counts.T):
        is_padding = torch.arange(ids.shape[1]) >= count.unsqueeze(1)
        batches[name] = TokenBatch(ids.masked_fill(is_padding.unsqueeze(-1).to(ids.device), -1), count)
    return batches
