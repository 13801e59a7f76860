"""How much of melody and speech an encoder's layers hold, and the tokens cut from them, beside plain log-mel frames.

Three readings of the same frames. Linear probes on every layer: the pitch class that sounds at the frame's centre and
whether a note starts in it (rendered clips), and the digit and speaker of the clip (spoken digits). One k-means token
a frame: the class that each token meets most often. Histograms of tokens: what a clip holds, read from how often each
token occurs in it. The tokens that a tokenizer gives itself are read in the same way.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from beartype import beartype
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.nn.kmeans import cluster_epoch, first_centroids, nearest_centroid, vector_statistics
from audiolm_pytorch.nn.module_state import device_of, eval_mode
from audiolm_pytorch.semantic.base import FrameEncoder, SemanticTokenizer
from musiclm_pytorch.evaluation.probes import fit_linear_probe, histogram, token_probe
from musiclm_pytorch.evaluation.semantic_data import (
    FrameGrid,
    ProbeClip,
    ProbeSet,
    onset_labels,
    pitch_class_labels,
)
from musiclm_pytorch.evaluation.semantic_scores import Reading, Score
from musiclm_pytorch.evaluation.semantic_views import (
    Sound,
    View,
    grid_of_tokens,
    uncut,
    vectors_of,
    view_of_tokens,
    views_of,
)

__all__ = ["SemanticCheck", "check_semantic", "check_tokens"]

# Frames of a wave of so many samples.
FrameCounts = Callable[[int], int]

# Frames of one view that are held at a time: 2**27 float32 are 512 MiB. Probes work on a copy or two of a part of them.
_MOST_VALUES = 2**27
# K-means learns from three parts of music and one of speech, about as the encoder did, and from no more than it needs.
_MUSIC_SHARE = 0.75
_MOST_KMEANS_FRAMES = 60_000
_KMEANS_EPOCHS = 5
_HISTOGRAM_L2 = 1e-3


@dataclass(frozen=True)
class SemanticCheck:
    """What was measured.

    Attributes:
        scores: Of every view: linear probes, then tokens and histograms for every number of clusters.
        num_clips: Clips by sound and side, e.g. "music, train".
        num_frames: Frames by sound and side.
        num_kmeans_frames: Frames that k-means learned from; 0 where there is none, as with a tokenizer's own tokens.
    """

    scores: list[Score]
    num_clips: dict[str, int]
    num_frames: dict[str, int]
    num_kmeans_frames: int


@beartype
def check_semantic(
    encoder: nn.Module,
    music: ProbeSet,
    speech: ProbeSet,
    layers: Sequence[int],
    clusters: Sequence[int],
    seed: int = 0,
    announce: Callable[[str], None] | None = None,
) -> SemanticCheck:
    """Fit all probes on the training clips and try them on the test clips.

    Args:
        encoder: A `FrameEncoder` module; used in eval mode, where it is.
        music: Clips with a melody, at the encoder's rate.
        speech: Clips with digit and speaker, at the encoder's rate.
        layers: Layers to look into, each in 0..depth.
        clusters: Numbers of k-means clusters.
        seed: Of k-means and of the frames it learns from.
        announce: Told what is done, and how long it took.

    Returns:
        Scores of log-mel frames, of the encoder's own front end where it has one, and of the layers.

    Raises:
        TypeError: If the encoder is no `FrameEncoder`.
        ValueError: If there is no such layer, there are too few frames, or features are not finite.
    """
    if not isinstance(encoder, FrameEncoder):
        raise TypeError(f"{type(encoder).__name__} is no FrameEncoder: see audiolm_pytorch.semantic.base")
    wrong = [layer for layer in layers if not 0 <= layer <= encoder.depth]
    if wrong or not layers:
        raise ValueError(f"there is no layer {wrong or ''}: this encoder has layers 0..{encoder.depth}")
    grid = FrameGrid.of(encoder)
    views = views_of(encoder, grid, layers)
    sounds = _sounds(music, speech, encoder.num_frames, grid, max(view.width for view in views))
    chosen = _kmeans_frames(len(sounds["music, train"].clip_index), len(sounds["speech, train"].clip_index), seed)
    num_kmeans_frames = sum(map(len, chosen))
    if clusters and not 2 <= min(clusters) <= max(clusters) <= num_kmeans_frames:
        raise ValueError(
            f"k must lie in 2..{num_kmeans_frames}, the training frames there are, got {list(clusters)}; "
            "ask for fewer clusters, or for more clips"
        )
    device = device_of(encoder)
    scores: list[Score] = []
    with eval_mode(encoder):
        for view in views:
            start = time.perf_counter()
            scores += _scores_of(view, sounds, chosen, clusters, seed, device)
            if announce is not None:
                announce(f"{view.name}: {time.perf_counter() - start:.0f} s")
    return _check_of(scores, sounds, num_kmeans_frames)


@beartype
def check_tokens(tokenizer: nn.Module, music: ProbeSet, speech: ProbeSet) -> SemanticCheck:
    """Read the tokens that a tokenizer gives itself, without its cut of lengths, in the ways of k-means tokens.

    Args:
        tokenizer: A `SemanticTokenizer` module; used in eval mode, where it is.
        music: Clips with a melody, at the tokenizer's rate.
        speech: Clips with digit and speaker, at the tokenizer's rate.

    Returns:
        Scores of tokens and histograms under the name `own tokens`, with `codebook_size` clusters.

    Raises:
        TypeError: If it is no `SemanticTokenizer`.
        ValueError: If it gives no tokens, or ids outside its codebook.
    """
    if not isinstance(tokenizer, SemanticTokenizer):
        raise TypeError(f"{type(tokenizer).__name__} is no SemanticTokenizer: see audiolm_pytorch.semantic.base")
    device = device_of(tokenizer)
    codebook_size = tokenizer.codebook_size
    with eval_mode(tokenizer):
        whole = uncut(tokenizer)
        view = view_of_tokens(whole)
        sounds = _sounds(music, speech, whole.num_frames, grid_of_tokens(whole), view.width)
        ids = {name: vectors_of(view, sound, device)[:, 0].long() for name, sound in sounds.items()}
    if any(int(part.min()) < 0 or int(part.max()) >= codebook_size for part in ids.values()):
        raise ValueError(f"{type(tokenizer).__name__} gives ids outside 0..{codebook_size - 1}: it is broken")
    return _check_of(list(_token_scores(view.name, codebook_size, sounds, ids)), sounds, 0)


def _check_of(scores: list[Score], sounds: dict[str, Sound], num_kmeans_frames: int) -> SemanticCheck:
    """Scores, and what they were measured on."""
    num_clips = {name: len(sound.waves) for name, sound in sounds.items()}
    num_frames = {name: sum(sound.num_frames) for name, sound in sounds.items()}
    return SemanticCheck(scores, num_clips, num_frames, num_kmeans_frames)


def _sounds(
    music: ProbeSet, speech: ProbeSet, num_frames: FrameCounts, grid: FrameGrid, width: int
) -> dict[str, Sound]:
    """Frames and labels of both sides of both kinds, with as many training clips as memory admits."""
    sides = {"music, train": music.train, "music, test": music.test}
    sides |= {"speech, train": speech.train, "speech, test": speech.test}
    classes = {
        name: sorted({clip.labels[name] for clip in (*where.train, *where.test)})
        for name, where in (("instrument", music), ("digit", speech), ("speaker", speech))
    }
    sounds = {name: _sound(clips, num_frames, grid, classes) for name, clips in sides.items()}
    needed = {name: width * sum(sound.num_frames) for name, sound in sounds.items()}
    room = _MOST_VALUES - needed["music, test"] - needed["speech, test"]
    share = room / (needed["music, train"] + needed["speech, train"])
    if share >= 1:
        return sounds
    kept = {name: int(share * len(sides[name])) for name in ("music, train", "speech, train")}
    if min(kept.values()) < 1:
        raise ValueError(f"the frames of {len(music.test)} test clips of width {width} do not fit; ask for fewer clips")
    return sounds | {name: _sound(sides[name][:count], num_frames, grid, classes) for name, count in kept.items()}


def _sound(
    clips: Sequence[ProbeClip], num_frames: FrameCounts, grid: FrameGrid, classes: dict[str, list[str]]
) -> Sound:
    """Waves, frame counts and labels of some clips; what is shorter than a frame is completed with silence."""
    waves = [F.pad(clip.wave, (0, max(0, grid.shortest_samples - len(clip.wave)))) for clip in clips]
    counts = [num_frames(len(wave)) for wave in waves]
    names = clips[0].labels.keys()
    clip_labels = {name: torch.tensor([classes[name].index(clip.labels[name]) for clip in clips]) for name in names}
    per_frame = torch.tensor(counts)
    frame_labels = {
        name: labels.repeat_interleave(per_frame) for name, labels in clip_labels.items() if name != "instrument"
    }
    if any(clip.notes for clip in clips):
        pairs = [(clip.notes, grid, count) for clip, count in zip(clips, counts)]
        frame_labels["pitch class"] = torch.cat([pitch_class_labels(*pair) for pair in pairs])
        frame_labels["onset"] = torch.cat([onset_labels(*pair) for pair in pairs])
    return Sound(waves, counts, frame_labels, clip_labels)


def _kmeans_frames(num_music: int, num_speech: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training frames of music and of speech that k-means learns from."""
    total = min(_MOST_KMEANS_FRAMES, int(num_music / _MUSIC_SHARE), int(num_speech / (1 - _MUSIC_SHARE)))
    generator = torch.Generator().manual_seed(seed)
    counts = (num_music, round(total * _MUSIC_SHARE)), (num_speech, round(total * (1 - _MUSIC_SHARE)))
    first, second = (torch.randperm(there, generator=generator)[:wanted] for there, wanted in counts)
    return first, second


def _scores_of(
    view: View,
    sounds: dict[str, Sound],
    chosen: tuple[Tensor, Tensor],
    clusters: Sequence[int],
    seed: int,
    device: torch.device,
) -> list[Score]:
    """All readings of one view, whose frames are held no longer than that."""
    vectors = {name: vectors_of(view, sound, device) for name, sound in sounds.items()}
    scores = [
        _linear_score(view.name, probe, kind, sounds, vectors)
        for kind, probe in (("music", "pitch class"), ("music", "onset"), ("speech", "digit"), ("speech", "speaker"))
    ]
    if not clusters:
        return scores
    pairs = zip(("music, train", "speech, train"), chosen)
    sample = torch.cat([vectors[name][rows] for name, rows in pairs])
    mean, std = (torch.from_numpy(moment) for moment in vector_statistics(_InMemory(sample.numpy()), 1, seed)[:2])
    for part in (sample, *vectors.values()):
        part.sub_(mean).div_(std)
    for num_clusters in clusters:
        centroids = _cluster(sample, num_clusters, seed)
        ids = {name: nearest_centroid(part, centroids) for name, part in vectors.items()}
        scores += _token_scores(view.name, num_clusters, sounds, ids)
    return scores


def _linear_score(view: str, probe: str, kind: str, sounds: dict[str, Sound], vectors: dict[str, Tensor]) -> Score:
    """Fit a linear probe on training frames and try it on test frames; rare onsets count as much as the rest."""
    train, test = sounds[f"{kind}, train"], sounds[f"{kind}, test"]
    labels = train.frame_labels[probe]
    asked = labels >= 0
    labels, num_classes = labels[asked], _num_classes(probe, kind, sounds)
    balanced = probe == "onset"
    shares = labels.bincount(minlength=num_classes) / len(labels)
    weights = 1 / (num_classes * shares.clamp(min=1e-6)) if balanced else None
    fitted = fit_linear_probe(vectors[f"{kind}, train"][asked], labels, num_classes, class_weights=weights)
    asked = test.frame_labels[probe] >= 0
    answers = fitted.predict(vectors[f"{kind}, test"][asked])
    truth, clip_index = test.frame_labels[probe][asked], test.clip_index[asked]
    return Score.of(view, Reading.LINEAR, probe, None, truth, answers, clip_index, len(test.waves), balanced=balanced)


def _token_scores(view: str, num_clusters: int, sounds: dict[str, Sound], ids: dict[str, Tensor]) -> Iterator[Score]:
    """What one token tells of its frame, and what the histogram of a clip's tokens tells of the clip."""
    for kind, probe in (("music", "pitch class"), ("speech", "digit"), ("speech", "speaker")):
        train, test = sounds[f"{kind}, train"], sounds[f"{kind}, test"]
        asked, asked_test = train.frame_labels[probe] >= 0, test.frame_labels[probe] >= 0
        num_classes = _num_classes(probe, kind, sounds)
        meanings = token_probe(
            ids[f"{kind}, train"][asked], train.frame_labels[probe][asked], num_clusters, num_classes
        )
        answers = meanings.predict(ids[f"{kind}, test"][asked_test])
        truth, clip_index = test.frame_labels[probe][asked_test], test.clip_index[asked_test]
        yield Score.of(view, Reading.TOKEN, probe, num_clusters, truth, answers, clip_index, len(test.waves))
    for kind, probe in (("speech", "digit"), ("speech", "speaker"), ("music", "instrument")):
        bags = []
        for side in ("train", "test"):
            parts = ids[f"{kind}, {side}"].split(sounds[f"{kind}, {side}"].num_frames)
            bags.append(histogram(pad_sequence(list(parts), batch_first=True, padding_value=-1), num_clusters))
        labels, truth = (sounds[f"{kind}, {side}"].clip_labels[probe] for side in ("train", "test"))
        fitted = fit_linear_probe(bags[0], labels, _num_classes(probe, kind, sounds), l2=_HISTOGRAM_L2)
        clips = torch.arange(len(truth))
        answers = fitted.predict(bags[1])
        yield Score.of(view, Reading.HISTOGRAM, probe, num_clusters, truth, answers, clips, len(truth))


def _num_classes(probe: str, kind: str, sounds: dict[str, Sound]) -> int:
    """Classes of a probe: fixed for notes, otherwise those that occur on either side."""
    fixed = {"pitch class": 12, "onset": 2}
    if probe in fixed:
        return fixed[probe]
    return 1 + max(int(sounds[f"{kind}, {side}"].clip_labels[probe].max()) for side in ("train", "test"))


class _InMemory:
    """Vectors as the k-means job reads them."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors

    @property
    def num_vectors(self) -> int:
        return len(self._vectors)

    def portions(self, order: tuple[int, ...] | None = None) -> Iterator[np.ndarray]:
        rows = (
            np.arange(self.num_vectors) if order is None else np.random.default_rng(order).permutation(self.num_vectors)
        )
        yield self._vectors[rows]


def _cluster(vectors: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Centroids `[k, d]` of normalised vectors, as the k-means job finds them, in fewer epochs."""
    source = _InMemory(vectors.numpy())
    centroids = first_centroids(vector_statistics(source, num_clusters, seed).start, num_clusters, seed)
    for epoch in range(_KMEANS_EPOCHS):
        centroids = cluster_epoch(source, centroids, (seed, epoch))
    return torch.from_numpy(centroids)
