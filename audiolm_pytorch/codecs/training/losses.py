"""Losses that train codecs: the multi-scale mel distance, adversarial losses and feature matching."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.audio.waves import check_dtype
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.discriminators import ScaleOutput

__all__ = ["MultiScaleMelLoss", "discriminator_hinge", "feature_matching", "generator_hinge"]

# a band narrower than the window's frequency resolution would be empty: window / 13 bands fit at 16 and 24 kHz
_WINDOWS_AND_MELS = ((64, 5), (128, 10), (256, 20), (512, 40), (1024, 80), (2048, 160))
_FLOOR = 1e-4  # magnitudes below it count as silence: -80 dB of full scale, so that inaudible noise costs nothing


class MultiScaleMelLoss(nn.Module):
    """L1 distance of log-mel spectrograms with several window sizes (SoundStream, eq. 6; mels as in arXiv 2306.06546).

    SoundStream uses 64 mel bands for every window, so that short windows have empty bands. In `MultiScaleMelLoss`, a
    longer window has more mel bands, so that no band is empty. The hop of each spectrogram is a quarter of its window.
    """

    @typed
    def __init__(self, sample_hz: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            MelSpectrogram(sample_hz=sample_hz, n_fft=window, hop_length=window // 4, num_mels=num_mels)
            for window, num_mels in _WINDOWS_AND_MELS
        )
        # a full-scale sine has magnitude window / 4 under a Hann window
        self.gains = [4.0 / window for window, _ in _WINDOWS_AND_MELS]

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Return the L1 distance (nepers) of waves `[b, c, n]`, averaged over the windows, as a float32 scalar."""
        check_dtype(reconstruction, "reconstruction")
        check_dtype(target, "target")
        if reconstruction.shape != target.shape or not target.numel():
            raise ValueError(
                "reconstruction and target must have equal shapes [b, c, n] and not be empty, got "
                f"{list(reconstruction.shape)} and {list(target.shape)}"
            )
        total = reconstruction.new_zeros((), dtype=torch.float32)
        for scale in range(len(self.scales)):
            with torch.no_grad():
                target_mel = self._log_mel(target, scale)
            total = total + (self._log_mel(reconstruction, scale) - target_mel).abs().mean()
        return total / len(self.scales)

    def _log_mel(self, wave: Tensor, scale: int) -> Tensor:
        return (self.scales[scale](wave.float()) * self.gains[scale]).clamp(min=_FLOOR).log()


def discriminator_hinge(real: Sequence[ScaleOutput], fake: Sequence[ScaleOutput]) -> Tensor:
    """Hinge loss of the discriminators (SoundStream, arXiv 2107.03312, eq. 3; EnCodec, arXiv 2210.13438, section 3.4).

    The outputs `fake` must come from decoded waves that are detached from the codec. The float32 loss, a mean over
    scales, items and times, is 2 if all logits are 0, and 0 if real logits are >= 1 and decoded logits <= -1.
    """
    scales = _paired(real, fake)
    hinges = [F.relu(1 - r.logits.float()).mean() + F.relu(1 + f.logits.float()).mean() for r, f in scales]
    return torch.stack(hinges).mean()


def generator_hinge(fake: Sequence[ScaleOutput]) -> Tensor:
    """Adversarial hinge loss of the codec on logits for decoded waves (SoundStream, eq. 4; EnCodec, section 3.4).

    The hinge loss is a float32 mean over scales, items and times; the gradient is zero for logits above 1.
    """
    return torch.stack([F.relu(1 - f.logits.float()).mean() for f, _ in _paired(fake, fake)]).mean()


def feature_matching(real: Sequence[ScaleOutput], fake: Sequence[ScaleOutput]) -> Tensor:
    """Relative L1 distance between the features of real and decoded waves (EnCodec, eq. 2).

    The distance of each layer is divided by the mean magnitude of its real features, so that layers have equal weight
    and discriminators cannot change the scale of the loss. The features of real waves receive no gradient. The float32
    loss is averaged over the features of a layer, then over the layers of a scale, then over the scales.
    """
    means = []
    for r, f in _paired(real, fake):
        distances = [_layer_distance(*features) for features in zip(r.features, f.features, strict=True)]
        means.append(torch.stack(distances).mean())
    return torch.stack(means).mean()


def _layer_distance(real: Tensor, fake: Tensor) -> Tensor:
    target = real.detach().float()
    # biases keep real features away from zero even in silence; the floor is for networks without
    return (fake.float() - target).abs().mean() / target.abs().mean().clamp(min=1e-5)


def _paired(real: Sequence[ScaleOutput], fake: Sequence[ScaleOutput]) -> list[tuple[ScaleOutput, ScaleOutput]]:
    """Pair the discriminator outputs for real and decoded waves, scale by scale."""
    if not real or len(real) != len(fake):
        raise ValueError(
            f"got {len(real)} outputs for real and {len(fake)} for decoded waves; pass equal numbers of outputs, at "
            "least one"
        )
    return list(zip(real, fake))
