"""EnCodec (arXiv 2210.13438) from transformers, with the interface of `Codec`: 24 or 32 kHz mono, 48 kHz stereo."""

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.units import frames_covering
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import EncodedWave
from audiolm_pytorch.codecs.pretrained.adapter import PretrainedCodec
from audiolm_pytorch.codecs.pretrained.chunked import FRAMEWISE, apply_chunked, run_layers
from audiolm_pytorch.codecs.pretrained.encodec_stream import EncodecDecoderStream
from audiolm_pytorch.codecs.streaming import DecoderStream
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import register

__all__ = ["EncodecWrapper"]

_DEFAULT_KBPS = 6.0
_SEGMENTS_PER_BATCH = 4
_QUANTIZER_CHUNK_FRAMES = 4096


@register
class EncodecWrapper(PretrainedCodec):
    """EnCodec (arXiv 2210.13438): 24 kHz mono with 75 frames per second, or 48 kHz stereo with 150 frames per second.

    The 24 kHz model is causal, with LSTMs in encoder and decoder. On a long file the convolutions run in chunks, which
    does not change the results, and the LSTMs run on the whole file at the frame rate. In addition to its weights, the
    24 kHz model needs 0.4 GB for 1 minute of audio and 1.0 GB for 10 minutes (without chunks 1.0 GB per minute). The 48
    kHz model runs 4 segments in a batch and needs 0.4 GB for 1 minute of audio.

    The 48 kHz model encodes segments of 1 s that overlap by 1%, and divides each segment by its loudness. The codes
    contain the frames of the first segment, then of the second segment, and so on. A segment of the 48 kHz model has
    150 frames, or fewer at the end of the wave. A frame of the 48 kHz model advances by 316.8 samples on average; use
    `num_frames` instead of `downsample_factor`. To shorten a sound, cut the decoded wave; codes of the 48 kHz model
    cannot be cut. `encode` returns the loudness of each segment as scales, and `decode` uses the scales. `tokenize`
    returns and `decode_from_codebook_indices` receives codes without scales, as language models need. Without scales,
    every segment is decoded with the loudness `codes_only_rms`, and silence becomes faint sound.

    Args:
        source: Folder in transformers' format, or Hugging Face id.
        bandwidth_kbps: Bitrate that the model supports; None for 6 kbps, or for the highest bitrate of a model without
            6 kbps.
        codes_only_rms: For models that store a scale per segment: loudness (RMS of the mono mix) of segments whose
            scale is not passed to the decoder. Models without scales ignore `codes_only_rms`.
        offline: Whether to load Hugging Face models only from the local cache.
        allow_noncommercial: Whether to load weights with a non-commercial licence, such as facebook/encodec_32khz.
    """

    model_type, model_class, config_class = "encodec", "EncodecModel", "EncodecConfig"
    code_settings = (
        "normalize", "chunk_length_s", "overlap", "upsampling_ratios", "norm_type", "dilation_growth_rate",
        "use_causal_conv", "pad_mode", "trim_right_ratio", "use_conv_shortcut",
    )  # fmt: skip

    @typed
    def __init__(
        self,
        source: str | Path | LoadedModel = "facebook/encodec_24khz",
        *,
        bandwidth_kbps: float | None = None,
        codes_only_rms: float = 0.1,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        allow_noncommercial: bool = False,
    ) -> None:
        super().__init__(
            source, offline=offline, revision=revision, cache_dir=cache_dir, allow_noncommercial=allow_noncommercial
        )
        config = self.model.config
        available = [float(kbps) for kbps in config.target_bandwidths]
        if bandwidth_kbps is None:
            bandwidth_kbps = _DEFAULT_KBPS if _DEFAULT_KBPS in available else max(available)
        if bandwidth_kbps not in available:
            raise ValueError(f"bandwidth_kbps must be one of {available} for this model, got {bandwidth_kbps}")
        if not codes_only_rms > 0:
            raise ValueError(f"codes_only_rms must be above 0, got {codes_only_rms}")
        self.bandwidth_kbps, self.codes_only_rms = float(bandwidth_kbps), codes_only_rms
        self.has_scales = bool(config.normalize)
        self.segment_samples: int | None = config.chunk_length
        self.segment_stride_samples: int | None = config.chunk_stride or config.chunk_length
        quantizer = self.model.quantizer
        self._set_sizes(
            sample_hz=config.sampling_rate,
            downsample_factor=prod(config.upsampling_ratios),
            channels=config.audio_channels,
            num_quantizers=min(quantizer.get_num_quantizers_for_bandwidth(self.bandwidth_kbps), len(quantizer.layers)),
            codebook_size=config.codebook_size,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Constructor arguments except `source`, as data that JSON can store."""
        return dict(bandwidth_kbps=self.bandwidth_kbps, codes_only_rms=self.codes_only_rms)

    def num_frames(self, num_samples: int) -> int:
        """Number of frames of a wave of `num_samples` samples, summed over all segments."""
        return sum(frames_covering(length, self.downsample_factor) for _, length in self._segments(num_samples))

    def covered_samples(self, num_frames: int) -> int:
        """Number of samples to which `num_frames` frames decode."""
        frames = self._frames_of_segments(num_frames)
        if not frames:
            return 0
        return (len(frames) - 1) * (self.segment_stride_samples or 0) + frames[-1] * self.downsample_factor

    def decoder_stream(self) -> DecoderStream:
        """Create a stream of a model without segments (see `Codec.decoder_stream`)."""
        return super().decoder_stream() if self.segment_samples else EncodecDecoderStream(self.model, self._check_codes)

    def _num_segments(self, num_samples: int) -> int:
        return len(self._segments(num_samples))

    def _encode(self, wave: Tensor) -> EncodedWave:
        codes, scales = [], []
        for first, number, size in _runs([length for _, length in self._segments(wave.shape[-1])]):
            starts = [index * (self.segment_stride_samples or 0) for index in range(first, first + number)]
            segments = torch.stack([wave[..., start : start + size] for start in starts])
            scale = segments.mean(dim=2).square().mean(dim=-1).sqrt() + 1e-8  # of the mono mix, as in the model
            if self.has_scales:
                segments = segments / rearrange(scale, "s b -> s b 1 1")
            frames = run_layers(self.model.encoder, rearrange(segments, "s b c n -> (s b) c n"))
            quantize = partial(self.model.quantizer.encode, bandwidth=self.bandwidth_kbps)
            run_codes = apply_chunked(quantize, frames, FRAMEWISE, _QUANTIZER_CHUNK_FRAMES)
            codes.append(rearrange(run_codes, "q (s b) f -> b (s f) q", s=number))
            scales.append(rearrange(scale, "s b -> b s"))
        return EncodedWave(torch.cat(codes, dim=1), torch.cat(scales, dim=1))

    def _decode(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        frames = self._frames_of_segments(codes.shape[1])
        if scales is not None and scales.shape != (len(codes), len(frames)):
            raise ValueError(
                f"scales must have shape {[len(codes), len(frames)]}, one per segment, got {list(scales.shape)}"
            )
        if scales is None and self.has_scales:
            scales = torch.full((len(codes), len(frames)), self.codes_only_rms, device=codes.device)
        segments = self._decode_segments(codes, frames, scales)
        if self.segment_stride_samples is None:
            return next(segments)
        return _overlap_add(segments, self.segment_stride_samples, self.covered_samples(codes.shape[1]))

    def _decode_segments(self, codes: Tensor, frames: list[int], scales: Tensor | None) -> Iterator[Tensor]:
        """Decode all segments, and yield the wave `[b, c, n]` of each segment in order."""
        first_frame = 0
        for first, number, size in _runs(frames):
            run_codes = codes[:, first_frame : first_frame + number * size]
            first_frame += number * size
            levels = rearrange(run_codes, "b (s f) q -> q (s b) f", s=number)
            waves = run_layers(self.model.decoder, self.model.quantizer.decode(levels))
            waves = rearrange(waves, "(s b) c n -> s b c n", s=number)
            if scales is not None:
                waves = waves * rearrange(scales[:, first : first + number], "b s -> s b 1 1").to(waves)
            yield from waves

    def _segments(self, num_samples: int) -> list[tuple[int, int]]:
        """Start and length of each segment of a wave, in samples."""
        if self.segment_samples is None or self.segment_stride_samples is None:
            return [(0, num_samples)] if num_samples else []
        starts = range(0, num_samples, self.segment_stride_samples)
        return [(start, min(self.segment_samples, num_samples - start)) for start in starts]

    def _frames_of_segments(self, num_frames: int) -> list[int]:
        """Number of frames of each segment of a wave with `num_frames` frames.

        Two waves with the same total number of frames also agree in the number of frames of each segment, because a
        longer wave never has fewer frames in any segment.
        """
        longest = range(num_frames * self.downsample_factor + 1)
        num_samples = bisect_left(longest, num_frames, key=self.num_frames)
        frames = [frames_covering(length, self.downsample_factor) for _, length in self._segments(num_samples)]
        if sum(frames) != num_frames:
            raise ValueError(
                f"got {num_frames} frames of codes, but this codec encodes no wave as {num_frames} frames; decode all "
                "frames that `tokenize` returned, then cut the wave"
            )
        return frames


def _runs(sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    """Group consecutive segments of equal size for one batch; yield (first segment, number of segments, size)."""
    first = 0
    for size, group in groupby(sizes):
        remaining = len(list(group))
        while remaining:
            number = min(remaining, _SEGMENTS_PER_BATCH)
            yield first, number, size
            first, remaining = first + number, remaining - number


def _overlap_add(segments: Iterator[Tensor], stride_samples: int, num_samples: int) -> Tensor:
    """Crossfade overlapping segments `[b, c, n]`; the weights are a triangle over a full segment."""
    wave = weights = triangle = torch.zeros(0)
    for index, segment in enumerate(segments):
        if index == 0:
            ramp = torch.arange(1, segment.shape[-1] + 1, device=segment.device, dtype=segment.dtype)
            triangle = torch.minimum(ramp, ramp.flip(0)) / (segment.shape[-1] + 1)
            wave, weights = segment.new_zeros(*segment.shape[:-1], num_samples), segment.new_zeros(num_samples)
        length, start = segment.shape[-1], index * stride_samples
        wave[..., start : start + length] += triangle[:length] * segment
        weights[start : start + length] += triangle[:length]
    return wave / weights
