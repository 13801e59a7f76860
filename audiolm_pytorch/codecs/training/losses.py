"""Losses of codecs: reconstruction, and what discriminators make of it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.audio.mel import MelSpectrogram
from audiolm_pytorch.codecs.discriminators import ScaleOutput

__all__ = ["MultiScaleMelLoss", "discriminator_hinge", "feature_matching", "generator_hinge"]

# a band narrower than the window's frequency resolution would be empty: window / 13 bands fit at 16 and 24 kHz
_WINDOWS_AND_MELS = ((64, 5), (128, 10), (256, 20), (512, 40), (1024, 80), (2048, 160))


class MultiScaleMelLoss(nn.Module):
    """L1 between log-mel spectrograms of several windows (SoundStream, eq. 6; one mel count a window as in 2306.06546).

    SoundStream takes 64 mels for every window, which leaves empty bands in the short ones; here the count grows with
    the window. Hops are a quarter of the window.

    Args:
        sample_hz: Rate of the waves (Hz).
        windows_and_mels: Pairs of window length (samples) and number of mel bands.
        floor: Magnitudes below it count as silence; -80 dB of full scale, so that inaudible noise costs nothing.
    """

    @beartype
    def __init__(
        self,
        sample_hz: int,
        windows_and_mels: Sequence[tuple[int, int]] = _WINDOWS_AND_MELS,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.floor = floor
        self.scales = nn.ModuleList(
            [
                MelSpectrogram(sample_hz=sample_hz, n_fft=window, hop_length=window // 4, num_mels=num_mels)
                for window, num_mels in windows_and_mels
            ]
        )
        # a full-scale sine has magnitude window / 4 under a Hann window
        self.gains = [4.0 / window for window, _ in windows_and_mels]

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Mean over the scales of the L1 distance in nepers of waves `[b, c, n]`; a scalar."""
        total = reconstruction.new_zeros((), dtype=torch.float32)
        for scale in range(len(self.scales)):
            with torch.no_grad():
                wanted = self.log_mel(target, scale)
            total = total + (self.log_mel(reconstruction, scale) - wanted).abs().mean()
        return total / len(self.scales)

    def log_mel(self, wave: Tensor, scale: int) -> Tensor:
        """Log-mel spectrogram `[b, c, mels, f]` of waves `[b, c, n]` with the window of that index."""
        return (self.scales[scale](wave.float()) * self.gains[scale]).clamp(min=self.floor).log()


def discriminator_hinge(real: Sequence[ScaleOutput], fake: Sequence[ScaleOutput]) -> Tensor:
    """Hinge loss of the discriminators (SoundStream, arXiv 2107.03312, eq. 3; EnCodec, arXiv 2210.13438, section 3.4).

    Args:
        real: What the discriminators make of real waves, one entry a scale.
        fake: The same for decoded waves; detach these before, so that no gradient reaches the generator.

    Returns:
        Scalar float32, the mean over scales, items and times: 2 where nothing is told apart, 0 where everything is.

    Raises:
        ValueError: If there is no scale, or not as many in both.
    """
    scales = _paired(real, fake)
    hinges = [F.relu(1 - r.logits.float()).mean() + F.relu(1 + f.logits.float()).mean() for r, f in scales]
    return torch.stack(hinges).mean()


def generator_hinge(fake: Sequence[ScaleOutput]) -> Tensor:
    """Hinge loss of the generator (SoundStream, eq. 4; EnCodec, section 3.4): decoded waves should pass for real.

    Args:
        fake: What the discriminators make of decoded waves, one entry a scale.

    Returns:
        Scalar float32, the mean over scales, items and times; no gradient where the logits exceed 1.

    Raises:
        ValueError: If there is no scale.
    """
    return torch.stack([F.relu(1 - f.logits.float()).mean() for f, _ in _paired(fake, fake)]).mean()


def feature_matching(real: Sequence[ScaleOutput], fake: Sequence[ScaleOutput], *, relative: bool = True) -> Tensor:
    """L1 distance between the features of real and decoded waves; no gradient flows into the real ones.

    Relative, each layer's distance is divided by the mean magnitude of its real features (EnCodec, eq. 2): layers of
    any scale count the same, and the discriminators cannot change the weight of the loss by scaling their features.
    Otherwise it is the plain distance (SoundStream, eq. 5).

    Args:
        real: What the discriminators make of real waves, one entry a scale.
        fake: The same for the waves decoded from them.
        relative: Whether to divide.

    Returns:
        Scalar float32: mean over the features of a layer, then over the layers of a scale, then over scales.

    Raises:
        ValueError: If there is no scale, or not as many in both.
    """
    means = [
        torch.stack([_layer_distance(r, f, relative) for r, f in zip(one.features, other.features, strict=True)]).mean()
        for one, other in _paired(real, fake)
    ]
    return torch.stack(means).mean()


def _layer_distance(real: Tensor, fake: Tensor, relative: bool) -> Tensor:
    wanted = real.detach().float()
    distance = (fake.float() - wanted).abs().mean()
    # biases keep real features away from zero even in silence; the floor is for networks without
    return distance / wanted.abs().mean().clamp(min=1e-5) if relative else distance


def _paired(real: Sequence[ScaleOutput], fake: Sequence[ScaleOutput]) -> list[tuple[ScaleOutput, ScaleOutput]]:
    """Pair the scales of two judgements by the same discriminators."""
    if not real or len(real) != len(fake):
        raise ValueError(
            f"got {len(real)} scales of real and {len(fake)} of decoded waves; need the outputs of the same "
            "discriminators for both, at least one"
        )
    return list(zip(real, fake))
