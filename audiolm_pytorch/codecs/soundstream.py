"""The SoundStream codec, which combines encoder, residual quantizer and decoder (arXiv 2107.03312)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.padding import checked_lengths
from audiolm_pytorch.checks.damage import check_finite
from audiolm_pytorch.checks.tracing import is_traced
from audiolm_pytorch.checks.types import keep_arguments, named, typed
from audiolm_pytorch.codecs.base import StreamingCodec
from audiolm_pytorch.codecs.convolutional import ConvDecoder, ConvEncoder
from audiolm_pytorch.codecs.networks import WaveDecoder, WaveEncoder
from audiolm_pytorch.codecs.quantizers import FrameQuantizer, ResidualQuantizer, make_quantizer
from audiolm_pytorch.codecs.spectral import SpectralDecoder, SpectralEncoder
from audiolm_pytorch.codecs.streaming import DecoderStream, EncoderStream
from audiolm_pytorch.nn.film import FiLM
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import load_module, module_spec, register

__all__ = ["AudioLMSoundStream", "CodecOutput", "MusicLMSoundStream", "SoundStream", "SpectralSoundStream"]


class CodecOutput(NamedTuple):
    """Output of `SoundStream.forward`: reconstructed waves `[b, c, n]` and the values that training needs.

    Codes `[b, f, q]` int64 are -1 in levels that level dropout skipped. `frames [b, f, d]` precede quantization.
    """

    wave: Tensor
    codes: Tensor
    frames: Tensor
    commitment_loss: Tensor


@register
class SoundStream(StreamingCodec):
    """A neural audio codec (SoundStream, arXiv 2107.03312).

    The default encoder and decoder are the causal convolutional networks of the paper; other networks can be passed
    (see `SpectralSoundStream`). The codec has `num_quantizers` codes per frame, the number of levels times the number
    of groups. The codes of a frame are ordered level by level, with all groups of level 1 first. The first codes of a
    frame alone describe a coarser version of the sound.

    Args:
        rq_num_quantizers: Number of levels of the residual quantizer.
        rq_groups: Number of equal parts of a frame; each part has `rq_num_quantizers` codes.
        use_lookup_free_quantizer: Whether codes are signs (LFQ) instead of learnt vectors.
        use_finite_scalar_quantizer: Whether codes are rounded numbers (FSQ) instead of learnt vectors.
        codebook_dim: Width of the frames between encoder and decoder.
        channels: Number of channels of the first convolution (C of the paper).
        strides: Downsampling factors of the encoder blocks; their product is the number of samples per frame.
        attn_window_size: Number of frames to which a frame attends in local attention, including itself.
        attn_depth: Number of local attention layers after the encoder convolutions and before the decoder convolutions;
            the paper has no attention.
        encoder: Network that replaces the default encoder, which `channels`, `strides` and `attn_...` define.
        decoder: Network that replaces the default decoder, which the same arguments define.
        quantizer: Quantizer that replaces the default quantizer, which `codebook_size` and `rq_...` define.
        denoising: FiLM layer before quantization that turns denoising on or off; None if the codec cannot denoise.
    """

    @typed
    def __init__(
        self,
        *,
        codebook_size: int = 1024,
        rq_num_quantizers: int = 8,
        rq_groups: int = 1,
        use_lookup_free_quantizer: bool = False,
        use_finite_scalar_quantizer: bool = False,
        codebook_dim: int = 512,
        channels: int = 32,
        strides: Sequence[int] = (2, 4, 5, 8),
        attn_window_size: int = 128,
        attn_depth: int = 0,
        audio_channels: int = 1,
        target_sample_hz: int = 16000,
        encoder: WaveEncoder | None = None,
        decoder: WaveDecoder | None = None,
        quantizer: FrameQuantizer | None = None,
        denoising: FiLM | None = None,
    ) -> None:
        super().__init__()
        check_positive(codebook_dim=codebook_dim, channels=channels, rq_num_quantizers=rq_num_quantizers)
        check_positive(codebook_size=codebook_size, rq_groups=rq_groups, attn_window_size=attn_window_size)
        check_positive(audio_channels=audio_channels, target_sample_hz=target_sample_hz)
        if attn_depth < 0:
            raise ValueError(f"attn_depth must be at least 0, got {attn_depth}")
        conv: dict[str, Any] = dict(channels=audio_channels, base_dim=channels, strides=strides, dim=codebook_dim)
        conv |= dict(attn_window_size=attn_window_size, attn_depth=attn_depth)
        self.encoder: WaveEncoder = encoder or ConvEncoder(**conv)
        self.decoder: WaveDecoder = decoder or ConvDecoder(**conv)
        sizes: dict[str, Any] = dict(dim=codebook_dim, codebook_size=codebook_size, num_quantizers=rq_num_quantizers)
        kind = dict(lookup_free=use_lookup_free_quantizer, finite_scalar=use_finite_scalar_quantizer)
        self.quantizer: FrameQuantizer = quantizer or make_quantizer(**sizes, groups=rq_groups, **kind)
        self.denoising = denoising
        self.target_sample_hz = target_sample_hz
        # `channels` is the name of all codecs, not the width of the first convolution.
        self.channels = self.audio_channels = audio_channels
        self.downsample_factor = self.encoder.downsample_factor
        self.num_quantizers, self.codebook_size = self.quantizer.num_quantizers, self.quantizer.codebook_size
        self.num_groups = self.rq_groups = self.quantizer.num_groups
        self.rq_num_quantizers, self.codebook_dim = self.num_quantizers // self.num_groups, self.encoder.dim
        # An encoder that is passed in may not have these settings.
        keep_arguments(
            self, {name: value for name, value in getattr(self.encoder, "config", {}).items() if name in conv}
        )
        self._check_compatible()

    def _check_compatible(self) -> None:
        if self.encoder.downsample_factor != self.decoder.upsample_factor:
            raise ValueError(
                f"the encoder has {self.encoder.downsample_factor} samples per frame, the decoder has "
                f"{self.decoder.upsample_factor}; use the same strides for both"
            )
        if not self.encoder.dim == self.quantizer.dim == self.decoder.input_dim:
            raise ValueError(
                f"encoder, quantizer and decoder must have equal widths, got encoder width {self.encoder.dim}, "
                f"quantizer width {self.quantizer.dim} and decoder width {self.decoder.input_dim}"
            )
        if self.denoising is not None and self.denoising.dim != self.encoder.dim:
            raise ValueError(
                f"the denoising condition has width {self.denoising.dim}, the encoder has width {self.encoder.dim}; "
                f"use FiLM(dim={self.encoder.dim})"
            )
        if not self.encoder.channels == self.decoder.channels == self.channels:
            raise ValueError(
                f"encoder and decoder need audio_channels={self.channels} audio channels, got {self.encoder.channels} "
                f"in the encoder and {self.decoder.channels} in the decoder"
            )

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as data that JSON can store."""
        parts = {name: getattr(self, name) for name in ("encoder", "decoder", "quantizer", "denoising")}
        return dict(
            **{name: module_spec(part) for name, part in parts.items() if part is not None},
            audio_channels=self.channels,
            target_sample_hz=self.target_sample_hz,
        )

    @classmethod
    def init_and_load_from(cls, path: str | Path) -> "SoundStream":
        """Load, in eval mode, a codec that `audiolm_pytorch.saving.modules.save_module` saved."""
        module: Any = load_module(path, expect=cls)
        return module

    def fingerprint(self) -> str:
        """Hash of the weights and the configuration of the codec."""
        return fingerprint_of(self)

    @property
    def encoder_latency_seconds(self) -> float:
        """Longest delay from a sample to its codes, which is the duration of one frame and of the look-ahead frames."""
        return (1 + self.encoder.lookahead_frames) * self.downsample_factor / self.target_sample_hz

    @property
    def decoder_latency_seconds(self) -> float:
        """Duration of the later frames that the decoder must receive before it can decode a frame."""
        return self.decoder.lookahead_frames * self.downsample_factor / self.target_sample_hz

    @named
    def forward(
        self,
        audio: Tensor,
        return_recons_only: bool = False,
        quantize: bool = True,
        denoise: bool | Tensor = False,
    ) -> CodecOutput | Tensor:
        """Encode, quantize and decode waves `[n]`, `[b, n]` or `[b, c, n]` in [-1, 1] at `target_sample_hz`.

        Args:
            return_recons_only: Whether to return only the reconstructed waves, decoded from the codes of `tokenize`;
                then training mode changes neither waves nor codebooks.
            quantize: Whether to quantize frames; False calls `FrameQuantizer.bypass` instead (first training steps).
            denoise: Whether to remove noise, as one bool for all items or a bool tensor `[b]`; True needs a codec with
                `denoising`.

        Returns:
            The reconstructed waves with as many samples as the input, or a `CodecOutput` that contains them.
        """
        frames, num_samples = self.encode_frames(audio, denoise), audio.shape[-1]
        if quantize and return_recons_only:
            return self.decoder(self.quantizer.decode(self.quantizer.encode(frames)))[..., :num_samples]
        if quantize:
            quantized, codes, loss = self.quantizer(frames)
        else:
            quantized, loss = self.quantizer.bypass(frames), frames.new_zeros(())
            codes = frames.new_full((*frames.shape[:2], self.num_quantizers), -1, dtype=torch.long)
        wave = self.decoder(quantized)[..., :num_samples]
        return wave if return_recons_only else CodecOutput(wave, codes, frames, loss)

    def encode_frames(self, audio: Tensor, denoise: bool | Tensor = False) -> Tensor:
        """Encode waves `[b, n]` or `[b, c, n]` as frames `[b, f, d]` without quantization; gradients pass."""
        wave = self._check_wave(audio, name="audio")
        self._check_denoise(denoise)
        whole_frames = F.pad(wave, (0, -wave.shape[-1] % self.downsample_factor))
        return self._condition(self.encoder(whole_frames), denoise)

    @named
    @torch.no_grad()
    def tokenize(self, wave: Tensor, lengths: Tensor | None = None, denoise: bool | Tensor = False) -> Tensor:
        """Encode waves as `Codec.tokenize` does, with memory that does not grow with the length of the waves.

        `denoise`, one bool for all items or a bool tensor `[b]`, is True to remove noise from the encoded sound.
        """
        wave = self._check_wave(wave, lengths)
        if is_traced() and lengths is None:
            whole_frames = F.pad(wave, (0, -wave.shape[-1] % self.downsample_factor))
            return self.quantizer.encode(self._condition(self.encoder(whole_frames), denoise))
        if lengths is None:
            return self._encoder_stream(None, denoise).encode_checked(wave)
        lengths = rearrange(checked_lengths(lengths, wave), "b -> b 1")
        positions = torch.arange(wave.shape[-1], device=wave.device)
        wave = wave.masked_fill(rearrange(positions >= lengths, "b n -> b 1 n"), 0.0)
        mask = positions[: self.num_frames(wave.shape[-1])] * self.downsample_factor < lengths
        codes = self._encoder_stream(mask, denoise).encode_checked(wave)
        return codes.masked_fill(~rearrange(mask, "b f -> b f 1"), -1)

    @named
    @torch.no_grad()
    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        """Decode codes as `Codec.decode_from_codebook_indices` does, with little memory in addition to the waves."""
        codes = self._check_codes(codes)
        self._check_num_samples(num_samples, codes.shape[1])
        if is_traced():
            return self.decoder(self.quantizer.decode(codes))[..., :num_samples]
        return self.decoder_stream().decode_checked(codes)[..., :num_samples]

    def encoder_stream(self, denoise: bool | Tensor = False) -> EncoderStream:
        """Create a stream that encodes chunks of a wave as the codes of `tokenize(wave, denoise=denoise)`."""
        return self._encoder_stream(None, denoise)

    def decoder_stream(self) -> DecoderStream:
        """Create a stream that decodes chunks of codes to the wave of `decode_from_codebook_indices(codes)`."""
        return DecoderStream(
            self.decoder.stream(),
            self.quantizer.decode,
            self._check_codes,
            partial(check_finite, module=self, name="decoded samples"),
        )

    def _encoder_stream(self, mask: Tensor | None, denoise: bool | Tensor) -> EncoderStream:
        self._check_denoise(denoise)

        def to_codes(frames: Tensor) -> Tensor:
            return self.quantizer.encode(check_finite(self._condition(frames, denoise), self, "encoded frames"))

        return EncoderStream(self.encoder.stream(mask), to_codes, partial(self._check_wave, may_be_empty=True))

    def _check_denoise(self, denoise: bool | Tensor) -> None:
        if self.denoising is None and torch.as_tensor(denoise).any():
            raise ValueError(
                "got denoise=True, but this codec cannot remove noise; create a codec with SoundStream(..., "
                f"denoising=FiLM(dim={self.encoder.dim})) and train it on noisy mixtures"
            )
        if isinstance(denoise, Tensor) and (denoise.dtype != torch.bool or denoise.ndim > 1):
            raise ValueError(
                f"denoise must be one bool or a bool tensor [b], got {denoise.dtype} with shape {list(denoise.shape)}; "
                "convert with .bool()"
            )

    def _condition(self, frames: Tensor, denoise: bool | Tensor) -> Tensor:
        if self.denoising is None:
            return frames
        flags = torch.as_tensor(denoise, device=frames.device)
        if flags.ndim == 1 and len(flags) != len(frames):
            raise ValueError(f"denoise must contain one flag per item, got {len(flags)} flags for {len(frames)} items")
        return self.denoising(frames, flags.expand(len(frames)))


def AudioLMSoundStream(**kwargs: Any) -> SoundStream:
    """The codec of AudioLM (arXiv 2209.03143, section III-B): 16 kHz, 50 frames/s, 12 levels of 1024 codes."""
    return SoundStream(**{"target_sample_hz": 16000, "strides": (2, 4, 5, 8), "rq_num_quantizers": 12, **kwargs})


def MusicLMSoundStream(**kwargs: Any) -> SoundStream:
    """The codec of MusicLM (arXiv 2301.11325, section 3.1): 24 kHz, 50 frames/s, 12 levels of 1024 codes.

    The MusicLM paper defines only the total stride of 480; the strides (3, 4, 5, 8) are a choice of this library.
    """
    return SoundStream(**{"target_sample_hz": 24000, "strides": (3, 4, 5, 8), "rq_num_quantizers": 12, **kwargs})


@typed
def SpectralSoundStream(
    *,
    dim: int = 256,
    encoder_depth: int = 4,
    decoder_depth: int = 8,
    target_sample_hz: int = 16000,
    hop_samples: int = 320,
    codebook_size: int = 1024,
    rq_num_quantizers: int = 4,
    code_dim: int = 16,
    audio_channels: int = 1,
    magnitude_floor: float = 1e-5,
) -> SoundStream:
    """A SoundStream whose layers run once per frame, not once per sample, so that two CPU cores can train it.

    `encoder_depth` and `decoder_depth` are numbers of ConvNeXt blocks, and a frame has `hop_samples` samples. Frames
    are projected to code vectors of width `code_dim` and back. `SpectralEncoder` documents `magnitude_floor`.
    """
    check_positive(rq_num_quantizers=rq_num_quantizers, code_dim=code_dim, audio_channels=audio_channels)
    if encoder_depth < 0 or decoder_depth < 0:
        raise ValueError(f"encoder_depth={encoder_depth} and decoder_depth={decoder_depth} must be at least 0")
    sizes: dict[str, Any] = dict(dim=dim, hop_samples=hop_samples, channels=audio_channels)
    return SoundStream(
        encoder=SpectralEncoder(depth=encoder_depth, magnitude_floor=magnitude_floor, **sizes),
        decoder=SpectralDecoder(depth=decoder_depth, **sizes),
        quantizer=ResidualQuantizer(
            dim=dim, codebook_size=codebook_size, num_quantizers=rq_num_quantizers, codebook_dim=code_dim
        ),
        audio_channels=audio_channels,
        target_sample_hz=target_sample_hz,
    )
