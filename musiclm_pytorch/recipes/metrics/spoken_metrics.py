"""What an AudioLM makes of spoken digits: whose voice continues a prompt, and whether what is said is a digit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from beartype import beartype
from torch import Tensor

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch.evaluation.report import Metric, accuracy_metric
from musiclm_pytorch.recipes.metrics.classifier import AttributeClassifier, fit_attribute_classifier
from musiclm_pytorch.recipes.metrics.clips import labels_of, load_clips
from musiclm_pytorch.recipes.metrics.generation_metrics import other_clips, reconstruct
from musiclm_pytorch.recipes.metrics.word_features import WordFeatures, cut_words, padded

__all__ = [
    "HeardWords",
    "confidence_metrics",
    "confidence_table",
    "fit_word_judge",
    "generated_waves",
    "heard_words",
    "histogram",
    "judge_metrics",
    "speaker_metrics",
    "speakers_of",
]

LABELS = ("digit", "speaker")
# Longer than any word of the collection.
_WORD_SECONDS = 2.5
_NOTHING_HEARD = "nobody"
_PERCENTILES = (5, 25, 50, 75, 95)
_NUM_BINS, _BAR_LENGTH = 10, 30


@beartype
def fit_word_judge(words: Sequence[AudioItem]) -> AttributeClassifier:
    """Fit a judge of digit and speaker on recorded words.

    Args:
        words: Recordings with the labels `digit` and `speaker`.

    Returns:
        The judge; it has heard nothing but these.
    """
    return fit_attribute_classifier(words, LABELS, WordFeatures())


@beartype
def generated_waves(
    audiolm: AudioLM,
    num_waves: int,
    seconds: float,
    prompts: Tensor | None = None,
    prompts_hz: int | None = None,
    batch_size: int = 40,
) -> Tensor:
    """Sample an AudioLM; wave i has seed i.

    Args:
        audiolm: The model.
        num_waves: Number of waves b.
        seconds: Length of each, its prompt included.
        prompts: Waves `[b, n]` to continue; None = unconditional.
        prompts_hz: Their rate (Hz); None = the codec's.
        batch_size: Waves at once.

    Returns:
        `[b, n]` at the codec's rate.
    """
    waves = []
    for first in range(0, num_waves, batch_size):
        seeds = list(range(first, min(first + batch_size, num_waves)))
        prime = None if prompts is None else prompts[first : first + len(seeds)]
        made = audiolm.generate(
            batch_size=len(seeds), seconds=seconds, seeds=seeds, prime_wave=prime, prime_wave_input_sample_hz=prompts_hz
        )
        waves.append(made.wave.float().cpu())
    return torch.cat(waves)


@beartype
def speakers_of(judge: AttributeClassifier, waves: Tensor, sample_hz: int) -> list[str]:
    """Name who speaks in each recording: the judge's opinion of every piece between pauses, averaged.

    Args:
        judge: From `fit_word_judge`.
        waves: `[b, n]`.
        sample_hz: Their rate (Hz).

    Returns:
        One speaker a recording; "nobody", which is no speaker, where there is no word in it.
    """
    names = []
    for wave in waves:
        pieces = cut_words(wave, sample_hz)
        if not pieces:
            names.append(_NOTHING_HEARD)
            continue
        chances = judge.predict_proba(padded(pieces), sample_hz)["speaker"]
        names.append(judge.classes["speaker"][int(chances.clamp_min(1e-9).log().mean(dim=0).argmax())])
    return names


@dataclass(frozen=True)
class HeardWords:
    """Pieces between pauses, as the judge hears them.

    Attributes:
        digits: What it says each is.
        confidences: How sure it is, `[k]` in 0..1.
        num_seconds: Length of all recordings that were cut.
    """

    digits: list[str]
    confidences: np.ndarray
    num_seconds: float


@beartype
def heard_words(judge: AttributeClassifier, waves: Tensor, sample_hz: int, backwards: bool = False) -> HeardWords:
    """Cut recordings at their pauses and ask which digit each whole piece is.

    Args:
        judge: From `fit_word_judge`.
        waves: `[b, n]`.
        sample_hz: Their rate (Hz).
        backwards: Play the pieces backwards to the judge: sounds of a voice that are no digit.

    Returns:
        What was heard.

    Raises:
        ValueError: If there is no whole piece.
    """
    pieces = [piece for wave in waves for piece in cut_words(wave, sample_hz, whole_only=True)]
    if not pieces:
        raise ValueError(f"no piece as long as a word in {len(waves)} recordings; are they silent?")
    chances = judge.predict_proba(padded([p.flip(0) for p in pieces] if backwards else pieces), sample_hz)["digit"]
    best, index = chances.max(dim=-1)
    digits = [judge.classes["digit"][i] for i in index.tolist()]
    return HeardWords(digits, best.double().numpy(), waves.numel() / sample_hz)


@beartype
def judge_metrics(judge: AttributeClassifier, audiolm: AudioLM, words: Sequence[AudioItem]) -> list[Metric]:
    """Say how good the judge is, on recorded words and on what the codec makes of them.

    Args:
        judge: From `fit_word_judge`.
        audiolm: Whose codec is tried, with as many levels as its stages predict.
        words: Recordings that the judge has not heard.

    Returns:
        Accuracies of digit and speaker, first of the recordings.
    """
    codec = audiolm.codec
    waves = load_clips(words, codec.target_sample_hz, _WORD_SECONDS)
    copies = reconstruct(codec, waves, num_levels=_predicted_levels(audiolm))
    metrics = []
    for name, heard in (("recorded words", waves), ("words after the codec", copies)):
        answers = judge.predict(heard, codec.target_sample_hz)
        metrics += [
            accuracy_metric(f"judge / {name} / {label}", labels_of(words, label), answers[label]) for label in LABELS
        ]
    return metrics


def _predicted_levels(audiolm: AudioLM) -> int:
    """Levels of codes that the stages of a model predict together."""
    last = audiolm.coarse if audiolm.fine is None else audiolm.fine
    return max(source.first_level + source.num_levels for source in last.transformer.sources.values())


@beartype
def speaker_metrics(truth: Sequence[str], answers: Mapping[str, Sequence[str]]) -> list[Metric]:
    """Say how often the speaker is that of the prompt.

    Args:
        truth: Speaker of every prompt.
        answers: Who is heard in what follows the prompts, by what follows.

    Returns:
        For each the share that has the prompt's speaker; and the same of the first when prompts are exchanged, so that
        each is compared with the speaker of another prompt.
    """
    metrics = [accuracy_metric(f"speaker kept / {name}", truth, heard) for name, heard in answers.items()]
    name, heard = next(iter(answers.items()))
    exchanged = [truth[other] for other in other_clips(len(truth))]
    return [*metrics, accuracy_metric(f"speaker kept / {name}, prompts exchanged", exchanged, heard)]


@beartype
def confidence_metrics(heard: Mapping[str, HeardWords], reference: str) -> list[Metric]:
    """Say which share of pieces is recognised as some digit: as surely as 95% of the reference are.

    Args:
        heard: Pieces by their source.
        reference: The source that sets the limit.

    Returns:
        Shares, and the number of whole pieces in a second.
    """
    limit = float(np.quantile(heard[reference].confidences, 0.05))
    return [
        Metric.measured(
            f"recognised as a digit / {name}",
            partial(_share, words.confidences >= limit),
            len(words.confidences),
            note=f"confidence at least {limit:.3f}; {len(words.digits) / words.num_seconds:.2f} pieces a second",
        )
        for name, words in heard.items()
    ]


def _share(holds: np.ndarray, chosen: np.ndarray) -> float:
    return float(holds[chosen].mean())


@beartype
def confidence_table(heard: Mapping[str, HeardWords]) -> str:
    """Set the judge's confidence in pieces as percentiles, digits heard and histograms.

    Args:
        heard: Pieces by their source.

    Returns:
        Markdown, ending in a line break.
    """
    lines = [f"| confidence | {' | '.join(f'{p}%' for p in _PERCENTILES)} |", f"|---|{'---|' * len(_PERCENTILES)}"]
    for name, words in heard.items():
        values = np.percentile(words.confidences, _PERCENTILES)
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    digits = sorted({digit for words in heard.values() for digit in words.digits})
    lines += ["", f"| share of digits heard | {' | '.join(digits)} |", f"|---|{'---|' * len(digits)}"]
    for name, words in heard.items():
        shares = [words.digits.count(digit) / len(words.digits) for digit in digits]
        lines.append(f"| {name} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    for name, words in heard.items():
        bars = histogram(words.confidences)
        lines += ["", f"Confidence in {name} ({len(words.digits)} pieces):", "", "```", *bars, "```"]
    return "\n".join(lines) + "\n"


@beartype
def histogram(shares: np.ndarray) -> list[str]:
    """Draw how numbers in 0..1 are distributed, one line a tenth.

    Args:
        shares: At least one number.

    Returns:
        Lines of text, lowest tenth first.
    """
    counts, edges = np.histogram(shares, bins=_NUM_BINS, range=(0.0, 1.0))
    parts = counts / counts.sum()
    return [
        f"{low:.1f} to {low + 1 / _NUM_BINS:.1f} {100 * part:5.1f}% {'#' * round(_BAR_LENGTH * part)}".rstrip()
        for low, part in zip(edges, parts)
    ]
