"""`musiclm convert hubert | vq-wav2vec`: published checkpoints, read once and safely, written as safetensors."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from musiclm_pytorch.command_checks import check_folder

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ConvertCommand", "Hubert", "VqWav2vec", "run_convert"]


@dataclass(frozen=True, kw_only=True)
class Hubert:
    """Write HuBERT and its k-means, two pickles, as one folder of safetensors that opens without a pickle."""

    checkpoint: Path
    """The published checkpoint, e.g. hubert_base_ls960.pt, or a model's folder in the format of transformers."""
    kmeans: Path
    """The published k-means of one of its layers, e.g. hubert_base_ls960_L9_km500.bin, or centroids as .safetensors."""
    out: Path
    """Folder to write; new, or empty."""
    output_layer: int = 9
    """The layer that the k-means was fitted on."""


@dataclass(frozen=True, kw_only=True)
class VqWav2vec:
    """Write a vq-wav2vec checkpoint, a pickle, as a folder of safetensors that opens without a pickle."""

    checkpoint: Path
    """The published checkpoint, e.g. vq-wav2vec.pt or vq-wav2vec_kmeans.pt."""
    out: Path
    """Folder to write; new, or empty."""


ConvertCommand = (
    Annotated[Hubert, tyro.conf.subcommand("hubert")] | Annotated[VqWav2vec, tyro.conf.subcommand("vq-wav2vec")]
)


def run_convert(command: Hubert | VqWav2vec) -> int:
    """Carry a conversion out; the same one again finds its own folder and leaves it as it is.

    Args:
        command: What to convert.

    Returns:
        Exit status 0.

    Raises:
        ImportError: If transformers is needed and not installed.
        ValueError: If a file is missing or not what it should be, or the folder holds anything else.
    """
    sources = [command.checkpoint, command.kmeans] if isinstance(command, Hubert) else [command.checkpoint]
    for source in sources:
        if not source.exists():
            raise ValueError(f"{source}: no such file; download the published one and name it here")
    check_folder(command.out)
    # hidden: what a conversion leaves behind that was killed while it wrote
    taken = command.out.is_dir() and any(not file.name.startswith(".") for file in command.out.iterdir())
    if taken and not (command.out / "config.json").is_file():
        raise ValueError(f"{command.out} holds other files; give a folder that is new or empty as --out")
    tokenizer = _opened(command)
    said = "wrote"
    if taken:
        _check_same(tokenizer, command.out)
        said = "unchanged:"
    else:
        from audiolm_pytorch.io import save_module

        save_module(tokenizer, command.out, extra={"converted_from": [source.name for source in sources]})
    num_bytes = sum(file.stat().st_size for file in command.out.iterdir() if file.is_file())
    sys.stdout.write(
        f"{said} {command.out}  {type(tokenizer).__name__}, {tokenizer.codebook_size} tokens, "
        f"{num_bytes / 1e6:.1f} MB, fingerprint {tokenizer.fingerprint}\n"
    )
    return 0


def _opened(command: Hubert | VqWav2vec) -> "nn.Module":
    """The tokenizer that the published files hold."""
    match command:
        case Hubert():
            from audiolm_pytorch.semantic.pretrained.hubert import HubertWithKmeans

            return HubertWithKmeans(command.checkpoint, command.kmeans, output_layer=command.output_layer)
        case VqWav2vec():
            from audiolm_pytorch.semantic.pretrained.vq_wav2vec import FairseqVQWav2Vec

            return FairseqVQWav2Vec(command.checkpoint)


def _check_same(tokenizer: "nn.Module", folder: Path) -> None:
    """Refuse a folder that holds anything but this very tokenizer: language models may hang on what is there."""
    from audiolm_pytorch.io import load_module

    try:
        found = getattr(load_module(folder), "fingerprint", None)
    except ValueError as error:
        raise ValueError(f"{folder} holds another config.json; give a new folder as --out ({error})") from error
    if found != tokenizer.fingerprint:
        raise ValueError(
            f"{folder} holds another model (fingerprint {found}, that of the files is {tokenizer.fingerprint}); "
            "give a new folder as --out"
        )
