"""What probes read of sounds: log-mel frames, an encoder's own front end, its layers, and a tokenizer's own ids."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.semantic import BestRQEncoder, FrameEncoder
from audiolm_pytorch.semantic.base import SemanticTokenizer
from musiclm_pytorch.evaluation.semantic_data import FrameGrid
from musiclm_pytorch.evaluation.semantic_scores import FRONT_END, LOG_MEL, OWN_TOKENS, layer_name

__all__ = ["LogMelFrames", "Sound", "View", "grid_of_tokens", "uncut", "vectors_of", "view_of_tokens", "views_of"]

_CLIPS_AT_ONCE = 16
_MEL_BANDS = 80
_MEL_WINDOW_SECONDS = 0.064
_MEL_FLOOR = 1e-2


@dataclass(frozen=True)
class Sound:
    """One side (train or test) of one kind of sound, with a label for every frame and every clip.

    Attributes:
        waves: `[n]` each, long enough for a frame.
        num_frames: Frames of each clip.
        frame_labels: For each probe the label `[m]` int64 of every frame; -1 where the probe is not asked.
        clip_labels: For each probe the label `[clips]` int64 of every clip.
    """

    waves: list[Tensor]
    num_frames: list[int]
    frame_labels: dict[str, Tensor]
    clip_labels: dict[str, Tensor]

    @property
    def clip_index(self) -> Tensor:
        """The clip `[m]` that each frame belongs to."""
        return torch.arange(len(self.num_frames)).repeat_interleave(torch.tensor(self.num_frames))


@dataclass(frozen=True)
class View:
    """One way of turning waves into a vector a frame.

    Attributes:
        name: As reports call it.
        width: Of a vector, d.
        vectors: From waves `[b, n]` and their lengths `[b]` (samples) to `[b, t, d]`; an item's frames past its own
            end mean nothing.
    """

    name: str
    width: int
    vectors: Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def vectors_of(view: View, sound: Sound, device: torch.device) -> Tensor:
    """Vectors `[m, d]` float32 of all frames, clip by clip, on the CPU."""
    starts = [0, *torch.tensor(sound.num_frames).cumsum(0).tolist()]
    vectors = torch.empty(starts[-1], view.width)
    # Clips of like length go together, so that little is computed for padding.
    order = sorted(range(len(sound.waves)), key=lambda index: len(sound.waves[index]))
    for first in range(0, len(order), _CLIPS_AT_ONCE):
        rows = order[first : first + _CLIPS_AT_ONCE]
        waves = [sound.waves[row] for row in rows]
        lengths = torch.tensor([len(wave) for wave in waves], device=device)
        padded = pad_sequence(waves, batch_first=True).to(device)
        for row, own in zip(rows, view.vectors(padded, lengths).float().cpu()):
            vectors[starts[row] : starts[row + 1]] = own[: sound.num_frames[row]]
    if not vectors.isfinite().all():
        raise ValueError(f"{view.name} gives NaN or infinity: the encoder is broken; train it again")
    return vectors


def views_of(encoder: FrameEncoder, grid: FrameGrid, layers: Sequence[int]) -> list[View]:
    """Log-mel frames, the encoder's own front end where it is one of ours, and its layers."""
    views = [View(LOG_MEL, _MEL_BANDS, LogMelFrames(grid))]
    if isinstance(encoder, BestRQEncoder):
        front_end = encoder.front_end
        views.append(View(FRONT_END, front_end.dim, lambda waves, lengths: front_end(waves, lengths)[0]))
    return views + [View(layer_name(layer), encoder.dim, partial(_hidden, encoder, layer)) for layer in layers]


def _hidden(encoder: FrameEncoder, layer: int, waves: Tensor, lengths: Tensor) -> Tensor:
    """Hidden states of a layer."""
    return encoder.features(waves, lengths, layer)[0]


def uncut(tokenizer: SemanticTokenizer) -> SemanticTokenizer:
    """The tokenizer without its cut of lengths, which would drop short clips and hide how long a frame is."""
    if not getattr(tokenizer, "seq_len_multiple_of", None):
        return tokenizer
    whole: Any = copy.copy(tokenizer)
    whole.seq_len_multiple_of = None
    return whole


def grid_of_tokens(tokenizer: SemanticTokenizer) -> FrameGrid:
    """Where an uncut tokenizer's tokens lie; of several to one frame, all but the first are placed a little late."""
    frames: Any = SimpleNamespace(
        sample_hz=tokenizer.target_sample_hz,
        downsample_factor=tokenizer.downsample_factor,
        num_frames=tokenizer.num_frames,
    )
    return FrameGrid.of(frames)


def view_of_tokens(tokenizer: SemanticTokenizer) -> View:
    """A tokenizer's ids as vectors of width 1; float32 holds every id of a codebook below 2**24 exactly."""

    def ids(waves: Tensor, lengths: Tensor) -> Tensor:
        return rearrange(tokenizer.forward(waves, lengths=lengths), "b t -> b t 1").float()

    return View(OWN_TOKENS, 1, ids)


class LogMelFrames:
    """One log-mel frame at the centre of every frame of an encoder: what there is before anything is learned.

    Args:
        grid: The encoder's frames.
    """

    def __init__(self, grid: FrameGrid) -> None:
        self.grid = grid
        # An even window has its middle between two samples, where the encoder's frames have theirs.
        self.window_samples = 2 * round(_MEL_WINDOW_SECONDS * grid.sample_hz / 2)
        self.mel = MelSpectrogram(
            sample_hz=grid.sample_hz,
            n_fft=self.window_samples,
            hop_length=grid.hop_samples,
            num_mels=_MEL_BANDS,
            center=False,
        )

    def __call__(self, waves: Tensor, lengths: Tensor) -> Tensor:
        """Waves `[b, n]` of so many samples `[b]` to `[b, t, 80]`, at least as many frames as the encoder gives."""
        left = (self.window_samples - self.grid.shortest_samples) // 2
        real = torch.arange(waves.shape[1], device=waves.device) < rearrange(lengths, "b -> b 1")
        padded = F.pad(waves.masked_fill(~real, 0.0), (left, self.window_samples + self.grid.hop_samples))
        mel = self.mel.to(waves.device)(padded)
        return rearrange(mel, "b m t -> b t m").clamp(min=_MEL_FLOOR).log()
