"""The layout of a language model: packs token streams into rows of ids, and unpacks rows of ids into streams."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.tokens.patterns import EMPTY, PATTERNS, CellTable, cell_table
from audiolm_pytorch.tokens.streams import Grid, PackedTokens, Stream, checked_streams, frame_counts, number_ids

__all__ = ["TokenLayout"]


class TokenLayout:
    """Arrangement of token streams in rows (steps of a language model) and columns (tokens that are read in one step).

    The language model reads row `r` and predicts row `r + 1`. The id ranges of all levels of all streams, and of their
    end-of-sequence tokens, do not overlap. Padding is marked by a mask and has no id.

    The first rows contain the streams without a frame rate (`rate_hz=None`), one token per row, ordered by frame and
    then by level. If an item has no tokens of a stream without a frame rate, one null token replaces the stream. The
    start row follows the streams without a frame rate. The rows after the start row follow one of three patterns:

    - `flat` has one column, which contains the streams one after another (input streams first), each stream ordered by
      frame and then by level.
    - `delayed` has one row per predicted frame and one column per level. Residual level `k`, with all its groups, is
      delayed by `k` rows. Input streams are aligned in time; the input token at the time of predicted frame `f` is in
      the row that predicts frame `f`. The tokens of an input stream with a lower frame rate are repeated, and an input
      stream with a higher frame rate uses several columns. If an input stream ends early, its last frame is repeated.
      The next `lookahead_frames` frames of an input stream have further columns, which are empty after its end.
    - `parallel` is the pattern `delayed` without delays.

    In both, a stream with a filler (`Stream.filler`) has its filler id wherever its columns contain no token.

    Attributes:
        heads: Output heads of the language model, one per level of each predicted stream.
        num_ids: Number of ids of all streams and special tokens.
        null_id: Id of the null token; None if every stream has a frame rate.
    """

    @typed
    def __init__(self, streams: Sequence[Stream], pattern: str = "flat") -> None:
        self.streams = tuple(streams)
        self.pattern = pattern
        self.inputs = tuple(stream for stream in self.streams if stream.is_input)
        self.predicted = tuple(stream for stream in self.streams if not stream.is_input)
        self._names = [stream.name for stream in self.streams]
        if len(set(self._names)) != len(self._names):
            raise ValueError(f"stream names must differ, got {self._names}")
        if not self.predicted:
            raise ValueError(
                f"a layout needs a predicted stream, got only input streams {self._names}; pass a Stream with "
                "is_input=False"
            )
        if pattern not in PATTERNS:
            raise ValueError(f"unknown pattern '{pattern}'; use one of {sorted(PATTERNS)}")
        ahead = [stream.name for stream in self.streams if stream.lookahead_frames]
        if pattern == "flat" and ahead:
            raise ValueError(
                f"got lookahead_frames for {ahead} in the flat pattern, in which predicted tokens follow all input "
                "tokens; use the delayed or parallel pattern, or set lookahead_frames=0"
            )
        if pattern == "flat" and any(stream.filler for stream in self.streams):
            raise ValueError(
                "got a stream with a filler in the flat pattern, which has no cells to fill; set it to False"
            )
        rates_hz = {stream.name: str(stream.exact_hz) for stream in self.predicted}
        if pattern != "flat" and len(set(rates_hz.values())) > 1:
            raise ValueError(f"with the {pattern} pattern, all predicted streams need the same rate_hz, got {rates_hz}")
        self._blocks, self.heads, self.num_ids = number_ids(self.streams)
        self.null_id = None if all(s.is_in_time for s in self.streams) else self._blocks[-1].first_id
        # Each tensor has one more entry at the end, for empty cells with block -1.
        self._first_id_of_block = torch.tensor([block.first_id for block in self._blocks] + [0])
        self._head_of_block = torch.tensor([block.head for block in self._blocks] + [-1])
        self._stream_of_block = torch.tensor([max(block.stream, 0) for block in self._blocks] + [0])

    @property
    def frame_alignment(self) -> int:
        """Smallest number of predicted frames whose duration is a whole number of frames in every input stream."""
        rate_hz = self.predicted[0].exact_hz
        return lcm(*((stream.exact_hz / rate_hz).denominator for stream in self.streams if stream.is_in_time))

    @property
    def has_row_per_frame(self) -> bool:
        """Whether row i predicts frame i of the predicted streams, for every i."""
        is_one_column = len(self.streams) == self.streams[0].num_levels == 1
        return self.null_id is None and (self.pattern != "flat" or is_one_column)

    @property
    def has_conditions(self) -> bool:
        """Whether classifier-free guidance can drop an input stream."""
        return any(stream.is_condition for stream in self.streams)

    def to_dict(self) -> dict[str, Any]:
        """Convert the layout to data that JSON can store."""
        return {"streams": [stream.to_dict() for stream in self.streams], "pattern": self.pattern}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TokenLayout":
        """Build a layout from the result of `to_dict`."""
        return cls([Stream.from_dict(stream) for stream in data["streams"]], data["pattern"])

    @typed
    def table(self, num_frames: Mapping[str, int], ends: bool = False) -> CellTable:
        """Return the id range and the frame of each token in the rows and columns, for streams of `num_frames` frames.

        If `ends` is True, each stream with an end-of-sequence id has this id after its last frame. The returned tensors
        are cached; callers must not modify the tensors.
        """
        counts = frame_counts(self.streams, num_frames, 1)[0].tolist()
        return cell_table(self.streams, self.pattern, tuple(counts), ends)

    @typed
    def pack(
        self,
        streams: Mapping[str, Tensor],
        lengths: Mapping[str, int | Tensor] | None = None,
        ends: Tensor | None = None,
    ) -> PackedTokens:
        """Pack token streams into rows of ids; each item is packed independently and padded on the right.

        Args:
            streams: Tokens `[b, f, levels]` (or `[b, f]` for one level) of every stream, by stream name.
            lengths: Numbers of unpadded frames by stream name, `[b]` or one int; no entry means no padding.
            ends: `[b]` bool, True if the recording of an item ends after its last frame; None = False for all items.
        """
        tokens, counts = checked_streams(self.streams, streams, lengths or {})
        if ends is not None and ends.shape != (len(counts),):
            raise ValueError(f"ends must be bool [{len(counts)}], one value per item, got shape {tuple(ends.shape)}")
        return self._fill(tokens, *self._stacked_tables(counts, ends))

    @typed
    def grid(
        self,
        streams: Mapping[str, Tensor],
        num_frames: Mapping[str, int | Tensor],
        batch_size: int,
        lengths: Mapping[str, int | Tensor] | None = None,
    ) -> Grid:
        """Build the grid for decoding from input streams and prompts; decoding predicts the tokens after the prompts.

        Args:
            streams: Tokens `[b, f, levels]` of input streams, and prompts of predicted streams, by stream name.
                Prompts, and input streams without a frame rate, may be missing.
            num_frames: Number of frames, including the prompt, of every predicted stream, `[b]` or one int.
            batch_size: Number of items b.
            lengths: Numbers of unpadded frames by stream name, `[b]` or one int; no entry means no padding.
        """
        optional = [stream for stream in self.streams if not (stream.is_input and stream.is_in_time)]
        nothing = {one.name: torch.zeros(batch_size, 0, one.num_levels, dtype=torch.long) for one in optional}
        tokens, known = checked_streams(self.streams, {**nothing, **streams}, lengths or {}, batch_size)
        input_frames = {name: known[:, i] for i, name in enumerate(self._names) if self.streams[i].is_input}
        requested = frame_counts(self.streams, {**num_frames, **input_frames}, batch_size)
        for index in (known > requested).any(dim=0).nonzero().flatten().tolist():
            raise ValueError(
                f"the prompt of '{self._names[index]}' has {known[:, index].tolist()} frames, longer than the "
                f"requested {requested[:, index].tolist()} frames; shorten the prompt or request more frames"
            )
        device = next((ids.device for ids in streams.values()), torch.device("cpu"))
        for index, (name, ids) in enumerate(tokens.items()):
            num_missing = max(0, int(requested[:, index].max()) - ids.shape[1])
            tokens[name] = F.pad(ids.to(device), (0, 0, 0, num_missing))
        block, frame = self._stacked_tables(requested, None)
        packed = self._fill(tokens, block, frame)
        item = rearrange(torch.arange(batch_size), "b -> b 1 1")
        is_missing = packed.loss_mask & (frame >= known[item, self._stream_of_block[block]]).to(device)
        return Grid(
            packed=replace(packed, loss_mask=is_missing),
            head=self._head_of_block[block],
            frame=frame,
            num_frames={name: requested[:, index] for index, name in enumerate(self._names)},
        )

    def check_packed(self, packed: PackedTokens) -> None:
        """Raise a ValueError if another layout has packed the rows."""
        if (packed.streams, packed.pattern) != (self.streams, self.pattern):
            names = [stream.name for stream in packed.streams]
            raise ValueError(
                f"got rows that a {packed.pattern} layout of the streams {names} has packed, the model needs rows of "
                f"its {self.pattern} layout of {self._names} with equal sizes; pack the tokens with model.layout.pack"
            )

    @typed
    def unpack(self, ids: Tensor, num_frames: Mapping[str, int | Tensor]) -> dict[str, Tensor]:
        """Extract all token streams from packed rows of ids.

        Args:
            ids: Ids `[b, rows, columns]` in the arrangement that `pack` returns.
            num_frames: Number of frames by stream name, `[b]` or one int.

        Returns:
            Tokens `[b, f, levels]` int64 by stream name. The value -1 marks frames after the end of an item, frames
            that are not in `ids`, and ids that are not tokens of the stream.
        """
        counts = frame_counts(self.streams, num_frames, len(ids))
        block, frame = (part.to(ids.device) for part in self._stacked_tables(counts, None))
        num_rows, num_columns = block.shape[1:]
        if ids.ndim != 3 or ids.shape[1] < num_rows or ids.shape[2] != num_columns:
            raise ValueError(
                f"ids must be [b, {num_rows}, {num_columns}] for the numbers of frames {dict(num_frames)}, got "
                f"{tuple(ids.shape)}"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= self.num_ids:
            raise ValueError(
                f"ids must be in 0..{self.num_ids} in this layout, got {int(ids.min())}..{int(ids.max())}; unpack the "
                "rows with the layout that packed them"
            )
        local = ids[:, :num_rows] - self._first_id_of_block.to(ids.device)[block]
        unpacked = {
            stream.name: ids.new_full((len(ids), int(count.max()), stream.num_levels), -1)
            for stream, count in zip(self.streams, counts.T)
        }
        for number, source in enumerate(self._blocks):
            if source.is_token:
                item, row, column = (block == number).nonzero(as_tuple=True)
                tokens = unpacked[self._names[source.stream]]
                values, size = local[item, row, column], self.streams[source.stream].vocab_size
                is_other = (values < 0) | (values >= size)
                tokens[item, frame[item, row, column], source.level] = values.masked_fill(is_other, -1)
        return unpacked

    @typed
    def without_conditions(self, packed: PackedTokens, drop: Tensor) -> PackedTokens:
        """Drop the tokens of conditions (`Stream.is_condition`) in the items where `drop [b]` is True.

        Null tokens replace the tokens of streams without a frame rate, and the cells of other streams become empty. No
        row is removed, so that the two halves of a batch for classifier-free guidance have equal numbers of rows.
        """
        self.check_packed(packed)
        if drop.shape != packed.ids.shape[:1] or drop.dtype != torch.bool:
            raise ValueError(f"drop must be bool [{len(packed.ids)}], got {drop.dtype} {tuple(drop.shape)}")
        if not self.has_conditions:
            return packed
        ids, mask = packed.ids, packed.input_mask
        is_dropped = rearrange(drop.to(ids.device), "b -> b 1 1")
        for block in self._blocks:
            stream = self.streams[block.stream]
            if block.is_token and stream.is_condition:
                is_in_block = (packed.ids >= block.first_id) & (packed.ids < block.first_id + stream.vocab_size)
                if stream.is_in_time:
                    mask = mask & ~(is_dropped & is_in_block)
                elif self.null_id is not None:
                    ids = ids.masked_fill(is_dropped & is_in_block, self.null_id)
        return replace(packed, ids=ids, input_mask=mask)

    def _stacked_tables(self, counts: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the index of the id range and of the frame of each token, two `[b, rows, columns]` on the CPU."""
        flags = [False] * len(counts) if ends is None else ends.tolist()
        tables = [
            cell_table(self.streams, self.pattern, tuple(row), bool(end))
            for row, end in zip(counts.tolist(), flags, strict=True)
        ]
        block = pad_sequence([table.block for table in tables], True, EMPTY)
        return block, pad_sequence([table.frame for table in tables], True)

    def _fill(self, tokens: Mapping[str, Tensor], block: Tensor, frame: Tensor) -> PackedTokens:
        """Return the packed ids for the id ranges `block` and the frames `frame`, both `[b, rows, columns]`."""
        flat = [rearrange(tokens[name], "b f q -> b (f q)") for name in self._names]
        # Position 0 contains the 0 that is added to the id of a start, an end or a null token.
        values = torch.cat([flat[0].new_zeros(len(flat[0]), 1), *flat], dim=1)
        first_position = [1]
        for part in flat:
            first_position.append(first_position[-1] + part.shape[1])
        offset, stride = torch.zeros(2, len(self._blocks) + 1, dtype=torch.long)
        for number, source in enumerate(self._blocks):
            if source.is_token:
                offset[number] = first_position[source.stream] + source.level
                stride[number] = self.streams[source.stream].num_levels
        position = (offset[block] + stride[block] * frame).to(values.device)
        local = values.gather(1, rearrange(position, "b r c -> b (r c)")).view_as(position)
        ids = local + self._first_id_of_block[block].to(values.device)
        is_predicted = self._head_of_block[block] >= 0
        masks = (block != EMPTY).to(values.device), is_predicted.to(values.device)
        return PackedTokens(ids, *masks, self.streams, self.pattern)
