"""Export the model of a training run as a model folder with fp16 weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.model_folder import CARD_MARKS
from audiolm_pytorch.saving.ownership import check_folder_owner
from audiolm_pytorch.saving.sharing import card_text, write_card
from audiolm_pytorch.saving.sources import licence_of
from musiclm_pytorch.musicgen import published
from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pretrained.parts import CARD, read_parts, save_parts

__all__ = ["export_musicgen", "export_musiclm"]


@typed
def export_musiclm(
    run: str | Path,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    bundled: Mapping[str, str] | None = None,
    allow_noncommercial: bool = False,
) -> int:
    """Copy the model of the training run or model folder `run` to `out` with fp16 weights; return its size in bytes.

    The folder `out` must be new or empty, or contain a model, which is then replaced. `settings` are fields of
    `musiclm.json`, for example `{"num_levels": 2}` or `{"sampling": {"coarse": {"temperature": 0.8}}}`. `bundled`
    lists parts that are not copied, with the names of equal bundled modules, for example `{"codec": "codec_16khz"}`.
    The new card has the licence of the card of `run`.
    """
    folder, out = MusicLM.find(run, allow_noncommercial=allow_noncommercial), Path(out)
    check_folder_owner(out, {CARD: CARD_MARKS}, "a model")
    card, parts = read_parts(folder)
    card.update({**(settings or {}), "weights": "float16"})
    text = card_text(MusicLM.of_parts(parts, card, folder), licence_of(folder, run))
    about = {key: value for key, value in card.items() if key not in ("format_version", "parts", "bundled_parts")}
    files = [*save_parts(out, parts, about, torch.float16, bundled), write_card(out, text)]
    return sum(file.stat().st_size for file in files)


@typed
def export_musicgen(
    run: str | Path,
    out: str | Path,
    *,
    bundled: Mapping[str, str] | None = None,
    allow_noncommercial: bool = False,
) -> int:
    """Copy a MusicGen of any format as `export_musiclm` does, to a folder in the format of this library."""
    hub, out = {"allow_noncommercial": allow_noncommercial}, Path(out)
    folder, _ = published.find_musicgen(run, **hub)
    check_folder_owner(out, {published.CARD: CARD_MARKS}, "a model")
    parts = published.load_musicgen_parts(run, None, hub)
    text = card_text(MusicGen(**vars(parts)), licence_of(folder, run))
    files = [*published.write_own_parts(out, parts, torch.float16, bundled), write_card(out, text)]
    return sum(file.stat().st_size for file in files)
