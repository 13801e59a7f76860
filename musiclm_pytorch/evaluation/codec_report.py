"""A codec in figures: distances to the original with intervals, bitrate, use of the codes, speed."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.loudness import codes_and_scales, wave_of
from audiolm_pytorch.codecs.measures import WaveDistances, bitrate_kbps
from audiolm_pytorch.codecs.quantizers import code_usage
from audiolm_pytorch.nn.module_state import device_of
from musiclm_pytorch.evaluation.report import bootstrap_interval

__all__ = ["CodecRow", "Estimate", "aligned_table", "codec_report", "distance_row", "rows_table"]


@dataclass(frozen=True)
class Estimate:
    """The mean over clips, with the ends of its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Average one value a clip."""
        known = np.asarray(values)
        low, high = bootstrap_interval(lambda chosen: float(known[chosen].mean()), len(known))
        return cls(float(known.mean()), low, high)

    def shown(self, digits: int) -> str:
        """The mean with the interval in brackets."""
        mean, low, high = (f"{value:.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class CodecRow:
    """What one way of reconstructing clips does to them.

    Attributes:
        name: Of the way.
        num_clips: Clips measured.
        seconds: Their total length.
        si_sdr_db: See `si_sdr_db`.
        stft: See `MultiResolutionSTFTDistance`.
        mel_nepers: See `MultiScaleMelLoss`.
        kbps: Bitrate; None where nothing is compressed.
        usage: Share of its codes that each level used in these clips.
        perplexity: Perplexity of each level, as a share of the codebook.
        encode_speed: Seconds of audio encoded in a second of computing.
        decode_speed: The same for decoding.
        num_threads: Threads that computed.
    """

    name: str
    num_clips: int
    seconds: float
    si_sdr_db: Estimate
    stft: Estimate
    mel_nepers: Estimate
    kbps: float | None = None
    usage: tuple[float, ...] = ()
    perplexity: tuple[float, ...] = ()
    encode_speed: float | None = None
    decode_speed: float | None = None
    num_threads: int | None = None


class _Tally:
    """Distances of one way of reconstructing, clip by clip."""

    def __init__(self, distances: WaveDistances) -> None:
        self.distances = distances
        self.num_samples = 0
        self.values: dict[str, list[float]] = {name: [] for name in WaveDistances.NAMES}
        self.compute_seconds = 0.0

    def add(self, estimate: Tensor, target: Tensor) -> None:
        self.num_samples += target.shape[-1]
        for name, value in self.distances(estimate, target).items():
            self.values[name].append(value)

    @property
    def seconds(self) -> float:
        return self.num_samples / self.distances.sample_hz

    def row(self, name: str) -> CodecRow:
        if not self.num_samples:
            raise ValueError("there are no clips to measure")
        means = {key: Estimate.of(values) for key, values in self.values.items()}
        return CodecRow(
            name=name,
            num_clips=len(self.values["stft"]),
            seconds=self.seconds,
            si_sdr_db=means["si_sdr_db"],
            stft=means["stft"],
            mel_nepers=means["mel_nepers"],
        )


@beartype
def distance_row(
    name: str, pairs: Iterable[tuple[Tensor, Tensor]], sample_hz: int, kbps: float | None = None
) -> CodecRow:
    """Measure any way of reconstructing clips by what it made of them.

    Args:
        name: Of the way.
        pairs: For each clip what was made of it and itself, both `[c, n]`; gone through once.
        sample_hz: Their rate (Hz).
        kbps: Bitrate of the way, if it has one.

    Returns:
        The row.

    Raises:
        ValueError: If there are no clips.
    """
    tally = _Tally(WaveDistances(sample_hz))
    for estimate, target in pairs:
        tally.add(estimate, target)
    return replace(tally.row(name), kbps=kbps)


@beartype
@torch.no_grad()
def codec_report(
    codec: Codec, clips: Iterable[Tensor], levels: Sequence[int | None] = (None,), name: str = "codec"
) -> list[CodecRow]:
    """Encode clips one by one, decode them from several numbers of levels, and measure everything.

    Args:
        codec: The codec, on any device.
        clips: Waves `[c, n]` at the codec's rate, with its channels; gone through once, one in memory at a time.
        levels: Numbers of levels to decode from; None stands for all.
        name: Beginning of the rows' names.

    Returns:
        One row for each of `levels`. Speeds are of single clips, the first of which is computed once before.

    Raises:
        ValueError: If there are no clips or the codec does not have so many levels.
    """
    kbps = [bitrate_kbps(codec, num_levels) for num_levels in levels]
    device = device_of(codec)
    distances = WaveDistances(codec.target_sample_hz)
    tallies = [_Tally(distances) for _ in levels]
    all_codes: list[Tensor] = []
    encode_seconds = 0.0
    for clip in clips:
        wave = rearrange(clip, "c n -> 1 c n").to(device)
        if not all_codes:
            wave_of(codec, *codes_and_scales(codec, wave), wave.shape[-1])
        clock = _Clock(device)
        codes, scales = codes_and_scales(codec, wave)
        encode_seconds += clock.seconds
        all_codes.append(codes[0].cpu())
        for tally, num_levels in zip(tallies, levels):
            clock = _Clock(device)
            made = wave_of(codec, codes[..., :num_levels], scales, wave.shape[-1])
            tally.compute_seconds += clock.seconds
            tally.add(made[0].float().cpu(), clip)
    if not all_codes:
        raise ValueError("there are no clips to measure")
    used = {key: values.tolist() for key, values in code_usage(torch.cat(all_codes), codec.codebook_size).items()}
    return [
        replace(
            tally.row(f"{name}, {_levels_name(num_levels, codec.num_quantizers)}"),
            kbps=rate,
            usage=tuple(used["usage"][:num_levels]),
            perplexity=tuple(used["perplexity"][:num_levels]),
            encode_speed=tally.seconds / encode_seconds,
            decode_speed=tally.seconds / tally.compute_seconds,
            num_threads=torch.get_num_threads(),
        )
        for tally, num_levels, rate in zip(tallies, levels, kbps)
    ]


def _levels_name(num_levels: int | None, all_levels: int) -> str:
    count = num_levels or all_levels
    return f"{count} level{'s' if count > 1 else ''}"


class _Clock:
    """Seconds since it was made, with all work of a device done at either end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._wait()
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        self._wait()
        return time.perf_counter() - self.started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@beartype
def rows_table(rows: Sequence[CodecRow]) -> str:
    """Set rows as a table, one line each.

    Args:
        rows: In the order wanted.

    Returns:
        Markdown, ending in a line break. Intervals are in brackets; usage and perplexity are per cent of the codebook,
        level by level.
    """
    threads = next((row.num_threads for row in rows if row.num_threads), 0)
    speed = f"x real time ({threads} thread{'s' if threads != 1 else ''})"
    cells = [
        ["", "kbps", "SI-SDR (dB)", "MR-STFT", "mel (nepers)", "codes used (%)", "perplexity (%)"]
        + [f"encoding, {speed}", f"decoding, {speed}"]
    ]
    for row in rows:
        cells.append(
            [
                row.name,
                _number(row.kbps, 2),
                row.si_sdr_db.shown(2),
                row.stft.shown(3),
                row.mel_nepers.shown(3),
                " ".join(f"{100 * share:.0f}" for share in row.usage),
                " ".join(f"{100 * share:.0f}" for share in row.perplexity),
                _number(row.encode_speed, 1),
                _number(row.decode_speed, 1),
            ]
        )
    return aligned_table(cells)


@beartype
def aligned_table(cells: Sequence[Sequence[str]]) -> str:
    """Set texts as a markdown table whose columns stand below each other on a terminal too.

    Args:
        cells: The head, then one list a line, all of one length.

    Returns:
        The table, ending in a line break.
    """
    widths = [max(map(len, column)) for column in zip(*cells)]
    head, *lines = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in cells]
    rule = ["-" * width for width in widths]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
