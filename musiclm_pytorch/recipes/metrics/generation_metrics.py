"""Generation of clips from captions or audio, and metrics of their attributes and conditioning codes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.evaluation.report import MetricValue

if TYPE_CHECKING:
    from musiclm_pytorch.musiclm import MusicLM
    from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

__all__ = [
    "ATTRIBUTES",
    "Generations",
    "audio_latents",
    "code_agreement_metrics",
    "from_audio",
    "from_captions",
    "other_clips",
    "reconstruct",
]

logger = logger_named(__name__)

ATTRIBUTES = ("instrument", "tempo", "drums", "register")
# Instruments are about equally frequent, so that their accuracy needs no balancing.
PLAIN_ACCURACY = ("instrument",)


@dataclass(frozen=True)
class Generations:
    """Generated waves `[b, n]` of b prompts: the candidate most similar to the prompt, and the first candidate."""

    best: Tensor
    first: Tensor


@torch.no_grad()
def reconstruct(
    codec: Codec, waves: Tensor, batch_size: int = 10, num_levels: int | None = None, codes_alone: bool = True
) -> Tensor:
    """Encode and decode mono waves with a codec.

    Args:
        codec: Codec of any class.
        waves: Waves `[b, n]` at the sample rate of the codec.
        batch_size: Number of waves per batch.
        num_levels: Number of code levels to decode; None = all levels.
        codes_alone: Whether to decode only the codes, without the scales that a codec such as 48 kHz EnCodec adds.

    Returns:
        Reconstructed waves `[b, n]` on the CPU, averaged over channels.
    """
    device = device_of(codec)
    parts = []
    for part in waves.split(batch_size):
        inputs = part if codec.channels == 1 else repeat(part, "b n -> b c n", c=codec.channels)
        codes, scales = codec.encode(inputs.to(device))
        decoded = codec.decode(codes[..., :num_levels], None if codes_alone else scales, part.shape[-1])
        parts.append(decoded.mean(dim=1).float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def audio_latents(quantizer: "MuLaNEmbedQuantizer", waves: Tensor, sample_hz: int, batch_size: int = 20) -> Tensor:
    """Compute MuLaN latents `[b, d]` on the CPU for clips `[b, n]` of any length."""
    mulan, device = quantizer.mulan, device_of(quantizer)
    parts = [resample(part, sample_hz, mulan.sample_hz).to(device) for part in waves.split(batch_size)]
    return torch.cat([mulan.get_long_audio_latents(part).float().cpu() for part in parts])


@torch.no_grad()
def from_audio(
    model: "MusicLM", waves: Tensor, sample_hz: int, seconds: float, seed: int = 0, batch_size: int = 16
) -> Tensor:
    """Generate waves from MuLaN codes of real audio, to measure the language models without the text tower of MuLaN.

    Args:
        model: MusicLM that generates the waves.
        waves: Real waves `[b, n]`.
        sample_hz: Sample rate of the real waves.
        seconds: Length of a generated wave in seconds.
        seed: Seed of the first wave; wave i is generated with the seed `seed + i`.
        batch_size: Number of waves per batch.

    Returns:
        Generated waves, one row per real wave, at the sample rate of the model, on the CPU.
    """
    quantizer = model.mulan_embed_quantizer
    codes = quantizer.codes_from_latents(audio_latents(quantizer, waves, sample_hz, batch_size), "audio")
    generated: list[Tensor] = []
    for first in range(0, len(codes), batch_size):
        part = codes[first : first + batch_size]
        conditioning = {
            name: {"codes": quantizer.conditioning(codes=part, namespace=name)} for name in model.conditioned
        }
        seeds = [seed + first + index for index in range(len(part))]
        wave = model.audio_lm(batch_size=len(part), seconds=seconds, conditioning=conditioning, seeds=seeds)
        generated.extend(row.float().cpu() for row in wave)
    return _silence_if_not_finite(torch.stack(generated))


def from_captions(
    model: "MusicLM",
    captions: Sequence[str],
    seconds: float,
    num_samples: int = 4,
    seed: int = 0,
    batch_size: int = 16,
) -> Generations:
    """Generate several candidate waves for each caption.

    Args:
        model: MusicLM that generates the waves.
        captions: Captions of the waves to generate.
        seconds: Length of a generated wave in seconds.
        num_samples: Number of candidates per caption.
        seed: Seed of the first candidate; candidate i is generated with the seed `seed + i`.
        batch_size: Number of candidates per batch.
    """
    best, first = [], []
    prompts_per_batch = max(batch_size // num_samples, 1)
    for start in range(0, len(captions), prompts_per_batch):
        candidates = model(
            captions[start : start + prompts_per_batch],
            num_samples=num_samples,
            seconds=seconds,
            seeds=[seed + index for index in range(num_samples)],
            max_batch=batch_size,
            return_all=True,
        )
        best.append(candidates.best.float().cpu())
        first.append(candidates.waves[:, 0].float().cpu())
    return Generations(_silence_if_not_finite(torch.cat(best)), _silence_if_not_finite(torch.cat(first)))


def _silence_if_not_finite(waves: Tensor) -> Tensor:
    """Silence the generated waves `[b, n]` that contain NaN or infinite samples, and log a warning."""
    failed = ~torch.isfinite(waves).all(dim=1)
    if failed.any():
        logger.warning(
            "%d of %d generated waves are not finite and are replaced by silence", int(failed.sum()), len(waves)
        )
    return waves.masked_fill(failed[:, None], 0.0)


def other_clips(count: int, seed: int = 0) -> list[int]:
    """Draw the index of another clip for each of `count` clips, for control experiments with exchanged prompts."""
    if count < 2:
        raise ValueError(f"exchanging prompts needs at least 2 clips, got {count} clips")
    order = np.random.default_rng(seed).permutation(count)
    other = np.empty(count, dtype=int)
    other[order] = np.roll(order, 1)
    return other.tolist()


def code_agreement_metrics(name: str, audio_codes: Tensor, text_codes: Tensor) -> list[MetricValue]:
    """Measure for each level of MuLaN codes `[b, q]` how often caption and clip have equal codes.

    The chance level is the share of equal codes among all pairs of a caption and a clip.
    """
    metrics = []
    for level, (audio, text) in enumerate(zip(audio_codes.T.cpu().numpy(), text_codes.T.cpu().numpy()), start=1):
        chance = float((audio[:, None] == text[None, :]).mean())
        metrics.append(MetricValue.mean(f"{name} / level {level}", audio == text, chance))
    return metrics
