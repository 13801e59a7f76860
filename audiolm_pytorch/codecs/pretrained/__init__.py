"""Published codecs (EnCodec, DAC, Mimi) with the interface of `Codec`."""

from audiolm_pytorch.codecs.pretrained.adapter import PretrainedCodec
from audiolm_pytorch.codecs.pretrained.dac import DacWrapper
from audiolm_pytorch.codecs.pretrained.encodec import EncodecWrapper
from audiolm_pytorch.codecs.pretrained.mimi import MimiWrapper
from audiolm_pytorch.codecs.pretrained.open_codec import open_codec

__all__ = ["DacWrapper", "EncodecWrapper", "MimiWrapper", "PretrainedCodec", "open_codec"]
