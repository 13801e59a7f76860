"""The interface of frame quantizers, the common part of residual quantizers, and the usage of codes."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.codecs.quantizers.distributed import from_first_process

__all__ = ["FrameQuantizer", "Quantized", "ResidualLevels", "code_usage"]


class Quantized(NamedTuple):
    """Output of a quantizer.

    Attributes:
        frames: Quantized frames `[b, f, d]`; gradients pass straight through.
        codes: `[b, f, q]` int64; -1 where quantizer dropout left a level out.
        loss: Scalar that keeps frames and codes together in training; zero in eval mode.
    """

    frames: Tensor
    codes: Tensor
    loss: Tensor


class FrameQuantizer(nn.Module, ABC):
    """Quantizes the frames of a codec.

    Attributes:
        dim: Width of the frames.
        num_quantizers: Codes per frame (columns); with groups, levels times groups.
        codebook_size: Codes per column.
        num_groups: Parts of a frame with their own codes.
    """

    dim: int
    num_quantizers: int
    codebook_size: int
    num_groups: int = 1

    @abstractmethod
    def forward(self, frames: Tensor, num_levels: int | None = None) -> Quantized:
        """Quantize frames `[b, f, d]`; in training mode this updates codebooks and may leave trailing levels out.

        `num_levels` sets the number of levels in training mode; None draws it at random.
        """

    @abstractmethod
    def bypass(self, frames: Tensor) -> Tensor:
        """Frames `[b, f, d]` through the projections to the space of the codes and back, without codes."""

    @abstractmethod
    def encode(self, frames: Tensor) -> Tensor:
        """Codes `[b, f, q]` int64 of frames `[b, f, d]`, coarse level first."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Frames `[b, f, d]` of codes `[b, f, q']`, the first q' columns."""

    @abstractmethod
    def initialise(self, frames: Tensor) -> None:
        """Fit the codebooks to frames `[n, d]` of many batches."""


class ResidualLevels(FrameQuantizer):
    """A residual quantizer: each level quantizes the residual of the levels before.

    Any prefix of the levels decodes, and level dropout leaves out the same levels on every process and in every group.
    Everything runs in float32 under autocast too, because distances in bfloat16 select other codes.

    Args:
        rvq: Module with `project_in`, `project_out` and one entry per level in `layers`.
        config: Constructor arguments of the subclass, with `dim`, `codebook_size`, `num_quantizers`, `level_dropout`.
    """

    def __init__(self, rvq: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
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
        with torch.autocast(frames.device.type, enabled=False):
            quantized, codes, loss = self._quantize_in_training(self._project(frames), num_levels)
            quantized = self.rvq.project_out(quantized)
        return Quantized(quantized, F.pad(codes, (0, self.num_quantizers - num_levels), value=-1), loss)

    def draw_num_levels(self, device: torch.device) -> int:
        """Draw the number of levels of a training batch; equal on every process."""
        coin, share = from_first_process(torch.rand(2, device=device)).tolist()
        return 1 + int(share * self.num_quantizers) if coin < self.level_dropout else self.num_quantizers

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Codes `[b, f, q]` int64 of frames `[b, f, d]`: the nearest code of each level to its residual."""
        with torch.autocast(frames.device.type, enabled=False):
            residual = self._project(frames)
            codes = []
            for level in range(self.num_quantizers):
                codes.append(self._nearest(residual, level))
                residual = residual - F.embedding(codes[-1], self.codebook(level))
        return torch.stack(codes, dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Frames `[b, f, d]`: the sum of the vectors of codes `[b, f, q']`; the mean frame for q' = 0."""
        with torch.autocast(codes.device.type, enabled=False):
            total = self._mean_code().expand(*codes.shape[:2], -1)
            for level, column in enumerate(codes.unbind(dim=-1)):
                code = F.embedding(column, self.codebook(level))
                total = code if level == 0 else total + code
            return self.rvq.project_out(total)

    def bypass(self, frames: Tensor) -> Tensor:
        """Frames `[b, f, d]` through the projections to the space of the codes and back, without codes."""
        with torch.autocast(frames.device.type, enabled=False):
            return self.rvq.project_out(self._project(frames))

    @abstractmethod
    def codebook(self, level: int) -> Tensor:
        """Code vectors of a level, `[v, codebook_dim]`."""

    def _project(self, frames: Tensor) -> Tensor:
        """Frames `[..., d]` in the space of the codes, `[..., codebook_dim]`."""
        with torch.autocast(frames.device.type, enabled=False):
            return self.rvq.project_in(frames.float())

    def _mean_code(self) -> Tensor:
        """The vector `[codebook_dim]` of a frame without codes."""
        return self.codebook(0).mean(dim=0)

    @abstractmethod
    def _nearest(self, residual: Tensor, level: int) -> Tensor:
        """Codes `[b, f]` int64 of a level for the residual `[b, f, codebook_dim]` of the levels before."""

    @abstractmethod
    def _quantize_in_training(self, projected: Tensor, num_levels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized vectors, codes `[b, f, num_levels]` and loss of projected frames; may update codebooks."""


def code_usage(codes: Tensor, codebook_size: int) -> dict[str, Tensor]:
    """Used share of each codebook (`usage [q]`) and perplexity as a share of its size (`perplexity [q]`), in 0..1.

    Negative entries of `codes [..., q]` are ignored.
    """
    levels = rearrange(codes, "... q -> q (...)")
    counts = torch.stack([torch.bincount(level[level >= 0], minlength=codebook_size) for level in levels]).float()
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1.0)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(dim=-1)
    return {"usage": (counts > 0).float().mean(dim=-1), "perplexity": entropy.exp() / codebook_size}
