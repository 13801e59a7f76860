"""Audio: files, streams, resampling, mel spectrograms, units of time, padded batches."""

from audiolm_pytorch.audio.files import peak_safe, read_audio, resample, write_audio
from audiolm_pytorch.audio.mel import MelSpectrogram

__all__ = ["MelSpectrogram", "peak_safe", "read_audio", "resample", "write_audio"]
