"""Group-residual quantization: frames cut into parts, each with a residual quantizer of its own (arXiv 2305.02765)."""

from collections.abc import Sequence
from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.codecs.quantizers.levels import Quantized, ResidualLevels
from audiolm_pytorch.saving.modules import build_module, module_spec, register

__all__ = ["GroupedQuantizer"]


@register
class GroupedQuantizer(nn.Module):
    """Several residual quantizers side by side, each for its own part of the frame.

    The codes run level by level, all groups of level 1 first, so that any prefix of the columns is a coarser version of
    the same frames; it may end inside a level.

    Args:
        quantizers: One for every part, in order; all with as many levels and codes.

    Raises:
        ValueError: If there are none, or they differ in levels or codes.
    """

    @beartype
    def __init__(self, *, quantizers: Sequence[ResidualLevels]) -> None:
        super().__init__()
        shapes = sorted({(part.num_quantizers, part.codebook_size) for part in quantizers})
        if len(shapes) != 1:
            raise ValueError(
                f"groups need as many levels and codes each, got (levels, codes) of {shapes or 'no group'}"
            )
        self.quantizers = nn.ModuleList(quantizers)
        self.widths = [part.dim for part in quantizers]
        self.dim = sum(self.widths)
        self.num_groups = len(quantizers)
        self.num_quantizers = len(quantizers) * shapes[0][0]
        self.codebook_size = shapes[0][1]

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-able description from which `from_config` rebuilds this quantizer."""
        return {"quantizers": [module_spec(part) for part in self.quantizers]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GroupedQuantizer":
        """Build from the dictionary that `config` holds."""
        parts: list[Any] = [build_module(spec) for spec in config["quantizers"]]
        return cls(quantizers=parts)

    def forward(self, frames: Tensor) -> Quantized:
        """Frames `[b, f, d]` to their quantized form; in training all groups leave the same levels out."""
        levels = self._parts[0].draw_levels(frames.device) if self.training else None
        parts = [part(piece, levels) for part, piece in zip(self._parts, self._pieces(frames))]
        quantized, codes, losses = zip(*parts)
        return Quantized(torch.cat(quantized, dim=-1), _interleaved(codes), torch.stack(losses).mean())

    def bypass(self, frames: Tensor) -> Tensor:
        """Frames `[b, f, d]` through the space of the codes and back, without codes."""
        return torch.cat([part.bypass(piece) for part, piece in zip(self._parts, self._pieces(frames))], dim=-1)

    def encode(self, frames: Tensor) -> Tensor:
        """Codes of frames `[b, f, d]`, level by level and in each level group by group: `[b, f, q]` int64."""
        return _interleaved([part.encode(piece) for part, piece in zip(self._parts, self._pieces(frames))])

    def decode(self, codes: Tensor) -> Tensor:
        """Frames `[b, f, d]` of `codes [b, f, q']`; a group without any of its levels gives its mean."""
        groups = len(self.widths)
        return torch.cat([part.decode(codes[..., group::groups]) for group, part in enumerate(self._parts)], dim=-1)

    def initialise(self, frames: Tensor) -> None:
        """Fit every group to its part of `frames [n, d]`."""
        for part, piece in zip(self._parts, self._pieces(frames)):
            part.initialise(piece)

    def _pieces(self, frames: Tensor) -> tuple[Tensor, ...]:
        return frames.split(self.widths, dim=-1)

    @property
    def _parts(self) -> list[Any]:
        return list(self.quantizers)


def _interleaved(codes: Sequence[Tensor]) -> Tensor:
    return rearrange(torch.stack(list(codes), dim=-1), "b f l g -> b f (l g)")
