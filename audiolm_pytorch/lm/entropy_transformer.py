"""A small language model of the codes of a codec, whose probabilities shorten the codes in files."""

from fractions import Fraction
from typing import Any, Literal

import torch

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.lm.stage_transformer import StageTransformer, TokenSource
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import register
from audiolm_pytorch.tokens.streams import Stream, exact_rate

__all__ = ["EntropyTransformer"]


@register
class EntropyTransformer(StageTransformer):
    """Language model of all codes of a codec, for entropy coding (EnCodec, arXiv:2210.13438, sec. 3.3).

    The model of EnCodec has 5 layers of width 200, and predicts all levels of a frame from the frames before
    (`pattern="parallel"`). By default, a level is also predicted from the lower levels of its frame, which costs
    nothing.

    Args:
        codebook_size: Number of codes of every level.
        num_quantizers: Number of codes per frame (residual levels times `num_groups`).
        pattern: Order of the tokens: `delayed` or `parallel`.
        rate_hz: Frames per second.
        num_groups: Number of codes per residual level of the codec.
        positions: `relative` or `none`. Other positions are computed in float32, which differs between machines.
        **options: Further arguments of `TokenTransformer` (dropout, ff_mult, ...).
    """

    namespace = "entropy"

    @typed
    def __init__(
        self,
        *,
        codebook_size: int,
        num_quantizers: int,
        dim: int = 192,
        depth: int = 4,
        heads: int = 3,
        pattern: Literal["delayed", "parallel"] = "delayed",
        rate_hz: float | str | Fraction = 50,
        num_groups: int = 1,
        positions: Literal["relative", "none"] = "relative",
        **options: Any,
    ) -> None:
        check_positive(codebook_size=codebook_size, num_quantizers=num_quantizers)
        codes = Stream("codes", codebook_size, num_quantizers, exact_rate(rate_hz), num_groups=num_groups)
        super().__init__(
            sources={"codes": TokenSource("acoustic", 0, num_quantizers)},
            config={
                "codebook_size": codebook_size,
                "num_quantizers": num_quantizers,
                "rate_hz": str(rate_hz),
                "num_groups": num_groups,
            },
            streams=[codes],
            pattern=pattern,
            dim=dim,
            depth=depth,
            heads=heads,
            positions=positions,
            **options,
        )

    def fingerprint(self) -> str:
        """Hash of the config and the weights."""
        return fingerprint_of(self)

    @torch.no_grad()
    def first_levels(self, num_levels: int) -> "EntropyTransformer":
        """Return a copy, in float64 and eval mode, that models the first `num_levels` codes of every frame."""
        with preserve_rng():
            model = EntropyTransformer(**{**self.config, "num_quantizers": num_levels}).double()
        weights = self.state_dict()
        weights["embedding.weight"] = weights["embedding.weight"][[*range(model.layout.num_ids), -1]]
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        return model.eval()
