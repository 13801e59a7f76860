"""Audio files, streams, resampling, mel spectrograms, units of time and padding."""

from audiolm_pytorch.audio.files import peak_safe, read_audio, write_audio
from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.audio.resample import resample

__all__ = ["MelSpectrogram", "peak_safe", "read_audio", "resample", "write_audio"]
