"""Stability of the codes of a codec under inaudible changes, and of the beat under wrong codes.

Run as `python -m musiclm_pytorch.recipes.metrics.code_stability --codecs codec_16khz DIR --data TUNES --json OUT.json`.
"""

import json as json_module
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.quantizers import code_usage
from audiolm_pytorch.codecs.training import MultiScaleMelLoss
from audiolm_pytorch.data.manifest import load_items
from musiclm_pytorch.evaluation.clips import load_clips
from musiclm_pytorch.evaluation.metrics.beat import OnsetEnvelope, autocorrelation_peak
from musiclm_pytorch.evaluation.report import aligned_table

__all__ = ["code_stability", "main", "stability_table"]

_BATCH = 8
_WRONG_SHARES = (0.05, 0.2, 0.4)


def _changes(codec: Codec) -> dict[str, Callable[[Tensor], Tensor]]:
    """Inaudible changes of waves `[b, n]`, by name."""

    def shifted(wave: Tensor, seconds: float) -> Tensor:
        count = round(seconds * codec.target_sample_hz)
        return F.pad(wave, (count, 0))[..., :-count]

    def noisy(wave: Tensor) -> Tensor:
        level = wave.square().mean(dim=-1, keepdim=True).sqrt()
        noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(0))
        return wave + noise * level * 10 ** (-50 / 20)

    return {
        "noise -50 dB": noisy,
        "shift 1 ms": lambda wave: shifted(wave, 0.001),
        "shift 5 ms": lambda wave: shifted(wave, 0.005),
        "gain -1 dB": lambda wave: wave * 10 ** (-1 / 20),
        "own copy": lambda wave: _copy(codec, _codes(codec, wave), wave.shape[-1]),
    }


def _codes(codec: Codec, waves: Tensor) -> Tensor:
    return torch.cat([codec.tokenize(part) for part in waves.split(_BATCH)])


def _copy(codec: Codec, codes: Tensor, num_samples: int) -> Tensor:
    decoded = [codec.decode_from_codebook_indices(part, num_samples=num_samples) for part in codes.split(_BATCH)]
    return torch.cat(decoded).mean(dim=1)


def _beat(waves: Tensor, sample_hz: int) -> float:
    """Median beat strength of waves `[b, n]`."""
    onsets = OnsetEnvelope()
    envelopes = onsets(resample(waves, sample_hz, onsets.sample_hz))
    return median(autocorrelation_peak(envelope)[0] for envelope in envelopes)


@typed
def code_stability(codec: Codec, waves: Tensor) -> dict[str, list[float]]:
    """Measure how far inaudible changes move the codes of mono waves `[b, n]`, and wrong codes the beat.

    Returns:
        Rows by name. Rows of changes have the share of equal codes in each level. "mel distance" and "beat" have one
        value per number of decoded levels (all, 4, 2, 1), "usage" and "perplexity" one per level, and "beat, wrong
        codes" one per share of random codes in level 1 (5, 20 and 40%). "beat, real" has one value.
    """
    codes, num_samples = _codes(codec, waves), waves.shape[-1]
    rows = {}
    for name, change in _changes(codec).items():
        same = _codes(codec, change(waves)) == codes
        rows[name] = same.float().mean(dim=(0, 1)).tolist()
    usage = code_usage(codes, codec.codebook_size)
    rows |= {name: values.tolist() for name, values in usage.items()}
    mel = MultiScaleMelLoss(codec.target_sample_hz)
    rows["mel distance"], rows["beat"] = [], []
    for levels in (codec.num_quantizers, 4, 2, 1):
        copies = _copy(codec, codes[..., :levels], num_samples)
        pairs = zip(copies.split(1), waves.split(1))
        distances = [mel(*(rearrange(wave, "1 n -> 1 1 n") for wave in pair)).item() for pair in pairs]
        rows["mel distance"].append(sum(distances) / len(distances))
        rows["beat"].append(_beat(copies, codec.target_sample_hz))
    rows["beat, real"] = [_beat(waves, codec.target_sample_hz)]
    rows["beat, wrong codes"] = []
    for share in _WRONG_SHARES:
        generator = torch.Generator().manual_seed(0)
        is_wrong = torch.rand(codes.shape[:2], generator=generator) < share
        wrong = torch.randint(codec.codebook_size, codes.shape[:2], generator=generator)
        disturbed = codes.clone()
        disturbed[..., 0] = torch.where(is_wrong, wrong, codes[..., 0])
        copies = _copy(codec, disturbed, num_samples)
        rows["beat, wrong codes"].append(_beat(copies, codec.target_sample_hz))
    return rows


@typed
def stability_table(measured: dict[str, dict[str, list[float]]]) -> str:
    """Create a Markdown table with one row per codec and measurement."""
    width = max(len(values) for rows in measured.values() for values in rows.values())
    cells = [["codec", "", *(str(column) for column in range(1, width + 1))]]
    for name, rows in measured.items():
        for row, values in rows.items():
            cells.append([name, row, *(f"{value:.2f}" for value in values), *[""] * (width - len(values))])
    return aligned_table(cells)


def main(data: Path, codecs: tuple[str, ...] = ("codec_16khz",), limit: int = 24, json: Path | None = None) -> None:
    """Measure the stability of the codes of codecs on held-out clips, and print a table.

    Args:
        data: Folder with the manifest valid.jsonl.
        codecs: Names of bundled codecs, or folders of saved codecs.
        limit: Number of clips.
        json: JSON file for the numbers.
    """
    items = load_items(data / "valid.jsonl").items[:limit]
    measured = {}
    for name in codecs:
        codec = Codec.from_pretrained(name)
        measured[name] = code_stability(codec, load_clips(items, codec.target_sample_hz))
    sys.stdout.write(f"{len(items)} clips of {data}\n{stability_table(measured)}")
    if json is not None:
        json.write_text(json_module.dumps({"clips": len(items), "codecs": measured}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
