"""Metrics of long pieces: whether tempo and key stay, and whether the seams of windows stand out."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audio.units import samples_covering
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.generation.windows import MARGIN_DIVISOR, plan_windows
from musiclm_pytorch.evaluation.metrics.beat import OnsetEnvelope, autocorrelation_peak
from musiclm_pytorch.evaluation.metrics.chroma import chroma_filters
from musiclm_pytorch.evaluation.report import MetricValue

if TYPE_CHECKING:
    from musiclm_pytorch.musiclm import MusicLM

__all__ = ["exact_tempo", "key_metrics", "key_of", "seam_metrics", "seams_of", "tempo_metrics"]

_SAMPLE_HZ = 16_000
_FRAMES_PER_SECOND = 100
_MAX_TEMPO_CHANGE = 0.03
# Ratios of two estimates of the same tempo, where one of them counts other note values.
_METRES = np.array([1 / 4, 1 / 3, 1 / 2, 2 / 3, 1, 3 / 2, 2, 3, 4])
# Krumhansl and Kessler (1982): how well the 12 pitch classes from the tonic fit a major and a minor key.
_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
_PROFILES = np.stack([np.roll(profile, tonic) for profile in (_MAJOR, _MINOR) for tonic in range(12)])
_CHROMA_FFT, _CHROMA_HOP = 4096, 1024
# A seam is the middle of a span of 100 ms. Spans within 250 ms of a seam do not count as the rest of the piece.
_SEAM_FRAMES, _NEAR_SEAM_FRAMES = 5, 25


@typed
def exact_tempo(envelope: Tensor) -> float:
    """Tempo in bpm of an onset envelope `[f]` with 100 frames per second, NaN for a constant one.

    The lag of the largest autocorrelation is measured at multiples up to 4 s, of which a frame is a smaller part.
    """
    _, tempo = autocorrelation_peak(envelope)
    if not tempo > 0:
        return tempo
    centred = (envelope - envelope.mean()).double()
    spectrum = torch.fft.rfft(centred, n=2 * len(centred)).abs().square()
    correlation = torch.fft.irfft(spectrum)[: len(centred)].numpy()
    lag, multiple = 60.0 * _FRAMES_PER_SECOND / tempo, 1
    while multiple * lag < min(4 * _FRAMES_PER_SECOND, len(correlation) - 12):
        centre, reach = round(multiple * lag), max(1, round(0.1 * lag))
        best = centre - reach + int(correlation[centre - reach : centre + reach + 1].argmax())
        before, peak, after = correlation[best - 1 : best + 2]
        curvature = before - 2 * peak + after
        lag = (best + (0.5 * (before - after) / curvature if curvature < 0 else 0.0)) / multiple
        multiple *= 2
    return 60.0 * _FRAMES_PER_SECOND / lag


@typed
def key_of(chroma: np.ndarray) -> int:
    """Key of a chroma vector `[12]` from C by correlation with the profiles of Krumhansl: 0..11 major, 12..23 minor."""
    return int(np.corrcoef(chroma, _PROFILES)[0, 1:].argmax())


@torch.no_grad()
def tempo_metrics(name: str, waves: Tensor, sample_hz: int, part_seconds: float = 10.0) -> list[MetricValue]:
    """Share of the parts of a piece whose tempo is within 3% of the most common one, in any note value.

    Chance is the same share for pieces that are composed of parts of different pieces of `waves [b, n]`.
    """
    envelope = OnsetEnvelope()
    parts = _parts_of(waves, sample_hz, part_seconds)
    tempi = np.array([[exact_tempo(part) for part in envelope(piece)] for piece in parts])
    shares = [_share_of_common_tempo(row) for row in tempi]
    chance = float(np.mean([_share_of_common_tempo(row) for row in _exchanged(tempi)]))
    note = f"{part_seconds:g}-s parts"
    return [MetricValue.mean(f"long pieces / {name} / tempo within 3%", shares, chance, note)]


@torch.no_grad()
def key_metrics(name: str, waves: Tensor, sample_hz: int, part_seconds: float = 10.0) -> list[MetricValue]:
    """Share of the parts of a piece with the key of the whole piece, and the correlation of their chroma with the rest.

    Chance is the same for parts of other pieces of `waves [b, n]`.
    """
    filters = torch.from_numpy(chroma_filters(_SAMPLE_HZ, _CHROMA_FFT)).float()
    window = torch.hann_window(_CHROMA_FFT)
    chroma = []
    for piece in _parts_of(waves, sample_hz, part_seconds):
        spectrum = torch.stft(piece, _CHROMA_FFT, _CHROMA_HOP, window=window, return_complex=True)
        levels = filters @ spectrum.abs()
        chroma.append((levels / levels.amax(dim=1, keepdim=True).clamp(min=1e-6)).mean(dim=2).double().numpy())
    own, exchanged = np.stack(chroma), _exchanged(np.stack(chroma))
    values = []
    for measure, statistic in {"parts in the key of the piece": _share_in_key, "chroma of the rest": _likeness}.items():
        chance = float(np.mean([statistic(piece) for piece in exchanged]))
        values.append(
            MetricValue.mean(
                f"long pieces / {name} / {measure}", [statistic(piece) for piece in own], chance, f"{part_seconds:g} s"
            )
        )
    return values


def seams_of(model: "MusicLM", seconds: float) -> dict[str, list[float]]:
    """Times in seconds at which a window of each stage continues the window before it."""
    codec, semantic = model.audio_lm.codec, model.audio_lm.wav2vec
    num_samples = samples_covering(seconds, codec.downsample_factor, codec.target_sample_hz)
    seams = {}
    for name, stage in model.audio_lm.stages.items():
        rate = stage.layout.predicted[0].exact_hz
        semantic_frames = semantic.num_frames(round(seconds * semantic.target_sample_hz))
        num_frames = semantic_frames if name == "semantic" else num_samples // codec.downsample_factor
        longest, margin_frames = stage.window_frames, (stage.window_frames or 0) // MARGIN_DIVISOR
        windows = plan_windows(num_frames, longest, stage.layout.frame_alignment, margin_frames=margin_frames)
        seams[name] = [float(window.stop / rate) for window in windows[:-1]]
    return seams


@torch.no_grad()
def seam_metrics(waves: Tensor, sample_hz: int, seams: dict[str, list[float]]) -> list[MetricValue]:
    """Where the seams of `waves [b, n]` are in the distribution of equal spans of the rest of the same piece.

    For the level, its largest step and the largest spectral flux: the mean percentile of the seams, and the share of
    seams between the 5th and the 95th percentile. Seams like the rest have 0.5 and 0.9.
    """
    mel = MelSpectrogram(sample_hz=_SAMPLE_HZ, n_fft=1024, hop_length=_SAMPLE_HZ // _FRAMES_PER_SECOND, num_mels=64)
    energy = mel(resample(waves, sample_hz, _SAMPLE_HZ))
    curves = {"level": (energy.square().mean(dim=1) + 1e-6).log(), **_changes(energy)}
    all_seams = sorted({time for times in seams.values() for time in times})
    values = []
    for measure, curve in curves.items():
        pool = np.mean if measure == "level" else np.max
        spans = np.lib.stride_tricks.sliding_window_view(curve.numpy(), 2 * _SEAM_FRAMES + 1, axis=1)
        pooled = pool(spans, axis=2)  # column i has its middle at frame i + _SEAM_FRAMES
        middles = np.arange(pooled.shape[1]) + _SEAM_FRAMES
        frames = np.array([time * _FRAMES_PER_SECOND for time in all_seams])
        is_rest = (np.abs(middles[:, None] - frames).min(axis=1) > _NEAR_SEAM_FRAMES) if len(frames) else middles >= 0
        for stage, times in seams.items():
            columns = [round(time * _FRAMES_PER_SECOND) - _SEAM_FRAMES for time in times]
            if not columns:
                continue
            percentiles = np.stack([(row[is_rest] < row[columns, None]).mean(axis=1) for row in pooled])
            inside = (percentiles >= 0.05) & (percentiles <= 0.95)
            prefix, note = f"seams / {stage} / {measure}", f"{len(columns)} seams a piece"
            values.append(MetricValue.mean(f"{prefix}, percentile", percentiles.mean(axis=1), 0.5, note))
            values.append(MetricValue.mean(f"{prefix}, within 5 to 95", inside.mean(axis=1), 0.9, note))
    return values


def _parts_of(waves: Tensor, sample_hz: int, part_seconds: float) -> list[Tensor]:
    """Cut pieces `[b, n]` into parts `[parts, n]` at 16 kHz; a shorter rest is dropped."""
    resampled = resample(waves, sample_hz, _SAMPLE_HZ)
    num_samples = round(part_seconds * _SAMPLE_HZ)
    return [piece.unfold(0, num_samples, num_samples) for piece in resampled]


def _exchanged(values: np.ndarray) -> np.ndarray:
    """Move part i of every piece `[b, parts, ...]` to the piece i places later."""
    return np.stack([np.roll(values[:, part], part, axis=0) for part in range(values.shape[1])], axis=1)


def _share_of_common_tempo(tempi: np.ndarray) -> float:
    """Share of tempi that are equal within 3%, up to a ratio of note values, to the tempo that most of them equal."""
    ratios = tempi[:, None, None] / (tempi[None, :, None] * _METRES)
    return float((np.abs(ratios - 1) <= _MAX_TEMPO_CHANGE).any(axis=2).mean(axis=0).max())


def _share_in_key(chroma: np.ndarray) -> float:
    key = key_of(chroma.mean(axis=0))
    return float(np.mean([key_of(part) == key for part in chroma]))


def _likeness(chroma: np.ndarray) -> float:
    """Mean correlation of the chroma vector of a part with the mean of the other parts."""
    total = chroma.sum(axis=0)
    return float(np.mean([np.corrcoef(part, total - part)[0, 1] for part in chroma]))


def _changes(energy: Tensor) -> dict[str, Tensor]:
    """Steps of the level within 50 ms, and spectral flux within 20 ms, of mel amplitudes `[b, m, f]`."""
    changes = {}
    for name, reach, curve in (
        ("level step", 5, (energy.square().mean(dim=1, keepdim=True) + 1e-6).log()),
        ("spectral flux", 2, (energy + 0.1).log()),
    ):
        change = torch.zeros(len(energy), energy.shape[2])
        half = reach // 2
        change[:, half : half + energy.shape[2] - reach] = (curve[..., reach:] - curve[..., :-reach]).abs().mean(dim=1)
        changes[name] = change
    return changes
