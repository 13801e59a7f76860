"""Which token stands where: the one table that packing, losses, prompts, heads and decoding are read from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from math import lcm
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.stages.patterns import EMPTY, PATTERNS, CellTable, cell_table
from audiolm_pytorch.stages.streams import Canvas, PackedTokens, Stream, number_ids

__all__ = ["TokenLayout"]


class TokenLayout:
    """The arrangement of token streams in rows (steps of a language model) and columns (tokens read at once).

    Row `r` is the input that predicts row `r + 1`; row 0 is the start row. Id ranges of streams, levels and ends are
    disjoint; padding is a mask, never an id.

    Patterns:
        `flat`: one column; given streams first, then every predicted stream, level by level inside each frame.
        `delayed`: one row per predicted frame and a column per level, level `k` standing `k` rows later. Given streams
        are aligned in time: the token that covers predicted frame `f` stands in the row that predicts frame `f`; a
        stream of lower rate is repeated, one of higher rate takes several columns, one that is too short repeats its
        last frame.

    Args:
        streams: The streams; at least one of them predicted.
        pattern: `flat` or `delayed`.

    Raises:
        ValueError: If names repeat, nothing is predicted, or the pattern is unknown or does not fit the streams.
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
        if pattern not in PATTERNS:
            raise ValueError(f"unknown pattern '{pattern}', known are {sorted(PATTERNS)}")
        if pattern == "delayed" and len({stream.rate_hz for stream in self.predicted}) > 1:
            raise ValueError("the delayed pattern has one row per predicted frame: give predicted streams one rate_hz")
        self._blocks, self.heads, self.num_ids = number_ids(self.streams)
        # One entry more than blocks: an empty cell has block -1 and so reads the last one.
        self._head_of_block = torch.tensor([block.head for block in self._blocks] + [-1])
        self._first_id_of_block = torch.tensor([block.first_id for block in self._blocks] + [0])

    # what the layout is

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
        """Predicted frames after which a frame of every given stream starts too; windows start at its multiples."""
        rate_hz = Fraction(self.predicted[0].rate_hz)
        return lcm(*((Fraction(stream.rate_hz) / rate_hz).denominator for stream in self.streams))

    def to_dict(self) -> dict[str, Any]:
        """Describe the layout as JSON-able data."""
        streams = [{**asdict(stream), "rate_hz": str(Fraction(stream.rate_hz))} for stream in self.streams]
        return {"streams": streams, "pattern": self.pattern}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TokenLayout":
        """Build the layout that `to_dict` described."""
        streams = [Stream(**{**stream, "rate_hz": Fraction(stream["rate_hz"])}) for stream in data["streams"]]
        return cls(streams, data["pattern"])

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
        counts = self._counts(num_frames, 1)[0].tolist()
        return cell_table(self.streams, self.pattern, tuple(counts), ends)

    def rows(self, num_frames: Mapping[str, int], ends: bool = False) -> int:
        """Number of rows, the start row included."""
        return len(self.table(num_frames, ends).block)

    def head(self, num_frames: Mapping[str, int], ends: bool = False) -> Tensor:
        """Number of the head that predicts each cell, `[rows, columns]` int64; -1 where nothing is predicted."""
        return self._head_of_block[self.table(num_frames, ends).block]

    def legal(self, num_frames: Mapping[str, int], row: int, allow_eos: bool = False) -> tuple[range | None, ...]:
        """Ids that may stand in the predicted cells of a row: a range per column, None where nothing is predicted."""
        heads = self.head(num_frames)[row].tolist()
        return tuple(self.heads[head].ids(allow_eos) if head >= 0 else None for head in heads)

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
            ValueError: If a stream is missing, has the wrong shape, or holds tokens outside its vocabulary.
        """
        tokens = {stream.name: self._tokens(stream, streams) for stream in self.streams}
        whole = {name: ids.shape[1] for name, ids in tokens.items()}
        counts = self._counts({**whole, **(lengths or {})}, len(tokens[self.streams[0].name]))
        self._check_tokens(tokens, counts)
        block, frame = self._stack_tables(counts, ends)
        return self._fill(tokens, block, frame)

    @beartype
    def canvas(
        self,
        streams: Mapping[str, Tensor],
        num_frames: Mapping[str, int | Tensor],
        batch_size: int,
        lengths: Mapping[str, int | Tensor] | None = None,
    ) -> Canvas:
        """Lay known tokens out in a grid that decoding completes.

        Args:
            streams: Given streams and prompts of predicted streams (absent = no prompt), `[b, f, levels]`.
            num_frames: Frames wanted of every predicted stream, its prompt included, `[b]` or one int.
            batch_size: Number of items b.
            lengths: True frames of the streams handed in, `[b]` or one int; streams not named are whole.

        Returns:
            The canvas.

        Raises:
            ValueError: If a given stream or a count is missing, or a prompt is longer than what is wanted.
        """
        nothing = {s.name: torch.zeros(batch_size, 0, s.num_levels, dtype=torch.long) for s in self.predicted}
        tokens = {stream.name: self._tokens(stream, {**nothing, **streams}) for stream in self.streams}
        known = self._counts({**{name: ids.shape[1] for name, ids in tokens.items()}, **(lengths or {})}, batch_size)
        self._check_tokens(tokens, known)
        names = [stream.name for stream in self.streams]
        given = {stream.name: known[:, names.index(stream.name)] for stream in self.given}
        wanted = self._counts({**num_frames, **given}, batch_size)
        if (known > wanted).any():
            raise ValueError(
                f"prompts are longer than what is wanted: frames of {names} are {known.tolist()}, wanted are "
                f"{wanted.tolist()}; shorten the prompt or ask for more"
            )
        device = next((ids.device for ids in streams.values()), torch.device("cpu"))
        tokens = {
            name: _fit(ids.to(device), max(ids.shape[1], int(wanted[:, i].max())))
            for i, (name, ids) in enumerate(tokens.items())
        }
        block, frame = self._stack_tables(wanted, None)
        packed = self._fill(tokens, block, frame)
        stream_of_block = torch.tensor([max(item.stream, 0) for item in self._blocks] + [0])
        item = rearrange(torch.arange(batch_size), "b -> b 1 1")
        missing = packed.loss_mask & (frame >= known[item, stream_of_block[block]]).to(device)
        return Canvas(
            packed=PackedTokens(packed.ids, packed.input_mask, missing),
            head=self._head_of_block[block],
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
            Tokens `[b, f, levels]` int64 by name; -1 past the frames of an item and where no cell holds the frame.

        Raises:
            ValueError: If a count is missing or does not fit the pattern.
        """
        wanted = [stream.name for stream in self.predicted] if names is None else names
        counts = self._counts(num_frames, len(ids))
        block, frame = (part.to(ids.device) for part in self._stack_tables(counts, None))
        local = ids[:, : block.shape[1]] - self._first_id_of_block.to(ids.device)[block]
        read: dict[str, Tensor] = {}
        for index, stream in enumerate(self.streams):
            if stream.name in wanted:
                read[stream.name] = ids.new_full((len(ids), int(counts[:, index].max()), stream.num_levels), -1)
        for number, source in enumerate(self._blocks):
            if source.is_token and self.streams[source.stream].name in read:
                item, row, column = (block == number).nonzero(as_tuple=True)
                out = read[self.streams[source.stream].name]
                out[item, frame[item, row, column], source.level] = local[item, row, column]
        return read

    # helpers

    def _tokens(self, stream: Stream, streams: Mapping[str, Tensor]) -> Tensor:
        """Tokens of a stream as `[b, f, levels]` int64."""
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

    def _check_tokens(self, tokens: Mapping[str, Tensor], counts: Tensor) -> None:
        """Refuse lengths beyond the tokens, and tokens that would silently become tokens of another stream."""
        for index, stream in enumerate(self.streams):
            ids = tokens[stream.name]
            if int(counts[:, index].max()) > ids.shape[1]:
                raise ValueError(
                    f"lengths of '{stream.name}' reach {int(counts[:, index].max())}, it has {ids.shape[1]}"
                )
            valid = rearrange(torch.arange(ids.shape[1]) < counts[:, index, None], "b f -> b f 1").to(ids.device)
            if (((ids < 0) | (ids >= stream.vocab_size)) & valid).any():
                raise ValueError(f"stream '{stream.name}' holds tokens outside [0, {stream.vocab_size})")

    def _counts(self, num_frames: Mapping[str, int | Tensor], batch: int) -> Tensor:
        """Frames of every item and stream, `[b, streams]` int64 on the CPU."""
        missing = [stream.name for stream in self.streams if stream.name not in num_frames]
        if missing:
            raise ValueError(f"the number of frames of {missing} is missing, got {sorted(num_frames)}")
        columns = [torch.as_tensor(num_frames[stream.name]).cpu().long().expand(batch) for stream in self.streams]
        return torch.stack(columns, dim=1)

    def _stack_tables(self, counts: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
        """Block and frame of every cell of every item, padded on the right, `[b, rows, columns]` on the CPU."""
        flags = [False] * len(counts) if ends is None else ends.tolist()
        tables = [
            cell_table(self.streams, self.pattern, tuple(row), bool(end))
            for row, end in zip(counts.tolist(), flags, strict=True)
        ]
        block = torch.nn.utils.rnn.pad_sequence([table.block for table in tables], True, EMPTY)
        return block, torch.nn.utils.rnn.pad_sequence([table.frame for table in tables], True)

    def _fill(self, tokens: Mapping[str, Tensor], block: Tensor, frame: Tensor) -> PackedTokens:
        """Look the token of every cell up in one gather."""
        device = tokens[self.streams[0].name].device
        starts, total = [], 1  # column 0 of the source is the 0 that start and end cells add to their id
        for stream in self.streams:
            starts.append(total)
            total += tokens[stream.name].shape[1] * stream.num_levels
        offset = [starts[item.stream] + item.level if item.is_token else 0 for item in self._blocks] + [0]
        stride = [self.streams[item.stream].num_levels if item.is_token else 0 for item in self._blocks] + [0]
        source = (torch.tensor(offset)[block] + torch.tensor(stride)[block] * frame).to(device)
        flat = [rearrange(tokens[stream.name], "b f q -> b (f q)") for stream in self.streams]
        values = torch.cat([flat[0].new_zeros(len(flat[0]), 1), *flat], dim=1)
        ids = values.gather(1, rearrange(source, "b r c -> b (r c)")).view_as(source)
        ids = ids + self._first_id_of_block[block].to(device)
        return PackedTokens(ids, (block != EMPTY).to(device), (self._head_of_block[block] >= 0).to(device))


def _fit(tokens: Tensor, num_frames: int) -> Tensor:
    """Zero-pad `[b, f, levels]` to a number of frames."""
    return torch.nn.functional.pad(tokens, (0, 0, 0, num_frames - tokens.shape[1]))
