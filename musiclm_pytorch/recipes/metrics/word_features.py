"""Cutting of recordings into spoken words at pauses, and features of spoken words of any length."""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.evaluation.classifier import FEATURES
from musiclm_pytorch.evaluation.clip_features import FeatureModule

__all__ = ["WordFeatures", "cut_words", "padded"]

# A frame that is this far below the loudest 10 ms is a pause. In quiet recordings, noise is about 40 dB below speech.
_PAUSE_DB = 35.0
_HOP_SECONDS = 0.01
# Stops inside a word ("six", "eight") are shorter than this, pauses between words are longer.
_LONGEST_STOP_SECONDS = 0.12
_SHORTEST_WORD_SECONDS, _LONGEST_WORD_SECONDS = 0.15, 1.2
_F_MIN_HZ, _F_MAX_HZ = 80.0, 3800.0
_WORDS_PER_BATCH = 200


class WordFeatures(FeatureModule):
    """Module that computes log-mel features of a word: means of a fixed number of segments, and statistics per band.

    The features do not depend on the loudness of the word or on silence around the word. The highest mel band ends at
    3.8 kHz, so that recordings with a sample rate of 8 kHz contain all bands.
    """

    @typed
    def __init__(
        self,
        *,
        sample_hz: int = 16_000,
        num_mels: int = 40,
        num_segments: int = 16,
        dynamic_range_db: float = 40.0,
    ) -> None:
        """Create a module that computes features of spoken words.

        Args:
            sample_hz: Sample rate in Hz to which words are resampled.
            num_mels: Number of mel bands between 80 and 3800 Hz.
            num_segments: Number of segments of equal length into which a word is divided.
            dynamic_range_db: Distance in dB from the loudest value to the lower limit of levels.
        """
        super().__init__()
        if sample_hz < 2 * _F_MAX_HZ or min(num_mels, num_segments) < 1 or dynamic_range_db <= 0:
            raise ValueError(
                f"sample_hz must be at least {2 * _F_MAX_HZ:.0f} and the other arguments positive, got {sample_hz=}, "
                f"{num_mels=}, {num_segments=}, {dynamic_range_db=}"
            )
        self.config = {
            "sample_hz": sample_hz,
            "num_mels": num_mels,
            "num_segments": num_segments,
            "dynamic_range_db": float(dynamic_range_db),
        }
        self.sample_hz, self.num_segments, self.dynamic_range_db = sample_hz, num_segments, float(dynamic_range_db)
        self.mel = MelSpectrogram(
            sample_hz=sample_hz,
            n_fft=round(0.032 * sample_hz),
            hop_length=round(_HOP_SECONDS * sample_hz),
            num_mels=num_mels,
            f_min_hz=_F_MIN_HZ,
            f_max_hz=_F_MAX_HZ,
            power=2.0,
        )

    @torch.no_grad()
    def forward(self, waves: Tensor, sample_hz: int | None = None) -> Tensor:
        """Compute features `[b, d]` (float32) of words `[b, n]`; `sample_hz` is the sample rate of the words."""
        if waves.ndim != 2 or not torch.isfinite(waves).all():
            raise ValueError(f"words must have the shape [b, n] and finite samples, got the shape {tuple(waves.shape)}")
        waves = resample(waves.float(), sample_hz or self.sample_hz, self.sample_hz)
        rows = [self._describe(energy) for part in waves.split(_WORDS_PER_BATCH) for energy in self.mel(part)]
        return torch.stack(rows)

    def _describe(self, energy: Tensor) -> Tensor:
        """Compute the features of one word from its spectrogram `[m, f]` of m mel bands."""
        level = reduce(energy, "m f -> f", "sum")
        loud = (level >= level.max() * 10.0 ** (-_PAUSE_DB / 10)).nonzero()
        word = energy[:, int(loud[0]) : int(loud[-1]) + 1]
        bels = (word / word.max().clamp_min(1e-12) + 10.0 ** (-self.dynamic_range_db / 10)).log10()
        segments = F.adaptive_avg_pool1d(rearrange(bels, "m f -> 1 m f"), self.num_segments).flatten()
        length = bels.new_tensor([bels.shape[1] * _HOP_SECONDS])
        return torch.cat([segments, bels.mean(dim=1), bels.std(dim=1, correction=0), length])


FEATURES["WordFeatures"] = WordFeatures


@typed
def cut_words(wave: Tensor, sample_hz: int, whole_only: bool = False) -> list[Tensor]:
    """Cut a recording at its pauses into words `[n_i]`.

    A pause lasts at least 0.12 s and is more than 35 dB below the loudest 10 ms. Sounds shorter than 0.15 s are not
    returned.

    Args:
        wave: Recording `[n]`.
        sample_hz: Sample rate of the recording.
        whole_only: Whether to return only complete single words, which are sounds of at most 1.2 s that do not touch
            the start or the end of the recording.
    """
    if wave.ndim != 1 or not torch.isfinite(wave).all():
        raise ValueError(f"a recording must have the shape [n] and finite samples, got the shape {tuple(wave.shape)}")
    hop = round(_HOP_SECONDS * sample_hz)
    num_hops = len(wave) // hop
    if num_hops == 0:
        return []
    power = reduce(wave[: num_hops * hop].double() ** 2, "(f s) -> f", "mean", s=hop)
    loud = ((power >= power.max() * 10.0 ** (-_PAUSE_DB / 10)) & (power > 0)).nonzero().flatten().tolist()
    spans: list[list[int]] = []
    for place in loud:
        if spans and place - spans[-1][1] < round(_LONGEST_STOP_SECONDS / _HOP_SECONDS):
            spans[-1][1] = place + 1
        else:
            spans.append([place, place + 1])
    shortest, longest = (round(s / _HOP_SECONDS) for s in (_SHORTEST_WORD_SECONDS, _LONGEST_WORD_SECONDS))
    return [
        wave[first * hop : last * hop]
        for first, last in spans
        if last - first >= shortest and not (whole_only and (first == 0 or last == num_hops or last - first > longest))
    ]


@typed
def padded(waves: Sequence[Tensor]) -> Tensor:
    """Pad waves `[n_i]` of different lengths with silence, and stack the waves to a batch `[b, n]`."""
    return pad_sequence(list(waves), batch_first=True)
