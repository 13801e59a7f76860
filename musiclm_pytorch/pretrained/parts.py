"""The parts of a MusicLM, read from and written to a model folder.

MODEL/<part>/       saved module with a name in `PARTS`
MODEL/musiclm.json  format version, names of the parts, origin, and two optional defaults for generation:
                    "sampling" {stage: {temperature, top_k, top_p, guidance_scale}} and "num_levels".
                    Optional "bundled_parts", e.g. {"codec": "codec_16khz"}, lists modules that are not in the
                    model folder, but in the folder bundled/<name> of the package.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import TextEncoder
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.saving.model_folder import load_parts, read_card, write_model_folder
from audiolm_pytorch.saving.sources import bundled_models
from audiolm_pytorch.semantic.base import SemanticTokenizer
from musiclm_pytorch.melody.embedder import MelodyEmbedder
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

__all__ = ["CARD", "PARTS", "read_parts", "save_parts"]

CARD = "musiclm.json"
# The parts of every model that the training pipeline writes.
PARTS: dict[str, Any] = {
    "codec": Codec,
    "semantic_tokenizer": SemanticTokenizer,
    "quantizer": MuLaNEmbedQuantizer,
    "semantic": SemanticTransformer,
    "coarse": CoarseTransformer,
    "fine": FineTransformer,
}
_KINDS = {**PARTS, "text_conditioner": TextEncoder, "melody": MelodyEmbedder}
_OPTIONAL = {"fine", "text_conditioner", "melody"}
# Parts whose fingerprints the stages store, with their submodules that may be rounded. The fingerprint of a quantizer
# does not include the conditioning tables, which are trained with the stages.
_FINGERPRINTED: dict[str, tuple[str, ...]] = {
    **{"codec": (), "semantic_tokenizer": (), "text_conditioner": (), "melody": ()},
    "quantizer": ("tables",),
}


@typed
def save_parts(
    folder: str | Path, parts: Mapping[str, nn.Module], about: Mapping[str, Any], dtype: torch.dtype | None = None
) -> list[Path]:
    """Write a model folder and return its files; an existing model is replaced only after all files are written.

    The JSON-able entries of `about` are added to `musiclm.json`. Weights are stored as `dtype` (None keeps their
    types), except in a part that `dtype` would round although other parts store its fingerprint.
    """
    return write_model_folder(folder, CARD, parts, about, dtype, _FINGERPRINTED)


@typed
def read_parts(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the card and the parts of the model in a folder."""
    folder = Path(folder)
    card = read_card(folder / CARD)
    names = card.get("parts", list(PARTS))
    if not isinstance(names, list) or not set(PARTS) - _OPTIONAL <= {*map(str, names)} <= set(_KINDS):
        raise ValueError(f"parts in {folder / CARD} must be a list of {', '.join(_KINDS)}, got {names!r:.200}")
    folders = {**{name: folder / name for name in names}, **_bundled_parts(card, folder / CARD)}
    return card, load_parts(folder, folders, _KINDS, list(_FINGERPRINTED))


def _bundled_parts(card: Mapping[str, Any], file: Path) -> dict[str, Path]:
    """Return a dict from part (see `PARTS`) to folder, for the modules that `bundled_parts` in `musiclm.json` lists."""
    named = card.get("bundled_parts", {})
    if not isinstance(named, dict) or not set(named) <= set(PARTS):
        raise ValueError(
            f"bundled_parts in {file} must be a dict with keys from {', '.join(PARTS)}, got {named!r:.200}"
        )
    available = {name: folder for name, folder in bundled_models().items() if (folder / "config.json").is_file()}
    for name in named.values():
        if name not in list(available):
            raise ValueError(
                f"{file} needs the bundled module {name!r:.100}, but this installation has "
                f"{', '.join(available) or 'none'}; install the release that wrote the model, or export the model again"
            )
    return {part: available[name] for part, name in named.items()}
