"""Training data of the AudioLM stages, from audio files (tokenized during training) or from shards of stored tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.audio.units import frames_inside
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditioner, ConditionTensor
from audiolm_pytorch.data.batches import CropBatch, collate_crops
from audiolm_pytorch.data.captions import decode_texts, tags_in
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.items import AudioItem, items_digest
from audiolm_pytorch.data.manifest import captions_of
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.lm.tokenizing import sample_rates, tokenize
from audiolm_pytorch.nn.module_state import check_shares
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.training.distributed import to_device

__all__ = ["ShardSource", "StageInput", "StageSource", "TextFunction", "WaveFunction", "WaveSource"]

# Added to the seed, so that the random numbers for captions, words and mixtures differ from those for crops.
_TEXT_DRAW, _WORD_DRAW, _MIX_DRAW = 1, 2, 3
# A tokenizer loses or adds a few frames at the ends of a recording (HuBERT has 49 per second instead of 50).
_LOST_FRAMES, _LOST_SHARE = 3, Fraction(1, 10)


@dataclass(frozen=True)
class StageInput:
    """Inputs of a stage for one training batch.

    Attributes:
        ends: Mask `[b]` of the items whose crop reaches the end of the file.
        condition: Arguments for `Conditioner.conditioning` (`wavs` and `lengths`, or `codes`); empty without a
            conditioner.
        texts: Caption of every item, or None for an item without a caption; `texts` is None for a stage without a
            `text_dim`.
        conditions: Further conditions of the stage, by condition name.
    """

    tokens: AudioTokens
    ends: Tensor
    condition: dict[str, Any]
    texts: list[str | None] | None = None
    conditions: dict[str, ConditionTensor] = field(default_factory=dict)


# Changes the caption of a recording (or None) for an epoch; the texts are its tags, see `tags_in`.
TextFunction = Callable[[str | None, Sequence[str], np.random.Generator], str | None]


class StageSource(ABC):
    """Base class of the training data of a stage. Each epoch uses the next caption of a recording.

    Args:
        text_prob: Probability that the conditioning codes of a recording are computed from its caption instead of its
            audio.
        seed: Seed of the random crops, of the random choice between caption and audio, and of augmentations.
        augment_text: Augmentation of the caption of a recording; None = captions do not change.
    """

    def __init__(
        self,
        transformer: StageTransformer,
        audio_conditioner: Conditioner | None,
        text_prob: float,
        seed: int,
        augment_text: TextFunction | None = None,
    ) -> None:
        check_shares(text_prob=text_prob)
        if text_prob > 0 and audio_conditioner is None:
            raise ValueError(
                f"text_prob={text_prob} needs an audio_conditioner; pass an audio_conditioner, or set text_prob=0"
            )
        self.conditioner, self.text_prob, self.seed = audio_conditioner, text_prob, seed
        self.augment_text = augment_text
        self.uses_captions = transformer.text_dim is not None
        self.conditions: tuple[str, ...] = ()  # further conditions of the stage that the recordings have

    @abstractmethod
    def __len__(self) -> int:
        """Number of recordings."""

    @property
    @abstractmethod
    def crop_seconds(self) -> float:
        """Length of the longest training crop in seconds."""

    @property
    @abstractmethod
    def has_captions(self) -> bool:
        """Whether any recording has a caption."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Hash of the recordings, which must not change when a run is resumed."""

    @abstractmethod
    def batch(self, indices: Sequence[tuple[int, int]]) -> Any:
        """Return one crop on the CPU for each pair (epoch, recording index). Equal seeds lead to equal crops."""

    @abstractmethod
    def read(self, batch: Any) -> StageInput:
        """Compute the inputs of the stage from a batch of crops, on the device of the batch."""

    def draws_text(self, epoch: int, index: int) -> bool:
        """Draw for an epoch whether the codes of a recording are computed from its caption (True) or audio (False)."""
        draw = np.random.default_rng([self.seed, epoch, index, _TEXT_DRAW]).random()
        return bool(draw < self.text_prob)

    def caption(self, captions: Sequence[str], tags: Sequence[str], epoch: int, index: int) -> str | None:
        """Select and augment the caption of a recording for an epoch; None if the recording has no caption."""
        caption = captions[epoch % len(captions)] if captions else None
        if self.augment_text is None:
            return caption
        return self.augment_text(caption, tags, np.random.default_rng([self.seed, epoch, index, _WORD_DRAW]))


@dataclass(frozen=True)
class WaveBatch:
    """Crops of audio files with captions and labels; the input of functions that compute further conditions.

    Attributes:
        crops: Waves and lengths of the crops by sample rate in Hz.
        captions: Caption of every item for this epoch; None for an item without captions.
        captioned: Indices `[k]` of the items whose conditioning codes are computed from the caption.
    """

    crops: CropBatch
    captions: list[str | None]
    labels: list[dict[str, Any]]
    captioned: Tensor


ConditionFunction = Callable[[WaveBatch], Tensor | ConditionTensor]
WaveFunction = Callable[[WaveBatch, np.random.Generator], WaveBatch]


class WaveSource(StageSource):
    """Random crops of audio files, which are tokenized during training. Crops end without look-ahead tokens.

    Args:
        seconds: Length of a crop in seconds; None = crops are whole files.
        conditioners: Functions that compute the embeddings `[b, d]` or `[b, m, d]` of a further condition from a
            `WaveBatch`, by condition name; an optional attribute `sample_hz` of a function is the sample rate of its
            input waves.
        augment_waves: Augmentation of the waves and captions of a batch; None = no augmentation.
    """

    @typed
    def __init__(
        self,
        items: Sequence[AudioItem],
        transformer: StageTransformer,
        *,
        seconds: float | None,
        wav2vec: SemanticTokenizer | None,
        codec: Codec | None,
        audio_conditioner: Conditioner | None,
        conditioners: Mapping[str, ConditionFunction] | None = None,
        text_prob: float = 0.0,
        seed: int = 0,
        augment_text: TextFunction | None = None,
        augment_waves: WaveFunction | None = None,
    ) -> None:
        super().__init__(transformer, audio_conditioner, text_prob, seed, augment_text)
        self.augment_waves = augment_waves
        self.wav2vec, self.codec = wav2vec, codec
        self.rates_hz = sample_rates(transformer.kinds, wav2vec, codec)
        self.conditioners = dict(conditioners or {})
        self.conditions = tuple(self.conditioners)
        if not set(self.conditioners) <= set(transformer.further_conditions):
            raise ValueError(
                f"the {transformer.namespace} transformer has the conditions {sorted(transformer.further_conditions)}, "
                f"but got conditioners of {sorted(self.conditioners)}; pass only conditioners of its conditions"
            )
        rates_hz = (getattr(one, "sample_hz", None) for one in (audio_conditioner, *self.conditioners.values()))
        conditioners_hz = [rate_hz for rate_hz in rates_hz if rate_hz is not None]
        channels = 1 if codec is None else codec.channels
        self.crops = CropDataset(items, seconds, [*self.rates_hz.values(), *conditioners_hz], seed, channels=channels)
        self.captions = [captions_of(item) for item in items]
        self.tags = [tags_in(item.labels) if augment_text is not None else [] for item in items]

    def __len__(self) -> int:
        """Number of files."""
        return len(self.crops)

    @property
    def crop_seconds(self) -> float:
        """Length of the longest training crop in seconds."""
        longest = max(item.num_samples / item.sample_hz for item in self.crops.items)
        return longest if self.crops.seconds is None else min(float(self.crops.seconds), longest)

    @property
    def has_captions(self) -> bool:
        """Whether any file has a caption."""
        return any(self.captions)

    @property
    def digest(self) -> str:
        """Hash of names, lengths and contents of the files."""
        return items_digest(self.crops.items)

    def batch(self, indices: Sequence[tuple[int, int]]) -> WaveBatch:
        """Return one crop for each pair (epoch, file index), at the rates of the tokenizers and conditioners."""
        crops = collate_crops([self.crops.get(epoch, index) for epoch, index in indices])
        captions = [self.caption(self.captions[index], self.tags[index], epoch, index) for epoch, index in indices]
        labels = [self.crops.items[index].labels for _, index in indices]
        pairs = enumerate(indices)
        captioned = [number for number, pair in pairs if captions[number] is not None and self.draws_text(*pair)]
        batch = WaveBatch(crops, captions, labels, torch.tensor(captioned, dtype=torch.long))
        rng = np.random.default_rng([self.seed, *indices[0], _MIX_DRAW])
        return batch if self.augment_waves is None else self.augment_waves(batch, rng)

    def read(self, batch: WaveBatch) -> StageInput:
        """Compute the tokens and the conditions of a batch of crops."""
        crops = batch.crops
        waves = {kind: crops.waves[rate_hz] for kind, rate_hz in self.rates_hz.items()}
        lengths = {kind: crops.lengths[rate_hz] for kind, rate_hz in self.rates_hz.items()}
        tokens = tokenize(waves, lengths, self.wav2vec, self.codec)
        texts = batch.captions if self.uses_captions else None
        device = crops.ends_file.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            conditions = {
                name: ConditionTensor.of(to_device(conditioner, device)(batch))
                for name, conditioner in self.conditioners.items()
            }
        return StageInput(tokens, crops.ends_file, self._condition(batch), texts, conditions)

    def _condition(self, batch: WaveBatch) -> dict[str, Any]:
        """Return the arguments of the conditioner: waves, or codes if some items use the codes of their caption."""
        if self.conditioner is None:
            return {}
        sample_hz = self.conditioner.sample_hz
        wavs = batch.crops.waves[sample_hz]
        wavs = wavs if wavs.ndim == 2 else wavs.mean(dim=1)
        inputs: dict[str, Any] = {"wavs": wavs, "lengths": batch.crops.lengths[sample_hz]}
        self.conditioner.to(wavs.device)
        if not len(batch.captioned):
            return inputs
        texts = [caption for number in batch.captioned.tolist() if (caption := batch.captions[number]) is not None]
        with torch.autocast(wavs.device.type, enabled=False):
            codes = self.conditioner.codes(**inputs)
            codes[batch.captioned] = self.conditioner.codes(texts=texts).to(codes.device)
        return {"codes": codes}


@dataclass(frozen=True)
class _TokenBatch:
    """Batch of crops of stored token sequences, padded on the right."""

    tokens: dict[str, Tensor]
    lengths: dict[str, Tensor]
    ends: Tensor
    latents: Tensor | None
    is_text: Tensor
    captions: list[str | None] | None
    conditions: dict[str, ConditionTensor]


@dataclass(frozen=True)
class _TokenCrop:
    """Crop of a stored token sequence. `latent [d]` is computed from the caption if `is_text`, else from the audio."""

    tokens: dict[str, Tensor]
    latent: Tensor
    is_text: bool
    caption: str | None
    ends: bool
    conditions: dict[str, Tensor]


class ShardSource(StageSource):
    """Random crops of token sequences that are stored in shards.

    Shards need fields with the tokens of the stage: `semantic [t]`, `acoustic [f, q]`, extra streams by name. For a
    conditioner, shards need the field `latents [w, d]` of w windows at equal distances; for `text_prob > 0`,
    `text_latents [k, d]` of k captions; for a `text_dim`, `captions` (see `encode_texts`); for a further condition,
    a field with its name, `[d]` or `[embeddings, d]`; without it, no item has the condition. `augment_text`
    receives the texts in the field `tags`, if there is one. Extra streams without a rate are not cropped.

    Args:
        seconds: Length of a crop in seconds; None = crops are whole recordings.
    """

    @typed
    def __init__(
        self,
        shards: TokenShards,
        transformer: StageTransformer,
        *,
        seconds: float | None,
        audio_conditioner: Conditioner | None,
        text_prob: float = 0.0,
        seed: int = 0,
        augment_text: TextFunction | None = None,
    ) -> None:
        super().__init__(transformer, audio_conditioner, text_prob, seed, augment_text)
        optional = {
            "latents": audio_conditioner is not None,
            "text_latents": text_prob > 0,
            "captions": self.uses_captions,
        }
        specs = {name: transformer.fuser.specs[name] for name in transformer.further_conditions}
        self.ways = {name: spec.way for name, spec in specs.items() if name in shards.fields}
        self.conditions = tuple(self.ways)
        needed = {*transformer.kinds, *(field for field, is_needed in optional.items() if is_needed)}
        if not needed <= set(shards.fields):
            raise ValueError(f"{shards.folder} has fields {sorted(shards.fields)}, the stage needs {sorted(needed)}")
        layout = transformer.layout
        self.shards, self.seconds = shards, seconds
        self.texts = {"captions", "tags"} & set(shards.fields) if self.uses_captions else set()
        self.rate_hz, self.alignment = layout.predicted[0].exact_hz, layout.frame_alignment
        kinds = {stream: transformer.sources[stream.name].kind for stream in layout.streams}
        # By kind: frames per predicted frame.
        self.ratios = {kind: stream.exact_hz / self.rate_hz for stream, kind in kinds.items() if stream.is_in_time}
        self.timeless = [kind for stream, kind in kinds.items() if not stream.is_in_time]
        # Crops contain the look-ahead tokens after their end, except for levels of a codec that is also predicted.
        predicted = {kinds[stream] for stream in layout.predicted}
        self.lookahead = {kind: 0 if kind in predicted else stream.lookahead_frames for stream, kind in kinds.items()}
        self.crop_frames: int | None = None
        if seconds is not None:
            self.crop_frames = frames_inside(seconds, self.rate_hz) // self.alignment * self.alignment
            if self.crop_frames < 1:
                raise ValueError(
                    f"got crops of {seconds} s, but a crop needs at least {self.alignment} frames at "
                    f"{float(self.rate_hz)} frames per second; use longer crops"
                )

    def __len__(self) -> int:
        """Number of records."""
        return len(self.shards)

    @property
    def crop_seconds(self) -> float:
        """Length of the longest training crop in seconds."""
        kind, ratio = next(iter(self.ratios.items()))
        longest = float(self.shards.longest(kind) / (ratio * self.rate_hz))
        return longest if self.seconds is None else min(float(self.seconds), longest)

    @property
    def has_captions(self) -> bool:
        """Whether any recording in the shards has a caption."""
        if self.text_prob > 0 and not self.uses_captions:
            return self.shards.longest("text_latents") > 0
        records = range(len(self)) if "captions" in self.shards.fields else ()
        return any(decode_texts(self.shards[index]["captions"]) for index in records)

    @property
    def digest(self) -> str:
        """Hash of the stored tokens."""
        return self.shards.digest

    def batch(self, indices: Sequence[tuple[int, int]]) -> _TokenBatch:
        """Return one crop for each pair (epoch, record index)."""
        crops = [self._crop(epoch, index) for epoch, index in indices]
        kinds = [*self.ratios, *self.timeless]
        return _TokenBatch(
            tokens={kind: pad_sequence([crop.tokens[kind] for crop in crops], batch_first=True) for kind in kinds},
            lengths={kind: torch.tensor([len(crop.tokens[kind]) for crop in crops]) for kind in kinds},
            ends=torch.tensor([crop.ends for crop in crops]),
            latents=None if self.conditioner is None else torch.stack([crop.latent for crop in crops]),
            is_text=torch.tensor([crop.is_text for crop in crops]),
            captions=[crop.caption for crop in crops] if self.uses_captions else None,
            conditions={name: ConditionTensor.padded([crop.conditions[name] for crop in crops]) for name in self.ways},
        )

    def read(self, batch: _TokenBatch) -> StageInput:
        """Return the tokens of a batch, and the conditioning codes computed from its latents."""
        condition: dict[str, Any] = {}
        if self.conditioner is not None and batch.latents is not None:
            self.conditioner.to(batch.latents.device)
            codes = self.conditioner.codes_from_latents(batch.latents)
            if batch.is_text.any():
                codes[batch.is_text] = self.conditioner.codes_from_latents(batch.latents[batch.is_text], "text")
            condition = {"codes": codes}
        tokens = AudioTokens(batch.tokens, batch.lengths)
        return StageInput(tokens, batch.ends, condition, batch.captions, batch.conditions)

    def _crop(self, epoch: int, index: int) -> _TokenCrop:
        """Cut a random crop out of one stored token sequence."""
        record = self.shards[index]
        num_frames = self._num_frames(record, index)
        count = num_frames if self.crop_frames is None else min(self.crop_frames, num_frames)
        num_starts = (num_frames - count) // self.alignment + 1
        start = int(np.random.default_rng([self.seed, epoch, index]).integers(num_starts)) * self.alignment
        spans = {
            kind: slice(int(start * ratio), ceil((start + count) * ratio) + self.lookahead[kind])
            for kind, ratio in self.ratios.items()
        }
        spans |= dict.fromkeys(self.timeless, slice(None))
        tokens = {kind: torch.from_numpy(record[kind][span].astype(np.int64)) for kind, span in spans.items()}
        latent, is_text = torch.empty(0), False
        if self.conditioner is not None:
            is_text = self.draws_text(epoch, index) and len(record["text_latents"]) > 0
            if is_text:
                latents = record["text_latents"]
                number = epoch % len(latents)  # the latent of the current caption
            else:
                # The window at the same relative position as the crop, so that the shorter lies inside the longer.
                latents = record["latents"]
                position = start / (num_frames - count) if num_frames > count else 0.5
                number = round(position * (len(latents) - 1))
            latent = torch.from_numpy(latents[number].astype(np.float32))
        captions, tags = (decode_texts(record[name]) if name in self.texts else [] for name in ("captions", "tags"))
        caption = self.caption(captions, tags, epoch, index)
        conditions: dict[str, Tensor] = {}
        for name, way in self.ways.items():
            embeddings = torch.from_numpy(np.atleast_2d(record[name]).astype(np.float32))
            is_per_frame = way == "sum" and len(embeddings) > 1
            conditions[name] = embeddings[start : start + count] if is_per_frame else embeddings
        return _TokenCrop(tokens, latent, is_text, caption, start + count == num_frames, conditions)

    def _num_frames(self, record: dict[str, np.ndarray], index: int) -> int:
        """Return the number of frames of the predicted stream for which all streams of the stage have tokens."""
        covered = {kind: len(record[kind]) / ratio for kind, ratio in self.ratios.items()}
        shortest, longest = min(covered.values()), max(covered.values())
        if shortest < 1:
            raise ValueError(f"record {index} of {self.shards.folder} is shorter than one frame; remove the record")
        lost = max(_LOST_FRAMES * max(Fraction(1), 1 / ratio) for ratio in self.ratios.values())
        if longest - shortest > lost + _LOST_SHARE * longest:
            durations_seconds = {kind: round(float(frames / self.rate_hz), 2) for kind, frames in covered.items()}
            rates_hz = {kind: float(ratio * self.rate_hz) for kind, ratio in self.ratios.items()}
            raise ValueError(
                f"the tokens of record {index} of {self.shards.folder} have different durations {durations_seconds} at "
                f"the rates of the stage {rates_hz}; build the stage with the rates of the tokenizers"
            )
        return int(shortest)
