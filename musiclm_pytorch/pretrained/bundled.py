"""The codecs, semantic tokenizers and joint embeddings that come with the package, and how any other is named."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import nn

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.pretrained.open_codec import open_codec
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.modules import load_module
from audiolm_pytorch.semantic.base import FrameEncoder, SemanticTokenizer
from musiclm_pytorch.mulan.joint import JointEmbedding

__all__ = [
    "BUNDLED_CODECS",
    "BUNDLED_MULANS",
    "BUNDLED_TOKENIZERS",
    "DEFAULT_CODEC",
    "DEFAULT_TOKENIZER",
    "codec_named",
    "encoder_named",
    "mulan_named",
    "tokenizer_named",
]

# name -> folder below musiclm_pytorch/bundled
BUNDLED_CODECS = {"16khz": "codec_16khz"}
DEFAULT_CODEC = "16khz"
BUNDLED_TOKENIZERS = {"16khz": "semantic_16khz"}
DEFAULT_TOKENIZER = "16khz"
BUNDLED_MULANS = {"tiny": "tiny/quantizer"}
# Where a joint embedding lies below the folder of a model, a finished run, or a run that has come as far as MuLaN.
_MULAN_FOLDERS = ("", "quantizer", "model/quantizer", "mulan/model", "mulan", "model")


@beartype
def codec_named(name: str, device: str | torch.device = "cpu", offline: bool = False) -> Codec:
    """Open a codec for use.

    Args:
        name: Of a bundled codec, or a folder, or the id of a model on a hub (see `open_codec`).
        device: Where it shall compute.
        offline: Whether to refuse the hub.

    Returns:
        The codec in eval mode.

    Raises:
        ValueError: If there is no such codec, naming the bundled ones.
    """
    codec = _opened(name, BUNDLED_CODECS, "codecs", lambda source: open_codec(source, offline=offline))
    if not isinstance(codec, Codec):
        raise ValueError(f"{name} holds a {type(codec).__name__}, which is no codec")
    return codec.to(device).eval()


@beartype
def tokenizer_named(name: str = DEFAULT_TOKENIZER, device: str | torch.device = "cpu") -> SemanticTokenizer:
    """Open a semantic tokenizer for use.

    Args:
        name: Of a bundled tokenizer, or the folder of one that was trained or converted here.
        device: Where it shall compute.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If there is no such tokenizer, naming the bundled ones.
    """
    tokenizer = _opened(name, BUNDLED_TOKENIZERS, "tokenizers", lambda source: load_module(source, device=device))
    if not isinstance(tokenizer, SemanticTokenizer):
        raise ValueError(f"{name} holds a {type(tokenizer).__name__}, which is no semantic tokenizer")
    return tokenizer


@beartype
def encoder_named(name: str, offline: bool = False) -> FrameEncoder:
    """Open an encoder whose layers can be cut into semantic tokens.

    Args:
        name: Of a bundled tokenizer, or anything that `audiolm_pytorch.open_encoder` takes.
        offline: Whether to refuse the hub.

    Returns:
        A `FrameEncoder` in eval mode, on the CPU.

    Raises:
        ImportError: If it needs a package that is not installed.
        ValueError: If there is no such encoder, naming the bundled ones.
    """
    from audiolm_pytorch.semantic.pretrained import open_encoder

    opened = _opened(name, BUNDLED_TOKENIZERS, "encoders", lambda source: open_encoder(source, offline=offline))
    if not isinstance(opened, FrameEncoder):
        raise ValueError(f"{name} holds a {type(opened).__name__}, but an encoder with layers is needed")
    return opened


@beartype
def mulan_named(name: str, device: str | torch.device = "cpu", offline: bool = False) -> JointEmbedding:
    """Open a joint embedding of audio and text for use.

    Args:
        name: Of a bundled model; or the folder of a saved MuLaN, CLAP or `MuLaNEmbedQuantizer`, of a whole model, or of
            a run; or a folder or hub id of CLAP in transformers' format, e.g. laion/larger_clap_music.
        device: Where it shall compute.
        offline: Whether to refuse the hub.

    Returns:
        The joint embedding in eval mode.

    Raises:
        ImportError: If it needs a package that is not installed.
        ValueError: If there is no such joint embedding, naming the bundled ones.
    """
    found: Any = _opened(name, BUNDLED_MULANS, "models", lambda source: _open_mulan(source, offline))
    found = getattr(found, "mulan", found)  # of a quantizer
    if not isinstance(found, JointEmbedding):
        raise ValueError(f"{name} holds a {type(found).__name__}, which is no joint embedding of audio and text")
    return found.to(device).eval()


def _open_mulan(source: str | Path, offline: bool) -> nn.Module:
    """Load what lies in a folder, or below it where runs and models have it, or CLAP in transformers' format."""
    import musiclm_pytorch.quantizer.embed_quantizer  # noqa: F401  (registers what a folder may hold)

    given = Path(source).expanduser()
    for folder in (given / below for below in _MULAN_FOLDERS):
        if (folder / "config.json").is_file():
            settings = read_json(folder / "config.json")
            published = isinstance(settings, dict) and "model_type" in settings
            return _open_clap(folder, offline) if published else load_module(folder)
    if given.exists():
        raise ValueError(f"{given} holds no MuLaN; name a folder that musiclm train mulan or all has written")
    # a hub id is an owner and a name; anything else is a folder that is not there
    if len(given.parts) == 2 and not given.is_absolute():
        return _open_clap(str(source), offline)
    raise ValueError(f"there is no model {str(source)!r}: give the folder of a trained one, or a hub id of CLAP")


def _open_clap(source: str | Path, offline: bool) -> nn.Module:
    """CLAP as transformers has it, from a folder or the hub."""
    from musiclm_pytorch.mulan.clap import ClapMuLaN

    return ClapMuLaN.from_pretrained(source, offline=offline)


def _opened(name: str, bundled: Mapping[str, str], what: str, open_source: Callable[[str | Path], Any]) -> Any:
    """Open what is bundled under a name, or else what the name itself points to; an error says what is bundled."""
    try:
        return open_source(bundled_folder(bundled[name]) if name in bundled else name)
    except ValueError as error:
        raise ValueError(f"{error}; bundled {what}: {', '.join(bundled)}") from error


def bundled_folder(name: str) -> Path:
    """A folder below musiclm_pytorch/bundled."""
    return Path(str(files("musiclm_pytorch") / "bundled" / name))
