"""Linear classifiers of the labels of clips, such as instrument and tempo, fitted to features of real clips."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.nn.module_state import module_dict
from audiolm_pytorch.saving.modules import load_module, register, save_module
from musiclm_pytorch.evaluation.clip_features import ClipFeatures, FeatureModule
from musiclm_pytorch.evaluation.clips import labels_of, load_clips
from musiclm_pytorch.evaluation.tagging import tag_labels

__all__ = ["FEATURES", "AttributeClassifier", "fit_attribute_classifier", "fitted_classifier"]

# Selected on a fifth of the training tunes, clean and disturbed (Opus, low-pass, noise, smeared spectra). Between 0.005
# and 0.06 the accuracies on clean clips differ by two points at most.
INVERSE_REGULARISATION = 0.02
# A smaller scale would turn any disturbance of a nearly constant feature into many deviations.
MIN_SCALE = 0.1
MAX_DEVIATIONS = 4.0
CLIPS_PER_BATCH = 50
# Feature modules by the name in a config; a config without a name means ClipFeatures. Other modules add themselves.
FEATURES: dict[str, type[FeatureModule]] = {"ClipFeatures": ClipFeatures}


@register
class AttributeClassifier(nn.Module):
    """Set of linear classifiers of standardised audio features, with one classifier per attribute.

    `classes` has the class names of each attribute, in the order of the outputs. `fit` creates a classifier.
    """

    mean: Tensor
    scale: Tensor

    @typed
    def __init__(self, *, classes: Mapping[str, Sequence[str]], num_features: int, features: FeatureModule) -> None:
        super().__init__()
        self.features = features
        self.classes = {name: list(names) for name, names in classes.items()}
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        heads = {name: nn.Linear(num_features, len(names)) for name, names in self.classes.items()}
        self.heads = module_dict(heads, "attributes")

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        kind = type(self.features).__name__
        named = {} if kind == "ClipFeatures" else {"features_class": kind}
        return {"classes": self.classes, "num_features": len(self.mean), "features": self.features.config, **named}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AttributeClassifier":
        """Create a classifier without weights from its `config`."""
        return cls(
            classes=config["classes"],
            num_features=config["num_features"],
            features=FEATURES[config.get("features_class", "ClipFeatures")](**config["features"]),
        )

    @classmethod
    @typed
    def fit(
        cls,
        inputs: Tensor,
        labels: Mapping[str, Sequence[str]],
        features: FeatureModule,
    ) -> "AttributeClassifier":
        """Fit one multinomial logistic regression per attribute, with equal weight for each class.

        `inputs [b, d]` are the features of the training clips, which the module `features` has computed. `labels` has
        the class name of each clip, for each attribute.
        """
        from sklearn.linear_model import LogisticRegression

        for name, names in labels.items():
            if len(names) != len(inputs) or len(set(names)) < 2:
                raise ValueError(
                    f"got {len(names)} labels of {len(set(names))} classes for the attribute {name!r}, needs one label "
                    f"for each of {len(inputs)} clips and at least two classes"
                )
        classes = {name: sorted(set(names)) for name, names in labels.items()}
        classifier = cls(classes=classes, num_features=inputs.shape[1], features=features)
        classifier.mean.copy_(inputs.mean(0))
        classifier.scale.copy_(inputs.std(0).clamp_min(MIN_SCALE))
        standardised = classifier._standardise(inputs).double().numpy()
        for name, names in labels.items():
            regression = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=500, class_weight="balanced")
            regression.fit(standardised, np.asarray(names))
            weight, bias = regression.coef_, regression.intercept_
            if len(classes[name]) == 2:  # scikit-learn has one row for two classes, the log-odds of the second class
                weight, bias = np.stack([0 * weight[0], weight[0]]), np.array([0.0, bias[0]])
            head = classifier.heads[name]
            head.load_state_dict({"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias).float()})
        return classifier.eval().requires_grad_(False)

    def _standardise(self, inputs: Tensor) -> Tensor:
        """Standardise features with the mean and scale of the training clips, and clip large deviations."""
        return ((inputs - self.mean) / self.scale).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)

    def describe(self, waves: Tensor, sample_hz: int) -> Tensor:
        """Compute standardised features `[b, d]` of clips or words `[b, n]`."""
        features = self._standardise(self.features(waves.to(self.mean.device), sample_hz))
        return features.to(self.mean.dtype)

    @torch.no_grad()
    def predict_proba(self, waves: Tensor, sample_hz: int) -> dict[str, Tensor]:
        """Compute class probabilities `[b, k]` of each attribute, in the order of `classes[attribute]`."""
        inputs = self.describe(waves, sample_hz)
        return {name: head(inputs).softmax(dim=-1) for name, head in self.heads.items()}

    def predict(self, waves: Tensor, sample_hz: int) -> dict[str, list[str]]:
        """Predict the most probable class of each clip for each attribute."""
        return {
            name: [self.classes[name][best] for best in probabilities.argmax(dim=-1).tolist()]
            for name, probabilities in self.predict_proba(waves, sample_hz).items()
        }


@typed
def fit_attribute_classifier(
    items: Sequence[AudioItem],
    attributes: Sequence[str],
    features: FeatureModule | None = None,
) -> AttributeClassifier:
    """Fit an attribute classifier to real clips and their labels, by default with the features of `ClipFeatures`."""
    features = features or ClipFeatures()
    labels = {name: labels_of(items, name) for name in attributes}
    parts = [
        features(load_clips(items[first : first + CLIPS_PER_BATCH], features.sample_hz))
        for first in range(0, len(items), CLIPS_PER_BATCH)
    ]
    return AttributeClassifier.fit(torch.cat(parts), labels, features)


@typed
def fitted_classifier(
    manifest: str | Path, attributes: Sequence[str] | None = None, folder: str | Path | None = None
) -> AttributeClassifier:
    """Load the classifier in `folder`, or fit a classifier to the labels of a manifest of real clips and save it there.

    Without `attributes`, the classifier has every label of the manifest that `tag_labels` returns for all clips.
    """
    if folder is not None and Path(folder, "config.json").is_file():
        return load_module(folder, expect=AttributeClassifier).requires_grad_(False)  # type: ignore[return-value]
    items = load_items(manifest).items
    if attributes is None:
        attributes = [name for name in tag_labels(items) if all(item.labels.get(name) is not None for item in items)]
        if not attributes:
            raise ValueError(f"{manifest}: no label with few values is present in all clips; add one, e.g. instrument")
    classifier = fit_attribute_classifier(items, attributes)
    if folder is not None:
        save_module(classifier, folder)
    return classifier
