"""The table of a layout: for given frame counts, which token stands in every cell.

`flat` is the order of AudioLM (arXiv:2209.03143, sec. III-C): one column, level by level inside each frame. `delayed`
and `parallel` are the patterns of MusicGen of these names (arXiv:2306.05284, sec. 2.2), extended by given streams that
are aligned in time. Streams that are not in time stand before all else, one token a row, whatever the pattern.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from types import MappingProxyType

import torch
from torch import Tensor

from audiolm_pytorch.tokens.streams import Stream, number_ids

__all__ = ["EMPTY", "PATTERNS", "CellTable", "cell_table"]

EMPTY = -1  # block number of a cell in which nothing stands
START = 0  # block number of the start id
ZERO = torch.zeros(1, dtype=torch.long)

BlockNumbers = Mapping[tuple[int, int, bool], int]  # (stream, level, is_token) -> number of the block


@dataclass(frozen=True)
class CellTable:
    """What stands in every cell of the grid for given frame counts.

    Attributes:
        block: `[rows, columns]` int64, number of the id block whose token stands there; -1 where the cell is empty.
        frame: `[rows, columns]` int64, frame of the stream that the token belongs to; 0 where the cell is empty.
    """

    block: Tensor
    frame: Tensor


@dataclass(frozen=True)
class _Span:
    """Cells of one column that hold frames of one block."""

    column: int
    block: int
    rows: Tensor
    frames: Tensor


@lru_cache(maxsize=512)
def cell_table(streams: tuple[Stream, ...], pattern: str, counts: tuple[int, ...], ends: bool) -> CellTable:
    """Build the table of a layout; cached, since every batch of a training asks for the same one.

    Args:
        streams: The streams.
        pattern: Key of `PATTERNS`.
        counts: Number of frames of every stream.
        ends: Whether streams that have an end id hold it after their last frame.

    Returns:
        The table. Treat it as read-only.

    Raises:
        ValueError: If a given stream in time is empty, or the counts do not fit the pattern.
    """
    empty = [s.name for s, count in zip(streams, counts, strict=True) if s.is_input and s.is_in_time and not count]
    if empty:
        raise ValueError(
            f"given streams in time need at least one frame, {empty} have none: frames are {_named(streams, counts)}"
        )
    blocks = number_ids(streams)[0]
    numbers = {(block.stream, block.level, block.is_token): i for i, block in enumerate(blocks)}
    spans = list(_out_of_time(streams, numbers, counts, null=len(blocks) - 1))
    first_row = sum(len(span.rows) for span in spans)
    for span in PATTERNS[pattern](streams, numbers, counts, ends):
        spans.append(replace(span, rows=first_row + span.rows))
    num_rows = 1 + max(int(span.rows[-1]) for span in spans if len(span.rows))
    num_columns = 1 + max(span.column for span in spans)
    block = torch.full((num_rows, num_columns), EMPTY)
    frame = torch.zeros(num_rows, num_columns, dtype=torch.long)
    for span in spans:
        block[span.rows, span.column] = span.block
        frame[span.rows, span.column] = span.frames
    return CellTable(block, frame)


def _out_of_time(
    streams: tuple[Stream, ...], numbers: BlockNumbers, counts: tuple[int, ...], null: int
) -> Iterator[_Span]:
    """Streams that are not in time, one token a row; an empty one stands as one null token."""
    row = 0
    for index, stream in enumerate(streams):
        if stream.is_in_time:
            continue
        frames = torch.arange(counts[index])
        for level in range(stream.num_levels if counts[index] else 0):
            yield _Span(0, numbers[index, level, True], row + frames * stream.num_levels + level, frames)
        if not counts[index]:
            yield _Span(0, null, ZERO + row, ZERO)
        row += max(1, counts[index] * stream.num_levels)


def _flat(streams: tuple[Stream, ...], numbers: BlockNumbers, counts: tuple[int, ...], ends: bool) -> Iterator[_Span]:
    """One column: given streams first, then predicted ones, level by level inside each frame."""
    yield _Span(0, START, ZERO, ZERO)
    row = 1
    in_time = [index for index, stream in enumerate(streams) if stream.is_in_time]
    for index in sorted(in_time, key=lambda index: not streams[index].is_input):
        stream, count = streams[index], counts[index]
        frames = torch.arange(count)
        for level in range(stream.num_levels):
            yield _Span(0, numbers[index, level, True], row + frames * stream.num_levels + level, frames)
        row += count * stream.num_levels
        if stream.eos and ends:
            yield _Span(0, numbers[index, 0, False], ZERO + row, ZERO + count)
            row += 1


def _delayed(
    streams: tuple[Stream, ...], numbers: BlockNumbers, counts: tuple[int, ...], ends: bool
) -> Iterator[_Span]:
    """One row per predicted frame; residual level k, with all its groups, stands k rows later."""
    return _framewise(streams, numbers, counts, ends, rows_later=1)


def _parallel(
    streams: tuple[Stream, ...], numbers: BlockNumbers, counts: tuple[int, ...], ends: bool
) -> Iterator[_Span]:
    """One row per predicted frame, all levels in it."""
    return _framewise(streams, numbers, counts, ends, rows_later=0)


def _framewise(
    streams: tuple[Stream, ...], numbers: BlockNumbers, counts: tuple[int, ...], ends: bool, rows_later: int
) -> Iterator[_Span]:
    """One row per predicted frame, each level some rows later; given tokens stand in the row that needs them."""
    predicted = [index for index, stream in enumerate(streams) if not stream.is_input]
    if len({counts[index] for index in predicted}) > 1:
        raise ValueError(
            "patterns with a row per frame need as many frames of each predicted stream, got "
            f"{ {streams[index].name: counts[index] for index in predicted} }"
        )
    num_frames = counts[predicted[0]]
    frames = torch.arange(num_frames)
    column = 0
    for index, stream in enumerate(streams):
        if stream.is_input and stream.is_in_time:
            for covering in _covering(stream, streams[predicted[0]], frames):
                for level in range(stream.num_levels):
                    clamped = covering.clamp(max=counts[index] - 1)
                    yield _Span(column, numbers[index, level, True], frames, clamped)
                    column += 1
    yield _Span(column, START, ZERO, ZERO)  # the first predicted column is free in row 0
    for index in predicted:
        for level in range(streams[index].num_levels):
            delay = level // streams[index].num_groups * rows_later
            yield _Span(column, numbers[index, level, True], 1 + delay + frames, frames)
            if level == 0 and streams[index].eos and ends:
                yield _Span(column, numbers[index, 0, False], ZERO + 1 + num_frames, ZERO + num_frames)
            column += 1


def _covering(given: Stream, predicted: Stream, frames: Tensor) -> Iterator[Tensor]:
    """Frames of a given stream that cover predicted frames: one per row, or several if its rate is higher."""
    ratio = given.exact_hz / predicted.exact_hz
    per_row = max(1, ceil(ratio))
    for part in range(per_row):
        yield (frames * per_row + part) * ratio.numerator // (ratio.denominator * per_row)


def _named(streams: tuple[Stream, ...], counts: tuple[int, ...]) -> dict[str, int]:
    return {stream.name: count for stream, count in zip(streams, counts, strict=True)}


Pattern = Callable[[tuple[Stream, ...], BlockNumbers, tuple[int, ...], bool], Iterator[_Span]]
PATTERNS: Mapping[str, Pattern] = MappingProxyType({"flat": _flat, "delayed": _delayed, "parallel": _parallel})
