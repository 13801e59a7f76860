"""Novelty: whether generated music is more similar to the training clips than real held-out music is."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.audio.files import resample
from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.checks.types import described, typed
from musiclm_pytorch.evaluation.metric import ClipSet, Extractor, Metric, UnmetNeed
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["MelodySpectrogram", "Novelty", "melody_similarity", "melody_spectrogram", "nearest_similarity"]

_SAMPLE_HZ, _HOP_SAMPLES, _NUM_MELS = 16_000, 1600, 48
_DYNAMIC_RANGE_DB = 30.0
_CLIPS_PER_BATCH = 50


@typed
def nearest_similarity(queries: Tensor, references: Tensor) -> Tensor:
    """Cosine similarity `[a]` of each query `[a, d]` with the most similar of the references `[r, d]`."""
    _check_shapes(queries, references, num_axes=2)
    return (F.normalize(queries, dim=1) @ F.normalize(references, dim=1).T).amax(dim=1)


def _check_shapes(queries: Tensor, references: Tensor, num_axes: int) -> None:
    if queries.ndim != num_axes or queries.shape[1:] != references.shape[1:] or not len(references):
        raise ValueError(
            f"queries and references must have {num_axes} axes and equal sizes after the first axis, with at least one "
            f"reference; got queries {tuple(queries.shape)} and references {tuple(references.shape)}"
        )
    for name, tensor in (("queries", queries), ("references", references)):
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite floats, got {described(tensor)}")


@typed
@torch.no_grad()
def melody_spectrogram(waves: Tensor, sample_hz: int) -> Tensor:
    """Compute coarse log-mel spectrograms minus their mean over time, to keep the notes and little of the timbre.

    The spectrograms `[b, m, f]` of m mel bands have unit norm and ten frames per second; a silent wave becomes zeros.
    """
    sizes: dict[str, Any] = dict(n_fft=2 * _HOP_SAMPLES, hop_length=_HOP_SAMPLES, num_mels=_NUM_MELS)
    mel = MelSpectrogram(sample_hz=_SAMPLE_HZ, **sizes, f_min_hz=60, power=2.0)
    parts = []
    for part in waves.split(_CLIPS_PER_BATCH):
        energy = mel(resample(part.float(), sample_hz, _SAMPLE_HZ))
        peak = energy.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        levels = (energy / peak + 10 ** (-_DYNAMIC_RANGE_DB / 10)).log10()
        parts.append(F.normalize((levels - levels.mean(dim=2, keepdim=True)).flatten(1), dim=1).view_as(levels))
    return torch.cat(parts)


@typed
def melody_similarity(queries: Tensor, references: Tensor, max_shift_frames: int = 10) -> Tensor:
    """Correlation `[a]` of each melody with the most similar reference melody, at the best time shift.

    Melodies are compared as spectrograms, without a trained model. A copy of a training clip has similarity 1 even if
    the copy starts a little earlier or later. Queries `[a, m, f]` and references `[r, m, f]` come from
    `melody_spectrogram`. Frames of a query that do not overlap with the shifted reference are left out.
    """
    _check_shapes(queries, references, num_axes=3)
    if max_shift_frames < 0:
        raise ValueError(f"max_shift_frames must be at least 0, got {max_shift_frames}")
    num_frames = queries.shape[2]
    best = queries.new_full((len(queries),), -1.0)
    limit = min(max_shift_frames, num_frames // 2)
    for shift in range(-limit, limit + 1):
        query_start, reference_start = max(shift, 0), max(-shift, 0)
        overlap = num_frames - abs(shift)
        moved = queries[:, :, query_start : query_start + overlap].flatten(1)
        fixed = references[:, :, reference_start : reference_start + overlap].flatten(1)
        best = torch.maximum(best, nearest_similarity(moved, fixed))
    return best


class MelodySpectrogram(Extractor):
    """Coarse log-mel spectrograms `[b, m, f]` minus their mean over time, see `melody_spectrogram`."""

    name, sample_hz, windows = "melody", _SAMPLE_HZ, "ten frames a second"

    def __call__(self, waves: Tensor) -> Tensor:
        """Compute the spectrograms of waves `[b, n]`."""
        return melody_spectrogram(waves, self.sample_hz)


class Novelty(Metric):
    """Mean and 95th percentile of the similarity of clips to their nearest training clip.

    Similar clips of the real set show how near new music is. The note states whether clips are nearer than real clips.
    """

    name = "nearest training clip ({})"
    uses_training = True

    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Measure the clips against the training clips."""
        if training is None:
            raise UnmetNeed(f"{self.name} needs the training clips; pass --training")
        similarities = self._similarities(clips, training)
        expected = None if real is None else self._similarities(real, training)
        note = f"{self.extractor.note()}; against {len(training)} training clips"
        values = []
        for title, share in (("mean", None), ("95th percentile", 0.95)):
            value = _value(f"{self.name} / {clips.name} / {title}", similarities, share, note)
            if expected is not None:
                value = replace(value, note=f"{note}; {_comparison(value, _value('', expected, share, note))}")
            values.append(value)
        return values

    def floor(self, real: ClipSet, training: ClipSet | None) -> list[MetricValue]:
        """Measure the real clips, without a comparison with themselves."""
        return self.measure(real, None, training)

    def _similarities(self, clips: ClipSet, training: ClipSet) -> np.ndarray:
        queries, references = (torch.stack(_equal_shapes(part.of(self.extractor))) for part in (clips, training))
        if queries.ndim == 3 and isinstance(self.extractor, MelodySpectrogram):
            num_frames = min(queries.shape[2], references.shape[2])
            return melody_similarity(queries[..., :num_frames], references[..., :num_frames]).double().numpy()
        return nearest_similarity(queries, references).double().numpy()


def _equal_shapes(features: list[Tensor]) -> list[Tensor]:
    """Cut features `[..., f]` to the length of the shortest clip."""
    length = min(part.shape[-1] for part in features)
    return [part[..., :length] for part in features]


def _value(name: str, values: np.ndarray, share: float | None, note: str) -> MetricValue:
    """Build a value from the quantile `share` (0..1) of the similarities, or from their mean with `share=None`."""
    if share is None:
        return MetricValue.mean(name, values, None, note)
    return MetricValue.measured(name, lambda rows: float(np.quantile(values[rows], share)), len(values), None, note)


def _comparison(clips: MetricValue, real: MetricValue) -> str:
    if clips.value <= real.value:
        return "no nearer than real"
    return "as near as real, within the intervals" if clips.low <= real.high else "nearer than real"
