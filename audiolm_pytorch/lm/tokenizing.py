"""Conversion of waves to the tokens of the AudioLM stages."""

from collections.abc import Collection, Mapping

import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.waves import with_channels
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.semantic.base import SemanticTokenizer

__all__ = ["sample_rates", "tokenize"]


def sample_rates(kinds: Collection[str], wav2vec: SemanticTokenizer | None, codec: Codec | None) -> dict[str, int]:
    """Return the sample rate (Hz) of the tokenizer of each token type; raise a ValueError if a tokenizer is missing."""
    rates_hz: dict[str, int] = {}
    for kind in kinds:
        if kind not in ("semantic", "acoustic"):
            raise ValueError(f"'{kind}' tokens cannot be computed from waves; pass the tokens, or token shards")
        name, tokenizer = {"semantic": ("wav2vec", wav2vec), "acoustic": ("codec", codec)}[kind]
        if tokenizer is None:
            raise ValueError(f"the argument {name} is missing; pass a tokenizer of {kind} tokens, or {kind} tokens")
        rates_hz[kind] = tokenizer.target_sample_hz
    return rates_hz


@torch.no_grad()
def tokenize(
    waves: Mapping[str, Tensor],
    lengths: Mapping[str, Tensor],
    wav2vec: SemanticTokenizer | None,
    codec: Codec | None,
) -> AudioTokens:
    """Tokenize waves without autocast, so that tokens do not depend on the precision of training.

    Args:
        waves: Waves `[b, n]` or `[b, c, n]` by token type (`semantic`, `acoustic`), at the rate of the tokenizer.
        lengths: Number of samples without padding, `[b]`, by token type.
    """
    sample_rates(waves, wav2vec, codec)
    tokens: dict[str, Tensor] = {}
    frames: dict[str, Tensor] = {}
    for kind, wave in waves.items():
        channels = codec.channels if kind == "acoustic" and codec is not None else 1
        wave = with_channels(wave if wave.ndim == 3 else rearrange(wave, "b n -> b 1 n"), channels)
        wave = rearrange(wave, "b 1 n -> b n") if channels == 1 else wave
        with torch.autocast(device_type=wave.device.type, enabled=False):
            if kind == "semantic" and wav2vec is not None:
                tokens[kind] = wav2vec.to(wave.device).eval().forward(wave, lengths=lengths[kind])
                counts = [wav2vec.num_frames(n) for n in lengths[kind].tolist()]
            elif codec is not None:
                tokens[kind] = codec.to(wave.device).eval().tokenize(wave, lengths=lengths[kind])
                counts = [codec.num_frames(n) for n in lengths[kind].tolist()]
        frames[kind] = torch.tensor(counts).clamp(max=tokens[kind].shape[1])
    return AudioTokens(tokens, frames)
