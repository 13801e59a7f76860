"""The one decode loop of every language model: a cache written in place, a position per item, noise per item."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.attention import KVCache, Slots
from audiolm_pytorch.conditioning import Conditioning, guide
from audiolm_pytorch.sampling import SamplingSettings, item_generators, sample_tokens
from audiolm_pytorch.stages.layout import TokenLayout
from audiolm_pytorch.stages.streams import Canvas

__all__ = ["Decoded", "TokenModel", "decode"]


@dataclass(frozen=True)
class Decoded:
    """Completed streams.

    Attributes:
        streams: Tokens `[b, f, levels]` int64 of every predicted stream, prompts included; -1 past an item's length.
        lengths: Frames `[b]` int64 of each, on the CPU.
    """

    streams: dict[str, Tensor]
    lengths: dict[str, Tensor]


@runtime_checkable
class TokenModel(Protocol):
    """What the decode loop asks of a model."""

    training: bool

    @property
    def layout(self) -> TokenLayout:
        """What the model reads and writes."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def new_cache(self, batch: int, num_slots: int) -> KVCache:
        """Allocate a cache."""

    def prefix(self, conditioning: Conditioning | None, batch: int) -> Tensor | None:
        """Embeddings `[b, m, d]` that stand before the sequence."""

    def hidden(
        self,
        ids: Tensor,
        mask: Tensor,
        prefix: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Slots | None = None,
    ) -> Tensor:
        """Final states `[b, n, d]` of rows `[b, n, columns]`."""

    def logits(self, hidden: Tensor, head: int) -> Tensor:
        """Logits `[..., num_logits]` of one head."""

    def train(self, mode: bool = True) -> object:
        """Switch dropout."""


@beartype
def decode(
    model: TokenModel,
    streams: Mapping[str, Tensor],
    num_frames: Mapping[str, int | Tensor],
    *,
    batch_size: int = 1,
    lengths: Mapping[str, int | Tensor] | None = None,
    conditioning: Conditioning | None = None,
    settings: SamplingSettings | None = None,
    seeds: Sequence[int | torch.Generator] | None = None,
    callback: Callable[[int, int], None] | None = None,
    allow_eos: bool = False,
) -> Decoded:
    """Complete the predicted streams, row by row.

    Every item has a position of its own, so prompts (and given streams) may differ in length. A row costs one call of
    the model on that row; the cache is written in place. Under guidance the batch is doubled and both halves read the
    same sampled tokens.

    Args:
        model: The model.
        streams: Given streams, and prompts of predicted streams, `[b, f, levels]`.
        num_frames: Frames wanted of every predicted stream, prompts included, `[b]` or one int.
        batch_size: Number of items b, where `streams` does not tell.
        lengths: True frames of the streams handed in, `[b]` or one int; streams not named are whole.
        conditioning: The condition, of 1 or b items; None = unconditional.
        settings: How tokens are drawn; None = temperature 1.
        seeds: Seed or generator of every item; None draws seeds from torch's global generator.
        callback: Called after every row with the rows done and the rows to do at most.
        allow_eos: Whether an item may end early. Otherwise the end id is never drawn.

    Returns:
        The completed streams.

    Raises:
        ValueError: If inputs do not fit the layout, seeds do not fit the batch, guidance has no condition to follow, or
            early ends are allowed where several streams stand one after another.
    """
    settings = settings if settings is not None else SamplingSettings()
    batch = len(next(iter(streams.values()))) if streams else batch_size
    if settings.guidance_scale != 1 and conditioning is None:
        raise ValueError(f"guidance_scale {settings.guidance_scale} needs a conditioning; without one leave it at 1")
    if allow_eos and model.layout.pattern == "flat" and len(model.layout.predicted) > 1:
        raise ValueError("with several predicted streams in one column an early end of one would move the others")
    canvas = model.layout.canvas(streams, num_frames, batch, lengths)
    run = _Run(model, canvas, settings, item_generators(seeds, batch), allow_eos)
    num_rows = canvas.frame.shape[1]
    with _evaluating(model), torch.inference_mode():
        if run.is_missing:
            run.prefill(conditioning)
        while run.is_missing:
            run.fill_row()
            if callback is not None:
                callback(int(run.row.max()) + 1, num_rows)
            if run.is_missing:
                run.read_row()
    return Decoded(
        model.layout.unpack(run.ids, run.num_frames), {s.name: run.num_frames[s.name] for s in model.layout.predicted}
    )


@contextmanager
def _evaluating(model: TokenModel) -> Iterator[None]:
    """Switch dropout off for a while."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


class _Run:
    """One decoding under way: the grid, the cache, and the row of every item that is filled next.

    What steers the loop (rows, heads, what is missing) lives on the CPU, so that no step waits for the device to tell.
    """

    def __init__(
        self,
        model: TokenModel,
        canvas: Canvas,
        settings: SamplingSettings,
        generators: Sequence[torch.Generator],
        allow_eos: bool,
    ) -> None:
        self.model, self.settings, self.allow_eos = model, settings, allow_eos
        packed = canvas.packed.to(model.device)
        self.ids, self.mask = packed.ids.clone(), packed.input_mask.clone()
        self.missing = canvas.packed.loss_mask.cpu().clone()
        self.head, self.frame = canvas.head, canvas.frame
        self.num_frames = {name: count.clone() for name, count in canvas.num_frames.items()}
        # Drawn ahead, by each item for its own rows: neither the batch nor the device changes an item's noise.
        num_rows = [int(rows.nonzero().max()) + 1 for rows in canvas.packed.input_mask.any(dim=-1).cpu()]
        noise = [torch.rand(rows, self.ids.shape[2], generator=g) for rows, g in zip(num_rows, generators)]
        self.noise = torch.nn.utils.rnn.pad_sequence(noise, batch_first=True)
        self.items = torch.arange(len(self.ids))
        self.copies = 2 if settings.guidance_scale != 1 else 1

    def prefill(self, conditioning: Conditioning | None) -> None:
        """Read the condition and everything before the first missing row of each item."""
        batch = len(self.ids)
        prefix = self.model.prefix(conditioning, batch)
        if self.copies == 2 and conditioning is not None and prefix is not None:
            nothing = conditioning.without_items(torch.ones(len(conditioning), dtype=torch.bool))
            prefix = torch.cat((prefix, self.model.prefix(nothing, batch)))  # type: ignore[arg-type]
        self.offset = 0 if prefix is None else prefix.shape[1]
        # An item without missing rows has argmax 0; it is carried along from row 1.
        self.row = self.missing.any(dim=-1).int().argmax(dim=-1).clamp(min=1)
        count = int(self.row.max())
        self.cache = self.model.new_cache(self.copies * batch, self.offset + self.ids.shape[1])
        slots = Slots.after([0] * (self.copies * batch), self.offset + count, self.model.device)
        hidden = self._read(self.ids[:, :count], self.mask[:, :count], slots, prefix)
        last = (self.row - 1).repeat(self.copies).to(hidden.device)
        self.hidden = hidden[torch.arange(len(hidden), device=hidden.device), last]

    @property
    def is_missing(self) -> bool:
        """Whether any cell of any item is to be drawn yet."""
        return bool(self.missing.any())

    def fill_row(self) -> None:
        """Draw what is missing in the present row of each item."""
        cells = self.missing[self.items, self.row]
        heads = self.head[self.items, self.row]
        for head in heads[cells].unique().tolist():
            item, column = (cells & (heads == head)).nonzero(as_tuple=True)
            row = self.row[item]
            tokens = self._draw(head, item, self.noise[item, row, column])
            place = [index.to(self.ids.device) for index in (item, row, column)]
            self.ids[place[0], place[1], place[2]] = tokens + self.model.layout.heads[head].first_id
            self.missing[item, row, column] = False
            if self.allow_eos and self.model.layout.heads[head].has_eos:
                ended = tokens.cpu() == self.model.layout.heads[head].vocab_size
                for i, frame in zip(item[ended].tolist(), self.frame[item, row, column][ended].tolist()):
                    self._end(i, frame)

    def read_row(self) -> None:
        """Let the model read the row just filled, of each item that has rows left; the others read theirs again."""
        rows = torch.arange(self.missing.shape[1])
        later = (self.missing.any(dim=-1) & (rows > self.row.unsqueeze(1))).any(dim=-1)
        self.row = torch.where(later, self.row + 1, self.row)
        read = self.row - 1
        slots = Slots.after((read + self.offset).repeat(self.copies).tolist(), 1, self.model.device)
        place = (self.items.to(self.ids.device), read.to(self.ids.device))
        self.hidden = self._read(self.ids[place].unsqueeze(1), self.mask[place].unsqueeze(1), slots)[:, 0]

    def _read(self, ids: Tensor, mask: Tensor, slots: Slots, prefix: Tensor | None = None) -> Tensor:
        """Run the model on rows; under guidance both halves of the batch read the same tokens."""
        repeats = (self.copies, 1, 1)
        return self.model.hidden(ids.repeat(repeats), mask.repeat(repeats), prefix, self.cache, slots)

    def _draw(self, head: int, item: Tensor, noise: Tensor) -> Tensor:
        """Draw the local token numbers of one head for some items."""
        index = item.to(self.hidden.device)
        logits = self.model.logits(self.hidden[index], head)
        if self.copies == 2:
            unconditional = self.model.logits(self.hidden[index + len(self.ids)], head)
            logits = guide(logits, unconditional, float(self.settings.guidance_scale))
        if not self.allow_eos:
            logits = logits[:, : self.model.layout.heads[head].vocab_size]
        return sample_tokens(logits, noise.to(logits.device), self.settings)

    def _end(self, item: int, num_frames: int) -> None:
        """Shorten an item to the frames before its end: cells that its shorter table does not have are gone."""
        for stream in self.model.layout.predicted:
            self.num_frames[stream.name][item] = num_frames
        table = self.model.layout.table({name: int(count[item]) for name, count in self.num_frames.items()}, ends=True)
        stands = torch.zeros_like(self.missing[item])
        stands[: len(table.block)] = (table.block >= 0)[: len(stands)]
        self.missing[item] &= stands
        self.mask[item] &= stands.to(self.mask.device)
