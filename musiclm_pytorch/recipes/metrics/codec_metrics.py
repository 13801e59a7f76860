"""How much of the music survives a codec: attributes that a judge hears in its copies, beside distances and bitrate.

Run as `python -m musiclm_pytorch.recipes.metrics.codec_metrics --codec DIR --data TUNES --json check.json`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from musiclm_pytorch.cli.checks import check_file, device_named
from musiclm_pytorch.evaluation.codec_report import CodecRow, Estimate, distance_row
from musiclm_pytorch.evaluation.report import (
    Metric,
    accuracy_metric,
    accuracy_statistic,
    aligned_table,
    write_report,
)
from musiclm_pytorch.pretrained.bundled import DEFAULT_CODEC, codec_named
from musiclm_pytorch.recipes.metrics.classifier import AttributeClassifier, fitted_classifier
from musiclm_pytorch.recipes.metrics.clips import labels_of, load_clips
from musiclm_pytorch.recipes.metrics.generation_metrics import PLAIN_ACCURACY, reconstruct
from musiclm_pytorch.recipes.metrics.opus import opus_copy, require_opus

__all__ = ["Checked", "Copy", "check_copies", "checked_table", "codec_copies", "main", "opus_copies"]


@dataclass(frozen=True)
class Copy:
    """What one way of compressing makes of clips.

    Attributes:
        name: Of the way.
        waves: `[b, n]`.
        kbps: Its bitrate; None where nothing is compressed.
    """

    name: str
    waves: Tensor
    kbps: float | None = None


@dataclass(frozen=True)
class Checked:
    """What is left in a copy of clips.

    Attributes:
        row: Distances to the clips.
        accuracy: For each attribute how often the judge names it.
        kept: For each attribute the accuracy as a share of that on the real clips.
    """

    row: CodecRow
    accuracy: dict[str, Metric]
    kept: dict[str, Metric]

    @property
    def metrics(self) -> list[Metric]:
        """Everything as metrics."""
        row, note = self.row, "" if self.row.kbps is None else f"{self.row.kbps:.2f} kbps"
        distances = {
            "mel distance (nepers)": row.mel_nepers,
            "MR-STFT distance": row.stft,
            "SI-SDR (dB)": row.si_sdr_db,
        }
        return [
            *self.accuracy.values(),
            *self.kept.values(),
            *(
                Metric(f"{row.name} / {name}", value.mean, value.low, value.high, None, row.num_clips, note)
                for name, value in distances.items()
            ),
        ]


@beartype
def check_copies(
    judge: AttributeClassifier,
    waves: Tensor,
    waves_hz: int,
    truth: dict[str, list[str]],
    copies: Iterable[Copy],
    sample_hz: int,
) -> list[Checked]:
    """Have the judge name the attributes of real clips and of copies of them, and measure the copies.

    Args:
        judge: Fitted on real clips.
        waves: Real clips `[b, n]`.
        waves_hz: Their rate (Hz).
        truth: For each attribute, the true names.
        copies: Copies at `sample_hz`; gone through once.
        sample_hz: Rate of the copies, at which they are compared with the clips (Hz).

    Returns:
        The real clips themselves, then one entry a copy.
    """
    heard = judge.predict(waves, waves_hz)
    target = resample(waves, waves_hz, sample_hz)
    found = [_checked(Copy("real", waves), heard, heard, truth, waves, waves_hz)]
    for copy in copies:
        found.append(_checked(copy, judge.predict(copy.waves, sample_hz), heard, truth, target, sample_hz))
    return found


def _checked(
    copy: Copy,
    answers: dict[str, list[str]],
    heard: dict[str, list[str]],
    truth: dict[str, list[str]],
    target: Tensor,
    sample_hz: int,
) -> Checked:
    """Compare a copy with the clips, and the answers to it with those to the real clips."""
    pairs = zip(rearrange(copy.waves, "b n -> b 1 n"), rearrange(target, "b n -> b 1 n"))
    accuracy, kept = {}, {}
    for attribute, wanted in truth.items():
        balanced = attribute not in PLAIN_ACCURACY
        name = f"{copy.name} / {attribute}{' (balanced)' if balanced else ''}"
        accuracy[attribute] = accuracy_metric(name, wanted, answers[attribute], balanced=balanced)
        on_copy = accuracy_statistic(wanted, answers[attribute], balanced)
        on_real = accuracy_statistic(wanted, heard[attribute], balanced)
        share = partial(_share, on_copy, on_real)
        kept[attribute] = Metric.measured(f"{name}, share of real", share, len(wanted))
    return Checked(distance_row(copy.name, pairs, sample_hz, copy.kbps), accuracy, kept)


def _share(on_copy: Callable[[np.ndarray], float], on_real: Callable[[np.ndarray], float], chosen: np.ndarray) -> float:
    """One accuracy as a share of another; what was never right cannot get worse."""
    real = on_real(chosen)
    return on_copy(chosen) / real if real else 1.0


@beartype
def codec_copies(codec: Codec, waves: Tensor, levels: Sequence[int | None] = (None,)) -> Iterator[Copy]:
    """Pass clips through a codec.

    Args:
        codec: The codec.
        waves: `[b, n]` at its rate.
        levels: Numbers of levels to decode from; None stands for all.

    Yields:
        The clips themselves under the name "unquantized copy", then one copy for each of `levels`.
    """
    yield Copy("unquantized copy", waves)
    for num_levels in levels:
        count = num_levels or codec.num_quantizers
        kbps = codec.bitrate_kbps(count)
        made = reconstruct(codec, waves, num_levels=count, codes_alone=False)
        yield Copy(f"codec, {count} of {codec.num_quantizers} levels", made, kbps)


@beartype
def opus_copies(waves: Tensor, waves_hz: int, sample_hz: int, bitrates_kbps: Sequence[float]) -> Iterator[Copy]:
    """Pass clips through Opus.

    Args:
        waves: `[b, n]`.
        waves_hz: Their rate (Hz), at which Opus gets them.
        sample_hz: Rate of the copies (Hz).
        bitrates_kbps: Bitrates to ask for.

    Yields:
        One copy a bitrate, with the bitrate that Opus really took.
    """
    seconds = waves.numel() / waves_hz
    for kbps in bitrates_kbps:
        made = [opus_copy(rearrange(wave, "n -> 1 n"), waves_hz, kbps) for wave in waves]
        num_bits = sum(copy.num_bits for copy in made)
        copies = resample(torch.cat([copy.wave for copy in made]), waves_hz, sample_hz)
        yield Copy(f"opus {kbps:g} kbps", copies, num_bits / seconds / 1000)


@beartype
def checked_table(checked: Sequence[Checked]) -> str:
    """Set what was found as a table, one line a copy.

    Args:
        checked: As `check_copies` gives it.

    Returns:
        Markdown, ending in a line break; 95% intervals are in brackets.
    """
    names = [metric.name.partition(" / ")[2] for metric in checked[0].accuracy.values()] if checked else []
    cells = [["", "kbps", "mel (nepers)", "SI-SDR (dB)"]]
    cells[0] += [cell for name in names for cell in (f"{name}, %", "% of real")]
    for one in checked:
        row = one.row
        kbps = "" if row.kbps is None else f"{row.kbps:.2f}"
        cells.append([row.name, kbps, row.mel_nepers.text(3), row.si_sdr_db.text(1)])
        for accuracy, kept in zip(one.accuracy.values(), one.kept.values()):
            cells[-1] += [_percent(accuracy), _percent(kept)]
    return aligned_table(cells)


def _percent(metric: Metric) -> str:
    return Estimate(100 * metric.value, 100 * metric.low, 100 * metric.high).text(1)


def main(
    codec: str = DEFAULT_CODEC,
    data: Path = Path("../shared/data/tunes"),
    classifier: Path | None = None,
    levels: tuple[int, ...] = (),
    opus: tuple[float, ...] = (6.0, 12.0),
    limit: int | None = None,
    json: Path | None = None,
    device: str = "cpu",
    offline: bool = False,
) -> None:
    """Print what is left of the attributes of held-out clips after a codec, after Opus and after nothing.

    Args:
        codec: Name of a bundled codec, the folder of one, or the id of a published one.
        data: Folder with train.jsonl and valid.jsonl.
        classifier: Folder of a fitted classifier; made there if it is missing.
        levels: Also try only so many code levels.
        opus: Bitrates of Opus to compare with (kbps); needs opus-tools.
        limit: Use only the first clips.
        json: Write the metrics here too, and the table beside with the suffix .md.
        device: Where the codec runs.
        offline: Never ask a model hub.
    """
    if json is not None:
        check_file(json, (".json",))
    if opus:
        require_opus()
    module = codec_named(codec, device_named(device), offline)
    judge = fitted_classifier(data, classifier)
    items = load_items(data / "valid.jsonl").items[:limit]
    truth = {name: labels_of(items, name) for name in judge.classes}
    waves_hz, sample_hz = max(item.sample_hz for item in items), module.target_sample_hz
    waves = load_clips(items, waves_hz)

    def copies() -> Iterator[Copy]:
        yield from codec_copies(module, resample(waves, waves_hz, sample_hz), (None, *levels))
        yield from opus_copies(waves, waves_hz, sample_hz, opus)

    checked = check_copies(judge, waves, waves_hz, truth, copies(), sample_hz)
    table = checked_table(checked)
    chances = "; ".join(
        f"{name} {100 * metric.chance:.1f}%" for name, metric in checked[0].accuracy.items() if metric.chance
    )
    sys.stdout.write(f"{len(items)} clips of {data}, compared at {sample_hz} Hz; chance: {chances}\n{table}")
    if json is not None:
        settings = {
            "codec": codec,
            "codec_fingerprint": module.fingerprint(),
            "judge_fingerprint": fingerprint_of(judge),
            "sample_hz": sample_hz,
            "limit": limit,
            "rows": [asdict(one.row) for one in checked],
        }
        write_report(json, [metric for one in checked for metric in one.metrics], settings, table)


if __name__ == "__main__":
    tyro.cli(main)
