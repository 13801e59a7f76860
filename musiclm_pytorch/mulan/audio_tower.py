"""MuLan's audio tower: a transformer over patches of log spectrograms, for clips of any length."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from audiolm_pytorch.audio.padding import checked_lengths, length_mask
from audiolm_pytorch.audio.waves import mono_waves
from audiolm_pytorch.checks.types import keep_arguments, typed
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.nn.positions import WavePositionBias
from audiolm_pytorch.nn.transformer import build_encoder
from audiolm_pytorch.saving.modules import SavedModule, constructor_arguments, register
from musiclm_pytorch.mulan.layers import pooled_layers
from musiclm_pytorch.mulan.spectrogram import SpecAugment, log_spectrogram

__all__ = ["AudioSpectrogramTransformer"]


@register
class AudioSpectrogramTransformer(SavedModule):
    """Embeds a clip as the mean of the outputs of a transformer, whose tokens are patches of the log spectrogram.

    The architecture is AST (arXiv:2104.01778) as in MuLan (arXiv:2208.12415, sec. 3.1), but for clips of any length.
    Rotary positions encode the time of a patch, and a learned embedding encodes the frequency band of a patch. A
    learned attention bias depends on the distance of two patches in time and frequency. Clips shorter than a patch are
    padded. The default spectrogram is MuLan's: 128 mel bands, windows of 25 ms every 10 ms.

    Args:
        patch_size: Side of a square patch, in bins and in frames.
        patch_stride: Bins and frames from one patch to the next; 10 in AST; None = `patch_size`, without overlap.
        num_mels: Number of mel bands; None = the linear bins of the Fourier transform; "auto" = 128, or None if only
            `spec_n_fft` is set.
        spec_n_fft: Length of the Fourier transform in samples; None = 64 ms.
        spec_win_length: Length of the window in samples; None = `spec_n_fft` if it is set, else 25 ms.
        spec_hop_length: Samples from one frame to the next; None = 2/5 of the window, which is 10 ms for 25 ms.
        spec_aug_stretch_factor: In training, the speed of each clip is drawn between this factor and its inverse;
            1 = off, which is needed if captions distinguish fast and slow music.
        spec_aug_freq_mask: In training, up to this fraction of frequency bins is masked; 0 = off.
        spec_aug_time_mask: In training, up to this fraction of frames is masked; 0 = off.
        patch_dropout: Fraction of patches that are left out in training, which saves time (arXiv:2212.00794).
        position_waves: Number of waves per head in the attention bias (`WavePositionBias`); 0 = no bias.
    """

    @typed
    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        patch_size: int = 16,
        patch_stride: int | None = None,
        sample_hz: int = 16_000,
        num_mels: int | Literal["auto"] | None = "auto",
        spec_n_fft: int | None = None,
        spec_win_length: int | None = None,
        spec_hop_length: int | None = None,
        spec_aug_stretch_factor: float = 1.0,
        spec_aug_freq_mask: float = 0.0,
        spec_aug_time_mask: float = 0.0,
        patch_dropout: float = 0.0,
        position_waves: int = 8,
        ff_mult: int = 4,
        dropout: float = 0.0,
    ) -> None:
        self.config = constructor_arguments(locals())
        super().__init__()
        check_positive(dim=dim, patch_size=patch_size)
        stride = patch_size if patch_stride is None else patch_stride
        if not (1 <= stride <= patch_size and sample_hz >= 1 and position_waves >= 0):
            raise ValueError(
                "need 1 <= patch_stride <= patch_size, sample_hz >= 1 and position_waves >= 0, got patch_stride "
                f"{stride}, patch_size {patch_size}, sample_hz {sample_hz}, position_waves {position_waves}"
            )
        if not 0 <= patch_dropout < 1:
            raise ValueError(f"patch_dropout must be in [0, 1), got {patch_dropout}")
        self.dim, self.depth, self.sample_hz = dim, depth, sample_hz
        self.patch_size, self.patch_stride, self.patch_dropout = patch_size, stride, float(patch_dropout)
        self.spectrogram = log_spectrogram(sample_hz, num_mels, spec_n_fft, spec_win_length, spec_hop_length)
        self.augment = SpecAugment(float(spec_aug_stretch_factor), float(spec_aug_freq_mask), float(spec_aug_time_mask))
        self.num_bands = self._num_patches(self.spectrogram.num_bins)
        self.to_tokens = nn.Linear(patch_size**2, dim)
        self.band_embedding = nn.Parameter(torch.randn(self.num_bands, dim) * 0.02)
        bias = WavePositionBias(heads, num_axes=2, num_waves=position_waves) if position_waves else None
        self.encoder = build_encoder(dim, depth, heads, dim_head, ff_mult, float(dropout), position_bias=bias)
        keep_arguments(self, self.config)

    def forward(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed clips as `[b, dim]` float32, not of unit norm.

        `wavs` (`[n]`, `[b, n]` or `[b, 1, n]`) at `sample_hz` have values in about -1..1, and `lengths [b]` are the
        numbers of samples per clip (None = `n` for every clip). In eval mode the embedding of a clip does not depend on
        the other clips in `wavs`.
        """
        return self.embed_layers(wavs, lengths, layers=(self.depth,))[0]

    @typed
    def embed_layers(self, wavs: Tensor, lengths: Tensor | None = None, *, layers: Sequence[int]) -> Tensor:
        """Embed clips as the mean over the patches in each of `l` layers, `[l, b, dim]` float32, not of unit norm.

        Each of `layers` is a number of transformer blocks in 0..depth; layer `depth` is the normalised output.
        """
        wavs = mono_waves(wavs, lengths, name="wavs")
        if lengths is None:
            lengths = torch.full((len(wavs),), wavs.shape[1], device=wavs.device)
        lengths = checked_lengths(lengths, wavs)
        logs, num_frames = self.spectrogram(wavs, lengths)
        logs, num_frames = self.augment.stretch(logs, num_frames)
        image = self.augment.mask(self.spectrogram.standardise(logs, num_frames), num_frames)
        tokens, places, mask = self._patches(image, num_frames)
        return pooled_layers(self.encoder, tokens, mask, layers, places)

    def _num_patches(self, size: int) -> int:
        """Return how many patches (at least one) cover `size` bins or frames along one axis."""
        return 1 + max(0, -(-(size - self.patch_size) // self.patch_stride))

    def _patches(self, image: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed patches as `[b, t, d]`; also return positions `[b, t, 2]` (time, frequency) and the mask `[b, t]`."""
        size, stride = self.patch_size, self.patch_stride
        num_columns = self._num_patches(image.shape[2])
        covered = [(count - 1) * stride + size for count in (num_columns, self.num_bands)]
        image = F.pad(image, (0, covered[0] - image.shape[2], 0, covered[1] - image.shape[1]))
        patches = rearrange(image.unfold(1, size, stride).unfold(2, size, stride), "b h w p q -> b w h (p q)")
        # The front end computes in float32, also if the weights have half precision.
        tokens = self.to_tokens(patches.to(self.to_tokens.weight.dtype)) + self.band_embedding
        tokens = rearrange(tokens, "b w h d -> b (w h) d")
        column, band = torch.arange(num_columns), torch.arange(self.num_bands)
        places = torch.cartesian_prod(column, band).to(image.device).expand(len(image), -1, -1)
        own_columns = 1 + ((num_frames - size + stride - 1) // stride).clamp(min=0)
        mask = places[..., 0] < own_columns.unsqueeze(1)
        if not self.training or self.patch_dropout == 0:
            return tokens, places, mask
        kept = torch.ceil(mask.sum(dim=1) * (1 - self.patch_dropout)).long()
        order = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1).argsort(dim=1, descending=True)
        order = order[:, : int(kept.max())]
        tokens = tokens.gather(1, repeat(order, "b t -> b t d", d=self.dim))
        return tokens, places.gather(1, repeat(order, "b t -> b t axes", axes=2)), length_mask(kept, order.shape[1])
