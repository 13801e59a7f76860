"""The semantic, coarse and fine stage in a row: each stage decodes from the tokens of the stage before."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from audiolm_pytorch.generation.windows import SlidingWindowDecoder

__all__ = ["PipelineStep", "StagePipeline"]


class PipelineStep:
    """One stage of a pipeline.

    Args:
        decoder: Decodes the tokens of the stage.
        source: The stage before; None = the decoder has all its inputs.
        input_name: Name of the input stream that the tokens of `source` belong to.
        frames_for: Maps the final frames `[b]` of the source to the frames `[b]` of this stage; None = equal.
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
        """Decode as `SlidingWindowDecoder.advance` does. Earlier stages decode only what the windows need."""
        while self.decoder.is_behind(until_frames):
            awaited = self.decoder.awaited
            if awaited:
                if self._source is None or set(awaited) != {self._input_name}:
                    raise ValueError(f"no stage of the pipeline predicts the input streams {sorted(awaited)}")
                self._source.advance(awaited[self._input_name])
                self.read()
            self.decoder.advance(until_frames)

    def read(self) -> None:
        """Feed the new tokens of the stage before into the decoder."""
        if self._source is None:
            return
        are_done = self._source.decoder.are_done
        self.decoder.feed(self._input_name, self._source.take(), are_done)
        frames = self._source.decoder.known_frames
        frames = frames if self._frames_for is None else self._frames_for(frames)
        self.decoder.limit([count if is_done else None for count, is_done in zip(frames.tolist(), are_done.tolist())])

    def take(self) -> list[Tensor]:
        """Return the new tokens `[f_i, levels]` of every item since the last call, and keep them for `collect`."""
        new = self.decoder.take()
        self.kept = [torch.cat(pair) for pair in zip(self.kept, new)] if self.kept else new
        return new

    def collect(self, num_frames: Sequence[int] | None = None) -> list[Tensor]:
        """Return the first `num_frames` (None = all) of the kept tokens of every item, and forget these."""
        counts = [len(tokens) for tokens in self.kept] if num_frames is None else num_frames
        collected = [tokens[:count] for tokens, count in zip(self.kept, counts)]
        self.kept = [tokens[count:].clone() for tokens, count in zip(self.kept, counts)]
        return collected


class StagePipeline:
    """The semantic, the coarse and, optionally, the fine stage.

    Args:
        semantic: The first stage.
        acoustic: The stages that predict acoustic levels, coarse first.
    """

    def __init__(self, semantic: PipelineStep, acoustic: Sequence[PipelineStep]) -> None:
        self._semantic, self._acoustic = semantic, list(acoustic)

    @property
    def known_frames(self) -> Tensor:
        """Acoustic frames `[b]` of which all levels are known."""
        return self._acoustic[-1].decoder.known_frames

    @property
    def are_done(self) -> Tensor:
        """`[b]` bool, which items have all their acoustic frames."""
        return self._acoustic[-1].decoder.are_done

    def advance(self, until_frames: int) -> None:
        """Decode until every item that is not done has `until_frames` acoustic frames, and as little else as needed."""
        self._acoustic[-1].advance(until_frames)

    def finish(self) -> None:
        """Decode everything, one stage after the other, so that there is one cache at a time."""
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
