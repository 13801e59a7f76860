"""Chunk-by-chunk execution of networks: the state of causal layers, and streams of frames."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FrameStream", "StreamState"]


class StreamState:
    """Past inputs of the causal layers of a network, which the next chunk of a stream needs."""

    def __init__(self) -> None:
        self._pasts: dict[nn.Module, Tensor] = {}

    def past(self, layer: nn.Module) -> Tensor | None:
        """Return the stored past inputs of a layer; None at the beginning of the stream."""
        return self._pasts.get(layer)

    def keep(self, layer: nn.Module, past: Tensor) -> None:
        """Store the past inputs of a layer for its next call."""
        # A slice would keep the memory of the whole chunk.
        self._pasts[layer] = past.clone()


class FrameStream:
    """Runs a network on chunks of whole frames and returns the frames that later input cannot change.

    A network with look-ahead runs on each chunk together with `reach_frames` neighbouring frames on both sides; outputs
    of neighbours are dropped. A causal network has `reach_frames = 0` and stores its past inputs in a `StreamState`.

    Args:
        run: Function `(chunk, first_frame) -> output` that runs the network. The output has as many frames as the
            chunk; `first_frame` is the index in the stream of the first frame of the chunk.
        in_axis: Time axis of the input.
        in_steps: Input steps per frame, for example samples.
        out_axis: Time axis of the output, 1 for `[b, f, width]` and -1 for `[b, width, n]`.
        out_steps: Output steps per frame.
        out_width: Width of the output.
        reach_frames: Each output frame depends on this number of frames before it and after it.
        budget_frames: Largest number of new frames per call of `run`, summed over the batch; limits the memory.
    """

    def __init__(
        self,
        run: Callable[[Tensor, int], Tensor],
        *,
        in_axis: int,
        in_steps: int,
        out_axis: int,
        out_steps: int,
        out_width: int,
        reach_frames: int,
        budget_frames: int,
    ) -> None:
        self._run, self._reach, self._budget = run, reach_frames, budget_frames
        self._in_axis, self._in_steps = in_axis, in_steps
        self._out_axis, self.out_steps, self._out_width = out_axis, out_steps, out_width
        self._pending: Tensor | None = None
        # Frames at the front of `_pending` whose output was returned, and frames that were dropped from `_pending`.
        self._num_context, self._num_dropped = 0, 0
        self._is_finished = False

    def push(self, x: Tensor) -> Tensor:
        """Add any number of input steps; return the output that later input cannot change, which can be empty."""
        return torch.cat(list(self.chunks(x)), dim=self._out_axis)

    def push_last(self, x: Tensor) -> Tensor:
        """Add the last input steps (or the whole input) and return all remaining output."""
        return torch.cat(list(self.chunks(x, is_last=True)), dim=self._out_axis)

    def finish(self) -> Tensor:
        """Return the output of all remaining frames; zeros fill the last frame."""
        if self._pending is None:
            raise ValueError("the stream received no input; push at least one chunk before finish()")
        return self.push_last(self._pending.narrow(self._in_axis, 0, 0))

    def max_frames(self, batch: int) -> int:
        """Most new frames per call of `run`; at least `8 * reach_frames`, so that few frames are computed twice."""
        return max(1, 8 * self._reach, self._budget // max(1, batch))

    @torch.no_grad()
    def chunks(self, x: Tensor, is_last: bool = False) -> Iterator[Tensor]:
        """Yield the output of `push`, or of `push_last` if `is_last`, chunk by chunk."""
        if self._is_finished:
            raise ValueError("this stream is finished; open a new one")
        parts = x.split(self.max_frames(len(x)) * self._in_steps, dim=self._in_axis)
        for number, part in enumerate(parts, start=1):
            yield self._advance(part, is_last and number == len(parts))
        self._is_finished = is_last

    def _advance(self, part: Tensor, is_last: bool) -> Tensor:
        axis = self._in_axis
        if self._pending is None:
            pending = part
        else:
            self._check_continues(part, self._pending)
            pending = torch.cat([self._pending, part], dim=axis)
        if is_last and pending.shape[axis] % self._in_steps:
            # Only waves have several steps per frame, and their time axis is the last one.
            pending = F.pad(pending, (0, -pending.shape[axis] % self._in_steps))
        num_whole = pending.shape[axis] // self._in_steps
        num_ready = max(0, num_whole - self._num_context - (0 if is_last else self._reach))
        if num_ready:
            output = self._run(pending.narrow(axis, 0, num_whole * self._in_steps), self._num_dropped)
            output = output.narrow(self._out_axis, self._num_context * self.out_steps, num_ready * self.out_steps)
        else:
            output = part.new_zeros((len(part), self._out_width, 0))
            output = output.mT if self._out_axis == 1 else output
        num_done = self._num_context + num_ready
        self._num_context = min(self._reach, num_done)
        drop = num_done - self._num_context
        self._num_dropped += drop
        # A slice would keep the memory of the whole chunk.
        self._pending = pending.narrow(axis, drop * self._in_steps, pending.shape[axis] - drop * self._in_steps).clone()
        return output

    def _check_continues(self, part: Tensor, pending: Tensor) -> None:
        shapes = [list(tensor.shape) for tensor in (part, pending)]
        for shape in shapes:
            del shape[self._in_axis]
        if shapes[0] != shapes[1] or part.device != pending.device:
            raise ValueError(
                f"all chunks of a stream need the shape {shapes[1]} apart from the time axis, on {pending.device}; got "
                f"{shapes[0]} on {part.device}"
            )
