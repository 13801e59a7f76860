"""Metrics of an AudioLM on spoken digits: the speaker of continuations, and the digits in generated speech."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.generation.request import GenerationRequest
from musiclm_pytorch.evaluation.classifier import AttributeClassifier, fit_attribute_classifier
from musiclm_pytorch.evaluation.clips import labels_of, load_clips
from musiclm_pytorch.evaluation.report import MetricValue, accuracy_metric, aligned_table
from musiclm_pytorch.recipes.metrics.generation_metrics import other_clips, reconstruct
from musiclm_pytorch.recipes.metrics.word_features import WordFeatures, cut_words, padded

__all__ = [
    "RecognizedWords",
    "classifier_metrics",
    "confidence_metrics",
    "confidence_table",
    "fit_word_classifier",
    "generated_waves",
    "histogram",
    "recognized_words",
    "speaker_metrics",
    "speakers_of",
]

LABELS = ("digit", "speaker")
# Limit that is longer than any word of the dataset.
_WORD_SECONDS = 2.5
_NO_SPEAKER = "nobody"
_PERCENTILES = (5, 25, 50, 75, 95)
_NUM_BINS, _BAR_LENGTH = 10, 30


@typed
def fit_word_classifier(words: Sequence[AudioItem]) -> AttributeClassifier:
    """Fit a classifier of the digit and the speaker to recorded words."""
    return fit_attribute_classifier(words, LABELS, WordFeatures())


@typed
def generated_waves(
    audiolm: AudioLM,
    num_waves: int,
    seconds: float,
    prompts: Tensor | None = None,
    prompts_hz: int | None = None,
    batch_size: int = 40,
) -> Tensor:
    """Generate waves `[b, n]` with an AudioLM; the wave number i is generated with the seed i.

    Args:
        audiolm: AudioLM that generates the waves.
        num_waves: Number of waves to generate.
        seconds: Length of each wave in seconds, including the prompt.
        prompts: Waves `[b, n]` to continue; None = generate without prompts.
        prompts_hz: Sample rate of the prompts; None = sample rate of the codec.
        batch_size: Number of waves per batch.
    """
    waves = []
    for first in range(0, num_waves, batch_size):
        seeds = list(range(first, min(first + batch_size, num_waves)))
        prime = None if prompts is None else prompts[first : first + len(seeds)]
        request = GenerationRequest(
            batch_size=len(seeds), seconds=seconds, seeds=seeds, prime_wave=prime, prime_wave_input_sample_hz=prompts_hz
        )
        waves.append(audiolm.generate(request).wave.float().cpu())
    return torch.cat(waves)


@typed
def speakers_of(classifier: AttributeClassifier, waves: Tensor, sample_hz: int) -> list[str]:
    """Predict the speaker of each recording `[b, n]` from all words; return "nobody" for a recording without words."""
    names = []
    for wave in waves:
        words = cut_words(wave, sample_hz)
        if not words:
            names.append(_NO_SPEAKER)
            continue
        probabilities = classifier.predict_proba(padded(words), sample_hz)["speaker"]
        best = probabilities.clamp_min(1e-9).log().mean(dim=0).argmax()
        names.append(classifier.classes["speaker"][int(best)])
    return names


@dataclass(frozen=True)
class RecognizedWords:
    """Digits that a classifier recognises in the words of recordings.

    Attributes:
        digits: Most probable digit of each word.
        confidences: Probability of the most probable digit of each word, one value per word.
        num_seconds: Total length of the recordings in seconds.
    """

    digits: list[str]
    confidences: np.ndarray
    num_seconds: float


@typed
def recognized_words(
    classifier: AttributeClassifier, waves: Tensor, sample_hz: int, backwards: bool = False
) -> RecognizedWords:
    """Cut recordings `[b, n]` at their pauses and classify the digit of each whole word.

    `backwards` reverses the words in time; this control has the sounds of a voice, but contains no digits.
    """
    words = [word for wave in waves for word in cut_words(wave, sample_hz, whole_only=True)]
    if not words:
        raise ValueError(
            f"found no word in {len(waves)} recordings, which are silent or too short; pass recordings of words"
        )
    inputs = padded([word.flip(0) for word in words] if backwards else words)
    best, index = classifier.predict_proba(inputs, sample_hz)["digit"].max(dim=-1)
    digits = [classifier.classes["digit"][i] for i in index.tolist()]
    return RecognizedWords(digits, best.double().numpy(), waves.numel() / sample_hz)


@typed
def classifier_metrics(
    classifier: AttributeClassifier, audiolm: AudioLM, words: Sequence[AudioItem]
) -> list[MetricValue]:
    """Measure the accuracy of the classifier on held-out words, before and after the codec."""
    codec = audiolm.codec
    waves = load_clips(words, codec.target_sample_hz, _WORD_SECONDS)
    copies = reconstruct(codec, waves, num_levels=_predicted_levels(audiolm))
    metrics = []
    for name, inputs in (("recorded words", waves), ("words after the codec", copies)):
        answers = classifier.predict(inputs, codec.target_sample_hz)
        for label in LABELS:
            truth = labels_of(words, label)
            metrics.append(accuracy_metric(f"classifier / {name} / {label}", truth, answers[label]))
    return metrics


def _predicted_levels(audiolm: AudioLM) -> int:
    """Return the number of acoustic code levels that the stages of an AudioLM predict."""
    last = list(audiolm.stages.values())[-1]
    return max(source.first_level + source.num_levels for source in last.sources.values())


@typed
def speaker_metrics(truth: Sequence[str], answers: Mapping[str, Sequence[str]]) -> list[MetricValue]:
    """Measure the share of generated waves whose speaker is the speaker of the prompt.

    Args:
        truth: True speaker of each prompt.
        answers: Dict from the name of a set of waves to the predicted speakers of its waves, in the order of `truth`.

    Returns:
        One metric per set of waves, and a control metric that compares each wave of the first set with another prompt.
    """
    metrics = [accuracy_metric(f"speaker kept / {name}", truth, speakers) for name, speakers in answers.items()]
    name, speakers = next(iter(answers.items()))
    exchanged = [truth[other] for other in other_clips(len(truth))]
    return [*metrics, accuracy_metric(f"speaker kept / {name}, prompts exchanged", exchanged, speakers)]


@typed
def confidence_metrics(words: Mapping[str, RecognizedWords], reference: str) -> list[MetricValue]:
    """Measure the share of words whose confidence is at least the 5th percentile of the reference confidences.

    Args:
        words: Dict from the name of a set of recordings to the words that the classifier recognized.
        reference: Name of the set of recordings with the reference confidences.
    """
    limit = float(np.quantile(words[reference].confidences, 0.05))
    metrics = []
    for name, recognized in words.items():
        words_per_second = len(recognized.digits) / recognized.num_seconds
        note = f"confidence at least {limit:.3f}; {words_per_second:.2f} words per second"
        metric = MetricValue.mean(f"recognised as a digit / {name}", recognized.confidences >= limit)
        metrics.append(replace(metric, note=note))
    return metrics


@typed
def confidence_table(words: Mapping[str, RecognizedWords]) -> str:
    """Format percentiles and histograms of the confidences, and the frequency of each digit, as Markdown."""
    percentiles = [["confidence", *(f"{percent}%" for percent in _PERCENTILES)]]
    digits = sorted({digit for recognized in words.values() for digit in recognized.digits})
    shares = [["share of digits", *digits]]
    histograms = []
    for name, recognized in words.items():
        values = np.percentile(recognized.confidences, _PERCENTILES)
        percentiles.append([name, *(f"{value:.3f}" for value in values)])
        count = len(recognized.digits)
        shares.append([name, *(f"{recognized.digits.count(digit) / count:.2f}" for digit in digits)])
        bars = "\n".join(histogram(recognized.confidences))
        histograms.append(f"\nConfidence in {name} ({count} words):\n\n```\n{bars}\n```\n")
    return f"{aligned_table(percentiles)}\n{aligned_table(shares)}{''.join(histograms)}"


@typed
def histogram(shares: np.ndarray) -> list[str]:
    """Format a text histogram of numbers in 0..1, with ten lines, from the lowest to the highest numbers."""
    counts, edges = np.histogram(shares, bins=_NUM_BINS, range=(0.0, 1.0))
    parts = counts / counts.sum()
    return [
        f"{low:.1f} to {low + 1 / _NUM_BINS:.1f} {100 * part:5.1f}% {'#' * round(_BAR_LENGTH * part)}".rstrip()
        for low, part in zip(edges, parts)
    ]
