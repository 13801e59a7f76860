"""Contrastive losses between audio and text latents: softmax, decoupled softmax and sigmoid, exact over processes."""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.io import register

__all__ = ["SigmoidContrastiveLearning", "SoftmaxContrastiveLearning", "gather_batch"]


class _ContrastiveLoss(nn.Module):
    """A learned temperature, and the similarities of all pairs of the global batch.

    Under data parallelism every process computes the loss of the joined batch. Gradients that arrive at gathered
    latents are summed over processes, and data parallelism averages the gradients of parameters: both together give
    exactly what one process gets from the joined batch. Every process must therefore compute the loss, or none.

    Args:
        init_temperature: Temperature at the start; learned from there.
        min_temperature: The temperature is never used below this, so that similarities stay below its inverse.
    """

    @beartype
    def __init__(self, init_temperature: float = 0.1, min_temperature: float = 0.01) -> None:
        super().__init__()
        if not 0 < min_temperature <= init_temperature < math.inf:
            raise ValueError(
                f"need 0 < min_temperature <= init_temperature, got {min_temperature} and {init_temperature}"
            )
        self.config: dict[str, Any] = {"init_temperature": init_temperature, "min_temperature": min_temperature}
        self.min_temperature = min_temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(init_temperature)))

    @property
    def temperature(self) -> Tensor:
        """The temperature in use, a scalar in [min_temperature, 1 / min_temperature]."""
        bound = abs(math.log(self.min_temperature))
        bounded = self.log_temperature.clamp(-bound, bound)
        # the gradient passes a bound that was reached; otherwise the temperature could never come back from it
        return (self.log_temperature + (bounded - self.log_temperature).detach()).exp()

    def _similarities(self, audio: Tensor, text: Tensor, captions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Similarities `[b, b]` over the temperature (rows audio), and which pairs are neither match nor contrast."""
        if audio.ndim != 2 or audio.shape != text.shape or len(audio) == 0:
            raise ValueError(
                f"audio and text latents must both be [b, d], got {tuple(audio.shape)} and {tuple(text.shape)}"
            )
        if captions is not None and captions.shape != audio.shape[:1]:
            raise ValueError(f"captions must be [{len(audio)}] numbers, got {tuple(captions.shape)}")
        audio, text = (gather_batch(_at_least_float32(latents)) for latents in (audio, text))
        similarities = audio @ text.T / self.temperature.to(audio.dtype)
        if captions is None:
            return similarities, torch.zeros_like(similarities, dtype=torch.bool)
        captions = gather_batch(captions.to(audio.device))
        same = captions.unsqueeze(0) == captions.unsqueeze(1)
        return similarities, same.fill_diagonal_(False)


@register
class SoftmaxContrastiveLearning(_ContrastiveLoss):
    """Cross entropy over the batch in both directions (MuLan, arXiv:2208.12415, sec. 3.4; CLIP, arXiv:2103.00020).

    Args:
        init_temperature: Temperature at the start (MuLan: 0.1); learned from there.
        min_temperature: The temperature is never used below this.
        decoupled: Leave the match itself out of the denominator (arXiv:2110.06848, eq. 5), which helps small batches.
            Items without anything to contrast with then count 0.
    """

    @beartype
    def __init__(
        self, init_temperature: float = 0.1, min_temperature: float = 0.01, *, decoupled: bool = False
    ) -> None:
        super().__init__(init_temperature, min_temperature)
        self.config["decoupled"] = decoupled
        self.decoupled = decoupled

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SoftmaxContrastiveLearning":
        """Build from `config`; the temperature starts anew."""
        return cls(**config)

    def forward(self, audio_latents: Tensor, text_latents: Tensor, captions: Tensor | None = None) -> Tensor:
        """Average the losses of audio to text and text to audio.

        Args:
            audio_latents: `[b, d]` unit norm.
            text_latents: `[b, d]` unit norm; row i matches audio i.
            captions: `[b]` integers, equal where captions are the same text: such pairs are no contrasts. None = all
                differ.

        Returns:
            Scalar in nats; at chance it is ln of the global batch size.

        Raises:
            ValueError: If shapes do not fit.
        """
        with torch.autocast(device_type=audio_latents.device.type, enabled=False):
            similarities, ignored = self._similarities(audio_latents, text_latents, captions)
            matches = similarities.diagonal()
            if self.decoupled:
                ignored = ignored | torch.eye(len(ignored), dtype=torch.bool, device=ignored.device)
            # not -inf: the gradient of a row without any finite entry would be NaN
            contrasts = similarities.masked_fill(ignored, -1e30)
            has_contrast = ~ignored.all(dim=1)
            losses = contrasts.logsumexp(dim=1) + contrasts.logsumexp(dim=0) - 2 * matches
            return torch.where(has_contrast, losses, torch.zeros_like(losses)).mean() / 2


@register
class SigmoidContrastiveLearning(_ContrastiveLoss):
    """Every pair on its own a yes-or-no question (SigLIP, arXiv:2303.15343, algorithm 1).

    Args:
        init_temperature: Temperature at the start (SigLIP: 0.1); learned from there.
        min_temperature: The temperature is never used below this.
        init_bias: Learned bias at the start (SigLIP: -10, since almost all pairs do not match).
    """

    @beartype
    def __init__(
        self, init_temperature: float = 0.1, min_temperature: float = 0.01, *, init_bias: float = -10.0
    ) -> None:
        super().__init__(init_temperature, min_temperature)
        self.config["init_bias"] = init_bias
        self.bias = nn.Parameter(torch.tensor(init_bias))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SigmoidContrastiveLearning":
        """Build from `config`; temperature and bias start anew."""
        return cls(**config)

    def forward(self, audio_latents: Tensor, text_latents: Tensor, captions: Tensor | None = None) -> Tensor:
        """Sum the losses of all pairs of an item, and average over items.

        Args:
            audio_latents: `[b, d]` unit norm.
            text_latents: `[b, d]` unit norm; row i matches audio i.
            captions: `[b]` integers, equal where captions are the same text: such pairs are no contrasts. None = all
                differ.

        Returns:
            Scalar in nats.

        Raises:
            ValueError: If shapes do not fit.
        """
        with torch.autocast(device_type=audio_latents.device.type, enabled=False):
            similarities, ignored = self._similarities(audio_latents, text_latents, captions)
            signs = 2 * torch.eye(len(similarities), device=similarities.device, dtype=similarities.dtype) - 1
            losses = -F.logsigmoid(signs * (similarities + self.bias.to(similarities.dtype)))
            return losses.masked_fill(ignored, 0.0).sum(dim=1).mean()


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all processes; backward gives each process the summed gradient of its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        longest = max(counts)
        padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, longest - len(rows))).contiguous()
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[dist.get_rank()], None


def gather_batch(rows: Tensor) -> Tensor:
    """Join the rows of all processes, in the order of their ranks; differentiable.

    Args:
        rows: `[b, ...]`; `b` may differ between processes.

    Returns:
        `[sum of b, ...]`, the same on every process; `rows` itself where there is one process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return _GatherRows.apply(rows, [int(count) for count in counts])


def _at_least_float32(latents: Tensor) -> Tensor:
    """Float32 for half precision; float64 stays."""
    return latents if latents.dtype == torch.float64 else latents.float()
