"""Load and save the parts of a MusicGen: published weights in two formats, and the model folder of this library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import TextEncoder
from audiolm_pytorch.saving.hub import find_folder, model_type_of, origin_in
from audiolm_pytorch.saving.model_folder import load_parts, read_card, write_model_folder
from musiclm_pytorch.musicgen.audiocraft_format import AUDIOCRAFT_FILES, read_audiocraft, write_audiocraft
from musiclm_pytorch.musicgen.parts import MusicGenParts
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer
from musiclm_pytorch.musicgen.transformers_format import MODEL_TYPES, read_transformers, write_transformers

__all__ = ["CARD", "load_musicgen_parts", "save_musicgen_parts"]

CARD = "musicgen.json"
_PARTS: dict[str, Any] = {"transformer": MusicGenTransformer, "codec": Codec, "text_conditioner": TextEncoder}


def load_musicgen_parts(
    source: str | Path,
    *,
    text_conditioner: TextEncoder | None = None,
    offline: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> MusicGenParts:
    """Load the parts of a model from a folder or the hub; `MusicGen.from_pretrained` documents the arguments."""
    where: dict[str, Any] = {"offline": offline, "revision": revision, "cache_dir": cache_dir}
    folder, revision = Path(source).expanduser(), None
    if not folder.is_dir():
        folder, revision = find_folder(source, **where)
        if not _is_transformers(folder):
            folder, revision = find_folder(source, patterns=AUDIOCRAFT_FILES, **where)
    origin = origin_in(folder, source, revision)
    if (folder / CARD).is_file():
        names = [name for name in _PARTS if (folder / name).is_dir()]
        read_card(folder / CARD)
        parts = load_parts(folder, {name: folder / name for name in names}, _PARTS)
        loaded = MusicGenParts(parts["transformer"], parts["codec"], parts.get("text_conditioner"))
    elif _is_transformers(folder):
        loaded = read_transformers(folder, origin)
    elif (folder / AUDIOCRAFT_FILES[0]).is_file():
        return read_audiocraft(folder, origin, text_conditioner, **where)
    else:
        raise ValueError(
            f"{folder} has no MusicGen; pass a folder with {CARD}, with the config.json and the safetensors of "
            f"transformers, or with audiocraft's {' and '.join(AUDIOCRAFT_FILES)}"
        )
    return loaded if text_conditioner is None else MusicGenParts(loaded.transformer, loaded.codec, text_conditioner)


def save_musicgen_parts(
    folder: str | Path, parts: MusicGenParts, format: Literal["own", "transformers", "audiocraft"]
) -> None:
    """Write the parts of a model; `MusicGen.save_pretrained` documents the formats."""
    folder = Path(folder)
    if format == "transformers":
        write_transformers(folder, parts)
    elif format == "audiocraft":
        write_audiocraft(folder, parts)
    else:
        modules: Mapping[str, Any] = {name: getattr(parts, name) for name in _PARTS}
        write_model_folder(folder, CARD, {name: part for name, part in modules.items() if part is not None}, {})


def _is_transformers(folder: Path) -> bool:
    """Whether a folder has a MusicGen in the format of transformers, with its weights as safetensors."""
    has_files = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return has_files and model_type_of(folder) in MODEL_TYPES
