"""Prompts: reads the waves or files that generation continues, and tokenizes them."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audio.waves import check_samples, split_batch, with_channels
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.generation.request import GenerationRequest, Prompt
from audiolm_pytorch.lm.tokenizing import tokenize
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.tokens.token_batch import TokenBatch

__all__ = ["acoustic_tokens", "read_prompt", "read_prompts", "tokenize_prompts"]


def tokenize_prompts(
    request: GenerationRequest, wav2vec: SemanticTokenizer, codec: Codec, device: torch.device
) -> tuple[TokenBatch, TokenBatch, list[float]]:
    """Return semantic tokens, acoustic tokens and the seconds of the prompts of all items.

    A last frame that is only partly inside the prompt is dropped, because its token would encode the end of the sound.
    A prompt that is shorter than a frame is ignored and has 0 seconds.
    """
    hz = request.prime_wave_input_sample_hz or codec.target_sample_hz
    batch, waves = request.num_items, read_prompts(request.prime_wave, hz, request.prime_lengths)
    semantic = _tokens_of_waves("semantic", waves, wav2vec, codec, device)
    acoustic = _tokens_of_waves("acoustic", waves, wav2vec, codec, device)
    seconds = [
        wave.shape[-1] / rate_hz if num_tokens else 0.0
        for (wave, rate_hz), num_tokens in zip(waves, (semantic.lengths + acoustic.lengths).tolist())
    ]
    return semantic.expand(batch), acoustic.expand(batch), seconds * (batch // len(waves))


def acoustic_tokens(waves: Sequence[tuple[Tensor, int]], codec: Codec, device: torch.device) -> TokenBatch:
    """Encode all complete frames of waves `[c, n]`, which are passed with their sample rates in Hz."""
    return _tokens_of_waves("acoustic", waves, None, codec, device)


def read_prompts(
    prompts: Prompt | Sequence[Prompt] | None, sample_hz: int, lengths: Tensor | None = None, name: str = "prompt"
) -> list[tuple[Tensor, int]]:
    """Return wave `[c, n]` and sample rate in Hz of every prompt.

    `sample_hz` is the rate of prompts that are tensors, and `lengths [b]` are the unpadded lengths of a padded tensor.
    `name` is the name of an item in error messages.
    """
    if isinstance(prompts, Tensor):
        waves: list[Prompt] = [*split_batch(prompts, "prime_wave")]
        if lengths is not None:
            if lengths.shape != (len(waves),) or lengths.is_floating_point():
                raise ValueError(f"prime_lengths must have {len(waves)} integers, one per item, got {lengths}")
            if not 0 <= int(lengths.min()) <= int(lengths.max()) <= prompts.shape[-1]:
                raise ValueError(f"prime_lengths must lie in 0..{prompts.shape[-1]}, got {lengths.tolist()}")
            waves = [wave[..., :count] for wave, count in zip(waves, lengths.tolist()) if isinstance(wave, Tensor)]
    elif lengths is not None:
        raise ValueError(
            "got prime_lengths with a list of prompts, which has no padding; pass prime_wave as one padded tensor"
        )
    else:
        waves = [prompts] if isinstance(prompts, (str, Path)) else list(prompts or [])
    return [read_prompt(prompt, sample_hz, f"{name} {item}") for item, prompt in enumerate(waves)]


def read_prompt(prompt: Prompt, sample_hz: int, name: str) -> tuple[Tensor, int]:
    """Return wave `[c, n]` and sample rate in Hz of one prompt; `sample_hz` is the rate of a tensor."""
    if not isinstance(prompt, Tensor):
        return read_audio(prompt, channels=None)
    check_samples(prompt, name)
    wave = rearrange(prompt, "n -> 1 n") if prompt.ndim == 1 else prompt
    if wave.ndim != 2:
        raise ValueError(f"{name} must be [n] or [c, n], got shape {list(prompt.shape)}")
    return wave, sample_hz


def _tokens_of_waves(
    kind: str,
    waves: Sequence[tuple[Tensor, int]],
    wav2vec: SemanticTokenizer | None,
    codec: Codec,
    device: torch.device,
) -> TokenBatch:
    """Tokens of all complete frames of every wave; semantic tokens if `kind` is `semantic` and `wav2vec` is passed."""
    is_acoustic = wav2vec is None or kind == "acoustic"
    tokenizer: SemanticTokenizer | Codec = codec if wav2vec is None or is_acoustic else wav2vec
    channels, levels = (codec.channels, codec.num_quantizers) if is_acoustic else (1, 1)
    resampled = [
        resample(with_channels(wave, channels, "the prompt"), hz, tokenizer.target_sample_hz) for wave, hz in waves
    ]
    samples = [wave.shape[-1] * tokenizer.target_sample_hz // hz for wave, hz in waves]
    frames = [_whole_frames(tokenizer, count) for count in samples]
    tokens = [torch.zeros(0, levels, dtype=torch.long, device=device)] * len(waves)
    items = [item for item, count in enumerate(frames) if count]
    if items:
        longest = max(resampled[item].shape[-1] for item in items)
        batch = torch.stack([F.pad(resampled[item], (0, longest - resampled[item].shape[-1])) for item in items])
        batch = (batch if channels > 1 else batch[:, 0]).to(device)
        lengths = torch.tensor([samples[item] for item in items])
        batch_tokens = tokenize({kind: batch}, {kind: lengths}, wav2vec, codec).tokens[kind]
        for row, item in enumerate(items):
            tokens[item] = batch_tokens[row, : frames[item]].reshape(-1, levels)
    return TokenBatch.of_items(tokens)


def _whole_frames(tokenizer: SemanticTokenizer | Codec, num_samples: int) -> int:
    """Number of frames that lie completely inside a wave of `num_samples`."""
    if num_samples < tokenizer.downsample_factor:
        return 0
    try:
        return min(num_samples // tokenizer.downsample_factor, tokenizer.num_frames(num_samples))
    except ValueError:  # the tokenizer needs more samples for its first frame
        return 0
