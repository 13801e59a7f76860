"""SoundStream: encoder, residual quantizer and decoder behind the codec contract (arXiv 2107.03312)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.codecs.convolutional import ConvDecoder, ConvEncoder
from audiolm_pytorch.codecs.quantizer import ResidualQuantizer
from audiolm_pytorch.codecs.spectral import SpectralDecoder, SpectralEncoder
from audiolm_pytorch.io import build_module, fingerprint_of, load_module, module_spec, register
from audiolm_pytorch.units import frames_covering

__all__ = ["AudioLMSoundStream", "CodecOutput", "MusicLMSoundStream", "SoundStream", "SpectralSoundStream"]


class CodecOutput(NamedTuple):
    """What a training step of a codec needs.

    Attributes:
        wave: Reconstruction `[b, c, n]`.
        codes: `[b, f, q]` int64, -1 where quantizer dropout left a level out.
        frames: Encoder frames before quantization, `[b, f, d]`.
        commitment_loss: Scalar.
    """

    wave: Tensor
    codes: Tensor
    frames: Tensor
    commitment_loss: Tensor


@register
class SoundStream(nn.Module):
    """A neural audio codec (SoundStream, arXiv 2107.03312).

    By default encoder and decoder are the paper's causal convolutions; any other pair with the same interface can be
    passed in (see `SpectralSoundStream`).

    Args:
        codebook_size: Codes per level.
        rq_num_quantizers: Levels of the residual quantizer.
        codebook_dim: Width of the frames between encoder and decoder.
        channels: Channels of the first convolution (C of the paper).
        strides: Downsampling of the encoder's blocks; their product is the samples per frame.
        audio_channels: 1 mono, 2 stereo.
        target_sample_hz: Rate of the waves (Hz).
        encoder: Module `(wave [b, c, n], mask [b, f] | None) -> frames [b, f, d]` with `dim` and `downsample_factor`.
        decoder: Module `frames [b, f, d] -> wave [b, c, n]` with `input_dim` and `upsample_factor`.
        quantizer: Makes codes of the frames.

    Raises:
        ValueError: If the parts do not fit each other.
    """

    encoder: Any
    decoder: Any

    @beartype
    def __init__(
        self,
        *,
        codebook_size: int = 1024,
        rq_num_quantizers: int = 8,
        codebook_dim: int = 512,
        channels: int = 32,
        strides: Sequence[int] = (2, 4, 5, 8),
        audio_channels: int = 1,
        target_sample_hz: int = 16000,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        quantizer: ResidualQuantizer | None = None,
    ) -> None:
        super().__init__()
        conv: dict[str, Any] = dict(channels=audio_channels, base_dim=channels, strides=strides, dim=codebook_dim)
        self.encoder = encoder or ConvEncoder(**conv)
        self.decoder = decoder or ConvDecoder(**conv)
        self.quantizer = quantizer or ResidualQuantizer(
            dim=codebook_dim, codebook_size=codebook_size, num_quantizers=rq_num_quantizers
        )
        self.target_sample_hz, self.channels = target_sample_hz, audio_channels
        self.downsample_factor: int = self.encoder.downsample_factor
        self.num_quantizers, self.codebook_size = self.quantizer.num_quantizers, self.quantizer.codebook_size
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

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-able description from which `from_config` rebuilds this codec."""
        return dict(
            encoder=module_spec(self.encoder),
            decoder=module_spec(self.decoder),
            quantizer=module_spec(self.quantizer),
            audio_channels=self.channels,
            target_sample_hz=self.target_sample_hz,
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SoundStream":
        """Build from the dictionary that `config` holds."""
        parts: dict[str, Any] = {name: build_module(config[name]) for name in ("encoder", "decoder", "quantizer")}
        return cls(**parts, audio_channels=config["audio_channels"], target_sample_hz=config["target_sample_hz"])

    @classmethod
    def init_and_load_from(cls, path: str | Path) -> "SoundStream":
        """Load a codec saved with `audiolm_pytorch.io.save_module`, in eval mode."""
        module = load_module(path, expect=cls)
        if not isinstance(module, cls):
            raise TypeError(f"{path} holds a {type(module).__name__}, not a {cls.__name__}")
        return module

    @property
    def fingerprint(self) -> str:
        """Hash of configuration and weights."""
        return fingerprint_of(self)

    def num_frames(self, num_samples: int) -> int:
        """Frames that cover `num_samples` samples; the last one may be partly silence."""
        return frames_covering(num_samples, self.downsample_factor)

    def forward(self, audio: Tensor, return_recons_only: bool = False, quantize: bool = True) -> CodecOutput | Tensor:
        """Reconstruct waves.

        Args:
            audio: `[b, n]` or `[b, c, n]` in [-1, 1] at `target_sample_hz`; any number of samples.
            return_recons_only: Whether to return only the wave `[b, c, n]`.
            quantize: False passes the encoder's frames straight to the decoder (the first steps of training).

        Returns:
            The reconstruction, as long as the input, alone or inside a `CodecOutput`.
        """
        wave = self._checked(audio)
        frames = self.encoder(self._whole_frames(wave))
        if quantize:
            quantized, codes, loss = self.quantizer(frames)
        else:
            quantized, loss = frames, frames.new_zeros(())
            codes = frames.new_full((*frames.shape[:2], self.num_quantizers), -1, dtype=torch.long)
        reconstruction = self.decoder(quantized)[..., : wave.shape[-1]]
        return reconstruction if return_recons_only else CodecOutput(reconstruction, codes, frames, loss)

    @torch.no_grad()
    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes of waves.

        Args:
            wave: `[b, n]` or `[b, c, n]` in [-1, 1] at `target_sample_hz`.
            lengths: Samples of each item `[b]`, if shorter items were padded to n.

        Returns:
            Codes `[b, f, q]` int64, coarse level first; -1 past an item's own frames.
        """
        wave = self._checked(wave)
        if lengths is None:
            return self.quantizer.encode(self.encoder(self._whole_frames(wave)))
        lengths = lengths.to(wave.device)
        positions = torch.arange(wave.shape[-1], device=wave.device)
        wave = wave * (positions < rearrange(lengths, "b -> b 1 1"))
        num_frames = -(-lengths // self.downsample_factor)
        frame_positions = torch.arange(self.num_frames(wave.shape[-1]), device=wave.device)
        mask = frame_positions < rearrange(num_frames, "b -> b 1")
        codes = self.quantizer.encode(self.encoder(self._whole_frames(wave), mask))
        return codes.masked_fill(~rearrange(mask, "b f -> b f 1"), -1)

    @torch.no_grad()
    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        """Waves of codes.

        Args:
            codes: `[b, f, q']`, the first q' levels.
            num_samples: Samples wanted; all that the frames cover if not given.

        Returns:
            Waves `[b, c, n]` at `target_sample_hz`.

        Raises:
            ValueError: If the codes do not fit this codec or are fewer than `num_samples` needs.
        """
        if codes.ndim != 3 or not 1 <= codes.shape[-1] <= self.num_quantizers:
            raise ValueError(f"codes must be [b, f, 1..{self.num_quantizers}], got {list(codes.shape)}")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise ValueError(
                f"codes must lie in 0..{self.codebook_size - 1}, got {int(codes.min())}..{int(codes.max())}; "
                "cut padding off"
            )
        covered = codes.shape[1] * self.downsample_factor
        if num_samples is not None and num_samples > covered:
            raise ValueError(f"{codes.shape[1]} frames cover {covered} samples, {num_samples} were asked for")
        return self.decoder(self.quantizer.decode(codes))[..., :num_samples]

    def _whole_frames(self, wave: Tensor) -> Tensor:
        return F.pad(wave, (0, -wave.shape[-1] % self.downsample_factor))

    def _checked(self, wave: Tensor) -> Tensor:
        if wave.ndim == 2:
            wave = rearrange(wave, "b n -> b 1 n")
        if wave.ndim != 3 or wave.shape[1] != self.channels or wave.shape[-1] == 0:
            raise ValueError(
                f"audio must be [b, n] or [b, {self.channels}, n] with n > 0 samples at {self.target_sample_hz} Hz, "
                f"got {list(wave.shape)}"
            )
        if not wave.is_floating_point():
            raise ValueError(
                f"audio must be floating point in [-1, 1], got {wave.dtype}; divide integers by their full scale"
            )
        if not torch.isfinite(wave).all():
            raise ValueError("audio holds NaN or infinite samples; clean it first, e.g. with torch.nan_to_num")
        return wave


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
    """
    return SoundStream(
        encoder=SpectralEncoder(dim=dim, depth=encoder_depth, hop_samples=hop_samples),
        decoder=SpectralDecoder(dim=dim, depth=decoder_depth, hop_samples=hop_samples),
        quantizer=ResidualQuantizer(
            dim=dim, codebook_size=codebook_size, num_quantizers=rq_num_quantizers, codebook_dim=code_dim
        ),
        target_sample_hz=target_sample_hz,
    )
