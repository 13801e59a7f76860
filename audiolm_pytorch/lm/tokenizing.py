"""Waves to the tokens that stages are made of."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.semantic.base import SemanticTokenizer

__all__ = ["sample_rates", "tokenize"]


def sample_rates(kinds: Collection[str], wav2vec: SemanticTokenizer | None, codec: Codec | None) -> dict[str, int]:
    """Rate (Hz) of the waves that each kind of token is made from.

    Args:
        kinds: `semantic`, `acoustic` or both; nothing here makes others.
        wav2vec: The semantic tokenizer, needed for `semantic`.
        codec: The codec, needed for `acoustic`.

    Returns:
        Rates by kind.

    Raises:
        ValueError: If a tokenizer is missing, or a kind is another one.
    """
    rates_hz: dict[str, int] = {}
    for kind in kinds:
        if kind not in ("semantic", "acoustic"):
            raise ValueError(f"'{kind}' tokens are not made of waves: hand in the tokens, or shards that hold them")
        tokenizer = {"semantic": wav2vec, "acoustic": codec}[kind]
        if tokenizer is None:
            needed = {"semantic": "wav2vec", "acoustic": "codec"}[kind]
            raise ValueError(f"{kind} tokens of a wave need a {needed}: hand one in, or hand in the tokens")
        rates_hz[kind] = tokenizer.target_sample_hz
    return rates_hz


@torch.no_grad()
def tokenize(
    waves: Mapping[str, Tensor],
    lengths: Mapping[str, Tensor],
    wav2vec: SemanticTokenizer | None,
    codec: Codec | None,
) -> AudioTokens:
    """Tokenize waves, in float32 whatever the precision of training, so that tokens are always the same.

    Args:
        waves: `[b, n]` by kind of token, each at its tokenizer's rate.
        lengths: Samples `[b]` that are no padding, by kind.
        wav2vec: The semantic tokenizer, if `semantic` is wanted.
        codec: The codec, if `acoustic` is wanted.

    Returns:
        The tokens, with the true frames of each item.

    Raises:
        ValueError: If a tokenizer is missing.
    """
    sample_rates(waves, wav2vec, codec)
    tokens: dict[str, Tensor] = {}
    frames: dict[str, Tensor] = {}
    for kind, wave in waves.items():
        with torch.autocast(device_type=wave.device.type, enabled=False):
            tokenizer = wav2vec if kind == "semantic" else codec
            if isinstance(tokenizer, nn.Module):
                tokenizer.to(wave.device).eval()
            if kind == "semantic" and wav2vec is not None:
                tokens[kind] = wav2vec.forward(wave, lengths=lengths[kind])
                counts = [wav2vec.num_frames(n) for n in lengths[kind].tolist()]
            elif codec is not None:
                tokens[kind] = codec.tokenize(wave, lengths=lengths[kind])
                counts = [codec.num_frames(n) for n in lengths[kind].tolist()]
        frames[kind] = torch.tensor(counts).clamp(max=tokens[kind].shape[1])
    return AudioTokens(tokens, frames)
