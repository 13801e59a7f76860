"""Functions that open codecs, tokenizers, encoders and joint embeddings by bundled name, folder or hub id.

All models are returned in eval mode. With `offline`, a hub id is loaded from the local cache only. For an unknown name,
a ValueError lists the bundled models. A model that needs the package transformers raises an ImportError without it.
"""

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import nn

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.modules import load_module
from audiolm_pytorch.semantic.base import FrameEncoder, SemanticTokenizer
from musiclm_pytorch.mulan.joint import JointEmbedding

__all__ = [
    "BUNDLED_CODECS",
    "BUNDLED_TOKENIZERS",
    "DEFAULT_CODEC",
    "bundled_folder",
    "codec_named",
    "encoder_named",
    "mulan_named",
    "tokenizer_named",
]

# name -> folder below musiclm_pytorch/bundled
BUNDLED_CODECS = {"16khz": "codec_16khz"}
DEFAULT_CODEC = "16khz"
BUNDLED_TOKENIZERS = {"16khz": "semantic_16khz"}
_BUNDLED_MULANS = {"tiny": "tiny/quantizer"}
# Folders of a joint embedding below a model, a finished run, and a run whose MuLaN is trained.
_MULAN_FOLDERS = ("", "quantizer", "model/quantizer", "mulan/model", "mulan", "model")


@beartype
def codec_named(name: str, device: str | torch.device = "cpu", offline: bool = False) -> Codec:
    """Open a codec by a bundled name, a folder, or a hub id (see `open_codec`)."""
    from audiolm_pytorch.codecs.pretrained.open_codec import open_codec

    codec: Codec = _open(name, BUNDLED_CODECS, "codecs", lambda source: open_codec(source, offline=offline))
    return codec.to(device).eval()


@beartype
def tokenizer_named(name: str = "16khz", device: str | torch.device = "cpu") -> SemanticTokenizer:
    """Open a semantic tokenizer by a bundled name, or by the folder of a trained or converted tokenizer."""
    tokenizer = _open(name, BUNDLED_TOKENIZERS, "tokenizers", lambda source: load_module(source, device=device))
    if not isinstance(tokenizer, SemanticTokenizer):
        raise ValueError(f"{name} contains a {type(tokenizer).__name__}, but a semantic tokenizer is needed")
    return tokenizer


@beartype
def encoder_named(name: str, offline: bool = False) -> FrameEncoder:
    """Open an audio encoder by the name of a bundled semantic tokenizer, a folder, or a hub id (see `open_encoder`)."""
    from audiolm_pytorch.semantic.pretrained import open_encoder

    encoder = _open(name, BUNDLED_TOKENIZERS, "encoders", lambda source: open_encoder(source, offline=offline))
    if not isinstance(encoder, FrameEncoder):
        raise ValueError(f"{name} contains a {type(encoder).__name__}, but an audio encoder with layers is needed")
    return encoder


@beartype
def mulan_named(name: str, device: str | torch.device = "cpu", offline: bool = False) -> JointEmbedding:
    """Open a joint embedding of audio and text by a bundled name, a folder, or a hub id of CLAP.

    A folder may contain a MuLaN, a CLAP model (also in transformers' format), a `MuLaNEmbedQuantizer`, a MusicLM, or a
    training run. An example of a hub id is laion/larger_clap_music.
    """
    module = _open(name, _BUNDLED_MULANS, "models", lambda source: _open_mulan(source, offline))
    mulan = getattr(module, "mulan", module)  # a quantizer holds its MuLaN
    if not isinstance(mulan, JointEmbedding):
        raise ValueError(f"{name} contains a {type(mulan).__name__}, but a joint embedding of audio and text is needed")
    return mulan.to(device).eval()


def bundled_folder(name: str) -> Path:
    """Return the path of a folder in musiclm_pytorch/bundled, which contains the bundled models."""
    return Path(str(files("musiclm_pytorch") / "bundled" / name))


def _open(name: str, bundled: Mapping[str, str], kind: str, open_source: Callable[[str | Path], Any]) -> Any:
    """Call `open_source` with the folder of the bundled model `name`, or with `name` if it is no bundled name."""
    try:
        return open_source(bundled_folder(bundled[name]) if name in bundled else name)
    except ValueError as error:
        raise ValueError(f"{error}; available as bundled {kind}: {', '.join(bundled)}") from error


def _open_mulan(source: str | Path, offline: bool) -> nn.Module:
    import musiclm_pytorch.quantizer.embed_quantizer  # noqa: F401  (registers the class)
    from musiclm_pytorch.mulan.clap import ClapMuLaN

    path = Path(source).expanduser()
    for folder in (path / name for name in _MULAN_FOLDERS):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            is_published = isinstance(config, dict) and "model_type" in config
            return ClapMuLaN.from_pretrained(folder, offline=offline) if is_published else load_module(folder)
    if path.exists():
        raise ValueError(f"{path} contains no MuLaN; pass a folder that musiclm train mulan or musiclm train all wrote")
    if len(path.parts) == 2 and not path.is_absolute():  # owner/name
        return ClapMuLaN.from_pretrained(str(source), offline=offline)
    raise ValueError(f"there is no model {str(source)!r}; pass the folder of a trained model, or a hub id of CLAP")
