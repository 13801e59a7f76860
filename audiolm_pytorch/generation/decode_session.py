"""The decode loop of all language models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.conditioning.tensors import Conditions, guide
from audiolm_pytorch.generation.sampling import SamplingSettings, item_generators, sample_tokens
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.kv_cache import CachePositions, KVCache
from audiolm_pytorch.nn.module_state import eval_mode
from audiolm_pytorch.tokens.streams import PackedTokens

__all__ = ["DecodeSession", "Decoded"]

# Number of rows between checks for NaN on a GPU, because copying a result to the CPU stalls the GPU.
_ROWS_BETWEEN_CHECKS = 64


@dataclass(frozen=True)
class Decoded:
    """Tokens of the predicted streams, prompts included.

    Attributes:
        streams: Tokens `[b, f, levels]` int64 by name of the predicted stream; -1 past the length of an item.
        lengths: Number of frames `[b]` int64 by name of the stream, on the CPU.
    """

    streams: dict[str, Tensor]
    lengths: dict[str, Tensor]


class DecodeSession:
    """Decodes the predicted streams of a model row by row. Decoding can pause between frames.

    Every item has its own position, so prompts and input streams may differ in length. The model is called once per
    row, with a cache that is written in place. Guidance doubles the batch, and both halves receive the same sampled
    tokens. Noise is drawn in advance per item and row, so the tokens of an item do not depend on the other items, on
    the device or on pauses.

    Args:
        model: The language model; set to eval mode while it decodes.
        streams: Tokens `[b, f, levels]` of input streams and prompts of predicted streams, by stream name.
        num_frames: Requested frames of every predicted stream, prompts included, `[b]` or one int.
        batch_size: Number of items b, used if `streams` is empty.
        lengths: Number of frames without padding by stream name, `[b]` or one int; a stream without an entry has no
            padding.
        conditioning: Conditions by name, of 1 or b items; None = unconditional.
        settings: Sampling settings; None = temperature 1.
        seeds: Seed or generator of every item; None draws seeds from torch's global generator.
        callback: Called after every row as `callback(finished_rows, max_rows)`.
        allow_eos: Whether an item may end early, after at least one frame. If False, the end token is never sampled.

    Raises:
        ValueError: If the inputs do not fit the layout of the model, the number of seeds differs from the number of
            items, guidance is on without `conditioning`, or `allow_eos` is set and several predicted streams share one
            column.
    """

    @beartype
    def __init__(
        self,
        model: TokenTransformer,
        streams: Mapping[str, Tensor],
        num_frames: Mapping[str, int | Tensor],
        *,
        batch_size: int = 1,
        lengths: Mapping[str, int | Tensor] | None = None,
        conditioning: Conditions | None = None,
        settings: SamplingSettings | None = None,
        seeds: Sequence[int | torch.Generator] | None = None,
        callback: Callable[[int, int], None] | None = None,
        allow_eos: bool = False,
    ) -> None:
        self.settings = settings if settings is not None else SamplingSettings()
        batch = len(next(iter(streams.values()))) if streams else batch_size
        if batch < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch}")
        layout, scale = model.layout, self.settings.guidance_scale
        if scale != 1 and not conditioning and layout.null_id is None:
            raise ValueError(f"guidance_scale {scale} needs `conditioning`; pass it, or set guidance_scale to 1")
        if allow_eos and layout.pattern == "flat" and len(layout.predicted) > 1:
            raise ValueError(
                "got allow_eos=True for a flat layout with several predicted streams, in which an early end would move "
                "the other streams; use the delayed or the parallel pattern"
            )
        grid = layout.grid(streams, num_frames, batch, lengths)
        self.model, self.conditioning, self.callback, self.allow_eos = model, conditioning, callback, allow_eos
        self.batch, self.copies = batch, 1 if scale == 1 else 2
        packed = grid.packed.to(model.device)
        self.ids, self.mask = packed.ids.clone(), packed.input_mask.clone()
        # The tensors that control the loop stay on the CPU, so that no row waits for the device.
        self.missing, self.head, self.frame = grid.packed.loss_mask.cpu().clone(), grid.head, grid.frame
        self.num_frames = {name: count.clone() for name, count in grid.num_frames.items()}
        num_rows = [int(rows.nonzero().max()) + 1 for rows in grid.packed.input_mask.any(dim=-1).cpu()]
        generators = item_generators(seeds, batch)
        noise = [torch.rand(rows, self.ids.shape[2], generator=g) for rows, g in zip(num_rows, generators)]
        self.noise = torch.nn.utils.rnn.pad_sequence(noise, batch_first=True).to(model.device)
        self.pending = [_missing_cells(self.missing[item], self.head[item]) for item in range(batch)]
        # Row of each item that is sampled next. A complete item starts at row 1 and repeats its last row.
        self.rows = [min(cells, default=1) for cells in self.pending]
        self.frames_after_row = [self._count_frames_after_rows(item) for item in range(batch)]
        self.known = [self.frames_after_row[item][row - 1] for item, row in enumerate(self.rows)]
        self.cache: KVCache | None = None
        self.has_read = False  # whether `hidden` belongs to the rows before `rows`
        self.bad_row = torch.full((), -1, device=model.device)

    @property
    def is_done(self) -> bool:
        """Whether all requested tokens of all items are decoded."""
        return not any(self.pending)

    @property
    def known_frames(self) -> Tensor:
        """Number of complete frames `[b]` int64, prompts included.

        If there are several predicted streams, each of them has at least this many complete frames or is finished.
        """
        return torch.tensor(self.known)

    def advance(self, until_frames: int | None = None) -> None:
        """Decode until every item has `until_frames` frames (prompts included; None = all frames) or is complete.

        Raises:
            ValueError: If the model returns logits that are not finite.
        """
        with eval_mode(self.model), torch.inference_mode():
            while any(
                cells and (until_frames is None or known < until_frames)
                for cells, known in zip(self.pending, self.known)
            ):
                if self.cache is None:
                    self._prefill()
                elif not self.has_read:
                    self._read_row()
                self._fill_row()
                if self.callback is not None:
                    self.callback(max(self.rows) + 1, self.ids.shape[1])
                if max(self.rows) % _ROWS_BETWEEN_CHECKS == 0:
                    self._raise_recorded_error()
        self._raise_recorded_error()

    def decoded(self) -> Decoded:
        """Return the complete frames of all predicted streams."""
        layout = self.model.layout
        known = self.known_frames
        lengths = {
            stream.name: self.num_frames[stream.name].clone()
            if self.is_done
            else known.clamp(max=self.num_frames[stream.name])
            for stream in layout.predicted
        }
        streams = layout.unpack(self.ids, self.num_frames)
        for name, tokens in streams.items():
            count = int(lengths[name].max())
            inside = torch.arange(count) < lengths[name].unsqueeze(1)
            streams[name] = tokens[:, :count].masked_fill(~inside.to(tokens.device).unsqueeze(-1), -1)
        return Decoded(streams, lengths)

    def _prefill(self) -> None:
        """Fill the cache with the conditions and all rows before the first row to decode of each item."""
        count, device = max(self.rows), self.model.device
        conditions = self.model.condition_tensors(self._doubled_conditions(), self.copies * self.batch)
        self.offset = conditions.num_rows
        self.cache = self.model.new_cache(self.copies * self.batch, self.offset + self.ids.shape[1])
        cache_positions = CachePositions.after([0] * (self.copies * self.batch), self.offset + count, device)
        ids, mask = self.ids[:, :count], self.mask[:, :count]
        if self.copies == 2:
            all_items = torch.ones(self.batch, dtype=torch.bool)
            unconditional = self.model.layout.without_conditions(PackedTokens(ids, mask, mask), all_items)
            ids, mask = torch.cat((ids, unconditional.ids)), mask.repeat(2, 1, 1)
        hidden = self.model.hidden(ids, mask, conditions, self.cache, cache_positions)
        last = torch.tensor(self.rows, device=hidden.device).repeat(self.copies) - 1
        self.hidden = hidden[torch.arange(len(hidden), device=hidden.device), last]
        self.has_read = True

    def _doubled_conditions(self) -> Conditions | None:
        """Conditions of the batch; with guidance, followed by unconditional copies of all items."""
        if self.conditioning is None or self.copies == 1:
            return self.conditioning
        items, is_copy = torch.arange(self.batch).repeat(2), torch.arange(2 * self.batch) >= self.batch
        return {
            name: condition.expand(self.batch).select(items).without_items(is_copy)
            for name, condition in self.conditioning.items()
        }

    def _read_row(self) -> None:
        """Run the model on the current row of each item and go to the next. Complete items stay at their last row."""
        self.rows = [row + 1 if cells else row for row, cells in zip(self.rows, self.pending)]
        read_rows, device = [row - 1 for row in self.rows], self.ids.device
        positions = [row + self.offset for row in read_rows] * self.copies
        cache_positions = CachePositions.after(positions, 1, self.model.device)
        if cache_positions.start is not None:
            ids, mask = (part[:, read_rows[0]].unsqueeze(1) for part in (self.ids, self.mask))
        else:
            cells = torch.arange(self.batch, device=device), torch.tensor(read_rows, device=device)
            ids, mask = (part[cells].unsqueeze(1) for part in (self.ids, self.mask))
        if self.copies == 2:
            ids, mask = ids.repeat(2, 1, 1), mask.repeat(2, 1, 1)
        self.hidden = self.model.hidden(ids, mask, None, self.cache, cache_positions)[:, 0]
        self.has_read = True

    def _fill_row(self) -> None:
        """Sample the missing tokens in the current row of each item."""
        items_of_cell: dict[tuple[int, int], list[int]] = {}  # (head, column) -> items
        for item, (pending, row) in enumerate(zip(self.pending, self.rows)):
            for cell in pending.pop(row, ()):
                items_of_cell.setdefault(cell, []).append(item)
        # Cells with the same items and the same number of logits are sampled together.
        groups: dict[tuple[int, tuple[int, ...]], list[tuple[int, int]]] = {}
        for (head, column), items in items_of_cell.items():
            groups.setdefault((self._num_logits(head), tuple(items)), []).append((head, column))
        ends: dict[int, int] = {}  # item -> frames before its end
        for (_, group_items), cells in groups.items():
            ends |= self._sample(list(group_items), [head for head, _ in cells], [column for _, column in cells])
        for item, num_frames in ends.items():
            self._end(item, num_frames)
        self.known = [frames[row] for frames, row in zip(self.frames_after_row, self.rows)]
        self.has_read = False

    def _num_logits(self, head: int) -> int:
        return len(self.model.layout.heads[head].ids(self.allow_eos))

    def _sample(self, items: list[int], heads: list[int], columns: list[int]) -> dict[int, int]:
        """Sample one token per item and head into `columns`. Return `{item: frames}` for the items that end."""
        device, layout_heads = self.ids.device, [self.model.layout.heads[head] for head in heads]
        rows = [self.rows[item] for item in items]
        copied_items = [item + self.batch for item in items] if self.copies == 2 else []
        hidden = self.hidden if len(items) == self.batch else self.hidden[[*items, *copied_items]]
        size = self._num_logits(heads[0])
        logits = torch.stack([self.model.logits(hidden, head)[:, :size] for head in heads], dim=1)
        if self.copies == 2:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, float(self.settings.guidance_scale))
        self._check_finite(logits, items, rows)
        eos_heads = [(place, head) for place, head in enumerate(layout_heads) if self.allow_eos and head.has_eos]
        for place, head in eos_heads:  # an item cannot end before its first frame
            without_frame = (self.frame[items, rows, columns[place]] == 0).nonzero().flatten()
            if len(without_frame):
                logits[without_frame, place, head.vocab_size] = float("-inf")
        item_index = torch.tensor(items, device=device).unsqueeze(1)
        cells = item_index, torch.tensor(rows, device=device).unsqueeze(1), torch.tensor(columns, device=device)
        noise = self.noise[cells]
        tokens = sample_tokens(logits.flatten(0, 1), noise.flatten(), self.settings).view_as(noise)
        self.ids[cells] = tokens + torch.tensor([head.first_id for head in layout_heads], device=device)
        ends: dict[int, int] = {}
        for place, head in eos_heads:
            for n in (tokens[:, place] == head.vocab_size).nonzero().flatten().tolist():
                ends[items[n]] = int(self.frame[items[n], rows[n], columns[place]])
        return ends

    def _end(self, item: int, num_frames: int) -> None:
        """Shorten all streams of an item to `num_frames` frames, because all streams end together in training."""
        layout = self.model.layout
        for stream in layout.predicted:
            self.num_frames[stream.name][item] = num_frames
        table = layout.table({name: int(count[item]) for name, count in self.num_frames.items()}, ends=True)
        is_used = torch.zeros_like(self.missing[item])
        is_used[: len(table.block)] = (table.block >= 0)[: len(is_used)]
        row = self.rows[item]
        for column in (self.missing[item, row] & (self.frame[item, row] == num_frames)).nonzero().flatten().tolist():
            head = layout.heads[int(self.head[item, row, column])]
            if head.has_eos:
                self.ids[item, row, column] = head.first_id + head.vocab_size
        self.missing[item] &= is_used
        self.mask[item] &= is_used.to(self.mask.device)
        cells = _missing_cells(self.missing[item], self.head[item])
        self.pending[item] = {later_row: row_cells for later_row, row_cells in cells.items() if later_row > row}
        self.frames_after_row[item] = self._count_frames_after_rows(item)

    def _count_frames_after_rows(self, item: int) -> list[int]:
        """Number of complete frames of an item after each of its rows."""
        total = max(int(self.num_frames[stream.name][item]) for stream in self.model.layout.predicted)
        first_missing = torch.where(self.missing[item], self.frame[item], total).amin(dim=-1)
        later = first_missing.flip(0).cummin(0).values.flip(0).clamp(max=total)
        return [*later[1:].tolist(), total]

    def _check_finite(self, logits: Tensor, items: list[int], rows: list[int]) -> None:
        """Raise ValueError if logits are not finite; on a GPU, `_raise_recorded_error` raises the error later."""
        finite = logits.isfinite().all()
        if logits.device.type != "cpu":
            self.bad_row = torch.where(finite | (self.bad_row >= 0), self.bad_row, max(rows))
        elif not finite:
            bad = [item for item, item_logits in zip(items, logits) if not item_logits.isfinite().all()]
            raise self._not_finite_error(max(rows), f" of items {bad}")

    def _raise_recorded_error(self) -> None:
        row = int(self.bad_row)
        if row >= 0:
            raise self._not_finite_error(row, "")

    def _not_finite_error(self, row: int, of_items: str) -> ValueError:
        return ValueError(
            f"logits{of_items} are not finite (NaN or infinite) at step {row} of {self.ids.shape[1] - 1}: the weights "
            "are damaged, or overflow in this precision; decode in float32, and look for NaN in the weights"
        )


def _missing_cells(missing: Tensor, head: Tensor) -> dict[int, list[tuple[int, int]]]:
    """For each row of one item, the (head, column) pairs of its missing tokens; `missing` is `[rows, columns]`."""
    cells: dict[int, list[tuple[int, int]]] = {}
    for row, column in missing.nonzero().tolist():
        cells.setdefault(row, []).append((int(head[row, column]), column))
    return cells
