"""Encoders from wherever they come: a published fairseq file, transformers' format, or a folder of ours."""

from pathlib import Path
from typing import Any

from beartype import beartype
from torch import nn

from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.hub import LoadedModel, find_folder
from audiolm_pytorch.saving.modules import load_module
from audiolm_pytorch.semantic.base import FrameEncoder
from audiolm_pytorch.semantic.pretrained.encoder import TransformersEncoder
from audiolm_pytorch.semantic.pretrained.fairseq import hubert_from_fairseq, read_fairseq
from audiolm_pytorch.semantic.tokenizer import KMeansTokenizer

__all__ = ["open_encoder", "open_published"]

_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_FAIRSEQ_LICENCE = "MIT, as fairseq says of its code and models"


@beartype
def open_published(
    source: str | Path,
    *,
    layer_count: int | None = None,
    normalise_wave: bool | None = None,
    offline: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> TransformersEncoder:
    """Open a published encoder.

    Args:
        source: A HuBERT checkpoint of fairseq, a folder in transformers' format, or a hub id.
        layer_count: Blocks to keep, from the first; None = all.
        normalise_wave: See `TransformersEncoder`; where it is None, a checkpoint of fairseq says itself.
        offline: Whether to keep off the network.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept.

    Returns:
        The encoder.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If there is no such file, folder or id, it is no encoder that is read here, or lacks the blocks.
    """
    path = Path(source).expanduser()
    options: dict[str, Any] = {"layer_count": layer_count, "normalise_wave": normalise_wave}
    if path.is_dir() or (not path.is_file() and path.suffix not in _CHECKPOINT_SUFFIXES):
        return TransformersEncoder(source, offline=offline, revision=revision, cache_dir=cache_dir, **options)
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}: give the checkpoint's own path, a folder, or a hub id like owner/name"
        )
    checkpoint = read_fairseq(path)
    if normalise_wave is None:
        options["normalise_wave"] = checkpoint.normalise_wave
    # a checkpoint says itself what stands in a preprocessor_config.json elsewhere
    preprocessor = {"sampling_rate": checkpoint.sample_hz}
    model = hubert_from_fairseq(checkpoint)
    loaded = LoadedModel(model, str(path), licence=_FAIRSEQ_LICENCE, preprocessor=preprocessor)
    return TransformersEncoder(loaded, **options)


@beartype
def open_encoder(
    source: str | Path, *, offline: bool = False, revision: str | None = None, cache_dir: str | Path | None = None
) -> nn.Module:
    """Open any encoder: one of ours, or a published one.

    Args:
        source: A folder written by `save_module` (an encoder, or a tokenizer: its encoder is
            given), a HuBERT checkpoint of fairseq, a folder in transformers' format, or a hub id; what is on this
            machine always wins.
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Returns:
        A `FrameEncoder` in eval mode.

    Raises:
        ImportError: If a published encoder is wanted and transformers is not installed.
        ValueError: If there is no encoder, or one that nothing here reads.
    """
    path = Path(source).expanduser()
    if path.is_file() or (path.suffix in _CHECKPOINT_SUFFIXES and not path.is_dir()):
        return open_published(source)
    folder, _ = find_folder(source, offline=offline, revision=revision, cache_dir=cache_dir)
    config_file = folder / "config.json"
    if not config_file.is_file() or "class" not in read_json(config_file):
        return open_published(source, offline=offline, revision=revision, cache_dir=cache_dir)
    module = load_module(folder)
    encoder = module.encoder if isinstance(module, KMeansTokenizer) else module
    if not isinstance(encoder, FrameEncoder):
        raise ValueError(
            f"{folder} holds a {type(module).__name__}, not an encoder or a tokenizer that is cut from one"
        )
    return encoder
