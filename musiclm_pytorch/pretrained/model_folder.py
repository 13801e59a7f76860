"""Model folders: all parts of a MusicLM side by side, bundled with the package or anywhere on disk.

MODEL/musiclm.json            format version, where it comes from, defaults for generating (optional):
                              "sampling" {stage: {temperature, top_k, top_p, guidance_scale}} and "num_levels",
                              and "bundled_parts" {part: name} (optional): parts that are not in the folder but come
                              with the package, in its folder of that name, e.g. {"codec": "codec_16khz"}
MODEL/<part>/config.json      one saved module for each of `PARTS` besides those
MODEL/<part>/model.safetensors
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from torch import nn

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.saving.files import read_json, write_json
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import load_module, read_config, save_module
from audiolm_pytorch.semantic import SemanticTokenizer
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pipeline.pretrained_parts import exact_dtype, load_part
from musiclm_pytorch.pretrained.bundled import bundled_folder
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

__all__ = ["CARD", "FORMAT_VERSION", "PARTS", "export_musiclm", "load_musiclm", "model_folder", "save_parts"]

FORMAT_VERSION = 1
PARTS: dict[str, Any] = {
    "codec": Codec,
    "semantic_tokenizer": SemanticTokenizer,
    "quantizer": MuLaNEmbedQuantizer,
    "semantic": SemanticTransformer,
    "coarse": CoarseTransformer,
    "fine": FineTransformer,
}
CARD = "musiclm.json"
# Parts that the stages know by their fingerprints, with what of each may be rounded: the tables are trained with them.
_KNOWN_BY_STAGES = {"codec": (), "semantic_tokenizer": (), "quantizer": ("tables",)}
_PART_FILES = ("config.json", "model.safetensors")


@beartype
def save_parts(
    folder: str | Path,
    parts: Mapping[str, nn.Module],
    about: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    bundled: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a model folder; `musiclm.json` comes last, so a folder that has it is whole.

    Args:
        folder: Where to.
        parts: A module for each of `PARTS`.
        about: Further JSON-able fields of `musiclm.json`.
        dtype: Of the stored weights, e.g. `torch.float16`; as they are if not given. Tokenizers, and a quantizer
            (but for its tables), that are not of such numbers already stay as they are: rounded they would be others
            than those that the stages were trained with.
        bundled: Parts that are not written, each with the name of the same one that comes with the package.

    Returns:
        The files of the model.
    """
    folder, bundled = Path(folder), dict(bundled or {})
    # While parts are exchanged one by one, what is there is no whole model.
    (folder / CARD).unlink(missing_ok=True)
    written = []
    for name in PARTS:
        if name in bundled:
            _remove_part(folder / name)
            continue
        stored = dtype
        if dtype is not None and name in _KNOWN_BY_STAGES:
            stored = exact_dtype(parts[name], dtype, but=_KNOWN_BY_STAGES[name])
        save_module(parts[name], folder / name, dtype=stored)
        written += [folder / name / file for file in _PART_FILES]
    named = {"bundled_parts": bundled} if bundled else {}
    write_json(folder / CARD, {"format_version": FORMAT_VERSION, **about, **named})
    return [*written, folder / CARD]


def _remove_part(place: Path) -> None:
    """Remove a part of a model that is being replaced by one without it."""
    for file in _PART_FILES:
        (place / file).unlink(missing_ok=True)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


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
    bundled = bundled_folder("")
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


def _load_parts(folder: Path, card: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Every part, from the model's own folder or from the one that comes with the package."""
    places = {**{name: folder / name for name in PARTS}, **_bundled_places(card, folder / CARD)}
    lacking = [
        f"{name}/{file}" for name, place in places.items() for file in _PART_FILES if not (place / file).is_file()
    ]
    if lacking:
        raise ValueError(f"the model in {folder} lacks {', '.join(lacking)}; copy the whole folder again")
    return {name: load_part(places[name], kind) for name, kind in PARTS.items()}


def _bundled_places(card: Mapping[str, Any], where: Path) -> dict[str, Path]:
    """Folders of the parts that a model's card only names; ValueError if it names one that is not there."""
    named = card.get("bundled_parts", {})
    if not isinstance(named, dict) or not set(named) <= set(PARTS):
        raise ValueError(f"bundled_parts in {where} must name parts of {', '.join(PARTS)}, got {named!r}")
    there = _bundled_parts()
    for name in named.values():
        if name not in list(there):
            raise ValueError(
                f"{where} takes the part {name!r} from the package, and this installation has "
                f"{', '.join(there) or 'none'}; install the release that wrote the model, or export it again with "
                "its parts"
            )
    return {part: there[name] for part, name in named.items()}


def _bundled_parts() -> dict[str, Path]:
    """Parts that come with the package and belong to no model: their folders by name."""
    folders = sorted(bundled_folder("").glob("*"))
    return {folder.name: folder for folder in folders if all((folder / file).is_file() for file in _PART_FILES)}


def _bundled_twins(parts: Mapping[str, nn.Module]) -> dict[str, str]:
    """Which parts come with the package, number for number, and under which names."""
    twins = {}
    for bundled, folder in _bundled_parts().items():
        kind = read_config(folder)["class"]
        for name in [name for name, part in parts.items() if type(part).__name__ == kind]:
            # a part's own fingerprint may leave out what its tokens do not depend on; here everything counts
            if fingerprint_of(load_module(folder)) == fingerprint_of(parts[name]):
                twins[name] = bundled
    return twins


def _read_card(folder: Path) -> dict[str, Any]:
    card = read_json(folder / CARD)
    version = card.get("format_version") if isinstance(card, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CARD} has format version {version!r}, this library reads {FORMAT_VERSION}; install the release "
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
            other sizes, or stages that were trained with another codec, semantic tokenizer or quantizer than the one
            beside them.
    """
    folder = model_folder(name_or_folder)
    card = _read_card(folder)
    return _compose(_load_parts(folder, card), card, folder).to(device).eval()


@beartype
def export_musiclm(
    run: str | Path, out: str | Path, settings: Mapping[str, Any] | None = None, *, share_bundled: bool = False
) -> int:
    """Write the model of a finished run with fp16 weights (see `save_parts`).

    Args:
        run: Folder of `musiclm train all`, or a model folder.
        out: Folder to write: new, empty, or one that holds a model, which is replaced.
        settings: Fields of `musiclm.json` to set, e.g. `{"num_levels": 2}` or
            `{"sampling": {"coarse": {"temperature": 0.8}}}`.
        share_bundled: Whether parts that come with the package are named instead of copied: the model then is smaller
            and needs an installation that has them.

    Returns:
        Bytes of all files of the model.

    Raises:
        ValueError: If the run is not finished, the settings do not fit the model, or `out` is no place for a model.
    """
    folder, out = model_folder(run), Path(out)
    if out.exists() and not _may_become_a_model(out):
        raise ValueError(f"{out} holds something else than a model; name a new folder to write to")
    card = _read_card(folder)
    parts = _load_parts(folder, card)
    card.update({**(settings or {}), "weights": "float16"})
    _compose(parts, card, folder)
    about = {key: value for key, value in card.items() if key not in ("format_version", "bundled_parts")}
    bundled = _bundled_twins(parts) if share_bundled else {}
    return sum(file.stat().st_size for file in save_parts(out, parts, about, torch.float16, bundled))
