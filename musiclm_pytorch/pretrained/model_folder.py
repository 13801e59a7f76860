"""Model folders, which contain a whole MusicLM as one saved module per name in `PARTS`.

MODEL/<part>/config.json       constructor arguments of the module with this name in `PARTS`
MODEL/<part>/model.safetensors weights of the module with this name in `PARTS`
MODEL/musiclm.json             format version, origin, and two optional defaults for generation:
                               "sampling" {stage: {temperature, top_k, top_p, guidance_scale}} and "num_levels".
                               Optional "bundled_parts", e.g. {"codec": "codec_16khz"}, lists modules that are not
                               in the model folder, but in the folder bundled/<name> of the package.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from torch import nn

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.saving.files import read_json, write_json
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.saving.weights import weights_of
from audiolm_pytorch.semantic.base import SemanticTokenizer
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pretrained.bundled import bundled_folder
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

__all__ = [
    "CARD",
    "FORMAT_VERSION",
    "PARTS",
    "exact_dtype",
    "export_musiclm",
    "load_musiclm",
    "model_folder",
    "save_parts",
]

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
_PART_FILES = ("config.json", "model.safetensors")
# Parts whose fingerprints the stages store, with their submodules that may be rounded. The fingerprint of a quantizer
# does not include the conditioning tables, which are trained with the stages.
_FINGERPRINTED_PARTS = {"codec": (), "semantic_tokenizer": (), "quantizer": ("tables",)}


@beartype
def load_musiclm(name_or_folder: str | Path = "tiny", device: str | torch.device = "cpu") -> MusicLM:
    """Load a MusicLM in eval mode, without network access, with the default sampling settings in `musiclm.json`.

    The model is a bundled model, or a folder that `musiclm train all` or `musiclm export` wrote.
    """
    folder = model_folder(name_or_folder)
    card = _read_card(folder)
    return _compose(_load_parts(folder, card), card, folder).to(device).eval()


@beartype
def export_musiclm(run: str | Path, out: str | Path, settings: Mapping[str, Any] | None = None) -> int:
    """Copy the model of the training run or model folder `run` to `out` with fp16 weights; return its size in bytes.

    The folder `out` must be new or empty, or contain a model, which is then replaced. `settings` are fields of
    `musiclm.json`, for example `{"num_levels": 2}` or `{"sampling": {"coarse": {"temperature": 0.8}}}`.
    """
    folder, out = model_folder(run), Path(out)
    if out.exists() and not _may_be_replaced(out):
        raise ValueError(f"{out} contains files that do not belong to a model; pass a new or empty folder")
    card = _read_card(folder)
    parts = _load_parts(folder, card)
    card.update({**(settings or {}), "weights": "float16"})
    _compose(parts, card, folder)
    about = {key: value for key, value in card.items() if key not in ("format_version", "bundled_parts")}
    return sum(file.stat().st_size for file in save_parts(out, parts, about, torch.float16))


@beartype
def save_parts(
    folder: str | Path, parts: Mapping[str, nn.Module], about: Mapping[str, Any], dtype: torch.dtype | None = None
) -> list[Path]:
    """Write a model folder and return its files; `musiclm.json` is written last and marks a complete folder.

    The JSON-able entries of `about` are added to `musiclm.json`. Weights are stored as `dtype` (None keeps their
    types), except in a codec, tokenizer or quantizer that `dtype` would round, because rounding changes its codes.
    """
    folder = Path(folder)
    (folder / CARD).unlink(missing_ok=True)
    for name in PARTS:
        stored_dtype = dtype
        if dtype is not None and name in _FINGERPRINTED_PARTS:
            stored_dtype = exact_dtype(parts[name], dtype, but=_FINGERPRINTED_PARTS[name])
        save_module(parts[name], folder / name, dtype=stored_dtype)
    write_json(folder / CARD, {"format_version": FORMAT_VERSION, **about}, sealed=True)
    return [*(folder / name / file for name in PARTS for file in _PART_FILES), folder / CARD]


@beartype
def exact_dtype(module: nn.Module, dtype: torch.dtype, *, but: Sequence[str] = ()) -> torch.dtype | None:
    """Return `dtype` if it stores all weights of a module without rounding, else None; skip the submodules in `but`."""
    weights = {name: weight for name, weight in weights_of(module).items() if name.partition(".")[0] not in but}
    floats = [weight for weight in weights.values() if weight.is_floating_point()]
    return dtype if all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in floats) else None


@beartype
def model_folder(name_or_folder: str | Path) -> Path:
    """Find a model folder by its path, by the folder of a finished training run, or by the name of a bundled model."""
    path = Path(name_or_folder)
    for folder in (path, path / "model"):
        if (folder / CARD).is_file():
            return folder
    names = sorted(file.parent.name for file in bundled_folder("").glob(f"*/{CARD}"))
    if str(name_or_folder) in names:
        return bundled_folder(str(name_or_folder))
    if path.is_dir():
        raise ValueError(f"{path} contains no complete model ({CARD} is missing); finish it with musiclm train all")
    raise ValueError(
        f"there is no model {str(name_or_folder)!r}; pass the folder of a trained model or a bundled name: "
        f"{', '.join(names)}"
    )


def _may_be_replaced(folder: Path) -> bool:
    """Whether a folder is empty, or contains only a model or files of an interrupted export."""
    if not folder.is_dir():
        return False
    return (folder / CARD).is_file() or all(
        entry.name in PARTS or entry.suffix in (".md", ".json") or entry.name.startswith(".writing-")
        for entry in folder.iterdir()
    )


def _read_card(folder: Path) -> dict[str, Any]:
    card = read_json(folder / CARD)
    version = card.get("format_version") if isinstance(card, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CARD} has format version {version!r}, but this library reads version {FORMAT_VERSION}; install "
            "the library release that wrote the file"
        )
    return dict(card)


def _load_parts(folder: Path, card: Mapping[str, Any]) -> dict[str, nn.Module]:
    folders = {**{name: folder / name for name in PARTS}, **_bundled_parts(card, folder / CARD)}
    missing = [
        f"{name}/{file}" for name, place in folders.items() for file in _PART_FILES if not (place / file).is_file()
    ]
    if missing:
        raise ValueError(f"the model in {folder} lacks {', '.join(missing)}; copy the whole folder again")
    parts: dict[str, nn.Module] = {}
    with ThreadPoolExecutor() as pool:
        for name, kind in PARTS.items():
            parts[name] = load_module(folders[name], expect=kind)
            if name in _FINGERPRINTED_PARTS:  # hash the weights, which are compared later, while other parts are loaded
                pool.submit(part_fingerprint, parts[name])
    return parts


def _bundled_parts(card: Mapping[str, Any], file: Path) -> dict[str, Path]:
    """Return a dict from part (see `PARTS`) to folder, for the modules that `bundled_parts` in `musiclm.json` lists."""
    named = card.get("bundled_parts", {})
    if not isinstance(named, dict) or not set(named) <= set(PARTS):
        raise ValueError(f"bundled_parts in {file} must be a dict with keys from {', '.join(PARTS)}, got {named!r}")
    available = {place.parent.name: place.parent for place in sorted(bundled_folder("").glob("*/config.json"))}
    for name in named.values():
        if name not in list(available):
            raise ValueError(
                f"{file} needs the bundled module {name!r}, but this installation has "
                f"{', '.join(available) or 'none'}; install the release that wrote the model, or export the model again"
            )
    return {part: available[name] for part, name in named.items()}


def _compose(parts: Mapping[str, Any], card: Mapping[str, Any], folder: Path) -> MusicLM:
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
        raise ValueError(f"the modules in {folder} are not compatible: {error}") from error
