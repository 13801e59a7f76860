"""The Mimi codec (arXiv 2410.00037) from transformers, with the interface of `Codec`."""

from collections.abc import Callable
from typing import Any

from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.units import exact_div
from audiolm_pytorch.codecs.base import EncodedWave
from audiolm_pytorch.codecs.pretrained.adapter import PretrainedLevelsCodec
from audiolm_pytorch.saving.modules import register

__all__ = ["MimiWrapper"]


@register
class MimiWrapper(PretrainedLevelsCodec):
    """Mimi (arXiv 2410.00037, section 3.3): 24 kHz mono, 12.5 frames per second, levels of 2048 codes, causal.

    The first level of the codes is distilled from a speech model, and the other levels describe the sound. The
    published model has 32 levels; its first 8 levels, the default, have the 1.1 kbps of the paper.

    On a long file the convolutions run in chunks, which does not change the results, and the transformers run on the
    whole file at 25 Hz. Besides its weights, Mimi needs 0.6 GB for audio of 1 to 2.5 minutes; without chunks 1.9 GB per
    minute. The attention mask grows with the square of the audio length, to 225 MB for 10 minutes.
    """

    model_type, model_class, config_class = "mimi", "MimiModel", "MimiConfig"
    default_source, default_levels = "kyutai/mimi", 8
    chunked_stacks = ("MimiEncoder", "MimiDecoder")
    code_settings = (
        "upsampling_ratios", "dilation_growth_rate", "use_causal_conv", "pad_mode", "trim_right_ratio",
        "num_attention_heads", "hidden_act", "norm_eps", "sliding_window",
    )  # fmt: skip

    def _sizes(self, config: Any) -> dict[str, int]:
        return dict(
            sample_hz=config.sampling_rate,
            downsample_factor=exact_div(config.sampling_rate * 2, round(config.frame_rate * 2), "samples a frame"),
            channels=config.audio_channels,
            num_quantizers=config.num_quantizers,
            codebook_size=config.codebook_size,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MimiWrapper":
        # transformers caches derived codebooks in plain attributes, which a move to a device does not reach
        for module in self.model.modules():
            if hasattr(module, "_embed"):
                module._embed = None
        return super()._apply(fn, recurse)

    def _encode(self, wave: Tensor) -> EncodedWave:
        codes = self.model.encode(wave, num_quantizers=self.num_quantizers, return_dict=True).audio_codes
        return EncodedWave(rearrange(codes, "b q f -> b f q"))

    def _decode(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        return self.model.decode(rearrange(codes, "b f q -> b q f"), return_dict=True).audio_values
