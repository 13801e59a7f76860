"""Decoding that is longer than what a model was trained on: windows that carry half of the one before."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.conditioning.tensors import Conditions
from audiolm_pytorch.generation.decode_session import Decoded, DecodeSession
from audiolm_pytorch.generation.sampling import SamplingSettings, item_generators
from audiolm_pytorch.generation.window_plan import Window, plan_windows
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.tokens.item_tokens import ItemTokens, items_of_streams, padded
from audiolm_pytorch.tokens.streams import Stream, frame_counts

__all__ = ["SlidingWindowDecoder", "decode_in_windows"]


@beartype
def decode_in_windows(
    model: TokenTransformer,
    streams: Mapping[str, Tensor],
    num_frames: int | Tensor,
    *,
    batch_size: int = 1,
    lengths: Mapping[str, int | Tensor] | None = None,
    **options: Any,
) -> Decoded:
    """Complete the predicted stream of a model window by window, at one go.

    Args:
        model: A model with one predicted stream.
        streams: Given streams and the prompt, `[b, f, levels]` by name.
        num_frames: Frames wanted, prompt included, `[b]` or one int.
        batch_size: Number of items b, where `streams` does not tell.
        lengths: True frames of the streams handed in, `[b]` or one int; streams not named are whole.
        **options: Further arguments of `SlidingWindowDecoder`.

    Returns:
        The completed stream.

    Raises:
        ValueError: If streams do not fit the layout, or `SlidingWindowDecoder` or `DecodeSession` refuses.
    """
    items = items_of_streams(model.layout.streams, streams, lengths or {})
    batch = len(next(iter(streams.values()))) if streams else batch_size
    name = _predicted(model).name
    run = SlidingWindowDecoder(model, num_frames, prompt=items.pop(name, None), batch_size=batch, **options)
    for given, tokens in items.items():
        run.feed(given, tokens)
    for given in set(run.awaited):
        raise ValueError(f"stream '{given}' is missing, got {sorted(streams)}")
    run.advance()
    found = run.take()
    return Decoded({name: padded(found)}, {name: torch.tensor([len(tokens) for tokens in found])})


def _predicted(model: TokenTransformer) -> Stream:
    """The one predicted stream of a model."""
    if len(model.layout.predicted) != 1:
        raise ValueError(f"windows need one predicted stream, got {[s.name for s in model.layout.predicted]}")
    return model.layout.predicted[0]


class SlidingWindowDecoder:
    """The completion of one predicted stream of any length, which can pause between frames and be fed meanwhile.

    A window sees the second half of the one before as its prompt (MusicLM, arXiv:2301.11325, sec. 5.4), the frames of
    given streams that cover it, and streams that are not in time whole. It starts as soon as it is covered. Windows
    stand at the same places for all items and draw from generators of each item's own, so neither the batch, nor a
    pause, nor what is fed early or late changes an item's tokens. One window's cache is held at a time, and nothing of
    what no later window sees, once it was taken.

    Args:
        model: A model with one predicted stream.
        num_frames: Frames wanted at most, prompt included, `[b]` or one int.
        prompt: Tokens `[f_i, levels]` that every item begins with; None = no prompts.
        window_frames: Longest stretch to decode at once; None = no limit.
        batch_size: Number of items b.
        conditioning: The conditions, of 1 or b items; the same in every window.
        settings: As in `DecodeSession`.
        seeds: As in `DecodeSession`.
        callback: Called after every row with the frames known and the frames wanted, of the item that has most of them.
        allow_eos: As in `DecodeSession`.

    Raises:
        ValueError: If the model predicts several streams, a prompt is longer than what is wanted, or windows are too
            short to advance.
    """

    @beartype
    def __init__(
        self,
        model: TokenTransformer,
        num_frames: int | Tensor,
        *,
        prompt: Sequence[Tensor] | None = None,
        window_frames: int | None = None,
        batch_size: int = 1,
        conditioning: Conditions | None = None,
        settings: SamplingSettings | None = None,
        seeds: Sequence[int | torch.Generator] | None = None,
        callback: Callable[[int, int], None] | None = None,
        allow_eos: bool = False,
    ) -> None:
        stream = _predicted(model)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.name, self._model, self._callback = stream.name, model, callback
        nothing = torch.zeros(0, stream.num_levels, dtype=torch.long, device=model.device)
        beginning = [nothing] * batch_size if prompt is None else [tokens.to(nothing) for tokens in prompt]
        self._wanted: list[int] = frame_counts([stream], {stream.name: num_frames}, batch_size)[:, 0].tolist()
        known = [len(tokens) for tokens in beginning]
        if len(known) != batch_size or any(count > wanted for count, wanted in zip(known, self._wanted)):
            raise ValueError(
                f"the prompt of '{stream.name}' has {known} frames, longer than what is wanted, {self._wanted}: "
                "shorten it or ask for more"
            )
        self._windows = plan_windows(max(self._wanted), window_frames, model.layout.frame_alignment)
        self._number = 0  # of the window that is under way or comes next
        self._context, self._fresh = ItemTokens(beginning), [[tokens] for tokens in beginning]
        self._given: dict[str, ItemTokens] = {}
        self._is_whole: dict[str, list[bool]] = {}
        self._decoding: DecodeSession | None = None
        self._items: list[int] = []  # those that the window under way decodes
        self._options: dict[str, Any] = {"settings": settings, "allow_eos": allow_eos}
        self._conditioning = None if conditioning is None else conditioning.expand(batch_size)
        self._generators = item_generators(seeds, batch_size)

    # what is known

    @property
    def known_frames(self) -> Tensor:
        """Whole frames `[b]` int64 that are known of every item, prompts included."""
        return torch.tensor(self._context.counts)

    @property
    def are_done(self) -> Tensor:
        """`[b]` bool, which items have ended or have all that they want."""
        return self.known_frames >= torch.tensor(self._wanted)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be drawn."""
        return not self.is_behind(None)

    def is_behind(self, until_frames: int | None) -> bool:
        """Whether an item that goes on has fewer whole frames than `until_frames` (None = than it wants)."""
        return any(
            count < (wanted if until_frames is None else min(wanted, until_frames))
            for count, wanted in zip(self._context.counts, self._wanted)
        )

    @property
    def awaited(self) -> dict[str, int]:
        """Frames of given streams that have to be known before the next window can start; empty = it can."""
        window, items = self._next_window()
        if window is None or self._decoding is not None:
            return {}
        awaited: dict[str, int] = {}
        for stream in self._model.layout.inputs:
            if stream.is_in_time:
                known = self._given[stream.name].counts if stream.name in self._given else [0] * len(self._wanted)
                is_whole = self._is_whole.get(stream.name, [False] * len(known))
                covers = dict(zip(items, self._covering(stream, items, window)))
                short = [stop for item, stop in covers.items() if known[item] < stop and not is_whole[item]]
                awaited |= {stream.name: max(short)} if short else {}
        return awaited

    # what others do to it

    @beartype
    def feed(self, name: str, tokens: Sequence[Tensor], are_whole: Tensor | None = None) -> None:
        """Add frames to the end of a given stream.

        Args:
            name: The stream.
            tokens: Next frames `[f_i, levels]` of every item; none is none.
            are_whole: `[b]` bool, for which items these are the last; None = for all.

        Raises:
            ValueError: If there is no such given stream, or another number of items.
        """
        if name not in [stream.name for stream in self._model.layout.inputs]:
            raise ValueError(f"'{name}' is none of the given streams {[s.name for s in self._model.layout.inputs]}")
        if len(tokens) != len(self._wanted):
            raise ValueError(f"'{name}' needs tokens of {len(self._wanted)} items, got {len(tokens)}")
        if name not in self._given:
            self._given[name] = ItemTokens([one[:0].to(self._model.device) for one in tokens])
        for item, one in enumerate(tokens):
            self._given[name].append(item, one)
        self._is_whole[name] = [True] * len(tokens) if are_whole is None else are_whole.tolist()

    def limit(self, num_frames: Sequence[int | None]) -> None:
        """Let items want fewer frames than was said first (None = as before); what is known of them stays."""
        for item, count in enumerate(num_frames):
            if count is not None:
                self._wanted[item] = min(self._wanted[item], count)

    def advance(self, until_frames: int | None = None) -> None:
        """Decode until every item has so many whole frames, has ended, has all it wants, or has to wait for its givens.

        Args:
            until_frames: Frames, prompts included; None = all.
        """
        while self.is_behind(until_frames) and not self.awaited:
            window, items = self._next_window()
            if window is None:
                return
            if self._decoding is None:
                self._open(window, items)
            self._read_on(window, until_frames)

    def take(self) -> list[Tensor]:
        """Frames `[f_i, levels]` of every item that became known since this was called last, prompts included."""
        taken = [torch.cat(parts) for parts in self._fresh]
        self._fresh = [[tokens[:0]] for tokens in taken]
        return taken

    # one window

    def _next_window(self) -> tuple[Window | None, list[int]]:
        """The window under way, or the next that has anything to decode, and its items."""
        while self._decoding is None and self._number < len(self._windows):
            stop = self._windows[self._number].stop
            counts = self._context.counts
            self._items = [i for i, count in enumerate(counts) if count < min(self._wanted[i], stop)]
            if self._items:
                break
            self._number += 1
        return (self._windows[self._number], self._items) if self._number < len(self._windows) else (None, [])

    def _stops(self, items: Sequence[int], window: Window) -> list[int]:
        """Where each item stops in a window."""
        return [min(self._wanted[item], window.stop) for item in items]

    def _covering(self, stream: Stream, items: Sequence[int], window: Window) -> list[int]:
        """Frames of a given stream that cover a window, from its own beginning on, for each item."""
        ratio = stream.exact_hz / _predicted(self._model).exact_hz
        return [ceil(stop * ratio) for stop in self._stops(items, window)]

    def _open(self, window: Window, items: list[int]) -> None:
        """Start a window; what lies before it is not needed any more."""
        layout, stops = self._model.layout, self._stops(items, window)
        streams, lengths = {}, {}
        for stream in layout.inputs:
            if stream.name in self._given:
                tokens, start, ends = self._given[stream.name], 0, [max(self._given[stream.name].counts)] * len(items)
                if stream.is_in_time:
                    start = int(window.start * stream.exact_hz / _predicted(self._model).exact_hz)
                    ends = self._covering(stream, items, window)
                    tokens.forget_before(start)
                streams[stream.name], lengths[stream.name] = tokens.between(items, start, ends)
        self._context.forget_before(window.start)
        streams[self.name], lengths[self.name] = self._carried(items, window)
        self._decoding = DecodeSession(
            self._model,
            streams,
            {self.name: torch.tensor(stops) - window.start},
            batch_size=len(items),
            lengths=lengths,
            conditioning=None if self._conditioning is None else self._conditioning.select(torch.tensor(items)),
            seeds=[self._generators[item] for item in items],
            callback=None if self._callback is None else lambda row, num_rows: self._report(window),
            **self._options,
        )

    def _carried(self, items: Sequence[int], window: Window) -> tuple[Tensor, Tensor]:
        """What is known of the window already: the second half of the one before, or a prompt."""
        counts = [self._context.counts[item] for item in items]
        tokens, _ = self._context.between(items, window.start, [max(count, 1) for count in counts])
        lengths = torch.tensor(counts) - window.start
        return tokens[:, : int(lengths.max())], lengths

    def _read_on(self, window: Window, until_frames: int | None) -> None:
        """Decode on in the window under way, and keep what became known."""
        if self._decoding is None:
            return
        self._decoding.advance(None if until_frames is None else until_frames - window.start)
        found = self._decoding.decoded()
        for row, (item, stop) in enumerate(zip(self._items, self._stops(self._items, window))):
            known = self._context.counts[item] - window.start
            tokens = found.streams[self.name][row, known : int(found.lengths[self.name][row])]
            self._context.append(item, tokens)
            self._fresh[item].append(tokens)
            wanted = window.start + int(self._decoding.num_frames[self.name][row])
            if wanted < stop:  # it ended by itself
                self._wanted[item] = wanted
        if self._decoding.is_done:
            self._decoding = None
            self._number += 1

    def _report(self, window: Window) -> None:
        """Tell the callback how far the furthest item is."""
        if self._callback is not None and self._decoding is not None:
            self._callback(window.start + int(self._decoding.known_frames.max()), max(self._wanted))
