"""Stages at work one after another, each fed by the one before: all at once, or only as far as is asked for."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from audiolm_pytorch.generation.windows import SlidingWindowDecoder

__all__ = ["PipelineStep", "StagePipeline"]


class PipelineStep:
    """One stage at work.

    Args:
        decoding: What it decodes.
        source: The stage before, whose tokens it is given; None = it is given all it needs.
        reads: Name of the stream that the tokens of `source` are.
        frames_for: From the frames `[b]` that items of the source have in the end to the frames wanted here.
    """

    def __init__(
        self,
        decoding: SlidingWindowDecoder,
        source: "PipelineStep | None" = None,
        reads: str = "",
        frames_for: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.decoding = decoding
        self._source, self._reads, self._frames_for = source, reads, frames_for
        self._found: list[Tensor] | None = None  # tokens that were taken and not collected yet

    def advance(self, until_frames: int | None = None) -> None:
        """Decode as `SlidingWindowDecoder.advance` does, letting the stages before work only as far as windows need."""
        while self.decoding.is_behind(until_frames):
            awaited = self.decoding.awaited
            if awaited:
                if self._source is None or set(awaited) != {self._reads}:
                    raise ValueError(f"a stage waits for frames of {awaited} that nobody gives")
                self._source.advance(awaited[self._reads])
                self.read()
            self.decoding.advance(until_frames)

    def read(self) -> None:
        """Take over what the stage before has found."""
        if self._source is None:
            return
        done = self._source.decoding.are_done
        self.decoding.feed(self._reads, self._source.take(), done)
        if self._frames_for is not None:
            wanted = self._frames_for(self._source.decoding.known_frames).tolist()
            self.decoding.limit([count if is_done else None for count, is_done in zip(wanted, done.tolist())])

    def take(self) -> list[Tensor]:
        """Tokens `[f_i, levels]` of every item that became known since this was called last."""
        new = self.decoding.take()
        self._found = new if self._found is None else [torch.cat(pair) for pair in zip(self._found, new)]
        return new

    def collect(self, most: Sequence[int] | None = None) -> list[Tensor]:
        """Tokens that were taken and not collected yet, of every item, at most so many frames."""
        found = self._found or []
        counts = [len(tokens) for tokens in found] if most is None else most
        self._found = [tokens[count:].clone() for tokens, count in zip(found, counts)]
        return [tokens[:count] for tokens, count in zip(found, counts)]

    @property
    def num_found(self) -> list[int]:
        """Frames of every item that could be collected."""
        return [len(tokens) for tokens in self._found or []]


class StagePipeline:
    """Semantic, coarse and, if there is one, fine stage at work.

    Args:
        semantic: The first stage.
        acoustic: The stages of acoustic levels, coarse first; the levels of all make a frame.
    """

    def __init__(self, semantic: PipelineStep, acoustic: Sequence[PipelineStep]) -> None:
        self._semantic, self._acoustic = semantic, list(acoustic)

    @property
    def known_frames(self) -> Tensor:
        """Acoustic frames `[b]` that are known with all their levels."""
        return self._acoustic[-1].decoding.known_frames

    @property
    def are_done(self) -> Tensor:
        """`[b]` bool, of which items all acoustic frames are known."""
        return self._acoustic[-1].decoding.are_done

    def advance(self, until_frames: int) -> None:
        """Decode until all items that go on have so many acoustic frames, doing no more than that needs."""
        self._acoustic[-1].advance(until_frames)

    def finish(self) -> None:
        """Decode everything, stage after stage, so that one stage's cache is held at a time."""
        for run in (self._semantic, *self._acoustic):
            run.advance()

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens that became known since this was called last.

        Returns:
            Semantic tokens `[t_i]` and acoustic tokens `[f_i, q]` of every item.
        """
        for run in self._acoustic:
            run.read()
        self._acoustic[-1].take()
        counts = [min(of_item) for of_item in zip(*(run.num_found for run in self._acoustic))]
        levels = [run.collect(counts) for run in self._acoustic]
        return (
            [tokens[:, 0] for tokens in self._semantic.collect()],
            [torch.cat(of_item, dim=-1) for of_item in zip(*levels)],
        )
