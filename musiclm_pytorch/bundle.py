"""Model folders: all parts of a MusicLM side by side, bundled with the package or anywhere on disk.

MODEL/musiclm.json            format version, sampling settings, where it comes from
MODEL/<part>/config.json      one saved module for each of `PARTS`
MODEL/<part>/model.safetensors
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import nn

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.io import load_module, read_json, save_module, write_json
from musiclm_pytorch.musiclm import MusicLM

__all__ = ["FORMAT_VERSION", "PARTS", "export_musiclm", "load_musiclm", "model_folder", "save_parts"]

FORMAT_VERSION = 1
PARTS = ("codec", "semantic_tokenizer", "quantizer", "semantic", "coarse", "fine")
_CARD = "musiclm.json"


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
        dtype: Of the stored weights, e.g. `torch.float16`; as they are if not given.
    """
    folder = Path(folder)
    for name in PARTS:
        save_module(parts[name], folder / name, dtype=dtype)
    write_json(folder / _CARD, {"format_version": FORMAT_VERSION, **about})


@beartype
def model_folder(name_or_folder: str | Path) -> Path:
    """The folder of a model: a folder on disk, or the name of a bundled model.

    Raises:
        ValueError: If it is neither, naming the bundled models.
    """
    folder = Path(name_or_folder)
    if (folder / _CARD).is_file():
        return folder
    if folder.is_dir():
        raise ValueError(f"{folder} holds no model: there is no {_CARD} in it; finish it with musiclm train all")
    bundled = Path(str(files("musiclm_pytorch") / "bundled"))
    names = sorted(path.parent.name for path in bundled.glob(f"*/{_CARD}"))
    if str(name_or_folder) in names:
        return bundled / str(name_or_folder)
    raise ValueError(
        f"there is no model {str(name_or_folder)!r}: give the folder of a trained one"
        + (f" or a bundled name: {', '.join(names)}" if names else "; this installation bundles none")
    )


def _load_parts(folder: Path) -> dict[str, nn.Module]:
    missing = [name for name in PARTS if not (folder / name / "config.json").is_file()]
    if missing:
        raise ValueError(f"the model in {folder} lacks {', '.join(missing)}; copy the whole folder again")
    return {name: load_module(folder / name) for name in PARTS}


@beartype
def load_musiclm(name_or_folder: str | Path = "tiny", device: str | torch.device = "cpu") -> MusicLM:
    """Load a model, without network.

    Args:
        name_or_folder: Name of a bundled model, or a folder that `musiclm train all` or `musiclm export` wrote.
        device: Where to put it.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: If there is no such model, or a file of it is missing or of another format.
    """
    folder = model_folder(name_or_folder)
    about = read_json(folder / _CARD)
    if about.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / _CARD} has format version {about.get('format_version')}, this library reads {FORMAT_VERSION}"
        )
    parts = _load_parts(folder)
    audio_lm = AudioLM(
        wav2vec=parts["semantic_tokenizer"],
        codec=parts["codec"],
        semantic_transformer=parts["semantic"],
        coarse_transformer=parts["coarse"],
        fine_transformer=parts["fine"],
        audio_conditioner=parts["quantizer"],
        sampling=about.get("sampling"),
    )
    musiclm = MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=parts["quantizer"])
    return musiclm.to(device).eval()


@beartype
def export_musiclm(run: str | Path, out: str | Path) -> int:
    """Write the model of a finished run with fp16 weights.

    Args:
        run: Folder of `musiclm train all`, or a model folder.
        out: Folder to write.

    Returns:
        Bytes of all files written.

    Raises:
        ValueError: If the run is not finished.
    """
    run, out = Path(run), Path(out)
    folder = model_folder(run / "model" if (run / "run.json").is_file() else run)
    about = {key: value for key, value in read_json(folder / _CARD).items() if key != "format_version"}
    save_parts(out, _load_parts(folder), {**about, "weights": "float16"}, dtype=torch.float16)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
