"""Decoding in sliding windows, for sequences longer than the training sequences, and the pipeline of the stages."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import Conditions, ConditionTensor
from audiolm_pytorch.generation.decode_session import DecodeSession
from audiolm_pytorch.generation.sampling import SamplingSettings, item_generators
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.tokens.streams import frame_counts
from audiolm_pytorch.tokens.token_batch import GrowingTokens, TokenBatch

__all__ = ["MARGIN_DIVISOR", "SlidingWindowDecoder", "StagePipeline", "plan_windows"]

# AudioLM keeps one frame in 25 free at the end of a window, 0.2 s of 5 s. The spectral flux at the seams of 20 s of the
# bundled model is then at the 38th percentile of the rest instead of the 80th.
MARGIN_DIVISOR = 25


def plan_windows(
    num_frames: int,
    window_frames: int | None,
    alignment: int = 1,
    stride_frames: int | None = None,
    margin_frames: int = 0,
) -> list[range]:
    """Plan windows over a sequence. Each window starts in the middle of the previous window (MusicLM, sec. 5.4).

    Args:
        num_frames: Number of frames to cover; the start positions of windows do not depend on `num_frames`.
        window_frames: Number of frames of a window; None = one window over all frames.
        alignment: Windows start at multiples of this number of frames.
        stride_frames: Distance of the starts of two windows; None = half a window.
        margin_frames: Frames that are kept free at the end of a window, if there are several windows.
    """
    if window_frames is None or num_frames <= window_frames:
        return [range(num_frames)]
    if margin_frames:
        window_frames = (window_frames - margin_frames) // alignment * alignment
    if stride_frames is not None and not alignment <= stride_frames < window_frames:
        raise ValueError(
            f"windows of {window_frames} frames need a stride of {alignment} or more frames, and less than "
            f"a window; got {stride_frames}"
        )
    hop = (window_frames // 2 if stride_frames is None else stride_frames) // alignment * alignment
    if hop < 1:
        raise ValueError(f"got window_frames={window_frames}, half a window must have at least {alignment} frames")
    num_windows = 1 + ceil((num_frames - window_frames) / hop)
    return [range(i * hop, min(i * hop + window_frames, num_frames)) for i in range(num_windows)]


class SlidingWindowDecoder:
    """Decodes one predicted stream of any length. Decoding can pause.

    The prompt of a window is the end of the previous window (MusicLM, arXiv:2301.11325, sec. 5.4). The tokens
    of an input stream are either known, or another decoder predicts them when a window needs them. Every window
    receives all tokens of the input streams without a frame rate. All items have the same window positions and each
    item has its own random generator, so the tokens of an item do not depend on the other items or on pauses. There is
    only one cache at a time, and `tokens.drop_before` deletes old tokens, so that memory stays bounded.

    Args:
        num_frames: Requested frames, prompt included, `[b]` or one int.
        sources: Decoders that predict further input streams, by name; an item that ends early there also ends here.
        window_frames: Maximum number of frames of a window; None = one window over all frames.
        stride_frames: Distance of the starts of two windows; None = half a window.
        margin_frames: Frames at the end of a window that are decoded only at the end of an item.
        conditioning: Conditions by name, of 1 or b items, or a function that computes them for a window, a range of
            frames. If a condition has one embedding per frame, embedding i belongs to frame i of the whole sequence; if
            not, all windows receive the same condition.
        changes: Conditions that replace `conditioning` later, each with the frame `[b]` of every item at which it
            starts, in the order of time. A window with a change is decoded in two parts, and the second part continues
            the first part. Tokens before a change do not depend on it.
        negative: Conditions by name from which guidance leads away, of 1 or b items.
        settings: Sampling settings. `DecodeSession` documents `seeds` and `allow_eos`.
        callback: Called after every row as `callback(known_frames, requested_frames)` of the longest item.
    """

    @typed
    def __init__(
        self,
        model: TokenTransformer,
        num_frames: int | Tensor,
        *,
        inputs: Mapping[str, TokenBatch] | None = None,
        sources: Mapping[str, "SlidingWindowDecoder"] | None = None,
        prompt: TokenBatch | None = None,
        window_frames: int | None = None,
        stride_frames: int | None = None,
        margin_frames: int = 0,
        batch_size: int = 1,
        conditioning: Conditions | Callable[[range], Conditions] | None = None,
        changes: Sequence[tuple[Tensor, Conditions]] = (),
        negative: Conditions | None = None,
        settings: SamplingSettings | None = None,
        seeds: Sequence[int | torch.Generator] | None = None,
        callback: Callable[[int, int], None] | None = None,
        allow_eos: bool = False,
    ) -> None:
        if len(model.layout.predicted) != 1:
            names = [stream.name for stream in model.layout.predicted]
            raise ValueError(f"the model must predict one stream, it predicts {names}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        stream = model.layout.predicted[0]
        self.name, self._model, self._callback = stream.name, model, callback
        if prompt is None:
            prompt = TokenBatch.empty(batch_size, stream.num_levels)
        # Requested frames of every item; fewer after the model has ended it.
        self._num_frames = frame_counts([stream], {stream.name: num_frames}, batch_size)[:, 0].clone()
        if len(prompt) != batch_size or (prompt.lengths > self._num_frames).any():
            raise ValueError(
                f"the prompt of '{stream.name}' has {prompt.lengths.tolist()} frames, longer than the requested "
                f"{self._num_frames.tolist()} frames; shorten it or request more"
            )
        self._requested = self._num_frames.clone()
        self.tokens = GrowingTokens(prompt, model.device)
        self._sources = dict(sources or {})
        self._check_inputs(inputs or {}, batch_size)
        self._inputs = {name: GrowingTokens(batch, model.device) for name, batch in (inputs or {}).items()}
        self._inputs |= {name: source.tokens for name, source in self._sources.items()}
        alignment, longest = model.layout.frame_alignment, int(self._requested.max())
        self._window_frames = longest if window_frames is None else window_frames
        self._windows = plan_windows(longest, window_frames, alignment, stride_frames, margin_frames)
        self._window_index = 0  # of the current or, between windows, of the next window
        self._longest = 0  # frames of the longest item, for the callback
        self._session: DecodeSession | None = None
        self._transformer: CachedTransformer | None = None  # of the last session
        self._session_items, self._session_stops = torch.empty(2, 0, dtype=torch.long)
        self._options: dict[str, Any] = {"settings": settings, "allow_eos": allow_eos}
        self._condition_window = conditioning if callable(conditioning) else None
        self._set_conditions({} if callable(conditioning) else conditioning or {}, changes, negative or {}, batch_size)
        self._generators = item_generators(seeds, batch_size)

    def _set_conditions(
        self, first: Conditions, changes: Sequence[tuple[Tensor, Conditions]], negative: Conditions, batch_size: int
    ) -> None:
        """Store the conditions of all items before the changes, then of all items after the first change, and so on."""
        versions = [first, *(conditions for _, conditions in changes)]
        for conditions in (*versions, negative):
            self._model.fuser.check(conditions)
        frames = [first_frames.expand(batch_size) for first_frames, _ in changes]
        self._change_frames = torch.stack(frames) if frames else torch.zeros(0, batch_size, dtype=torch.long)
        self._conditioning = {
            name: ConditionTensor.concatenate([later.get(name, part).expand(batch_size) for later in versions])
            for name, part in first.items()
        }
        self._negative = {name: part.expand(batch_size) for name, part in negative.items()}

    def _check_inputs(self, inputs: Mapping[str, TokenBatch], batch_size: int) -> None:
        """Check the names and the numbers of items of all input streams."""
        streams, names = self._model.layout.inputs, [*inputs, *self._sources]
        known = [stream.name for stream in streams]
        missing = [stream.name for stream in streams if stream.is_in_time and stream.name not in names]
        if missing:
            raise ValueError(f"got the input streams {sorted(names)}; {missing} are missing")
        for name in names:
            if name not in known:
                raise ValueError(f"got tokens for {name!r}, the input streams of the model are {known}")
        for name, batch in inputs.items():
            if len(batch) != batch_size:
                raise ValueError(f"got {name!r} tokens of {len(batch)} items, the decoder has {batch_size}")

    @property
    def num_frames(self) -> Tensor:
        """Number of frames `[b]` to decode: the requested frames, or fewer for items that have ended early."""
        num_frames = self._num_frames
        for name, source in self._sources.items():
            known = source.known_frames
            has_ended_early = source.are_done & (known < source._requested)
            shortened = num_frames.minimum(_ceil_product(known, 1 / self._ratio(name)))
            num_frames = torch.where(has_ended_early, shortened, num_frames)
        return num_frames

    @property
    def known_frames(self) -> Tensor:
        """Number of complete frames `[b]` int64, prompts included."""
        return self.tokens.counts

    @property
    def are_done(self) -> Tensor:
        """Mask `[b]` of the items that have ended or have all requested frames."""
        return self.known_frames >= self.num_frames

    def first_input_frame(self, name: str | None = None) -> int:
        """Return the first frame that the current window needs of an input stream (None = the predicted stream)."""
        start = self._windows[min(self._window_index, len(self._windows) - 1)].start
        return start if name is None else int(start * self._ratio(name))

    def advance(self, until_frames: int | None = None) -> None:
        """Decode until every item has `until_frames` frames (prompts included; None = all) or is complete."""
        while self._is_behind(until_frames):
            if self._session is None:
                items, stops = self._next_window()
                if self._advance_sources(items, stops):
                    continue  # because a source can end items early
                self._session, self._session_items, self._session_stops = self._new_session(items, stops), items, stops
            window = self._windows[self._window_index]
            self._longest = int(self.num_frames.max())
            self._session.advance(None if until_frames is None else until_frames - window.start)
            self._store_frames(self._session, window)

    def _is_behind(self, until_frames: int | None) -> bool:
        num_frames = self.num_frames if until_frames is None else self.num_frames.clamp(max=until_frames)
        return bool((self.known_frames < num_frames).any())

    def _next_window(self) -> tuple[Tensor, Tensor]:
        """Go to the next window in which items lack frames. Return these items, and the stop frame of each item."""
        num_frames, known = self.num_frames, self.known_frames
        while True:
            window = self._windows[self._window_index]
            ends_here = num_frames <= window.start + self._window_frames
            stops = torch.where(ends_here, num_frames, num_frames.clamp(max=window.stop))
            for frames in self._change_frames:
                stops = torch.where(frames > known, stops.minimum(frames), stops)
            items = (known < stops).nonzero().flatten()
            if len(items):
                return items, stops[items]
            self._window_index += 1

    def _advance_sources(self, items: Tensor, stops: Tensor) -> bool:
        """Decode the missing input frames of a window, and return whether input frames were missing."""
        were_behind = False
        for name, source in self._sources.items():
            needed = self._input_stops(name, stops)
            is_behind = (source.known_frames[items] < needed) & ~source.are_done[items]
            if is_behind.any():
                source.advance(int(needed[is_behind].max()))
                were_behind = True
        return were_behind

    def _input_stops(self, name: str, stops: Tensor) -> Tensor:
        """Number of frames of an input stream up to the end of the predicted frames `stops`, and of its look-ahead."""
        lookahead = {stream.name: stream.lookahead_frames for stream in self._model.layout.inputs}
        return _ceil_product(stops, self._ratio(name)) + lookahead[name]

    def _ratio(self, name: str) -> Fraction:
        """Number of frames of an input stream per predicted frame."""
        layout = self._model.layout
        hz = {stream.name: stream.exact_hz for stream in layout.inputs if stream.is_in_time}
        return hz[name] / layout.predicted[0].exact_hz

    def _new_session(self, items: Tensor, stops: Tensor) -> DecodeSession:
        """Create the decode session of the current window."""
        window = self._windows[self._window_index]
        parts: dict[str, TokenBatch] = {}
        for stream in self._model.layout.inputs:
            if stream.name in self._inputs:
                tokens = self._inputs[stream.name]
                counts = tokens.counts[items]
                starts, ends = torch.zeros_like(counts), counts
                if stream.is_in_time:
                    # The last frame of an item that ends before the window is repeated.
                    starts = counts.sub(1).clamp(min=0, max=self.first_input_frame(stream.name))
                    ends = self._input_stops(stream.name, stops).maximum(starts + 1).minimum(counts)
                parts[stream.name] = tokens.between(items, starts, ends)
        counts = self.known_frames[items]
        parts[self.name] = self.tokens.between(items, torch.full_like(counts, window.start), counts)
        return DecodeSession(
            self._model,
            {name: part.ids for name, part in parts.items()},
            {self.name: stops - window.start},
            batch_size=len(items),
            lengths={name: part.lengths for name, part in parts.items()},
            conditioning=self._conditions_of(items, window),
            negative={name: part.select(items) for name, part in self._negative.items()},
            seeds=[self._generators[item] for item in items.tolist()],
            callback=None if self._callback is None else self._report,
            transformer=self._transformer,
            **self._options,
        )

    def _conditions_of(self, items: Tensor, window: range) -> Conditions:
        """Select the conditions of `items` for a window."""
        if self._condition_window is not None:
            conditions, batch = self._condition_window(window), len(self._requested)
            return {name: part.expand(batch).select(items) for name, part in conditions.items()}
        num_changes = (self._change_frames[:, items] <= self.known_frames[items]).sum(dim=0)
        rows = items + num_changes * len(self._requested)
        selected = {name: part.select(rows) for name, part in self._conditioning.items()}
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
        decoded, items = session.decoded(), self._session_items
        known, lengths = self.known_frames[items] - window.start, decoded.lengths[self.name]
        for row, (item, start, stop) in enumerate(zip(items.tolist(), known.tolist(), lengths.tolist())):
            self.tokens.append(item, decoded.streams[self.name][row, start:stop])
        ends = window.start + session.num_frames[self.name]
        has_ended = ends < self._session_stops  # the model sampled the end
        # Not in place, because a stream can be created in inference mode and read outside of it.
        self._num_frames = self._num_frames.index_put((items[has_ended],), ends[has_ended])
        if session.is_done:
            self._session, self._transformer = None, session.transformer
            if bool((self.known_frames >= self.num_frames.clamp(max=window.stop)).all()):
                self._window_index += 1

    def _report(self, row: int, num_rows: int) -> None:
        """Report the decoded frames of the whole sequence to the callback."""
        if self._callback is not None and self._session is not None:
            start = self._windows[self._window_index].start
            self._callback(start + int(self._session.known_frames.max()), self._longest)


class StagePipeline:
    """The semantic stage, the coarse stage and, optionally, the fine stage.

    Args:
        acoustic: Decoders of acoustic levels, coarse first. The source of each decoder is the decoder before it.
    """

    def __init__(self, semantic: SlidingWindowDecoder, acoustic: Sequence[SlidingWindowDecoder]) -> None:
        self._semantic, self._acoustic, self.last = semantic, list(acoustic), acoustic[-1]
        self._items = torch.arange(len(semantic.known_frames))
        self._taken_semantic, self._taken_acoustic = torch.zeros(2, len(self._items), dtype=torch.long)

    def finish(self) -> None:
        """Decode all frames, one stage after the other, so that only one cache is in memory at a time."""
        for stage in (self._semantic, *self._acoustic):
            stage.advance()

    def take(self) -> tuple[TokenBatch, TokenBatch]:
        """Return the new semantic tokens (1 level) and acoustic tokens of every item, and delete old tokens."""
        new_semantic, new_acoustic = self._semantic.known_frames, self.last.known_frames
        semantic = self._semantic.tokens.between(self._items, self._taken_semantic, new_semantic)
        levels = [stage.tokens.between(self._items, self._taken_acoustic, new_acoustic) for stage in self._acoustic]
        self._taken_semantic, self._taken_acoustic = new_semantic, new_acoustic
        stages = [self._semantic, *self._acoustic]
        for stage, later, taken in zip(stages, [*self._acoustic, None], [new_semantic, new_acoustic, new_acoustic]):
            first_frames = [stage.first_input_frame()]
            if later is not None:
                first_frames.append(later.first_input_frame(stage.name))
            stage.tokens.drop_before(taken.clamp(max=min(first_frames)))
        return semantic, TokenBatch(torch.cat([part.ids for part in levels], dim=-1), levels[0].lengths)


def _ceil_product(counts: Tensor, factor: Fraction) -> Tensor:
    """Round `counts * factor` up to integers."""
    return -(-counts * factor.numerator // factor.denominator)
