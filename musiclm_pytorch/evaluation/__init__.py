"""Measures of generated music: attribute accuracy, retrieval, novelty, and reports with chance levels."""

from musiclm_pytorch.evaluation.novelty import melody_similarity, nearest_similarity
from musiclm_pytorch.evaluation.report import Metric, balanced_accuracy, write_report
from musiclm_pytorch.evaluation.retrieval import Retrieval

__all__ = [
    "Metric",
    "Retrieval",
    "balanced_accuracy",
    "melody_similarity",
    "nearest_similarity",
    "write_report",
]
