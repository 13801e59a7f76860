"""A plain judge of generated music: names instrument, tempo, drums and register, fitted on real clips only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.saving.modules import load_module, register, save_module
from musiclm_pytorch.recipes.metrics.clip_features import ClipFeatures
from musiclm_pytorch.recipes.metrics.clips import labels_of, load_clips
from musiclm_pytorch.recipes.metrics.word_features import WordFeatures

__all__ = ["ATTRIBUTES", "AttributeClassifier", "fit_attribute_classifier", "fitted_classifier"]

ATTRIBUTES = ("instrument", "tempo", "drums", "register")
# Chosen on a fifth of the training tunes, clean and disturbed (Opus, low-pass, noise, smeared spectra); between 0.005
# and 0.06 clean accuracies differ by two points at most.
INVERSE_REGULARISATION = 0.02
# A feature that hardly varies in real clips would turn any disturbance into many deviations.
MIN_SCALE = 0.1
MAX_DEVIATIONS = 4.0
CLIPS_AT_ONCE = 50
# What can describe clips, by the name that a config has; one without a name is of ClipFeatures.
_FEATURES: dict[str, type[ClipFeatures] | type[WordFeatures]] = {
    "ClipFeatures": ClipFeatures,
    "WordFeatures": WordFeatures,
}


@register
class AttributeClassifier(nn.Module):
    """One linear classifier per attribute over standardised features; saved as any module, without pickle."""

    mean: Tensor
    scale: Tensor

    @beartype
    def __init__(
        self, *, classes: Mapping[str, Sequence[str]], num_features: int, features: ClipFeatures | WordFeatures
    ) -> None:
        """Make an unfitted classifier; `fit` makes a fitted one.

        Args:
            classes: The names that each attribute can take, in the order of the outputs.
            num_features: Numbers per clip.
            features: What describes the clips.
        """
        super().__init__()
        self.features = features
        self.classes = {name: list(names) for name, names in classes.items()}
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.heads = nn.ModuleDict({name: nn.Linear(num_features, len(names)) for name, names in self.classes.items()})

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as JSON-able numbers."""
        kind = type(self.features).__name__
        named = {} if kind == "ClipFeatures" else {"features_class": kind}
        return {"classes": self.classes, "num_features": len(self.mean), "features": self.features.config, **named}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AttributeClassifier":
        """Build an unfitted classifier from what `config` gave."""
        return cls(
            classes=config["classes"],
            num_features=config["num_features"],
            features=_FEATURES[config.get("features_class", "ClipFeatures")](**config["features"]),
        )

    @classmethod
    @beartype
    def fit(
        cls,
        described: Tensor,
        labels: Mapping[str, Sequence[str]],
        features: ClipFeatures | WordFeatures,
        inverse_regularisation: float = INVERSE_REGULARISATION,
    ) -> "AttributeClassifier":
        """Fit one multinomial logistic regression per attribute, classes weighted alike.

        Args:
            described: `[b, d]`, what `features` says of the clips.
            labels: For each attribute, the true name for every clip.
            features: The describing module, kept for prediction.
            inverse_regularisation: The C of scikit-learn.

        Returns:
            The fitted classifier; the same on every run.

        Raises:
            ValueError: If an attribute has other than b labels, or only one class.
        """
        from sklearn.linear_model import LogisticRegression

        for name, names in labels.items():
            if len(names) != len(described) or len(set(names)) < 2:
                raise ValueError(
                    f"{name!r} needs a label for each of {len(described)} clips and at least two classes, "
                    f"got {len(names)} labels of {len(set(names))} classes"
                )
        classes = {name: sorted(set(names)) for name, names in labels.items()}
        classifier = cls(classes=classes, num_features=described.shape[1], features=features)
        classifier.mean.copy_(described.mean(0))
        classifier.scale.copy_(described.std(0).clamp_min(MIN_SCALE))
        inputs = classifier._standardised(described).double().numpy()
        for name, names in labels.items():
            regression = LogisticRegression(C=inverse_regularisation, max_iter=500, class_weight="balanced")
            regression.fit(inputs, np.asarray(names))
            weight, bias = regression.coef_, regression.intercept_
            if len(classes[name]) == 2:  # scikit-learn keeps one row for two classes: the log-odds of the second
                weight, bias = np.stack([0 * weight[0], weight[0]]), np.array([0.0, bias[0]])
            head = classifier.heads[name]
            head.load_state_dict({"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias).float()})
        return classifier.eval().requires_grad_(False)

    def _standardised(self, described: Tensor) -> Tensor:
        """Deviations from the training mean, limited so that no single number decides."""
        return ((described - self.mean) / self.scale).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)

    def describe(self, waves: Tensor, sample_hz: int) -> Tensor:
        """Describe clips by standardised features, as the linear classifiers see them.

        Args:
            waves: `[b, n]`, as the features take them: clips of at least 2.5 s, or words; any level.
            sample_hz: Their rate (Hz).

        Returns:
            `[b, d]` float32.
        """
        return self._standardised(self.features(waves.to(self.mean.device), sample_hz))

    @torch.no_grad()
    def predict_proba(self, waves: Tensor, sample_hz: int) -> dict[str, Tensor]:
        """Give the probability of each name.

        Args:
            waves: As for `describe`.
            sample_hz: Their rate (Hz).

        Returns:
            For each attribute `[b, k]`, columns in the order of `classes[attribute]`, rows summing to 1.
        """
        inputs = self.describe(waves, sample_hz)
        return {name: head(inputs).softmax(dim=-1) for name, head in self.heads.items()}

    def predict(self, waves: Tensor, sample_hz: int) -> dict[str, list[str]]:
        """Name the attributes of clips.

        Args:
            waves: As for `describe`.
            sample_hz: Their rate (Hz).

        Returns:
            For each attribute, one name per clip.
        """
        return {
            name: [self.classes[name][best] for best in chances.argmax(dim=-1).tolist()]
            for name, chances in self.predict_proba(waves, sample_hz).items()
        }

    def save(self, folder: str | Path) -> None:
        """Write the classifier as safetensors and JSON.

        Args:
            folder: Where; made if missing.
        """
        save_module(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> "AttributeClassifier":
        """Read a classifier that `save` wrote.

        Args:
            folder: Where it lies.

        Returns:
            The classifier, ready to predict.

        Raises:
            ValueError: If the folder does not hold one.
        """
        module = load_module(folder, expect=cls)
        if not isinstance(module, cls):
            raise ValueError(f"{folder} holds a {type(module).__name__}, need an {cls.__name__}")
        return module.requires_grad_(False)


@beartype
def fit_attribute_classifier(
    items: Sequence[AudioItem],
    attributes: Sequence[str] = ATTRIBUTES,
    features: ClipFeatures | WordFeatures | None = None,
) -> AttributeClassifier:
    """Read real clips and fit a classifier on them.

    Args:
        items: Training clips with the labels asked for.
        attributes: Names of the labels.
        features: What describes the clips; None takes the default.

    Returns:
        The fitted classifier.

    Raises:
        ValueError: If a label is missing or a file cannot be read.
    """
    features = features or ClipFeatures()
    labels = {name: labels_of(items, name) for name in attributes}
    parts = [
        features(load_clips(items[first : first + CLIPS_AT_ONCE], features.sample_hz))
        for first in range(0, len(items), CLIPS_AT_ONCE)
    ]
    return AttributeClassifier.fit(torch.cat(parts), labels, features)


@beartype
def fitted_classifier(data: str | Path, folder: str | Path | None = None) -> AttributeClassifier:
    """Load a fitted classifier, or fit one on the real training clips and keep it.

    Args:
        data: Folder with `train.jsonl`.
        folder: Where the classifier lies or shall be written; None fits without keeping it.

    Returns:
        The classifier.
    """
    if folder is not None and Path(folder, "config.json").is_file():
        return AttributeClassifier.load(folder)
    classifier = fit_attribute_classifier(load_items(Path(data, "train.jsonl")).items)
    if folder is not None:
        classifier.save(folder)
    return classifier
