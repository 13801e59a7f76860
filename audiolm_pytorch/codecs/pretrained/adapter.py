"""Base classes of codecs that load published models from transformers."""

from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from audiolm_pytorch.audio.padding import items_by_length
from audiolm_pytorch.checks.types import named, typed
from audiolm_pytorch.codecs.base import Codec, EncodedWave
from audiolm_pytorch.codecs.pretrained.chunked import chunked_forward
from audiolm_pytorch.saving.fingerprint import nameless_fingerprint
from audiolm_pytorch.saving.hub import LoadedModel, load_model, model_settings, portable_origin, require_transformers

__all__ = ["PretrainedCodec", "PretrainedLevelsCodec"]

Wrapper = TypeVar("Wrapper", bound="PretrainedCodec")


class PretrainedCodec(Codec):
    """Base class of frozen codecs from transformers, always in eval mode; weights are loaded in float32.

    Items of equal length are encoded in one batch, without padding. Padding would change the codes, because the
    convolutions look ahead, and because published models reflect the wave at its end. Subclasses set the class
    attributes, call `_set_sizes` in the constructor and implement `options`, `_encode` and `_decode`.
    """

    model_type: ClassVar[str]
    model_class: ClassVar[str]
    config_class: ClassVar[str]
    # Settings that change codes and are not visible in the weights; part of the fingerprint.
    code_settings: ClassVar[tuple[str, ...]] = ()
    # Classes of convolutional stacks whose forward runs in chunks.
    chunked_stacks: ClassVar[tuple[str, ...]] = ()

    model: Any
    origin: dict[str, Any]

    def __init__(self, source: str | Path | LoadedModel, **hub: Any) -> None:
        super().__init__()
        loaded = load_model(source, {self.model_type: self.model_class}, **hub)
        self.origin = loaded.origin
        self.model = loaded.model.requires_grad_(False)
        for module in self.model.modules():
            if type(module).__name__ in self.chunked_stacks:
                module.forward = partial(chunked_forward, module)
        self.train(False)

    def _set_sizes(
        self, *, sample_hz: int, downsample_factor: int, channels: int, num_quantizers: int, codebook_size: int
    ) -> None:
        """Set the size attributes that `Codec` declares."""
        self.target_sample_hz, self.downsample_factor, self.channels = sample_hz, downsample_factor, channels
        self.num_quantizers, self.codebook_size = num_quantizers, codebook_size

    @abstractmethod
    def _encode(self, wave: Tensor) -> EncodedWave:
        """Encode waves `[b, c, n]` of a batch in which no item is padded."""

    @abstractmethod
    def _decode(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        """Decode codes `[b, f, q']` to waves `[b, c, n]`; n can be a few samples less than the frames cover."""

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Constructor arguments except `source`, as data that JSON can store."""

    @property
    def config(self) -> dict[str, Any]:
        """Data from which `from_config` builds the codec; JSON can store the data."""
        return dict(model=model_settings(self.model), options=self.options, origin=portable_origin(self.origin))

    @classmethod
    def from_config(cls: type[Wrapper], config: dict[str, Any]) -> Wrapper:
        """Build the codec from its `config`, with random weights."""
        transformers = require_transformers()
        model_config = getattr(transformers, cls.config_class).from_dict(dict(config["model"]))
        model = getattr(transformers, cls.model_class)(model_config)
        return cls(LoadedModel(model, **config["origin"]), **config["options"])

    def fingerprint(self) -> str:
        """Hash of weights, settings and levels; it does not depend on device, folder or version of transformers."""
        settings = {name: getattr(self.model.config, name, None) for name in self.code_settings}
        facts = [self.model_type, self.target_sample_hz, self.downsample_factor, self.num_quantizers, settings]
        return nameless_fingerprint(self.model, facts)

    def train(self: Wrapper, mode: bool = True) -> Wrapper:
        """Ignore `mode` and keep eval mode, because the codec is frozen and level dropout would change codes."""
        return super().train(False)

    @named
    @torch.no_grad()
    def encode(self, wave: Tensor, lengths: Tensor | None = None) -> EncodedWave:
        """Encode waves as `tokenize` does, and also return the scales if the model normalises segments."""
        wave = self._check_wave(wave, lengths)
        batch, num_samples = len(wave), wave.shape[-1]
        codes = torch.full((batch, self.num_frames(num_samples), self.num_quantizers), -1, device=wave.device)
        scales = wave.new_zeros(batch, self._num_segments(num_samples))
        with torch.autocast(wave.device.type, enabled=False):
            for rows, part in items_by_length(wave, lengths):
                encoded = self._encode(part)
                codes[rows, : encoded.codes.shape[1]] = encoded.codes
                if encoded.scales is not None:
                    scales[rows, : encoded.scales.shape[1]] = encoded.scales
        return EncodedWave(codes, scales if self.has_scales else None)

    @named
    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode waves (see `Codec.tokenize`)."""
        return self.encode(wave, lengths).codes

    @named
    @torch.no_grad()
    def decode(self, codes: Tensor, scales: Tensor | None = None, num_samples: int | None = None) -> Tensor:
        """Decode codes as `decode_from_codebook_indices` does, with the scales `[b, s]` that `encode` returned."""
        if scales is not None and not self.has_scales:
            raise ValueError("this model does not normalise segments and has no scales; call decode without scales")
        codes = self._check_codes(codes)
        num_frames = codes.shape[1]
        self._check_num_samples(num_samples, num_frames)
        if num_frames == 0:
            return torch.zeros(len(codes), self.channels, 0, device=codes.device)
        with torch.autocast(codes.device.type, enabled=False):
            wave = self._decode(codes.long(), scales)
        return F.pad(wave, (0, self.covered_samples(num_frames) - wave.shape[-1]))[..., :num_samples]

    @named
    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        """Decode codes (see `Codec.decode_from_codebook_indices`)."""
        return self.decode(codes, num_samples=num_samples)

    def _num_segments(self, num_samples: int) -> int:
        """Number of segments of a wave; each segment has one scale."""
        return 0


class PretrainedLevelsCodec(PretrainedCodec):
    """A published codec that uses the first levels of a model; a subclass implements `_sizes`, `_encode` and `_decode`.

    Args:
        source: Folder in transformers' format, Hugging Face id, or a loaded model; None for `default_source`.
        num_quantizers: Number of levels to use; None for `default_levels`, or all levels of a model with fewer levels.
        offline: Whether to load Hugging Face models only from the local cache.
        allow_noncommercial: Whether to load weights with a non-commercial licence.
    """

    default_source: ClassVar[str]
    default_levels: ClassVar[int | None] = None

    @typed
    def __init__(
        self,
        source: str | Path | LoadedModel | None = None,
        *,
        num_quantizers: int | None = None,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        allow_noncommercial: bool = False,
    ) -> None:
        super().__init__(
            source or self.default_source,
            offline=offline,
            revision=revision,
            cache_dir=cache_dir,
            allow_noncommercial=allow_noncommercial,
        )
        sizes = self._sizes(self.model.config)
        available = sizes["num_quantizers"]
        if num_quantizers is None:
            num_quantizers = min(self.default_levels or available, available)
        if not 1 <= num_quantizers <= available:
            raise ValueError(f"num_quantizers must lie in 1..{available} for this model, got {num_quantizers}")
        self._set_sizes(**{**sizes, "num_quantizers": num_quantizers})

    @abstractmethod
    def _sizes(self, config: Any) -> dict[str, int]:
        """Return the arguments of `_set_sizes` for a codec that uses all levels of the model with this `config`."""

    @property
    def options(self) -> dict[str, Any]:
        """Constructor arguments except `source`, as data that JSON can store."""
        return dict(num_quantizers=self.num_quantizers)
