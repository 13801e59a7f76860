"""Semantic tokenizers: base classes, published encoders, and BEST-RQ with k-means, which is trained on audio only."""

from typing import TYPE_CHECKING

from audiolm_pytorch.saving.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from audiolm_pytorch.semantic.base import FrameEncoder as FrameEncoder, SemanticTokenizer as SemanticTokenizer
    from audiolm_pytorch.semantic.best_rq.model import BestRQ as BestRQ, BestRQEncoder as BestRQEncoder
    from audiolm_pytorch.semantic.best_rq.training import (
        BestRQTask as BestRQTask,
        SemanticTokenizerTrainer as SemanticTokenizerTrainer,
    )
    from audiolm_pytorch.semantic.kmeans_trainer import (
        ClusterUsage as ClusterUsage,
        KMeansFit as KMeansFit,
        KMeansTrainer as KMeansTrainer,
    )
    from audiolm_pytorch.semantic.pretrained import (
        FairseqVQWav2Vec as FairseqVQWav2Vec,
        HubertWithKmeans as HubertWithKmeans,
        TransformersEncoder as TransformersEncoder,
        open_encoder as open_encoder,
    )
    from audiolm_pytorch.semantic.runs import Runs as Runs, deduplicate as deduplicate, expand as expand
    from audiolm_pytorch.semantic.tokenizer import KMeansTokenizer as KMeansTokenizer

globals().update(lazy_exports(__name__))
