"""musicnn: a tagger of music with published weights, used as an independent embedding and classifier of clips.

Pons et al., "End-to-end learning for music audio tagging at scale" (arXiv:1711.02520); Pons & Serra, "musicnn"
(arXiv:1909.06654). The weights are under the ISC licence, see the README in `bundled/musicnn`.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from audiolm_pytorch.audio.mel import mel_edges, triangular_filters
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import load_module, register
from musiclm_pytorch.evaluation.metric import Extractor

__all__ = ["MusicNN", "MusicNNExtractor", "bundled_musicnn"]

_SAMPLE_HZ, _N_FFT, _HOP_SAMPLES, _NUM_MELS = 16_000, 512, 256, 96
_WINDOW_FRAMES = 187
_EPS = 1e-3
# Channels and kernels (frames, mel bands) of the front end: two timbral and three temporal convolutions.
_FRONT = ((204, (7, 38)), (204, (7, 67)), (51, (128, 1)), (51, (64, 1)), (51, (32, 1)))
_MIDDLE_CHANNELS, _DIM = 64, 200


class _FrontConv(nn.Module):
    """Convolution of spectrograms `[b, 1, f, m]`, ReLU, batch norm, and the maximum over the mel bands, `[b, c, f]`."""

    def __init__(self, out_channels: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.padding = (0, 0, (kernel[0] - 1) // 2, kernel[0] // 2)
        self.conv = nn.Conv2d(1, out_channels, kernel)
        self.norm = nn.BatchNorm1d(out_channels, eps=_EPS)

    def forward(self, mels: Tensor) -> Tensor:
        active = F.relu(self.conv(F.pad(mels, self.padding)), inplace=True)
        # The maximum after batch norm is that of the minimum where the weight is negative; this order is faster.
        rises = rearrange(self.norm.weight > 0, "c -> c 1")
        return self.norm(torch.where(rises, active.amax(dim=3), active.amin(dim=3)))


class _MiddleConv(nn.Module):
    """Convolution over 7 frames of `[b, c, f]`, ReLU and batch norm."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, _MIDDLE_CHANNELS, 7, padding=3)
        self.norm = nn.BatchNorm1d(_MIDDLE_CHANNELS, eps=_EPS)

    def forward(self, frames: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(frames)))


@register
class MusicNN(nn.Module):
    """Convolutional network that predicts tags of music from log-mel spectrograms of 3 s."""

    filters: Tensor

    @typed
    def __init__(self, *, tags: Sequence[str]) -> None:
        super().__init__()
        self.tags = list(tags)
        self.config: dict[str, Any] = {"tags": self.tags}
        edges_hz = mel_edges(0.0, _SAMPLE_HZ / 2, _NUM_MELS, scale="slaney")
        filters = triangular_filters(edges_hz, _SAMPLE_HZ, _N_FFT) * (2 / (edges_hz[2:] - edges_hz[:-2]))[:, None]
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)
        self.input_norm = nn.BatchNorm2d(1, eps=_EPS)
        self.front = nn.ModuleList(_FrontConv(channels, kernel) for channels, kernel in _FRONT)
        num_front = sum(channels for channels, _ in _FRONT)
        self.middle = nn.ModuleList(_MiddleConv(size) for size in (num_front, _MIDDLE_CHANNELS, _MIDDLE_CHANNELS))
        num_pooled = 2 * (num_front + 3 * _MIDDLE_CHANNELS)
        self.pooled_norm = nn.BatchNorm1d(num_pooled, eps=_EPS)
        self.dense = nn.Linear(num_pooled, _DIM)
        self.dense_norm = nn.BatchNorm1d(_DIM, eps=_EPS)
        self.output = nn.Linear(_DIM, len(self.tags))

    def log_mels(self, waves: Tensor) -> Tensor:
        """Compute the input `[b, f, 96]` of the network from waves `[b, n]` at 16 kHz."""
        window = torch.hann_window(_N_FFT, device=waves.device)
        padded = F.pad(waves.float(), (_N_FFT // 2, _N_FFT // 2), mode="reflect")
        spectrum = torch.stft(padded, _N_FFT, _HOP_SAMPLES, window=window, center=False, return_complex=True)
        energies = self.filters.float() @ spectrum.abs().square()
        return rearrange((10_000 * energies + 1).log10(), "b m f -> b f m")

    def forward(self, log_mels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute embeddings `[b, 200]` and tag probabilities `[b, tags]` of spectrograms `[b, 187, 96]`."""
        mels = self.input_norm(rearrange(log_mels.to(self.dense.weight.dtype), "b f m -> b 1 f m"))
        front = torch.cat([conv(mels) for conv in self.front], dim=1)
        first = self.middle[0](front)
        second = first + self.middle[1](first)
        third = second + self.middle[2](second)
        states = torch.cat([front, first, second, third], dim=1)
        pooled = torch.stack([states.amax(dim=2), states.mean(dim=2)], dim=2).flatten(1)
        embeddings = self.dense_norm(F.relu(self.dense(self.pooled_norm(pooled))))
        return embeddings, self.output(embeddings).sigmoid()

    @torch.no_grad()
    def window_features(self, waves: Tensor) -> tuple[Tensor, Tensor]:
        """Compute embeddings `[b, w, 200]` and tag probabilities `[b, w, tags]` of windows of 3 s of waves `[b, n]`.

        The w windows cover the whole wave and overlap as little as possible. A shorter wave is repeated.
        """
        frames = self.log_mels(waves)
        num_frames = frames.shape[1]
        if num_frames < _WINDOW_FRAMES:
            frames = frames.repeat(1, -(-_WINDOW_FRAMES // num_frames), 1)[:, :_WINDOW_FRAMES]
            num_frames = _WINDOW_FRAMES
        num_windows = -(-num_frames // _WINDOW_FRAMES)
        starts = torch.linspace(0, num_frames - _WINDOW_FRAMES, num_windows).round().long().tolist()
        windows = torch.stack([frames[:, start : start + _WINDOW_FRAMES] for start in starts], dim=1)
        embeddings, tags = self(windows.flatten(0, 1))
        return embeddings.unflatten(0, windows.shape[:2]), tags.unflatten(0, windows.shape[:2])


def bundled_musicnn() -> MusicNN:
    """Load the included musicnn, trained on MagnaTagATune."""
    network = load_module(Path(str(files("musiclm_pytorch") / "bundled" / "musicnn")), expect=MusicNN)
    return network.requires_grad_(False)  # type: ignore[return-value]


class MusicNNExtractor(Extractor):
    """Embeddings and tags of musicnn as features `[b, w, 200 + tags]` of w windows."""

    name, sample_hz, windows = "musicnn", _SAMPLE_HZ, "windows of 3 s"
    # The reflection at the ends of the wave needs more samples than half a Fourier transform.
    min_seconds = 0.05

    @typed
    def __init__(self, network: MusicNN | None = None) -> None:
        self.network = bundled_musicnn() if network is None else network

    def __call__(self, waves: Tensor) -> Tensor:
        """Compute features `[b, w, 200 + tags]` of waves `[b, n]`."""
        return torch.cat(self.network.window_features(waves.to(self.network.filters.device)), dim=2)

    def fingerprint(self) -> str:
        """Hash of the weights."""
        return fingerprint_of(self.network)

    def embeddings(self, features: Tensor) -> Tensor:
        """Return the embeddings `[w, 200]` of the windows of a clip."""
        return features[:, :_DIM]

    def tags(self, features: Tensor) -> Tensor:
        """Return the mean tag probabilities `[tags]` over the windows of a clip."""
        return features[:, _DIM:].mean(dim=0)

    def posteriors(self, features: Tensor) -> Tensor:
        """Return the tag probabilities of a clip, scaled to sum 1."""
        tags = self.tags(features)
        return tags / tags.sum()
