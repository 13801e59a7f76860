"""Language models over declared token layouts. Trainers are in `audiolm_pytorch.stages.trainers`."""

from audiolm_pytorch.stages.decodable import Decoded
from audiolm_pytorch.stages.decoding import decode
from audiolm_pytorch.stages.layout import TokenLayout
from audiolm_pytorch.stages.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.stages.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.stages.streams import PackedTokens, Stream
from audiolm_pytorch.stages.token_model import TokenLoss, TokenTransformer
from audiolm_pytorch.stages.wrappers import (
    CoarseTransformerWrapper,
    FineTransformerWrapper,
    SemanticTransformerWrapper,
)

__all__ = [
    "AudioTokens",
    "CoarseTransformer",
    "CoarseTransformerWrapper",
    "Decoded",
    "FineTransformer",
    "FineTransformerWrapper",
    "PackedTokens",
    "SemanticTransformer",
    "SemanticTransformerWrapper",
    "StageTransformer",
    "Stream",
    "TokenLayout",
    "TokenLoss",
    "TokenTransformer",
    "decode",
]
