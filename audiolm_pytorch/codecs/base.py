"""The interfaces of audio codecs, and checks of their inputs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.audio.units import frames_covering
from audiolm_pytorch.audio.waves import checked_wave
from audiolm_pytorch.checks.tracing import is_traced
from audiolm_pytorch.checks.types import described, named
from audiolm_pytorch.codecs.streaming import DecoderStream, EncoderStream
from audiolm_pytorch.saving.modules import SavedModule

__all__ = ["Codec", "EncodedWave", "StreamingCodec"]


class EncodedWave(NamedTuple):
    """Codes `[b, f, q]` int64 of a batch of waves; -1 after the last frame of an item.

    `scales [b, s]` contains the RMS of each segment, 0 after the last segment of an item; None if the codec has no
    scales.
    """

    codes: Tensor
    scales: Tensor | None = None


class Codec(SavedModule, ABC):
    """A neural audio codec, which encodes waves as frames of discrete codes and decodes the codes.

    Attributes:
        downsample_factor: Samples per frame.
        num_quantizers: Number of codes per frame (levels times groups of the quantizer), from coarse to fine.
        has_scales: Whether `encode` also returns the loudness of segments.
    """

    pipeline_tag = "audio-to-audio"
    published: ClassVar[Mapping[str, str]] = {"encodec": "EncodecWrapper", "dac": "DacWrapper", "mimi": "MimiWrapper"}

    target_sample_hz: int
    downsample_factor: int
    channels: int
    num_quantizers: int
    codebook_size: int
    has_scales: bool = False

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the weights and settings of the codec that determine its codes."""

    @abstractmethod
    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode waves as codes `[b, f, q]` int64, coarse level first; -1 after the last frame of an item.

        Waves `[n]`, `[b, n]` or `[b, c, n]` at `target_sample_hz` have any length and values in [-1, 1]. `lengths [b]`
        are the numbers of samples of the items; None if no item is padded.
        """

    @abstractmethod
    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        """Decode codes `[b, f, q']` of the first q' quantizers (at least one) to waves `[b, c, n]`.

        The waves have `num_samples` samples; None for all samples that the frames cover.
        """

    @named
    def encode(self, wave: Tensor, lengths: Tensor | None = None) -> EncodedWave:
        """Encode waves as `tokenize` does; return codes, and the loudness of segments if `has_scales` is True."""
        return EncodedWave(self.tokenize(wave, lengths))

    @named
    def decode(self, codes: Tensor, scales: Tensor | None = None, num_samples: int | None = None) -> Tensor:
        """Decode codes as `decode_from_codebook_indices` does, with the scales `[b, s]` that `encode` returned."""
        if scales is not None:
            raise ValueError(
                f"{type(self).__name__} does not normalise segments and has no scales; call decode without scales"
            )
        return self.decode_from_codebook_indices(codes, num_samples)

    def decoder_stream(self) -> DecoderStream:
        """Create a stream that decodes chunks of codes to the wave of `decode_from_codebook_indices(codes)`."""
        raise ValueError(
            f"{type(self).__name__} has no decoder_stream; call generate, or use a codec with a decoder_stream, such "
            "as SoundStream"
        )

    def num_frames(self, num_samples: int) -> int:
        """Number of frames that cover `num_samples` samples; silence fills the last frame."""
        return frames_covering(num_samples, self.downsample_factor)

    def covered_samples(self, num_frames: int) -> int:
        """Number of samples to which `num_frames` frames decode."""
        return num_frames * self.downsample_factor

    def bitrate_kbps(self, num_levels: int | None = None) -> float:
        """Bitrate (kbit/s) of the first `num_levels` codes of each frame (None: all codes), without entropy coding."""
        num_levels = self.check_num_levels(num_levels)
        return num_levels * math.log2(self.codebook_size) * self.target_sample_hz / self.downsample_factor / 1000

    def check_num_levels(self, num_levels: int | None) -> int:
        """Check that the codec has `num_levels` codes per frame, and return this number; None means all codes."""
        if num_levels is None:
            return self.num_quantizers
        if not 1 <= num_levels <= self.num_quantizers:
            raise ValueError(f"num_levels must be in 1..{self.num_quantizers}, got {num_levels}")
        return num_levels

    def _check_wave(
        self, wave: Tensor, lengths: Tensor | None = None, may_be_empty: bool = False, name: str = "wave"
    ) -> Tensor:
        """Check a wave with `checked_wave`, and return it as `[b, c, n]` in the precision of the weights."""
        checked = checked_wave(wave, self.channels, lengths=lengths, may_be_empty=may_be_empty, name=name)
        return checked.to(next(self.parameters()).dtype)

    def _check_codes(self, codes: Tensor) -> Tensor:
        """Check that codes are integers `[b, f, q']` in the range of the codebooks, and return them as int64."""
        if not isinstance(codes, Tensor) or codes.is_complex():
            raise TypeError(f"codes must be a tensor of integers, got {described(codes)}")
        if codes.ndim != 3 or not 1 <= codes.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"codes must be [b, f, q] with q in 1..{self.num_quantizers}, got shape {list(codes.shape)}"
            )
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}; convert them with .long()")
        codes = codes.long()
        if not is_traced() and codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise ValueError(
                f"codes must lie in 0..{self.codebook_size - 1}, got {int(codes.min())}..{int(codes.max())}; remove "
                "padding (-1) first"
            )
        return codes

    def _check_num_samples(self, num_samples: int | None, num_frames: int) -> None:
        """Check that `num_frames` frames decode to at least `num_samples` samples."""
        covered = self.covered_samples(num_frames)
        if num_samples is not None and not isinstance(num_samples, int | np.integer):
            raise TypeError(f"num_samples must be int | None, got {described(num_samples)}")
        if num_samples is not None and not 0 <= num_samples <= covered:
            raise ValueError(
                f"{num_frames} frames of codes cover only {covered} samples, got num_samples={num_samples}; "
                "request fewer samples"
            )


class StreamingCodec(Codec):
    """A codec that also encodes and decodes chunk by chunk, with the same results as for whole waves."""

    @property
    @abstractmethod
    def encoder_latency_seconds(self) -> float:
        """Longest delay from a sample to its codes, which is the duration of one frame and of the look-ahead frames."""

    @property
    @abstractmethod
    def decoder_latency_seconds(self) -> float:
        """Duration of the later frames that the decoder must receive before it can decode a frame."""

    @abstractmethod
    def encoder_stream(self) -> EncoderStream:
        """Create a stream that encodes chunks of a wave as the codes of `tokenize(wave)`."""

    @abstractmethod
    def decoder_stream(self) -> DecoderStream:
        """Create a stream that decodes chunks of codes to the wave of `decode_from_codebook_indices(codes)`."""
