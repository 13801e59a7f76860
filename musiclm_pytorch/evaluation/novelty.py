"""Is generated music new? How near it comes to its nearest training clip, beside real clips that were held out."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from beartype import beartype
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.audio.resample import resample
from musiclm_pytorch.evaluation.report import Metric

__all__ = ["melody_similarity", "melody_spectrogram", "nearest_similarity", "novelty_metrics"]

SAMPLE_HZ = 16_000
HOP_SAMPLES = 1600
NUM_MELS = 48
RANGE_DB = 30.0
ROWS_AT_ONCE = 50


@beartype
def nearest_similarity(queries: Tensor, references: Tensor) -> Tensor:
    """Cosine of each query to its nearest reference.

    Args:
        queries: `[a, d]`, not zero.
        references: `[r, d]`, not zero.

    Returns:
        `[a]` in -1..1.

    Raises:
        ValueError: If the widths differ or there are no references.
    """
    _require_alike(queries, references, dimensions=2)
    return (F.normalize(queries, dim=1) @ F.normalize(references, dim=1).T).amax(dim=1)


def _require_alike(queries: Tensor, references: Tensor, dimensions: int) -> None:
    """Raise unless both are embeddings of the same kind, and there is something to compare with."""
    if queries.ndim != dimensions or queries.shape[1:] != references.shape[1:] or not len(references):
        raise ValueError(
            f"queries and references must be alike beyond their first axis, and references not empty; got "
            f"{tuple(queries.shape)} and {tuple(references.shape)}"
        )


@beartype
@torch.no_grad()
def melody_spectrogram(waves: Tensor, sample_hz: int) -> Tensor:
    """What is played when: a coarse log-mel spectrogram without the average spectrum, hence with little of the timbre.

    Args:
        waves: `[b, n]`.
        sample_hz: Their rate (Hz).

    Returns:
        `[b, m, f]` with unit norm, ten frames a second; zero for silence.
    """
    mel = MelSpectrogram(
        sample_hz=SAMPLE_HZ, n_fft=2 * HOP_SAMPLES, hop_length=HOP_SAMPLES, num_mels=NUM_MELS, f_min_hz=60, power=2.0
    )
    parts = []
    for part in waves.split(ROWS_AT_ONCE):
        energy = mel(resample(part.float(), sample_hz, SAMPLE_HZ))
        peak = energy.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        levels = (energy / peak + 10 ** (-RANGE_DB / 10)).log10()
        parts.append(F.normalize((levels - levels.mean(dim=2, keepdim=True)).flatten(1), dim=1).view_as(levels))
    return torch.cat(parts)


@beartype
def melody_similarity(queries: Tensor, references: Tensor, max_shift_frames: int = 10) -> Tensor:
    """Correlation of each melody to its nearest reference, whichever shift in time fits best.

    Independent of any model: a copied training clip gives 1 even when it begins a little earlier or later.

    Args:
        queries: `[a, m, f]` of `melody_spectrogram`.
        references: `[r, m, f]`.
        max_shift_frames: Largest shift either way; a tenth of a second each.

    Returns:
        `[a]` in -1..1; what a shift moves out of the clip is left out.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _require_alike(queries, references, dimensions=3)
    num_frames = queries.shape[2]
    best = queries.new_full((len(queries),), -1.0)
    for shift in range(-min(max_shift_frames, num_frames // 2), min(max_shift_frames, num_frames // 2) + 1):
        late, early = max(shift, 0), max(-shift, 0)
        overlap = num_frames - abs(shift)
        moved = queries[:, :, late : late + overlap].flatten(1)
        kept = references[:, :, early : early + overlap].flatten(1)
        best = torch.maximum(best, nearest_similarity(moved, kept))
    return best


def _percentile_95(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(np.quantile(values[chosen], 0.95))


def _mean(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(values[chosen].mean())


def _verdict(generated: Metric, real: Metric) -> str:
    """Say in words how generations compare with real music."""
    if generated.value <= real.value:
        return "no nearer than real"
    return "as near as real, within the intervals" if generated.low <= real.high else "nearer than real"


@beartype
def novelty_metrics(name: str, generated: Tensor, held_out: Tensor) -> list[Metric]:
    """Set how near generations come to the training clips beside how near real held-out clips come.

    Args:
        name: Beginning of the metrics' names.
        generated: `[a]` nearest similarities of generations.
        held_out: `[b]` of real clips that were not trained on.

    Returns:
        Mean and 95th percentile of both; the notes of the generated ones say whether they are nearer than real.
    """
    made, real = generated.double().cpu().numpy(), held_out.double().cpu().numpy()
    metrics = []
    for title, statistic in (("mean", _mean), ("95th percentile", _percentile_95)):
        reference = Metric.measured(f"{name} / real held-out / {title}", partial(statistic, real), len(real))
        metric = Metric.measured(f"{name} / generated / {title}", partial(statistic, made), len(made))
        metrics += [replace(metric, note=_verdict(metric, reference)), reference]
    return metrics
