"""Report of the quality of a codec: distances between decoded and original clips, bitrate and codebook usage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.distances import si_sdr_db, stft_distance, zero_mean
from audiolm_pytorch.codecs.quantizers import code_usage
from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from audiolm_pytorch.nn.module_state import device_of
from musiclm_pytorch.evaluation.report import Metric, aligned_table

__all__ = ["CodecRow", "codec_report", "distance_row", "rows_table"]

_DISTANCES = ("si_sdr_db", "stft", "mel_nepers")


@dataclass(frozen=True)
class CodecRow:
    """Row of a codec report: mean distances between reconstructed and original clips, bitrate, codebook usage.

    See `stft_distance` for `stft` and `MultiScaleMelLoss` for `mel_nepers`. `seconds` is the total length of the clips,
    and `kbps` is None if the waves were not encoded. `usage` has, for each level, the share of codes that occur.
    """

    name: str
    num_clips: int
    seconds: float
    si_sdr_db: Metric
    stft: Metric
    mel_nepers: Metric
    kbps: float | None = None
    usage: tuple[float, ...] = ()


class _Distances:
    """Collects the distances between reconstructed and original clips."""

    def __init__(self, sample_hz: int) -> None:
        self.sample_hz, self.num_samples = sample_hz, 0
        self.mel_loss = MultiScaleMelLoss(sample_hz)
        self.values: dict[str, list[float]] = {name: [] for name in _DISTANCES}

    @torch.no_grad()
    def add(self, estimate: Tensor, target: Tensor) -> None:
        """Measure the distances between two waves `[c, n]`; for SI-SDR the channels are concatenated."""
        self.num_samples += target.shape[-1]
        signals = [rearrange(zero_mean(wave.double()), "c n -> (c n)") for wave in (estimate, target)]
        self.values["si_sdr_db"].append(float(si_sdr_db(*signals)))
        self.values["stft"].append(float(stft_distance(estimate, target).mean()))
        self.values["mel_nepers"].append(float(self.mel_loss(estimate.unsqueeze(0), target.unsqueeze(0))))

    def row(self, name: str, kbps: float | None, usage: Sequence[float] = ()) -> CodecRow:
        if not self.num_samples:
            raise ValueError("there are no clips to measure")
        means = {key: Metric.mean(f"{name} / {key}", values) for key, values in self.values.items()}
        num_clips, seconds = len(self.values["stft"]), self.num_samples / self.sample_hz
        return CodecRow(name, num_clips, seconds, **means, kbps=kbps, usage=tuple(usage))


@beartype
def distance_row(
    name: str, pairs: Iterable[tuple[Tensor, Tensor]], sample_hz: int, kbps: float | None = None
) -> CodecRow:
    """Measure the distances between the waves `[c, n]` in each pair (reconstruction, original)."""
    distances = _Distances(sample_hz)
    for estimate, target in pairs:
        distances.add(estimate, target)
    return distances.row(name, kbps)


@beartype
@torch.no_grad()
def codec_report(
    codec: Codec, clips: Iterable[Tensor], levels: Sequence[int | None] = (None,), name: str = "codec"
) -> list[CodecRow]:
    """Measure how well a codec reconstructs clips, once for each number of codebook levels in `levels` (None = all).

    The clips are waves `[c, n]` with the sample rate and channels of the codec. Each wave is read only once.
    """
    counts = [codec.check_num_levels(num_levels) for num_levels in levels]
    device = device_of(codec)
    distances = [_Distances(codec.target_sample_hz) for _ in counts]
    all_codes: list[Tensor] = []
    for clip in clips:
        codes, scales = codec.encode(rearrange(clip, "c n -> 1 c n").to(device))
        all_codes.append(codes[0].cpu())
        for distance, count in zip(distances, counts):
            decoded = codec.decode(codes[..., :count], scales, clip.shape[-1])
            distance.add(decoded[0].float().cpu(), clip)
    usage = code_usage(torch.cat(all_codes), codec.codebook_size)["usage"].tolist() if all_codes else []
    return [
        distance.row(f"{name}, {count} level{'s' if count > 1 else ''}", codec.bitrate_kbps(count), usage[:count])
        for distance, count in zip(distances, counts)
    ]


@beartype
def rows_table(rows: Sequence[CodecRow]) -> str:
    """Format rows of a codec report as a Markdown table, with confidence intervals in brackets."""
    cells = [["", "kbps", "SI-SDR (dB)", "MR-STFT", "mel (nepers)", "codes used (%)"]]
    for row in rows:
        kbps = "" if row.kbps is None else f"{row.kbps:.2f}"
        distances = [row.si_sdr_db.text(2), row.stft.text(3), row.mel_nepers.text(3)]
        cells.append([row.name, kbps, *distances, " ".join(f"{100 * share:.0f}" for share in row.usage)])
    return aligned_table(cells)
