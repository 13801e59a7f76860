"""The pipeline of the semantic, coarse and fine stages. The tokens of each stage are input of the next stage."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from audiolm_pytorch.generation.windows import SlidingWindowDecoder

__all__ = ["PipelineStep", "StagePipeline"]


class PipelineStep:
    """One stage of the pipeline: its decoder and the stage that its input comes from.

    Args:
        decoder: Decoder of this stage.
        source: The previous stage; None = the decoder already has all its inputs.
        input_name: Name of the input stream that receives the tokens of `source`.
        frames_for: Function that converts the final number of frames `[b]` of `source` to that of this stage. None =
            both stages have equal numbers of frames.
    """

    def __init__(
        self,
        decoder: SlidingWindowDecoder,
        source: "PipelineStep | None" = None,
        input_name: str = "",
        frames_for: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.decoder = decoder
        self._source, self._input_name, self._frames_for = source, input_name, frames_for
        self.kept: list[Tensor] = []  # tokens of every item that `take` has returned and `collect` has not

    def advance(self, until_frames: int | None = None) -> None:
        """Decode like `SlidingWindowDecoder.advance`. Previous stages decode only the frames that this stage needs."""
        while self.decoder.is_behind(until_frames):
            awaited = self.decoder.awaited
            if awaited:
                if self._source is None or set(awaited) != {self._input_name}:
                    raise ValueError(f"got no tokens for the input streams {sorted(awaited)}; feed them to the decoder")
                self._source.advance(awaited[self._input_name])
                self.read()
            self.decoder.advance(until_frames)

    def read(self) -> None:
        """Pass the new tokens of the previous stage to the decoder."""
        if self._source is None:
            return
        are_done = self._source.decoder.are_done
        self.decoder.feed(self._input_name, self._source.take(), are_done)
        frames = self._source.decoder.known_frames
        frames = frames if self._frames_for is None else self._frames_for(frames)
        self.decoder.limit([count if is_done else None for count, is_done in zip(frames.tolist(), are_done.tolist())])

    def take(self) -> list[Tensor]:
        """Return the new tokens `[f_i, levels]` of every item since the last call, and buffer them for `collect`."""
        new = self.decoder.take()
        self.kept = [torch.cat(pair) for pair in zip(self.kept, new)] if self.kept else new
        return new

    def collect(self, num_frames: Sequence[int] | None = None) -> list[Tensor]:
        """Remove the first `num_frames` tokens (None = all) of every item from the buffer, and return them."""
        counts = [len(tokens) for tokens in self.kept] if num_frames is None else num_frames
        collected = [tokens[:count] for tokens, count in zip(self.kept, counts)]
        self.kept = [tokens[count:].clone() for tokens, count in zip(self.kept, counts)]
        return collected


class StagePipeline:
    """The semantic stage, the coarse stage and, optionally, the fine stage.

    Args:
        semantic: The first stage.
        acoustic: The stages that predict acoustic levels, coarse first.
    """

    def __init__(self, semantic: PipelineStep, acoustic: Sequence[PipelineStep]) -> None:
        self._semantic, self._acoustic = semantic, list(acoustic)

    @property
    def known_frames(self) -> Tensor:
        """Number of acoustic frames `[b]` with all levels known."""
        return self._acoustic[-1].decoder.known_frames

    @property
    def are_done(self) -> Tensor:
        """Mask `[b]` of the items that have all their acoustic frames."""
        return self._acoustic[-1].decoder.are_done

    def advance(self, until_frames: int) -> None:
        """Decode until every item has `until_frames` acoustic frames or is complete, and no more than needed."""
        self._acoustic[-1].advance(until_frames)

    def finish(self) -> None:
        """Decode all frames, one stage after the other, so that only one cache is in memory at a time."""
        for step in (self._semantic, *self._acoustic):
            step.advance()

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the new semantic tokens `[t_i]` and acoustic tokens `[f_i, q]` of every item since the last call."""
        for step in self._acoustic:
            step.read()
        self._acoustic[-1].take()
        counts = [min(len(tokens) for tokens in of_item) for of_item in zip(*(step.kept for step in self._acoustic))]
        levels = [step.collect(counts) for step in self._acoustic]
        return (
            [tokens[:, 0] for tokens in self._semantic.collect()],
            [torch.cat(of_item, dim=-1) for of_item in zip(*levels)],
        )
