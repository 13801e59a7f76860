"""Tokens of one stream as a list of items of unequal length, which grows at the end while decoding."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.tokens.streams import Stream, checked_streams

__all__ = ["ItemTokens", "items_of_streams", "padded"]


class ItemTokens:
    """The known tokens of one stream, item by item. Old frames can be dropped; frame numbers do not change by that.

    Args:
        items: Tokens `[f_i, levels]` of every item.
    """

    def __init__(self, items: Sequence[Tensor]) -> None:
        self._items = list(items)
        self._first = [0] * len(self._items)

    @property
    def counts(self) -> list[int]:
        """Frames of every item, dropped frames included."""
        return [first + len(tokens) for first, tokens in zip(self._first, self._items)]

    def append(self, item: int, tokens: Tensor) -> None:
        """Add frames `[f, levels]` to the end of an item."""
        if len(tokens):
            self._items[item] = torch.cat((self._items[item], tokens.to(self._items[item])))

    def between(self, items: Sequence[int], start: int, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Select the frames from `start` to one stop per item; an item that ends before `start` repeats its last frame.

        Args:
            items: Indices of the items k.
            start: First frame.
            stops: Frame after the last one, per item.

        Returns:
            Tokens `[k, f, levels]`, padded with -1, and the true frames `[k]`.
        """
        parts = []
        for item, stop in zip(items, stops, strict=True):
            first = self._first[item]
            begin = min(start, max(0, self.counts[item] - 1))
            parts.append(self._items[item][begin - first : max(begin + 1, stop) - first])
        return padded(parts), torch.tensor([len(tokens) for tokens in parts])

    def forget_before(self, frame: int) -> None:
        """Drop the frames before `frame`; the last frame of an item stays, because `between` may repeat it."""
        for item, (first, tokens) in enumerate(zip(self._first, self._items)):
            dropped = min(frame, first + len(tokens) - 1) - first
            if dropped > 0:
                # a copy, because a slice keeps the whole tensor in memory
                self._items[item], self._first[item] = tokens[dropped:].clone(), first + dropped


def items_of_streams(
    streams: Sequence[Stream], tokens: Mapping[str, Tensor], lengths: Mapping[str, int | Tensor]
) -> dict[str, list[Tensor]]:
    """Split padded batches of tokens into items.

    Args:
        streams: Streams of a layout.
        tokens: Tokens `[b, f, levels]` (or `[b, f]` for one level) of some of the streams, by name.
        lengths: True frames of these streams, `[b]` or one int; a stream without an entry has no padding.

    Returns:
        Tokens `[f_i, levels]` of every item, by stream name.
    """
    if not tokens and not lengths:
        return {}
    present = [stream for stream in streams if stream.name in tokens]
    # all streams, if some tokens belong to none of them, for an error that names the choice
    checked, counts = checked_streams(present if len(present) == len(tokens) > 0 else streams, tokens, lengths)
    return {
        name: [row[:count] for row, count in zip(ids, counts[:, index].tolist())]
        for index, (name, ids) in enumerate(checked.items())
    }


def padded(items: Sequence[Tensor]) -> Tensor:
    """Pad sequences `[f_i, ...]` with -1 and stack them as `[b, f, ...]`."""
    return pad_sequence(list(items), batch_first=True, padding_value=-1)
