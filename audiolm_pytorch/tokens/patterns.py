"""Patterns that arrange the tokens of several streams in rows and columns.

`flat` is the token order of AudioLM (arXiv:2209.03143, section III-C). `delayed` and `parallel` are patterns of
MusicGen (arXiv:2306.05284, sec. 2.2) extended by input streams that are aligned in time.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from math import ceil
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from audiolm_pytorch.tokens.streams import Stream, number_ids

__all__ = ["EMPTY", "PATTERNS", "CellTable", "cell_table"]

EMPTY = -1  # block of a cell without a token
_START = 0  # block of the start id
_ZERO = torch.zeros(1, dtype=torch.long)

_Blocks = Mapping[tuple[int, int, bool], int]  # (stream, level, is_token) -> index of the id block


class CellTable(NamedTuple):
    """Table of a layout with the id range and the frame of the token at each row and column.

    Attributes:
        block: `[rows, columns]` int64, index of the id range (`IdBlock`) of the token; -1 where there is no token.
        frame: `[rows, columns]` int64, index of the frame that contains the token; 0 where there is no token.
    """

    block: Tensor
    frame: Tensor


class _Cells(NamedTuple):
    """Tokens of one id range in one column; token i is in row `rows[i]` and belongs to frame `frames[i]`."""

    column: int
    block: int
    rows: Tensor
    frames: Tensor


@lru_cache(maxsize=512)
def cell_table(streams: tuple[Stream, ...], pattern: str, counts: tuple[int, ...], ends: bool) -> CellTable:
    """Build the `CellTable` of a layout; the returned tensors are cached, and callers must not modify the tensors.

    Args:
        ends: Whether the last frame of every stream with an end-of-sequence id is followed by this id.
    """
    num_frames = {stream.name: count for stream, count in zip(streams, counts, strict=True)}
    empty = [s.name for s in streams if s.is_input and s.is_in_time and not num_frames[s.name]]
    if empty:
        raise ValueError(
            f"every input stream with a rate_hz needs one or more frames; {empty} have none (frames: {num_frames})"
        )
    id_blocks = number_ids(streams)[0]
    # The id ranges of look-ahead tokens follow the range of their level.
    levels = [(i, block) for i, block in enumerate(id_blocks) if not block.ahead]
    blocks = {(block.stream, block.level, block.is_token): i for i, block in levels}
    cells = list(_out_of_time(streams, blocks, counts, null=len(id_blocks) - 1))
    first_row = sum(len(part.rows) for part in cells)
    for part in PATTERNS[pattern](streams, blocks, counts, ends):
        cells.append(part._replace(rows=first_row + part.rows))
    num_rows = 1 + max(int(part.rows[-1]) for part in cells if len(part.rows))
    num_columns = 1 + max(part.column for part in cells)
    table = CellTable(torch.full((num_rows, num_columns), EMPTY), torch.zeros(num_rows, num_columns, dtype=torch.long))
    for part in cells:
        table.block[part.rows, part.column] = part.block
        table.frame[part.rows, part.column] = part.frames
    return table


def _out_of_time(streams: tuple[Stream, ...], blocks: _Blocks, counts: tuple[int, ...], null: int) -> Iterator[_Cells]:
    """Yield the tokens of streams without a frame rate: one token per row, or one null token for an empty stream."""
    row = 0
    for index, (stream, count) in enumerate(zip(streams, counts)):
        if stream.is_in_time:
            continue
        if count:
            yield from _level_by_level(index, stream, count, row, blocks)
        else:
            yield _Cells(0, null, _ZERO + row, _ZERO)
        row += max(1, count * stream.num_levels)


def _level_by_level(index: int, stream: Stream, count: int, row: int, blocks: _Blocks) -> Iterator[_Cells]:
    """Yield the tokens of a stream in column 0 from row `row` on, ordered by frame and then by level."""
    frames = torch.arange(count)
    for level in range(stream.num_levels):
        yield _Cells(0, blocks[index, level, True], row + frames * stream.num_levels + level, frames)


def _flat(streams: tuple[Stream, ...], blocks: _Blocks, counts: tuple[int, ...], ends: bool) -> Iterator[_Cells]:
    """Yield the tokens of the `flat` pattern: one column, with input streams before predicted streams."""
    yield _Cells(0, _START, _ZERO, _ZERO)
    row = 1
    in_time = [index for index, stream in enumerate(streams) if stream.is_in_time]
    for index in sorted(in_time, key=lambda index: not streams[index].is_input):
        stream, count = streams[index], counts[index]
        yield from _level_by_level(index, stream, count, row, blocks)
        row += count * stream.num_levels
        if stream.eos and ends:
            yield _Cells(0, blocks[index, 0, False], _ZERO + row, _ZERO + count)
            row += 1


def _framewise(
    streams: tuple[Stream, ...], blocks: _Blocks, counts: tuple[int, ...], ends: bool, level_delay: int
) -> Iterator[_Cells]:
    """Yield tokens with one row per predicted frame; residual level k is delayed by `k * level_delay` rows.

    The token of an input stream is in the row that predicts the frame at the time of the token. Look-ahead tokens that
    do not exist, at the end of an input stream, are missing in their row. A stream with a filler has its filler id in
    all other cells of its columns, also in row 0, which then needs no start token.
    """
    predicted = [index for index, stream in enumerate(streams) if not stream.is_input]
    if len({counts[index] for index in predicted}) > 1:
        frames_by_name = {streams[index].name: counts[index] for index in predicted}
        raise ValueError(
            f"outside of the flat pattern, all predicted streams need equal numbers of frames, got {frames_by_name}"
        )
    num_frames = counts[predicted[0]]
    frames = torch.arange(num_frames)
    column = 0
    for index, stream in enumerate(streams):
        if stream.is_input and stream.is_in_time:
            covering = list(_covering_frames(stream, streams[predicted[0]], frames))
            for part in covering:
                for level in range(stream.num_levels):
                    yield _Cells(column, blocks[index, level, True], frames, part.clamp(max=counts[index] - 1))
                    column += 1
            for ahead in range(1, 1 + stream.lookahead_frames):
                later = covering[-1] + ahead
                exists = later < counts[index]
                for level in range(stream.num_levels):
                    yield _Cells(column, blocks[index, level, True] + ahead, frames[exists], later[exists])
                    column += 1
    num_rows = 1 + num_frames + max(level_delay * _last_delay(streams[index]) for index in predicted)
    if not streams[predicted[0]].filler:
        yield _Cells(column, _START, _ZERO, _ZERO)  # row 0 of the first predicted column is free
    for index in predicted:
        for level in range(streams[index].num_levels):
            delay = level // streams[index].num_groups * level_delay
            if streams[index].filler:  # first, because later cells replace earlier ones
                yield _Cells(column, blocks[index, level, False], torch.arange(num_rows), torch.zeros(num_rows).long())
            yield _Cells(column, blocks[index, level, True], 1 + delay + frames, frames)
            if level == 0 and streams[index].eos and ends:
                yield _Cells(column, blocks[index, 0, False], _ZERO + 1 + num_frames, _ZERO + num_frames)
            column += 1


def _last_delay(stream: Stream) -> int:
    """Delay of the last level of a stream in the delayed pattern, in rows."""
    return (stream.num_levels - 1) // stream.num_groups


def _covering_frames(source: Stream, predicted: Stream, frames: Tensor) -> Iterator[Tensor]:
    """Yield, for each column of an input stream, the input frame at the time of each predicted frame."""
    ratio = source.exact_hz / predicted.exact_hz
    per_row = max(1, ceil(ratio))
    for part in range(per_row):
        yield (frames * per_row + part) * ratio.numerator // (ratio.denominator * per_row)


_Pattern = Callable[[tuple[Stream, ...], _Blocks, tuple[int, ...], bool], Iterator[_Cells]]
PATTERNS: Mapping[str, _Pattern] = MappingProxyType(
    {"flat": _flat, "delayed": partial(_framewise, level_delay=1), "parallel": partial(_framewise, level_delay=0)}
)
