"""A discriminator for waves at several resolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.discriminators.base import Discriminator, ScaleOutput, run_layers
from audiolm_pytorch.saving.modules import register

__all__ = ["MultiScaleWaveDiscriminator"]

_STRIDE = 4  # of each grouped convolution (SoundStream, section III-D)
_GROUPED_LAYERS = 4
_GROUP_SIZE = 4
_MAX_SCALES = 16  # waves are padded to 2 ** (scales - 1) samples


@register
class MultiScaleWaveDiscriminator(Discriminator):
    """Discriminator with one network for the wave and one for each average-pooled version (SoundStream, section III-D).

    SoundStream defines three resolutions (x1, x1/2, x1/4). The network of each resolution has an ordinary convolution,
    four grouped convolutions, and two ordinary convolutions. A grouped convolution has groups of 4 channels, stride 4,
    and 4 times as many output channels as input channels, up to 1024. The kernel sizes (15, 41, 5, 3), the default
    `width`, pooling and weight norm follow MelGAN (arXiv 1910.06711, appendix A). The logits for a resolution with n
    samples are `[b, 1, ceil(n / 256)]`.

    One network processes all audio channels together. The first convolution has `width` output channels, a multiple of
    4, and later layers have up to 64 times as many. The first of the `scales` resolutions is the full resolution.
    """

    @typed
    def __init__(self, *, channels: int = 1, width: int = 16, scales: int = 3) -> None:
        super().__init__(dict(channels=channels, width=width, scales=scales))
        if channels < 1 or not 1 <= scales <= _MAX_SCALES or width < 1 or width % _GROUP_SIZE:
            raise ValueError(
                f"need channels >= 1, scales in 1..{_MAX_SCALES} and a width that is a multiple of {_GROUP_SIZE}, got "
                f"{channels=}, {scales=} and {width=}"
            )
        self.scales = nn.ModuleList([_OneScale(channels, width) for _ in range(scales)])

    def _outputs(self, wave: Tensor) -> list[ScaleOutput]:
        # Pooling shorter waves would leave no samples.
        wave = F.pad(wave, (0, max(0, 2 ** (len(self.scales) - 1) - wave.shape[-1])))
        outputs = []
        for number, scale in enumerate(self.scales):
            if number > 0:
                wave = F.avg_pool1d(wave, kernel_size=4, stride=2, padding=1, count_include_pad=False)
            outputs.append(scale(wave))
        return outputs


class _GroupedConv1d(nn.Conv1d):
    """A strided convolution in groups of 4 channels, computed in float32 even under autocast.

    On Xeons with AMX, bfloat16 gradients of short waves can be NaN, because oneDNN multiplies uninitialised memory by
    zero if a length is not a multiple of 32 (github.com/uxlfoundation/oneDNN/issues/5717).
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        kernel = 10 * _STRIDE + 1
        super().__init__(dim_in, dim_out, kernel, _STRIDE, padding=5 * _STRIDE, groups=dim_in // _GROUP_SIZE)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(next(self.parameters()).dtype))


class _OneScale(nn.Module):
    """Discriminator network for one resolution of the wave."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        dim, largest = width, 64 * width
        layers = [weight_norm(nn.Conv1d(channels, dim, 15, padding=7))]
        for _ in range(_GROUPED_LAYERS):
            wider = min(4 * dim, largest)
            layers.append(weight_norm(_GroupedConv1d(dim, wider)))
            dim = wider
        layers.append(weight_norm(nn.Conv1d(dim, dim, 5, padding=2)))
        self.layers = nn.ModuleList(layers)
        self.last = weight_norm(nn.Conv1d(dim, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> ScaleOutput:
        return run_layers(self.layers, self.last, wave)
