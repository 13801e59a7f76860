"""DAC (arXiv 2306.06546) of transformers behind the codec contract."""

from math import prod
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.codecs.pretrained.adapter import PretrainedCodec, chosen_levels
from audiolm_pytorch.codecs.pretrained.chunked import in_pieces, span_of
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import register

__all__ = ["DacWrapper"]


@register
class DacWrapper(PretrainedCodec):
    """The Descript Audio Codec (arXiv 2306.06546): 44.1 kHz mono, 86.1 frames a second, 9 levels of 1024 codes.

    Its convolutions look a bounded way back and ahead, so long files run in pieces of 6 s with the same result: about
    0.8 GB above the model, which does not grow with the file, apart from the wave and the codes. The models of 16 and
    24 kHz have a stride of 5, which costs the decoder a few samples at the very end (8 of them); they come back as
    silence, so that lengths are exact.

    Args:
        source: Folder in transformers' format, or hub id.
        num_quantizers: Levels to use, from the first; all if not given.
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the source is not a DAC that can be loaded, or has fewer levels.
    """

    model_type, model_class, config_class = "dac", "DacModel", "DacConfig"
    code_settings = ("downsampling_ratios",)

    @beartype
    def __init__(
        self,
        source: str | Path | LoadedModel = "descript/dac_44khz",
        *,
        num_quantizers: int | None = None,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(source, offline=offline, revision=revision, cache_dir=cache_dir)
        config = self.model.config
        self._describe(
            sample_hz=config.sampling_rate,
            downsample_factor=prod(config.downsampling_ratios),
            channels=1,
            num_quantizers=chosen_levels(num_quantizers, config.n_codebooks, config.n_codebooks),
            codebook_size=config.codebook_size,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Constructor arguments besides the source, JSON-able."""
        return dict(num_quantizers=self.num_quantizers)

    def _encode(self, wave: Tensor) -> Tensor:
        # DAC drops what fills no frame; its own feature extractor pads with silence, as is done here
        wave = F.pad(wave, (0, -wave.shape[-1] % self.downsample_factor))
        codes = in_pieces(self._codes_of_piece, wave, span_of([self.model.encoder]))
        return rearrange(codes, "b q f -> b f q")

    def _codes_of_piece(self, wave: Tensor) -> Tensor:
        return self.model.encode(wave, n_quantizers=self.num_quantizers, return_dict=True).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        codes = rearrange(codes, "b f q -> b q f")
        return rearrange(in_pieces(self._wave_of_piece, codes, span_of([self.model.decoder])), "b n -> b 1 n")

    def _wave_of_piece(self, codes: Tensor) -> Tensor:
        return self.model.decode(audio_codes=codes, return_dict=True).audio_values
