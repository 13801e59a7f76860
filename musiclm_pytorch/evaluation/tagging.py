"""Zero-shot tagging: does a clip lie nearer to the words for what it is than to the words for what it is not?

The labels of a manifest are the truth, and a prompt for every value of a label takes the place of a classifier (MuLan,
arXiv:2208.12415, sec. 4.2.1).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.data.captions import is_encodable
from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch.evaluation.report import mean_of_classes
from musiclm_pytorch.mulan.joint import JointEmbedding

__all__ = [
    "TEMPLATES",
    "TagScores",
    "TagTest",
    "auc_statistic",
    "recall_statistic",
    "tag_scores",
    "tag_labels",
    "tag_prompts",
    "tag_tests",
    "zero_shot_similarities",
]

# What a value needs around it to be understood without the name of its label; most values stand for themselves.
TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "tempo": "{value} music",
        "genre": "{value} music",
        "mood": "{value} music",
        "register": "music in a {value} register",
        "mode": "music in {value}",
        "key": "music in {value}",
    }
)
_YES, _NO, _NONE = "yes", "no", "none"
_MOST_VALUES = 50
# With fewer clips a value the label names the clips (a title, an id) and does not describe them.
_LEAST_CLIPS_A_VALUE = 2


@dataclass(frozen=True)
class TagScores:
    """How well prompts tell the classes of one label apart.

    Attributes:
        auc: Area under the ROC curve of each class against the rest, averaged over classes; guessing gives 0.5.
        balanced_accuracy: Share of clips whose nearest prompt is that of their class, averaged over classes.
        chance: What guessing gives for `balanced_accuracy`: one over the number of prompts.
    """

    auc: float
    balanced_accuracy: float
    chance: float


@dataclass(frozen=True)
class TagTest:
    """One label of a set of clips as a question to a joint embedding.

    Attributes:
        label: Its name in the manifest.
        values: What it can be, the classes.
        prompts: A text for each class.
        truth: `[n]` int64 class of each clip; -1 where the manifest does not say.
    """

    label: str
    values: tuple[str, ...]
    prompts: tuple[str, ...]
    truth: Tensor


@beartype
def tag_labels(items: Sequence[AudioItem]) -> dict[str, list[str | None]]:
    """Find the labels that say what a clip is: texts or truth values of which a few occur again and again.

    Numbers (a tempo in beats a minute) are no tags, nor are lists, nor texts that nearly every clip has its own of, nor
    broken ones that cannot be written.

    Args:
        items: Files of a manifest.

    Returns:
        For each such label, in the order of the manifest, the value of every clip as text: truth values as "yes" and
        "no", and null as "none" where the label is text otherwise ("chords": null are no chords). None where the
        manifest does not say.
    """
    names = dict.fromkeys(name for item in items for name in item.labels if is_encodable(name))
    found = {name: _values_of(items, name) for name in names}
    return {name: values for name, values in found.items() if values is not None}


def _values_of(items: Sequence[AudioItem], name: str) -> list[str | None] | None:
    """The values of a label as texts, or None if it is no tag."""
    given = [item.labels[name] for item in items if name in item.labels and item.labels[name] is not None]
    truth_values = all(isinstance(value, bool) for value in given)
    texts = [value for value in given if isinstance(value, str) and value.strip() and is_encodable(value)]
    if not truth_values and len(texts) < len(given):
        return None
    values = [_as_text(item.labels[name], truth_values) if name in item.labels else None for item in items]
    known = [value for value in values if value is not None]
    different = len(set(known))
    if not 2 <= different <= _MOST_VALUES or len(known) < _LEAST_CLIPS_A_VALUE * different:
        return None
    return values


def _as_text(value: Any, truth_values: bool) -> str | None:
    """A value of a label as `tag_labels` gives it."""
    if isinstance(value, bool):
        return _YES if value else _NO
    return (None if truth_values else _NONE) if value is None else str(value)


@beartype
def tag_prompts(label: str, values: Sequence[str], templates: Mapping[str, str] = TEMPLATES) -> list[str]:
    """Say in words what each value of a label means.

    Args:
        label: Its name, such as "drums".
        values: As `tag_labels` gives them.
        templates: For a label the sentence that its values are put into, at "{value}"; the value alone by default.

    Returns:
        A prompt for each value: "music with drums" and "music without drums" for "yes" and "no", "music without
        chords" for the "none" of chords, and otherwise what the template makes of the value.
    """
    thing = label.replace("_", " ")
    said = {_YES: f"music with {thing}", _NO: f"music without {thing}", _NONE: f"music without {thing}"}
    template = templates.get(label, "{value}")
    return [said.get(value) or template.replace("{value}", value.replace("_", " ")) for value in values]


@beartype
def tag_tests(items: Sequence[AudioItem], templates: Mapping[str, str] = TEMPLATES) -> list[TagTest]:
    """Make a test of every label that can be a tag.

    Args:
        items: Files of a manifest.
        templates: See `tag_prompts`.

    Returns:
        One test a label, in the order of the manifest; classes in the order of the alphabet.
    """
    tests = []
    for label, values in tag_labels(items).items():
        classes = sorted({value for value in values if value is not None})
        numbers = {value: number for number, value in enumerate(classes)}
        truth = torch.tensor([-1 if value is None else numbers[value] for value in values])
        tests.append(TagTest(label, tuple(classes), tuple(tag_prompts(label, classes, templates)), truth))
    return tests


@torch.no_grad()
@beartype
def zero_shot_similarities(mulan: JointEmbedding, audio_latents: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compare clips with prompts.

    Args:
        mulan: Embeds the prompts.
        audio_latents: `[n, d]` of its own, unit norm.
        prompts: One text a class.

    Returns:
        `[n, classes]` cosines, on the device of `audio_latents`.
    """
    texts = mulan.get_text_latents(list(prompts))
    return audio_latents.float() @ texts.float().to(audio_latents.device).T


@beartype
def tag_scores(similarities: Tensor, truth: Tensor) -> TagScores:
    """Score the similarities of clips to the prompts of one label.

    Args:
        similarities: `[n, classes]`, larger is nearer.
        truth: `[n]` int class of each clip; -1 = unknown, the clip is left out.

    Returns:
        The scores; classes without a clip take no part in the averages over classes.

    Raises:
        ValueError: If shapes do not fit, a similarity is NaN, or the clips are not of at least two classes.
    """
    area, accuracy = auc_statistic(similarities, truth), recall_statistic(similarities, truth)
    everything = np.arange(int((truth >= 0).sum()))
    return TagScores(area(everything), accuracy(everything), 1 / similarities.shape[1])


@beartype
def auc_statistic(similarities: Tensor, truth: Tensor) -> Callable[[np.ndarray], float]:
    """Make the macro one-vs-rest area under the ROC curve a function of the items looked at, as resampling needs it.

    The area is the share of pairs of a clip of the class and another one in which the first is nearer to the prompt; a
    tie is half a pair.

    Args:
        similarities: `[n, classes]`.
        truth: `[n]`, see `tag_scores`.

    Returns:
        From indices of the m items whose class is known to the average over classes; classes that do not occur among
        them are left out, and of one class alone nothing is known: 0.5.

    Raises:
        ValueError: As `tag_scores`.
    """
    scores, classes = _known_rows(similarities, truth)
    # Ranks in place of similarities: counting them takes no sorting in a resample.
    ranks = [np.unique(scores[:, number], return_inverse=True)[1].reshape(-1) for number in range(scores.shape[1])]

    def statistic(chosen: np.ndarray) -> float:
        own = classes[chosen]
        areas = []
        for number, rank in enumerate(ranks):
            is_class = own == number
            pairs = is_class.sum() * (len(own) - is_class.sum())
            if pairs:
                size = rank.max() + 1
                inside = np.bincount(rank[chosen[is_class]], minlength=size)
                outside = np.bincount(rank[chosen[~is_class]], minlength=size)
                areas.append(float((inside * (outside.cumsum() - outside / 2)).sum() / pairs))
        return float(np.mean(areas)) if areas else 0.5

    return statistic


@beartype
def recall_statistic(similarities: Tensor, truth: Tensor) -> Callable[[np.ndarray], float]:
    """Make the balanced accuracy of the nearest prompt a function of the items looked at, as resampling needs it.

    Where several prompts are equally near, the answer counts by the share of the right one among them: a model that
    finds all prompts alike does what guessing does.

    Args:
        similarities: `[n, classes]`.
        truth: `[n]`, see `tag_scores`.

    Returns:
        From indices of the m items whose class is known to the average over the classes that occur among them.

    Raises:
        ValueError: As `tag_scores`.
    """
    scores, classes = _known_rows(similarities, truth)
    nearest = scores == scores.max(axis=1, keepdims=True)
    is_right = nearest[np.arange(len(scores)), classes] / nearest.sum(axis=1)

    def statistic(chosen: np.ndarray) -> float:
        return mean_of_classes(classes[chosen], is_right[chosen])

    return statistic


def _known_rows(similarities: Tensor, truth: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Similarities `[m, classes]` and classes `[m]` of the items whose class is known, or a ValueError."""
    if similarities.ndim != 2 or truth.shape != similarities.shape[:1] or truth.is_floating_point():
        raise ValueError(
            "similarities must be [n, classes] and truth int [n], got "
            f"{tuple(similarities.shape)} and {truth.dtype} {tuple(truth.shape)}"
        )
    scores, classes = similarities.detach().double().cpu().numpy(), truth.cpu().numpy()
    known = classes >= 0
    scores, classes = scores[known], classes[known]
    if len(np.unique(classes)) < 2 or classes.max() >= scores.shape[1] or np.isnan(scores).any():
        raise ValueError(
            f"need clips of at least two of the {scores.shape[1]} classes and similarities without NaN, got classes "
            f"{np.unique(classes).tolist()[:10]}"
        )
    return scores, classes
