"""Residual vector quantization for codecs: vector-quantize-pytorch trains the codebooks, a short loop uses them."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ

from audiolm_pytorch.io import register
from audiolm_pytorch.nearest import nearest_index

__all__ = ["Quantized", "ResidualQuantizer", "code_usage"]


class Quantized(NamedTuple):
    """What a quantizer makes of frames.

    Attributes:
        frames: Quantized frames `[b, f, d]`; gradients pass straight through.
        codes: `[b, f, q]` int64; -1 where quantizer dropout left a level out.
        loss: Commitment loss, a scalar.
    """

    frames: Tensor
    codes: Tensor
    loss: Tensor


def code_usage(codes: Tensor, codebook_size: int) -> dict[str, Tensor]:
    """Share of the codes in use and perplexity (as a share of the codebook) of every level.

    Args:
        codes: `[..., q]` int64; negative entries are left out.
        codebook_size: Codes per level.

    Returns:
        `usage [q]` and `perplexity [q]`, each in 0..1.
    """
    levels = rearrange(codes, "... q -> q (...)")
    counts = torch.stack([torch.bincount(level[level >= 0], minlength=codebook_size) for level in levels]).float()
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1.0)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(dim=-1)
    return {"usage": (counts > 0).float().mean(dim=-1), "perplexity": entropy.exp() / codebook_size}


@register
class ResidualQuantizer(nn.Module):
    """Residual VQ in a narrow space (SoundStream, Algorithm 1; narrow codes as in arXiv 2306.06546, section 3.2).

    Codebooks are exponential averages of the frames they attract. They start from k-means over many batches
    (`initialise`), because one batch holds fewer frames than a codebook has codes and would leave most of them dead.

    Args:
        dim: Width of the frames.
        codebook_size: Codes per level.
        num_quantizers: Levels.
        codebook_dim: Width of the codes; frames are projected down to it and back.
        decay: Of the exponential averages.
        dead_below_share: A code used less often than this share of a uniform use is replaced by a random frame.
        level_dropout: Share of the training batches in which trailing levels are left out at random, so that any number
            of levels decodes (0.5 as in arXiv 2306.06546, section 3.4: always would cost quality with all levels).
        expected_frames: Frames in a training batch; only scales `dead_below_share`.
    """

    @beartype
    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int = 1024,
        num_quantizers: int = 8,
        codebook_dim: int | None = None,
        decay: float = 0.95,
        dead_below_share: float = 0.1,
        level_dropout: float = 0.5,
        expected_frames: int = 1600,
    ) -> None:
        super().__init__()
        codebook_dim = codebook_dim or dim
        self.config: dict[str, Any] = dict(
            dim=dim,
            codebook_size=codebook_size,
            num_quantizers=num_quantizers,
            codebook_dim=codebook_dim,
            decay=decay,
            dead_below_share=dead_below_share,
            level_dropout=level_dropout,
            expected_frames=expected_frames,
        )
        self.dim, self.codebook_size, self.num_quantizers = dim, codebook_size, num_quantizers
        self.level_dropout = level_dropout
        self.rvq = ResidualVQ(
            dim=dim,
            codebook_dim=codebook_dim,
            codebook_size=codebook_size,
            num_quantizers=num_quantizers,
            quantize_dropout=level_dropout > 0,
            decay=decay,
            threshold_ema_dead_code=dead_below_share * expected_frames / codebook_size,
            rotation_trick=True,
            commitment_weight=0.25,
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ResidualQuantizer":
        """Build from the dictionary that `config` holds."""
        return cls(**config)

    def forward(self, frames: Tensor) -> Quantized:
        """Frames `[b, f, d]` to their quantized form; updates the codebooks in training mode."""
        self.rvq.quantize_dropout = self.training and self._draws_dropout(frames.device)
        with torch.autocast(frames.device.type, enabled=False):
            quantized, codes, losses = self.rvq(frames.float())
        return Quantized(quantized, codes, losses.sum())

    def _draws_dropout(self, device: torch.device) -> bool:
        """Whether this batch leaves levels out: the same on every process, since each level averages over them all."""
        return bool(_from_first_process(torch.rand((), device=device)) < self.level_dropout)

    @property
    def codebooks(self) -> Tensor:
        """All codebooks, `[q, v, codebook_dim]`."""
        return self.rvq.codebooks

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Nearest codes of frames `[b, f, d]`, level by level: `[b, f, q]` int64."""
        residual = self._projected(frames)
        codes = []
        for codebook in self.codebooks:
            index = nearest_index(rearrange(residual, "b f d -> (b f) d"), codebook)
            index = rearrange(index, "(b f) -> b f", b=residual.shape[0])
            residual = residual - F.embedding(index, codebook)
            codes.append(index)
        return torch.stack(codes, dim=-1)

    def _projected(self, frames: Tensor) -> Tensor:
        """Frames in the codes' space, float32 whatever autocast says: distances in bf16 pick other codes."""
        with torch.autocast(frames.device.type, enabled=False):
            return self.rvq.project_in(frames.float())

    def decode(self, codes: Tensor) -> Tensor:
        """Sum of the code vectors of `codes [b, f, q']` (any q' up to all levels), projected to frames `[b, f, d]`."""
        total = sum(F.embedding(level, book) for level, book in zip(codes.unbind(dim=-1), self.codebooks))
        return self.rvq.project_out(total)

    @torch.no_grad()
    def initialise(self, frames: Tensor, iterations: int = 10) -> None:
        """Start every level from k-means over the residuals of `frames [n, d]`, which should come from many batches."""
        residual = self._projected(frames)
        for layer in self.rvq.layers:
            codebook, counts = _kmeans(residual, self.codebook_size, iterations)
            state = layer._codebook
            state.embed.copy_(codebook[None])
            # the running averages start as if a typical batch had just been seen
            counts = counts * (self.config["expected_frames"] / counts.sum())
            state.cluster_size.copy_(counts[None])
            state.embed_avg.copy_((codebook * counts[:, None])[None])
            # the averages that follow are taken over all processes, which must start from the same codes
            for start in (state.embed, state.cluster_size, state.embed_avg):
                _from_first_process(start)
            codebook = state.embed[0]
            residual = residual - F.embedding(nearest_index(residual, codebook), codebook)


def _from_first_process(tensor: Tensor) -> Tensor:
    """The tensor, holding on every process what it holds on the first."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return tensor


def _kmeans(points: Tensor, num_clusters: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random points; an empty cluster restarts at a random point."""
    order = torch.randperm(len(points))
    centroids = points[order.repeat(-(-num_clusters // len(points)))[:num_clusters]].clone()
    for _ in range(iterations):
        index = nearest_index(points, centroids)
        counts = torch.bincount(index, minlength=num_clusters).float()
        centroids = torch.zeros_like(centroids).index_add_(0, index, points) / counts.clamp(min=1.0)[:, None]
        empty = counts == 0
        centroids[empty] = points[torch.randint(len(points), (int(empty.sum()),))]
    return centroids, torch.bincount(nearest_index(points, centroids), minlength=num_clusters).float()
