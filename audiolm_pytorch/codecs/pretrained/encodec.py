"""EnCodec (arXiv 2210.13438) of transformers behind the codec contract: 24 kHz mono, 32 kHz mono, 48 kHz stereo."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.padding import items_by_length
from audiolm_pytorch.audio.units import frames_covering
from audiolm_pytorch.codecs.pretrained.adapter import PretrainedCodec
from audiolm_pytorch.codecs.pretrained.chunked import FRAMEWISE, in_pieces, run_layers
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import register

__all__ = ["EncodecFrames", "EncodecWrapper"]

DEFAULT_KBPS = 6.0
SEGMENTS_AT_ONCE = 4
QUANTIZED_AT_ONCE_FRAMES = 4096


class EncodecFrames(NamedTuple):
    """All that EnCodec keeps of a wave.

    Attributes:
        codes: `[b, f, q]` int64, -1 past an item's own frames.
        scales: Loudness (RMS) by which each segment was divided before it was encoded, `[b, s]`, 0 past an item's own
            segments; None for a model that does not normalise (24 and 32 kHz).
    """

    codes: Tensor
    scales: Tensor | None


@register
class EncodecWrapper(PretrainedCodec):
    """EnCodec (arXiv 2210.13438): 24 kHz mono with 75 frames a second, or 48 kHz stereo with 150.

    The 24 kHz model is causal, with an LSTM on either side of its codes. The convolutions of a long file run in pieces
    with the same result, the LSTMs whole at the frame rate: measured above the model, 0.4 GB for a minute and 1.0 GB
    for ten (without pieces 1.0 GB a minute). The 48 kHz model takes 4 segments at a time:
    0.4 GB for a minute.

    The 48 kHz model codes segments of 1 s that overlap by 1% and divides each by its loudness, which is no code:
    - Frames are those of the first segment, then of the second, ...: 150 a segment, the last as many as cover what is
      left (149 in the last but one where no more than 160 samples are left for the last, as in the original). A frame
      advances 316.8 samples on average, so use `num_frames`, not `downsample_factor`. To shorten codes, cut the decoded
      wave.
    - `encode` and `decode` carry the loudness of each segment beside the codes. `tokenize` and
      `decode_from_codebook_indices` carry codes alone: every segment comes back with the same loudness
      (`codes_only_rms`), so the differences of loudness between seconds are lost, and silence comes back as faint
      sound. That is all a language model over the codes can know, too.

    Args:
        source: Folder in transformers' format, or hub id.
        bandwidth_kbps: Bitrate, one of those the model was trained for; 6 if not given (the highest, if it has no 6).
        codes_only_rms: Loudness (RMS of the mono mix) of segments decoded without their scales; only for models that
            normalise.
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the source is not an EnCodec that can be loaded, or does not offer the bitrate.
    """

    model_type, model_class, config_class = "encodec", "EncodecModel", "EncodecConfig"
    code_settings = (
        "normalize",
        "chunk_length_s",
        "overlap",
        "upsampling_ratios",
        "norm_type",
        "dilation_growth_rate",
        "use_causal_conv",
        "pad_mode",
        "trim_right_ratio",
        "use_conv_shortcut",
    )

    @beartype
    def __init__(
        self,
        source: str | Path | LoadedModel = "facebook/encodec_24khz",
        *,
        bandwidth_kbps: float | int | None = None,
        codes_only_rms: float = 0.1,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(source, offline=offline, revision=revision, cache_dir=cache_dir)
        config = self.model.config
        offered = [float(kbps) for kbps in config.target_bandwidths]
        if bandwidth_kbps is None:
            bandwidth_kbps = DEFAULT_KBPS if DEFAULT_KBPS in offered else max(offered)
        if bandwidth_kbps not in offered:
            raise ValueError(f"bandwidth_kbps must be one of {offered} for this model, got {bandwidth_kbps}")
        if not codes_only_rms > 0:
            raise ValueError(f"codes_only_rms must be above 0, got {codes_only_rms}")
        self.bandwidth_kbps, self.codes_only_rms = float(bandwidth_kbps), codes_only_rms
        self.normalises = bool(config.normalize)
        self.segment_samples: int | None = config.chunk_length
        self.segment_stride_samples: int | None = config.chunk_stride or config.chunk_length
        quantizer = self.model.quantizer
        self._describe(
            sample_hz=config.sampling_rate,
            downsample_factor=prod(config.upsampling_ratios),
            channels=config.audio_channels,
            num_quantizers=min(quantizer.get_num_quantizers_for_bandwidth(self.bandwidth_kbps), len(quantizer.layers)),
            codebook_size=config.codebook_size,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Constructor arguments besides the source, JSON-able."""
        return dict(bandwidth_kbps=self.bandwidth_kbps, codes_only_rms=self.codes_only_rms)

    def num_frames(self, num_samples: int) -> int:
        """Frames of a wave of `num_samples` samples, over all segments."""
        return sum(frames_covering(length, self.downsample_factor) for _, length in self._segments(num_samples))

    def covered_samples(self, num_frames: int) -> int:
        """Samples that `num_frames` frames decode to."""
        frames = self._frames_of_segments(num_frames)
        if not frames:
            return 0
        return (len(frames) - 1) * (self.segment_stride_samples or 0) + frames[-1] * self.downsample_factor

    @torch.no_grad()
    def encode(self, wave: Tensor, lengths: Tensor | None = None) -> EncodecFrames:
        """Encode waves without loss of loudness.

        Args:
            wave: `[b, n]` or `[b, c, n]` in [-1, 1] at `target_sample_hz`; any number of samples.
            lengths: Samples of each item `[b]`, if shorter items were padded to n.

        Returns:
            Codes, and the scales of the segments where the model normalises.

        Raises:
            ValueError: If the audio is not what this codec reads.
        """
        wave = self._prepared(wave)
        codes = self._blank_codes(wave)
        scales = wave.new_zeros(len(wave), len(self._segments(wave.shape[-1])))
        with torch.autocast(wave.device.type, enabled=False):
            for rows, part in items_by_length(wave, lengths):
                part_codes, part_scales = self._encode_segments(part)
                codes[rows, : part_codes.shape[1]] = part_codes
                scales[rows, : part_scales.shape[1]] = part_scales
        return EncodecFrames(codes, scales if self.normalises else None)

    @torch.no_grad()
    def decode(self, codes: Tensor, scales: Tensor | None = None, num_samples: int | None = None) -> Tensor:
        """Decode codes with the loudness of their segments.

        Args:
            codes: `[b, f, q']`, the first q' levels.
            scales: `[b, s]` as `encode` gives; `codes_only_rms` for every segment if not given.
            num_samples: Samples wanted; all that the frames cover if not given.

        Returns:
            Waves `[b, c, n]` at `target_sample_hz`.

        Raises:
            ValueError: If codes or scales do not fit this codec, or are fewer than `num_samples` needs.
        """
        if scales is not None and not self.normalises:
            raise ValueError("this model does not normalise: it has no scales, leave them out")
        return self._waves_of(codes, lambda checked: self._decode(checked, scales), num_samples)

    def _encode(self, wave: Tensor) -> Tensor:
        return self._encode_segments(wave)[0]

    def _encode_segments(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """Waves `[b, c, n]` to codes `[b, f, q]` and scales `[b, s]`; segments of one length go together."""
        codes, scales = [], []
        for run in _runs([length for _, length in self._segments(wave.shape[-1])]):
            spans = [slice(start, start + run.size) for start in self._starts(run)]
            segments = torch.stack([wave[..., span] for span in spans])
            scale = segments.mean(dim=2).square().mean(dim=-1).sqrt() + 1e-8  # of the mono mix, as the model does
            if self.normalises:
                segments = segments / rearrange(scale, "s b -> s b 1 1")
            frames = run_layers(self.model.encoder, rearrange(segments, "s b c n -> (s b) c n"))
            found = in_pieces(self._codes_of_frames, frames, FRAMEWISE, QUANTIZED_AT_ONCE_FRAMES)
            codes.append(rearrange(found, "q (s b) f -> b (s f) q", s=run.number))
            scales.append(rearrange(scale, "s b -> b s"))
        return torch.cat(codes, dim=1), torch.cat(scales, dim=1)

    def _codes_of_frames(self, frames: Tensor) -> Tensor:
        return self.model.quantizer.encode(frames, self.bandwidth_kbps)

    def _decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        frames = self._frames_of_segments(codes.shape[1])
        if scales is not None and scales.shape != (len(codes), len(frames)):
            raise ValueError(f"scales must be {[len(codes), len(frames)]}, one a segment, got {list(scales.shape)}")
        if scales is None and self.normalises:
            scales = torch.full((len(codes), len(frames)), self.codes_only_rms, device=codes.device)
        segments = self._decoded_segments(codes, frames, scales)
        if self.segment_stride_samples is None:
            return next(segments)
        return _overlap_add(segments, self.segment_stride_samples, self.covered_samples(codes.shape[1]))

    def _decoded_segments(self, codes: Tensor, frames: list[int], scales: Tensor | None) -> Iterator[Tensor]:
        """Waves `[b, c, n]` of the segments, in their order."""
        first_frame = 0
        for run in _runs(frames):
            chosen = codes[:, first_frame : first_frame + run.number * run.size]
            first_frame += run.number * run.size
            levels = rearrange(chosen, "b (s f) q -> q (s b) f", s=run.number)
            waves = run_layers(self.model.decoder, self.model.quantizer.decode(levels))
            waves = rearrange(waves, "(s b) c n -> s b c n", s=run.number)
            if scales is not None:
                waves = waves * rearrange(scales[:, run.first : run.first + run.number], "b s -> s b 1 1").to(waves)
            yield from waves

    def _segments(self, num_samples: int) -> list[tuple[int, int]]:
        """Start and length, in samples, of the segments of a wave."""
        if self.segment_samples is None or self.segment_stride_samples is None:
            return [(0, num_samples)] if num_samples else []
        starts = range(0, num_samples, self.segment_stride_samples)
        return [(start, min(self.segment_samples, num_samples - start)) for start in starts]

    def _starts(self, run: "_Run") -> list[int]:
        return [index * (self.segment_stride_samples or 0) for index in range(run.first, run.first + run.number)]

    def _frames_of_segments(self, num_frames: int) -> list[int]:
        """Frames of each segment of a wave that has `num_frames` frames.

        A longer wave has no fewer frames in any segment, so waves with as many frames have them in the same segments.
        """
        longest = range(num_frames * self.downsample_factor + 1)
        num_samples = bisect_left(longest, num_frames, key=self.num_frames)
        frames = [frames_covering(length, self.downsample_factor) for _, length in self._segments(num_samples)]
        if sum(frames) != num_frames:
            raise ValueError(f"no wave has {num_frames} frames here: use num_frames, and do not cut codes")
        return frames


class _Run(NamedTuple):
    """Neighbouring segments of one size, to be computed together."""

    first: int
    number: int
    size: int


def _runs(sizes: list[int]) -> Iterator[_Run]:
    """Group neighbours of one size, at most `SEGMENTS_AT_ONCE` a group."""
    first = 0
    for size, group in groupby(sizes):
        rest = len(list(group))
        while rest:
            number = min(rest, SEGMENTS_AT_ONCE)
            yield _Run(first, number, size)
            first, rest = first + number, rest - number


def _overlap_add(segments: Iterator[Tensor], stride_samples: int, num_samples: int) -> Tensor:
    """Fade overlapping segments `[b, c, n]` into each other, each with the weight of a triangle over a full segment."""
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
