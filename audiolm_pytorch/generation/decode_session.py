"""The one decode loop of every language model: a cache written in place, a position per item, noise per item."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.conditioning.tensors import Conditions, guide
from audiolm_pytorch.generation.sampling import SamplingSettings, item_generators, sample_tokens
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.kv_cache import CachePositions, KVCache
from audiolm_pytorch.nn.module_state import eval_mode
from audiolm_pytorch.tokens.streams import PackedTokens

__all__ = ["DecodeSession", "Decoded", "decode"]

# Where looking at the logits means waiting for the device, it is done once in so many rows.
_ROWS_BETWEEN_CHECKS = 64


@dataclass(frozen=True)
class Decoded:
    """Completed streams, prompts included.

    Attributes:
        streams: Tokens `[b, f, levels]` int64 of every predicted stream by name; -1 past an item's length.
        lengths: Frames `[b]` int64 of each stream, on the CPU.
    """

    streams: dict[str, Tensor]
    lengths: dict[str, Tensor]


@beartype
def decode(
    model: TokenTransformer, streams: Mapping[str, Tensor], num_frames: Mapping[str, int | Tensor], **options: Any
) -> Decoded:
    """Complete the predicted streams at one go; see `DecodeSession` for the arguments and errors.

    Args:
        model: The model.
        streams: Given streams, and prompts of predicted streams, `[b, f, levels]`.
        num_frames: Frames wanted of every predicted stream, prompts included, `[b]` or one int.
        **options: Further arguments of `DecodeSession`.

    Returns:
        The completed streams.
    """
    decoding = DecodeSession(model, streams, num_frames, **options)
    decoding.advance()
    return decoding.decoded()


class DecodeSession:
    """The completion of predicted streams, row by row, which can pause between frames.

    Every item has a position of its own, so prompts (and given streams) may differ in length. A row costs one call of
    the model on that row; the cache is written in place. Under guidance the batch is doubled and both halves read the
    same sampled tokens. All noise is drawn ahead, by each item for its own rows: neither the batch, nor the device, nor
    a pause changes an item's tokens.

    Args:
        model: The model.
        streams: Given streams, and prompts of predicted streams, `[b, f, levels]`.
        num_frames: Frames wanted of every predicted stream, prompts included, `[b]` or one int.
        batch_size: Number of items b, where `streams` does not tell.
        lengths: True frames of the streams handed in, `[b]` or one int; streams not named are whole.
        conditioning: The conditions, of 1 or b items; None = unconditional.
        settings: How tokens are drawn; None = temperature 1.
        seeds: Seed or generator of every item; None draws seeds from torch's global generator.
        callback: Called after every row with the rows done and the rows to do at most.
        allow_eos: Whether an item may end early, after one frame at least. Otherwise the end id is never drawn.

    Raises:
        ValueError: If inputs do not fit the layout, seeds do not fit the batch, guidance has no condition to follow, or
            early ends are allowed where several streams stand one after another.
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
        layout = model.layout
        if self.settings.guidance_scale != 1 and conditioning is None and layout.null_id is None:
            scale = self.settings.guidance_scale
            raise ValueError(f"guidance_scale {scale} needs a conditioning; without one leave it at 1")
        if allow_eos and layout.pattern == "flat" and len(layout.predicted) > 1:
            raise ValueError("with several predicted streams in one column an early end of one would move the others")
        grid = layout.grid(streams, num_frames, batch, lengths)
        self.model, self.conditioning, self.callback, self.allow_eos = model, conditioning, callback, allow_eos
        self.copies = 2 if self.settings.guidance_scale != 1 else 1
        packed = grid.packed.to(model.device)
        self.ids, self.mask = packed.ids.clone(), packed.input_mask.clone()
        # What steers the loop lives on the CPU, so that no step waits for the device to tell.
        self.missing, self.head, self.frame = grid.packed.loss_mask.cpu().clone(), grid.head, grid.frame
        self.num_frames = {name: count.clone() for name, count in grid.num_frames.items()}
        num_rows = [int(rows.nonzero().max()) + 1 for rows in grid.packed.input_mask.any(dim=-1).cpu()]
        generators = item_generators(seeds, batch)
        noise = [torch.rand(rows, self.ids.shape[2], generator=g) for rows, g in zip(num_rows, generators)]
        self.noise = torch.nn.utils.rnn.pad_sequence(noise, batch_first=True).to(model.device)
        self.plans = [_plan(self.missing[item], self.head[item]) for item in range(batch)]
        # An item without missing rows is carried along from row 1.
        self.rows = [min(plan, default=1) for plan in self.plans]
        self.whole = [self._whole_frames(item) for item in range(batch)]
        self.known = [self.whole[item][row - 1] for item, row in enumerate(self.rows)]
        self.cache: KVCache | None = None
        self.is_read = False  # whether the model has read all that stands before the present rows
        self.bad_row = torch.full((), -1, device=model.device)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be drawn."""
        return not any(self.plans)

    @property
    def known_frames(self) -> Tensor:
        """Whole frames `[b]` int64 that are known of every item, prompts included.

        Of several predicted streams: so many are known of each, or all of a stream that has fewer.
        """
        return torch.tensor(self.known)

    def advance(self, until_frames: int | None = None) -> None:
        """Draw rows until every item has so many whole frames, has ended, or has all that it wants.

        Args:
            until_frames: Frames, prompts included; None = all.

        Raises:
            ValueError: If logits are not finite; the message names the step.
        """
        with eval_mode(self.model), torch.inference_mode():
            while any(
                plan and (until_frames is None or known < until_frames) for plan, known in zip(self.plans, self.known)
            ):
                if self.cache is None:
                    self._prefill()
                elif not self.is_read:
                    self._read_row()
                self._fill_row()
                if self.callback is not None:
                    self.callback(max(self.rows) + 1, self.ids.shape[1])
                if max(self.rows) % _ROWS_BETWEEN_CHECKS == 0:
                    self._check_bad_row()
        self._check_bad_row()

    def decoded(self) -> Decoded:
        """The whole frames that are known so far."""
        layout = self.model.layout
        known = torch.tensor(self.known)
        lengths = {
            name: self.num_frames[name].clone() if self.is_done else known.clamp(max=self.num_frames[name])
            for name in (stream.name for stream in layout.predicted)
        }
        streams = layout.unpack(self.ids, self.num_frames)
        for name, tokens in streams.items():
            count = int(lengths[name].max())
            inside = torch.arange(count) < lengths[name].unsqueeze(1)
            streams[name] = tokens[:, :count].masked_fill(~inside.to(tokens.device).unsqueeze(-1), -1)
        return Decoded(streams, lengths)

    # one step

    def _prefill(self) -> None:
        """Read the conditions and everything before the first missing row of each item."""
        batch, count = len(self.ids), max(self.rows)
        condition_tensors = self.model.condition_tensors(self._conditions(), self.copies * batch)
        self.offset = condition_tensors.num_rows
        self.cache = self.model.new_cache(self.copies * batch, self.offset + self.ids.shape[1])
        cache_positions = CachePositions.after([0] * (self.copies * batch), self.offset + count, self.model.device)
        ids, mask = self.ids[:, :count], self.mask[:, :count]
        if self.copies == 2:
            nothing = self.model.layout.without_conditions(PackedTokens(ids, mask, mask), torch.ones(batch).bool())
            ids, mask = torch.cat((ids, nothing.ids)), mask.repeat(2, 1, 1)
        hidden = self.model.hidden(ids, mask, condition_tensors, self.cache, cache_positions)
        last = torch.tensor(self.rows, device=hidden.device).repeat(self.copies) - 1
        self.hidden = hidden[torch.arange(len(hidden), device=hidden.device), last]
        self.is_read = True

    def _conditions(self) -> Conditions | None:
        """Conditions of the batch; under guidance of the batch and of its unconditional copy."""
        if self.conditioning is None or self.copies == 1:
            return self.conditioning
        batch = len(self.ids)
        doubled = self.conditioning.expand(batch).select(torch.arange(batch).repeat(2))
        return doubled.without_items(torch.arange(2 * batch) >= batch)

    def _read_row(self) -> None:
        """Let the model read the row just filled, of each item that has rows left; the others read theirs again."""
        read = self.rows
        self.rows = [row + 1 if plan else row for row, plan in zip(read, self.plans)]
        read = [row - 1 for row in self.rows]
        cache_positions = CachePositions.after([row + self.offset for row in read] * self.copies, 1, self.model.device)
        if cache_positions.start is not None:
            ids, mask = (part[:, read[0]].unsqueeze(1) for part in (self.ids, self.mask))
        else:
            place = torch.arange(len(read), device=self.ids.device), torch.tensor(read, device=self.ids.device)
            ids, mask = (part[place].unsqueeze(1) for part in (self.ids, self.mask))
        if self.copies == 2:
            ids, mask = ids.repeat(2, 1, 1), mask.repeat(2, 1, 1)
        self.hidden = self.model.hidden(ids, mask, None, self.cache, cache_positions)[:, 0]
        self.is_read = True

    def _fill_row(self) -> None:
        """Draw what is missing in the present row of each item."""
        groups: dict[tuple[int, int], list[int]] = {}  # (head, column) -> items
        for item, (plan, row) in enumerate(zip(self.plans, self.rows)):
            for head, column in plan.pop(row, ()):
                groups.setdefault((head, column), []).append(item)
        # Heads of one size for the same items are drawn at once.
        joint: dict[tuple[int, tuple[int, ...]], list[tuple[int, int]]] = {}
        for (head, column), items in groups.items():
            joint.setdefault((self._num_logits(head), tuple(items)), []).append((head, column))
        ends: dict[int, int] = {}  # item -> frames before its end
        for (_, items_), cells in joint.items():
            ends |= self._draw(list(items_), [head for head, _ in cells], [column for _, column in cells])
        for item, num_frames in ends.items():
            self._end(item, num_frames)
        self.known = [whole[row] for whole, row in zip(self.whole, self.rows)]
        self.is_read = False

    def _num_logits(self, head: int) -> int:
        """Number of tokens that a head may give."""
        return len(self.model.layout.heads[head].ids(self.allow_eos))

    def _draw(self, items: list[int], heads: list[int], columns: list[int]) -> dict[int, int]:
        """Draw tokens of some heads, for some columns of the present rows; frames of the items that end, by item."""
        layout, device = self.model.layout, self.ids.device
        rows = [self.rows[item] for item in items]
        hidden = self.hidden if len(items) == len(self.ids) else self.hidden[[*items, *self._copied(items)]]
        size = self._num_logits(heads[0])
        logits = torch.stack([self.model.logits(hidden, head)[:, :size] for head in heads], dim=1)
        if self.copies == 2:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, float(self.settings.guidance_scale))
        self._check(logits, items, rows)
        item, row = torch.tensor(items, device=device), torch.tensor(rows, device=device)
        item, row, column = item.unsqueeze(1), row.unsqueeze(1), torch.tensor(columns, device=device).unsqueeze(0)
        if self.allow_eos:
            self._forbid_empty(logits, items, rows, heads, columns)
        noise = self.noise[item, row, column]
        tokens = sample_tokens(logits.flatten(0, 1), noise.flatten(), self.settings).view_as(noise)
        first = torch.tensor([layout.heads[head].first_id for head in heads], device=device)
        self.ids[item, row, column] = tokens + first
        ends: dict[int, int] = {}
        for place, head in enumerate(heads):
            if self.allow_eos and layout.heads[head].has_eos:
                for number in (tokens[:, place] == layout.heads[head].vocab_size).nonzero().flatten().tolist():
                    ends[items[number]] = int(self.frame[items[number], rows[number], columns[place]])
        return ends

    def _copied(self, items: list[int]) -> list[int]:
        """Places of the unconditional copies of items in the doubled batch."""
        return [item + len(self.ids) for item in items] if self.copies == 2 else []

    def _forbid_empty(
        self, logits: Tensor, items: list[int], rows: list[int], heads: list[int], columns: list[int]
    ) -> None:
        """Make the end impossible where an item has no frame yet."""
        for place, (head, column) in enumerate(zip(heads, columns)):
            if self.model.layout.heads[head].has_eos:
                empty = [n for n in range(len(items)) if int(self.frame[items[n], rows[n], column]) == 0]
                if empty:
                    logits[empty, place, self.model.layout.heads[head].vocab_size] = float("-inf")

    def _check(self, logits: Tensor, items: list[int], rows: list[int]) -> None:
        """Note, or on a CPU say at once, that logits are not finite."""
        finite = logits.isfinite().all()
        if logits.device.type != "cpu":
            self.bad_row = torch.where(finite | (self.bad_row >= 0), self.bad_row, max(rows))
        elif not finite:
            bad = [item for item, one in zip(items, logits) if not one.isfinite().all()]
            self._raise_not_finite(max(rows), f" of items {bad}")

    def _check_bad_row(self) -> None:
        """Say that logits were not finite some rows ago."""
        row = int(self.bad_row)
        if row >= 0:
            self._raise_not_finite(row, "")

    def _raise_not_finite(self, row: int, where: str) -> None:
        raise ValueError(
            f"logits{where} are not finite (NaN or infinite) at step {row} of {self.ids.shape[1] - 1}: the weights are "
            "damaged, or overflow in this precision; decode in float32, and look for NaN in the weights"
        )

    def _end(self, item: int, num_frames: int) -> None:
        """Shorten an item to the frames before its end: cells that its shorter table does not have are gone.

        Streams end together, as training shows them: where the end of one was drawn, the ends of all stand.
        """
        for stream in self.model.layout.predicted:
            self.num_frames[stream.name][item] = num_frames
        table = self.model.layout.table({name: int(count[item]) for name, count in self.num_frames.items()}, ends=True)
        stands = torch.zeros_like(self.missing[item])
        stands[: len(table.block)] = (table.block >= 0)[: len(stands)]
        row = self.rows[item]
        for column in (self.missing[item, row] & (self.frame[item, row] == num_frames)).nonzero().flatten().tolist():
            head = self.model.layout.heads[int(self.head[item, row, column])]
            if head.has_eos:
                self.ids[item, row, column] = head.first_id + head.vocab_size
        self.missing[item] &= stands
        self.mask[item] &= stands.to(self.mask.device)
        self.plans[item] = {
            row: cells for row, cells in _plan(self.missing[item], self.head[item]).items() if row > self.rows[item]
        }
        self.whole[item] = self._whole_frames(item)

    def _whole_frames(self, item: int) -> list[int]:
        """For every row: how many whole frames are known once the row is filled."""
        wanted = max(int(self.num_frames[stream.name][item]) for stream in self.model.layout.predicted)
        first = torch.where(self.missing[item], self.frame[item], wanted).amin(dim=-1)
        later = first.flip(0).cummin(0).values.flip(0).clamp(max=wanted)
        return [*later[1:].tolist(), wanted]


def _plan(missing: Tensor, head: Tensor) -> dict[int, list[tuple[int, int]]]:
    """What is to be drawn of one item: by row, (head, column) of the cells missing `[rows, columns]`."""
    plan: dict[int, list[tuple[int, int]]] = {}
    for row, column in missing.nonzero().tolist():
        plan.setdefault(row, []).append((int(head[row, column]), column))
    return plan
