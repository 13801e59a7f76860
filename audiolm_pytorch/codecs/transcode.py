"""Sound files to stored codes and back, of any rate, channels and length, in little memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.resample import StreamingResampler
from audiolm_pytorch.audio.stream import AudioSource, AudioWriter
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.code_file import CodesInfo, StoredCodes
from audiolm_pytorch.codecs.loudness import codes_and_scales, wave_of
from audiolm_pytorch.codecs.streaming import DecoderStream
from audiolm_pytorch.nn.module_state import device_of

__all__ = ["FileCodec"]

_FRAMES_AT_ONCE = 500


class FileCodec:
    """A codec that works on files.

    A codec with `encoder_stream` and `decoder_stream` takes them piece by piece, in memory that does not grow with
    their length; another one takes them whole. Either way the codes are those of `tokenize` on the whole wave.

    Args:
        codec: Any codec, on any device.
    """

    @beartype
    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.fingerprint = codec.fingerprint()
        self.device = device_of(codec)

    @beartype
    @torch.no_grad()
    def encode(self, path: str | Path, num_levels: int | None = None) -> StoredCodes:
        """Encode a sound file: resampled to the codec's rate, channels averaged or repeated as the codec needs them.

        Args:
            path: An audio file.
            num_levels: Levels to keep; None keeps all.

        Returns:
            Its codes.

        Raises:
            ValueError: If the file cannot be read or has several channels where the codec has another number of them,
                or the codec does not have so many levels.
        """
        codec = self.codec
        _check_levels(num_levels, codec.num_quantizers)
        source = AudioSource(path, codec.target_sample_hz, codec.channels)
        parts, scales = zip(*self._encoded(source))
        codes = torch.cat(parts)[:, :num_levels]
        info = CodesInfo(
            codec_class=type(codec).__name__,
            codec_fingerprint=self.fingerprint,
            codebook_size=codec.codebook_size,
            sample_hz=codec.target_sample_hz,
            num_samples=source.num_samples,
            channels=codec.channels,
            original_sample_hz=source.info.sample_hz,
            original_num_samples=source.info.num_samples,
            original_channels=source.info.channels,
        )
        return StoredCodes(codes, info, scales[0])

    @beartype
    @torch.no_grad()
    def decode(
        self, stored: StoredCodes, path: str | Path, num_levels: int | None = None, original_rate: bool = False
    ) -> None:
        """Decode into a sound file, of exactly as many samples as were encoded.

        Args:
            stored: Codes that this codec made.
            path: Name ending in .wav, .flac or .ogg.
            num_levels: Levels to decode from; None takes all that are stored.
            original_rate: Whether to resample to the rate of the file that was encoded; otherwise at the codec's rate.

        Raises:
            ValueError: If another codec made the codes, there are fewer levels, or the file cannot be written.
        """
        info = stored.info
        stored.require_codec(self.codec, self.fingerprint)
        _check_levels(num_levels, stored.codes.shape[1])
        to_hz, wanted = info.sample_hz, info.num_samples
        if original_rate:
            to_hz, wanted = info.original_sample_hz, info.original_num_samples
        resampler = StreamingResampler(info.sample_hz, to_hz, info.channels)
        codes = rearrange(stored.codes[:, :num_levels], "f q -> 1 f q").to(self.device)
        with AudioWriter(path, to_hz, info.channels) as writer:
            for wave in self._decoded(codes, stored):
                wanted -= _write(writer, resampler.push(wave), wanted)
            _write(writer, resampler.finish(), wanted)

    def _encoded(self, source: AudioSource) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Codes `[f, q]` of a file, part by part, with the scales if the codec has them (then there is one part)."""
        codec: Any = self.codec
        waves = (rearrange(block, "c n -> 1 c n").to(self.device) for block in source)
        if not hasattr(codec, "encoder_stream"):
            codes, scales = codes_and_scales(codec, torch.cat(list(waves), dim=-1))
            yield codes[0].cpu(), None if scales is None else scales[0].float().cpu()
            return
        stream = codec.encoder_stream()
        for wave in waves:
            yield stream.push(wave)[0].cpu(), None
        yield stream.finish()[0].cpu(), None

    def _decoded(self, codes: Tensor, stored: StoredCodes) -> Iterator[Tensor]:
        """Waves `[c, n]` of codes `[1, f, q]`, part by part, all samples together."""
        codec: Any = self.codec
        num_samples = stored.info.num_samples
        if not hasattr(codec, "decoder_stream"):
            scales = None if stored.scales is None else rearrange(stored.scales, "s -> 1 s").to(self.device)
            yield wave_of(codec, codes, scales, num_samples)[0].float().cpu()
            return
        for part in _pushed(codec.decoder_stream(), codes):
            wave = part[0, :, :num_samples].float().cpu()
            num_samples -= wave.shape[-1]
            yield wave


def _pushed(stream: DecoderStream, codes: Tensor) -> Iterator[Tensor]:
    """Waves that a stream gives for codes `[1, f, q]`, part by part, to the end."""
    for part in codes.split(_FRAMES_AT_ONCE, dim=1):
        yield stream.push(part)
    yield stream.finish()


def _write(writer: AudioWriter, wave: Tensor, most: int) -> int:
    """Write up to so many samples of `wave [c, n]`, and say how many."""
    wave = wave[:, :most]
    if wave.shape[-1]:
        writer.write(wave)
    return wave.shape[-1]


def _check_levels(num_levels: int | None, most: int) -> None:
    if num_levels is not None and not 1 <= num_levels <= most:
        raise ValueError(f"levels must be in 1..{most}, got {num_levels}")
