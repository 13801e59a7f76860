"""Waves and files to be continued: brought to each tokenizer's rate and channels, and tokenized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.generation.request import Prime
from audiolm_pytorch.lm.tokenizing import tokenize
from audiolm_pytorch.semantic.base import SemanticTokenizer

__all__ = ["PromptTokens", "split_prompts", "tokenize_prompts"]


@dataclass(frozen=True)
class PromptTokens:
    """Tokens of primes.

    Attributes:
        semantic: Semantic tokens `[t_i, 1]` of every item.
        acoustic: Acoustic tokens `[f_i, q]` of every item.
        seconds: Length of every item; 0 for a prime of less than a frame, which is none.
    """

    semantic: list[Tensor]
    acoustic: list[Tensor]
    seconds: list[float]


def split_prompts(primes: Prime | Sequence[Prime], sample_hz: int, lengths: Tensor | None) -> list[tuple[Tensor, int]]:
    """Take primes of any form apart, read files, and refuse what is no sound.

    Args:
        primes: A wave `[n]`, waves `[b, n]` or `[b, c, n]`, a file, or a list of files and waves `[n]` or `[c, n]`.
        sample_hz: Rate of those that are no files (Hz).
        lengths: Samples `[b]` of waves handed in as one tensor that are no padding; None = all.

    Returns:
        Wave `[c, n]` and rate (Hz) of every item.

    Raises:
        ValueError: If a file cannot be read, shapes are others, lengths do not fit, or samples are not finite.
    """
    if isinstance(primes, Tensor):
        if primes.ndim not in (1, 2, 3):
            raise ValueError(f"prime_wave must be [n], [b, n] or [b, c, n], got {tuple(primes.shape)}")
        waves: list[Prime] = list(primes.unsqueeze(0) if primes.ndim == 1 else primes)
        if lengths is not None:
            if lengths.shape != (len(waves),) or lengths.is_floating_point():
                raise ValueError(f"prime_lengths must be {len(waves)} whole numbers, one an item, got {lengths}")
            if not 0 <= int(lengths.min()) <= int(lengths.max()) <= primes.shape[-1]:
                raise ValueError(f"prime_lengths must lie in 0..{primes.shape[-1]}, got {lengths.tolist()}")
            waves = [wave[..., :count] for wave, count in zip(waves, lengths.tolist()) if isinstance(wave, Tensor)]
    elif lengths is not None:
        raise ValueError("prime_lengths belongs to primes in one padded tensor; in a list every wave has a length")
    else:
        waves = [primes] if isinstance(primes, (str, Path)) else list(primes)
    return [_read(number, wave, sample_hz) for number, wave in enumerate(waves)]


def tokenize_prompts(
    waves: Sequence[tuple[Tensor, int]], wav2vec: SemanticTokenizer, codec: Codec, device: torch.device
) -> PromptTokens:
    """Tokenize primes. A frame that a prime ends inside of is left out: it would say that sound stops there.

    Args:
        waves: Wave `[c, n]` and rate (Hz) of every item.
        wav2vec: The semantic tokenizer.
        codec: The codec.
        device: Where to compute.

    Returns:
        The tokens.

    Raises:
        ValueError: If a wave has neither one channel nor the codec's, where that has several.
    """
    tokenizers: Mapping[str, SemanticTokenizer | Codec] = {"semantic": wav2vec, "acoustic": codec}
    tokens: dict[str, list[Tensor]] = {}
    for kind, one in tokenizers.items():
        channels = codec.channels if kind == "acoustic" else 1
        own = [resample(_of_channels(wave, channels), rate_hz, one.target_sample_hz) for wave, rate_hz in waves]
        samples = [wave.shape[-1] * one.target_sample_hz // rate_hz for wave, rate_hz in waves]
        frames = [_whole_frames(one, count) for count in samples]
        levels = codec.num_quantizers if kind == "acoustic" else 1
        tokens[kind] = [torch.zeros(0, levels, dtype=torch.long, device=device)] * len(waves)
        heard = [item for item, count in enumerate(frames) if count]
        if heard:
            longest = max(own[item].shape[-1] for item in heard)
            batch = torch.stack([F.pad(own[item], (0, longest - own[item].shape[-1])) for item in heard])
            batch = (batch if channels > 1 else batch[:, 0]).to(device)
            lengths = torch.tensor([samples[item] for item in heard])
            made = tokenize({kind: batch}, {kind: lengths}, wav2vec, codec).tokens[kind]
            for row, item in enumerate(heard):
                found = made[row, : frames[item]]
                tokens[kind][item] = found.unsqueeze(-1) if found.ndim == 1 else found
    seconds = [
        wave.shape[-1] / rate_hz if len(semantic) + len(acoustic) else 0.0
        for (wave, rate_hz), semantic, acoustic in zip(waves, tokens["semantic"], tokens["acoustic"])
    ]
    return PromptTokens(tokens["semantic"], tokens["acoustic"], seconds)


def _read(number: int, prime: Prime, sample_hz: int) -> tuple[Tensor, int]:
    """Wave `[c, n]` of one prime, and its rate (Hz)."""
    if not isinstance(prime, Tensor):
        return read_audio(prime, channels=None)
    wave = rearrange(prime, "n -> 1 n") if prime.ndim == 1 else prime
    if wave.ndim != 2 or not wave.is_floating_point():
        raise ValueError(
            f"prime {number} must be floating point [n] or [c, n] in [-1, 1], got {prime.dtype} {tuple(prime.shape)}"
        )
    if not wave.isfinite().all():
        raise ValueError(f"prime {number} holds NaN or infinite samples; clean it first, e.g. with torch.nan_to_num")
    return wave, sample_hz


def _of_channels(wave: Tensor, channels: int) -> Tensor:
    """Average channels, or repeat the only one."""
    if len(wave) == channels:
        return wave
    if channels == 1:
        return reduce(wave, "c n -> 1 n", "mean")
    if len(wave) == 1:
        return wave.expand(channels, -1)
    raise ValueError(f"a prime has {len(wave)} channels, the codec {channels}: give it one channel or {channels}")


def _whole_frames(tokenizer: SemanticTokenizer | Codec, num_samples: int) -> int:
    """Frames that lie wholly inside a wave; 0 where it is too short for one."""
    if num_samples < tokenizer.downsample_factor:
        return 0
    try:
        return min(num_samples // tokenizer.downsample_factor, tokenizer.num_frames(num_samples))
    except ValueError:  # what is too short for a frame of this tokenizer
        return 0
