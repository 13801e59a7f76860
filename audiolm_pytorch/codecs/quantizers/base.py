"""The interface of frame quantizers, the base class of residual quantizers, and a measure of code usage."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.checks.types import described, typed
from audiolm_pytorch.codecs.quantizers.distributed import from_first_process
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.saving.modules import SavedModule

__all__ = ["FrameQuantizer", "Quantized", "ResidualLevels", "code_usage", "usage_of_counts"]


class Quantized(NamedTuple):
    """Quantized frames `[b, f, d]` with straight-through gradients, and their codes `[b, f, q]` int64.

    Codes are -1 in levels that level dropout skipped. The scalar training loss pulls frames towards their code vectors;
    in eval mode the loss is zero.
    """

    frames: Tensor
    codes: Tensor
    loss: Tensor


class FrameQuantizer(SavedModule, ABC):
    """Base class of quantizers, which convert frames of a codec to discrete codes and back.

    Attributes:
        num_quantizers: Number of codes per frame (columns), the number of levels times the number of groups.
        num_groups: Number of equal parts of a frame that are quantized separately.
    """

    dim: int
    num_quantizers: int
    codebook_size: int
    num_groups: int = 1

    @abstractmethod
    def forward(self, frames: Tensor, num_levels: int | None = None) -> Quantized:
        """Quantize frames `[b, f, d]`; training mode also updates codebooks and can skip the last levels.

        `num_levels` is the number of levels in training mode; None draws this number at random.
        """

    @abstractmethod
    def bypass(self, frames: Tensor) -> Tensor:
        """Project frames `[b, f, d]` to the space of the code vectors and back, without quantization."""

    @abstractmethod
    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames `[b, f, d]` as codes `[b, f, q]` int64, coarse level first."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `[b, f, q']` of the first q' columns to frames `[b, f, d]`."""

    @abstractmethod
    def initialise(self, frames: Tensor) -> None:
        """Fit the codebooks to frames `[n, d]` from many batches."""


class ResidualLevels(FrameQuantizer):
    """Base class of residual quantizers, in which each level quantizes the remaining error of the previous levels.

    The codes of the first levels can be decoded without the codes of later levels. Level dropout skips the same levels
    on every process and in every group. A quantizer with projections and `requires_grad_(False)` keeps its codebooks in
    training, so that a decoder can be trained on fixed codes. Residual quantizers compute in float32 even under
    autocast, because distances in bfloat16 would select other codes.

    Args:
        rvq: Module with `project_in`, `project_out` and one entry per level in `layers`.
        config: Constructor arguments of the subclass, with `dim`, `codebook_size`, `num_quantizers`, `level_dropout`.
    """

    def __init__(self, rvq: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        sizes = ("dim", "codebook_size", "num_quantizers", "codebook_dim")
        check_positive(**{name: config[name] for name in sizes if name in config})
        self.rvq: Any = rvq
        self.config = config
        self.dim, self.codebook_size = config["dim"], config["codebook_size"]
        self.num_quantizers, self.level_dropout = config["num_quantizers"], config["level_dropout"]

    def forward(self, frames: Tensor, num_levels: int | None = None) -> Quantized:
        """Quantize frames `[b, f, d]` (see `FrameQuantizer.forward`)."""
        if not self.training:
            codes = self.encode(frames)
            return Quantized(self.decode(codes), codes, codes.new_zeros((), dtype=torch.float32))
        num_levels = self.draw_num_levels(frames.device) if num_levels is None else num_levels
        if self._is_frozen:
            codes = self.encode(frames)[..., :num_levels]
            quantized, loss = self.decode(codes), codes.new_zeros((), dtype=torch.float32)
            return Quantized(quantized, F.pad(codes, (0, self.num_quantizers - num_levels), value=-1), loss)
        with torch.autocast(frames.device.type, enabled=False):
            quantized, codes, loss = self._quantize_in_training(self._project(frames), num_levels)
            quantized = self._unproject(quantized)
        return Quantized(quantized, F.pad(codes, (0, self.num_quantizers - num_levels), value=-1), loss)

    @property
    def _is_frozen(self) -> bool:
        """Whether the quantizer has parameters, but none that requires gradients."""
        parameters = list(self.parameters())
        return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)

    def draw_num_levels(self, device: torch.device) -> int:
        """Draw a random number of levels for a training batch; every process receives the same number."""
        coin, share = from_first_process(torch.rand(2, device=device)).tolist()
        return 1 + int(share * self.num_quantizers) if coin < self.level_dropout else self.num_quantizers

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames `[b, f, d]` as codes `[b, f, q]` int64: each level selects the code nearest to its residual."""
        if not isinstance(frames, Tensor):
            raise TypeError(f"frames must be a tensor, got {described(frames)}")
        if frames.ndim != 3 or frames.shape[-1] != self.dim or not frames.is_floating_point() or not len(frames):
            raise ValueError(f"frames must be floats [b, f, {self.dim}] with b >= 1, got {described(frames)}")
        with torch.autocast(frames.device.type, enabled=False):
            residual = self._project(frames)
            codes = []
            for level in range(self.num_quantizers):
                codes.append(self._nearest(residual, level))
                residual = residual - F.embedding(codes[-1], self.codebook(level))
        return torch.stack(codes, dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `[b, f, q']` to frames `[b, f, d]` by summing code vectors (q' = 0: the mean code vector)."""
        with torch.autocast(codes.device.type, enabled=False):
            total = self._mean_code().expand(*codes.shape[:2], -1)
            for level, column in enumerate(codes.unbind(dim=-1)):
                code = F.embedding(column, self.codebook(level))
                total = code if level == 0 else total + code
            return self._unproject(total)

    def bypass(self, frames: Tensor) -> Tensor:
        """Project frames `[b, f, d]` to the space of the code vectors and back, without quantization."""
        with torch.autocast(frames.device.type, enabled=False):
            return self._unproject(self._project(frames))

    @abstractmethod
    def codebook(self, level: int) -> Tensor:
        """Return the code vectors `[v, codebook_dim]` of a level."""

    def _project(self, frames: Tensor) -> Tensor:
        """Project frames `[..., d]` to the space of the code vectors, `[..., codebook_dim]`."""
        with torch.autocast(frames.device.type, enabled=False):
            return self.rvq.project_in(frames.to(self.codebook(0).dtype)).float()

    def _unproject(self, codes: Tensor) -> Tensor:
        """Project vectors `[..., codebook_dim]` back to frames `[..., d]`, in the precision of the weights."""
        frames: Tensor = self.rvq.project_out(codes.to(self.codebook(0).dtype))
        return frames

    def _mean_code(self) -> Tensor:
        """Mean code vector `[codebook_dim]`, which represents a frame without codes."""
        return self.codebook(0).mean(dim=0)

    @abstractmethod
    def _nearest(self, residual: Tensor, level: int) -> Tensor:
        """Select the codes `[b, f]` int64 of a level for the residual `[b, f, codebook_dim]` of the earlier levels."""

    @abstractmethod
    def _quantize_in_training(self, projected: Tensor, num_levels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize projected frames and update codebooks; return code vectors, codes `[b, f, num_levels]` and loss."""


@typed
def code_usage(codes: Tensor, codebook_size: int) -> dict[str, Tensor]:
    """Compute `usage [q]`, the share of used codes, and `perplexity [q]`, the perplexity divided by the codebook size.

    Negative entries of `codes [..., q]` are ignored.
    """
    check_positive(codebook_size=codebook_size)
    if codes.is_floating_point() or codes.is_complex() or codes.ndim < 1 or not codes.shape[-1]:
        raise ValueError(f"codes must be integers [..., q] with q >= 1, got {described(codes)}")
    if codes.numel() and int(codes.max()) >= codebook_size:
        raise ValueError(f"codes must be below codebook_size={codebook_size}, got {int(codes.max())}")
    levels = rearrange(codes, "... q -> q (...)")
    counts = torch.stack([torch.bincount(level[level >= 0], minlength=codebook_size) for level in levels]).float()
    return usage_of_counts(counts, used_above=0.0)


def usage_of_counts(counts: Tensor, used_above: float) -> dict[str, Tensor]:
    """Compute `usage [q]` and `perplexity [q]` as `code_usage` does, from counts `[q, v]` of the codes."""
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(dim=-1)
    return {"usage": (counts > used_above).float().mean(dim=-1), "perplexity": entropy.exp() / counts.shape[1]}
