"""Export the model of a training run as a model folder, which contains a whole MusicLM (see `parts`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.model_folder import CARD_MARKS
from audiolm_pytorch.saving.ownership import check_folder_owner
from audiolm_pytorch.saving.sharing import card_text, write_card
from audiolm_pytorch.saving.sources import licence_of
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pretrained.parts import CARD, read_parts, save_parts

__all__ = ["export_musiclm"]


@typed
def export_musiclm(
    run: str | Path, out: str | Path, settings: Mapping[str, Any] | None = None, *, allow_noncommercial: bool = False
) -> int:
    """Copy the model of the training run or model folder `run` to `out` with fp16 weights; return its size in bytes.

    The folder `out` must be new or empty, or contain a model, which is then replaced. `settings` are fields of
    `musiclm.json`, for example `{"num_levels": 2}` or `{"sampling": {"coarse": {"temperature": 0.8}}}`.
    The new card has the licence of the card of `run`.
    """
    folder, out = MusicLM.find(run, allow_noncommercial=allow_noncommercial), Path(out)
    check_folder_owner(out, {CARD: CARD_MARKS}, "a model")
    card, parts = read_parts(folder)
    card.update({**(settings or {}), "weights": "float16"})
    text = card_text(MusicLM.of_parts(parts, card, folder), licence_of(folder, run))
    about = {key: value for key, value in card.items() if key not in ("format_version", "parts", "bundled_parts")}
    files = [*save_parts(out, parts, about, torch.float16), write_card(out, text)]
    return sum(file.stat().st_size for file in files)
