"""Encode sound files as stored codes, and decode stored codes to sound files, with a codec."""

from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.resample import StreamingResampler
from audiolm_pytorch.audio.stream import AudioSource, AudioWriter
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec, EncodedWave, StreamingCodec
from audiolm_pytorch.codecs.code_file import CodesInfo, StoredCodes
from audiolm_pytorch.codecs.streaming import DecoderStream
from audiolm_pytorch.nn.module_state import device_of

__all__ = ["SOUND_MARKS", "FileCodec"]

_FRAMES_PER_CHUNK = 500
_COMMENT = "decoded by audiolm_pytorch"
SOUND_MARKS = (_COMMENT,)


class FileCodec:
    """Encodes sound files as codes, and decodes codes to sound files, with a codec on any device.

    A `StreamingCodec` runs in chunks, with memory that does not grow with the length of the file. A codec that is not a
    `StreamingCodec` runs on the whole file. The codes always equal those that `tokenize` returns for the whole wave.
    """

    @typed
    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.fingerprint = codec.fingerprint()
        self.device = device_of(codec)

    @typed
    @torch.no_grad()
    def encode(self, path: str | Path, num_levels: int | None = None) -> StoredCodes:
        """Encode a sound file, and keep the first `num_levels` levels (None: all levels).

        The sound is resampled to the rate of the codec. A mono codec encodes the mean of the channels. A stereo codec
        encodes a mono file as two equal channels, and raises a ValueError for a file with more than two channels.
        """
        codec = self.codec
        num_levels = codec.check_num_levels(num_levels)
        source = AudioSource(path, codec.target_sample_hz, codec.channels)
        chunks = list(self._encoded(source))
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
        codes = torch.cat([chunk.codes[0].cpu() for chunk in chunks])[:, :num_levels]
        scales = chunks[0].scales
        return StoredCodes(codes, info, None if scales is None else scales[0].float().cpu())

    @typed
    @torch.no_grad()
    def decode(
        self, stored: StoredCodes, path: str | Path, num_levels: int | None = None, original_rate: bool = False
    ) -> None:
        """Decode stored codes of this codec, and write a sound file with the length of the encoded sound.

        The first `num_levels` levels are decoded (None: all stored levels). With `original_rate`, the sound is
        resampled to the rate of the encoded file.
        """
        info = stored.info
        stored.check_codec(self.codec, self.fingerprint)
        num_stored = stored.codes.shape[1]
        if num_levels is not None and not 1 <= num_levels <= num_stored:
            raise ValueError(
                f"num_levels must be in 1..{num_stored}, got {num_levels}; the codes have {num_stored} levels"
            )
        to_hz, remaining = info.sample_hz, info.num_samples
        if original_rate:
            to_hz, remaining = info.original_sample_hz, info.original_num_samples
        resampler = StreamingResampler(info.sample_hz, to_hz, info.channels)
        codes = rearrange(stored.codes[:, :num_levels], "f q -> 1 f q").to(self.device)
        with AudioWriter(path, to_hz, info.channels, _COMMENT) as writer:
            for wave in self._decoded(codes, stored):
                resampled = resampler.push(wave)[:, :remaining]
                remaining -= resampled.shape[-1]
                writer.write(resampled)
            writer.write(resampler.finish()[:, :remaining])

    def _encoded(self, source: AudioSource) -> Iterator[EncodedWave]:
        """Yield the codes `[1, f, q]` of a file in chunks; a codec with scales yields one chunk."""
        codec = self.codec
        waves = (rearrange(block, "c n -> 1 c n").to(self.device) for block in source)
        if not isinstance(codec, StreamingCodec):
            yield codec.encode(torch.cat(list(waves), dim=-1))
            return
        stream = codec.encoder_stream()
        for wave in waves:
            yield EncodedWave(stream.push(wave))
        yield EncodedWave(stream.finish())

    def _decoded(self, codes: Tensor, stored: StoredCodes) -> Iterator[Tensor]:
        """Decode codes `[1, f, q]` chunk by chunk; yield waves `[c, n]`."""
        codec, num_samples = self.codec, stored.info.num_samples
        if not isinstance(codec, StreamingCodec):
            scales = None if stored.scales is None else rearrange(stored.scales, "s -> 1 s").to(self.device)
            yield codec.decode(codes, scales, num_samples)[0].float().cpu()
            return
        for chunk in _decode_chunks(codec.decoder_stream(), codes):
            wave = chunk[0, :, :num_samples].float().cpu()
            num_samples -= wave.shape[-1]
            yield wave


def _decode_chunks(stream: DecoderStream, codes: Tensor) -> Iterator[Tensor]:
    for chunk in codes.split(_FRAMES_PER_CHUNK, dim=1):
        yield stream.push(chunk)
    yield stream.finish()
