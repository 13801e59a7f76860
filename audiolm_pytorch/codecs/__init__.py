"""Neural audio codecs, which encode waves as discrete codes and decode the codes."""

from typing import TYPE_CHECKING

from audiolm_pytorch.saving.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from audiolm_pytorch.codecs.base import Codec as Codec, StreamingCodec as StreamingCodec
    from audiolm_pytorch.codecs.channelwise import ChannelwiseCodec as ChannelwiseCodec
    from audiolm_pytorch.codecs.pretrained import (
        DacWrapper as DacWrapper,
        EncodecWrapper as EncodecWrapper,
        MimiWrapper as MimiWrapper,
    )
    from audiolm_pytorch.codecs.soundstream import (
        AudioLMSoundStream as AudioLMSoundStream,
        MusicLMSoundStream as MusicLMSoundStream,
        SoundStream as SoundStream,
        SpectralSoundStream as SpectralSoundStream,
    )
    from audiolm_pytorch.nn.film import FiLM as FiLM

globals().update(lazy_exports(__name__))
