"""Residual vector quantization with learnt codebooks, the default quantizer of codecs."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.quantizers.base import ResidualLevels
from audiolm_pytorch.codecs.quantizers.distributed import distributed_sample, from_first_process, sum_over_processes
from audiolm_pytorch.nn.kmeans import nearest_centroid
from audiolm_pytorch.nn.module_state import check_positive, check_shares
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.modules import constructor_arguments, register

__all__ = ["ResidualQuantizer"]

# Ratio of code length to residual length above which gradients are straight-through. The rotation trick scales the
# gradient by this ratio, which can be thousands in silence.
_MAX_ROTATED_RATIO = 4.0


class _Codebook(nn.Module):
    """A codebook, with exponential averages of the number and the sum of the frames that select each code."""

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__()
        embed = nn.init.kaiming_uniform_(torch.empty(1, codebook_size, dim))
        self.register_buffer("initted", torch.tensor(True))
        self.register_buffer("cluster_size", torch.ones(1, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("embed", embed)

    def revive(self, frames: Tensor, dead_below_share: float) -> None:
        """Replace rarely used codes by random rows of `frames [n, d]`; set their use counts to the mean use count."""
        uses = self.cluster_size[0]
        uniform_use = uses.mean()
        dead = (uses < dead_below_share * uniform_use).nonzero().flatten()
        if len(dead) == 0:
            return
        fresh = distributed_sample(frames, len(dead))
        dead = dead[: len(fresh)]
        self.embed[0, dead] = fresh
        self.embed_avg[0, dead] = fresh * uniform_use
        uses[dead] = uniform_use


class _Levels(nn.Module):
    """Projections and codebooks, in the layout of `vector_quantize_pytorch.ResidualVQ`, which saved codecs use.

    The package vector-quantize-pytorch trains the codebooks (`trained_layers`). Loading a codec does not import
    vector-quantize-pytorch, because the import takes a second.
    """

    def __init__(self, dim: int, codebook_dim: int, codebook_size: int, num_quantizers: int) -> None:
        super().__init__()
        has_projections = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if has_projections else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if has_projections else nn.Identity()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"_codebook": _Codebook(codebook_size, codebook_dim)}) for _ in range(num_quantizers)
        )
        self._trained_layers: tuple[Any, ...] = ()  # a tuple is not registered, because the state is in `layers`

    def trained_layers(self, decay: float) -> tuple[Any, ...]:
        """Return one `VectorQuantize` per level; each trains the codebook of its level in `layers`, not a copy."""
        if not self._trained_layers:
            from vector_quantize_pytorch import VectorQuantize

            codebook_size, dim = self.layers[0].get_buffer("_codebook.embed").shape[1:]
            with preserve_rng():
                self._trained_layers = tuple(
                    VectorQuantize(
                        dim=dim,
                        codebook_size=codebook_size,
                        decay=decay,
                        threshold_ema_dead_code=0,
                        rotation_trick=True,
                        commitment_weight=0.25,
                        sync_codebook=False,
                    )
                    for _ in self.layers
                )
        for layer, trained in zip(self.layers, self._trained_layers):
            trained.train()
            # The tensors can have moved to another device since the last step.
            trained._codebook._buffers.update(layer.get_submodule("_codebook")._buffers)
            trained._codebook.all_reduce_fn = sum_over_processes
        return self._trained_layers


@register
class ResidualQuantizer(ResidualLevels):
    """Residual vector quantizer (SoundStream, Algorithm 1) of projected frames (arXiv 2306.06546, section 3.2).

    Each code vector is an exponential average of the frames nearest to it. Codebooks are initialised by k-means over
    many batches (`initialise`), because one batch can have fewer frames than a codebook has codes. K-means, averages
    and the replacement of unused codes use the frames of all processes.

    Args:
        codebook_dim: Width of the code vectors; frames are projected to this width and back.
        decay: Decay of the exponential averages.
        dead_below_share: A random frame replaces a code whose use count is below this share of the mean use count.
        level_dropout: Share of the training batches in which a random number of the last levels is skipped (0.5 in
            arXiv 2306.06546, section 3.4), so that any number of levels can be decoded; a share of 1 would reduce the
            quality of waves that are decoded from all levels.
        expected_frames: Number of frames in a training batch; `initialise` sets the sum of use counts to this number.
    """

    @typed
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
        codebook_dim = dim if codebook_dim is None else codebook_dim
        check_positive(dim=dim, codebook_size=codebook_size, num_quantizers=num_quantizers, codebook_dim=codebook_dim)
        check_positive(expected_frames=expected_frames)
        check_shares(decay=decay, dead_below_share=dead_below_share, level_dropout=level_dropout)
        config = constructor_arguments(locals())
        super().__init__(_Levels(dim, codebook_dim, codebook_size, num_quantizers), config)

    def codebook(self, level: int) -> Tensor:
        """Return the code vectors `[v, codebook_dim]` of a level."""
        return self.rvq.layers[level]._codebook.embed[0]

    @torch.no_grad()
    def initialise(self, frames: Tensor, iterations: int = 10) -> None:
        """Set every codebook by k-means over the residuals of frames `[n, d]` from many batches.

        With several processes, each process passes different frames; afterwards all processes have equal codebooks.
        """
        residual = self._project(frames)
        for level, layer in enumerate(self.rvq.layers):
            centroids, counts = _kmeans(residual, self.codebook_size, iterations)
            # The averages start as they are after a typical batch.
            counts = counts * (self.config["expected_frames"] / counts.sum())
            codebook = layer._codebook
            from_first_process(codebook.embed.copy_(centroids[None]))
            from_first_process(codebook.cluster_size.copy_(counts[None]))
            from_first_process(codebook.embed_avg.copy_((centroids * counts[:, None])[None]))
            residual = residual - F.embedding(nearest_centroid(residual, self.codebook(level)), self.codebook(level))

    def _mean_code(self) -> Tensor:
        codebook = self.rvq.layers[0]._codebook
        return codebook.embed_avg[0].sum(dim=0) / codebook.cluster_size[0].sum().clamp(min=1e-6)

    def _nearest(self, residual: Tensor, level: int) -> Tensor:
        index = nearest_centroid(rearrange(residual, "b f d -> (b f) d"), self.codebook(level))
        return rearrange(index, "(b f) -> b f", b=residual.shape[0])

    def _quantize_in_training(self, projected: Tensor, num_levels: int) -> tuple[Tensor, Tensor, Tensor]:
        residual, total, loss, codes = projected, torch.zeros_like(projected), projected.new_zeros(()), []
        trained_layers = self.rvq.trained_layers(self.config["decay"])
        for layer, trained in zip(self.rvq.layers[:num_levels], trained_layers):
            codebook = layer["_codebook"].embed[0].clone()  # the layer moves its codes after it has selected them
            rotated, index, commitment_loss = trained(residual)
            code = F.embedding(index, codebook)
            is_steep = code.norm(dim=-1, keepdim=True) > _MAX_ROTATED_RATIO * residual.norm(dim=-1, keepdim=True)
            passed = torch.where(is_steep, residual, rotated)
            total = total + passed + (code - passed).detach()
            with torch.no_grad():
                frames = rearrange(residual, "b f d -> (b f) d")
                layer["_codebook"].revive(frames, self.config["dead_below_share"])
            loss = loss + commitment_loss
            residual = residual - code
            codes.append(index)
        return total, torch.stack(codes, dim=-1), loss


def _kmeans(points: Tensor, num_clusters: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Compute centroids and cluster sizes by Lloyd's algorithm; an empty cluster restarts at a random point."""
    start = distributed_sample(points, num_clusters)
    centroids = start.repeat(-(-num_clusters // len(start)), 1)[:num_clusters]
    for _ in range(iterations):
        index = nearest_centroid(points, centroids)
        counts = _counts(index, num_clusters)
        sums = sum_over_processes(torch.zeros_like(centroids).index_add_(0, index, points))
        centroids = sums / counts.clamp(min=1.0)[:, None]
        empty = (counts == 0).nonzero().flatten()
        fresh = distributed_sample(points, len(empty))
        centroids[empty[: len(fresh)]] = fresh
    return centroids, _counts(nearest_centroid(points, centroids), num_clusters)


def _counts(index: Tensor, num_clusters: int) -> Tensor:
    return sum_over_processes(torch.bincount(index, minlength=num_clusters).float())
