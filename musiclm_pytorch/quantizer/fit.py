"""The job that fits the conditioning quantizer to a trained MuLaN, and what it says of the result."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from beartype import beartype
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.nn.module_state import device_of
from musiclm_pytorch.mulan.captions import texts_of
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.quantizer.modality_gap import DEFAULT_RIDGE_CLIPS

__all__ = ["QuantizerReport", "fit_quantizer", "measure_quantizer"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_BATCH = 32
# The mean of fewer texts says more about them than about all texts.
_LEAST_CAPTIONED = 32
_LEAST_USAGE = 0.5


@dataclass(frozen=True)
class QuantizerReport:
    """What the codes of a quantizer hold; numbers of levels are in order, the first level first.

    Attributes:
        num_windows: Audio latents that usage is counted on.
        num_pairs: Texts that agreement is counted on.
        is_held_out: Whether `explained`, `agreement` and `chance` are of files that were not fitted.
        usage: Share of the codes that are used at all, for each level.
        perplexity: `exp(entropy)` of the usage: how many codes, equally used, would be as diverse.
        explained: Share of the variance of audio that the codes explain up to each level.
        agreement: How often a text has the code of its audio, for each level; empty without texts.
        chance: How often a text has the code of any audio.
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
    def figures(self) -> dict[str, float]:
        """Every number by its name, what matters most first."""
        first = {"agreement_level_1": self.agreement[0], "chance_level_1": self.chance[0]} if self.agreement else {}
        levels = {
            f"{name}_level_{level}": value
            for name in ("agreement", "chance", "usage", "perplexity", "explained")
            for level, value in enumerate(getattr(self, name), start=1)
        }
        return {**first, "explained": self.explained[-1], "least_usage": min(self.usage), **levels}

    def __str__(self) -> str:
        """One line, level by level."""
        texts = [
            f", texts agree {agrees:.1%} (chance {chance:.1%})" for agrees, chance in zip(self.agreement, self.chance)
        ]
        levels = zip(self.usage, self.perplexity, self.explained, texts or [""] * len(self.usage))
        return "; ".join(
            f"level {level}: {used:.0%} of codes used, perplexity {perplexity:.1f}, {explained:.1%} explained{text}"
            for level, (used, perplexity, explained, text) in enumerate(levels, start=1)
        )


@beartype
@torch.no_grad()
def measure_quantizer(
    quantizer: MuLaNEmbedQuantizer,
    audio_latents: Tensor,
    text_latents: Tensor | None = None,
    *,
    clip_index: Tensor | None = None,
) -> QuantizerReport:
    """Look at the codes of some latents.

    Args:
        quantizer: Fitted.
        audio_latents: `[n, d]`.
        text_latents: `[k, d]` of texts that describe some of the audio, if there are any.
        clip_index: `[k]` int, which row of the audio each text describes. None = k is n, and row i is of audio i.

    Returns:
        The report, as of latents that were fitted.
    """
    audio = quantizer.codes_from_latents(audio_latents)
    shares = [_shares(level, quantizer.codebook_size) for level in audio.T]
    left = quantizer.centred(audio_latents.to(quantizer.codebooks.device))
    spread, explained = float(left.square().sum(dtype=torch.float64)), []
    for codebook, codes in zip(quantizer.codebooks, audio.T):
        left = left - codebook[codes.to(left.device)]
        explained.append(1 - float(left.square().sum(dtype=torch.float64)) / spread if spread else 1.0)
    agreement, chance = [], []
    if text_latents is not None:
        text = quantizer.codes_from_latents(text_latents, "text")
        own = audio if clip_index is None else audio[clip_index.to(audio.device)]
        agreement = (own == text.to(own.device)).double().mean(dim=0).tolist()
        pairs = zip(own.T, text.T)
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


@beartype
def fit_quantizer(
    quantizer: MuLaNEmbedQuantizer,
    items: Sequence[AudioItem],
    *,
    held_out: Sequence[AudioItem] = (),
    centre: bool = True,
    ridge: float | int | None = DEFAULT_RIDGE_CLIPS,
    seed: int = 0,
    max_windows: int = 200_000,
) -> QuantizerReport:
    """Fit a quantizer's codebooks once to windows of some files.

    Captions bring texts to where audio is. They are used if all files have some, or enough do.

    Args:
        quantizer: Not fitted yet; its MuLaN is trained.
        items: Files to fit to.
        held_out: Further files, which the report measures on; without any, on those it was fitted to.
        centre: See `MuLaNEmbedQuantizer.fit`.
        ridge: See `MuLaNEmbedQuantizer.fit`.
        seed: Seed of the k-means, and of the choice of windows.
        max_windows: At most so many windows and captions are embedded, drawn at random where there are more.

    Returns:
        Usage of the codes, and how often audio and its captions agree.

    Raises:
        ValueError: If there are fewer windows than codes a level, or the quantizer is fitted already.
    """
    drawn = _draw_windows(quantizer.mulan, items, max_windows, seed)
    quantizer.check_can_fit(sum(len(windows) for windows in drawn))
    latents = _embed(quantizer.mulan, items, drawn, max_windows)
    quantizer.fit(latents.audio, latents.text, clip_index=latents.clip_index, centre=centre, ridge=ridge, seed=seed)
    report = measure_quantizer(quantizer, latents.audio, latents.text, clip_index=latents.clip_index)
    if held_out:
        drawn = _draw_windows(quantizer.mulan, held_out, max_windows, seed)
        others = _embed(quantizer.mulan, held_out, drawn, max_windows)
        if others.text is not None or latents.text is None:
            own = measure_quantizer(quantizer, others.audio, others.text, clip_index=others.clip_index)
            fitted = {name: getattr(report, name) for name in ("num_windows", "usage", "perplexity")}
            report = replace(own, is_held_out=True, **fitted)
    logger.info("%s", report)
    if min(report.usage) < _LEAST_USAGE:
        logger.warning(
            "level %d uses %.0f%% of its %d codes: recordings are too few or too alike for so many; "
            "ask for fewer levels or a smaller codebook",
            1 + report.usage.index(min(report.usage)),
            100 * min(report.usage),
            quantizer.codebook_size,
        )
    return report


@dataclass(frozen=True)
class _Latents:
    """Latents of windows `[n, d]`, and of captions `[k, d]` with the row `[k]` of the window that each describes."""

    audio: Tensor
    text: Tensor | None
    clip_index: Tensor | None


def _draw_windows(mulan: JointEmbedding, items: Sequence[AudioItem], most: int, seed: int) -> list[np.ndarray]:
    """Numbers of the windows of every file that are embedded, in order; all of them if they are no more than `most`."""
    window, stride = mulan.window_samples, mulan.window_stride_samples
    lengths = [-(-item.num_samples * mulan.sample_hz // item.sample_hz) for item in items]
    counts = np.array([1 + max(0, length - window) // stride for length in lengths])
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    if total <= most:
        return [np.arange(count) for count in counts]
    drawn = np.sort(np.random.default_rng(seed).choice(total, most, replace=False, shuffle=False))
    return [part - start for part, start in zip(np.split(drawn, np.searchsorted(drawn, ends[:-1])), ends - counts)]


@torch.no_grad()
def _embed(mulan: JointEmbedding, items: Sequence[AudioItem], drawn: Sequence[np.ndarray], most_texts: int) -> _Latents:
    """Latents of the windows drawn from files, and of the files' captions."""
    device = device_of(mulan)
    audio = []
    for waves in _batches(_window_waves(mulan, items, drawn)):
        lengths = torch.tensor([len(wave) for wave in waves], device=device)
        padded = pad_sequence(waves, batch_first=True).to(device)
        audio.append(mulan.get_audio_latents(padded, lengths).float().cpu())
    texts, clip_index = _captions(items, [len(windows) for windows in drawn], most_texts)
    if not texts:
        return _Latents(torch.cat(audio), None, None)
    text = [mulan.get_text_latents(part).float().cpu() for part in _batches(iter(texts))]
    return _Latents(torch.cat(audio), torch.cat(text), torch.tensor(clip_index))


def _window_waves(mulan: JointEmbedding, items: Sequence[AudioItem], drawn: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """Waves `[n]` of the windows drawn, file by file; a file of which none is drawn is not read."""
    window, stride = mulan.window_samples, mulan.window_stride_samples
    dataset = CropDataset(items, None, (mulan.sample_hz,), cache_bytes=0)
    for index, numbers in enumerate(drawn):
        if len(numbers):
            wave = dataset.get(0, index).waves[mulan.sample_hz]
            yield from (wave[number * stride : number * stride + window] for number in numbers.tolist())


def _captions(items: Sequence[AudioItem], num_windows: Sequence[int], most: int) -> tuple[list[str], list[int]]:
    """Captions of the files of which windows were drawn, with the row of a window of the file; none if too few have."""
    known = [(texts_of(item), count) for item, count in zip(items, num_windows) if count]
    num_captioned = sum(bool(own) for own, _ in known)
    if num_captioned < min(len(known), _LEAST_CAPTIONED):
        return [], []
    most_each = max(1, most // max(num_captioned, 1))
    texts: list[str] = []
    clip_index: list[int] = []
    first = 0
    for own, count in known:
        # the captions of a file take turns at its windows
        texts += own[:most_each]
        clip_index += [first + number % count for number in range(len(own[:most_each]))]
        first += count
    return texts, clip_index


def _batches(values: Iterator[_T]) -> Iterator[list[_T]]:
    """Lists of up to `_BATCH` values."""
    while batch := list(islice(values, _BATCH)):
        yield batch


def _shares(codes: Tensor, size: int) -> Tensor:
    """How often each of `size` codes occurs, as shares `[size]` of all."""
    return codes.cpu().bincount(minlength=size).double() / len(codes)
