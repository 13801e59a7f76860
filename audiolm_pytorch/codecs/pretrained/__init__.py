"""Published codecs of others behind the codec contract."""

from audiolm_pytorch.codecs.pretrained.adapter import CodecCard, PretrainedCodec, open_codec
from audiolm_pytorch.codecs.pretrained.dac import DacWrapper
from audiolm_pytorch.codecs.pretrained.encodec import EncodecWrapper
from audiolm_pytorch.codecs.pretrained.mimi import MimiWrapper

__all__ = ["CodecCard", "DacWrapper", "EncodecWrapper", "MimiWrapper", "PretrainedCodec", "open_codec"]
