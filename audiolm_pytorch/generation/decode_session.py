"""The decode loop of all language models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import Conditions, ConditionTensor, guide
from audiolm_pytorch.generation.sampling import SamplingSettings, item_generators, sample_tokens
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.nn.layers import is_plain
from audiolm_pytorch.nn.module_state import eval_mode
from audiolm_pytorch.nn.row_products import RowProduct
from audiolm_pytorch.tokens.streams import PackedTokens

__all__ = ["DecodeSession", "Decoded"]

# Selects tokens `[b, cells]` for logits `[b, cells, v]` and noise `[b, cells]`.
Sampler = Callable[[Tensor, Tensor, SamplingSettings], Tensor]

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


class _Cell(NamedTuple):
    """A column in a row of tokens, and the index of the output head that predicts the token in this column."""

    head: int
    column: int


class DecodeSession:
    """Decodes the predicted streams of a model row by row. Decoding can pause between frames.

    Every item has its own position, so prompts and input streams may differ in length. The model is called once per
    row, with a cache that is written in place. Guidance doubles the batch, and both halves receive the same sampled
    tokens. Noise is drawn in advance per item and row, so the tokens of an item do not depend on the other items, on
    the device or on pauses.

    Args:
        streams: Tokens `[b, f, levels]` of input streams and prompts of predicted streams, by stream name.
        num_frames: Requested frames of every predicted stream, prompts included, `[b]` or one int.
        batch_size: Number of items b, used if `streams` is empty.
        lengths: Number of frames without padding by stream name, `[b]` or one int; a stream without an entry has no
            padding.
        conditioning: Conditions by name, of 1 or b items; None = unconditional.
        negative: Conditions by name from which guidance leads away, instead of no conditions.
        seeds: Seed or generator of every item; None draws seeds from torch's global generator.
        callback: Called after every row as `callback(finished_rows, max_rows)`.
        allow_eos: Whether an item may end early, after at least one frame; False = the end token is never sampled.
            `allow_eos=True` is slower on a GPU, because every row waits for the sampled tokens of the row before.
        transformer: The attribute `transformer` of a finished session with the same model, whose prepared weights this
            session uses again if they are unchanged; None = prepare the weights.
        sampler: Function that selects the missing tokens of a row, in the order of the columns.
    """

    @typed
    def __init__(
        self,
        model: TokenTransformer,
        streams: Mapping[str, Tensor],
        num_frames: Mapping[str, int | Tensor],
        *,
        batch_size: int = 1,
        lengths: Mapping[str, int | Tensor] | None = None,
        conditioning: Conditions | None = None,
        negative: Conditions | None = None,
        settings: SamplingSettings | None = None,
        seeds: Sequence[int | torch.Generator] | None = None,
        callback: Callable[[int, int], None] | None = None,
        allow_eos: bool = False,
        transformer: CachedTransformer | None = None,
        sampler: Sampler = sample_tokens,
    ) -> None:
        self.settings = settings if settings is not None else SamplingSettings()
        batch = len(next(iter(streams.values()))) if streams else batch_size
        if batch < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch}")
        layout, scale = model.layout, self.settings.guidance_scale
        if scale != 1 and not conditioning and not layout.has_conditions:
            raise ValueError(f"guidance_scale {scale} needs `conditioning`; pass it, or set guidance_scale to 1")
        if allow_eos and layout.pattern == "flat" and len(layout.predicted) > 1:
            raise ValueError(
                "got allow_eos=True for a flat layout with several predicted streams, in which an early end would move "
                "the other streams; use the delayed or the parallel pattern"
            )
        grid = layout.grid(streams, num_frames, batch, lengths)
        self.model, self.conditioning, self.negative = model, conditioning, negative or {}
        self.callback, self.allow_eos, self.sampler = callback, allow_eos, sampler
        self.batch, self.copies = batch, 1 if scale == 1 else 2
        packed = grid.packed.to(model.device)
        # Empty cells contain the id of the zero embedding.
        self.ids = packed.ids.masked_fill(~packed.input_mask, layout.num_ids)
        unconditional = layout.without_conditions(packed, torch.ones(batch, dtype=torch.bool))
        self.is_dropped = packed.input_mask & ~unconditional.input_mask  # cells that guidance empties
        # The tensors that control the loop stay on the CPU, so that no row waits for the device.
        self.missing, self.head, self.frame = grid.packed.loss_mask.cpu().clone(), grid.head, grid.frame
        self.num_frames = {name: count.clone() for name, count in grid.num_frames.items()}
        num_rows = [int(rows.nonzero().max()) + 1 for rows in grid.packed.input_mask.any(dim=-1).cpu()]
        generators = item_generators(seeds, batch)
        noise = [
            torch.rand(rows, self.ids.shape[2], generator=g, dtype=torch.float32)
            for rows, g in zip(num_rows, generators)
        ]
        self.noise = torch.nn.utils.rnn.pad_sequence(noise, batch_first=True).to(model.device)
        self.pending = [_missing_cells(self.missing[item], self.head[item]) for item in range(batch)]
        # Row of each item that is sampled next. A complete item starts at row 1 and repeats its last row.
        self.rows = [min(cells, default=1) for cells in self.pending]
        self.frames_after_row = [self._count_frames_after_rows(item) for item in range(batch)]
        self.known = [self.frames_after_row[item][row - 1] for item, row in enumerate(self.rows)]
        is_usable = transformer is not None and transformer.batch == self.copies * batch and transformer.is_current
        self.transformer = transformer if is_usable else None
        self.is_prefilled = False  # whether the cache of `transformer` belongs to this session
        self.heads: dict[tuple[int, ...], _Heads] = {}
        self.has_read = False  # whether the final states belong to the rows before `rows`
        self.bad_row = torch.full((), -1, device=model.device)

    @property
    def is_done(self) -> bool:
        """Whether all requested tokens of all items are decoded."""
        return not any(self.pending)

    @property
    def known_frames(self) -> Tensor:
        """Number of complete frames `[b]` int64, prompts included.

        If there are several predicted streams, every unfinished stream has at least `known_frames` complete frames.
        """
        return torch.tensor(self.known)

    def advance(self, until_frames: int | None = None) -> None:
        """Decode until every item has `until_frames` frames (prompts included; None = all frames) or is complete."""
        with eval_mode(self.model), torch.inference_mode():
            while any(
                cells and (until_frames is None or known < until_frames)
                for cells, known in zip(self.pending, self.known)
            ):
                if not self.is_prefilled:
                    self._prefill()
                elif not self.has_read:
                    self._read_row()
                self._fill_row()
                if self.callback is not None:
                    self.callback(max(self.rows) + 1, self.ids.shape[1])
                if max(self.rows) % _ROWS_BETWEEN_CHECKS == 0:
                    self._raise_recorded_error()
        if self.is_done and self.is_prefilled and self.transformer is not None:
            self.transformer.release()
            self.is_prefilled = False  # the next session can use the transformer
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
        streams = {}
        unpacked = layout.unpack(self.ids, self.num_frames)
        for name, known_length in lengths.items():
            tokens, count = unpacked[name], int(known_length.max())
            inside = torch.arange(count) < known_length.unsqueeze(1)
            streams[name] = tokens[:, :count].masked_fill(~inside.to(tokens.device).unsqueeze(-1), -1)
        return Decoded(streams, lengths)

    def _prefill(self) -> None:
        """Fill the cache with the conditions and, for each item, all rows before the first row to decode."""
        model, copies, count = self.model, self.copies, max(self.rows)
        fused = model.fuse(self._doubled_conditions(), copies * self.batch)
        ids = self.ids[:, :count]
        mask = ids != model.layout.num_ids
        if copies == 2:
            all_items = torch.ones(self.batch, dtype=torch.bool)
            packed = PackedTokens(ids, mask, mask, model.layout.streams, model.layout.pattern)
            unconditional = model.layout.without_conditions(packed, all_items)
            ids, mask = torch.cat((ids, unconditional.ids)), torch.cat((mask, unconditional.input_mask))
        if self.transformer is None:
            self.transformer = CachedTransformer(model.transformer, copies * self.batch)
        num_positions = fused.num_rows + self.ids.shape[1]
        self.transformer.prefill(model.embed(ids, mask), fused, self.rows * copies, num_positions)
        self.is_prefilled = self.has_read = True

    def _doubled_conditions(self) -> Conditions | None:
        """Conditions of the batch; guidance appends a copy of every item with negative or without conditions."""
        if self.conditioning is None or self.copies == 1:
            return self.conditioning
        doubled = {}
        for name, condition in self.conditioning.items():
            condition = condition.expand(self.batch)
            nothing = condition.without_items(torch.ones(self.batch, dtype=torch.bool))
            copy = self.negative.get(name, nothing).expand(self.batch)
            doubled[name] = ConditionTensor.concatenate([condition, copy])
        return doubled

    def _read_row(self) -> None:
        """Run the model on the current row of each item and go to the next row. Complete items stay at the last row."""
        rows = [row if cells else row - 1 for row, cells in zip(self.rows, self.pending)]
        ids = self.ids[_rows_of_items(rows)]
        if self.copies == 2:
            is_dropped = self.is_dropped[_rows_of_items(rows)]
            ids = torch.cat((ids, ids.masked_fill(is_dropped, self.model.layout.num_ids)))
        x = F.embedding(ids, self.model.embedding.weight).sum(dim=1)
        if self.transformer is not None:
            self.transformer.step(x, rows * self.copies)
        self.rows = [row + 1 for row in rows]
        self.has_read = True

    def _fill_row(self) -> None:
        """Sample the missing tokens in the current row of each item."""
        items_of_cells: dict[tuple[_Cell, ...], list[int]] = {}
        for item, (pending, row) in enumerate(zip(self.pending, self.rows)):
            items_of_cells.setdefault(pending.pop(row, ()), []).append(item)
        ends: dict[int, int] = {}  # item -> frames before its end
        for cells, items in items_of_cells.items():
            # Heads with the same number of logits are sampled together.
            by_size: dict[int, list[_Cell]] = {}
            for cell in cells:
                by_size.setdefault(len(self.model.layout.heads[cell.head].ids(self.allow_eos)), []).append(cell)
            for cells_of_size in by_size.values():
                ends |= self._sample(items, cells_of_size)
        for item, num_frames in ends.items():
            self._end(item, num_frames)
        self.known = [frames[row] for frames, row in zip(self.frames_after_row, self.rows)]
        self.has_read = False

    def _sample(self, items: list[int], cells: list[_Cell]) -> dict[int, int]:
        """Sample one token per item into each of `cells`. Return the frames of each item that ends."""
        key, transformer = tuple(cell.head for cell in cells), self.transformer
        if key not in self.heads and transformer is not None:
            self.heads[key] = _Heads(self.model, key, self.allow_eos, transformer.hidden)
        heads, rows = self.heads[key], [self.rows[item] for item in items]
        logits = heads.logits()
        if len(items) < self.batch:
            copied_items = [item + self.batch for item in items] if self.copies == 2 else []
            logits = logits[[*items, *copied_items]]
        if self.copies == 2:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, float(self.settings.guidance_scale))
        self._check_finite(logits, items, rows)
        for place, (_, column) in enumerate(cells):
            if heads.has_eos[place]:  # an item cannot end before its first frame
                without_frame = (self.frame[items, rows, column] == 0).nonzero().flatten()
                if len(without_frame):
                    logits[without_frame, place, -1] = float("-inf")
        index = _cells_of_items(items, rows, [cell.column for cell in cells], self.batch)
        tokens = self.sampler(logits, self.noise[index], self.settings)
        self.ids[index] = tokens + heads.first_ids
        ends: dict[int, int] = {}
        for place, (_, column) in enumerate(cells):
            if heads.has_eos[place]:
                for n in (tokens[:, place] == heads.num_logits - 1).nonzero().flatten().tolist():
                    ends[items[n]] = int(self.frame[items[n], rows[n], column])
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
        self.ids[item].masked_fill_(~is_used.to(self.ids.device), layout.num_ids)
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
        total = logits.sum()  # not finite if a logit is not
        if logits.device.type != "cpu":
            self.bad_row = torch.where(total.isfinite() | (self.bad_row >= 0), self.bad_row, max(rows))
        elif not isfinite(total.item()):
            bad = [item for item, item_logits in zip(items, logits) if not item_logits.isfinite().all()]
            if bad:
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


def _missing_cells(missing: Tensor, head: Tensor) -> dict[int, tuple[_Cell, ...]]:
    """Map each row of an item to its missing cells; `missing [rows, columns]` is True where a token is missing."""
    cells: dict[int, tuple[_Cell, ...]] = {}
    for (row, column), head_index in zip(missing.nonzero().tolist(), head[missing].tolist()):
        cells[row] = (*cells.get(row, ()), _Cell(head_index, column))
    return cells


def _rows_of_items(rows: Sequence[int]) -> Any:
    """Return an index into a tensor `[b, rows, columns]` that selects row `rows[i]` of each item i."""
    return (slice(None), rows[0]) if min(rows) == max(rows) else (list(range(len(rows))), list(rows))


def _cells_of_items(items: list[int], rows: list[int], columns: list[int], batch: int) -> Any:
    """Return an index into a tensor `[b, rows, columns]` that selects `columns` in row `rows[i]` of `items[i]`."""
    if len(items) == batch and min(rows) == max(rows) and columns == list(range(columns[0], columns[-1] + 1)):
        return slice(None), rows[0], slice(columns[0], columns[-1] + 1)
    return [[item] for item in items], [[row] for row in rows], columns


class _Heads:
    """Heads of a model that are sampled together, because they have the same number of logits.

    Every call of `logits` reads the current final states from `hidden [b, d]`.
    """

    def __init__(self, model: TokenTransformer, heads: Sequence[int], allow_eos: bool, hidden: Tensor) -> None:
        selected = [model.layout.heads[head] for head in heads]
        self.num_logits = len(selected[0].ids(allow_eos))
        self.has_eos = [allow_eos and head.has_eos for head in selected]
        self.first_ids = torch.tensor([head.first_id for head in selected], device=model.device)
        self._layers: list[Any] = [model.heads[head] for head in heads]
        self._hidden, self._are_plain = hidden, all(map(is_plain, self._layers))
        weight = torch.cat([layer.weight[: self.num_logits] for layer in self._layers])
        self._logits = torch.zeros(len(hidden), len(weight), device=model.device, dtype=hidden.dtype)
        self._product = RowProduct(weight, None, hidden, self._logits)

    def logits(self) -> Tensor:
        """Return the logits `[b, heads, num_logits]` float32."""
        if not self._are_plain:
            hidden = self._hidden.to(self._layers[0].weight.dtype)
            return torch.stack([layer(hidden)[:, : self.num_logits] for layer in self._layers], dim=1).float()
        self._product()
        return self._logits.view(len(self._logits), len(self.has_eos), -1).float()
