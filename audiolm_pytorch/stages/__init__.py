"""Language models over declared token layouts.

Wrappers and trainers are imported from their modules: they need `audiolm_pytorch.sampling`, which needs the layouts
of this package.
"""

from audiolm_pytorch.stages.layout import TokenLayout
from audiolm_pytorch.stages.stages import AudioTokens, CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.stages.streams import PackedTokens, Stream
from audiolm_pytorch.stages.token_model import TokenLoss, TokenTransformer

__all__ = [
    "AudioTokens",
    "CoarseTransformer",
    "FineTransformer",
    "PackedTokens",
    "SemanticTransformer",
    "Stream",
    "TokenLayout",
    "TokenLoss",
    "TokenTransformer",
]
