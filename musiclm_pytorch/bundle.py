"""Model folders: all parts of a MusicLM side by side, bundled with the package or anywhere on disk.

MODEL/musiclm.json            format version, where it comes from, and defaults for generating (optional):
                              "sampling" {stage: {temperature, top_k, top_p, guidance_scale}} and "num_levels"
MODEL/<part>/config.json      one saved module for each of `PARTS`
MODEL/<part>/model.safetensors
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from torch import nn

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.codecs import SoundStream
from audiolm_pytorch.io import load_module, read_json, save_module, weights_of, write_json
from audiolm_pytorch.semantic import KMeansTokenizer
from audiolm_pytorch.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from musiclm_pytorch.embed_quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.musiclm import MusicLM

__all__ = ["CARD", "FORMAT_VERSION", "PARTS", "export_musiclm", "load_musiclm", "model_folder", "save_parts"]

FORMAT_VERSION = 1
PARTS: dict[str, type[nn.Module]] = {
    "codec": SoundStream,
    "semantic_tokenizer": KMeansTokenizer,
    "quantizer": MuLaNEmbedQuantizer,
    "semantic": SemanticTransformer,
    "coarse": CoarseTransformer,
    "fine": FineTransformer,
}
TOKENIZERS = ("codec", "semantic_tokenizer")
CARD = "musiclm.json"


@beartype
def save_parts(
    folder: str | Path,
    parts: Mapping[str, nn.Module],
    about: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder; `musiclm.json` comes last, so a folder that has it is whole.

    Args:
        folder: Where to.
        parts: A module for each of `PARTS`.
        about: Further JSON-able fields of `musiclm.json`.
        dtype: Of the stored weights, e.g. `torch.float16`; as they are if not given. Tokenizers that are not of such
            numbers already stay as they are: rounded they would be others than those that the stages were trained with.
    """
    folder = Path(folder)
    # While parts are exchanged one by one, what is there is no whole model.
    (folder / CARD).unlink(missing_ok=True)
    for name in PARTS:
        exact = name in TOKENIZERS and dtype is not None and not _holds(parts[name], dtype)
        save_module(parts[name], folder / name, dtype=None if exact else dtype)
    write_json(folder / CARD, {"format_version": FORMAT_VERSION, **about})


def _holds(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a module's weights can be stored in a type without changing."""
    weights = [weight for weight in weights_of(module).values() if weight.is_floating_point()]
    return all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights)


@beartype
def model_folder(name_or_folder: str | Path) -> Path:
    """The folder of a model: a folder on disk (of a model, or of a finished run), or the name of a bundled model.

    Raises:
        ValueError: If it is neither, naming the bundled models.
    """
    given = Path(name_or_folder)
    for folder in (given, given / "model"):
        if (folder / CARD).is_file():
            return folder
    bundled = Path(str(files("musiclm_pytorch") / "bundled"))
    names = sorted(path.parent.name for path in bundled.glob(f"*/{CARD}"))
    if str(name_or_folder) in names:
        return bundled / str(name_or_folder)
    if given.is_dir():
        raise ValueError(f"{given} holds no whole model: there is no {CARD} in it; finish it with musiclm train all")
    raise ValueError(
        f"there is no model {str(name_or_folder)!r}: give the folder of a trained one"
        + (f" or a bundled name: {', '.join(names)}" if names else "; this installation bundles none")
    )


def _may_become_a_model(place: Path) -> bool:
    """Whether a folder is empty, or holds a model, or what an interrupted export left of one."""
    if not place.is_dir():
        return False
    return (place / CARD).is_file() or all(
        entry.name in PARTS or entry.suffix in (".md", ".json") or entry.name.startswith(".writing-")
        for entry in place.iterdir()
    )


def _load_parts(folder: Path) -> dict[str, nn.Module]:
    lacking = [
        f"{name}/{file}"
        for name in PARTS
        for file in ("config.json", "model.safetensors")
        if not (folder / name / file).is_file()
    ]
    if lacking:
        raise ValueError(f"the model in {folder} lacks {', '.join(lacking)}; copy the whole folder again")
    return {name: load_module(folder / name, expect=kind) for name, kind in PARTS.items()}


def _read_card(folder: Path) -> dict[str, Any]:
    card = read_json(folder / CARD)
    version = card.get("format_version") if isinstance(card, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CARD} has format version {version}, this library reads {FORMAT_VERSION}; install the release "
            "that wrote it"
        )
    return dict(card)


def _compose(parts: Mapping[str, Any], card: Mapping[str, Any], where: Path) -> MusicLM:
    """A model of its parts, with the card's defaults for generating."""
    try:
        audio_lm = AudioLM(
            wav2vec=parts["semantic_tokenizer"],
            codec=parts["codec"],
            semantic_transformer=parts["semantic"],
            coarse_transformer=parts["coarse"],
            fine_transformer=parts["fine"],
            audio_conditioner=parts["quantizer"],
            sampling=card.get("sampling"),
        )
        return MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=parts["quantizer"], num_levels=card.get("num_levels"))
    except (TypeError, ValueError, BeartypeCallHintViolation) as error:
        raise ValueError(f"{where} does not make a model: {error}") from error


@beartype
def load_musiclm(name_or_folder: str | Path = "tiny", device: str | torch.device = "cpu") -> MusicLM:
    """Load a model, without network; sampling settings of its `musiclm.json` are its defaults.

    Args:
        name_or_folder: Name of a bundled model, or a folder that `musiclm train all` or `musiclm export` wrote.
        device: Where to put it.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: If there is no such model, a file of it is missing or of another format, or parts do not fit: of
            other sizes, or stages that were trained with another codec or semantic tokenizer than the one beside them.
    """
    folder = model_folder(name_or_folder)
    card = _read_card(folder)
    return _compose(_load_parts(folder), card, folder).to(device).eval()


@beartype
def export_musiclm(run: str | Path, out: str | Path, settings: Mapping[str, Any] | None = None) -> int:
    """Write the model of a finished run with fp16 weights (see `save_parts`).

    Args:
        run: Folder of `musiclm train all`, or a model folder.
        out: Folder to write: new, empty, or one that holds a model, which is replaced.
        settings: Fields of `musiclm.json` to set, e.g. `{"num_levels": 2}` or
            `{"sampling": {"coarse": {"temperature": 0.8}}}`.

    Returns:
        Bytes of all files of the model.

    Raises:
        ValueError: If the run is not finished, the settings do not fit the model, or `out` is no place for a model.
    """
    folder, out = model_folder(run), Path(out)
    if out.exists() and not _may_become_a_model(out):
        raise ValueError(f"{out} holds something else than a model; name a new folder to write to")
    card = {**_read_card(folder), **(settings or {}), "weights": "float16"}
    parts = _load_parts(folder)
    _compose(parts, card, folder)
    save_parts(out, parts, {key: value for key, value in card.items() if key != "format_version"}, dtype=torch.float16)
    written = [out / CARD, *(out / name / file for name in PARTS for file in ("config.json", "model.safetensors"))]
    return sum(file.stat().st_size for file in written)
