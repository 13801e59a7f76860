"""Residual vector quantization with learnt codebooks, the default of codecs."""

from typing import Any

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ

from audiolm_pytorch.codecs.quantizers.distributed import from_first_process, joined_sample, sum_over_processes
from audiolm_pytorch.codecs.quantizers.levels import ResidualLevels
from audiolm_pytorch.nn.kmeans import nearest_centroid
from audiolm_pytorch.saving.modules import register

__all__ = ["ResidualQuantizer"]

# A code this many times as long as the residual it stands for has its gradient passed straight through: the rotation
# trick scales the gradient by that ratio, which a silent stretch drives into the thousands.
_LONGEST_ROTATED = 4.0


@register
class ResidualQuantizer(ResidualLevels):
    """Residual VQ in a narrow space (SoundStream, Algorithm 1; narrow codes as in arXiv 2306.06546, section 3.2).

    Codebooks are exponential averages of the frames they attract. They start from k-means over many batches
    (`initialise`), because one batch holds fewer frames than a codebook has codes and would leave most of them dead.
    Start, averages and revival of dead codes are those of one process that holds the frames of all.

    Args:
        dim: Width of the frames.
        codebook_size: Codes per level.
        num_quantizers: Levels.
        codebook_dim: Width of the codes; frames are projected down to it and back.
        decay: Of the exponential averages.
        dead_below_share: A code used less often than this share of a uniform use is replaced by a random frame, and
            its averages start again as if it had been used as often as the mean code.
        level_dropout: Share of the training batches in which trailing levels are left out at random, so that any number
            of levels decodes (0.5 as in arXiv 2306.06546, section 3.4: always would cost quality with all levels).
        expected_frames: Frames in a training batch; only scales the averages that `initialise` starts from.
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
        codebook_dim = codebook_dim or dim
        config: dict[str, Any] = dict(
            dim=dim,
            codebook_size=codebook_size,
            num_quantizers=num_quantizers,
            codebook_dim=codebook_dim,
            decay=decay,
            dead_below_share=dead_below_share,
            level_dropout=level_dropout,
            expected_frames=expected_frames,
        )
        rvq = ResidualVQ(
            dim=dim,
            codebook_dim=codebook_dim,
            codebook_size=codebook_size,
            num_quantizers=num_quantizers,
            decay=decay,
            threshold_ema_dead_code=0,
            rotation_trick=True,
            commitment_weight=0.25,
            sync_codebook=False,
        )
        super().__init__(rvq, codebook_size, config)

    def codebook(self, level: int) -> Tensor:
        """Code vectors of a level, `[v, codebook_dim]`."""
        return self.rvq.layers[level]._codebook.embed[0]

    @torch.no_grad()
    def initialise(self, frames: Tensor, iterations: int = 10) -> None:
        """Start every level from k-means over the residuals of `frames [n, d]`, which should come from many batches.

        Where there are several processes, each brings its own share of the frames; they end with equal codebooks.
        """
        residual = self._projected(frames)
        for level, layer in enumerate(self.rvq.layers):
            codebook, counts = _kmeans(residual, self.codebook_size, iterations)
            # the running averages start as if a typical batch had just been seen
            counts = counts * (self.config["expected_frames"] / counts.sum())
            state = layer._codebook
            for start, value in (
                (state.embed, codebook),
                (state.cluster_size, counts),
                (state.embed_avg, codebook * counts[:, None]),
            ):
                from_first_process(start.copy_(value[None]))
            residual = residual - F.embedding(nearest_centroid(residual, self.codebook(level)), self.codebook(level))

    def _mean_code(self) -> Tensor:
        state = self.rvq.layers[0]._codebook
        return state.embed_avg[0].sum(dim=0) / state.cluster_size[0].sum().clamp(min=1e-6)

    def _nearest(self, residual: Tensor, level: int) -> Tensor:
        index = nearest_centroid(rearrange(residual, "b f d -> (b f) d"), self.codebook(level))
        return rearrange(index, "(b f) -> b f", b=residual.shape[0])

    def _quantize_in_training(self, inner: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
        residual, total, loss, codes = inner, torch.zeros_like(inner), inner.new_zeros(()), []
        for layer in self.rvq.layers[:levels]:
            # a group of processes may have formed since the layer was made, which is when it looked for one
            layer._codebook.all_reduce_fn = sum_over_processes
            # the layer moves its codes as soon as it has chosen
            codebook = layer._codebook.embed[0].clone()
            rotated, index, commitment = layer(residual)
            code = F.embedding(index, codebook)
            is_steep = code.norm(dim=-1, keepdim=True) > _LONGEST_ROTATED * residual.norm(dim=-1, keepdim=True)
            through = torch.where(is_steep, residual, rotated)
            total = total + through + (code - through).detach()
            self._revive(layer._codebook, residual.detach())
            residual = residual - code
            loss = loss + commitment
            codes.append(index)
        return total, torch.stack(codes, dim=-1), loss

    @torch.no_grad()
    def _revive(self, state: Any, frames: Tensor) -> None:
        """Put dead codes where frames are, with averages that let them live until they have had their chance."""
        uses = state.cluster_size[0]
        uniform_use = uses.mean()
        dead = (uses < self.config["dead_below_share"] * uniform_use).nonzero().flatten()
        if len(dead) == 0:
            return
        fresh = joined_sample(rearrange(frames, "b f d -> (b f) d"), len(dead))
        dead = dead[: len(fresh)]
        state.embed[0, dead] = fresh
        state.embed_avg[0, dead] = fresh * uniform_use
        uses[dead] = uniform_use


def _kmeans(points: Tensor, num_clusters: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random points; an empty cluster restarts at a random point."""
    start = joined_sample(points, num_clusters)
    centroids = start.repeat(-(-num_clusters // len(start)), 1)[:num_clusters]
    for _ in range(iterations):
        index = nearest_centroid(points, centroids)
        counts = _joined_counts(index, num_clusters)
        sums = sum_over_processes(torch.zeros_like(centroids).index_add_(0, index, points))
        centroids = sums / counts.clamp(min=1.0)[:, None]
        empty = (counts == 0).nonzero().flatten()
        fresh = joined_sample(points, len(empty))
        centroids[empty[: len(fresh)]] = fresh
    return centroids, _joined_counts(nearest_centroid(points, centroids), num_clusters)


def _joined_counts(index: Tensor, num_clusters: int) -> Tensor:
    return sum_over_processes(torch.bincount(index, minlength=num_clusters).float())
