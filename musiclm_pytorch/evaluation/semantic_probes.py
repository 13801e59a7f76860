"""Linear probes of encoder layers and of semantic tokens, with labels from any manifest.

A linear probe measures which labels a linear classifier can read from frozen features (Alain & Bengio,
arXiv:1610.01644). Log-mel frames are the baseline features of the probes.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.manifest import AudioItem, load_split
from audiolm_pytorch.nn.module_state import device_of, eval_mode
from audiolm_pytorch.semantic.base import FrameEncoder, SemanticTokenizer
from musiclm_pytorch.evaluation.report import MetricValue, aligned_table

__all__ = [
    "Features",
    "ProbeClips",
    "evaluate_semantic",
    "event_classes",
    "kmeans_features",
    "layer_features",
    "load_probe_clips",
    "log_mel_features",
    "probe",
    "probe_table",
    "token_features",
]

_MEL_BANDS, _MEL_WINDOW_SECONDS, _MEL_FLOOR = 80, 0.064, 1e-2
# Neighbouring frames are alike: more frames per clip cost memory and add little.
_MAX_FRAMES_PER_CLIP = 50
_MAX_KMEANS_FRAMES = 60_000
_MAX_ITERATIONS = 500


@dataclass(frozen=True)
class ProbeClips:
    """Training clips and held-out test clips for linear probes."""

    train: list[AudioItem]
    test: list[AudioItem]


@dataclass(frozen=True)
class Features:
    """Features of all clips, one array per clip: frames `[f, d]` float32, or token ids `[f]` below `num_tokens`."""

    name: str
    train: list[np.ndarray]
    test: list[np.ndarray]
    seconds_per_frame: float
    num_tokens: int | None = None


@typed
def load_probe_clips(data: str | Path, min_seconds: float, limit: int, seed: int = 0) -> ProbeClips:
    """Select up to `limit` random training clips and `limit` test clips of `min_seconds` or more (see `load_split`)."""
    rng = Random(seed)
    train, test = (rng.sample(side, min(limit, len(side))) for side in load_split(data, min_seconds=min_seconds))
    if not train or not test:
        raise ValueError(f"{data}: need training and test clips, got {len(train)} training and {len(test)} test clips")
    return ProbeClips(train, test)


@typed
def evaluate_semantic(
    clips: ProbeClips,
    labels: Sequence[str],
    encoder: FrameEncoder | None = None,
    tokenizer: SemanticTokenizer | None = None,
    layers: Sequence[int] = (),
    clusters: Sequence[int] = (),
    seed: int = 0,
    announce: Callable[[str], None] = lambda words: None,
) -> list[MetricValue]:
    """Measure linear probes of log-mel frames, encoder layers, k-means clusters of these features, and semantic tokens.

    Each metric is named `FEATURES / LABEL`, for example `layer 9 / genre`; see `probe` for the labels. Layer 0 is the
    input of the first encoder layer. Each number in `clusters` is a number of k-means clusters for every set of frames.
    `announce` receives the name of each set of features before the features are probed.
    """
    metrics: list[MetricValue] = []

    def add(features: Features) -> None:
        announce(features.name)
        metrics.extend(probe(features, clips, label) for label in labels)
        if features.num_tokens is None:
            for num_clusters in clusters:
                add(kmeans_features(features, num_clusters, seed))

    # One kind of features at a time: the layers of all clips may not fit into memory together.
    if encoder is not None:
        add(log_mel_features(clips, encoder.sample_hz, encoder.downsample_factor))
        for layer in layers:
            add(layer_features(encoder, clips, layer))
    elif tokenizer is not None:
        add(log_mel_features(clips, tokenizer.target_sample_hz, tokenizer.downsample_factor))
    if tokenizer is not None:
        add(token_features(tokenizer, clips))
    return metrics


@torch.no_grad()
def log_mel_features(clips: ProbeClips, sample_hz: int, hop_samples: int) -> Features:
    """Compute the log-mel frames of all clips, one frame for every `hop_samples` samples."""
    window_samples = 2 * round(_MEL_WINDOW_SECONDS * sample_hz / 2)
    mel = MelSpectrogram(
        sample_hz=sample_hz, n_fft=window_samples, hop_length=hop_samples, num_mels=_MEL_BANDS, center=False
    )

    def frames(wave: Tensor) -> Tensor:
        padded = F.pad(wave, ((window_samples - hop_samples) // 2, window_samples))
        return mel(padded).T.clamp(min=_MEL_FLOOR).log()[: len(wave) // hop_samples]

    return _features("log-mel", clips, frames, sample_hz, hop_samples)


@torch.no_grad()
def layer_features(encoder: FrameEncoder, clips: ProbeClips, layer: int) -> Features:
    """Compute the hidden states of all clips after one encoder layer."""
    device = device_of(encoder)
    with eval_mode(encoder):
        return _features(
            f"layer {layer}",
            clips,
            lambda wave: encoder.features(wave[None].to(device), None, layer)[0][0].float().cpu(),
            encoder.sample_hz,
            encoder.downsample_factor,
        )


@torch.no_grad()
def token_features(tokenizer: SemanticTokenizer, clips: ProbeClips) -> Features:
    """Compute all token ids of all clips; the tokenizer's `seq_len_multiple_of` is ignored."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.seq_len_multiple_of = None
    device = device_of(tokenizer)
    with eval_mode(tokenizer):
        return _features(
            "tokens",
            clips,
            lambda wave: tokenizer.forward(wave[None].to(device))[0].cpu(),
            tokenizer.target_sample_hz,
            tokenizer.downsample_factor,
            tokenizer.codebook_size,
        )


def _features(
    name: str,
    clips: ProbeClips,
    frames: Callable[[Tensor], Tensor],
    sample_hz: int,
    hop_samples: int,
    num_tokens: int | None = None,
) -> Features:
    """Read the clips at `sample_hz`, and call `frames` with the wave `[n]` of each clip."""
    train, test = ([frames(item.read(sample_hz)[0]).numpy() for item in side] for side in (clips.train, clips.test))
    if not all(np.isfinite(part).all() for part in (*train, *test)):
        raise ValueError(f"{name}: the features contain NaN or infinity; train the encoder again")
    return Features(name, train, test, hop_samples / sample_hz, num_tokens)


@typed
def kmeans_features(features: Features, num_clusters: int, seed: int = 0) -> Features:
    """Replace frames by cluster ids of a k-means model that is fitted to standardised frames of the training clips."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    frames = np.concatenate(features.train)
    if num_clusters > len(frames):
        raise ValueError(
            f"{num_clusters} clusters need at least {num_clusters} training frames, got {len(frames)}; use more clips"
        )
    rows = np.random.default_rng(seed).permutation(len(frames))[:_MAX_KMEANS_FRAMES]
    kmeans = make_pipeline(StandardScaler(), MiniBatchKMeans(num_clusters, n_init=1, random_state=seed))
    kmeans.fit(frames[rows])
    train, test = ([kmeans.predict(part) for part in side] for side in (features.train, features.test))
    name = f"{features.name}, {num_clusters} clusters"
    return Features(name, train, test, features.seconds_per_frame, num_clusters)


@typed
def probe(features: Features, clips: ProbeClips, label: str) -> MetricValue:
    """Train a linear classifier of a label on the training clips, and measure its accuracy on the held-out clips.

    If the label is a text, number or boolean per clip, the model classifies the mean frame or the token frequencies of
    a clip. If the label is a list of events `[start_seconds, end_seconds, name]`, the model classifies single frames.
    Clips without the label are left out. The chance level is the share of the most frequent class in the test clips.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    inputs, truth, _ = _examples(features, features.train, clips.train, label)
    test_inputs, test_truth, clip_index = _examples(features, features.test, clips.test, label)
    if len(set(truth)) < 2 or not len(test_truth):
        raise ValueError(
            f"label {label!r} needs two classes in the training clips and one held-out example, got classes "
            f"{sorted(set(truth))[:10]} and {len(test_truth)} held-out examples; the manifest has the labels "
            f"{sorted(set().union(*(item.labels for item in clips.train)))}"
        )
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS))
    is_right = classifier.fit(inputs, truth).predict(test_inputs) == test_truth
    totals = np.bincount(clip_index)
    right = np.bincount(clip_index, weights=is_right)[totals > 0]
    totals = totals[totals > 0]
    chance = float(np.unique(test_truth, return_counts=True)[1].max() / len(test_truth))
    note = f"{len(set(truth))} classes, {len(test_truth)} examples"

    def accuracy(rows: np.ndarray) -> float:
        return float(right[rows].sum() / totals[rows].sum())

    return MetricValue.measured(f"{features.name} / {label}", accuracy, len(right), chance, note)


def _examples(
    features: Features, frames: list[np.ndarray], items: list[AudioItem], label: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return classifier inputs `[m, d]`, with the class `[m]` (a text) and the clip index `[m]` of each input."""
    inputs: list[np.ndarray] = [np.zeros((0, 0))]
    truth: list[str] = []
    clip_index: list[int] = []
    for clip, (item, part) in enumerate(zip(items, frames)):
        value = item.labels.get(label)
        if value is None or not len(part):
            continue
        if features.num_tokens is not None:
            part = F.one_hot(torch.from_numpy(part).long(), features.num_tokens).float().numpy()
        if isinstance(value, list):
            classes = event_classes(value, len(part), features.seconds_per_frame)
            known = np.flatnonzero(classes != "")
            rows = known[:: -(-len(known) // _MAX_FRAMES_PER_CLIP) or 1]
            inputs.append(part[rows])
            truth.extend(classes[rows])
        else:
            inputs.append(part.mean(axis=0, keepdims=True))
            truth.append(str(value))
        clip_index.extend([clip] * len(inputs[-1]))
    return np.concatenate(inputs[1:] or inputs), np.array(truth), np.array(clip_index, dtype=int)


@typed
def event_classes(events: Sequence[Any], num_frames: int, seconds_per_frame: float) -> np.ndarray:
    """Return the name `[f]` of the event at the middle of each frame, or "" for a frame without an event.

    An event is `[start_seconds, end_seconds, name]`; if events overlap, the event that starts last is used.
    """
    middles = (np.arange(num_frames) + 0.5) * seconds_per_frame
    classes = np.full(num_frames, "", dtype=object)
    try:
        for start, end, name in sorted(events, key=lambda event: float(event[0])):
            classes[(middles >= start) & (middles < end)] = str(name)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"events must be lists [start_seconds, end_seconds, name], got {events[:3]}") from error
    return classes


@typed
def probe_table(metrics: Sequence[MetricValue]) -> str:
    """Format probe accuracies in percent as a Markdown table, with a row per feature set and a column per label."""
    names = [metric.name.split(" / ", 1) for metric in metrics]
    labels = list(dict.fromkeys(label for _, label in names))
    chance = {label: f"{100 * (metric.chance or 0):.1f}" for (_, label), metric in zip(names, metrics)}
    lines: dict[str, dict[str, str]] = {"chance": chance}
    for (features, label), metric in zip(names, metrics):
        lines.setdefault(features, {})[label] = metric.text(1, scale=100)
    return aligned_table([["features", *labels], *([name, *cells.values()] for name, cells in lines.items())])
