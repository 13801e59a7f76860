"""Where stages get training data from: audio files, tokenized on the way, or shards of tokens computed before."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from beartype import beartype
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.codecs.protocol import Codec
from audiolm_pytorch.conditioning import Conditioner
from audiolm_pytorch.data.batches import CropBatch, collate_crops
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.semantic.protocol import SemanticTokenizer
from audiolm_pytorch.stages.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.stages.tokenizing import sample_rates, tokenize

__all__ = ["ShardSource", "StageInput", "StageSource", "WaveSource"]

# Tells the draw of texts from that of crops, which has the same seed, epoch and index.
_TEXT_DRAW = 1


@dataclass(frozen=True)
class StageInput:
    """One batch of a stage.

    Attributes:
        tokens: Tokens of the crops.
        ends: `[b]` bool, whether the file really ends with the crop.
        condition: Arguments for the conditioner: `wavs` and `lengths`, or `codes`; empty without a conditioner.
    """

    tokens: AudioTokens
    ends: Tensor
    condition: dict[str, Any]


@runtime_checkable
class StageSource(Protocol):
    """Training data of a stage."""

    def __len__(self) -> int:
        """Number of recordings."""

    @property
    def crop_seconds(self) -> float:
        """Longest stretch that a batch shows: a crop, or the longest recording where that is shorter."""

    def batch(self, indices: Sequence[tuple[int, int]]) -> Any:
        """Crops of (epoch, index) pairs, as tensors on the CPU; a pure function of them."""

    def read(self, batch: Any) -> StageInput:
        """Tokens and conditions of a batch, on the device it is on."""


@dataclass(frozen=True)
class _WaveBatch:
    """Crops of files, and which of them are conditioned on their caption: numbers `[k]` and captions."""

    crops: CropBatch
    chosen: Tensor
    texts: list[str]


class WaveSource:
    """Crops of audio files, tokenized when they are needed.

    Args:
        items: The files.
        transformer: The stage.
        seconds: Length of a crop; None = whole files.
        wav2vec: Semantic tokenizer, if the stage needs one.
        codec: Codec, if the stage needs one.
        audio_conditioner: Conditioner; it hears the crop that is modelled.
        text_prob: Probability that a captioned file is conditioned on the codes of its caption instead.
        seed: Seed of the crops.

    Raises:
        ValueError: If a tokenizer is missing, or `text_prob` is no probability or has no conditioner.
    """

    @beartype
    def __init__(
        self,
        items: Sequence[AudioItem],
        transformer: StageTransformer,
        *,
        seconds: float | int | None,
        wav2vec: SemanticTokenizer | None,
        codec: Codec | None,
        audio_conditioner: Conditioner | None,
        text_prob: float | int = 0.0,
        seed: int = 0,
    ) -> None:
        _check_text_prob(text_prob, audio_conditioner)
        self.wav2vec, self.codec, self.conditioner = wav2vec, codec, audio_conditioner
        self.text_prob, self.seed = text_prob, seed
        self.rates_hz = sample_rates(transformer.kinds, wav2vec, codec)
        wanted_hz = [*self.rates_hz.values(), *([] if audio_conditioner is None else [audio_conditioner.sample_hz])]
        self.crops = CropDataset(items, seconds, wanted_hz, seed)

    def __len__(self) -> int:
        """Number of files."""
        return len(self.crops)

    @property
    def crop_seconds(self) -> float:
        """Longest stretch that a batch shows."""
        longest = max(item.num_samples / item.sample_hz for item in self.crops.items)
        return longest if self.crops.seconds is None else min(float(self.crops.seconds), longest)

    def batch(self, indices: Sequence[tuple[int, int]]) -> _WaveBatch:
        """Waves of (epoch, index) pairs at every rate that is needed."""
        crops = collate_crops([self.crops.get(epoch, index) for epoch, index in indices])
        wanted = [_draws_text(self.seed, epoch, index, self.text_prob) for epoch, index in indices]
        chosen = [number for number, (caption, want) in enumerate(zip(crops.captions, wanted)) if want and caption]
        return _WaveBatch(crops, torch.tensor(chosen, dtype=torch.long), [crops.captions[i] or "" for i in chosen])

    def read(self, batch: _WaveBatch) -> StageInput:
        """Tokenize a batch; its waves condition themselves, apart from those whose caption was drawn."""
        crops = batch.crops
        waves = {kind: crops.waves[rate_hz] for kind, rate_hz in self.rates_hz.items()}
        lengths = {kind: crops.lengths[rate_hz] for kind, rate_hz in self.rates_hz.items()}
        tokens = tokenize(waves, lengths, self.wav2vec, self.codec)
        if self.conditioner is None:
            return StageInput(tokens, crops.ends_file, {})
        wavs, own_lengths = crops.waves[self.conditioner.sample_hz], crops.lengths[self.conditioner.sample_hz]
        if isinstance(self.conditioner, nn.Module):
            self.conditioner.to(wavs.device)
        if not batch.texts:
            return StageInput(tokens, crops.ends_file, {"wavs": wavs, "lengths": own_lengths})
        with torch.autocast(wavs.device.type, enabled=False):
            codes = self.conditioner.codes(wavs=wavs, lengths=own_lengths)
            codes[batch.chosen] = self.conditioner.codes(texts=batch.texts).to(codes.device)
        return StageInput(tokens, crops.ends_file, {"codes": codes})


@dataclass(frozen=True)
class _TokenBatch:
    """Crops of token records, padded on the right."""

    tokens: dict[str, Tensor]
    lengths: dict[str, Tensor]
    ends: Tensor
    latents: Tensor | None
    is_text: Tensor


@dataclass(frozen=True)
class _TokenCrop:
    """One crop of a record: tokens by kind, the latent `[d]` it is conditioned on, and whether the record ends here."""

    tokens: dict[str, Tensor]
    latent: Tensor
    is_text: bool
    ends: bool


class ShardSource:
    """Random aligned crops of token records: every kind of token over the same stretch of time.

    Args:
        shards: Records with `semantic [t]` and `acoustic [f, q]` (as far as the stage needs them); with a conditioner
            also `latents [w, d]` of windows evenly spread over the recording, and for `text_prob` `text_latents [k, d]`
            of its captions (k = 0 where it has none).
        transformer: The stage; its streams say how many tokens a second each kind has.
        seconds: Length of a crop; None = whole records.
        audio_conditioner: Makes codes of the latents.
        text_prob: Probability that a captioned record is conditioned on the codes of one of its captions instead.
        seed: Seed of the crops.

    Raises:
        ValueError: If the records lack a field, a crop would hold no frame, or `text_prob` is no probability or has no
            conditioner.
    """

    @beartype
    def __init__(
        self,
        shards: TokenShards,
        transformer: StageTransformer,
        *,
        seconds: float | int | None,
        audio_conditioner: Conditioner | None,
        text_prob: float | int = 0.0,
        seed: int = 0,
    ) -> None:
        _check_text_prob(text_prob, audio_conditioner)
        needed = {*transformer.kinds, *(() if audio_conditioner is None else ("latents",))}
        if audio_conditioner is not None and text_prob > 0:
            needed.add("text_latents")
        if not needed <= set(shards.fields):
            raise ValueError(f"{shards.folder} holds {sorted(shards.fields)}, the stage needs {sorted(needed)}")
        layout = transformer.layout
        rate_hz = Fraction(layout.predicted[0].rate_hz)
        self.shards, self.conditioner, self.seed, self.text_prob = shards, audio_conditioner, seed, text_prob
        self.rate_hz, self.alignment = rate_hz, layout.frame_alignment
        # Frames of each kind of token per predicted frame.
        self.ratios = {transformer.sources[s.name].kind: Fraction(s.rate_hz) / rate_hz for s in layout.streams}
        self.seconds = seconds
        self.crop_frames: int | None = None
        if seconds is not None:
            self.crop_frames = int(seconds * rate_hz + Fraction(1, 10**6)) // self.alignment * self.alignment
            if self.crop_frames < 1:
                raise ValueError(f"{seconds} s are less than {self.alignment} frames at {float(rate_hz)} Hz")

    def __len__(self) -> int:
        """Number of records."""
        return len(self.shards)

    @property
    def crop_seconds(self) -> float:
        """Longest stretch that a batch shows."""
        kind, ratio = next(iter(self.ratios.items()))
        longest = float(self.shards.longest(kind) / (ratio * self.rate_hz))
        return longest if self.seconds is None else min(float(self.seconds), longest)

    def batch(self, indices: Sequence[tuple[int, int]]) -> _TokenBatch:
        """Crops of (epoch, index) pairs."""
        crops = [self._crop(epoch, index) for epoch, index in indices]
        kinds = list(self.ratios)
        return _TokenBatch(
            tokens={kind: pad_sequence([crop.tokens[kind] for crop in crops], batch_first=True) for kind in kinds},
            lengths={kind: torch.tensor([len(crop.tokens[kind]) for crop in crops]) for kind in kinds},
            ends=torch.tensor([crop.ends for crop in crops]),
            latents=None if self.conditioner is None else torch.stack([crop.latent for crop in crops]),
            is_text=torch.tensor([crop.is_text for crop in crops]),
        )

    def read(self, batch: _TokenBatch) -> StageInput:
        """Tokens as they are; codes from latents."""
        condition: dict[str, Any] = {}
        if self.conditioner is not None and batch.latents is not None:
            if isinstance(self.conditioner, nn.Module):
                self.conditioner.to(batch.latents.device)
            codes = self.conditioner.codes_from_latents(batch.latents)
            if batch.is_text.any():
                codes[batch.is_text] = self.conditioner.codes_from_latents(batch.latents[batch.is_text], "text")
            condition = {"codes": codes}
        return StageInput(AudioTokens(batch.tokens, batch.lengths), batch.ends, condition)

    def _crop(self, epoch: int, index: int) -> _TokenCrop:
        """Cut one record; a pure function of the seed, the epoch and the index."""
        record = self.shards[index]
        # A tokenizer that loses frames at the ends (HuBERT: 49 of 50 a second) shortens what all kinds cover.
        num_frames = min(int(len(record[kind]) / ratio) for kind, ratio in self.ratios.items())
        if num_frames < 1:
            raise ValueError(f"record {index} of {self.shards.folder} holds less than one frame")
        count = num_frames if self.crop_frames is None else min(self.crop_frames, num_frames)
        steps = (num_frames - count) // self.alignment
        start = int(np.random.default_rng([self.seed, epoch, index]).integers(steps + 1)) * self.alignment
        tokens = {
            kind: torch.from_numpy(record[kind][int(start * ratio) : ceil((start + count) * ratio)].astype(np.int64))
            for kind, ratio in self.ratios.items()
        }
        latent, is_text = torch.empty(0), False
        if self.conditioner is not None:
            # The window that lies in the recording as the crop does (both at the beginning, both at the end, ...): so
            # the shorter of the two is always inside the other, however long windows are.
            place = start / (num_frames - count) if num_frames > count else 0.5
            latents = record["latents"]
            chosen = round(place * (len(latents) - 1))
            if _draws_text(self.seed, epoch, index, self.text_prob) and len(record["text_latents"]):
                # captions take turns, as recordings are seen once an epoch
                latents, is_text = record["text_latents"], True
                chosen = epoch % len(latents)
            latent = torch.from_numpy(latents[chosen].astype(np.float32))
        return _TokenCrop(tokens, latent, is_text, start + count == num_frames)


def _check_text_prob(text_prob: float | int, conditioner: Conditioner | None) -> None:
    """Refuse what is no probability, and captions that nothing would read."""
    if not 0 <= text_prob <= 1:
        raise ValueError(f"text_prob is a probability, between 0 and 1; got {text_prob}")
    if text_prob > 0 and conditioner is None:
        raise ValueError(f"text_prob is {text_prob}, but without an audio_conditioner captions are not read")


def _draws_text(seed: int, epoch: int, index: int, probability: float) -> bool:
    """Whether a file is conditioned on its caption in an epoch; a pure function of the numbers."""
    return bool(np.random.default_rng([seed, epoch, index, _TEXT_DRAW]).random() < probability)
