"""Quality of music clips that were encoded and decoded, measured by classifiers and distances.

Run as `python -m musiclm_pytorch.recipes.metrics.codec_metrics --codec DIR --data TUNES --json metrics.json`.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from musiclm_pytorch.evaluation.classifier import AttributeClassifier, fitted_classifier
from musiclm_pytorch.evaluation.clips import labels_of, load_clips
from musiclm_pytorch.evaluation.codec_report import CodecRow, distance_row
from musiclm_pytorch.evaluation.report import (
    MetricValue,
    accuracy_metric,
    accuracy_statistic,
    aligned_table,
    write_report,
)
from musiclm_pytorch.recipes.metrics.generation_metrics import ATTRIBUTES, PLAIN_ACCURACY, reconstruct
from musiclm_pytorch.recipes.metrics.opus import opus_copy, require_opus

__all__ = ["CopyMetrics", "Copy", "measure_copies", "copies_table", "codec_copies", "main", "opus_copies"]


@dataclass(frozen=True)
class Copy:
    """Decoded clips `[b, n]` with their bitrate, which is None for clips without compression."""

    name: str
    waves: Tensor
    kbps: float | None = None


@dataclass(frozen=True)
class CopyMetrics:
    """Quality of clips that were encoded and decoded.

    Attributes:
        row: Distances between the decoded clips and the original clips.
        accuracy: Accuracy of the classifier on the decoded clips, for each attribute.
        kept: Accuracy on the decoded clips divided by the accuracy on the original clips, for each attribute.
    """

    row: CodecRow
    accuracy: dict[str, MetricValue]
    kept: dict[str, MetricValue]

    @property
    def metrics(self) -> list[MetricValue]:
        """All numbers of the codec comparison, as a list of metrics."""
        row, note = self.row, "" if self.row.kbps is None else f"{self.row.kbps:.2f} kbps"
        distances = {
            "mel distance (nepers)": row.mel_nepers,
            "MR-STFT distance": row.stft,
            "SI-SDR (dB)": row.si_sdr_db,
        }
        return [
            *self.accuracy.values(),
            *self.kept.values(),
            *(replace(metric, name=f"{row.name} / {name}", note=note) for name, metric in distances.items()),
        ]


@typed
def measure_copies(
    classifier: AttributeClassifier,
    waves: Tensor,
    waves_hz: int,
    truth: dict[str, list[str]],
    copies: Iterable[Copy],
    sample_hz: int,
) -> list[CopyMetrics]:
    """Measure the quality of decoded copies of real clips.

    Args:
        classifier: Attribute classifier that is fitted to real clips.
        waves: Real clips `[b, n]`.
        waves_hz: Sample rate of the real clips.
        truth: True class of each real clip, for each attribute.
        copies: Decoded copies of the real clips, with the sample rate `sample_hz`.
        sample_hz: Sample rate at which copies and real clips are compared.

    Returns:
        Metrics of the real clips, followed by the metrics of each copy.
    """
    on_real = classifier.predict(waves, waves_hz)
    target = resample(waves, waves_hz, sample_hz)
    measured = [_measure_copy(Copy("real", waves), on_real, on_real, truth, waves, waves_hz)]
    for copy in copies:
        answers = classifier.predict(copy.waves, sample_hz)
        measured.append(_measure_copy(copy, answers, on_real, truth, target, sample_hz))
    return measured


def _measure_copy(
    copy: Copy,
    answers: dict[str, list[str]],
    answers_on_real: dict[str, list[str]],
    truth: dict[str, list[str]],
    target: Tensor,
    sample_hz: int,
) -> CopyMetrics:
    """Measure how far decoded clips are from the real clips `target`, and the classifier accuracy on decoded clips."""
    accuracy, kept = {}, {}
    for attribute, classes in truth.items():
        balanced = attribute not in PLAIN_ACCURACY
        name = f"{copy.name} / {attribute}{' (balanced)' if balanced else ''}"
        accuracy[attribute] = accuracy_metric(name, classes, answers[attribute], balanced=balanced)
        kept[attribute] = _kept_metric(name, classes, answers[attribute], answers_on_real[attribute], balanced)
    pairs = zip(rearrange(copy.waves, "b n -> b 1 n"), rearrange(target, "b n -> b 1 n"))
    return CopyMetrics(distance_row(copy.name, pairs, sample_hz, copy.kbps), accuracy, kept)


def _kept_metric(
    name: str, classes: list[str], answers: list[str], answers_on_real: list[str], balanced: bool
) -> MetricValue:
    """Divide the accuracy on a copy by the accuracy on the real clips; return 1 if the divisor is 0."""
    on_copy = accuracy_statistic(classes, answers, balanced)
    on_real = accuracy_statistic(classes, answers_on_real, balanced)

    def ratio(rows: np.ndarray) -> float:
        real = on_real(rows)
        return on_copy(rows) / real if real else 1.0

    return MetricValue.measured(f"{name}, share of real", ratio, len(classes))


@typed
def codec_copies(codec: Codec, waves: Tensor, levels: Sequence[int | None] = (None,)) -> Iterator[Copy]:
    """Yield the clips `[b, n]`, and one decoded copy per number of code levels (None = all levels)."""
    yield Copy("unquantized copy", waves)
    for num_levels in levels:
        count = num_levels or codec.num_quantizers
        decoded = reconstruct(codec, waves, num_levels=count, codes_alone=False)
        yield Copy(f"codec, {count} of {codec.num_quantizers} levels", decoded, codec.bitrate_kbps(count))


@typed
def opus_copies(waves: Tensor, waves_hz: int, sample_hz: int, bitrates_kbps: Sequence[float]) -> Iterator[Copy]:
    """Yield one copy of the clips per requested Opus bitrate, with the actual bitrate of the packets.

    Args:
        waves: Clips `[b, n]`.
        waves_hz: Sample rate of the clips.
        sample_hz: Sample rate of the decoded copies.
        bitrates_kbps: Requested bitrates in kbps.
    """
    seconds = waves.numel() / waves_hz
    for kbps in bitrates_kbps:
        decoded = [opus_copy(rearrange(wave, "n -> 1 n"), waves_hz, kbps) for wave in waves]
        num_bits = sum(copy.num_bits for copy in decoded)
        copies = resample(torch.cat([copy.wave for copy in decoded]), waves_hz, sample_hz)
        yield Copy(f"opus {kbps:g} kbps", copies, num_bits / seconds / 1000)


@typed
def copies_table(measured: Sequence[CopyMetrics]) -> str:
    """Create a Markdown table with one row per copy of the clips, and 95% confidence intervals in brackets."""
    names = [metric.name.partition(" / ")[2] for metric in measured[0].accuracy.values()] if measured else []
    cells = [["", "kbps", "mel (nepers)", "SI-SDR (dB)"]]
    cells[0] += [cell for name in names for cell in (f"{name}, %", "% of real")]
    for copy in measured:
        row = copy.row
        kbps = "" if row.kbps is None else f"{row.kbps:.2f}"
        cells.append([row.name, kbps, row.mel_nepers.text(3), row.si_sdr_db.text(1)])
        for accuracy, kept in zip(copy.accuracy.values(), copy.kept.values()):
            cells[-1] += [accuracy.text(1, scale=100), kept.text(1, scale=100)]
    return aligned_table(cells)


def main(
    data: Path,
    codec: str = "codec_16khz",
    classifier: Path | None = None,
    levels: tuple[int, ...] = (),
    opus: tuple[float, ...] = (6.0, 12.0),
    limit: int | None = None,
    json: Path | None = None,
    device: str = "cpu",
    offline: bool = False,
) -> None:
    """Measure the quality of held-out clips after a codec and after Opus, and print a table.

    Args:
        codec: Name of a bundled codec, folder of a saved codec, or model hub id of a published codec.
        data: Folder with the manifests train.jsonl and valid.jsonl.
        classifier: Folder of a fitted classifier; if the folder is empty, a classifier is fitted and saved in the
            folder.
        levels: Numbers of code levels to measure, besides all levels.
        opus: Opus bitrates to measure in kbps; the programs of opus-tools must be installed.
        limit: Largest number of clips to use; None = all clips.
        json: JSON file for the metrics; the table is written to a file with the suffix .md.
        device: Device on which the codec runs.
        offline: Whether to use only files on this machine, without a model hub.
    """
    if opus:
        require_opus()
    module = Codec.from_pretrained(codec, device=device, offline=offline)
    fitted = fitted_classifier(data / "train.jsonl", ATTRIBUTES, classifier)
    items = load_items(data / "valid.jsonl").items[:limit]
    truth = {name: labels_of(items, name) for name in fitted.classes}
    waves_hz, sample_hz = max(item.sample_hz for item in items), module.target_sample_hz
    waves = load_clips(items, waves_hz)

    def copies() -> Iterator[Copy]:
        yield from codec_copies(module, resample(waves, waves_hz, sample_hz), (None, *levels))
        yield from opus_copies(waves, waves_hz, sample_hz, opus)

    measured = measure_copies(fitted, waves, waves_hz, truth, copies(), sample_hz)
    table = copies_table(measured)
    chances = "; ".join(
        f"{name} {100 * metric.chance:.1f}%" for name, metric in measured[0].accuracy.items() if metric.chance
    )
    sys.stdout.write(f"{len(items)} clips of {data}, compared at {sample_hz} Hz; chance: {chances}\n{table}")
    if json is not None:
        settings = {
            "codec": codec,
            "codec_fingerprint": module.fingerprint(),
            "classifier_fingerprint": fingerprint_of(fitted),
            "sample_hz": sample_hz,
            "limit": limit,
            "rows": [asdict(copy.row) for copy in measured],
        }
        write_report(json, [metric for copy in measured for metric in copy.metrics], settings, table)


if __name__ == "__main__":
    tyro.cli(main)
