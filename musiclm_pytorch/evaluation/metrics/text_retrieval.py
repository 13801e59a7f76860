"""Retrieval of clips by their captions in the space of a joint embedding."""

import torch

from musiclm_pytorch.evaluation.joint_embedder import JointEmbedder
from musiclm_pytorch.evaluation.metric import ClipSet, Metric, UnmetNeed
from musiclm_pytorch.evaluation.report import MetricValue
from musiclm_pytorch.evaluation.retrieval import different_captions, retrieval

__all__ = ["TextRetrieval"]


class TextRetrieval(Metric):
    """Rank of a clip among all clips of the set for its caption; equal captions have several right clips."""

    name = "retrieval ({})"
    extractor: JointEmbedder

    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Measure recall at 1, 5 and 10, median rank and mean average precision."""
        texts, relevant = different_captions([[caption] for caption in clips.captions()])
        if len(texts) < 2:
            raise UnmetNeed(f"{clips.name}: retrieval needs at least 2 different captions, got {len(texts)}")
        cosines = self.extractor.texts(texts) @ torch.stack(clips.of(self.extractor)).T
        return retrieval(cosines, relevant).metrics(f"{self.name} / {clips.name}", self.extractor.note(len(clips)))
