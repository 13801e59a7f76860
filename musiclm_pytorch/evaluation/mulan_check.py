"""What a joint embedding knows of held-out clips: retrieval in both directions, zero-shot tags, and the top clips."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from beartype import beartype
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.nn.module_state import device_of
from musiclm_pytorch.evaluation.report import Metric, accuracy_statistic
from musiclm_pytorch.evaluation.retrieval import Retrieval, different_captions, retrieval_both
from musiclm_pytorch.evaluation.tagging import (
    TagTest,
    auc_statistic,
    recall_statistic,
    tag_scores,
    tag_tests,
    zero_shot_similarities,
)
from musiclm_pytorch.mulan.captions import texts_of
from musiclm_pytorch.mulan.joint import JointEmbedding

__all__ = [
    "MuLaNCheck",
    "check_metrics",
    "check_mulan",
    "embed_items",
    "held_out_items",
    "modality_gap",
    "top_clip_metrics",
    "values_of_texts",
]

_CLIPS_AT_ONCE = 16
_TEXTS_AT_ONCE = 50


@dataclass(frozen=True)
class MuLaNCheck:
    """Clips and texts in one space, and what is true of them.

    Attributes:
        audio: `[c, d]` latents of the clips, on the CPU.
        texts: The t different captions; where there are none, the prompts of the first label.
        text: `[t, d]` their latents.
        relevant: `[t, c]` bool: which clips a text describes.
        are_captions: Whether the texts are captions.
        tests: The labels that can be tags, with the true class of every clip.
        prompted: For each of the tests `[c, classes]`, similarities of clips to its prompts.
    """

    audio: Tensor
    texts: list[str]
    text: Tensor
    relevant: Tensor
    are_captions: bool
    tests: list[TagTest]
    prompted: list[Tensor]

    @property
    def similarities(self) -> Tensor:
        """Cosines `[t, c]` of texts and clips."""
        return self.text @ self.audio.T

    @property
    def retrievals(self) -> dict[str, Retrieval]:
        """How "text to audio" and "audio to text" fared."""
        return retrieval_both(self.audio, self.text, self.relevant)


@beartype
def held_out_items(data: str | Path, limit: int | None = None, seed: int = 0) -> list[AudioItem]:
    """Choose the clips to measure on.

    Args:
        data: Folder with a `valid.jsonl`, which is used then; or anything that `load_items` takes.
        limit: Use only so many of them, chosen at random.
        seed: Of that choice.

    Returns:
        The clips in the order of their manifest.

    Raises:
        ValueError: As `load_items`, or if there are not at least two clips, or the limit is below two.
    """
    data = Path(data)
    if limit is not None and limit < 2:
        raise ValueError(f"the limit must leave at least 2 clips to tell apart, got {limit}")
    held_out = data / "valid.jsonl"
    items = load_items(held_out if held_out.is_file() else data).items
    if len(items) < 2:
        raise ValueError(f"{data}: need at least 2 clips to tell apart, got {len(items)}")
    if limit is not None and limit < len(items):
        items = [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), limit))]
    return items


@beartype
@torch.no_grad()
def embed_items(mulan: JointEmbedding, items: Sequence[AudioItem], batch_size: int = _CLIPS_AT_ONCE) -> Tensor:
    """Embed audio files of any length.

    Args:
        mulan: In eval mode.
        items: Files of a manifest.
        batch_size: Files at once.

    Returns:
        `[c, d]` float32 on the CPU.

    Raises:
        ValueError: If a latent is NaN or infinite.
    """
    device = device_of(mulan)
    latents = torch.empty(len(items), mulan.dim_latent)
    # Clips of like length go together, so that little is computed for padding.
    order = sorted(range(len(items)), key=lambda index: items[index].num_samples / items[index].sample_hz)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        waves = [read_audio(items[row].path, mulan.sample_hz)[0][0] for row in rows]
        lengths = torch.tensor([len(wave) for wave in waves], device=device)
        padded = pad_sequence(waves, batch_first=True).to(device)
        latents[rows] = mulan.get_long_audio_latents(padded, lengths).float().cpu()
    return _finite(latents, "clips")


@torch.no_grad()
def _embed_texts(mulan: JointEmbedding, texts: Sequence[str]) -> Tensor:
    """Latents `[t, d]` of texts, on the CPU."""
    parts = [list(texts[first : first + _TEXTS_AT_ONCE]) for first in range(0, len(texts), _TEXTS_AT_ONCE)]
    return _finite(torch.cat([mulan.get_text_latents(part).float().cpu() for part in parts]), "texts")


def _finite(latents: Tensor, what: str) -> Tensor:
    if not latents.isfinite().all():
        raise ValueError(f"the model gives NaN or infinity for {what}: it is broken; train it again")
    return latents


@beartype
def check_mulan(
    mulan: JointEmbedding, items: Sequence[AudioItem], announce: Callable[[str], None] = lambda words: None
) -> MuLaNCheck:
    """Embed clips, their captions, and prompts for their labels.

    Args:
        mulan: In eval mode.
        items: Held-out clips.
        announce: Told what is being done.

    Returns:
        What metrics and pictures are made of.

    Raises:
        ValueError: If the clips have neither two different captions nor a label that can be a tag.
    """
    tests = tag_tests(items)
    texts, relevant = different_captions([texts_of(item) for item in items])
    are_captions = len(texts) > 1
    if not are_captions:
        if not tests:
            raise ValueError(
                f"{len(items)} clips have neither two different captions nor a label of a few values; give a manifest "
                "with 'caption', or with a label such as 'instrument'"
            )
        texts = list(tests[0].prompts)
        relevant = torch.arange(len(texts))[:, None] == tests[0].truth[None, :]
    announce(f"embedding {len(items)} clips")
    audio = embed_items(mulan, items)
    announce(f"embedding {len(texts)} texts and the prompts of {len(tests)} labels")
    text = _embed_texts(mulan, texts)
    prompted = [zero_shot_similarities(mulan, audio, test.prompts) for test in tests]
    return MuLaNCheck(audio, texts, text, relevant, are_captions, tests, prompted)


@beartype
def check_metrics(check: MuLaNCheck) -> list[Metric]:
    """Measure everything, each metric beside chance and with its bootstrap interval.

    Args:
        check: As `check_mulan` gives it.

    Returns:
        `retrieval / ...` in both directions, `tagging / LABEL / ...`, `top clip / LABEL / ...` and `latents / ...`.
    """
    metrics = [metric for name, found in check.retrievals.items() for metric in found.metrics(f"retrieval / {name}")]
    for test, similarities in zip(check.tests, check.prompted):
        metrics += _tag_metrics(f"tagging / {test.label}", test, similarities)
    if check.are_captions:  # of prompts of one label, its tagging says the same
        metrics += top_clip_metrics("top clip", check.similarities, check.relevant, check.tests)
    return metrics + _latent_metrics(check)


def _tag_metrics(name: str, test: TagTest, similarities: Tensor) -> list[Metric]:
    """Area under the ROC curve and balanced accuracy of one label."""
    count = int((test.truth >= 0).sum())
    chance = tag_scores(similarities, test.truth).chance
    note = f"{len(test.values)} classes"
    return [
        Metric.measured(f"{name} / AUC", auc_statistic(similarities, test.truth), count, 0.5, note),
        Metric.measured(f"{name} / balanced accuracy", recall_statistic(similarities, test.truth), count, chance, note),
    ]


@beartype
def values_of_texts(truth: Tensor, relevant: Tensor) -> Tensor:
    """Say which class the clips of each text belong to.

    Args:
        truth: `[c]` int64 class of each clip; -1 = unknown.
        relevant: `[t, c]` bool: which clips a text describes.

    Returns:
        `[t]` int64; -1 where the clips of a text differ, or one is unknown: the text does not say.
    """
    highest = truth.expand_as(relevant).masked_fill(~relevant, -1).amax(dim=1)
    lowest = truth.expand_as(relevant).masked_fill(~relevant, int(truth.max())).amin(dim=1)
    return torch.where(highest == lowest, highest, -1)


@beartype
def top_clip_metrics(name: str, similarities: Tensor, relevant: Tensor, tests: Sequence[TagTest]) -> list[Metric]:
    """Ask whether the clip that lies nearest to a caption has the attributes of the clips that the caption describes.

    Args:
        name: Beginning of the metrics' names.
        similarities: `[t, c]`, captions by clips.
        relevant: `[t, c]` bool: which clips a caption describes.
        tests: Labels with the class of every clip.

    Returns:
        For each label the share of right top clips, beside that of clips chosen at random, and the balanced accuracy;
        captions whose clips differ in a label have no part in it, nor has a label of which one class is left.
    """
    top = similarities.argmax(dim=1)
    metrics = []
    for test in tests:
        wanted = values_of_texts(test.truth, relevant)
        asked = wanted >= 0
        if len(wanted[asked].unique()) < 2:
            continue
        truth = [test.values[number] for number in wanted[asked].tolist()]
        answers = ["" if number < 0 else test.values[number] for number in test.truth[top][asked].tolist()]
        shares = torch.tensor([(test.truth == number).double().mean() for number in range(len(test.values))])
        chances = shares[wanted[asked]].numpy()
        classes = wanted[asked].unique()
        for measure, balanced, chance in (
            ("accuracy", False, float(chances.mean())),
            ("balanced accuracy", True, float(shares[classes].mean())),
        ):
            statistic = accuracy_statistic(truth, answers, balanced)
            note = f"{len(classes)} classes"
            metrics.append(Metric.measured(f"{name} / {test.label} / {measure}", statistic, len(truth), chance, note))
    return metrics


@beartype
def modality_gap(audio: Tensor, text: Tensor) -> float:
    """Distance between the mean of audio latents `[c, d]` and that of text latents `[t, d]` (arXiv:2203.02053)."""
    return float((audio.mean(dim=0) - text.mean(dim=0)).norm())


def _latent_metrics(check: MuLaNCheck) -> list[Metric]:
    """Cosines of texts with clips that they describe and with others, and the gap between the modalities."""
    similarities, relevant = check.similarities.double(), check.relevant
    count = len(check.texts)
    metrics = []
    for name, chosen in (("a text and its clips", relevant), ("a text and other clips", ~relevant)):
        rows = (similarities * chosen).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)
        rows = rows[chosen.any(dim=1)]
        if len(rows):
            metrics.append(Metric.measured(f"latents / cosine of {name}", partial(_mean_of, rows.numpy()), len(rows)))
    # each clip goes with its texts in equal parts, one without any with all: of all texts together these are all clips
    parts = torch.where(relevant.any(dim=0), relevant / relevant.sum(dim=0).clamp(min=1), 1 / count).double()
    clips, weights = parts @ check.audio.double(), parts.sum(dim=1)

    def gap(chosen: np.ndarray) -> float:
        mean = clips[chosen].sum(dim=0, keepdim=True) / weights[chosen].sum()
        return modality_gap(mean, check.text[chosen].double())

    note = "distance of the means of clips and texts; unit vectors"
    return [*metrics, Metric.measured("latents / modality gap", gap, count, note=note)]


def _mean_of(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(values[chosen].mean())
