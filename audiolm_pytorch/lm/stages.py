"""The three stages of AudioLM as declarations: which streams each reads and predicts, and where their tokens come from.

Semantic, coarse acoustic and fine acoustic modelling as in AudioLM (arXiv:2209.03143, sec. III-C), conditioned as in
MusicLM (arXiv:2301.11325, sec. 3.2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from beartype import beartype

from audiolm_pytorch.lm.stage_transformer import StageTransformer, TokenSource
from audiolm_pytorch.saving.modules import register
from audiolm_pytorch.tokens.streams import Stream

__all__ = ["CoarseTransformer", "FineTransformer", "SemanticTransformer"]


@register
class SemanticTransformer(StageTransformer):
    """First stage: semantic tokens.

    Args:
        num_semantic_tokens: Vocabulary of the semantic tokenizer.
        dim: Width d.
        depth: Number of blocks.
        rate_hz: Semantic tokens per second.
        eos: Whether the model learns where files end.
        pattern: `flat`, `delayed` or `parallel`: differ where extra streams in time are to be aligned.
        extra_streams: Further given streams, see `StageTransformer`.
        audio_text_condition: Whether the model takes a condition.
        cond_dim: Width of the condition; None = `dim`.
        **stack: Further arguments of `TokenTransformer`: heads, dim_head, ff_mult, dropout, cond_drop_prob, ...
    """

    namespace = "semantic"

    @beartype
    def __init__(
        self,
        *,
        num_semantic_tokens: int,
        dim: int,
        depth: int,
        rate_hz: int | str | Fraction = 25,
        eos: bool = True,
        pattern: str = "flat",
        extra_streams: Sequence[Stream | Mapping[str, Any]] = (),
        audio_text_condition: bool = False,
        cond_dim: int | None = None,
        **stack: Any,
    ) -> None:
        super().__init__(
            sources={"semantic": TokenSource("semantic", 0, 1)},
            config={"num_semantic_tokens": num_semantic_tokens, "rate_hz": str(rate_hz), "eos": eos},
            streams=[Stream("semantic", num_semantic_tokens, rate_hz=Fraction(rate_hz), eos=eos)],
            pattern=pattern,
            extra_streams=extra_streams,
            audio_text_condition=audio_text_condition,
            cond_dim=cond_dim,
            dim=dim,
            depth=depth,
            **stack,
        )


@register
class CoarseTransformer(StageTransformer):
    """Second stage: the first levels of the acoustic tokens, given the semantic tokens.

    Args:
        num_semantic_tokens: Vocabulary of the semantic tokenizer.
        codebook_size: Vocabulary of every acoustic level.
        num_coarse_quantizers: Levels predicted, all groups counted.
        dim: Width d.
        depth: Number of blocks.
        pattern: `delayed`, `parallel` or `flat` (the paper's: the whole semantic sequence first).
        semantic_rate_hz: Semantic tokens per second.
        rate_hz: Acoustic frames per second.
        num_groups: Codes of one residual level of the codec.
        extra_streams: Further given streams, see `StageTransformer`.
        audio_text_condition: Whether the model takes a condition.
        cond_dim: Width of the condition; None = `dim`.
        **stack: Further arguments of `TokenTransformer`: heads, dim_head, ff_mult, dropout, cond_drop_prob, ...
    """

    namespace = "coarse"

    @beartype
    def __init__(
        self,
        *,
        num_semantic_tokens: int,
        codebook_size: int,
        num_coarse_quantizers: int,
        dim: int,
        depth: int,
        pattern: str = "delayed",
        semantic_rate_hz: int | str | Fraction = 25,
        rate_hz: int | str | Fraction = 50,
        num_groups: int = 1,
        extra_streams: Sequence[Stream | Mapping[str, Any]] = (),
        audio_text_condition: bool = False,
        cond_dim: int | None = None,
        **stack: Any,
    ) -> None:
        given = Stream("semantic", num_semantic_tokens, rate_hz=Fraction(semantic_rate_hz), is_input=True)
        predicted = Stream("coarse", codebook_size, num_coarse_quantizers, Fraction(rate_hz), num_groups=num_groups)
        super().__init__(
            sources={
                "semantic": TokenSource("semantic", 0, 1),
                "coarse": TokenSource("acoustic", 0, num_coarse_quantizers),
            },
            config={
                "num_semantic_tokens": num_semantic_tokens,
                "codebook_size": codebook_size,
                "num_coarse_quantizers": num_coarse_quantizers,
                "semantic_rate_hz": str(semantic_rate_hz),
                "rate_hz": str(rate_hz),
                "num_groups": num_groups,
            },
            streams=[given, predicted],
            pattern=pattern,
            extra_streams=extra_streams,
            audio_text_condition=audio_text_condition,
            cond_dim=cond_dim,
            dim=dim,
            depth=depth,
            **stack,
        )


@register
class FineTransformer(StageTransformer):
    """Third stage: the remaining levels of the acoustic tokens, given the first ones.

    Args:
        num_coarse_quantizers: Levels given, all groups counted.
        num_fine_quantizers: Levels predicted, all groups counted.
        codebook_size: Vocabulary of every acoustic level.
        dim: Width d.
        depth: Number of blocks.
        pattern: `delayed`, `parallel` or `flat` (the paper's: all coarse levels of the stretch first).
        rate_hz: Acoustic frames per second.
        num_groups: Codes of one residual level of the codec.
        extra_streams: Further given streams, see `StageTransformer`.
        audio_text_condition: Whether the model takes a condition.
        cond_dim: Width of the condition; None = `dim`.
        **stack: Further arguments of `TokenTransformer`: heads, dim_head, ff_mult, dropout, cond_drop_prob, ...
    """

    namespace = "fine"

    @beartype
    def __init__(
        self,
        *,
        num_coarse_quantizers: int,
        num_fine_quantizers: int,
        codebook_size: int,
        dim: int,
        depth: int,
        pattern: str = "delayed",
        rate_hz: int | str | Fraction = 50,
        num_groups: int = 1,
        extra_streams: Sequence[Stream | Mapping[str, Any]] = (),
        audio_text_condition: bool = False,
        cond_dim: int | None = None,
        **stack: Any,
    ) -> None:
        acoustic = Stream("coarse", codebook_size, num_coarse_quantizers, Fraction(rate_hz), num_groups=num_groups)
        super().__init__(
            sources={
                "coarse": TokenSource("acoustic", 0, num_coarse_quantizers),
                "fine": TokenSource("acoustic", num_coarse_quantizers, num_fine_quantizers),
            },
            config={
                "num_coarse_quantizers": num_coarse_quantizers,
                "num_fine_quantizers": num_fine_quantizers,
                "codebook_size": codebook_size,
                "rate_hz": str(rate_hz),
                "num_groups": num_groups,
            },
            streams=[
                replace(acoustic, is_input=True),
                replace(acoustic, name="fine", num_levels=num_fine_quantizers),
            ],
            pattern=pattern,
            extra_streams=extra_streams,
            audio_text_condition=audio_text_condition,
            cond_dim=cond_dim,
            dim=dim,
            depth=depth,
            **stack,
        )
