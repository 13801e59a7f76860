"""Where stages get training data from, and the first such source: audio files, tokenized on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditioner
from audiolm_pytorch.data.batches import CropBatch, collate_crops
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import AudioItem, captions_of
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.lm.tokenizing import sample_rates, tokenize
from audiolm_pytorch.semantic.base import SemanticTokenizer

__all__ = ["StageInput", "StageSource", "WaveSource", "caption_in_turn", "check_text_prob", "draws_text"]

# Tells the draw of texts from that of crops, which has the same seed, epoch and index.
_TEXT_DRAW = 1


@dataclass(frozen=True)
class StageInput:
    """One batch of a stage.

    Attributes:
        tokens: Tokens of the crops.
        ends: `[b]` bool, whether the file really ends with the crop.
        condition: Arguments for the conditioner: `wavs` and `lengths`, or `codes`; empty without a conditioner.
        texts: Caption of every item, None where it has none; None for a stage that hears no texts.
    """

    tokens: AudioTokens
    ends: Tensor
    condition: dict[str, Any]
    texts: list[str | None] | None = None


@runtime_checkable
class StageSource(Protocol):
    """Training data of a stage."""

    def __len__(self) -> int:
        """Number of recordings."""

    @property
    def crop_seconds(self) -> float:
        """Longest stretch that a batch shows: a crop, or the longest recording where that is shorter."""

    @property
    def has_captions(self) -> bool:
        """Whether any recording has a caption."""

    def batch(self, indices: Sequence[tuple[int, int]]) -> Any:
        """Crops of (epoch, index) pairs, as tensors on the CPU; a pure function of them."""

    def read(self, batch: Any) -> StageInput:
        """Tokens and conditions of a batch, on the device it is on."""


@dataclass(frozen=True)
class _WaveBatch:
    """Crops of files, the caption of each whose turn it is, and which `[k]` take its codes instead of their own."""

    crops: CropBatch
    captions: list[str | None]
    chosen: Tensor


class WaveSource:
    """Crops of audio files, tokenized when they are needed.

    The captions of a file take turns, one an epoch.

    Args:
        items: The files.
        transformer: The stage; one with a `text_dim` is given their captions.
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
        check_text_prob(text_prob, audio_conditioner)
        self.wav2vec, self.codec, self.conditioner = wav2vec, codec, audio_conditioner
        self.text_prob, self.seed = text_prob, seed
        self.rates_hz = sample_rates(transformer.kinds, wav2vec, codec)
        wanted_hz = [*self.rates_hz.values(), *([] if audio_conditioner is None else [audio_conditioner.sample_hz])]
        self.crops = CropDataset(items, seconds, wanted_hz, seed)
        self.uses_captions = transformer.text_dim is not None
        self.captions = [captions_of(item) for item in items]

    def __len__(self) -> int:
        """Number of files."""
        return len(self.crops)

    @property
    def crop_seconds(self) -> float:
        """Longest stretch that a batch shows."""
        longest = max(item.num_samples / item.sample_hz for item in self.crops.items)
        return longest if self.crops.seconds is None else min(float(self.crops.seconds), longest)

    @property
    def has_captions(self) -> bool:
        """Whether any file has a caption."""
        return any(self.captions)

    def batch(self, indices: Sequence[tuple[int, int]]) -> _WaveBatch:
        """Waves of (epoch, index) pairs at every rate that is needed."""
        crops = collate_crops([self.crops.get(epoch, index) for epoch, index in indices])
        captions = [caption_in_turn(self.captions[index], epoch) for epoch, index in indices]
        wanted = [draws_text(self.seed, epoch, index, self.text_prob) for epoch, index in indices]
        chosen = [
            number for number, (caption, want) in enumerate(zip(captions, wanted)) if want and caption is not None
        ]
        return _WaveBatch(crops, captions, torch.tensor(chosen, dtype=torch.long))

    def read(self, batch: _WaveBatch) -> StageInput:
        """Tokenize a batch; its waves condition themselves, apart from those whose caption was drawn."""
        crops = batch.crops
        waves = {kind: crops.waves[rate_hz] for kind, rate_hz in self.rates_hz.items()}
        lengths = {kind: crops.lengths[rate_hz] for kind, rate_hz in self.rates_hz.items()}
        tokens = tokenize(waves, lengths, self.wav2vec, self.codec)
        return StageInput(
            tokens, crops.ends_file, self._condition(batch), batch.captions if self.uses_captions else None
        )

    def _condition(self, batch: _WaveBatch) -> dict[str, Any]:
        """Arguments for the conditioner, on whose device the waves are."""
        if self.conditioner is None:
            return {}
        sample_hz = self.conditioner.sample_hz
        heard: dict[str, Any] = {"wavs": batch.crops.waves[sample_hz], "lengths": batch.crops.lengths[sample_hz]}
        if isinstance(self.conditioner, nn.Module):
            self.conditioner.to(heard["wavs"].device)
        if not len(batch.chosen):
            return heard
        texts = [caption for number in batch.chosen.tolist() if (caption := batch.captions[number]) is not None]
        with torch.autocast(heard["wavs"].device.type, enabled=False):
            codes = self.conditioner.codes(**heard)
            codes[batch.chosen] = self.conditioner.codes(texts=texts).to(codes.device)
        return {"codes": codes}


def check_text_prob(text_prob: float | int, conditioner: Conditioner | None) -> None:
    """Refuse what is no probability, and captions that nothing would read."""
    if not 0 <= text_prob <= 1:
        raise ValueError(f"text_prob is a probability, between 0 and 1; got {text_prob}")
    if text_prob > 0 and conditioner is None:
        raise ValueError(f"text_prob is {text_prob}, but without an audio_conditioner no codes of captions are made")


def draws_text(seed: int, epoch: int, index: int, probability: float) -> bool:
    """Whether a file is conditioned on its caption in an epoch; a pure function of the numbers."""
    return bool(np.random.default_rng([seed, epoch, index, _TEXT_DRAW]).random() < probability)


def caption_in_turn(captions: Sequence[str], epoch: int) -> str | None:
    """Caption of a recording in an epoch: they take turns, as it is seen once an epoch; None if it has none."""
    return captions[epoch % len(captions)] if captions else None
