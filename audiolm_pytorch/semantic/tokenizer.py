"""Semantic tokens: the nearest k-means centroid of the normalised hidden states of one encoder layer."""

from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.audio.padding import check_waves, checked_lengths, resampled_items
from audiolm_pytorch.nn.kmeans import nearest_centroid
from audiolm_pytorch.saving.fingerprint import digest_of, part_fingerprint
from audiolm_pytorch.saving.modules import build_module, module_spec, register
from audiolm_pytorch.semantic.base import FrameEncoder

__all__ = ["KMeansTokenizer"]

# Frames that are normalised at once: an hour of wide features would be copied twice over otherwise.
_FRAMES_AT_ONCE = 32_768


@register
class KMeansTokenizer(nn.Module):
    """A `SemanticTokenizer` made of a frozen encoder and k-means centroids (AudioLM, arXiv:2209.03143, sec. III-B).

    Hidden states are normalised to zero mean and unit variance per dimension before they are compared, as there. The
    encoder is frozen and always in eval mode, also when this module is a part of one that trains.

    Args:
        encoder: A `FrameEncoder` module; its parameters stop requiring gradients.
        layer: The layer whose hidden states are cut, 0..encoder.depth.
        num_clusters: Number of centroids; may be left out when `centroids` is given.
        centroids: `[k, d]` in normalised space; None = to be loaded, until then the tokenizer refuses to work.
        mean: `[d]` mean of the hidden states; None = 0.
        std: `[d]` standard deviation of the hidden states, positive; None = 1.
        seq_len_multiple_of: Samples at `target_sample_hz` that lengths are cut down to a multiple of; None = no cut.

    Raises:
        TypeError: If the encoder is no `FrameEncoder`.
        ValueError: If shapes or numbers do not fit.
    """

    @beartype
    def __init__(
        self,
        *,
        encoder: nn.Module,
        layer: int,
        num_clusters: int | None = None,
        centroids: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        seq_len_multiple_of: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, FrameEncoder):
            raise TypeError(f"{type(encoder).__name__} is no FrameEncoder: see audiolm_pytorch.semantic.base")
        if not 0 <= layer <= encoder.depth:
            raise ValueError(f"layer must be in 0..{encoder.depth}, got {layer}")
        if seq_len_multiple_of is not None and seq_len_multiple_of < 1:
            raise ValueError(f"seq_len_multiple_of must be at least 1 sample, got {seq_len_multiple_of}")
        num_clusters = _agreed_clusters(num_clusters, centroids)
        shapes = {"centroids": (num_clusters, encoder.dim), "mean": (encoder.dim,), "std": (encoder.dim,)}
        for name, given in (("centroids", centroids), ("mean", mean), ("std", std)):
            if given is not None and (given.shape != shapes[name] or not given.isfinite().all()):
                raise ValueError(f"{name} must be finite {shapes[name]}, got {tuple(given.shape)}")
        if std is not None and not (std > 0).all():
            raise ValueError("std must be positive in every dimension")
        self.layer = layer
        self.seq_len_multiple_of = seq_len_multiple_of
        self.encoder = encoder.eval().requires_grad_(False)
        self.centroids: Tensor
        self.mean: Tensor
        self.std: Tensor
        # NaN marks centroids that are still to be loaded.
        unknown = torch.full(shapes["centroids"], torch.nan)
        self.register_buffer("centroids", unknown if centroids is None else centroids.detach().float().clone())
        self.register_buffer("mean", torch.zeros(encoder.dim) if mean is None else mean.detach().float().clone())
        self.register_buffer("std", torch.ones(encoder.dim) if std is None else std.detach().float().clone())

    @property
    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build this tokenizer, weights and centroids apart."""
        config = {"encoder": module_spec(self.encoder), "layer": self.layer, "num_clusters": self.codebook_size}
        # absent where it says nothing, as in the files of before there was such a thing
        return config | ({"seq_len_multiple_of": self.seq_len_multiple_of} if self.seq_len_multiple_of else {})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "KMeansTokenizer":
        """Build a tokenizer whose weights and centroids are to be loaded."""
        return cls(**{**config, "encoder": build_module(config["encoder"])})

    @property
    def _frames(self) -> FrameEncoder:
        encoder = self.encoder
        if not isinstance(encoder, FrameEncoder):
            raise TypeError(f"{type(encoder).__name__} is no FrameEncoder")
        return encoder

    @property
    def target_sample_hz(self) -> int:
        """Rate of the waves that the tokenizer works on (Hz)."""
        return self._frames.sample_hz

    @property
    def downsample_factor(self) -> int:
        """Samples per token at `target_sample_hz`."""
        return self._frames.downsample_factor

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        return self.centroids.shape[0]

    def fingerprint(self) -> str:
        """Hash of everything that the tokens depend on: encoder, layer, normalisation, centroids, cut of lengths."""
        facts = {
            "encoder": part_fingerprint(self.encoder),
            "layer": self.layer,
            "seq_len_multiple_of": self.seq_len_multiple_of,
        }
        return digest_of(facts, {"centroids": self.centroids, "mean": self.mean, "std": self.std})

    def num_frames(self, num_samples: int) -> int:
        """Tokens that a wave of `num_samples` samples at `target_sample_hz` gives; ValueError when shorter than one."""
        cut_samples = num_samples // self._multiple * self._multiple
        try:
            return self._frames.num_frames(cut_samples)
        except ValueError as error:
            if cut_samples == num_samples:
                raise
            cut = f"{num_samples} samples, cut to a multiple of {self._multiple}"
            raise ValueError(f"{cut}, leave {cut_samples}: {error}") from error

    @property
    def _multiple(self) -> int:
        """Samples that lengths are cut down to a multiple of."""
        return self.seq_len_multiple_of or 1

    def train(self, mode: bool = True) -> "KMeansTokenizer":
        """Stay in eval mode, whatever contains this tokenizer does."""
        return super().train(False)

    def normalised_features(self, wave: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The vectors `[b, t, d]` float32 that are compared with centroids, and the mask `[b, t]` of real tokens."""
        features, mask = self._features(wave, lengths)
        return self._normalised(features), mask

    def _features(self, wave: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states of waves that are cut to whole multiples."""
        if self.seq_len_multiple_of:
            if lengths is not None:
                lengths = checked_lengths(lengths, wave)
                self.num_frames(int(lengths.min()))
                lengths = lengths // self._multiple * self._multiple
            self.num_frames(wave.shape[1])
            wave = wave[:, : wave.shape[1] // self._multiple * self._multiple]
        return self._frames.features(wave, lengths, self.layer)

    def _normalised(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / self.std

    @beartype
    @torch.no_grad()
    def forward(self, wave: Tensor, input_sample_hz: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """Tokenize waves.

        Args:
            wave: `[b, n]`, float.
            input_sample_hz: Rate of `wave` (Hz); resampled when it differs. None = `target_sample_hz`.
            lengths: `[b]` int, samples of `wave` that belong to each item; None = all.

        Returns:
            Ids `[b, t]` int64 in `[0, codebook_size)`, -1 past an item's own `num_frames`. An item gets the same ids
            alone and in a batch.

        Raises:
            ValueError: If shapes or devices do not fit, samples are not finite, or an item is shorter than one token.
            RuntimeError: If no centroids were given or loaded.
        """
        if self.centroids[:1, :1].isnan().any():
            raise RuntimeError(
                "this tokenizer has no centroids yet: make one with KMeansTrainer, or load_module a saved one"
            )
        check_waves(wave, lengths, self.centroids.device)
        if input_sample_hz is not None and input_sample_hz != self.target_sample_hz:
            wave, lengths = resampled_items(wave, input_sample_hz, self.target_sample_hz, lengths)
        features, mask = self._features(wave, lengths)
        parts = rearrange(features, "b t d -> (b t) d").split(_FRAMES_AT_ONCE)
        ids = torch.cat([nearest_centroid(self._normalised(part), self.centroids) for part in parts])
        return rearrange(ids, "(b t) -> b t", b=len(wave)).masked_fill(~mask, -1)


def _agreed_clusters(num_clusters: int | None, centroids: Tensor | None) -> int:
    """The number of clusters that both arguments mean; ValueError when they disagree or say nothing."""
    if centroids is None:
        if num_clusters is None or num_clusters < 1:
            raise ValueError(f"give centroids [k, d], or num_clusters >= 1 to load them into; got {num_clusters}")
        return num_clusters
    if centroids.ndim != 2 or len(centroids) < 1 or num_clusters not in (None, len(centroids)):
        raise ValueError(f"centroids must be [{num_clusters or 'k'}, d], got {tuple(centroids.shape)}")
    return len(centroids)
