"""The parts of a MusicLM, read from and written to a model folder.

MODEL/<part>/       saved module with a name in `PARTS`
MODEL/musiclm.json  format version, names of the parts, origin, and two optional defaults for generation:
                    "sampling" {stage: {temperature, top_k, top_p, guidance_scale}} and "num_levels"
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import TextEncoder
from audiolm_pytorch.lm.compatibility import as_loaded, check_loadable
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.saving.model_folder import read_model_folder, write_model_folder
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
    folder: str | Path,
    parts: Mapping[str, nn.Module],
    about: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    bundled: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a model folder and return its files; an existing model is replaced only after all files are written.

    The JSON-able entries of `about` are added to `musiclm.json`. Weights are stored as `dtype` (None keeps their
    types), except in a part that `dtype` would round although other parts store its fingerprint. `bundled` has the
    names of bundled modules, for parts that are not written. A part that has changed after the stages were trained with
    it raises a ValueError, since the model could not be loaded.
    """
    stages = {name: part for name, part in parts.items() if isinstance(part, StageTransformer)}
    modules: list[Any] = [parts.get(name) for name in ("semantic_tokenizer", "codec", "quantizer", "text_conditioner")]
    check_loadable(stages.values(), *modules)
    if "melody" in parts:
        as_loaded(parts["melody"]).check_compatible(stages)
    return write_model_folder(folder, CARD, parts, about, dtype, _FINGERPRINTED, bundled)


@typed
def read_parts(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the card and the parts of the model in a folder."""
    required = PARTS.keys() - _OPTIONAL
    return read_model_folder(Path(folder) / CARD, _KINDS, required=required, fingerprinted=_FINGERPRINTED.keys())
