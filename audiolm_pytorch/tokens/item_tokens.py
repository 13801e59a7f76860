"""Tokens of one stream, item by item, that grow at the end and are forgotten at the beginning."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.tokens.stream_inputs import check_tokens, frame_counts, stream_tokens
from audiolm_pytorch.tokens.streams import Stream

__all__ = ["ItemTokens", "items_of_streams", "padded"]


class ItemTokens:
    """What is known of one stream, a sequence of its own for every item.

    Args:
        items: Tokens `[f_i, levels]` of every item; they may differ in length.
    """

    def __init__(self, items: Sequence[Tensor]) -> None:
        self._items = list(items)
        self._first = [0] * len(self._items)

    @property
    def counts(self) -> list[int]:
        """Frames of every item, those forgotten included."""
        return [first + len(tokens) for first, tokens in zip(self._first, self._items)]

    def append(self, item: int, tokens: Tensor) -> None:
        """Add frames `[f, levels]` to the end of an item."""
        if len(tokens):
            self._items[item] = torch.cat((self._items[item], tokens.to(self._items[item])))

    def between(self, items: Sequence[int], start: int, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Frames of some items from `start` to a stop of each; an item that ends before `start` gives its last frame.

        Args:
            items: Numbers of the items k.
            start: First frame.
            stops: Frame after the last, for each of these items.

        Returns:
            Tokens `[k, f, levels]`, -1 where an item has fewer, and the true frames `[k]`.
        """
        found = []
        for item, stop in zip(items, stops, strict=True):
            first = self._first[item]
            begin = min(start, max(0, self.counts[item] - 1))
            found.append(self._items[item][begin - first : max(begin + 1, stop) - first])
        return padded(found), torch.tensor([len(tokens) for tokens in found])

    def forget_before(self, frame: int) -> None:
        """Let go of what lies before a frame; the last frame of an item stays, since it is repeated."""
        for item, (first, tokens) in enumerate(zip(self._first, self._items)):
            dropped = min(frame, first + len(tokens) - 1) - first
            if dropped > 0:
                # a copy, since a slice would hold the whole in memory
                self._items[item], self._first[item] = tokens[dropped:].clone(), first + dropped


def items_of_streams(
    streams: Sequence[Stream], handed: Mapping[str, Tensor], lengths: Mapping[str, int | Tensor], batch_size: int
) -> dict[str, list[Tensor]]:
    """Take padded batches of tokens apart.

    Args:
        streams: Streams of a layout.
        handed: Tokens of some of them, `[b, f, levels]` or, of one level, `[b, f]`.
        lengths: True frames of these, `[b]` or one int; streams not named are whole.
        batch_size: Number of items b, where nothing is handed in.

    Returns:
        Tokens `[f_i, levels]` of every item, by name.

    Raises:
        ValueError: If a stream is unknown or has the wrong shape, a length does not fit, or a token is none.
    """
    present = [stream for stream in streams if stream.name in handed]
    if not handed and not lengths:
        return {}
    tokens = stream_tokens(streams if set(handed) - {one.name for one in present} else present, handed, None)
    batch = len(next(iter(tokens.values()))) if tokens else batch_size
    whole = {name: ids.shape[1] for name, ids in tokens.items()}
    counts = frame_counts(present, {**whole, **lengths}, batch)
    check_tokens(present, tokens, counts)
    return {
        stream.name: [row[:count] for row, count in zip(tokens[stream.name], counts[:, index].tolist())]
        for index, stream in enumerate(present)
    }


def padded(items: Sequence[Tensor]) -> Tensor:
    """Put sequences `[f_i, ...]` side by side as `[b, f, ...]`, -1 past the end of each."""
    return pad_sequence(list(items), batch_first=True, padding_value=-1)
