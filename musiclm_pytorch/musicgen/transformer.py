"""The language model of MusicGen: one stage that predicts all levels of a codec."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

import torch

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import Conditions, ConditionTensor
from audiolm_pytorch.conditioning.fuser import ConditionSpec
from audiolm_pytorch.lm.stage_transformer import StageTransformer, TokenSource
from audiolm_pytorch.nn.module_state import check_positive, check_shares
from audiolm_pytorch.nn.transformer import FusedConditions
from audiolm_pytorch.saving.modules import register
from audiolm_pytorch.tokens.streams import Stream, exact_rate
from musiclm_pytorch.musicgen.chroma import ChromaConditioner

__all__ = ["MusicGenTransformer"]

_OWN = ("text", "melody")  # conditions with arguments of their own


@register
class MusicGenTransformer(StageTransformer):
    """Language model that predicts all codec levels with a delay of one row per level (arXiv:2306.05284, sec. 2).

    The blocks have layer norms with biases, and projections without biases. Positions are sinusoidal. Every level has a
    special token in all cells without a code. Texts enter by cross-attention. In published models with a melody, the
    melody and the texts are a prefix instead.

    Args:
        codebook_size: Number of codes of every level.
        num_codebooks: Number of codes per frame, over all levels and channels.
        num_groups: Number of codes that have the same delay; 2 for stereo with interleaved codes of both channels.
        rate_hz: Frames per second.
        text_dim: Width of the states of the text encoder; None = no texts.
        melody_frames: Number of frames of the melody, see `ChromaConditioner`; None = no melody.
        melody_way: `prepend` as in the published models; or `sum`, which adds the frame of a melody to the tokens of
            the same time. A small model that was trained for 3,000 steps ignored a prefix, and followed the sum.
        melody_drop_prob: Probability that training drops only the melody of an item.
        text_drop_prob: Probability that training of a model with a melody drops only the text of an item, so that a
            melody without a text is also a condition.
        cond_drop_prob: Probability that training drops all conditions of an item.
        max_seconds: Longest duration that the model was trained on; longer audio is generated in windows.
        conditions: Further conditions by name, see `TokenTransformer`.
        token_fingerprints: See `StageTransformer`.
        checkpoint_blocks: See `Transformer`.
    """

    namespace = "musicgen"

    @typed
    def __init__(
        self,
        *,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        dim_head: int = 64,
        ff_mult: float = 4,
        dropout: float = 0.0,
        codebook_size: int = 2048,
        num_codebooks: int = 4,
        num_groups: int = 1,
        rate_hz: float | str | Fraction = 50,
        text_dim: int | None = 768,
        melody_frames: int | None = None,
        melody_way: Literal["prepend", "sum"] = "prepend",
        melody_drop_prob: float = 0.5,
        text_drop_prob: float = 0.1,
        cond_drop_prob: float = 0.3,
        max_seconds: float | None = 30,
        conditions: Mapping[str, ConditionSpec | Mapping[str, Any]] | None = None,
        token_fingerprints: Mapping[str, str] | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        check_positive(codebook_size=codebook_size, num_codebooks=num_codebooks, text_dim=text_dim)
        check_positive(melody_frames=melody_frames)
        check_shares(melody_drop_prob=melody_drop_prob, text_drop_prob=text_drop_prob)
        further = dict(conditions or {})
        has_prefix = melody_frames is not None and melody_way == "prepend"
        if text_dim is not None:
            text = _text_condition(text_dim, has_prefix, text_drop_prob if melody_frames is not None else 0.0)
            further = {"text": text, **further}
        if melody_frames is not None:  # the last prefix condition is the first in the sequence
            width, drop_prob = ChromaConditioner.num_classes, melody_drop_prob
            further["melody"] = (
                ConditionSpec(width, null="first", null_tokens=melody_frames, drop_prob=drop_prob, projection="linear")
                if has_prefix
                else ConditionSpec(width, "sum", drop_prob=drop_prob, projection="linear")
            )
        stream = Stream(
            "acoustic", codebook_size, num_codebooks, exact_rate(rate_hz), num_groups=num_groups, filler=True
        )
        super().__init__(
            sources={"acoustic": TokenSource("acoustic", 0, num_codebooks)},
            config={},
            streams=[stream],
            pattern="delayed",
            dim=dim,
            depth=depth,
            heads=heads,
            dim_head=dim_head,
            ff_mult=ff_mult,
            dropout=dropout,
            text_dim=text_dim,
            cond_drop_prob=cond_drop_prob,
            max_seconds=max_seconds,
            conditions=further,
            token_fingerprints=token_fingerprints,
            checkpoint_blocks=checkpoint_blocks,
            norm="layer",
            feed_forward="gelu",
            positions="sinusoidal",
        )
        sizes = {"dim": dim, "depth": depth, "heads": heads, "dim_head": dim_head, "ff_mult": ff_mult}
        codes = {"codebook_size": codebook_size, "num_codebooks": num_codebooks, "num_groups": num_groups}
        self.melody_frames, self.melody_way = melody_frames, melody_way
        self._config: dict[str, Any] = {
            **{**sizes, **codes, "rate_hz": str(rate_hz), "dropout": dropout, "text_dim": text_dim},
            **{"melody_frames": melody_frames, "melody_way": melody_way},
            **{"melody_drop_prob": melody_drop_prob, "text_drop_prob": text_drop_prob},
            "cond_drop_prob": cond_drop_prob,
            "checkpoint_blocks": checkpoint_blocks,
            "conditions": {name: spec.to_dict() for name, spec in self.fuser.specs.items() if name not in _OWN},
        }
        self._keep_config()

    def fuse(self, conditions: Conditions | None, batch: int) -> FusedConditions:
        """Project conditions; a melody that is added to the tokens is first spread over their frames."""
        melody = None if conditions is None else conditions.get("melody")
        if conditions is None or melody is None or self.melody_way == "prepend" or len(melody.mask[0]) == 1:
            return super().fuse(conditions, batch)
        num_rows, chroma = melody.mask.shape[1], ChromaConditioner(melody.mask.shape[1])
        melody_hz, rate_hz = chroma.sample_hz / chroma.hop_samples, float(self.layout.predicted[0].exact_hz)
        frames = torch.arange(int(num_rows * rate_hz / melody_hz), device=melody.mask.device)
        rows = (frames * melody_hz / rate_hz).round().long().clamp(max=num_rows - 1)
        spread = ConditionTensor(melody.embeddings[:, rows], melody.mask[:, rows])
        return super().fuse({**conditions, "melody": spread}, batch)


def _text_condition(text_dim: int, is_prefix: bool, drop_prob: float) -> ConditionSpec:
    """Return the text condition: before the tokens together with a melody, else by cross-attention."""
    if is_prefix:
        return ConditionSpec(
            text_dim, "prepend", null="zero", null_tokens="all", drop_prob=drop_prob, projection="linear"
        )
    return ConditionSpec(text_dim, "cross", null="zero", drop_prob=drop_prob, projection="linear")
