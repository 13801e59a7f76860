"""Which token stands where: the one table that packing, losses, prompts, heads and decoding are read from.

A layout arranges token streams in a grid of rows (steps of the language model) and columns (tokens read at once).
Row `r` is the input that predicts row `r + 1`; row 0 is the start row. The patterns are those of AudioLM
(arXiv:2209.03143, sec. III-C: one column, level by level inside each frame) and of MusicGen (arXiv:2306.05284,
sec. 2.2: a column per level, level `k` delayed by `k` rows).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import ceil, lcm
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor

__all__ = ["Canvas", "CellTable", "Head", "PackedTokens", "Stream", "TokenLayout"]

Lengths = Mapping[str, "int | Tensor"]

EMPTY = -1  # block number of a cell in which nothing stands


@dataclass(frozen=True)
class Stream:
    """One kind of token: its vocabulary, its levels and its rate in time.

    Args:
        name: Name under which the tokens of the stream are handed in and out.
        vocab_size: Number of different tokens of every level.
        num_levels: Tokens per frame (residual levels of a codec; 1 for semantic tokens).
        rate_hz: Frames per second.
        given: The stream is read but never predicted.
        eos: The stream may end early: it has one end-of-sequence id of its own.
    """

    name: str
    vocab_size: int
    num_levels: int = 1
    rate_hz: int | Fraction = 1
    given: bool = False
    eos: bool = False

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        if self.vocab_size < 1 or self.num_levels < 1 or self.rate_hz <= 0:
            raise ValueError(f"stream '{self.name}' needs positive vocab_size, num_levels and rate_hz, got {self}")
        if self.given and self.eos:
            raise ValueError(f"stream '{self.name}' is given, so it cannot end by itself: set eos=False")


@dataclass(frozen=True)
class Head:
    """One output of the model: the token of one level of one predicted stream.

    Attributes:
        stream: Name of the predicted stream.
        level: Level inside the frame, from 0.
        first_id: Id of token 0 in the layout's id space.
        vocab_size: Number of tokens; local numbers are `id - first_id`.
        has_eos: Whether local number `vocab_size` means the end of the stream.
    """

    stream: str
    level: int
    first_id: int
    vocab_size: int
    has_eos: bool

    @property
    def num_logits(self) -> int:
        """Number of outputs of the head, the end id included."""
        return self.vocab_size + int(self.has_eos)

    @property
    def ids(self) -> range:
        """Every id that this head may produce."""
        return range(self.first_id, self.first_id + self.num_logits)


@dataclass(frozen=True)
class _Block:
    """A contiguous range of ids: a level of a stream, the end id of a stream, or the start id (stream -1)."""

    stream: int
    level: int
    first_id: int
    is_token: bool
    head: int


@dataclass(frozen=True)
class CellTable:
    """What stands in every cell of the grid for given frame counts.

    Attributes:
        block: `[rows, columns]` int64, number of the (stream, level) whose token stands there; -1 where the cell is empty.
        frame: `[rows, columns]` int64, frame of the stream that the token belongs to; 0 where the cell is empty.
    """

    block: Tensor
    frame: Tensor

    @property
    def num_rows(self) -> int:
        """Number of rows, the start row included."""
        return self.block.shape[0]


@dataclass(frozen=True)
class PackedTokens:
    """Streams packed into the grid of a layout.

    Attributes:
        ids: `[b, rows, columns]` int64 in the layout's id space; meaningless where `input_mask` is False.
        input_mask: `[b, rows, columns]` bool, True where a token stands.
        loss_mask: `[b, rows, columns]` bool, True where the model has to produce the token.
    """

    ids: Tensor
    input_mask: Tensor
    loss_mask: Tensor

    def to(self, device: torch.device | str) -> "PackedTokens":
        """Copy to a device."""
        return PackedTokens(self.ids.to(device), self.input_mask.to(device), self.loss_mask.to(device))


@dataclass(frozen=True)
class Canvas:
    """A grid to be completed by decoding: everything known stands in it, `packed.loss_mask` marks what is missing.

    Attributes:
        packed: The known ids; missing cells hold the first id of the head that has to fill them.
        head: `[b, rows, columns]` int64, head that predicts the cell; -1 elsewhere.
        frame: `[b, rows, columns]` int64, frame that the cell belongs to.
    """

    packed: PackedTokens
    head: Tensor
    frame: Tensor


class TokenLayout:
    """The arrangement of token streams that a language model reads and writes.

    Patterns:
        `flat`: one column; the given streams first, then every predicted stream, level by level inside each frame.
        `delayed`: one row per predicted frame and a column per level, level `k` standing `k` rows later. Given streams
        are aligned in time: the token that covers predicted frame `f` stands in the row that predicts frame `f`; a
        stream of lower rate is repeated, one of higher rate takes several columns, one that is too short repeats its
        last frame.

    Args:
        streams: The streams; at least one of them predicted.
        pattern: `flat` or `delayed`.

    Raises:
        ValueError: If names repeat, nothing is predicted, the pattern is unknown or does not fit the streams.
    """

    @beartype
    def __init__(self, streams: Sequence[Stream], pattern: str = "flat") -> None:
        self.streams = tuple(streams)
        self.pattern = pattern
        self.given = tuple(stream for stream in self.streams if stream.given)
        self.predicted = tuple(stream for stream in self.streams if not stream.given)
        names = [stream.name for stream in self.streams]
        if len(set(names)) != len(names):
            raise ValueError(f"stream names must differ, got {names}")
        if not self.predicted:
            raise ValueError(f"a layout needs a predicted stream, got only given ones: {names}")
        if pattern not in _PATTERNS:
            raise ValueError(f"unknown pattern '{pattern}', known are {sorted(_PATTERNS)}")
        if pattern == "delayed" and len({stream.rate_hz for stream in self.predicted}) > 1:
            raise ValueError("the delayed pattern has one row per predicted frame: all predicted streams need one rate_hz")

        self._blocks, self.heads, self.num_ids = _number_ids(self.streams)
        self._block_of = {(block.stream, block.level, block.is_token): i for i, block in enumerate(self._blocks)}
        self._table = lru_cache(maxsize=256)(self._build_table)

    # description

    @property
    def start_id(self) -> int:
        """Id that stands in the start row."""
        return self._blocks[0].first_id

    @property
    def num_columns(self) -> int:
        """Number of tokens that are read in one row."""
        return self.table({stream.name: 1 for stream in self.streams}).block.shape[1]

    @property
    def frame_alignment(self) -> int:
        """Predicted frames after which every given stream starts a frame too: windows start at multiples of it."""
        ratios = [Fraction(stream.rate_hz) / Fraction(self.predicted[0].rate_hz) for stream in self.streams]
        return lcm(*(ratio.denominator for ratio in ratios))

    def to_dict(self) -> dict[str, Any]:
        """Describe the layout as JSON-able data."""
        rows = [{**vars(stream), "rate_hz": str(Fraction(stream.rate_hz))} for stream in self.streams]
        return {"streams": rows, "pattern": self.pattern}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TokenLayout":
        """Build the layout that `to_dict` described."""
        streams = [Stream(**{**row, "rate_hz": Fraction(row["rate_hz"])}) for row in data["streams"]]
        return cls(streams, data["pattern"])

    # the table

    def table(self, num_frames: Mapping[str, int], ends: bool = False) -> CellTable:
        """Say what stands in every cell.

        Args:
            num_frames: Frames of every stream, by name.
            ends: Whether the predicted streams really end after these frames (streams with `eos` then hold their end id).

        Returns:
            The table, cached.

        Raises:
            ValueError: If a stream is missing, or the counts do not fit the pattern.
        """
        missing = [stream.name for stream in self.streams if stream.name not in num_frames]
        if missing:
            raise ValueError(f"num_frames lacks {missing}, got {dict(num_frames)}")
        return self._table(tuple(int(num_frames[stream.name]) for stream in self.streams), ends)

    def _build_table(self, counts: tuple[int, ...], ends: bool) -> CellTable:
        if min(counts) < 0 or any(count < 1 for stream, count in zip(self.streams, counts, strict=True) if stream.given):
            raise ValueError(f"given streams need at least one frame, got {self._named(counts)}")
        spans = _PATTERNS[self.pattern](self, counts, ends)
        num_rows = 1 + max(int(span.rows.max()) for span in spans if len(span.rows))
        num_columns = 1 + max(span.column for span in spans)
        block = torch.full((num_rows, num_columns), EMPTY, dtype=torch.long)
        frame = torch.zeros(num_rows, num_columns, dtype=torch.long)
        for span in spans:
            block[span.rows, span.column] = span.block
            frame[span.rows, span.column] = span.frames
        return CellTable(block, frame)

    def _named(self, counts: Sequence[int]) -> dict[str, int]:
        return {stream.name: count for stream, count in zip(self.streams, counts, strict=True)}

    def rows(self, num_frames: Mapping[str, int], ends: bool = False) -> int:
        """Number of rows, the start row included."""
        return self.table(num_frames, ends).num_rows

    def head(self, num_frames: Mapping[str, int], ends: bool = False) -> Tensor:
        """Number of the head that predicts each cell, `[rows, columns]`; -1 where nothing is predicted."""
        return self._head_of_block()[self.table(num_frames, ends).block]

    def legal(self, num_frames: Mapping[str, int], row: int, allow_eos: bool = False) -> tuple[range | None, ...]:
        """Ids that may stand in the predicted cells of a row, one range per column; None where nothing is predicted."""
        heads = [self.heads[index] if index >= 0 else None for index in self.head(num_frames)[row].tolist()]
        return tuple(
            None if head is None else head.ids if allow_eos else range(head.first_id, head.first_id + head.vocab_size)
            for head in heads
        )

    def _head_of_block(self) -> Tensor:
        return torch.tensor([block.head for block in self._blocks] + [-1])  # block -1 (empty) reads the last entry

    # tokens in and out

    @beartype
    def pack(
        self, streams: Mapping[str, Tensor], lengths: Lengths | None = None, ends: Tensor | None = None
    ) -> PackedTokens:
        """Pack streams into the grid.

        Args:
            streams: Tokens `[b, f, levels]` (or `[b, f]` for one level) of every stream, by name.
            lengths: True frames of each item by stream name, `[b]` or one int; absent streams are whole. Items are
                packed as if alone and padded on the right, so nothing stands between two streams of a short item.
            ends: `[b]` bool, whether the item's file really ends after its last frame; None = nowhere.

        Returns:
            The packed tokens.

        Raises:
            ValueError: If a stream is missing, has the wrong shape, or holds tokens outside its vocabulary.
        """
        tokens = {stream.name: self._checked(stream, streams) for stream in self.streams}
        batch = len(next(iter(tokens.values())))
        whole = {name: ids.shape[1] for name, ids in tokens.items()}
        counts = self._counts({**whole, **(lengths or {})}, batch)
        if any((counts[:, i] > whole[stream.name]).any() for i, stream in enumerate(self.streams)):
            raise ValueError(f"lengths {lengths} exceed the streams, which have {whole} frames")
        self._check_range(tokens, counts)
        block, frame = self._stack(counts, ends)
        return self._fill(tokens, block, frame)

    def canvas(self, streams: Mapping[str, Tensor], lengths: Lengths, num_frames: Lengths) -> Canvas:
        """Lay out known tokens in a grid that decoding completes.

        Args:
            streams: Given streams, and prompts of predicted streams (absent = no prompt), `[b, f, levels]`.
            lengths: True frames of each of them, `[b]` or one int; absent = whole.
            num_frames: Frames wanted of every predicted stream, prompts included, `[b]` or one int.

        Returns:
            The canvas.

        Raises:
            ValueError: If a given stream or a frame count is missing, or a prompt is longer than what is wanted.
        """
        batch = len(next(iter(streams.values())))
        wanted = self._counts({**{s.name: streams[s.name].shape[1] for s in self.given}, **lengths, **num_frames}, batch)
        known: dict[str, Tensor] = {}
        prompts = torch.zeros(len(self.streams), batch, dtype=torch.long)
        for i, stream in enumerate(self.streams):
            tokens = self._checked(stream, streams) if stream.name in streams else torch.zeros(batch, 0, stream.num_levels)
            if not stream.given:
                prompts[i] = torch.as_tensor(lengths.get(stream.name, tokens.shape[1]))
                if (prompts[i] > wanted[:, i]).any():
                    raise ValueError(
                        f"the prompt of '{stream.name}' has {prompts[i].tolist()} frames, "
                        f"more than the {wanted[:, i].tolist()} wanted: shorten it or ask for more"
                    )
            known[stream.name] = _fit(tokens.long(), int(wanted[:, i].max()))
        self._check_range(known, torch.where(torch.tensor([s.given for s in self.streams]), wanted, prompts.T))
        block, frame = self._stack(wanted, None)
        packed = self._fill(known, block, frame)
        stream_of = torch.tensor([item.stream for item in self._blocks] + [0])[block]
        prompt = prompts.T.gather(1, rearrange(stream_of.clamp(min=0), "b r c -> b (r c)")).view_as(frame)
        missing = packed.loss_mask & (frame >= prompt).to(packed.loss_mask.device)
        head = self._head_of_block()[block]
        return Canvas(PackedTokens(packed.ids, packed.input_mask, missing), head, frame)

    def unpack(self, ids: Tensor, num_frames: Lengths, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Read streams back from the grid.

        Args:
            ids: `[b, rows, columns]` as packed.
            num_frames: Frames of every stream, `[b]` or one int.
            names: Streams to read; None = the predicted ones.

        Returns:
            Tokens `[b, f, levels]` int64 by name; -1 past the frames of an item, and where no cell holds the frame.
        """
        batch = len(ids)
        counts = self._counts(num_frames, batch)
        block, frame = (part.to(ids.device) for part in self._stack(counts, None))
        wanted = names if names is not None else [stream.name for stream in self.predicted]
        first_id = torch.tensor([item.first_id for item in self._blocks] + [0], device=ids.device)[block]
        local = ids[:, : block.shape[1]] - first_id
        out: dict[str, Tensor] = {}
        for i, stream in enumerate(self.streams):
            if stream.name not in wanted:
                continue
            tokens = ids.new_full((batch, int(counts[:, i].max()), stream.num_levels), -1)
            for level in range(stream.num_levels):
                item, row, column = (block == self._block_of[i, level, True]).nonzero(as_tuple=True)
                tokens[item, frame[item, row, column], level] = local[item, row, column]
            out[stream.name] = tokens
        return out

    # helpers

    def _checked(self, stream: Stream, streams: Mapping[str, Tensor]) -> Tensor:
        """Tokens of a stream as `[b, f, levels]`."""
        if stream.name not in streams:
            raise ValueError(f"stream '{stream.name}' is missing, got {sorted(streams)}")
        tokens = streams[stream.name]
        if tokens.ndim == 2 and stream.num_levels == 1:
            tokens = rearrange(tokens, "b f -> b f 1")
        if tokens.ndim != 3 or tokens.shape[-1] != stream.num_levels or tokens.is_floating_point():
            raise ValueError(
                f"stream '{stream.name}' must be integers [b, f, {stream.num_levels}], "
                f"got {tokens.dtype} {tuple(tokens.shape)}"
            )
        return tokens.long()

    def _check_range(self, tokens: Mapping[str, Tensor], counts: Tensor) -> None:
        """Refuse tokens outside their vocabulary: they would silently become tokens of another stream."""
        for i, stream in enumerate(self.streams):
            ids = tokens[stream.name]
            valid = torch.arange(ids.shape[1]) < counts[:, i, None]
            if (((ids < 0) | (ids >= stream.vocab_size)) & rearrange(valid, "b f -> b f 1").to(ids.device)).any():
                raise ValueError(f"stream '{stream.name}' holds tokens outside [0, {stream.vocab_size})")

    def _counts(self, lengths: Lengths, batch: int) -> Tensor:
        """Frames of every item and stream, `[b, streams]` on the CPU."""
        missing = [stream.name for stream in self.streams if stream.name not in lengths]
        if missing:
            raise ValueError(f"the number of frames of {missing} is missing, got {sorted(lengths)}")
        columns = [torch.as_tensor(lengths[stream.name]).cpu().long().expand(batch) for stream in self.streams]
        return torch.stack(columns, dim=1)

    def _stack(self, counts: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tables of all items, padded on the right: block and frame `[b or 1, rows, columns]`."""
        flags = [False] * len(counts) if ends is None else ends.tolist()
        keys = [(tuple(row), bool(end)) for row, end in zip(counts.tolist(), flags, strict=True)]
        if len(set(keys)) == 1:
            table = self._table(*keys[0])
            return table.block.expand(len(keys), -1, -1), table.frame.expand(len(keys), -1, -1)
        tables = [self._table(*key) for key in keys]
        blocks = [table.block for table in tables]
        frames = [table.frame for table in tables]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(blocks, batch_first=True, padding_value=EMPTY), pad(frames, batch_first=True)

    def _fill(self, tokens: Mapping[str, Tensor], block: Tensor, frame: Tensor) -> PackedTokens:
        """Look every cell's token up in one gather."""
        device = next(iter(tokens.values())).device
        starts, total = [], 1  # column 0 of the source is the 0 that start and end cells add to their id
        for stream in self.streams:
            starts.append(total)
            total += tokens[stream.name].shape[1] * stream.num_levels
        base = [item.first_id for item in self._blocks] + [0]
        offset = [starts[item.stream] + item.level if item.is_token else 0 for item in self._blocks] + [0]
        stride = [self.streams[item.stream].num_levels if item.is_token else 0 for item in self._blocks] + [0]
        cells = torch.tensor([base, offset, stride])[:, block]
        source = (cells[1] + cells[2] * frame).to(device)
        flat = [tokens[stream.name].flatten(1) for stream in self.streams]
        values = torch.cat([flat[0].new_zeros(len(flat[0]), 1), *flat], dim=1)
        ids = values.gather(1, source.flatten(1)).view_as(source) + cells[0].to(device)
        filled = block != EMPTY
        return PackedTokens(ids, filled.to(device), (self._head_of_block()[block] >= 0).to(device))


# numbering of ids


def _number_ids(streams: Sequence[Stream]) -> tuple[list[_Block], tuple[Head, ...], int]:
    """Give the start, every level of every stream and every end its own range of ids."""
    blocks = [_Block(stream=-1, level=0, first_id=0, is_token=False, head=-1)]
    heads: list[Head] = []
    next_id = 1
    for index, stream in enumerate(streams):
        for level in range(stream.num_levels):
            has_eos = stream.eos and level == 0
            head = -1
            if not stream.given:
                head = len(heads)
                heads.append(Head(stream.name, level, next_id, stream.vocab_size, has_eos))
            blocks.append(_Block(index, level, next_id, True, head))
            next_id += stream.vocab_size
            if has_eos:  # right behind its level, so that one head covers both in one range
                blocks.append(_Block(index, level, next_id, False, head))
                next_id += 1
    return blocks, tuple(heads), next_id


# patterns: each says in which cells the tokens of a block stand


@dataclass(frozen=True)
class _Span:
    """Cells of one column that hold frames of one block."""

    column: int
    block: int
    rows: Tensor
    frames: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))


def _flat(layout: TokenLayout, counts: tuple[int, ...], ends: bool) -> list[_Span]:
    """Paper order in one column: given streams, then predicted ones, level by level inside each frame."""
    spans = [_Span(0, 0, torch.tensor([0]))]
    row = 1
    order = sorted(range(len(counts)), key=lambda index: not layout.streams[index].given)
    for index in order:
        stream, count = layout.streams[index], counts[index]
        frames = torch.arange(count)
        for level in range(stream.num_levels):
            block = layout._block_of[index, level, True]
            spans.append(_Span(0, block, row + frames * stream.num_levels + level, frames))
        row += count * stream.num_levels
        if stream.eos and ends:
            spans.append(_Span(0, layout._block_of[index, 0, False], torch.tensor([row]), torch.tensor([count])))
            row += 1
    return spans


def _delayed(layout: TokenLayout, counts: tuple[int, ...], ends: bool) -> list[_Span]:
    """One row per predicted frame; level k stands k rows later; given tokens stand in the row that needs them."""
    wanted = {count for stream, count in zip(layout.streams, counts, strict=True) if not stream.given}
    if len(wanted) > 1:
        raise ValueError(f"the delayed pattern needs as many frames of every predicted stream, got {layout._named(counts)}")
    frames = torch.arange(wanted.pop())
    rate_hz = Fraction(layout.predicted[0].rate_hz)
    spans: list[_Span] = []
    column = 0
    for index, stream in enumerate(layout.streams):
        if not stream.given:
            continue
        ratio = Fraction(stream.rate_hz) / rate_hz
        per_row = max(1, ceil(ratio))
        for part in range(per_row):
            ticks = frames * per_row + part
            covering = (ticks * ratio.numerator) // (ratio.denominator * per_row)
            covering = covering.clamp(max=counts[index] - 1)
            for level in range(stream.num_levels):
                spans.append(_Span(column, layout._block_of[index, level, True], frames, covering))
                column += 1
    spans.append(_Span(column, 0, torch.tensor([0])))  # the start id stands in the first predicted column
    for index, stream in enumerate(layout.streams):
        if stream.given:
            continue
        for level in range(stream.num_levels):
            spans.append(_Span(column, layout._block_of[index, level, True], 1 + frames + level, frames))
            if level == 0 and stream.eos and ends:
                after = torch.tensor([len(frames)])
                spans.append(_Span(column, layout._block_of[index, 0, False], 1 + after, after))
            column += 1
    return spans


def _fit(tokens: Tensor, num_frames: int) -> Tensor:
    """Cut or zero-pad `[b, f, levels]` to a number of frames."""
    missing = max(0, num_frames - tokens.shape[1])
    return torch.nn.functional.pad(tokens[:, :num_frames], (0, 0, 0, missing))


_PATTERNS: dict[str, Callable[[TokenLayout, tuple[int, ...], bool], list[_Span]]] = {"flat": _flat, "delayed": _delayed}
