"""What probes read: log-mel frames, an encoder's own front end, and its layers, all on one grid of frames."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.audio import MelSpectrogram
from audiolm_pytorch.semantic import BestRQEncoder, FrameEncoder
from musiclm_pytorch.evaluation.semantic_data import FrameGrid
from musiclm_pytorch.evaluation.semantic_scores import FRONT_END, LOG_MEL, layer_name

__all__ = ["LogMelFrames", "View", "views_of"]

_MEL_BANDS = 80
_MEL_WINDOW_SECONDS = 0.064
_MEL_FLOOR = 1e-2


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
