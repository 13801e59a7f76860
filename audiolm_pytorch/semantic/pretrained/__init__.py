"""Published encoders and tokenizers of others behind the contracts of this room."""

from audiolm_pytorch.semantic.pretrained.encoder import TransformersEncoder
from audiolm_pytorch.semantic.pretrained.hubert import HubertWithKmeans
from audiolm_pytorch.semantic.pretrained.opening import open_encoder
from audiolm_pytorch.semantic.pretrained.vq_wav2vec import FairseqVQWav2Vec

__all__ = ["FairseqVQWav2Vec", "HubertWithKmeans", "TransformersEncoder", "open_encoder"]
