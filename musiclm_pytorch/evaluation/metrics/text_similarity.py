"""Similarity of clips and captions: CLAP score, and MuLan cycle consistency (MusicLM, arXiv:2301.11325, sec. 4.3)."""

import torch

from musiclm_pytorch.evaluation.joint_embedder import JointEmbedder
from musiclm_pytorch.evaluation.metric import ClipSet, Metric
from musiclm_pytorch.evaluation.report import MetricValue

__all__ = ["TextSimilarity"]


class TextSimilarity(Metric):
    """Mean cosine of the embeddings of clips and captions; the chance level is the mean over the captions of others."""

    name = "text similarity ({})"
    extractor: JointEmbedder

    def measure(self, clips: ClipSet, real: ClipSet | None, training: ClipSet | None) -> list[MetricValue]:
        """Measure clips with captions."""
        cosines = (self.extractor.texts(clips.captions()) @ torch.stack(clips.of(self.extractor)).T).double().numpy()
        count = len(clips)
        chance = None if count < 2 else float((cosines.sum() - cosines.trace()) / (count * (count - 1)))
        note = self.extractor.note(count)
        return [MetricValue.mean(f"{self.name} / {clips.name}", cosines.diagonal(), chance, note)]
