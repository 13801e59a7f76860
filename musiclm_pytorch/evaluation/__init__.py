"""Evaluation of generated music and of models: metrics, retrieval, tagging, linear probes, and reports."""

from musiclm_pytorch.evaluation.metric import ClipSet, Extractor, Metric, evaluate, extract
from musiclm_pytorch.evaluation.metrics.novelty import melody_similarity, nearest_similarity
from musiclm_pytorch.evaluation.report import MetricValue, write_report
from musiclm_pytorch.evaluation.retrieval import Retrieval

__all__ = [
    "ClipSet",
    "Extractor",
    "Metric",
    "MetricValue",
    "Retrieval",
    "evaluate",
    "extract",
    "melody_similarity",
    "nearest_similarity",
    "write_report",
]
