"""Adherence to labels: how often a classifier of real clips finds the requested instrument, tempo and so on."""

import torch
from torch import Tensor

from audiolm_pytorch.saving.fingerprint import fingerprint_of
from musiclm_pytorch.evaluation.classifier import AttributeClassifier
from musiclm_pytorch.evaluation.clip_features import MIN_SECONDS
from musiclm_pytorch.evaluation.clips import label_text
from musiclm_pytorch.evaluation.metric import ClipSet, Extractor, Metric, UnmetNeed
from musiclm_pytorch.evaluation.report import MetricValue, accuracy_metric

__all__ = ["AttributeFeatures", "LabelAdherence"]


class AttributeFeatures(Extractor):
    """Standardised features `[b, d]` of an attribute classifier: statistics of log-mel spectra, and rhythm."""

    name, min_seconds = "log-mel statistics", MIN_SECONDS

    def __init__(self, classifier: AttributeClassifier) -> None:
        self.classifier, self.sample_hz = classifier, classifier.features.sample_hz

    def __call__(self, waves: Tensor) -> Tensor:
        """Compute the features of waves `[b, n]`."""
        return self.classifier.describe(waves, self.sample_hz)

    def fingerprint(self) -> str:
        """Hash of the classifier."""
        return fingerprint_of(self.classifier)


class LabelAdherence(Metric):
    """Accuracy, plain and balanced over classes, of an attribute classifier on clips with known labels."""

    name = "labels"
    extractor: AttributeFeatures

    @torch.no_grad()
    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Measure every attribute of the classifier whose labels are classes of the classifier."""
        classifier = self.extractor.classifier
        inputs = torch.stack(clips.of(self.extractor)).to(classifier.mean.device)
        values: list[MetricValue] = []
        for attribute, classes in classifier.classes.items():
            truth = [label_text(label) for label in clips.labels(attribute)]
            rows = [row for row, name in enumerate(truth) if name in classes]
            if not rows:
                continue
            best = classifier.heads[attribute](inputs[rows]).argmax(dim=1).tolist()
            expected, answers = [truth[row] for row in rows], [classes[index] for index in best]
            note = f"{self.extractor.note()}; {len(classes)} classes"
            # Expected accuracy of the same answers in random order, as for exchanged captions.
            shuffled = sum(expected.count(name) * answers.count(name) for name in classes) / len(rows) ** 2
            for balanced, words, chance in ((False, "accuracy", shuffled), (True, "balanced accuracy", None)):
                name = f"{self.name} / {clips.name} / {attribute}, {words}"
                values.append(accuracy_metric(name, expected, answers, balanced, note, chance))
        if not values:
            raise UnmetNeed(f"{clips.name}: the manifest has none of the labels {', '.join(classifier.classes)}")
        return values
