"""SoundStream: encoder, residual quantizer and decoder behind the codec contract (arXiv 2107.03312)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.audio.padding import checked_lengths
from audiolm_pytorch.audio.units import frames_covering
from audiolm_pytorch.codecs.checks import check_covered, checked_audio, checked_codes
from audiolm_pytorch.codecs.convolutional import ConvDecoder, ConvEncoder
from audiolm_pytorch.codecs.quantizers import ResidualQuantizer, make_quantizer
from audiolm_pytorch.codecs.spectral import SpectralDecoder, SpectralEncoder
from audiolm_pytorch.codecs.streaming import DecoderStream, EncoderStream
from audiolm_pytorch.nn.film import FiLM
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import build_module, load_module, module_spec, register

__all__ = ["AudioLMSoundStream", "CodecOutput", "MusicLMSoundStream", "SoundStream", "SpectralSoundStream"]


class CodecOutput(NamedTuple):
    """What a training step of a codec needs.

    Attributes:
        wave: Reconstruction `[b, c, n]`.
        codes: `[b, f, q]` int64, -1 where quantizer dropout left a level out.
        frames: Frames before quantization, `[b, f, d]`.
        commitment_loss: Scalar.
    """

    wave: Tensor
    codes: Tensor
    frames: Tensor
    commitment_loss: Tensor


_PARTS = ("encoder", "decoder", "quantizer", "denoising")


@register
class SoundStream(nn.Module):
    """A neural audio codec (SoundStream, arXiv 2107.03312).

    By default encoder and decoder are the paper's causal convolutions; any other pair with the same interface can be
    passed in (see `SpectralSoundStream`). With groups, the codes of a frame run level by level, all groups of level 1
    first: any prefix is a coarser version of the same sound. `num_quantizers` counts them all.

    Args:
        codebook_size: Codes per level.
        rq_num_quantizers: Levels of the residual quantizer.
        rq_groups: Parts into which a frame is cut, each with `rq_num_quantizers` codes of its own.
        use_lookup_free_quantizer: Whether codes are signs (LFQ) instead of learnt vectors.
        use_finite_scalar_quantizer: Whether codes are rounded numbers (FSQ) instead of learnt vectors.
        codebook_dim: Width of the frames between encoder and decoder.
        channels: Channels of the first convolution (C of the paper).
        strides: Downsampling of the encoder's blocks; their product is the samples per frame.
        attn_window_size: Frames that a frame sees in the attention.
        attn_depth: Blocks of local causal attention after the encoder's and before the decoder's convolutions; the
            paper has none.
        audio_channels: 1 mono, 2 stereo.
        target_sample_hz: Rate of the waves (Hz).
        encoder: Module `(wave [b, c, n], mask [b, f] | None) -> frames [b, f, d]` with `dim`, `downsample_factor`,
            `lookahead_frames` and `stream(mask)`; replaces the convolutions of `channels`, `strides` and `attn_depth`.
        decoder: Module `frames [b, f, d] -> wave [b, c, n]` with `input_dim`, `upsample_factor`, `lookahead_frames` and
            `stream()`; likewise.
        quantizer: Makes codes of the frames (see `FrameQuantizer`); replaces the one of `codebook_size` and `rq_…`.
        denoising: Condition on whether to remove noise, between encoder and quantizer; None for a codec without.

    Raises:
        ValueError: If the parts do not fit each other.
    """

    encoder: Any
    decoder: Any
    quantizer: Any

    @beartype
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
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        quantizer: nn.Module | None = None,
        denoising: FiLM | None = None,
    ) -> None:
        super().__init__()
        conv: dict[str, Any] = dict(
            channels=audio_channels,
            base_dim=channels,
            strides=strides,
            dim=codebook_dim,
            attn_window_size=attn_window_size,
            attn_depth=attn_depth,
        )
        self.encoder = encoder or ConvEncoder(**conv)
        self.decoder = decoder or ConvDecoder(**conv)
        self.quantizer = quantizer or make_quantizer(
            dim=codebook_dim,
            codebook_size=codebook_size,
            num_quantizers=rq_num_quantizers,
            groups=rq_groups,
            lookup_free=use_lookup_free_quantizer,
            finite_scalar=use_finite_scalar_quantizer,
        )
        self.denoising = denoising
        self.target_sample_hz, self.channels = target_sample_hz, audio_channels
        self.downsample_factor: int = self.encoder.downsample_factor
        self.num_quantizers: int = self.quantizer.num_quantizers
        self.codebook_size: int = self.quantizer.codebook_size
        self.num_groups: int = getattr(self.quantizer, "num_groups", 1)
        self._check_parts_fit()

    def _check_parts_fit(self) -> None:
        if self.encoder.downsample_factor != self.decoder.upsample_factor:
            raise ValueError(
                f"the encoder makes a frame of {self.encoder.downsample_factor} samples but the decoder expands it to "
                f"{self.decoder.upsample_factor}; give both the same strides"
            )
        if not self.encoder.dim == self.quantizer.dim == self.decoder.input_dim:
            raise ValueError(
                f"widths differ: encoder {self.encoder.dim}, quantizer {self.quantizer.dim}, decoder "
                f"{self.decoder.input_dim}; give all three the same"
            )
        if self.denoising is not None and self.denoising.dim != self.encoder.dim:
            raise ValueError(
                f"the denoising condition is for frames of width {self.denoising.dim}, the encoder makes "
                f"{self.encoder.dim}; build it as FiLM(dim={self.encoder.dim})"
            )
        for part in (self.encoder, self.decoder):
            if getattr(part, "channels", self.channels) != self.channels:
                raise ValueError(
                    f"{type(part).__name__} is for {part.channels} audio channels, the codec for {self.channels}; "
                    "give all the same"
                )

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-able description from which `from_config` rebuilds this codec."""
        parts = {name: getattr(self, name) for name in _PARTS}
        return dict(
            **{name: module_spec(part) for name, part in parts.items() if part is not None},
            audio_channels=self.channels,
            target_sample_hz=self.target_sample_hz,
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SoundStream":
        """Build from the dictionary that `config` holds."""
        parts: dict[str, Any] = {name: build_module(config[name]) for name in _PARTS if name in config}
        return cls(**parts, audio_channels=config["audio_channels"], target_sample_hz=config["target_sample_hz"])

    @classmethod
    def init_and_load_from(cls, path: str | Path) -> "SoundStream":
        """Load a codec saved with `audiolm_pytorch.saving.modules.save_module`, in eval mode."""
        module = load_module(path, expect=cls)
        if not isinstance(module, cls):
            raise TypeError(f"{path} holds a {type(module).__name__}, not a {cls.__name__}")
        return module

    def fingerprint(self) -> str:
        """Hash of configuration and weights."""
        return fingerprint_of(self)

    @property
    def encoder_latency_seconds(self) -> float:
        """How long after a sample came in the code of its frame can be known, at the most: the frame and look-ahead."""
        return (1 + self.encoder.lookahead_frames) * self.downsample_factor / self.target_sample_hz

    @property
    def decoder_latency_seconds(self) -> float:
        """How much sound after a frame must be known as codes before the frame can be played."""
        return self.decoder.lookahead_frames * self.downsample_factor / self.target_sample_hz

    def num_frames(self, num_samples: int) -> int:
        """Frames that cover `num_samples` samples; the last one may be partly silence."""
        return frames_covering(num_samples, self.downsample_factor)

    def forward(
        self,
        audio: Tensor,
        return_recons_only: bool = False,
        quantize: bool = True,
        denoise: bool | Tensor = False,
    ) -> CodecOutput | Tensor:
        """Reconstruct waves.

        Args:
            audio: `[b, n]` or `[b, c, n]` in [-1, 1] at `target_sample_hz`; any number of samples.
            return_recons_only: Whether to return only the wave `[b, c, n]`, the one that decoding the codes gives.
            quantize: False leaves only the codes out (the first steps of training).
            denoise: Whether to remove noise, one for all or bool `[b]`; needs a codec with `denoising`.

        Returns:
            The reconstruction, as long as the input, alone or inside a `CodecOutput`.
        """
        wave = self._checked(audio)
        self._check_denoise(denoise)
        whole_frames = F.pad(wave, (0, -wave.shape[-1] % self.downsample_factor))
        frames = self._conditioned(self.encoder(whole_frames), denoise)
        if quantize and return_recons_only:
            # as listeners hear it, also in training mode: no level is left out and no codebook moves
            return self.decoder(self.quantizer.decode(self.quantizer.encode(frames)))[..., : wave.shape[-1]]
        if quantize:
            quantized, codes, loss = self.quantizer(frames)
        else:
            quantized, loss = self.quantizer.bypass(frames), frames.new_zeros(())
            codes = frames.new_full((*frames.shape[:2], self.num_quantizers), -1, dtype=torch.long)
        reconstruction = self.decoder(quantized)[..., : wave.shape[-1]]
        return reconstruction if return_recons_only else CodecOutput(reconstruction, codes, frames, loss)

    @torch.no_grad()
    def tokenize(self, wave: Tensor, lengths: Tensor | None = None, denoise: bool | Tensor = False) -> Tensor:
        """Codes of waves, in memory that does not grow with their length.

        Args:
            wave: `[b, n]` or `[b, c, n]` in [-1, 1] at `target_sample_hz`.
            lengths: Samples of each item `[b]`, if shorter items were padded to n.
            denoise: Whether the codes shall be of the sound without its noise, one for all or bool `[b]`.

        Returns:
            Codes `[b, f, q]` int64, coarse level first; -1 past an item's own frames.
        """
        wave = self._checked(wave)
        if lengths is None:
            return self._encoder_stream(None, denoise).whole(wave)
        lengths = rearrange(checked_lengths(lengths, wave), "b -> b 1")
        positions = torch.arange(wave.shape[-1], device=wave.device)
        wave = wave * rearrange(positions < lengths, "b n -> b 1 n")
        mask = positions[: self.num_frames(wave.shape[-1])] * self.downsample_factor < lengths
        codes = self._encoder_stream(mask, denoise).whole(wave)
        return codes.masked_fill(~rearrange(mask, "b f -> b f 1"), -1)

    @torch.no_grad()
    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        """Waves of codes, in memory that does not grow with their length.

        Args:
            codes: `[b, f, q']`, the first q' columns.
            num_samples: Samples wanted; all that the frames cover if not given.

        Returns:
            Waves `[b, c, n]` at `target_sample_hz`.

        Raises:
            ValueError: If the codes do not fit this codec or are fewer than `num_samples` needs.
        """
        codes = self._checked_codes(codes)
        check_covered(num_samples, codes.shape[1] * self.downsample_factor, codes.shape[1])
        return self.decoder_stream().whole(codes)[..., :num_samples]

    def encoder_stream(self, denoise: bool | Tensor = False) -> EncoderStream:
        """A stream that takes waves as they come in and gives the codes that `tokenize` gives for the whole.

        Args:
            denoise: As in `tokenize`.

        Returns:
            The stream; each has its own state.
        """
        return self._encoder_stream(None, denoise)

    def decoder_stream(self) -> DecoderStream:
        """A stream that takes codes as they come in and gives the wave that decoding the whole gives."""
        return DecoderStream(self.decoder.stream(), self.quantizer.decode, self._checked_codes)

    def _encoder_stream(self, mask: Tensor | None, denoise: bool | Tensor) -> EncoderStream:
        self._check_denoise(denoise)

        def to_codes(frames: Tensor) -> Tensor:
            return self.quantizer.encode(self._conditioned(frames, denoise))

        return EncoderStream(self.encoder.stream(mask), to_codes, partial(self._checked, may_be_empty=True))

    def _check_denoise(self, denoise: bool | Tensor) -> None:
        if self.denoising is None and torch.as_tensor(denoise).any():
            raise ValueError(
                "this codec was not made to remove noise; build one with SoundStream(..., "
                f"denoising=FiLM(dim={self.encoder.dim})) and train it on noisy mixtures"
            )
        if isinstance(denoise, Tensor) and (denoise.dtype != torch.bool or denoise.ndim > 1):
            raise ValueError(
                f"denoise must be one bool, or bool [b], got {denoise.dtype} {list(denoise.shape)}; e.g. flags.bool()"
            )

    def _conditioned(self, frames: Tensor, denoise: bool | Tensor) -> Tensor:
        if self.denoising is None:
            return frames
        flags = torch.as_tensor(denoise, device=frames.device)
        if flags.ndim == 1 and len(flags) != len(frames):
            raise ValueError(f"denoise must hold a flag for each of {len(frames)} items, got {len(flags)}")
        return self.denoising(frames, flags.expand(len(frames)))

    def _checked(self, wave: Tensor, may_be_empty: bool = False) -> Tensor:
        wave = checked_audio(wave, self.channels, self.target_sample_hz, may_be_empty)
        return wave.to(next(self.parameters()).dtype)

    def _checked_codes(self, codes: Tensor) -> Tensor:
        return checked_codes(codes, self.num_quantizers, self.codebook_size)


def AudioLMSoundStream(**kwargs: Any) -> SoundStream:
    """The codec of AudioLM (arXiv 2209.03143, section III-B): 16 kHz, 50 frames/s, 12 levels of 1024 codes."""
    return SoundStream(**{"target_sample_hz": 16000, "strides": (2, 4, 5, 8), "rq_num_quantizers": 12, **kwargs})


def MusicLMSoundStream(**kwargs: Any) -> SoundStream:
    """The codec of MusicLM (arXiv 2301.11325, section 3.1): 24 kHz, 50 frames/s, 12 levels of 1024 codes.

    The paper gives only the total stride of 480; its factors here are (3, 4, 5, 8).
    """
    return SoundStream(**{"target_sample_hz": 24000, "strides": (3, 4, 5, 8), "rq_num_quantizers": 12, **kwargs})


@beartype
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
) -> SoundStream:
    """A SoundStream whose encoder and decoder work at the frame rate, cheap enough to train on two CPU cores.

    Args:
        dim: Width of both networks.
        encoder_depth: ConvNeXt blocks of the encoder.
        decoder_depth: ConvNeXt blocks of the decoder.
        target_sample_hz: Rate of the waves (Hz).
        hop_samples: Samples per frame.
        codebook_size: Codes per level.
        rq_num_quantizers: Levels.
        code_dim: Width of the space in which frames are quantized.
        audio_channels: 1 mono, 2 stereo.
    """
    sizes: dict[str, Any] = dict(dim=dim, hop_samples=hop_samples, channels=audio_channels)
    return SoundStream(
        encoder=SpectralEncoder(depth=encoder_depth, **sizes),
        decoder=SpectralDecoder(depth=decoder_depth, **sizes),
        quantizer=ResidualQuantizer(
            dim=dim, codebook_size=codebook_size, num_quantizers=rq_num_quantizers, codebook_dim=code_dim
        ),
        audio_channels=audio_channels,
        target_sample_hz=target_sample_hz,
    )
