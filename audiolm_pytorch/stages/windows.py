"""Decoding that is longer than what a model was trained on: windows that carry half of the one before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.conditioning import Conditions
from audiolm_pytorch.sampling import SamplingSettings, item_generators
from audiolm_pytorch.stages.decoding import Decoded, TokenModel, decode
from audiolm_pytorch.stages.layout import TokenLayout

__all__ = ["Window", "decode_in_windows", "plan_windows"]


@dataclass(frozen=True)
class Window:
    """A stretch of predicted frames that is decoded at once.

    Attributes:
        start: First frame.
        stop: Frame after the last.
    """

    start: int
    stop: int


@beartype
def plan_windows(num_frames: int, window_frames: int | None, alignment: int = 1) -> list[Window]:
    """Cover a sequence with windows of which each carries the second half of the one before (MusicLM, sec. 5.4).

    Args:
        num_frames: Frames to cover.
        window_frames: Frames of a window; None = one window over everything.
        alignment: Windows start at multiples of this many frames.

    Returns:
        The windows, in order. Where they start does not depend on `num_frames`.

    Raises:
        ValueError: If the window is too short to advance by `alignment` frames and keep some.
    """
    if window_frames is None or num_frames <= window_frames:
        return [Window(0, num_frames)]
    hop = window_frames // 2 // alignment * alignment
    if hop < 1:
        raise ValueError(f"windows of {window_frames} frames cannot advance by half, in steps of {alignment} frames")
    num_windows = 1 + ceil((num_frames - window_frames) / hop)
    return [Window(i * hop, min(i * hop + window_frames, num_frames)) for i in range(num_windows)]


@beartype
def decode_in_windows(
    model: TokenModel,
    streams: Mapping[str, Tensor],
    num_frames: int | Tensor,
    *,
    window_frames: int | None = None,
    batch_size: int = 1,
    lengths: Mapping[str, int | Tensor] | None = None,
    conditioning: Conditions | None = None,
    settings: SamplingSettings | None = None,
    seeds: Sequence[int | torch.Generator] | None = None,
    callback: Callable[[int, int], None] | None = None,
    allow_eos: bool = False,
) -> Decoded:
    """Complete the predicted stream of a model window by window; see `decode` for all that is not said here.

    Args:
        model: A model with one predicted stream.
        streams: Given streams and the prompt.
        num_frames: Frames wanted, prompt included, `[b]` or one int.
        window_frames: Longest stretch to decode at once; None = no limit.
        batch_size: As in `decode`.
        lengths: As in `decode`.
        conditioning: As in `decode`; the same in every window.
        settings: As in `decode`.
        seeds: As in `decode`.
        callback: Called after every row of every window with the frames known and the frames wanted.
        allow_eos: As in `decode`.

    Returns:
        The completed stream.

    Raises:
        ValueError: If the model predicts several streams, a prompt is longer than what is wanted, or `decode` refuses.
    """
    if len(model.layout.predicted) != 1:
        raise ValueError(f"windows need one predicted stream, got {[s.name for s in model.layout.predicted]}")
    name = model.layout.predicted[0].name
    batch = len(next(iter(streams.values()))) if streams else batch_size
    known = _item_counts({**{key: ids.shape[1] for key, ids in streams.items()}, **(lengths or {})}, batch)
    wanted = _item_counts({name: num_frames}, batch)[name]
    total = int(wanted.max())
    done = known.pop(name, torch.zeros_like(wanted))
    if (done > wanted).any():
        raise ValueError(
            f"the prompt of '{name}' has {done.tolist()} frames, longer than what is wanted, {wanted.tolist()}: "
            "shorten it or ask for more"
        )
    given = {key: ids for key, ids in streams.items() if key != name}
    generators = item_generators(seeds, batch)
    conditioning = None if conditioning is None else conditioning.repeated_to(batch)
    out = _with_prompt(streams.get(name), (batch, total, model.layout.predicted[0].num_levels), model.device)
    for window in plan_windows(total, window_frames, model.layout.frame_alignment):
        stop = wanted.clamp(max=window.stop)
        items = (done < stop).nonzero().squeeze(1)
        if not len(items):
            continue
        part, counts = _covering(model.layout, given, known, window)
        part[name], counts[name] = out[:, window.start : window.stop], (done - window.start).clamp(min=0)
        piece = decode(
            model,
            {key: ids[items.to(ids.device)] for key, ids in part.items()},
            {name: stop[items] - window.start},
            batch_size=len(items),
            lengths={key: count[items] for key, count in counts.items()},
            conditioning=None if conditioning is None else conditioning.chosen(items),
            settings=settings,
            seeds=[generators[i] for i in items.tolist()],
            callback=None if callback is None else _of_whole(callback, window, total),
            allow_eos=allow_eos,
        )
        found = piece.streams[name]
        out[items.to(out.device), window.start : window.start + found.shape[1]] = found
        done[items] = window.start + piece.lengths[name]
        wanted = torch.where(done < stop, done, wanted)  # whoever ended before the window did wants no more
    return Decoded({name: out[:, : int(wanted.max())]}, {name: wanted})


def _item_counts(counts: Mapping[str, int | Tensor], batch: int) -> dict[str, Tensor]:
    """Counts of every item, `[b]` int64 on the CPU."""
    return {name: torch.as_tensor(count).cpu().long().expand(batch).clone() for name, count in counts.items()}


def _with_prompt(prompt: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Tokens `[b, f, levels]`: the prompt, then -1."""
    out = torch.full(shape, -1, device=device)
    if prompt is not None:
        prompt = prompt.unsqueeze(-1) if prompt.ndim == 2 else prompt
        out[:, : prompt.shape[1]] = prompt[:, : shape[1]].to(out)
    return out


def _covering(
    layout: TokenLayout, given: Mapping[str, Tensor], known: Mapping[str, Tensor], window: Window
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The frames of the given streams that cover a window, and how many of them each item has."""
    part: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for stream in layout.given:
        if stream.name in given:
            ratio = Fraction(stream.rate_hz) / Fraction(layout.predicted[0].rate_hz)
            tokens = given[stream.name]
            start = min(int(window.start * ratio), tokens.shape[1] - 1)
            part[stream.name] = tokens[:, start : max(start + 1, ceil(window.stop * ratio))]
            counts[stream.name] = (known[stream.name] - start).clamp(min=1, max=part[stream.name].shape[1])
    return part, counts


def _of_whole(callback: Callable[[int, int], None], window: Window, total: int) -> Callable[[int, int], None]:
    """Report rows of a window as frames of the whole; a flat layout has several rows a frame."""

    def report(row: int, num_rows: int) -> None:
        callback(window.start + (window.stop - window.start) * row // num_rows, total)

    return report
