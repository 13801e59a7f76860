"""Report of the quality of a codec: distances between decoded and original clips, bitrate and codebook usage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.distances import si_sdr_db, stft_distance, zero_mean
from audiolm_pytorch.codecs.quantizers import code_usage
from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from audiolm_pytorch.nn.module_state import device_of
from musiclm_pytorch.evaluation.report import MetricValue, aligned_table

__all__ = ["CodecRow", "codec_report", "distance_row", "rows_table"]

_DISTANCES = ("si_sdr_db", "stft", "mel_nepers")


@dataclass(frozen=True)
class CodecRow:
    """Row of a codec report: mean distances between reconstructed and original clips, bitrate, codebook usage.

    `stft_distance` computes `stft`, and `MultiScaleMelLoss` computes `mel_nepers`. `seconds` is the total length of the
    clips, and `kbps` is None if the waves were not encoded. `usage` is the share of codes that occur in each level.
    """

    name: str
    num_clips: int
    seconds: float
    si_sdr_db: MetricValue
    stft: MetricValue
    mel_nepers: MetricValue
    kbps: float | None = None
    usage: tuple[float, ...] = ()


@torch.no_grad()
def _distances(estimate: Tensor, target: Tensor, mel_loss: MultiScaleMelLoss) -> list[float]:
    """Compute the distances in `_DISTANCES` between two waves `[c, n]`; for SI-SDR the channels are concatenated."""
    signals = [rearrange(zero_mean(wave.double()), "c n -> (c n)") for wave in (estimate, target)]
    mel_nepers = mel_loss(estimate.unsqueeze(0), target.unsqueeze(0))
    return [float(si_sdr_db(*signals)), float(stft_distance(estimate, target).mean()), float(mel_nepers)]


def _row(
    name: str, distances: list[list[float]], seconds: float, kbps: float | None, usage: Sequence[float] = ()
) -> CodecRow:
    """Average the distances of all clips."""
    if not distances:
        raise ValueError("there are no clips to measure")
    columns = dict(zip(_DISTANCES, np.array(distances).T))
    means = {key: MetricValue.mean(f"{name} / {key}", values) for key, values in columns.items()}
    return CodecRow(name, len(distances), seconds, **means, kbps=kbps, usage=tuple(usage))


@typed
def distance_row(
    name: str, pairs: Iterable[tuple[Tensor, Tensor]], sample_hz: int, kbps: float | None = None
) -> CodecRow:
    """Measure the distances between the waves `[c, n]` in each pair (reconstruction, original)."""
    mel_loss, distances, num_samples = MultiScaleMelLoss(sample_hz), [], 0
    for estimate, target in pairs:
        distances.append(_distances(estimate, target, mel_loss))
        num_samples += target.shape[-1]
    return _row(name, distances, num_samples / sample_hz, kbps)


@typed
@torch.no_grad()
def codec_report(
    codec: Codec, clips: Iterable[Tensor], levels: Sequence[int | None] = (None,), name: str = "codec"
) -> list[CodecRow]:
    """Measure how well a codec reconstructs clips, once for each number of codebook levels in `levels` (None = all).

    The clips are waves `[c, n]` with the sample rate and channels of the codec. The iterable `clips` is read only once.
    """
    counts = [codec.check_num_levels(num_levels) for num_levels in levels]
    device, mel_loss, num_samples = device_of(codec), MultiScaleMelLoss(codec.target_sample_hz), 0
    all_distances: list[list[list[float]]] = [[] for _ in counts]
    all_codes: list[Tensor] = []
    for clip in clips:
        num_samples += clip.shape[-1]
        codes, scales = codec.encode(rearrange(clip, "c n -> 1 c n").to(device))
        all_codes.append(codes[0].cpu())
        for distances, count in zip(all_distances, counts):
            decoded = codec.decode(codes[..., :count], scales, clip.shape[-1])
            distances.append(_distances(decoded[0].float().cpu(), clip, mel_loss))
    seconds = num_samples / codec.target_sample_hz
    usage = code_usage(torch.cat(all_codes), codec.codebook_size)["usage"].tolist() if all_codes else []
    names = [f"{name}, {count} level{'s' if count > 1 else ''}" for count in counts]
    return [
        _row(row_name, distances, seconds, codec.bitrate_kbps(count), usage[:count])
        for row_name, distances, count in zip(names, all_distances, counts)
    ]


@typed
def rows_table(rows: Sequence[CodecRow]) -> str:
    """Format rows of a codec report as a Markdown table, with confidence intervals in brackets."""
    cells = [["", "kbps", "SI-SDR (dB)", "MR-STFT", "mel (nepers)", "codes used (%)"]]
    for row in rows:
        kbps = "" if row.kbps is None else f"{row.kbps:.2f}"
        distances = [row.si_sdr_db.text(2), row.stft.text(3), row.mel_nepers.text(3)]
        cells.append([row.name, kbps, *distances, " ".join(f"{100 * share:.0f}" for share in row.usage)])
    return aligned_table(cells)
