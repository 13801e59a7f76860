"""Published codecs (EnCodec, DAC, Mimi) with the interface of `Codec`."""

from audiolm_pytorch.codecs.pretrained.adapter import PretrainedCodec
from audiolm_pytorch.codecs.pretrained.dac import DacWrapper
from audiolm_pytorch.codecs.pretrained.encodec import EncodecWrapper
from audiolm_pytorch.codecs.pretrained.mimi import MimiWrapper

__all__ = ["DacWrapper", "EncodecWrapper", "MimiWrapper", "PretrainedCodec"]
