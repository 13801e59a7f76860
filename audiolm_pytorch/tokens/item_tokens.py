"""Tokens of one stream for the items of a batch, which have unequal lengths; decoding appends frames."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.tokens.streams import Stream, checked_streams

__all__ = ["ItemTokens", "items_of_streams", "padded"]


class ItemTokens:
    """Known tokens of one stream, one tensor per item; dropping frames does not change the indices of other frames.

    Args:
        items: Tokens `[f_i, levels]` of each item i.
    """

    def __init__(self, items: Sequence[Tensor]) -> None:
        self._items = list(items)
        self._first = [0] * len(self._items)

    @property
    def counts(self) -> list[int]:
        """Number of frames of every item, including dropped frames."""
        return [first + len(tokens) for first, tokens in zip(self._first, self._items)]

    def append(self, item: int, tokens: Tensor) -> None:
        """Add frames `[f, levels]` to the end of an item."""
        if len(tokens):
            self._items[item] = torch.cat((self._items[item], tokens.to(self._items[item])))

    def between(self, items: Sequence[int], start: int, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return frames `start <= i < stop` of selected items; an item that ends before `start` returns its last frame.

        Args:
            items: Indices of the k selected items.
            start: Index of the first frame.
            stops: Index after the last frame, for each selected item.

        Returns:
            Tokens `[k, f, levels]`, padded with -1, and the number of frames `[k]` of each selected item.
        """
        parts = []
        for item, stop in zip(items, stops, strict=True):
            first = self._first[item]
            begin = min(start, max(0, self.counts[item] - 1))
            parts.append(self._items[item][begin - first : max(begin + 1, stop) - first])
        return padded(parts), torch.tensor([len(tokens) for tokens in parts])

    def forget_before(self, frame: int) -> None:
        """Drop the frames before `frame`, but keep each item's last frame, because `between` may return that frame."""
        for item, (first, tokens) in enumerate(zip(self._first, self._items)):
            dropped = min(frame, first + len(tokens) - 1) - first
            if dropped > 0:
                # Copy, because a slice would keep the whole tensor in memory.
                self._items[item], self._first[item] = tokens[dropped:].clone(), first + dropped


def items_of_streams(
    streams: Sequence[Stream], tokens: Mapping[str, Tensor], lengths: Mapping[str, int | Tensor]
) -> dict[str, list[Tensor]]:
    """Split the padded token batches of streams into one tensor without padding per item.

    Args:
        streams: Token streams of a layout.
        tokens: Padded tokens `[b, f, levels]` (or `[b, f]` for one level) of some of the streams, by stream name.
        lengths: Numbers of unpadded frames by stream name, `[b]` or one int; no entry means no padding.

    Returns:
        A dict from stream name to the list of tokens `[f_i, levels]` of all items i.
    """
    if not tokens and not lengths:
        return {}
    present = [stream for stream in streams if stream.name in tokens]
    # If names are unknown, check against all streams, so that the error lists the possible names.
    checked, counts = checked_streams(present if len(present) == len(tokens) > 0 else streams, tokens, lengths)
    return {
        name: [row[:count] for row, count in zip(ids, counts[:, index].tolist())]
        for index, (name, ids) in enumerate(checked.items())
    }


def padded(items: Sequence[Tensor]) -> Tensor:
    """Pad sequences `[f_i, ...]` with -1 to equal length and stack them to `[b, f, ...]`."""
    return pad_sequence(list(items), batch_first=True, padding_value=-1)
