"""Neural audio codecs: waves to discrete frames and back."""

from audiolm_pytorch.codecs.protocol import Codec
from audiolm_pytorch.codecs.soundstream import AudioLMSoundStream, MusicLMSoundStream, SoundStream, SpectralSoundStream

__all__ = ["AudioLMSoundStream", "Codec", "MusicLMSoundStream", "SoundStream", "SpectralSoundStream"]
