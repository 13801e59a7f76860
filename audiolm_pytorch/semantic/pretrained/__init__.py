"""Published audio encoders and published semantic tokenizers."""

from audiolm_pytorch.semantic.pretrained.encoder import TransformersEncoder, open_encoder
from audiolm_pytorch.semantic.pretrained.hubert import HubertWithKmeans
from audiolm_pytorch.semantic.pretrained.vq_wav2vec import FairseqVQWav2Vec

__all__ = ["FairseqVQWav2Vec", "HubertWithKmeans", "TransformersEncoder", "open_encoder"]
