"""Zero-shot tagging: clips are classified by their similarity to one text prompt per class.

Zero-shot tagging uses the labels of a manifest as ground truth (MuLan, arXiv:2208.12415, sec. 4.2.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.captions import is_encodable
from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch.evaluation.report import MetricValue, accuracy_metric

__all__ = ["TagScores", "TagTest", "tag_labels", "tag_metrics", "tag_prompts", "tag_scores", "tag_tests"]

# Prompts of labels whose values are unclear without the name of the label.
_TEMPLATES = {
    "tempo": "{value} music",
    "genre": "{value} music",
    "mood": "{value} music",
    "register": "music in a {value} register",
    "mode": "music in {value}",
    "key": "music in {value}",
}
_YES, _NO, _NONE = "yes", "no", "none"
_MAX_VALUES = 50
# A label with fewer clips per value identifies clips (a title, an id) and does not describe them.
_MIN_CLIPS_PER_VALUE = 2
# scikit-learn needs about 10 ms per resample.
_BOOTSTRAP_ROUNDS = 200


@dataclass(frozen=True)
class TagScores:
    """Scores of the zero-shot classification of one label, averaged over the classes that occur in the clips.

    `auc` is the area under the ROC curve of each class against the other classes (chance 0.5). In `balanced_accuracy`,
    a clip is assigned to the class of its most similar prompt (chance 1 / number of prompts).
    """

    auc: float
    balanced_accuracy: float


@dataclass(frozen=True)
class TagTest:
    """Zero-shot classification task: assign each clip of a set to one of the values of a label.

    Each value of the label has one text prompt. `truth [n]` int64 is the class of each clip; -1 = unknown.
    """

    label: str
    values: tuple[str, ...]
    prompts: tuple[str, ...]
    truth: Tensor


@typed
def tag_labels(items: Sequence[AudioItem]) -> dict[str, list[str | None]]:
    """Find the labels that can be used for tagging: texts or booleans with few values, each shared by several clips.

    Numbers (e.g. beats per minute), lists, texts that differ for nearly every clip, and texts that cannot be encoded as
    UTF-8 are not tags.

    Returns:
        The values of all clips as texts, for each label in the order of the manifest. A boolean is "yes" or "no", a
        null in a text label is "none" (`"chords": null` means no chords), and a missing value is None.
    """
    names = dict.fromkeys(name for item in items for name in item.labels if is_encodable(name))
    values = {name: _values_of(items, name) for name in names}
    return {name: of_clips for name, of_clips in values.items() if of_clips is not None}


def _values_of(items: Sequence[AudioItem], name: str) -> list[str | None] | None:
    """Return the value of a label for every clip as text, or None if the label cannot be used for tagging."""
    present = [item.labels[name] for item in items if item.labels.get(name) is not None]
    is_boolean = all(isinstance(value, bool) for value in present)
    is_text = all(isinstance(value, str) and value.strip() and is_encodable(value) for value in present)
    if not is_boolean and not is_text:
        return None
    texts: dict[Any, str | None] = {True: _YES, False: _NO, None: None} if is_boolean else {None: _NONE}
    values = [texts.get(item.labels[name], item.labels[name]) if name in item.labels else None for item in items]
    known = [value for value in values if value is not None]
    num_values = len(set(known))
    if not 2 <= num_values <= _MAX_VALUES or len(known) < _MIN_CLIPS_PER_VALUE * num_values:
        return None
    return values


@typed
def tag_prompts(label: str, values: Sequence[str]) -> list[str]:
    """Write a text prompt for each value of a label (see `tag_labels`).

    For the label "drums", the prompt of "yes" is "music with drums", and that of "no" and "none" is "music without
    drums". Any other value becomes the prompt, inserted into the template of the label if one exists.
    """
    thing = label.replace("_", " ")
    fixed = {_YES: f"music with {thing}", _NO: f"music without {thing}", _NONE: f"music without {thing}"}
    template = _TEMPLATES.get(label, "{value}")
    return [fixed.get(value) or template.replace("{value}", value.replace("_", " ")) for value in values]


@typed
def tag_tests(items: Sequence[AudioItem]) -> list[TagTest]:
    """Build a classification task for every label that can be used for tagging, with classes in alphabetical order."""
    tests = []
    for label, values in tag_labels(items).items():
        classes = sorted({value for value in values if value is not None})
        truth = torch.tensor([-1 if value is None else classes.index(value) for value in values])
        tests.append(TagTest(label, tuple(classes), tuple(tag_prompts(label, classes)), truth))
    return tests


@typed
def tag_scores(similarities: Tensor, truth: Tensor) -> TagScores:
    """Compute scores from the similarities `[n, classes]` of clips and the prompts of one label.

    Clips with class -1 in `truth [n]` are left out; the other clips must have at least two different classes.
    """
    from sklearn.metrics import recall_score, roc_auc_score

    scores, classes = _known_rows(similarities, truth)
    recall = recall_score(classes, scores.argmax(axis=1), labels=np.unique(classes), average="macro")
    return TagScores(auc=_class_mean(roc_auc_score, scores, classes), balanced_accuracy=float(recall))


@typed
def tag_metrics(name: str, similarities: Tensor, truth: Tensor) -> list[MetricValue]:
    """Compute AUC, average precision and balanced accuracy as metrics; see `tag_scores` for the arguments."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, classes = _known_rows(similarities, truth)
    num_classes = scores.shape[1]
    note = f"{num_classes} classes"

    def metric(measure: str, score: Callable[..., float], chance: float) -> MetricValue:
        def statistic(rows: np.ndarray) -> float:
            return _class_mean(score, scores[rows], classes[rows])

        return MetricValue.measured(f"{name} / {measure}", statistic, len(classes), chance, note, _BOOTSTRAP_ROUNDS)

    truths, answers = classes.astype(str).tolist(), scores.argmax(axis=1).astype(str).tolist()
    return [
        metric("AUC", roc_auc_score, 0.5),
        metric("average precision", average_precision_score, 1 / len(np.unique(classes))),
        accuracy_metric(f"{name} / balanced accuracy", truths, answers, True, note, chance=1 / num_classes),
    ]


def _class_mean(score: Callable[..., float], scores: np.ndarray, classes: np.ndarray) -> float:
    """Average a score of one class against the others over the classes that occur; return 0.5 for a single class."""
    occurring = np.unique(classes)
    if len(occurring) < 2:
        return 0.5
    return float(np.mean([score(classes == number, scores[:, number]) for number in occurring]))


def _known_rows(similarities: Tensor, truth: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the similarities `[m, classes]` and classes `[m]` of the m clips whose class is known."""
    if similarities.ndim != 2 or truth.shape != similarities.shape[:1] or truth.is_floating_point():
        raise ValueError(
            "similarities must be [n, classes] and truth int [n], got "
            f"similarities {tuple(similarities.shape)} and truth {truth.dtype} {tuple(truth.shape)}"
        )
    scores, classes = similarities.detach().double().cpu().numpy(), truth.cpu().numpy()
    known = classes >= 0
    scores, classes = scores[known], classes[known]
    if len(np.unique(classes)) < 2 or classes.max() >= scores.shape[1] or np.isnan(scores).any():
        raise ValueError(
            f"similarities must not contain NaN, and truth at least two classes of 0..{scores.shape[1] - 1}; "
            f"got the classes {np.unique(classes).tolist()[:10]}"
        )
    return scores, classes
