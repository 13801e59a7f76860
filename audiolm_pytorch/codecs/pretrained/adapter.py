"""Published codecs behind the codec contract: what EnCodec, DAC and Mimi share, and one way to open any codec."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.audio.padding import items_by_length
from audiolm_pytorch.audio.units import frames_covering
from audiolm_pytorch.codecs.checks import check_covered, checked_audio, checked_codes
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.fingerprint import nameless_fingerprint
from audiolm_pytorch.saving.hub import (
    LoadedModel,
    find_folder,
    load_model,
    model_settings,
    model_type_of,
    portable_origin,
    require_transformers,
)
from audiolm_pytorch.saving.modules import load_module

__all__ = ["CodecCard", "PretrainedCodec", "open_codec"]

logger = logging.getLogger(__name__)

Wrapper = TypeVar("Wrapper", bound="PretrainedCodec")


@dataclass(frozen=True)
class CodecCard:
    """What a pretrained codec is and where it came from; logged once at load.

    Attributes:
        source: Folder or hub id.
        revision: Commit of the hub; None for a folder.
        model_type: Architecture.
        sample_hz: Rate of the waves (Hz).
        channels: Audio channels.
        frame_hz: Frames a second.
        num_quantizers: Levels in use.
        codebook_size: Codes per level.
        licence: Licence of the weights, as far as it is known.
    """

    source: str
    revision: str | None
    model_type: str
    sample_hz: int
    channels: int
    frame_hz: float
    num_quantizers: int
    codebook_size: int
    licence: str

    @property
    def bitrate_kbps(self) -> float:
        """Kilobits a second of the codes."""
        return self.num_quantizers * log2(self.codebook_size) * self.frame_hz / 1000

    def __str__(self) -> str:
        return (
            f"{self.source} (revision {self.revision or 'none: local'}): {self.model_type}, {self.sample_hz} Hz, "
            f"{'stereo' if self.channels == 2 else 'mono'}, {self.frame_hz:g} frames/s x {self.num_quantizers} levels "
            f"of {self.codebook_size} codes = {self.bitrate_kbps:.4g} kbps; licence of the weights: {self.licence}"
        )


class PretrainedCodec(nn.Module, ABC):
    """A codec of transformers behind the codec contract: frozen, always in eval mode, float32 unless moved.

    Items of unequal length are encoded in groups of equal length, so that padding reaches no code: convolutions that
    look ahead, and reflections at the end of a wave, would let it in. A module adapts one architecture by the names
    below, by calling `_describe` once it knows its numbers, and by `_encode` and `_decode`.

    Args:
        source: Folder in transformers' format, hub id, or a model that is loaded already.
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the source is missing, of another architecture, not in safetensors, or incomplete.
    """

    model_type: ClassVar[str]
    model_class: ClassVar[str]
    config_class: ClassVar[str]
    # settings that change codes without showing in any weight
    code_settings: ClassVar[tuple[str, ...]] = ()

    model: Any
    card: CodecCard

    def __init__(
        self,
        source: str | Path | LoadedModel,
        *,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        loaded = source
        if not isinstance(loaded, LoadedModel):
            classes = {self.model_type: self.model_class}
            loaded = load_model(loaded, classes, offline=offline, revision=revision, cache_dir=cache_dir)
        self._origin = loaded.origin
        self.model = loaded.model.requires_grad_(False)

    def _describe(
        self, *, sample_hz: int, downsample_factor: int, channels: int, num_quantizers: int, codebook_size: int
    ) -> None:
        """Fill in what the codec contract names, and report the codec once."""
        self.target_sample_hz, self.downsample_factor, self.channels = sample_hz, downsample_factor, channels
        self.num_quantizers, self.codebook_size = num_quantizers, codebook_size
        self.card = CodecCard(
            **self._origin,
            model_type=self.model_type,
            sample_hz=sample_hz,
            channels=channels,
            frame_hz=sample_hz / downsample_factor,
            num_quantizers=num_quantizers,
            codebook_size=codebook_size,
        )
        self.train(False)
        logger.info("codec %s", self.card)

    @abstractmethod
    def _encode(self, wave: Tensor) -> Tensor:
        """Waves `[b, c, n]` without padding to codes `[b, f, q]`."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """Codes `[b, f, q']` to waves `[b, c, n]`, about as long as the frames cover."""

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Constructor arguments besides the source, JSON-able."""

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-able description from which `from_config` rebuilds this codec."""
        origin = portable_origin(self._origin)
        return dict(model=model_settings(self.model), options=self.options, origin=origin)

    @classmethod
    def from_config(cls: type[Wrapper], config: dict[str, Any]) -> Wrapper:
        """Build from the dictionary that `config` holds, with fresh weights (for `audiolm_pytorch.saving.modules`)."""
        transformers = require_transformers()
        model_config = getattr(transformers, cls.config_class).from_dict(dict(config["model"]))
        model = getattr(transformers, cls.model_class)(model_config)
        return cls(LoadedModel(model, **config["origin"]), **config["options"])

    def fingerprint(self) -> str:
        """Hash of weights, settings and levels: the same on any device, from any folder, under any transformers."""
        settings = {name: getattr(self.model.config, name, None) for name in self.code_settings}
        facts = [self.model_type, self.target_sample_hz, self.downsample_factor, self.num_quantizers, settings]
        return nameless_fingerprint(self.model, facts)

    def train(self: Wrapper, mode: bool = True) -> Wrapper:
        """Stay in eval mode: the codec is frozen, and dropout of levels would change codes."""
        return super().train(False)

    def num_frames(self, num_samples: int) -> int:
        """Frames that cover `num_samples` samples; the last one may be partly silence."""
        return frames_covering(num_samples, self.downsample_factor)

    def covered_samples(self, num_frames: int) -> int:
        """Samples that `num_frames` frames decode to."""
        return num_frames * self.downsample_factor

    @torch.no_grad()
    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes of waves.

        Args:
            wave: `[b, n]` or `[b, c, n]` in [-1, 1] at `target_sample_hz`; any number of samples.
            lengths: Samples of each item `[b]`, if shorter items were padded to n.

        Returns:
            Codes `[b, f, q]` int64, coarse level first; -1 past an item's own frames.

        Raises:
            ValueError: If the audio is not what this codec reads.
        """
        wave = self._prepared(wave)
        codes = self._blank_codes(wave)
        with torch.autocast(wave.device.type, enabled=False):
            for rows, part in items_by_length(wave, lengths):
                part_codes = self._encode(part)
                codes[rows, : part_codes.shape[1]] = part_codes
        return codes

    @torch.no_grad()
    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        """Waves of codes.

        Args:
            codes: `[b, f, q']`, the first q' levels.
            num_samples: Samples wanted; all that the frames cover if not given.

        Returns:
            Waves `[b, c, n]` at `target_sample_hz`.

        Raises:
            ValueError: If the codes do not fit this codec or are fewer than `num_samples` needs.
        """
        return self._waves_of(codes, self._decode, num_samples)

    def _waves_of(self, codes: Tensor, decode: Callable[[Tensor], Tensor], num_samples: int | None) -> Tensor:
        """Check codes, decode them and make the waves exactly as long as wanted."""
        codes = checked_codes(codes, self.num_quantizers, self.codebook_size)
        covered = self.covered_samples(codes.shape[1])
        check_covered(num_samples, covered, codes.shape[1])
        if codes.shape[1] == 0:
            return torch.zeros(len(codes), self.channels, 0, device=codes.device)
        with torch.autocast(codes.device.type, enabled=False):
            wave = decode(codes.long())
        return F.pad(wave, (0, covered - wave.shape[-1]))[..., :num_samples]

    def _prepared(self, wave: Tensor) -> Tensor:
        wave = checked_audio(wave, self.channels, self.target_sample_hz)
        return wave.to(next(self.model.parameters()).dtype)

    def _blank_codes(self, wave: Tensor) -> Tensor:
        shape = (len(wave), self.num_frames(wave.shape[-1]), self.num_quantizers)
        return torch.full(shape, -1, dtype=torch.long, device=wave.device)


def chosen_levels(wanted: int | None, default: int, available: int) -> int:
    """Say how many levels a codec shall use.

    Raises:
        ValueError: If it does not have that many.
    """
    levels = min(default, available) if wanted is None else wanted
    if not 1 <= levels <= available:
        raise ValueError(f"num_quantizers must lie in 1..{available} for this model, got {wanted}")
    return levels


@beartype
def open_codec(
    source: str | Path, *, offline: bool = False, revision: str | None = None, cache_dir: str | Path | None = None
) -> nn.Module:
    """Open any codec: one of ours, or a published one in transformers' format.

    Args:
        source: A folder written by `save_module`, a folder in transformers' format (EnCodec, DAC or
            Mimi), or a hub id; a local folder always wins.
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Returns:
        A codec in eval mode, with the default bitrate of its class.

    Raises:
        ImportError: If a published codec is wanted and transformers is not installed.
        ValueError: If there is no codec, or one that nothing here reads.
    """
    from audiolm_pytorch.codecs.base import Codec
    from audiolm_pytorch.codecs.pretrained.dac import DacWrapper
    from audiolm_pytorch.codecs.pretrained.encodec import EncodecWrapper
    from audiolm_pytorch.codecs.pretrained.mimi import MimiWrapper

    folder, _ = find_folder(source, offline=offline, revision=revision, cache_dir=cache_dir)
    config_file = folder / "config.json"
    if config_file.is_file() and "class" in read_json(config_file):
        codec = load_module(folder)
        if not isinstance(codec, Codec):
            raise ValueError(f"{folder} holds a {type(codec).__name__}, not a codec")
        return codec
    adapters = {adapter.model_type: adapter for adapter in (EncodecWrapper, DacWrapper, MimiWrapper)}
    model_type = model_type_of(folder)
    if model_type not in adapters:
        raise ValueError(f"{source} holds a model of type {model_type!r}; codecs that can be read: {sorted(adapters)}")
    adapter: Any = adapters[model_type]
    return adapter(source, offline=offline, revision=revision, cache_dir=cache_dir)
