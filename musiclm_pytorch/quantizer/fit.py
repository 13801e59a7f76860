"""Fitting of a `MuLaNEmbedQuantizer` to audio files and captions, and metrics of the fitted quantizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.mulan.captions import texts_of
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

__all__ = ["QuantizerReport", "fit_quantizer", "measure_quantizer"]

logger = logger_named(__name__)

_T = TypeVar("_T")

_BATCH_SIZE = 32
# The mean of fewer texts describes these texts more than texts in general.
_MIN_CAPTIONED_FILES = 32
_MIN_USAGE = 0.5


@dataclass(frozen=True)
class QuantizerReport:
    """Metrics of the codes of a quantizer, where tuples have one number per level.

    Attributes:
        is_held_out: Whether `explained`, `agreement` and `chance` are measured on files that were not used in fitting.
        usage: Share of the codes of a level that occur for at least one audio latent.
        perplexity: `exp(entropy)` of the frequencies of the codes.
        explained: Share of the variance of audio latents that the codes of a level and all levels before it explain.
        agreement: Share of the texts whose code equals the code of their audio; empty without texts.
        chance: Share of the texts whose code equals the code of random audio.
    """

    num_windows: int
    num_pairs: int
    is_held_out: bool
    usage: tuple[float, ...]
    perplexity: tuple[float, ...]
    explained: tuple[float, ...]
    agreement: tuple[float, ...]
    chance: tuple[float, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """All metrics of the report by name, with the most important metrics first."""
        first = {"agreement_level_1": self.agreement[0], "chance_level_1": self.chance[0]} if self.agreement else {}
        levels = {
            f"{name}_level_{level}": value
            for name in ("agreement", "chance", "usage", "perplexity", "explained")
            for level, value in enumerate(getattr(self, name), start=1)
        }
        return {**first, "explained": self.explained[-1], "least_usage": min(self.usage), **levels}


@typed
@torch.no_grad()
def measure_quantizer(
    quantizer: MuLaNEmbedQuantizer,
    audio_latents: Tensor,
    text_latents: Tensor | None = None,
    *,
    clip_index: Tensor | None = None,
) -> QuantizerReport:
    """Measure a quantizer on audio latents `[n, d]` and text latents `[k, d]`; see `MuLaNEmbedQuantizer.fit`."""
    audio = quantizer.codes_from_latents(audio_latents)
    shares = [_shares(level, quantizer.codebook_size) for level in audio.T]
    residual = quantizer.centred(audio_latents.to(quantizer.codebooks.device))
    spread, explained = float(residual.square().sum(dtype=torch.float64)), []
    for codebook, codes in zip(quantizer.codebooks, audio.T):
        residual = residual - codebook[codes.to(residual.device)]
        explained.append(1 - float(residual.square().sum(dtype=torch.float64)) / spread if spread else 1.0)
    agreement, chance = [], []
    if text_latents is not None:
        text = quantizer.codes_from_latents(text_latents, "text")
        audio_of_text = audio if clip_index is None else audio[clip_index.to(audio.device)]
        agreement = (audio_of_text == text.to(audio.device)).double().mean(dim=0).tolist()
        pairs = zip(audio_of_text.T, text.T)
        chance = [float(_shares(a, quantizer.codebook_size) @ _shares(t, quantizer.codebook_size)) for a, t in pairs]
    return QuantizerReport(
        num_windows=len(audio),
        num_pairs=0 if text_latents is None else len(text_latents),
        is_held_out=False,
        usage=tuple(float((share > 0).double().mean()) for share in shares),
        perplexity=tuple(float(torch.exp(-torch.xlogy(share, share).sum())) for share in shares),
        explained=tuple(explained),
        agreement=tuple(agreement),
        chance=tuple(chance),
    )


@typed
def fit_quantizer(
    quantizer: MuLaNEmbedQuantizer,
    items: Sequence[AudioItem],
    *,
    held_out: Sequence[AudioItem] = (),
    seed: int = 0,
    max_windows: int = 200_000,
) -> QuantizerReport:
    """Fit the codebooks of a quantizer to windows of audio files.

    Captions are used to align texts with audio if all files, or at least 32 files, have captions. Usage and perplexity
    are measured on the fitted files, other metrics on `held_out` (if empty, on the fitted files). At most `max_windows`
    random windows, and as many captions, are embedded.
    """
    windows = _draw_windows(quantizer.mulan, items, max_windows, seed)
    quantizer.check_can_fit(sum(len(numbers) for numbers in windows))
    latents = _embed(quantizer.mulan, items, windows, max_windows)
    quantizer.fit(latents.audio, latents.text, clip_index=latents.clip_index, seed=seed)
    report = measure_quantizer(quantizer, *latents[:2], clip_index=latents.clip_index)
    if held_out:
        windows = _draw_windows(quantizer.mulan, held_out, max_windows, seed)
        held_out_latents = _embed(quantizer.mulan, held_out, windows, max_windows)
        if held_out_latents.text is not None or latents.text is None:
            fitted = {name: getattr(report, name) for name in ("num_windows", "usage", "perplexity")}
            report = measure_quantizer(quantizer, *held_out_latents[:2], clip_index=held_out_latents.clip_index)
            report = replace(report, is_held_out=True, **fitted)
    logger.info("quantizer: %s", {name: round(value, 3) for name, value in report.metrics.items()})
    least = min(report.usage)
    if least < _MIN_USAGE:
        logger.warning(
            f"level {1 + report.usage.index(least)} uses {least:.0%} of its {quantizer.codebook_size} codes, since "
            "there are too few recordings or they are too similar; use fewer levels or a smaller codebook"
        )
    return report


class _Latents(NamedTuple):
    """Latents `[n, d]` of audio windows and `[k, d]` of captions, and `clip_index [k]`, the window of each caption."""

    audio: Tensor
    text: Tensor | None
    clip_index: Tensor | None


def _draw_windows(mulan: JointEmbedding, items: Sequence[AudioItem], limit: int, seed: int) -> list[np.ndarray]:
    """Select at most `limit` random windows from all files; return the ascending window numbers of each file."""
    window, stride = mulan.window_samples, mulan.window_stride_samples
    lengths = [-(-item.num_samples * mulan.sample_hz // item.sample_hz) for item in items]
    counts = np.array([1 + max(0, length - window) // stride for length in lengths])
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    if total <= limit:
        return [np.arange(count) for count in counts]
    drawn = np.sort(np.random.default_rng(seed).choice(total, limit, replace=False, shuffle=False))
    return [part - start for part, start in zip(np.split(drawn, np.searchsorted(drawn, ends[:-1])), ends - counts)]


@torch.no_grad()
def _embed(
    mulan: JointEmbedding, items: Sequence[AudioItem], windows: Sequence[np.ndarray], max_texts: int
) -> _Latents:
    """Compute the latents of the selected windows and of the captions of audio files."""
    device = device_of(mulan)
    audio = []
    for waves in _batches(_window_waves(mulan, items, windows)):
        lengths = torch.tensor([len(wave) for wave in waves], device=device)
        padded = pad_sequence(waves, batch_first=True).to(device)
        audio.append(mulan.get_audio_latents(padded, lengths).float().cpu())
    texts, clip_index = _captions(items, [len(numbers) for numbers in windows], max_texts)
    if not texts:
        return _Latents(torch.cat(audio), None, None)
    text = [mulan.get_text_latents(part).float().cpu() for part in _batches(iter(texts))]
    return _Latents(torch.cat(audio), torch.cat(text), torch.tensor(clip_index))


def _window_waves(mulan: JointEmbedding, items: Sequence[AudioItem], windows: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """Read the waves `[n]` of the selected windows, file by file; files without selected windows are not read."""
    window, stride = mulan.window_samples, mulan.window_stride_samples
    dataset = CropDataset(items, None, (mulan.sample_hz,), cache_bytes=0)
    for index, numbers in enumerate(windows):
        if len(numbers):
            wave = dataset.get(0, index).waves[mulan.sample_hz]
            yield from (wave[number * stride : number * stride + window] for number in numbers.tolist())


def _captions(items: Sequence[AudioItem], num_windows: Sequence[int], limit: int) -> tuple[list[str], list[int]]:
    """List captions, and the index of a window for each; the lists are empty if too few files have captions."""
    files = [(texts_of(item), count) for item, count in zip(items, num_windows) if count]
    num_captioned = sum(bool(captions) for captions, _ in files)
    if num_captioned < min(len(files), _MIN_CAPTIONED_FILES):
        return [], []
    limit_per_file = max(1, limit // max(num_captioned, 1))
    texts: list[str] = []
    clip_index: list[int] = []
    first = 0
    for captions, count in files:
        # Captions of a file alternate between its windows.
        captions = captions[:limit_per_file]
        texts += captions
        clip_index += [first + number % count for number in range(len(captions))]
        first += count
    return texts, clip_index


def _batches(values: Iterator[_T]) -> Iterator[list[_T]]:
    """Split values into lists of up to `_BATCH_SIZE` values."""
    while batch := list(islice(values, _BATCH_SIZE)):
        yield batch


def _shares(codes: Tensor, size: int) -> Tensor:
    """Compute the relative frequencies `[size]` of the codes 0..size - 1."""
    return codes.cpu().bincount(minlength=size).double() / len(codes)
