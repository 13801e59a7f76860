"""What a MusicLM makes of real clips and of captions, in the form that the judges take."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.tensors import Conditions
from audiolm_pytorch.nn.module_state import device_of
from musiclm_pytorch.evaluation.report import Metric, accuracy_metric
from musiclm_pytorch.recipes.metrics.classifier import AttributeClassifier

if TYPE_CHECKING:
    from musiclm_pytorch.musiclm import MusicLM
    from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

__all__ = [
    "Generations",
    "attribute_metrics",
    "audio_latents",
    "code_agreement_metrics",
    "from_audio",
    "from_captions",
    "other_clips",
    "reconstruct",
    "text_latents",
]

logger = logging.getLogger(__name__)

# The instruments are about equally frequent, so that their plain accuracy is fair; the other attributes are not.
PLAIN_ACCURACY = ("instrument",)


@dataclass(frozen=True)
class Generations:
    """Waves `[b, n]` for a list of prompts: the best of several candidates, and the first of them."""

    best: Tensor
    first: Tensor


@torch.no_grad()
def reconstruct(
    codec: Codec, waves: Tensor, batch_size: int = 10, num_levels: int | None = None, codes_alone: bool = True
) -> Tensor:
    """Pass waves through a codec.

    Args:
        codec: Any codec.
        waves: `[b, n]` at the codec's rate.
        batch_size: Clips at once.
        num_levels: Code levels to keep; None keeps all.
        codes_alone: Whether only the codes are kept, which is all that a language model has; otherwise also what the
            codec keeps beside them (the loudness of segments in EnCodec at 48 kHz).

    Returns:
        `[b, n]` on the CPU; of several channels, the average.
    """
    device = device_of(codec)
    parts = []
    for part in waves.split(batch_size):
        codes, scales = codec.encode(_with_channels(part, codec.channels).to(device))
        made = codec.decode(codes[..., :num_levels], None if codes_alone else scales, part.shape[-1])
        parts.append(made.mean(dim=1).float().cpu())
    return torch.cat(parts)


def _with_channels(waves: Tensor, channels: int) -> Tensor:
    """Mono waves `[b, n]` as a codec takes them."""
    return waves if channels == 1 else repeat(waves, "b n -> b c n", c=channels)


@torch.no_grad()
def audio_latents(quantizer: "MuLaNEmbedQuantizer", waves: Tensor, sample_hz: int, batch_size: int = 20) -> Tensor:
    """Embed clips of any length with MuLaN.

    Args:
        quantizer: Holds the MuLaN.
        waves: `[b, n]`.
        sample_hz: Their rate (Hz).
        batch_size: Clips at once.

    Returns:
        `[b, d]`, unit norm, on the CPU.
    """
    mulan, device = quantizer.mulan, device_of(quantizer)
    parts = [resample(part, sample_hz, mulan.sample_hz).to(device) for part in waves.split(batch_size)]
    return torch.cat([mulan.get_long_audio_latents(part).float().cpu() for part in parts])


@torch.no_grad()
def text_latents(quantizer: "MuLaNEmbedQuantizer", captions: Sequence[str], batch_size: int = 50) -> Tensor:
    """Embed captions with MuLaN.

    Args:
        quantizer: Holds the MuLaN.
        captions: Texts.
        batch_size: Texts at once.

    Returns:
        `[b, d]`, unit norm, on the CPU.
    """
    parts = [captions[first : first + batch_size] for first in range(0, len(captions), batch_size)]
    return torch.cat([quantizer.mulan.get_text_latents(part).float().cpu() for part in parts])


@torch.no_grad()
def from_audio(
    model: "MusicLM", waves: Tensor, sample_hz: int, seconds: float, seed: int = 0, batch_size: int = 16
) -> Tensor:
    """Generate from the conditioning codes of real audio: what the language models can do with perfect prompts.

    Args:
        model: The MusicLM.
        waves: `[b, n]`.
        sample_hz: Their rate (Hz).
        seconds: Length to generate.
        seed: Clip i is generated with `seed + i`.
        batch_size: Clips at once.

    Returns:
        `[b, m]` at the model's rate, on the CPU.
    """
    quantizer = model.mulan_embed_quantizer
    codes = quantizer.codes_from_latents(audio_latents(quantizer, waves, sample_hz, batch_size), "audio")
    made: list[Tensor] = []
    for first in range(0, len(codes), batch_size):
        part = codes[first : first + batch_size]
        conditioning = {
            name: Conditions(codes=quantizer.conditioning(codes=part, namespace=name)) for name in model.conditioned
        }
        seeds = [seed + first + index for index in range(len(part))]
        wave = model.audio_lm(batch_size=len(part), seconds=seconds, conditioning=conditioning, seeds=seeds)
        made.extend(row.float().cpu() for row in wave)
    return _finite(torch.stack(made))


def from_captions(
    model: "MusicLM",
    captions: Sequence[str],
    seconds: float,
    num_samples: int = 4,
    seed: int = 0,
    batch_size: int = 16,
) -> Generations:
    """Generate several candidates for each caption.

    Args:
        model: The MusicLM.
        captions: Prompts.
        seconds: Length to generate.
        num_samples: Candidates a prompt (N); they are seeded `seed`, `seed + 1`, ....
        seed: Seed of the first candidate, which is the one that N = 1 would give.
        batch_size: Candidates at once.

    Returns:
        The candidates that MuLaN ranks best, and the first ones.
    """
    best, first = [], []
    prompts_at_once = max(batch_size // num_samples, 1)
    for start in range(0, len(captions), prompts_at_once):
        made = model(
            captions[start : start + prompts_at_once],
            num_samples=num_samples,
            seconds=seconds,
            seeds=[seed + index for index in range(num_samples)],
            max_batch=batch_size,
            return_all=True,
        )
        best.append(made.best.float().cpu())
        first.append(made.waves[:, 0].float().cpu())
    return Generations(_finite(torch.cat(best)), _finite(torch.cat(first)))


def _finite(waves: Tensor) -> Tensor:
    """Silence in place of waves `[b, n]` that are not finite: a failure to count, which must not end hours of work."""
    failed = ~torch.isfinite(waves).all(dim=1)
    if failed.any():
        logger.warning("%d of %d generations are not finite and count as silence", int(failed.sum()), len(waves))
    return waves.masked_fill(failed[:, None], 0.0)


def other_clips(count: int, seed: int = 0) -> list[int]:
    """A random order in which no clip keeps its place, for controls.

    Args:
        count: Clips there are, at least 2.
        seed: The same seed gives the same order.

    Returns:
        For each place the index of another clip.

    Raises:
        ValueError: If there is only one clip.
    """
    if count < 2:
        raise ValueError(f"a shuffle needs at least 2 clips, got {count}")
    order = np.random.default_rng(seed).permutation(count)
    others = np.empty(count, dtype=int)
    others[order] = np.roll(order, 1)
    return others.tolist()


def attribute_metrics(
    name: str,
    judge: AttributeClassifier,
    waves: Tensor,
    sample_hz: int,
    truth: dict[str, list[str]],
    note: str = "",
) -> list[Metric]:
    """Have a judge name the attributes of clips, and count how often it says what was asked for.

    Args:
        name: Beginning of the metrics' names.
        judge: Fitted on real training clips.
        waves: `[b, n]`.
        sample_hz: Their rate (Hz).
        truth: For each attribute the name wanted, one a clip.
        note: What else the reader must know.

    Returns:
        One metric per attribute: accuracy of the instrument, balanced accuracy of the others.
    """
    answers = judge.predict(waves, sample_hz)
    return [
        accuracy_metric(
            f"{name} / {attribute}{'' if attribute in PLAIN_ACCURACY else ' (balanced)'}",
            wanted,
            answers[attribute],
            balanced=attribute not in PLAIN_ACCURACY,
            note=note,
        )
        for attribute, wanted in truth.items()
    ]


def code_agreement_metrics(name: str, audio_codes: Tensor, text_codes: Tensor) -> list[Metric]:
    """How often a caption has the code of its clip, level by level.

    Args:
        name: Beginning of the metrics' names.
        audio_codes: `[b, q]` of clips.
        text_codes: `[b, q]` of their captions.

    Returns:
        One metric per level; chance is how often the caption of any clip would agree.
    """
    metrics = []
    for level in range(audio_codes.shape[1]):
        audio, text = audio_codes[:, level].cpu().numpy(), text_codes[:, level].cpu().numpy()
        agrees = (audio == text).astype(float)
        chance = float((audio[:, None] == text[None, :]).mean())
        statistic = partial(_mean_of, agrees)
        metrics.append(Metric.measured(f"{name} / level {level + 1}", statistic, len(agrees), chance))
    return metrics


def _mean_of(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(values[chosen].mean())
