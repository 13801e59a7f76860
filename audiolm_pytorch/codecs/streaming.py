"""Networks fed piece by piece: what their layers remember, and streams that give out what can no longer change.

Live streams and long recordings take the same way; only the size of the pieces differs.
"""

from collections.abc import Callable, Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DecoderStream", "EncoderStream", "FrameStream", "StreamState"]


class StreamState:
    """What the causal layers of a network remember of one stream; every stream has one of its own."""

    def __init__(self) -> None:
        self._pasts: dict[nn.Module, Tensor] = {}

    def past(self, layer: nn.Module) -> Tensor | None:
        """What the layer kept; None at the beginning of the stream."""
        return self._pasts.get(layer)

    def keep(self, layer: nn.Module, past: Tensor) -> None:
        """Remember `past` until the layer's next call."""
        # a copy, since a slice would hold the whole piece in memory
        self._pasts[layer] = past.clone()


class FrameStream:
    """Feeds a network in pieces of whole frames and gives out the frames that can no longer change.

    A network that looks ahead is run on every piece with the neighbours that it reaches for, which are cut off again; a
    causal one has a reach of 0 and carries its past itself.

    Args:
        run: `(piece, first_frame) -> output`, with the place of the piece in the stream; output frames are as many.
        in_axis: Axis of time of the input.
        in_steps: Steps of the input a frame.
        out_axis: Axis of time of the output: 1 for `[b, f, width]`, -1 for `[b, width, n]`.
        out_steps: Steps of the output a frame.
        out_width: Width of the output.
        reach_frames: Neighbours on either side that an output frame depends on.
        budget_frames: New frames at once, over all items of a batch; bounds the memory.
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
        self._in_axis, self._in_steps, self._out_axis, self.out_steps = in_axis, in_steps, out_axis, out_steps
        self._out_width = out_width
        self._pending: Tensor | None = None
        # frames at the front of `_pending` that were given out already, and those given out and dropped
        self._context, self._dropped = 0, 0
        self._is_finished = False

    def push(self, x: Tensor) -> Tensor:
        """Take the next steps of the input, any number; give the output frames that are complete with them, if any."""
        return torch.cat(list(self.pieces(x)), dim=self._out_axis)

    def finish(self) -> Tensor:
        """Take the end of the input: give all frames that are left, the last one filled up with zeros."""
        if self._pending is None:
            raise ValueError("nothing was pushed into this stream, so there is nothing to finish")
        return self.whole(self._pending.narrow(self._in_axis, 0, 0))

    def whole(self, x: Tensor) -> Tensor:
        """Take the last steps of the input, or all at once."""
        return torch.cat(list(self.pieces(x, is_last=True)), dim=self._out_axis)

    def frames_at_once(self, batch: int) -> int:
        """New frames that one run takes at most; never so few that most of the work goes into their neighbours."""
        return max(1, 8 * self._reach, self._budget // max(1, batch))

    @torch.no_grad()
    def pieces(self, x: Tensor, is_last: bool = False) -> Iterator[Tensor]:
        """What `push` (or `whole`, if `is_last`) gives, a piece at a time."""
        if self._is_finished:
            raise ValueError("this stream is finished; open another one")
        parts = x.split(self.frames_at_once(len(x)) * self._in_steps, dim=self._in_axis)
        for number, part in enumerate(parts, start=1):
            yield self._advance(part, is_last and number == len(parts))
        self._is_finished = is_last

    def _advance(self, part: Tensor, is_last: bool) -> Tensor:
        axis = self._in_axis
        if self._pending is None:
            pending = part
        else:
            self._check_fits(part, self._pending)
            pending = torch.cat([self._pending, part], dim=axis)
        if is_last and pending.shape[axis] % self._in_steps:
            # only waves have several steps a frame, and their time is the last axis
            pending = F.pad(pending, (0, -pending.shape[axis] % self._in_steps))
        num_whole = pending.shape[axis] // self._in_steps
        num_ready = max(0, num_whole - self._context - (0 if is_last else self._reach))
        if num_ready:
            output = self._run(pending.narrow(axis, 0, num_whole * self._in_steps), self._dropped)
            output = output.narrow(self._out_axis, self._context * self.out_steps, num_ready * self.out_steps)
        else:
            nothing = (len(part), 0, self._out_width) if self._out_axis == 1 else (len(part), self._out_width, 0)
            output = part.new_zeros(nothing)
        given = self._context + num_ready
        self._context = min(self._reach, given)
        drop = given - self._context
        self._dropped += drop
        # a copy, since a slice would hold the whole piece in memory
        self._pending = pending.narrow(axis, drop * self._in_steps, pending.shape[axis] - drop * self._in_steps).clone()
        return output

    def _check_fits(self, part: Tensor, pending: Tensor) -> None:
        shapes = [list(tensor.shape) for tensor in (part, pending)]
        for shape in shapes:
            del shape[self._in_axis]
        if shapes[0] != shapes[1] or part.device != pending.device:
            raise ValueError(
                f"a stream goes on as it began: all but the time must stay {shapes[1]} on {pending.device}, "
                f"got {shapes[0]} on {part.device}"
            )


class EncoderStream:
    """Waves to codes as they come in; made by `encoder_stream` of a codec. A codec can have several at once.

    Args:
        frames: The encoder's stream.
        to_codes: Frames `[b, f, d]` to codes `[b, f, q]`.
        checked: Refuses waves that the codec cannot mean; gives them as `[b, c, n]`.
    """

    def __init__(
        self, frames: FrameStream, to_codes: Callable[[Tensor], Tensor], checked: Callable[[Tensor], Tensor]
    ) -> None:
        self._frames, self._to_codes, self._checked = frames, to_codes, checked

    def push(self, wave: Tensor) -> Tensor:
        """Take the next samples, `[b, n]` or `[b, c, n]` with any n.

        Returns:
            Codes `[b, f, q]` int64 of the frames that are complete with them; f may be 0.
        """
        return self._codes(self._checked(wave), is_last=False)

    def finish(self) -> Tensor:
        """Take the end: give the codes `[b, f, q]` of what is left, the last frame filled up with silence."""
        return self._to_codes(self._frames.finish())

    def whole(self, wave: Tensor) -> Tensor:
        """Take a recording `[b, c, n]` that was checked already, all at once, in bounded memory."""
        return self._codes(wave, is_last=True)

    def _codes(self, wave: Tensor, is_last: bool) -> Tensor:
        return torch.cat([self._to_codes(frames) for frames in self._frames.pieces(wave, is_last)], dim=1)


class DecoderStream:
    """Codes to waves as they come in; made by `decoder_stream` of a codec. A codec can have several at once.

    Args:
        waves: The decoder's stream.
        to_frames: Codes `[b, f, q']` to frames `[b, f, d]`.
        checked: Refuses codes that are not the codec's.
    """

    def __init__(
        self, waves: FrameStream, to_frames: Callable[[Tensor], Tensor], checked: Callable[[Tensor], Tensor]
    ) -> None:
        self._waves, self._to_frames, self._checked = waves, to_frames, checked

    def push(self, codes: Tensor) -> Tensor:
        """Take the codes `[b, f, q']` of the next frames, the first q' columns.

        Returns:
            The samples `[b, c, n]` that no later code can change; n may be 0.
        """
        return self._wave(self._checked(codes), is_last=False)

    def finish(self) -> Tensor:
        """Take the end: give the samples `[b, c, n]` that are left."""
        return self._waves.finish()

    def whole(self, codes: Tensor) -> Tensor:
        """Take codes `[b, f, q']` that were checked already, all at once, in bounded memory beside the wave."""
        pieces = self._pieces(codes, is_last=True)
        first = next(pieces)
        # one buffer for all: pieces, their surroundings and their concatenation would be more than twice the wave
        wave = first.new_empty(*first.shape[:2], self._waves.out_steps * codes.shape[1])
        known = 0
        for piece in chain([first], pieces):
            wave[..., known : known + piece.shape[-1]] = piece
            known += piece.shape[-1]
        return wave

    def _wave(self, codes: Tensor, is_last: bool) -> Tensor:
        return torch.cat(list(self._pieces(codes, is_last)), dim=-1)

    @torch.no_grad()
    def _pieces(self, codes: Tensor, is_last: bool) -> Iterator[Tensor]:
        """Waves as they are complete, a piece at a time."""
        parts = codes.split(self._waves.frames_at_once(len(codes)), dim=1)
        for number, part in enumerate(parts, start=1):
            yield from self._waves.pieces(self._to_frames(part), is_last and number == len(parts))
