"""A function that opens codecs of this library and published codecs."""

from pathlib import Path
from typing import Any

from beartype import beartype

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.pretrained.adapter import PretrainedCodec
from audiolm_pytorch.codecs.pretrained.dac import DacWrapper
from audiolm_pytorch.codecs.pretrained.encodec import EncodecWrapper
from audiolm_pytorch.codecs.pretrained.mimi import MimiWrapper
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.hub import find_folder, model_type_of
from audiolm_pytorch.saving.modules import load_module

__all__ = ["open_codec"]

_ADAPTERS: dict[str, type[PretrainedCodec]] = {"encodec": EncodecWrapper, "dac": DacWrapper, "mimi": MimiWrapper}


@beartype
def open_codec(
    source: str | Path, *, offline: bool = False, revision: str | None = None, cache_dir: str | Path | None = None
) -> Codec:
    """Open a codec of this library, or a published EnCodec, DAC or Mimi in the format of transformers, in eval mode.

    `source` is a folder written by `save_module`, a folder in transformers' format, or a Hugging Face id; an existing
    folder has precedence. With `offline`, Hugging Face models are loaded only from the local cache.
    """
    folder, _ = find_folder(source, offline=offline, revision=revision, cache_dir=cache_dir)
    config_file = folder / "config.json"
    if config_file.is_file() and "class" in read_json(config_file):
        codec: Any = load_module(folder, expect=Codec)
        return codec
    model_type = model_type_of(folder)
    if model_type not in _ADAPTERS:
        raise ValueError(f"{source} contains a model of type {model_type!r}; supported types are {sorted(_ADAPTERS)}")
    return _ADAPTERS[model_type](source, offline=offline, revision=revision, cache_dir=cache_dir)
