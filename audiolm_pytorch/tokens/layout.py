"""Which token stands where: the one table that packing, losses, prompts, heads and decoding are read from."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import lcm
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.tokens.id_space import IdSpace
from audiolm_pytorch.tokens.patterns import EMPTY, PATTERNS, CellTable, cell_table
from audiolm_pytorch.tokens.stream_inputs import check_tokens, frame_counts, stream_tokens
from audiolm_pytorch.tokens.streams import Grid, PackedTokens, Stream

__all__ = ["TokenLayout"]


class TokenLayout:
    """The arrangement of token streams in rows (steps of a language model) and columns (tokens read at once).

    Row `r` is the input that predicts row `r + 1`. Id ranges of streams, levels and ends are disjoint; padding is a
    mask, never an id.

    Streams that are not in time (`rate_hz=None`) stand before everything, one token a row, level by level inside each
    frame; an item that has none of such a stream holds the one null token there. Then comes the start row (row 0 where
    all streams are in time), and then, as the pattern says:

    Patterns:
        `flat`: one column; given streams first, then every predicted stream, level by level inside each frame.
        `delayed`: one row per predicted frame and a column per level, residual level `k` standing `k` rows later, all
        its groups together. Given streams are aligned in time: the token that covers predicted frame `f` stands in the
        row that predicts frame `f`; a stream of lower rate is repeated, one of higher rate takes several columns, one
        that is too short repeats its last frame.
        `parallel`: as `delayed`, but all levels of a frame stand in one row.

    Args:
        streams: The streams; at least one of them predicted.
        pattern: `flat`, `delayed` or `parallel`.

    Attributes:
        heads: Outputs of a model: one for each level of each predicted stream.
        num_ids: Number of ids.
        null_id: Id of the null token, which stands for streams not in time where there are none; None if all streams
            are in time.

    Raises:
        ValueError: If names repeat, nothing is predicted, or the pattern is unknown or does not fit the streams.
    """

    @beartype
    def __init__(self, streams: Sequence[Stream], pattern: str = "flat") -> None:
        self.streams = tuple(streams)
        self.pattern = pattern
        self.inputs = tuple(stream for stream in self.streams if stream.is_input)
        self.predicted = tuple(stream for stream in self.streams if not stream.is_input)
        names = [stream.name for stream in self.streams]
        if len(set(names)) != len(names):
            raise ValueError(f"stream names must differ, got {names}")
        if not self.predicted:
            raise ValueError(f"a layout needs a predicted stream, got only given ones: {names}")
        if pattern not in PATTERNS:
            raise ValueError(f"unknown pattern '{pattern}', known are {sorted(PATTERNS)}")
        rates_hz = {stream.name: str(stream.exact_hz) for stream in self.predicted}
        if pattern != "flat" and len(set(rates_hz.values())) > 1:
            raise ValueError(
                f"the {pattern} pattern has one row per predicted frame: give predicted streams one rate_hz, "
                f"got {rates_hz}"
            )
        self._space = IdSpace(self.streams)
        self.heads, self.num_ids, self.null_id = self._space.heads, self._space.num_ids, self._space.null_id

    # what the layout is

    @property
    def start_id(self) -> int:
        """Id that stands in the start row."""
        return self._space.blocks[0].first_id

    @property
    def num_columns(self) -> int:
        """Number of tokens that are read in one row."""
        return self.table({stream.name: 1 for stream in self.streams}).block.shape[1]

    @property
    def frame_alignment(self) -> int:
        """Predicted frames after which a frame of every given stream starts too; windows start at its multiples."""
        rate_hz = self.predicted[0].exact_hz
        return lcm(*((stream.exact_hz / rate_hz).denominator for stream in self.streams if stream.is_in_time))

    def to_dict(self) -> dict[str, Any]:
        """Describe the layout as JSON-able data."""
        return {"streams": [stream.to_dict() for stream in self.streams], "pattern": self.pattern}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TokenLayout":
        """Build the layout that `to_dict` described."""
        return cls([Stream.from_dict(stream) for stream in data["streams"]], data["pattern"])

    # the table

    @beartype
    def table(self, num_frames: Mapping[str, int], ends: bool = False) -> CellTable:
        """Say which token stands in every cell.

        Args:
            num_frames: Frames of every stream, by name.
            ends: Whether streams with an end id hold it after their last frame.

        Returns:
            The table, cached: read-only.

        Raises:
            ValueError: If a stream is missing, or the counts do not fit the pattern.
        """
        counts = frame_counts(self.streams, num_frames, 1)[0].tolist()
        return cell_table(self.streams, self.pattern, tuple(counts), ends)

    def rows(self, num_frames: Mapping[str, int], ends: bool = False) -> int:
        """Number of rows, the start row included."""
        return len(self.table(num_frames, ends).block)

    def head(self, num_frames: Mapping[str, int], ends: bool = False) -> Tensor:
        """Number of the head that predicts each cell, `[rows, columns]` int64; -1 where nothing is predicted."""
        return self._space.head_of_block[self.table(num_frames, ends).block]

    @beartype
    def legal(
        self, num_frames: Mapping[str, int], row: int, allow_eos: bool = False, ends: bool = False
    ) -> tuple[range | None, ...]:
        """Say which ids may stand in the predicted cells of a row.

        Args:
            num_frames: Frames of every stream, by name.
            row: The row.
            allow_eos: Whether a stream may end before its last frame; it has at least one.
            ends: Whether streams with an end id hold it after their last frame.

        Returns:
            A range of ids per column; None where nothing is predicted.

        Raises:
            ValueError: If there is no such row, a stream is missing, or the counts do not fit the pattern.
        """
        table = self.table(num_frames, ends)
        if not 0 <= row < len(table.block):
            raise ValueError(
                f"there is no row {row}: frames {dict(num_frames)} stand in rows 0 to {len(table.block) - 1}"
            )
        legal: list[range | None] = []
        for number, frame in zip(table.block[row].tolist(), table.frame[row].tolist()):
            block = self._space.blocks[number]
            if number == EMPTY or block.head < 0:
                legal.append(None)
            elif block.is_token:
                legal.append(self.heads[block.head].ids(allow_eos and frame > 0))
            else:
                legal.append(range(block.first_id, block.first_id + 1))
        return tuple(legal)

    # tokens in and out

    @beartype
    def pack(
        self,
        streams: Mapping[str, Tensor],
        lengths: Mapping[str, int | Tensor] | None = None,
        ends: Tensor | None = None,
    ) -> PackedTokens:
        """Pack streams into the grid.

        Every item is packed as if it were alone and padded on the right: no hole stands between two streams.

        Args:
            streams: Tokens `[b, f, levels]` (or `[b, f]` for one level) of every stream, by name.
            lengths: True frames of each item by stream name, `[b]` or one int; streams not named are whole.
            ends: `[b]` bool, whether the item's file really ends after its last frame; None = nowhere.

        Returns:
            The packed tokens, on the device of the streams.

        Raises:
            ValueError: If a stream is missing or unknown, has the wrong shape, or holds tokens outside its vocabulary.
        """
        tokens = stream_tokens(self.streams, streams, None)
        batch = len(tokens[self.streams[0].name])
        whole = {name: ids.shape[1] for name, ids in tokens.items()}
        counts = frame_counts(self.streams, {**whole, **(lengths or {})}, batch)
        check_tokens(self.streams, tokens, counts)
        if ends is not None and ends.shape != (batch,):
            raise ValueError(f"ends must be [b] bool, one of each of {batch} items, got {tuple(ends.shape)}")
        block, frame = self._stack_tables(counts, ends)
        return self._space.fill(tokens, block, frame)

    @beartype
    def grid(
        self,
        streams: Mapping[str, Tensor],
        num_frames: Mapping[str, int | Tensor],
        batch_size: int,
        lengths: Mapping[str, int | Tensor] | None = None,
    ) -> Grid:
        """Lay known tokens out in a grid that decoding completes.

        Args:
            streams: Given streams (absent = empty, where they are not in time), and prompts of predicted streams
                (absent = no prompt), `[b, f, levels]`.
            num_frames: Frames wanted of every predicted stream, its prompt included, `[b]` or one int.
            batch_size: Number of items b.
            lengths: True frames of the streams handed in, `[b]` or one int; streams not named are whole.

        Returns:
            The grid.

        Raises:
            ValueError: If a given stream or a count is missing, or a prompt is longer than what is wanted.
        """
        absent = [one for one in self.streams if one.name not in streams and not (one.is_input and one.is_in_time)]
        nothing = {one.name: torch.zeros(batch_size, 0, one.num_levels, dtype=torch.long) for one in absent}
        tokens = stream_tokens(self.streams, {**nothing, **streams}, batch_size)
        whole = {name: ids.shape[1] for name, ids in tokens.items()}
        known = frame_counts(self.streams, {**whole, **(lengths or {})}, batch_size)
        check_tokens(self.streams, tokens, known)
        names = [stream.name for stream in self.streams]
        given = {stream.name: known[:, names.index(stream.name)] for stream in self.inputs}
        wanted = frame_counts(self.streams, {**num_frames, **given}, batch_size)
        for index in (known > wanted).any(dim=0).nonzero().flatten().tolist():
            raise ValueError(
                f"the prompt of '{names[index]}' has {known[:, index].tolist()} frames, longer than what is wanted, "
                f"{wanted[:, index].tolist()}: shorten the prompt or ask for more"
            )
        device = next((ids.device for ids in streams.values()), torch.device("cpu"))
        tokens = {
            name: _fit(ids.to(device), max(ids.shape[1], int(wanted[:, i].max())))
            for i, (name, ids) in enumerate(tokens.items())
        }
        block, frame = self._stack_tables(wanted, None)
        packed = self._space.fill(tokens, block, frame)
        item = rearrange(torch.arange(batch_size), "b -> b 1 1")
        missing = packed.loss_mask & (frame >= known[item, self._space.stream_of_block[block]]).to(device)
        return Grid(
            packed=PackedTokens(packed.ids, packed.input_mask, missing),
            head=self._space.head_of_block[block],
            frame=frame,
            num_frames={name: wanted[:, i] for i, name in enumerate(names)},
        )

    @beartype
    def unpack(
        self, ids: Tensor, num_frames: Mapping[str, int | Tensor], names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Read streams back from the grid.

        Args:
            ids: `[b, rows, columns]` as packed.
            num_frames: Frames of every stream, `[b]` or one int.
            names: Streams to read; None = the predicted ones.

        Returns:
            Tokens `[b, f, levels]` int64 by name; -1 past the frames of an item, where no cell holds the frame, and
            where the null token stands.

        Raises:
            ValueError: If a count is missing or fits neither pattern nor grid, or a name is unknown.
        """
        wanted = [stream.name for stream in self.predicted] if names is None else names
        unknown = set(wanted) - {stream.name for stream in self.streams}
        if unknown:
            raise ValueError(f"there is no stream {sorted(unknown)}, only {[stream.name for stream in self.streams]}")
        counts = frame_counts(self.streams, num_frames, len(ids))
        block, frame = (part.to(ids.device) for part in self._stack_tables(counts, None))
        if ids.ndim != 3 or ids.shape[1] < block.shape[1] or ids.shape[2] != block.shape[2]:
            raise ValueError(
                f"frames {dict(num_frames)} stand in [b, {block.shape[1]}, {block.shape[2]}] ids, "
                f"got {tuple(ids.shape)}: hand in the grid that holds them all"
            )
        return self._space.read(ids[:, : block.shape[1]], block, frame, counts, wanted)

    @beartype
    def without_conditions(self, packed: PackedTokens, drop: Tensor) -> PackedTokens:
        """Put the null token in the place of all tokens that are not in time, of some items.

        Every row stays where it is, so that both halves of a guided batch go together.

        Args:
            packed: Packed streams.
            drop: `[b]` bool, whose tokens go.

        Returns:
            The packed streams; the very same where all streams are in time.

        Raises:
            ValueError: If `drop` is not one bool an item.
        """
        if drop.shape != packed.ids.shape[:1] or drop.dtype != torch.bool:
            raise ValueError(f"drop must be bool [{len(packed.ids)}], got {drop.dtype} {tuple(drop.shape)}")
        if self.null_id is None:
            return packed
        goes = self._space.out_of_time(packed.ids) & rearrange(drop.to(packed.ids.device), "b -> b 1 1")
        return replace(packed, ids=packed.ids.masked_fill(goes, self.null_id))

    # helpers

    def _stack_tables(self, counts: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
        """Block and frame of every cell of every item, padded on the right, `[b, rows, columns]` on the CPU."""
        flags = [False] * len(counts) if ends is None else ends.tolist()
        tables = [
            cell_table(self.streams, self.pattern, tuple(row), bool(end))
            for row, end in zip(counts.tolist(), flags, strict=True)
        ]
        block = torch.nn.utils.rnn.pad_sequence([table.block for table in tables], True, EMPTY)
        return block, torch.nn.utils.rnn.pad_sequence([table.frame for table in tables], True)


def _fit(tokens: Tensor, num_frames: int) -> Tensor:
    """Zero-pad `[b, f, levels]` to a number of frames."""
    return torch.nn.functional.pad(tokens, (0, 0, 0, num_frames - tokens.shape[1]))
