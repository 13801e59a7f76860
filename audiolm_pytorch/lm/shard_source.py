"""Training data of stages from shards: tokens, and what they are conditioned on, that were computed before."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import torch
from beartype import beartype
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.audio.units import frames_inside
from audiolm_pytorch.conditioning.base import Conditioner
from audiolm_pytorch.data.captions import decode_texts
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.lm.wave_source import StageInput, caption_in_turn, check_text_prob, draws_text

__all__ = ["ShardSource"]

# Tokenizers lose or add some frames at the ends of a recording (HuBERT: 49 of 50 a second). More is another rate.
_FRAMES_LOST, _SHARE_LOST = 3, Fraction(1, 10)


@dataclass(frozen=True)
class _TokenBatch:
    """Crops of token records, padded on the right."""

    tokens: dict[str, Tensor]
    lengths: dict[str, Tensor]
    ends: Tensor
    latents: Tensor | None
    is_text: Tensor
    captions: list[str | None] | None


@dataclass(frozen=True)
class _TokenCrop:
    """One crop of a record: tokens by kind, the latent `[d]` and the caption to condition it, whether it ends here."""

    tokens: dict[str, Tensor]
    latent: Tensor
    is_text: bool
    caption: str | None
    ends: bool


class ShardSource:
    """Random aligned crops of token records: every kind of token over the same stretch of time.

    The captions of a record take turns, one an epoch.

    Args:
        shards: Records with `semantic [t]`, `acoustic [f, q]` and extra streams by name (as far as the stage needs
            them; those not in time are taken whole); with a conditioner also `latents [w, d]` of windows evenly spread
            over the recording, and for `text_prob` `text_latents [k, d]` of its captions (k = 0 where it has none); for
            a stage with a `text_dim` `captions` (see `encode_texts`).
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
        check_text_prob(text_prob, audio_conditioner)
        self.uses_captions = transformer.text_dim is not None
        wanted = {
            "latents": audio_conditioner is not None,
            "text_latents": text_prob > 0,
            "captions": self.uses_captions,
        }
        needed = {*transformer.kinds, *(field for field, is_wanted in wanted.items() if is_wanted)}
        if not needed <= set(shards.fields):
            raise ValueError(f"{shards.folder} holds {sorted(shards.fields)}, the stage needs {sorted(needed)}")
        layout = transformer.layout
        rate_hz = layout.predicted[0].exact_hz
        self.shards, self.conditioner, self.seed, self.text_prob = shards, audio_conditioner, seed, text_prob
        self.rate_hz, self.alignment = rate_hz, layout.frame_alignment
        # Frames of each kind of token per predicted frame, and the kinds that are not in time.
        self.ratios = {transformer.sources[s.name].kind: s.exact_hz / rate_hz for s in layout.streams if s.is_in_time}
        self.timeless = [transformer.sources[s.name].kind for s in layout.streams if not s.is_in_time]
        self.seconds = seconds
        self.crop_frames: int | None = None
        if seconds is not None:
            self.crop_frames = frames_inside(seconds, rate_hz) // self.alignment * self.alignment
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

    @property
    def has_captions(self) -> bool:
        """Whether any record has a caption."""
        if "captions" not in self.shards.fields:
            return False
        return any(decode_texts(self.shards[index]["captions"]) for index in range(len(self)))

    def batch(self, indices: Sequence[tuple[int, int]]) -> _TokenBatch:
        """Crops of (epoch, index) pairs."""
        crops = [self._crop(epoch, index) for epoch, index in indices]
        kinds = [*self.ratios, *self.timeless]
        return _TokenBatch(
            tokens={kind: pad_sequence([crop.tokens[kind] for crop in crops], batch_first=True) for kind in kinds},
            lengths={kind: torch.tensor([len(crop.tokens[kind]) for crop in crops]) for kind in kinds},
            ends=torch.tensor([crop.ends for crop in crops]),
            latents=None if self.conditioner is None else torch.stack([crop.latent for crop in crops]),
            is_text=torch.tensor([crop.is_text for crop in crops]),
            captions=[crop.caption for crop in crops] if self.uses_captions else None,
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
        return StageInput(AudioTokens(batch.tokens, batch.lengths), batch.ends, condition, batch.captions)

    def _crop(self, epoch: int, index: int) -> _TokenCrop:
        """Cut one record; a pure function of the seed, the epoch and the index."""
        record = self.shards[index]
        num_frames = self._num_frames(record, index)
        count = num_frames if self.crop_frames is None else min(self.crop_frames, num_frames)
        steps = (num_frames - count) // self.alignment
        start = int(np.random.default_rng([self.seed, epoch, index]).integers(steps + 1)) * self.alignment
        spans = {
            kind: slice(int(start * ratio), ceil((start + count) * ratio)) for kind, ratio in self.ratios.items()
        } | dict.fromkeys(self.timeless, slice(None))
        tokens = {kind: torch.from_numpy(record[kind][span].astype(np.int64)) for kind, span in spans.items()}
        latent, is_text = torch.empty(0), False
        if self.conditioner is not None:
            # The window that lies in the recording as the crop does (both at the beginning, both at the end, ...): so
            # the shorter of the two is always inside the other, however long windows are.
            place = start / (num_frames - count) if num_frames > count else 0.5
            latents = record["latents"]
            chosen = round(place * (len(latents) - 1))
            if draws_text(self.seed, epoch, index, self.text_prob) and len(record["text_latents"]):
                latents, is_text = record["text_latents"], True
                chosen = epoch % len(latents)  # in turns, in step with the captions
            latent = torch.from_numpy(latents[chosen].astype(np.float32))
        caption = caption_in_turn(decode_texts(record["captions"]), epoch) if self.uses_captions else None
        return _TokenCrop(tokens, latent, is_text, caption, start + count == num_frames)

    def _num_frames(self, record: dict[str, np.ndarray], index: int) -> int:
        """Predicted frames that all kinds of tokens cover."""
        covered = {kind: len(record[kind]) / ratio for kind, ratio in self.ratios.items()}
        shortest, longest = min(covered.values()), max(covered.values())
        if shortest < 1:
            raise ValueError(f"record {index} of {self.shards.folder} holds less than one frame")
        lost = max(_FRAMES_LOST * max(Fraction(1), 1 / ratio) for ratio in self.ratios.values())
        if longest - shortest > lost + _SHARE_LOST * longest:
            seconds = {kind: round(float(frames / self.rate_hz), 2) for kind, frames in covered.items()}
            rates_hz = {kind: float(ratio * self.rate_hz) for kind, ratio in self.ratios.items()}
            raise ValueError(
                f"record {index} of {self.shards.folder}: at the rates that the stage declares, {rates_hz} tokens a "
                f"second, its tokens last {seconds} s: build the stage with the rates of their tokenizers"
            )
        return int(shortest)
