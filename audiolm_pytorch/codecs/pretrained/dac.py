"""The DAC codec (arXiv 2306.06546) from transformers, with the interface of `Codec`."""

from math import prod
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.codecs.base import EncodedWave
from audiolm_pytorch.codecs.pretrained.adapter import PretrainedLevelsCodec
from audiolm_pytorch.codecs.pretrained.chunked import apply_chunked, span_of
from audiolm_pytorch.saving.modules import register

__all__ = ["DacWrapper"]


@register
class DacWrapper(PretrainedLevelsCodec):
    """The Descript Audio Codec (arXiv 2306.06546): 44.1 kHz mono, 86.1 frames per second, 9 levels of 1024 codes.

    Long files are processed in chunks of 6 s, which does not change the results and needs about 0.8 GB besides the
    model. The DAC models of 16 and 24 kHz have a stride of 5, for which the decoder returns 8 samples too few; silence
    replaces the missing samples.
    """

    model_type, model_class, config_class = "dac", "DacModel", "DacConfig"
    default_source = "descript/dac_44khz"
    code_settings = ("downsampling_ratios",)

    def _sizes(self, config: Any) -> dict[str, int]:
        return dict(
            sample_hz=config.sampling_rate,
            downsample_factor=prod(config.downsampling_ratios),
            channels=1,
            num_quantizers=config.n_codebooks,
            codebook_size=config.codebook_size,
        )

    def _encode(self, wave: Tensor) -> EncodedWave:
        # DAC drops an incomplete last frame, so pad it with silence, as the feature extractor of DAC does.
        wave = F.pad(wave, (0, -wave.shape[-1] % self.downsample_factor))
        codes = apply_chunked(
            lambda chunk: self.model.encode(chunk, n_quantizers=self.num_quantizers, return_dict=True).audio_codes,
            wave,
            span_of([self.model.encoder]),
        )
        return EncodedWave(rearrange(codes, "b q f -> b f q"))

    def _decode(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        wave = apply_chunked(
            lambda chunk: self.model.decode(audio_codes=chunk, return_dict=True).audio_values,
            rearrange(codes, "b f q -> b q f"),
            span_of([self.model.decoder]),
        )
        return rearrange(wave, "b n -> b 1 n")
