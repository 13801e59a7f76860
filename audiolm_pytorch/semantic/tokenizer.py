"""Semantic tokens: the nearest k-means centroid of the normalised hidden states of one encoder layer."""

from typing import Any

import torch
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from audiolm_pytorch.audio import resample
from audiolm_pytorch.io import build_module, fingerprint_of, module_spec, register
from audiolm_pytorch.nearest import nearest_index
from audiolm_pytorch.semantic.protocol import FrameEncoder

__all__ = ["KMeansTokenizer"]


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
    ) -> None:
        super().__init__()
        if not isinstance(encoder, FrameEncoder):
            raise TypeError(f"{type(encoder).__name__} is no FrameEncoder: see audiolm_pytorch.semantic.protocol")
        if not 0 <= layer <= encoder.depth:
            raise ValueError(f"layer must be in 0..{encoder.depth}, got {layer}")
        num_clusters = _agreed_clusters(num_clusters, centroids)
        shapes = {"centroids": (num_clusters, encoder.dim), "mean": (encoder.dim,), "std": (encoder.dim,)}
        for name, given in (("centroids", centroids), ("mean", mean), ("std", std)):
            if given is not None and (given.shape != shapes[name] or not given.isfinite().all()):
                raise ValueError(f"{name} must be finite {shapes[name]}, got {tuple(given.shape)}")
        if std is not None and not (std > 0).all():
            raise ValueError("std must be positive in every dimension")
        self.layer = layer
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
        return {"encoder": module_spec(self.encoder), "layer": self.layer, "num_clusters": self.codebook_size}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "KMeansTokenizer":
        """Build a tokenizer whose weights and centroids are to be loaded."""
        return cls(encoder=build_module(config["encoder"]), layer=config["layer"], num_clusters=config["num_clusters"])

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

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the tokens depend on: encoder, layer, normalisation and centroids."""
        return fingerprint_of(self)

    def num_frames(self, num_samples: int) -> int:
        """Tokens that a wave of `num_samples` samples at `target_sample_hz` gives; ValueError when shorter than one."""
        return self._frames.num_frames(num_samples)

    def train(self, mode: bool = True) -> "KMeansTokenizer":
        """Stay in eval mode, whatever contains this tokenizer does."""
        return super().train(False)

    def normalised_features(self, wave: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The vectors `[b, t, d]` float32 that are compared with centroids, and the mask `[b, t]` of real tokens."""
        features, mask = self._frames.features(wave, lengths, self.layer)
        return (features.float() - self.mean) / self.std, mask

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
            ValueError: If shapes do not fit or an item is shorter than one token.
            RuntimeError: If no centroids were given or loaded.
        """
        if self.centroids[:1, :1].isnan().any():
            raise RuntimeError(
                "this tokenizer has no centroids yet: make one with fit_kmeans, or load_module a saved one"
            )
        if wave.ndim != 2:
            raise ValueError(f"wave must be [b, n], got {tuple(wave.shape)}; mix channels down and add a batch axis")
        if input_sample_hz is not None and input_sample_hz != self.target_sample_hz:
            wave, lengths = self._resampled(wave, input_sample_hz, lengths)
        features, mask = self.normalised_features(wave, lengths)
        ids = nearest_index(rearrange(features, "b t d -> (b t) d"), self.centroids)
        return rearrange(ids, "(b t) -> b t", b=len(wave)).masked_fill(~mask, -1)

    def _resampled(self, wave: Tensor, from_hz: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bring every item to the target rate on its own, so that the filter never sees another item's padding."""
        if from_hz < 1:
            raise ValueError(f"input_sample_hz must be positive, got {from_hz}")
        own = [wave.shape[1]] * len(wave) if lengths is None else [int(length) for length in lengths]
        if len(own) != len(wave) or any(not 0 < length <= wave.shape[1] for length in own):
            raise ValueError(f"lengths must be [{len(wave)}] within 1..{wave.shape[1]}, got {own}")
        items = [
            resample(item[:length], from_hz, self.target_sample_hz) for item, length in zip(wave, own, strict=True)
        ]
        new_lengths = torch.tensor([item.shape[-1] for item in items], device=wave.device)
        return pad_sequence(items, batch_first=True), new_lengths


def _agreed_clusters(num_clusters: int | None, centroids: Tensor | None) -> int:
    """The number of clusters that both arguments mean; ValueError when they disagree or say nothing."""
    if centroids is None:
        if num_clusters is None or num_clusters < 1:
            raise ValueError(f"give centroids [k, d], or num_clusters >= 1 to load them into; got {num_clusters}")
        return num_clusters
    if centroids.ndim != 2 or len(centroids) < 1 or num_clusters not in (None, len(centroids)):
        raise ValueError(f"centroids must be [{num_clusters or 'k'}, d], got {tuple(centroids.shape)}")
    return len(centroids)
