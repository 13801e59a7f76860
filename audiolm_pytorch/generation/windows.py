"""Decoding in sliding windows, for sequences longer than the training sequences of a model."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.conditioning.tensors import Conditions, ConditionTensor
from audiolm_pytorch.generation.decode_session import Decoded, DecodeSession
from audiolm_pytorch.generation.sampling import SamplingSettings, item_generators
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.tokens.item_tokens import ItemTokens, items_of_streams, padded
from audiolm_pytorch.tokens.streams import Stream, frame_counts

__all__ = ["SlidingWindowDecoder", "decode_in_windows", "plan_windows"]


def plan_windows(num_frames: int, window_frames: int | None, alignment: int = 1) -> list[range]:
    """Cover a sequence with windows. Each window starts in the middle of the previous one (MusicLM, sec. 5.4).

    Args:
        num_frames: Number of frames to cover. The start positions of windows do not depend on it.
        window_frames: Number of frames of a window; None = one window over all frames.
        alignment: Windows start at multiples of this number of frames.

    Raises:
        ValueError: If half of `window_frames` is less than `alignment`.
    """
    if window_frames is None or num_frames <= window_frames:
        return [range(num_frames)]
    hop = window_frames // 2 // alignment * alignment
    if hop < 1:
        raise ValueError(f"got window_frames={window_frames}, half a window must have at least {alignment} frames")
    num_windows = 1 + ceil((num_frames - window_frames) / hop)
    return [range(i * hop, min(i * hop + window_frames, num_frames)) for i in range(num_windows)]


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
    """Decode all requested frames of the predicted stream in sliding windows.

    Args:
        model: A model with one predicted stream.
        streams: Input streams and the prompt, `[b, f, levels]` by name.
        num_frames: Requested frames, prompt included, `[b]` or one int.
        batch_size: Number of items b, used if `streams` is empty.
        lengths: Number of frames without padding by stream name, `[b]` or one int; a stream without an entry has no
            padding.
        **options: Further arguments of `SlidingWindowDecoder`.

    Raises:
        ValueError: If `streams` does not fit the layout of the model, or for the reasons listed in
            `SlidingWindowDecoder`.
    """
    items = items_of_streams(model.layout.streams, streams, lengths or {})
    batch = len(next(iter(streams.values()))) if streams else batch_size
    name = _predicted_stream(model).name
    decoder = SlidingWindowDecoder(model, num_frames, prompt=items.pop(name, None), batch_size=batch, **options)
    for input_name, tokens in items.items():
        decoder.feed(input_name, tokens)
    if decoder.awaited:
        raise ValueError(f"got streams {sorted(streams)}; {sorted(decoder.awaited)} are missing or have too few frames")
    decoder.advance()
    decoded = decoder.take()
    return Decoded({name: padded(decoded)}, {name: torch.tensor([len(tokens) for tokens in decoded])})


def _predicted_stream(model: TokenTransformer) -> Stream:
    if len(model.layout.predicted) != 1:
        raise ValueError(f"the model must predict one stream, it predicts {[s.name for s in model.layout.predicted]}")
    return model.layout.predicted[0]


class SlidingWindowDecoder:
    """Decodes one predicted stream of any length. Decoding can pause, and input frames can arrive later.

    The prompt of a window is the second half of the previous window (MusicLM, arXiv:2301.11325, sec. 5.4). Decoding of
    a window starts when the input streams contain all its frames. Every window receives all tokens of the input streams
    that have no rate. All items have the same window positions and each item has its own random generator, so the
    tokens of an item do not depend on the other items, on pauses, or on when inputs arrive. Memory is bounded, because
    there is one cache at a time, and tokens that no later window needs are dropped after `take` has returned them.

    Args:
        model: A model with one predicted stream.
        num_frames: Requested frames, prompt included, `[b]` or one int.
        prompt: Prompt tokens `[f_i, levels]` of every item; None = no prompts.
        window_frames: Maximum number of frames of a window; None = one window over all frames.
        batch_size: Number of items b.
        conditioning: Conditions by name, of 1 or b items. In a condition with one embedding per frame, embedding i
            belongs to frame i of the whole sequence. All other conditions are the same in every window.
        settings: Sampling settings. `settings`, `seeds` and `allow_eos` are the same as in `DecodeSession`.
        callback: Called after every row as `callback(known_frames, requested_frames)` of the longest item.

    Raises:
        ValueError: If the model predicts several streams, a prompt is longer than `num_frames`, or `window_frames` is
            too small.
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
        stream = _predicted_stream(model)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.name, self._model, self._callback = stream.name, model, callback
        empty = torch.zeros(0, stream.num_levels, dtype=torch.long, device=model.device)
        prompts = [empty] * batch_size if prompt is None else [tokens.to(empty) for tokens in prompt]
        # Requested frames of every item. An early end or `limit` lowers them.
        self._num_frames: list[int] = frame_counts([stream], {stream.name: num_frames}, batch_size)[:, 0].tolist()
        prompt_frames = [len(tokens) for tokens in prompts]
        if len(prompts) != batch_size or any(a > b for a, b in zip(prompt_frames, self._num_frames)):
            raise ValueError(
                f"the prompt of '{stream.name}' has {prompt_frames} frames, longer than the requested "
                f"{self._num_frames} frames; shorten it or request more"
            )
        self._windows = plan_windows(max(self._num_frames), window_frames, model.layout.frame_alignment)
        self._window_index = 0  # of the current or, between windows, of the next window
        self._window_items: list[int] = []  # the items that the current window decodes
        self._session: DecodeSession | None = None
        self._tokens = ItemTokens(prompts)
        self._untaken = [[tokens] for tokens in prompts]
        self._inputs: dict[str, ItemTokens] = {}
        self._are_inputs_complete: dict[str, list[bool]] = {}
        self._options: dict[str, Any] = {"settings": settings, "allow_eos": allow_eos}
        model.fuser.check(conditioning or {})
        self._conditioning = {name: part.expand(batch_size) for name, part in (conditioning or {}).items()}
        self._generators = item_generators(seeds, batch_size)

    @property
    def known_frames(self) -> Tensor:
        """Number of complete frames `[b]` int64, prompts included."""
        return torch.tensor(self._tokens.counts)

    @property
    def are_done(self) -> Tensor:
        """Mask `[b]` of the items that have ended or have all requested frames."""
        return self.known_frames >= torch.tensor(self._num_frames)

    def is_behind(self, until_frames: int | None) -> bool:
        """Whether any incomplete item has fewer than `until_frames` frames (None = the requested frames)."""
        return any(
            count < (requested if until_frames is None else min(requested, until_frames))
            for count, requested in zip(self._tokens.counts, self._num_frames)
        )

    @property
    def awaited(self) -> dict[str, int]:
        """Total frames that the next window needs from each input stream that is too short, by stream name."""
        window, items = self._current_window()
        if window is None or self._session is not None:
            return {}
        awaited: dict[str, int] = {}
        for stream in self._model.layout.inputs:
            if stream.is_in_time:
                known = self._inputs[stream.name].counts if stream.name in self._inputs else [0] * len(self._num_frames)
                is_complete = self._are_inputs_complete.get(stream.name, [False] * len(known))
                needed = dict(zip(items, self._covering_frames(stream, items, window)))
                short = [count for item, count in needed.items() if known[item] < count and not is_complete[item]]
                awaited |= {stream.name: max(short)} if short else {}
        return awaited

    @beartype
    def feed(self, name: str, tokens: Sequence[Tensor], are_complete: Tensor | None = None) -> None:
        """Append frames to an input stream.

        Args:
            name: Name of the input stream.
            tokens: Next frames `[f_i, levels]` of every item. Some or all may have 0 frames.
            are_complete: Mask `[b]` of the items for which `tokens` are the last frames; None = all items.

        Raises:
            ValueError: If the model has no input stream `name`, or `tokens` has a wrong number of items.
        """
        names = [stream.name for stream in self._model.layout.inputs]
        if name not in names:
            raise ValueError(f"got tokens for {name!r}, the input streams of the model are {names}")
        if len(tokens) != len(self._num_frames):
            raise ValueError(f"got {name!r} tokens of {len(tokens)} items, the decoder has {len(self._num_frames)}")
        if name not in self._inputs:
            self._inputs[name] = ItemTokens([item_tokens[:0].to(self._model.device) for item_tokens in tokens])
        for item, item_tokens in enumerate(tokens):
            self._inputs[name].append(item, item_tokens)
        self._are_inputs_complete[name] = [True] * len(tokens) if are_complete is None else are_complete.tolist()

    def limit(self, num_frames: Sequence[int | None]) -> None:
        """Reduce the number of requested frames per item (None = no change). Frames already decoded are kept."""
        for item, count in enumerate(num_frames):
            if count is not None:
                self._num_frames[item] = min(self._num_frames[item], count)

    def advance(self, until_frames: int | None = None) -> None:
        """Decode until every item has `until_frames` frames (prompts included; None = all) or inputs are missing."""
        while self.is_behind(until_frames) and not self.awaited:
            window, items = self._current_window()
            if window is None:
                return
            session = self._session if self._session is not None else self._start_session(window, items)
            session.advance(None if until_frames is None else until_frames - window.start)
            self._store_frames(session, window)

    def take(self) -> list[Tensor]:
        """Return the frames `[f_i, levels]` of every item that are new since the last call, prompts included."""
        taken = [torch.cat(parts) for parts in self._untaken]
        self._untaken = [[tokens[:0]] for tokens in taken]
        return taken

    def _current_window(self) -> tuple[range | None, list[int]]:
        """Find the current or the next window with missing frames, and the items to decode in it."""
        while self._session is None and self._window_index < len(self._windows):
            stop, counts = self._windows[self._window_index].stop, self._tokens.counts
            self._window_items = [i for i, count in enumerate(counts) if count < min(self._num_frames[i], stop)]
            if self._window_items:
                break
            self._window_index += 1
        if self._window_index == len(self._windows):
            return None, []
        return self._windows[self._window_index], self._window_items

    def _stops(self, items: Sequence[int], window: range) -> list[int]:
        """End of each item in a window: the index of its last frame, plus 1."""
        return [min(self._num_frames[item], window.stop) for item in items]

    def _covering_frames(self, stream: Stream, items: Sequence[int], window: range) -> list[int]:
        """Number of frames of an input stream that cover each item up to its stop."""
        ratio = stream.exact_hz / _predicted_stream(self._model).exact_hz
        return [ceil(stop * ratio) for stop in self._stops(items, window)]

    def _start_session(self, window: range, items: list[int]) -> DecodeSession:
        """Create the decode session of a window, and drop the tokens before the window."""
        streams, lengths = {}, {}
        for stream in self._model.layout.inputs:
            if stream.name in self._inputs:
                tokens = self._inputs[stream.name]
                start, stops = 0, [max(tokens.counts)] * len(items)
                if stream.is_in_time:
                    start = int(window.start * stream.exact_hz / _predicted_stream(self._model).exact_hz)
                    stops = self._covering_frames(stream, items, window)
                    tokens.forget_before(start)
                streams[stream.name], lengths[stream.name] = tokens.between(items, start, stops)
        self._tokens.forget_before(window.start)
        counts = [self._tokens.counts[item] for item in items]
        prompt, _ = self._tokens.between(items, window.start, [max(count, 1) for count in counts])
        lengths[self.name] = torch.tensor(counts) - window.start
        streams[self.name] = prompt[:, : int(lengths[self.name].max())]
        self._session = DecodeSession(
            self._model,
            streams,
            {self.name: torch.tensor(self._stops(items, window)) - window.start},
            batch_size=len(items),
            lengths=lengths,
            conditioning=self._conditions_of(items, window),
            seeds=[self._generators[item] for item in items],
            callback=None if self._callback is None else lambda row, num_rows: self._report(window),
            **self._options,
        )
        return self._session

    def _conditions_of(self, items: list[int], window: range) -> Conditions:
        """Select the conditions of `items` for a window."""
        selected = {name: part.select(torch.tensor(items)) for name, part in self._conditioning.items()}
        for name, part in selected.items():
            if self._model.fuser.specs[name].way == "sum" and part.mask.shape[1] > 1:
                # At least two embeddings: a single one would be added to all rows.
                frames = torch.arange(window.start, max(window.start + 2, part.mask.shape[1]))
                known = frames.clamp(max=part.mask.shape[1] - 1)
                mask = part.mask[:, known] & (frames == known).to(part.mask.device)
                selected[name] = ConditionTensor(part.embeddings[:, known], mask)
        return selected

    def _store_frames(self, session: DecodeSession, window: range) -> None:
        """Store the new frames of the current window, and close the session after the last frame."""
        decoded = session.decoded()
        for row, (item, stop) in enumerate(zip(self._window_items, self._stops(self._window_items, window))):
            known = self._tokens.counts[item] - window.start
            tokens = decoded.streams[self.name][row, known : int(decoded.lengths[self.name][row])]
            self._tokens.append(item, tokens)
            self._untaken[item].append(tokens)
            end = window.start + int(session.num_frames[self.name][row])
            if end < stop:  # the model sampled the end
                self._num_frames[item] = end
        if session.is_done:
            self._session = None
            self._window_index += 1

    def _report(self, window: range) -> None:
        if self._callback is not None and self._session is not None:
            self._callback(window.start + int(self._session.known_frames.max()), max(self._num_frames))
