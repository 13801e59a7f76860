"""Chroma cosine similarity: the share of frames in which a clip and its real clip have the same dominant pitch class.

Definition of MusicGen (arXiv:2306.05284, sec. 4.2; audiocraft's metric): audio at 32 kHz, frames of 16384 samples every
4096, and chroma vectors with a single 1 at the largest bin, so that the cosine of a frame is 1 or 0.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.audio.waves import check_rate
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.module_state import check_positive
from musiclm_pytorch.evaluation.metric import ClipSet, Extractor, Metric, require_references
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["ChromaSimilarity", "PitchClasses", "chroma_filters"]

_NUM_CLASSES = 12
_LOWEST_A_HZ = 27.5
# Centre (octaves above 27.5 Hz) and width of the weights of octaves.
_CENTRE_OCTAVE, _OCTAVE_WIDTH = 5.0, 2.0


@typed
def chroma_filters(sample_hz: int, n_fft: int) -> np.ndarray:
    """Build filters `[12, n_fft // 2 + 1]` of pitch classes from C, which equal `librosa.filters.chroma`.

    A bin contributes to the pitch classes near its frequency by a Gaussian, whose width is the distance of bins, but at
    least a semitone. The weights of a bin have unit norm and are then multiplied by a Gaussian over octaves.
    """
    check_rate(sample_hz)
    check_positive(n_fft=n_fft)
    octaves = np.log2(np.arange(1, n_fft) * sample_hz / n_fft / _LOWEST_A_HZ)
    semitones = _NUM_CLASSES * octaves
    # The first bin (0 Hz) is placed 1.5 octaves below the second one.
    semitones = np.concatenate([semitones[:1] - 1.5 * _NUM_CLASSES, semitones])
    widths = np.concatenate([np.diff(semitones).clip(min=1.0), [1.0]])
    half = _NUM_CLASSES // 2
    distances = np.mod(semitones - np.arange(_NUM_CLASSES)[:, None] + half, _NUM_CLASSES) - half
    weights = np.exp(-0.5 * (2 * distances / widths) ** 2)
    weights /= np.linalg.norm(weights, axis=0)
    weights *= np.exp(-0.5 * ((semitones / _NUM_CLASSES - _CENTRE_OCTAVE) / _OCTAVE_WIDTH) ** 2)
    # Class 0 is A so far.
    return np.roll(weights, -3, axis=0)[:, : n_fft // 2 + 1]


class PitchClasses(Extractor):
    """Dominant pitch class `[b, f]` (0..11 from C) of every frame; silence is class 0."""

    name, sample_hz, windows = "pitch classes", 32_000, "frames of 0.512 s every 0.128 s"
    _N_FFT, _HOP_SAMPLES = 16_384, 4_096

    def __init__(self) -> None:
        self._filters = torch.from_numpy(chroma_filters(self.sample_hz, self._N_FFT)).float()

    def __call__(self, waves: Tensor) -> Tensor:
        """Compute the classes of waves `[b, n]`; only the first ceil(n / 4096) frames are kept."""
        num_frames = -(-waves.shape[1] // self._HOP_SAMPLES)
        missing = max(self._N_FFT - waves.shape[1], 0)
        waves = F.pad(waves.float(), (missing // 2, missing - missing // 2))
        window = torch.hann_window(self._N_FFT)
        spectrum = torch.stft(waves, self._N_FFT, self._HOP_SAMPLES, window=window, return_complex=True)
        return (self._filters @ spectrum.abs().square()).argmax(dim=1)[:, :num_frames]


class ChromaSimilarity(Metric):
    """Share of frames with equal pitch class, over the frames of all clips; chance is that of other real clips."""

    name = "chroma cosine similarity"

    def __init__(self) -> None:
        super().__init__(PitchClasses())

    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Compare each clip with its real clip, over the frames of the shorter one."""
        real, references = require_references(clips, real, self)
        expected = [real.of(self.extractor)[index] for index in references]
        hits, totals = np.array([_matches(a, b) for a, b in zip(clips.of(self.extractor), expected)]).T
        others = np.array([_matches(a, b) for a, b in zip(clips.of(self.extractor), expected[1:] + expected[:1])])
        chance = float(others[:, 0].sum() / others[:, 1].sum()) if len(clips) > 1 else None

        def share(rows: np.ndarray) -> float:
            return float(hits[rows].sum() / totals[rows].sum())

        note = self.extractor.note()
        return [MetricValue.measured(f"{self.name} / {clips.name}", share, len(clips), chance, note)]


def _matches(a: Tensor, b: Tensor) -> tuple[int, int]:
    """Return the number of frames with equal classes, and the number of frames."""
    count = min(len(a), len(b))
    return int((a[:count] == b[:count]).sum()), count
