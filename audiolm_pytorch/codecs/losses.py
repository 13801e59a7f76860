"""Reconstruction losses of codecs."""

from collections.abc import Sequence

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.audio import MelSpectrogram

__all__ = ["MultiScaleMelLoss"]

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
        for scale, gain in zip(self.scales, self.gains):
            with torch.no_grad():
                wanted = self._log_mel(scale, gain, target)
            total = total + (self._log_mel(scale, gain, reconstruction) - wanted).abs().mean()
        return total / len(self.scales)

    def _log_mel(self, scale: nn.Module, gain: float, wave: Tensor) -> Tensor:
        return (scale(wave.float()) * gain).clamp(min=self.floor).log()
