"""Training of codes that survive inaudible changes, and of decoders that tolerate wrong codes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.codecs.quantizers.base import ResidualLevels

__all__ = ["StableCodes", "WrongCodes"]


@beartype
@dataclass(frozen=True)
class StableCodes:
    """Settings of the stability loss, which gives a wave and its inaudibly changed copies the same codes.

    A language model cannot predict codes that inaudible changes decide. The loss is the cross-entropy of the codes of
    the clean wave, given the encoded copy, summed over the levels with decreasing weights (`level_decay`). The
    cross-entropy alone would gather all frames at a few codes. Therefore, an entropy of the codes of a batch below
    `min_entropy` adds the missing entropy to the loss.

    Use the loss with slow codebooks, such as `ResidualQuantizer(decay=0.99, dead_below_share=0.03)`. Codes that move or
    are replaced often cut the clusters of frames that the loss creates. Use a commitment weight of about 10. With a
    weight of 1, the squared norm of the frames of the bundled codec became 45 times larger within 700 steps. All random
    numbers come from the global generator, which the training loop seeds for each step.

    Args:
        weight: Weight of the loss of level 1.
        level_decay: Weight of each level as a multiple of the weight of the level before.
        min_entropy: Smallest entropy of the codes of each level in a batch, in nats; n equally frequent codes have an
            entropy of log(n). A small entropy makes codes stable and easy to predict; a large entropy makes them exact.
        temperature: Temperature of the softmax over the codes, see `ResidualLevels.code_statistics`. With a low
            temperature, only the codes nearest to a frame matter.
        own_copy_share: Share of the items whose copy is the codec's own reconstruction instead of a changed wave,
            because a continued clip is encoded again.
        shift_seconds: Largest shift of a copy to the left or to the right.
        noise_db: Range of the level of white noise (dB) relative to the level of the wave.
        gain_db: Largest change of the gain of a copy (dB), up or down.
    """

    weight: float | int = 0.15
    level_decay: float | int = 0.6
    min_entropy: float | int = 4.0
    temperature: float | int = 0.1
    own_copy_share: float | int = 0.5
    shift_seconds: float | int = 0.005
    noise_db: tuple[float | int, float | int] = (-60.0, -40.0)
    gain_db: float | int = 1.0

    def __post_init__(self) -> None:
        if min(self.weight, self.temperature) <= 0 or not 0 <= self.own_copy_share <= 1:
            raise ValueError(f"need weight and temperature above 0 and own_copy_share in 0..1, got {self}")
        not_negative = (self.level_decay, self.min_entropy, self.shift_seconds, self.gain_db)
        if min(not_negative) < 0 or self.noise_db[0] > self.noise_db[1]:
            raise ValueError(
                "need level_decay, min_entropy, shift_seconds and gain_db of 0 or more and noise_db = (lowest, "
                f"highest), got {self}"
            )

    @torch.no_grad()
    def copies(self, wave: Tensor, decoded: Tensor, can_be_own: Tensor, sample_hz: int) -> Tensor:
        """Create one changed copy of each wave `[b, c, n]`.

        `decoded [b, c, n]` are the codec's reconstructions, which only items with the flag `can_be_own [b]` use.
        """
        is_own, gain, noise, shift = torch.rand(4, len(wave), 1, 1, device=wave.device).unbind()
        level = wave.square().mean(dim=(1, 2), keepdim=True).sqrt()
        noise_db = self.noise_db[0] + noise * (self.noise_db[1] - self.noise_db[0])
        changed = wave * _factor(self.gain_db * (2 * gain - 1)) + torch.randn_like(wave) * level * _factor(noise_db)
        uses_own = (is_own < self.own_copy_share) & rearrange(can_be_own, "b -> b 1 1")
        changed = torch.where(uses_own, decoded.to(wave.dtype), changed)
        reach = round(self.shift_seconds * sample_hz)
        starts = (shift * (2 * reach + 1)).long().clamp(max=2 * reach)  # at `reach`, the copy is not shifted
        positions = starts + torch.arange(wave.shape[-1], device=wave.device)
        return F.pad(changed, (reach, reach)).gather(-1, positions.expand_as(wave))

    def loss(self, quantizer: ResidualLevels, frames: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of encoded copies `frames [b, f, d]` given the clean codes `[b, f, q]`, and its metrics.

        The metrics `same_level_k` are the shares of frames whose code in level k equals the code of the clean wave, if
        the codes of the earlier levels are equal.
        """
        kept = codes[..., : int((codes[0, 0] >= 0).sum())]
        statistics = quantizer.code_statistics(frames, kept, float(self.temperature))
        losses = statistics.cross_entropy + (self.min_entropy - statistics.entropy).clamp(min=0)
        weights = self.weight * self.level_decay ** torch.arange(len(losses), device=losses.device)
        metrics = {f"same_level_{level}": share for level, share in enumerate(statistics.equal_share, start=1)}
        return (weights * losses).sum(), {"stability": losses.detach().mean(), **metrics}


def _factor(decibels: Tensor) -> Tensor:
    return 10 ** (decibels / 20)


@beartype
@dataclass(frozen=True)
class WrongCodes:
    """Replaces some codes by wrong ones before they are decoded in training, while the target wave stays clean.

    Without such training, the decoder turns a single wrong code of a language model into an audible burst.

    Args:
        item_share: Share of the items of a batch that receive wrong codes.
        max_code_share: Largest share of wrong codes; each item and level draws a share from 0 to this share.
        near_share: Share of the wrong codes that are one of the `num_near` codes nearest to the correct code, as a
            language model's mistakes often are; the other wrong codes are drawn from the whole codebook.
        num_near: Number of codes from which a near code is drawn.
    """

    item_share: float | int = 0.5
    max_code_share: float | int = 0.4
    near_share: float | int = 0.5
    num_near: int = 16

    def __post_init__(self) -> None:
        shares = (self.item_share, self.max_code_share, self.near_share)
        if not all(0 <= share <= 1 for share in shares) or self.num_near < 1:
            raise ValueError(f"shares must be in 0..1 and num_near 1 or more, got {self}")

    @torch.no_grad()
    def replaced(self, quantizer: ResidualLevels, codes: Tensor) -> Tensor:
        """Return codes `[b, f, q]` with wrong codes; random numbers come from the global generator."""
        num_items, _, num_levels = codes.shape
        coin = torch.rand(num_items, 1, 1, device=codes.device) < self.item_share
        share = torch.rand(num_items, 1, num_levels, device=codes.device) * self.max_code_share
        is_wrong = coin & (torch.rand(codes.shape, device=codes.device) < share)
        is_near = torch.rand(codes.shape, device=codes.device) < self.near_share
        wrong = torch.randint(quantizer.codebook_size, codes.shape, device=codes.device)
        rank = torch.randint(min(self.num_near, quantizer.codebook_size - 1), codes.shape, device=codes.device)
        for level in range(num_levels):
            chosen = (is_wrong & is_near)[..., level]
            codebook = quantizer.codebook(level).float()
            distances = torch.cdist(codebook[codes[..., level][chosen]], codebook)
            nearest = distances.topk(min(self.num_near + 1, quantizer.codebook_size), largest=False).indices[:, 1:]
            wrong[..., level][chosen] = nearest.gather(1, rearrange(rank[..., level][chosen], "m -> m 1"))[:, 0]
        return torch.where(is_wrong, wrong, codes)
