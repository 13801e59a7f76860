"""Evaluation of a joint embedding on held-out clips: retrieval, zero-shot tagging, labels of retrieved clips."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.nn.module_state import device_of
from musiclm_pytorch.evaluation.report import MetricValue, accuracy_metric
from musiclm_pytorch.evaluation.retrieval import different_captions, retrieval
from musiclm_pytorch.evaluation.tagging import TagTest, tag_metrics, tag_tests
from musiclm_pytorch.mulan.captions import texts_of
from musiclm_pytorch.mulan.joint import JointEmbedding

__all__ = [
    "EmbeddedClips",
    "embed_clips",
    "held_out_items",
    "joint_embedding_metrics",
    "ordered_similarities",
    "text_classes",
    "top_clip_metrics",
    "zero_shot_similarities",
]

_CLIPS_PER_BATCH = 16
_TEXTS_PER_BATCH = 50


@dataclass(frozen=True)
class EmbeddedClips:
    """Similarities of clips to captions, and of clips to the prompts of their labels.

    The texts are the t different captions, or the prompts of the first label if the clips have no captions. The cosines
    `similarities` and the bool tensor `relevant` are `[t, c]`; `relevant` is True where a text describes a clip. For
    each of `tests`, `prompted` has the cosines `[c, classes]` of clips and prompts.
    """

    texts: list[str]
    similarities: Tensor
    relevant: Tensor
    are_captions: bool
    tests: list[TagTest]
    prompted: list[Tensor]


@typed
def held_out_items(data: str | Path, limit: int | None = None, seed: int = 0) -> list[AudioItem]:
    """Load at most `limit` random clips for evaluation, in the order of their manifest.

    `data` is a folder or manifest that `load_items` accepts; in a folder with `valid.jsonl`, only this file is read.
    """
    data = Path(data)
    if limit is not None and limit < 2:
        raise ValueError(f"limit must be at least 2 clips, got {limit}")
    held_out = data / "valid.jsonl"
    items = load_items(held_out if held_out.is_file() else data).items
    if len(items) < 2:
        raise ValueError(f"{data}: need at least 2 clips for evaluation, got {len(items)}")
    if limit is not None and limit < len(items):
        items = [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), limit))]
    return items


@typed
@torch.no_grad()
def embed_clips(
    mulan: JointEmbedding, items: Sequence[AudioItem], announce: Callable[[str], None] = lambda words: None
) -> EmbeddedClips:
    """Embed clips of any length, their captions, and prompts for their labels; `announce` receives progress texts."""
    tests = tag_tests(items)
    texts, relevant = different_captions([texts_of(item) for item in items])
    are_captions = len(texts) > 1
    if not are_captions:
        if not tests:
            raise ValueError(
                f"the {len(items)} clips have neither two different captions nor a label with few values; use a "
                "manifest with 'caption', or with a label such as 'instrument'"
            )
        texts = list(tests[0].prompts)
        relevant = torch.arange(len(texts))[:, None] == tests[0].truth[None, :]
    announce(f"embedding {len(items)} clips")
    audio = _embed_audio(mulan, items)
    announce(f"embedding {len(texts)} texts and the prompts of {len(tests)} labels")
    parts = [texts[first : first + _TEXTS_PER_BATCH] for first in range(0, len(texts), _TEXTS_PER_BATCH)]
    text = torch.cat([mulan.get_text_latents(part).float().cpu() for part in parts])
    prompted = [zero_shot_similarities(mulan, audio, test.prompts) for test in tests]
    for name, latents in (("clips", audio), ("texts", text)):
        if not latents.isfinite().all():
            raise ValueError(f"the model returns NaN or infinity for {name}; train the model again")
    return EmbeddedClips(texts, text @ audio.T, relevant, are_captions, tests, prompted)


@torch.no_grad()
@typed
def zero_shot_similarities(mulan: JointEmbedding, audio_latents: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compute cosines `[n, classes]` between clip latents `[n, d]` of unit norm and text prompts."""
    texts = mulan.get_text_latents(list(prompts))
    return audio_latents.float() @ texts.float().to(audio_latents.device).T


def _embed_audio(mulan: JointEmbedding, items: Sequence[AudioItem]) -> Tensor:
    """Embed c audio files as latents `[c, d]` float32 on the CPU."""
    device = device_of(mulan)
    latents = torch.empty(len(items), mulan.dim_latent)
    # Batches of clips of similar length have little padding.
    order = sorted(range(len(items)), key=lambda index: items[index].num_samples / items[index].sample_hz)
    for first in range(0, len(order), _CLIPS_PER_BATCH):
        rows = order[first : first + _CLIPS_PER_BATCH]
        waves = [items[row].read(mulan.sample_hz)[0] for row in rows]
        lengths = torch.tensor([len(wave) for wave in waves], device=device)
        padded = pad_sequence(waves, batch_first=True).to(device)
        latents[rows] = mulan.get_long_audio_latents(padded, lengths).float().cpu()
    return latents


@typed
def joint_embedding_metrics(clips: EmbeddedClips) -> list[MetricValue]:
    """Measure retrieval, zero-shot tagging, and how often the best clip for a caption has the right label."""
    described = clips.relevant.any(dim=0)
    text_to_audio = retrieval(clips.similarities, clips.relevant)
    audio_to_text = retrieval(clips.similarities.T[described], clips.relevant.T[described])
    metrics = text_to_audio.metrics("retrieval / text to audio") + audio_to_text.metrics("retrieval / audio to text")
    for test, similarities in zip(clips.tests, clips.prompted):
        metrics += tag_metrics(f"tagging / {test.label}", similarities, test.truth)
    if clips.are_captions:
        metrics += top_clip_metrics("top clip", clips.similarities, clips.relevant, clips.tests)
    return metrics


@typed
def text_classes(truth: Tensor, relevant: Tensor) -> Tensor:
    """Return the common class `[t]` of the clips that each text describes, or -1 if they have no common class.

    `truth [c]` is the class of each clip, or -1 if unknown. `relevant [t, c]` is True where text t describes clip c.
    """
    highest = truth.expand_as(relevant).masked_fill(~relevant, -1).amax(dim=1)
    lowest = truth.expand_as(relevant).masked_fill(~relevant, int(truth.max())).amin(dim=1)
    return torch.where(highest == lowest, highest, -1)


@typed
def top_clip_metrics(name: str, similarities: Tensor, relevant: Tensor, tests: Sequence[TagTest]) -> list[MetricValue]:
    """Measure for each label how often the clip most similar to a caption has the right class (balanced accuracy).

    The right class is the class of the clips that the caption describes. Captions whose clips have no common class are
    left out, and so are labels with fewer than two classes. The chance level is the accuracy of selecting a random
    clip. `similarities` and `relevant` are `[t, c]`, with a row per caption and a column per clip.
    """
    top = similarities.argmax(dim=1)
    metrics = []
    for test in tests:
        classes = text_classes(test.truth, relevant)
        known = classes >= 0
        present = classes[known].unique()
        if len(present) < 2:
            continue
        truth = [test.values[number] for number in classes[known].tolist()]
        answers = ["" if number < 0 else test.values[number] for number in test.truth[top][known].tolist()]
        chance = float(torch.stack([(test.truth == number).double().mean() for number in present]).mean())
        full_name = f"{name} / {test.label} / balanced accuracy"
        metrics.append(accuracy_metric(full_name, truth, answers, True, f"{len(present)} classes", chance))
    return metrics


@typed
def ordered_similarities(clips: EmbeddedClips, label: str | None = None) -> tuple[Tensor, list[str], list[str]]:
    """Order texts and clips by a label (default: the label of the first test); matches form a diagonal in the plot.

    Clips without labels stay in the order of the manifest. The function returns the cosines `[t, c]` of t texts and c
    clips, the class of each text, and the class of each clip.
    """
    num_clips = clips.relevant.shape[1]
    truth = torch.full((num_clips,), -1)
    values: tuple[str, ...] = ()
    if clips.tests:
        test = next(test for test in clips.tests if label in (None, test.label))
        truth, values = test.truth, test.values
    columns = truth.masked_fill(truth < 0, len(values)).argsort(stable=True)
    ranks = columns.argsort().expand_as(clips.relevant)
    rows = ranks.masked_fill(~clips.relevant, num_clips).amin(dim=1).argsort(stable=True)
    text_names, clip_names = (
        [values[number] if number >= 0 else "unknown" for number in numbers.tolist()]
        for numbers in (text_classes(truth, clips.relevant)[rows], truth[columns])
    )
    return clips.similarities[rows][:, columns], text_names, clip_names
