"""Neural audio codecs, which encode waves as discrete codes and decode the codes."""

from audiolm_pytorch.codecs.base import Codec, StreamingCodec
from audiolm_pytorch.codecs.pretrained import DacWrapper, EncodecWrapper, MimiWrapper, open_codec
from audiolm_pytorch.codecs.soundstream import AudioLMSoundStream, MusicLMSoundStream, SoundStream, SpectralSoundStream
from audiolm_pytorch.nn.film import FiLM

__all__ = [
    "AudioLMSoundStream",
    "Codec",
    "DacWrapper",
    "EncodecWrapper",
    "FiLM",
    "MimiWrapper",
    "MusicLMSoundStream",
    "SoundStream",
    "SpectralSoundStream",
    "StreamingCodec",
    "open_codec",
]
