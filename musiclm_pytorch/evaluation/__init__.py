"""Measures of generated music: attribute accuracy, retrieval, novelty, and reports with chance levels."""

from musiclm_pytorch.evaluation.attributes import AttributeClassifier, fit_attribute_classifier
from musiclm_pytorch.evaluation.novelty import melody_similarity, nearest_similarity
from musiclm_pytorch.evaluation.report import Figure, balanced_accuracy, write_report
from musiclm_pytorch.evaluation.retrieval import Retrieval

__all__ = [
    "AttributeClassifier",
    "Figure",
    "Retrieval",
    "balanced_accuracy",
    "fit_attribute_classifier",
    "melody_similarity",
    "nearest_similarity",
    "write_report",
]
