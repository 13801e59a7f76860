"""The three stages of AudioLM (arXiv:2209.03143, section III-C) with the conditions of MusicLM (arXiv:2301.11325)."""

from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any

from audiolm_pytorch.checks.types import keep_arguments, typed
from audiolm_pytorch.lm.stage_transformer import StageTransformer, TokenSource
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.saving.modules import register
from audiolm_pytorch.tokens.streams import Stream, exact_rate

__all__ = ["CoarseTransformer", "FineTransformer", "SemanticTransformer"]


@register
class SemanticTransformer(StageTransformer):
    """The first stage of AudioLM, which predicts semantic tokens.

    Args:
        rate_hz: Semantic tokens per second.
        eos: Whether the model learns to predict where a recording ends.
        pattern: Order of the tokens: `flat`, or `delayed` or `parallel` to align extra streams in time with semantic
            tokens.
        **options: Further arguments of `StageTransformer` (audio_text_condition, cond_dim, extra_streams) and
            `TokenTransformer` (heads, dropout, text_dim, ...).
    """

    namespace = "semantic"

    @typed
    def __init__(
        self,
        *,
        num_semantic_tokens: int,
        dim: int,
        depth: int,
        rate_hz: float | str | Fraction = 25,
        eos: bool = True,
        pattern: str = "flat",
        audio_text_condition: bool = False,
        **options: Any,
    ) -> None:
        check_positive(num_semantic_tokens=num_semantic_tokens)
        super().__init__(
            sources={"semantic": TokenSource("semantic", 0, 1)},
            config={"num_semantic_tokens": num_semantic_tokens, "rate_hz": str(rate_hz), "eos": eos},
            streams=[Stream("semantic", num_semantic_tokens, rate_hz=exact_rate(rate_hz), eos=eos)],
            pattern=pattern,
            dim=dim,
            depth=depth,
            audio_text_condition=audio_text_condition,
            **options,
        )


@register
class CoarseTransformer(StageTransformer):
    """The second stage of AudioLM, which predicts the first levels of acoustic tokens from semantic tokens.

    Args:
        num_coarse_quantizers: Number of predicted tokens per frame (residual levels times `num_groups`).
        pattern: Order of the tokens: `delayed`, `parallel`, or `flat` as in AudioLM (all semantic tokens come first).
        semantic_rate_hz: Semantic tokens per second.
        rate_hz: Acoustic frames per second.
        num_groups: Number of codes per residual level of the codec.
        semantic_lookahead_seconds: Duration of the semantic tokens after the time of a predicted frame that the stage
            also reads, rounded up to whole tokens; streams wait for these tokens. Codes of a codec can depend on later
            sound. Not for the flat pattern.
        guide_semantic: Whether training also drops the semantic tokens when it drops the conditions of an item, so that
            guidance makes the stage follow its semantic tokens more closely.
    """

    namespace = "coarse"

    @typed
    def __init__(
        self,
        *,
        num_semantic_tokens: int,
        codebook_size: int,
        num_coarse_quantizers: int,
        dim: int,
        depth: int,
        pattern: str = "delayed",
        semantic_rate_hz: float | str | Fraction = 25,
        rate_hz: float | str | Fraction = 50,
        num_groups: int = 1,
        semantic_lookahead_seconds: float = 0,
        guide_semantic: bool = False,
        audio_text_condition: bool = False,
        **options: Any,
    ) -> None:
        check_positive(num_semantic_tokens=num_semantic_tokens, codebook_size=codebook_size)
        check_positive(num_coarse_quantizers=num_coarse_quantizers)
        # Rounding errors of seconds as a float do not add a token.
        exact_frames = exact_rate(semantic_rate_hz) * Fraction(semantic_lookahead_seconds) - Fraction(1, 10**6)
        semantic = Stream(
            "semantic",
            num_semantic_tokens,
            rate_hz=exact_rate(semantic_rate_hz),
            is_input=True,
            lookahead_frames=ceil(exact_frames),
            guided=guide_semantic,
        )
        # The config has no default values of these arguments, so that it equals that of files from before them.
        options_of_stream = {"semantic_lookahead_seconds": semantic_lookahead_seconds, "guide_semantic": guide_semantic}
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
                **{name: value for name, value in options_of_stream.items() if value},
            },
            streams=[
                semantic,
                Stream("coarse", codebook_size, num_coarse_quantizers, exact_rate(rate_hz), num_groups=num_groups),
            ],
            pattern=pattern,
            dim=dim,
            depth=depth,
            audio_text_condition=audio_text_condition,
            **options,
        )
        keep_arguments(self, options_of_stream)


@register
class FineTransformer(StageTransformer):
    """The third stage of AudioLM, which predicts the remaining levels of acoustic tokens from the first levels.

    Args:
        num_coarse_quantizers: Number of input tokens per frame (residual levels times `num_groups`).
        num_fine_quantizers: Number of predicted tokens per frame (residual levels times `num_groups`).
        pattern: Order of the tokens: `delayed`, `parallel`, or `flat` as in AudioLM (all coarse levels come first).
        rate_hz: Acoustic frames per second.
        num_groups: Number of codes per residual level of the codec.
    """

    namespace = "fine"

    @typed
    def __init__(
        self,
        *,
        num_coarse_quantizers: int,
        num_fine_quantizers: int,
        codebook_size: int,
        dim: int,
        depth: int,
        pattern: str = "delayed",
        rate_hz: float | str | Fraction = 50,
        num_groups: int = 1,
        audio_text_condition: bool = False,
        **options: Any,
    ) -> None:
        check_positive(num_coarse_quantizers=num_coarse_quantizers, num_fine_quantizers=num_fine_quantizers)
        check_positive(codebook_size=codebook_size)
        coarse = Stream(
            "coarse", codebook_size, num_coarse_quantizers, exact_rate(rate_hz), True, num_groups=num_groups
        )
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
            streams=[coarse, replace(coarse, name="fine", num_levels=num_fine_quantizers, is_input=False)],
            pattern=pattern,
            dim=dim,
            depth=depth,
            audio_text_condition=audio_text_condition,
            **options,
        )
