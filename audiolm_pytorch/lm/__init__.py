"""Language models over declared token layouts. Trainers are in `audiolm_pytorch.lm.trainers`."""

from audiolm_pytorch.lm.decodable import Decoded
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.lm.token_model import TokenLoss, TokenTransformer
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import PackedTokens, Stream

__all__ = [
    "AudioTokens",
    "CoarseTransformer",
    "Decoded",
    "FineTransformer",
    "PackedTokens",
    "SemanticTransformer",
    "StageTransformer",
    "Stream",
    "TokenLayout",
    "TokenLoss",
    "TokenTransformer",
]
