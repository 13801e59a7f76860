"""Beat strength, tempo, and how well the note onsets of a clip follow those of its real clip."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.evaluation.metric import ClipSet, Extractor, Metric, UnmetNeed
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["Beat", "OnsetEnvelope", "autocorrelation_peak", "is_same_tempo", "onset_correlation"]

_FRAMES_PER_SECOND = 100
_LAG_FRAMES = (25, 200)
_FLUX_FRAMES = 2
_MIN_AMPLITUDE = 0.1
_SMOOTH_FRAMES = 5
_MAX_TEMPO_RATIO = 1.08
# Share of an octave within the tolerance, on both sides.
_TEMPO_CHANCE = 2 * float(np.log2(_MAX_TEMPO_RATIO))
# Envelopes with less energy per frame have no onsets.
_MIN_VARIANCE = 1e-6


class OnsetEnvelope(Extractor):
    """Onset strength `[b, f]`, 100 frames per second: the mean rise of the log-mel spectrum within 20 ms.

    The spectrum has 64 bands and windows of 64 ms. Amplitudes are raised to 0.1, so that faint noise has no onsets.
    """

    name, sample_hz, windows = "onset envelope", 16_000, "10-ms frames"
    min_seconds = 1.0

    def __init__(self) -> None:
        self._mel = MelSpectrogram(sample_hz=self.sample_hz, n_fft=1024, hop_length=160, num_mels=64)

    def __call__(self, waves: Tensor) -> Tensor:
        """Compute the onset strength of waves `[b, n]`."""
        levels = (self._mel(waves) + _MIN_AMPLITUDE).log()
        return (levels[:, :, _FLUX_FRAMES:] - levels[:, :, :-_FLUX_FRAMES]).clamp_min(0).mean(dim=1)


@typed
def autocorrelation_peak(envelope: Tensor) -> tuple[float, float]:
    """Return the largest autocorrelation of an envelope `[f]` between lags of 0.25 and 2 s, and its tempo in bpm.

    The autocorrelation is 1 at lag 0, and does not decrease with the lag for a periodic envelope. A constant envelope,
    such as that of silence, has the peak 0 and the tempo NaN.
    """
    centred = (envelope - envelope.mean()).double()
    num_frames = len(centred)
    last = min(_LAG_FRAMES[1], num_frames - 1)
    if float(centred.square().mean()) < _MIN_VARIANCE or last < _LAG_FRAMES[0]:
        return 0.0, float("nan")
    spectrum = torch.fft.rfft(centred, n=2 * num_frames).abs().square()
    overlap = num_frames - torch.arange(num_frames)
    correlation = torch.fft.irfft(spectrum, n=2 * num_frames)[:num_frames] / overlap
    part = correlation[_LAG_FRAMES[0] : last + 1] / correlation[0]
    best = int(part.argmax())
    return float(part[best]), 60.0 * _FRAMES_PER_SECOND / (best + _LAG_FRAMES[0])


def is_same_tempo(tempo_bpm: float, expected_bpm: float) -> bool:
    """Whether two tempi differ by at most 8%, after one of them is multiplied by a power of two."""
    if not (tempo_bpm > 0 and expected_bpm > 0):
        return False
    octaves = np.log2(tempo_bpm / expected_bpm)
    return bool(abs(octaves - round(octaves)) <= np.log2(_MAX_TEMPO_RATIO))


@typed
def onset_correlation(a: Tensor, b: Tensor, smooth_frames: int = 1) -> float:
    """Correlation of two envelopes `[f]`, cut to the shorter one; 0 if one of them is constant.

    `smooth_frames` is the odd length of a moving average that is applied to both before.
    """
    count = min(len(a), len(b))
    both = torch.stack([a[:count], b[:count]]).double()
    both = F.avg_pool1d(both, smooth_frames, 1, smooth_frames // 2, count_include_pad=False)
    both = both - both.mean(dim=1, keepdim=True)
    if float(both.square().mean(dim=1).min()) < _MIN_VARIANCE:
        return 0.0
    return float(F.cosine_similarity(both[0], both[1], dim=0))


class Beat(Metric):
    """Median beat strength, share of clips with the right tempo, and correlation of onsets with the real clip.

    The right tempo is the label `bpm` of the clip, or the tempo of its real clip.
    """

    name = "beat"

    def __init__(self) -> None:
        super().__init__(OnsetEnvelope())

    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Measure the clips; tempo and correlation only if labels or real clips exist."""
        envelopes = clips.of(self.extractor)
        prefix, note = f"{self.name} / {clips.name}", self.extractor.note()
        strengths, tempi = (np.array(part) for part in zip(*map(autocorrelation_peak, envelopes)))
        values = [_median(f"{prefix} / strength", strengths, note)]
        references = None
        if real is not None and clips.references is not None:
            references = [real.of(self.extractor)[index] for index in clips.references]
        expected = _expected_tempi(clips, references)
        if any(tempo is not None for tempo in expected):
            is_right = [is_same_tempo(float(got), bpm) for got, bpm in zip(tempi, expected) if bpm is not None]
            values.append(
                MetricValue.mean(f"{prefix} / tempo, octaves allowed", np.array(is_right), _TEMPO_CHANCE, note)
            )
        if references is not None:
            for words, frames in (("", 1), (", smoothed over 50 ms", _SMOOTH_FRAMES)):
                correlations = [onset_correlation(a, b, frames) for a, b in zip(envelopes, references)]
                values.append(
                    _median(f"{prefix} / onsets follow the real clip{words}", np.array(correlations), note, 0.0)
                )
        return values


def _expected_tempi(clips: ClipSet, references: list[Tensor] | None) -> list[float | None]:
    """Return the tempo that each clip should have, in bpm, or None if it is unknown."""
    expected: list[float | None] = []
    for number, label in enumerate(clips.labels("bpm")):
        if isinstance(label, int | float) and not isinstance(label, bool):
            expected.append(float(label))
        else:
            expected.append(None if references is None else autocorrelation_peak(references[number])[1])
    return expected


def _median(name: str, values: np.ndarray, note: str, chance: float | None = None) -> MetricValue:
    if not len(values):
        raise UnmetNeed(f"{name}: there are no clips")
    return MetricValue.measured(name, lambda rows: float(np.median(values[rows])), len(values), chance, note)
