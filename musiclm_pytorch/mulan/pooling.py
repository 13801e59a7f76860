"""Embeddings of clips and texts as the mean of the hidden states of their tokens."""

from einops import rearrange, reduce
from torch import Tensor

from audiolm_pytorch.checks.tracing import is_traced
from audiolm_pytorch.nn.transformer import Transformer

__all__ = ["encoded_mean", "token_mean"]


def token_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Average hidden states `[b, t, d]` over the tokens that `mask [b, t]` marks; return `[b, d]` float32."""
    real = rearrange(mask, "b t -> b t 1")
    return reduce(states.float() * real, "b t d -> b d", "sum") / mask.sum(dim=1, keepdim=True)


def encoded_mean(encoder: Transformer, tokens: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
    """Encode tokens `[b, t, d]`, and average the outputs over the tokens that `mask [b, t]` marks."""
    padding = mask if is_traced() or not bool(mask.all()) else None
    return token_mean(encoder(tokens, mask=padding, positions=positions), mask)
