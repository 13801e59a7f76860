"""Mimi (arXiv 2410.00037) of transformers behind the codec contract."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.units import exact_div
from audiolm_pytorch.codecs.pretrained.adapter import PretrainedCodec, chosen_levels
from audiolm_pytorch.codecs.pretrained.chunked import forward_in_pieces
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import register

__all__ = ["MimiWrapper"]

_CONVOLUTIONS = ("MimiEncoder", "MimiDecoder")


@register
class MimiWrapper(PretrainedCodec):
    """Mimi (arXiv 2410.00037, section 3.3): 24 kHz mono, 12.5 frames a second, levels of 2048 codes, causal.

    The first level holds what was distilled from a speech model, the others the sound; the published model has 32
    levels, the paper's 1.1 kbps are the first 8.

    The convolutions of a long file run in pieces with the same result, the transformers whole at 25 Hz: measured above
    the model, 0.6 GB for 1 and for 2.5 minutes (without pieces 1.9 GB a minute). The transformer's mask grows with the
    square of the length; it begins to count at ten minutes (15000 positions, 225 MB).

    Args:
        source: Folder in transformers' format, or hub id.
        num_quantizers: Levels to use, from the first; 8 if not given (or all, if there are fewer).
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the source is not a Mimi that can be loaded, or has fewer levels.
    """

    model_type, model_class, config_class = "mimi", "MimiModel", "MimiConfig"
    code_settings = (
        "upsampling_ratios",
        "dilation_growth_rate",
        "use_causal_conv",
        "pad_mode",
        "trim_right_ratio",
        "num_attention_heads",
        "hidden_act",
        "norm_eps",
        "sliding_window",
    )

    @beartype
    def __init__(
        self,
        source: str | Path | LoadedModel = "kyutai/mimi",
        *,
        num_quantizers: int | None = None,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(source, offline=offline, revision=revision, cache_dir=cache_dir)
        config = self.model.config
        for module in self.model.modules():
            if type(module).__name__ in _CONVOLUTIONS:
                module.forward = partial(forward_in_pieces, module)
        self._describe(
            sample_hz=config.sampling_rate,
            downsample_factor=exact_div(config.sampling_rate * 2, round(config.frame_rate * 2), "samples a frame"),
            channels=config.audio_channels,
            num_quantizers=chosen_levels(num_quantizers, 8, config.num_quantizers),
            codebook_size=config.codebook_size,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Constructor arguments besides the source, JSON-able."""
        return dict(num_quantizers=self.num_quantizers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MimiWrapper":
        # transformers keeps the codebooks that it derived in plain attributes, which stay behind on a move
        for module in self.model.modules():
            if hasattr(module, "_embed"):
                module._embed = None
        return super()._apply(fn, recurse)

    def _encode(self, wave: Tensor) -> Tensor:
        codes = self.model.encode(wave, num_quantizers=self.num_quantizers, return_dict=True).audio_codes
        return rearrange(codes, "b q f -> b f q")

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(rearrange(codes, "b f q -> b q f"), return_dict=True).audio_values
