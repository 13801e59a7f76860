"""From waves to the tokens of stages."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.semantic.base import SemanticTokenizer

__all__ = ["sample_rates", "tokenize"]


def sample_rates(kinds: Collection[str], wav2vec: SemanticTokenizer | None, codec: Codec | None) -> dict[str, int]:
    """Return the sample rate (Hz) that each kind of token needs; ValueError if its tokenizer is missing."""
    rates_hz: dict[str, int] = {}
    for kind in kinds:
        if kind not in ("semantic", "acoustic"):
            raise ValueError(f"'{kind}' tokens cannot be computed from waves: pass the tokens, or shards with them")
        name, tokenizer = {"semantic": ("wav2vec", wav2vec), "acoustic": ("codec", codec)}[kind]
        if tokenizer is None:
            raise ValueError(f"{kind} tokens of a wave need a {name}: pass one, or pass the tokens")
        rates_hz[kind] = tokenizer.target_sample_hz
    return rates_hz


@torch.no_grad()
def tokenize(
    waves: Mapping[str, Tensor],
    lengths: Mapping[str, Tensor],
    wav2vec: SemanticTokenizer | None,
    codec: Codec | None,
) -> AudioTokens:
    """Tokenize waves, without autocast, so that tokens do not depend on the precision of training.

    Args:
        waves: `[b, n]` by kind of token (`semantic`, `acoustic`), at the rate of its tokenizer.
        lengths: True samples `[b]` by kind.
        wav2vec: Semantic tokenizer, for `semantic`.
        codec: Codec, for `acoustic`.
    """
    sample_rates(waves, wav2vec, codec)
    tokens: dict[str, Tensor] = {}
    frames: dict[str, Tensor] = {}
    for kind, wave in waves.items():
        with torch.autocast(device_type=wave.device.type, enabled=False):
            if kind == "semantic" and wav2vec is not None:
                tokens[kind] = wav2vec.to(wave.device).eval().forward(wave, lengths=lengths[kind])
                counts = [wav2vec.num_frames(n) for n in lengths[kind].tolist()]
            elif codec is not None:
                tokens[kind] = codec.to(wave.device).eval().tokenize(wave, lengths=lengths[kind])
                counts = [codec.num_frames(n) for n in lengths[kind].tolist()]
        frames[kind] = torch.tensor(counts).clamp(max=tokens[kind].shape[1])
    return AudioTokens(tokens, frames)
