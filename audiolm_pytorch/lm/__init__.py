"""Token language models: the three stages of AudioLM and their training."""

from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.lm.token_model import TokenLoss, TokenTransformer

__all__ = [
    "AudioTokens",
    "CoarseTransformer",
    "FineTransformer",
    "SemanticTransformer",
    "StageTransformer",
    "TokenLoss",
    "TokenTransformer",
]
