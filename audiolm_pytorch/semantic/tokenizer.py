"""Semantic tokenizer whose tokens are the k-means centroids nearest to the hidden states of an encoder layer."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.padding import checked_lengths
from audiolm_pytorch.checks.damage import check_finite
from audiolm_pytorch.checks.tracing import is_traced, split_rows
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.nn.kmeans import nearest_centroid
from audiolm_pytorch.saving.fingerprint import digest_of, part_fingerprint
from audiolm_pytorch.saving.modules import module_spec, register
from audiolm_pytorch.semantic.base import FrameEncoder, SemanticTokenizer

__all__ = ["KMeansTokenizer"]

# Frames that are normalised at a time, since normalising all frames of an hour would copy gigabytes.
_FRAMES_PER_CHUNK = 32_768


@register
class KMeansTokenizer(SemanticTokenizer):
    """Tokenizer with a frozen encoder and k-means centroids of one layer (AudioLM, arXiv:2209.03143, section III-B).

    As in AudioLM, hidden states are first normalised to zero mean and unit variance per dimension.

    Args:
        encoder: Audio encoder; `requires_grad` of its parameters is set to False.
        centroids: Tensor `[k, d]`, compared with normalised hidden states; if None, `forward` raises a RuntimeError
            until centroids are loaded.
        mean: Mean `[d]` of the hidden states; None means 0. The default of the standard deviation `std [d]` is 1.
    """

    @typed
    def __init__(
        self,
        *,
        encoder: FrameEncoder,
        layer: int,
        num_clusters: int | None = None,
        centroids: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        seq_len_multiple_of: int | None = None,
    ) -> None:
        super().__init__()
        encoder.check_layer(layer)
        if seq_len_multiple_of is not None and seq_len_multiple_of < 1:
            raise ValueError(f"seq_len_multiple_of must be at least 1 sample, got {seq_len_multiple_of}")
        if num_clusters is None:
            num_clusters = 0 if centroids is None else len(centroids)
        if num_clusters < 1:
            raise ValueError(f"got {num_clusters} clusters; pass centroids [k, d], or num_clusters of at least 1")
        self.centroids: Tensor
        self.mean: Tensor
        self.std: Tensor
        # NaN marks centroids that are not loaded yet.
        not_loaded = torch.full((num_clusters, encoder.dim), torch.nan)
        defaults = {"centroids": not_loaded, "mean": torch.zeros(encoder.dim), "std": torch.ones(encoder.dim)}
        for (name, default), value in zip(defaults.items(), (centroids, mean, std)):
            if value is not None and (value.shape != default.shape or not value.isfinite().all()):
                shape = tuple(default.shape)
                raise ValueError(f"{name} must be finite and of shape {shape}, got shape {tuple(value.shape)}")
            self.register_buffer(name, default if value is None else value.detach().float().clone())
        if not (self.std > 0).all():
            raise ValueError(f"std must be positive in every dimension, got values down to {self.std.min():g}")
        self.layer = layer
        self.seq_len_multiple_of = seq_len_multiple_of
        self.encoder = encoder.eval().requires_grad_(False)
        self.target_sample_hz, self.downsample_factor = encoder.sample_hz, encoder.downsample_factor
        self.codebook_size = self.num_clusters = num_clusters

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments, without centroids and statistics, which are saved as weights."""
        config = {"encoder": module_spec(self.encoder), "layer": self.layer, "num_clusters": self.codebook_size}
        return config | ({"seq_len_multiple_of": self.seq_len_multiple_of} if self.seq_len_multiple_of else {})

    def fingerprint(self) -> str:
        """Return a hash of encoder, layer, normalisation, centroids and `seq_len_multiple_of`."""
        facts = {
            "encoder": part_fingerprint(self.encoder),
            "layer": self.layer,
            "seq_len_multiple_of": self.seq_len_multiple_of,
        }
        return digest_of(facts, {"centroids": self.centroids, "mean": self.mean, "std": self.std})

    def num_frames(self, num_samples: int) -> int:
        """Return the number of tokens of a wave of `num_samples` samples; raise a ValueError if the number is 0."""
        cut_samples = self.cut_samples(num_samples)
        try:
            return self.encoder.num_frames(cut_samples)
        except ValueError as error:
            if cut_samples == num_samples:
                raise
            raise ValueError(
                f"a wave of {num_samples} samples is cut to {cut_samples} samples, a multiple of "
                f"seq_len_multiple_of={self.seq_len_multiple_of}: {error}"
            ) from error

    @typed
    @torch.no_grad()
    def forward(self, wave: Tensor, input_sample_hz: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """Tokenize waves; see `SemanticTokenizer`."""
        if not is_traced() and self.centroids[:1, :1].isnan().any():
            raise RuntimeError(
                "this tokenizer has no centroids; fit centroids with KMeansTrainer, or load a saved tokenizer"
            )
        wave, lengths = self.checked_waves(wave, input_sample_hz, lengths, self.centroids.device)
        if self.seq_len_multiple_of:
            if lengths is not None:
                lengths = checked_lengths(lengths, wave)
                self.num_frames(int(lengths.min()))
                lengths = lengths - lengths % self.seq_len_multiple_of
            self.num_frames(wave.shape[1])
            wave = wave[:, : self.cut_samples(wave.shape[1])]
        features, mask = self.encoder.features(wave, lengths, self.layer)
        check_finite(features, self, "hidden states of the encoder", mask)
        chunks = split_rows(rearrange(features, "b t d -> (b t) d"), _FRAMES_PER_CHUNK)
        ids = [nearest_centroid((chunk.float() - self.mean) / self.std, self.centroids) for chunk in chunks]
        return rearrange(torch.cat(ids), "(b t) -> b t", b=len(wave)).masked_fill(~mask, -1)
