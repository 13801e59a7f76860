"""What residual quantizers have in common: their result, their interface, and the loop over levels."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiolm_pytorch.codecs.quantizers.distributed import from_first_process

__all__ = ["FrameQuantizer", "Quantized", "ResidualLevels"]


class Quantized(NamedTuple):
    """What a quantizer makes of frames.

    Attributes:
        frames: Quantized frames `[b, f, d]`; gradients pass straight through.
        codes: `[b, f, q]` int64; -1 where quantizer dropout left a level out.
        loss: What training adds to its loss to keep frames and codes together, a scalar; zero in eval mode.
    """

    frames: Tensor
    codes: Tensor
    loss: Tensor


@runtime_checkable
class FrameQuantizer(Protocol):
    """Frames of a codec to discrete codes and back."""

    @property
    def dim(self) -> int:
        """Width of the frames."""
        ...

    @property
    def num_quantizers(self) -> int:
        """Codes per frame (columns); with groups, levels times groups."""
        ...

    @property
    def codebook_size(self) -> int:
        """Codes to choose from in every column."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-able description from which `from_config` rebuilds the quantizer."""
        ...

    def __call__(self, frames: Tensor) -> Quantized:
        """Frames `[b, f, d]` to their quantized form; in training mode the codes may move."""
        ...

    def bypass(self, frames: Tensor) -> Tensor:
        """Frames `[b, f, d]` through everything but the codes, `[b, f, d]`: what codes can be fitted to."""
        ...

    def encode(self, frames: Tensor) -> Tensor:
        """Codes of frames `[b, f, d]`: `[b, f, q]` int64, coarse level first."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Frames `[b, f, d]` of `codes [b, f, q']`, the first q' columns."""
        ...

    def initialise(self, frames: Tensor) -> None:
        """Fit what the frames `[n, d]` of many batches can tell before training goes on."""
        ...


class ResidualLevels(nn.Module, ABC):
    """A residual quantizer of vector-quantize-pytorch, with the loop over its levels written out.

    Written out, any prefix of the levels decodes, a level that is left out is the same one on every process and in
    every group, and encoding skips what only training needs. All of it runs in float32 whatever autocast says:
    distances in bfloat16 pick other codes.

    Args:
        rvq: Module with `project_in`, `project_out` and `layers`, a layer per level.
        codebook_size: Codes per level.
        config: Constructor arguments of the subclass, with `dim`, `num_quantizers` and `level_dropout`.
    """

    def __init__(self, rvq: nn.Module, codebook_size: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.rvq: Any = rvq
        self.config = config
        self.codebook_size = codebook_size
        self.dim: int = config["dim"]
        self.num_quantizers: int = config["num_quantizers"]
        self.level_dropout: float = config["level_dropout"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ResidualLevels":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, frames: Tensor, num_levels: int | None = None) -> Quantized:
        """Frames `[b, f, d]` to their quantized form; in training mode trailing levels may be left out.

        Args:
            frames: `[b, f, d]`.
            num_levels: Levels to use in training mode, where the caller has drawn them (groups); drawn if not given.
        """
        if not self.training:
            codes = self.encode(frames)
            return Quantized(self.decode(codes), codes, codes.new_zeros((), dtype=torch.float32))
        levels = self.draw_levels(frames.device) if num_levels is None else num_levels
        with torch.autocast(frames.device.type, enabled=False):
            quantized, codes, loss = self._quantize_in_training(self._projected(frames), levels)
            quantized = self.rvq.project_out(quantized)
        return Quantized(quantized, F.pad(codes, (0, self.num_quantizers - levels), value=-1), loss)

    def draw_levels(self, device: torch.device) -> int:
        """Levels that this training batch uses, the same on every process: each level averages over them all."""
        coin, share = from_first_process(torch.rand(2, device=device)).tolist()
        return 1 + int(share * self.num_quantizers) if coin < self.level_dropout else self.num_quantizers

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Nearest codes of frames `[b, f, d]`, level by level: `[b, f, q]` int64."""
        with torch.autocast(frames.device.type, enabled=False):
            residual = self._projected(frames)
            codes = []
            for level in range(self.num_quantizers):
                codes.append(self._nearest(residual, level))
                residual = residual - F.embedding(codes[-1], self.codebook(level))
        return torch.stack(codes, dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Sum of the code vectors of `codes [b, f, q']` (any q' up to all levels), as frames `[b, f, d]`.

        No level at all (a group that a prefix does not reach) gives the mean frame.
        """
        with torch.autocast(codes.device.type, enabled=False):
            total = self._mean_code().expand(*codes.shape[:2], -1)
            for level, column in enumerate(codes.unbind(dim=-1)):
                code = F.embedding(column, self.codebook(level))
                total = code if level == 0 else total + code
            return self.rvq.project_out(total)

    def bypass(self, frames: Tensor) -> Tensor:
        """Frames `[b, f, d]` through the space of the codes and back, without codes."""
        with torch.autocast(frames.device.type, enabled=False):
            return self.rvq.project_out(self._projected(frames))

    @abstractmethod
    def codebook(self, level: int) -> Tensor:
        """Code vectors of a level, `[v, codebook_dim]`."""

    @property
    def codebooks(self) -> Tensor:
        """All code vectors, `[q, v, codebook_dim]`."""
        return torch.stack([self.codebook(level) for level in range(self.num_quantizers)])

    @abstractmethod
    def initialise(self, frames: Tensor) -> None:
        """Fit what the frames `[n, d]` of many batches can tell before training goes on."""

    def _projected(self, frames: Tensor) -> Tensor:
        """Frames `[…, d]` in the space of the codes, `[…, codebook_dim]`."""
        with torch.autocast(frames.device.type, enabled=False):
            return self.rvq.project_in(frames.float())

    def _mean_code(self) -> Tensor:
        """What stands for frames of which no level is known, `[codebook_dim]`."""
        return self.codebook(0).mean(dim=0)

    @abstractmethod
    def _nearest(self, residual: Tensor, level: int) -> Tensor:
        """Codes `[b, f]` int64 of a level that are nearest to what the levels before left over, `[b, f, …]`."""

    @abstractmethod
    def _quantize_in_training(self, inner: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Projected frames to their quantized form, codes `[b, f, levels]` and loss; here the codes may move."""
