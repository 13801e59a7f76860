"""`musiclm convert hubert | vq-wav2vec | musiccaps`: what others published, read safely, written as is used here."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from musiclm_pytorch.cli.checks import check_file, check_folder

if TYPE_CHECKING:
    from audiolm_pytorch.data.manifest import AudioItem
    from audiolm_pytorch.semantic.pretrained.hubert import HubertWithKmeans
    from audiolm_pytorch.semantic.pretrained.vq_wav2vec import FairseqVQWav2Vec

__all__ = ["ConvertCommand", "Hubert", "MusicCaps", "VqWav2vec", "run_convert"]

_SPLIT_COLUMNS = {"eval": "is_audioset_eval", "balanced": "is_balanced_subset"}


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


@dataclass(frozen=True, kw_only=True)
class MusicCaps:
    """Join the table of MusicCaps and a folder of its clips into a manifest that every trainer reads."""

    csv: Path
    """The published table, musiccaps-public.csv, or another one with its columns."""
    clips: Path
    """Folder of the clips that you have, named {ytid}, {ytid}-{start} or [{ytid}]-[{start}-{end}]."""
    out: Path
    """Manifest to write, e.g. train.jsonl; paths below its folder are relative to it."""
    split: Literal["none", "eval", "balanced"] = "none"
    """Which clips go into valid.jsonl beside train.jsonl: AudioSet's evaluation part, or the genre-balanced 1,000."""
    missing: Path | None = None
    """Also write the ids of clips that are described and not in the folder, one a line."""


ConvertCommand = (
    Annotated[Hubert, tyro.conf.subcommand("hubert")]
    | Annotated[VqWav2vec, tyro.conf.subcommand("vq-wav2vec")]
    | Annotated[MusicCaps, tyro.conf.subcommand("musiccaps")]
)


def run_convert(command: Hubert | VqWav2vec | MusicCaps) -> int:
    """Carry a conversion out; the same one again finds what it wrote and leaves it as it is.

    Args:
        command: What to convert.

    Returns:
        Exit status 0.

    Raises:
        ImportError: If transformers is needed and not installed.
        ValueError: If a file is missing or not what it should be, or there is something else where it would be written.
    """
    return _convert_musiccaps(command) if isinstance(command, MusicCaps) else _convert_checkpoint(command)


def _convert_checkpoint(command: Hubert | VqWav2vec) -> int:
    """Write a published checkpoint as safetensors."""
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
        from audiolm_pytorch.saving.modules import save_module

        save_module(tokenizer, command.out, extra={"converted_from": [source.name for source in sources]})
    num_bytes = sum(file.stat().st_size for file in command.out.iterdir() if file.is_file())
    sys.stdout.write(
        f"{said} {command.out}  {type(tokenizer).__name__}, {tokenizer.codebook_size} tokens, "
        f"{num_bytes / 1e6:.1f} MB, fingerprint {tokenizer.fingerprint()}\n"
    )
    return 0


def _opened(command: Hubert | VqWav2vec) -> "HubertWithKmeans | FairseqVQWav2Vec":
    """The tokenizer that the published files hold."""
    match command:
        case Hubert():
            from audiolm_pytorch.semantic.pretrained.hubert import HubertWithKmeans

            return HubertWithKmeans(command.checkpoint, command.kmeans, output_layer=command.output_layer)
        case VqWav2vec():
            from audiolm_pytorch.semantic.pretrained.vq_wav2vec import FairseqVQWav2Vec

            return FairseqVQWav2Vec(command.checkpoint)


def _check_same(tokenizer: "HubertWithKmeans | FairseqVQWav2Vec", folder: Path) -> None:
    """Refuse a folder that holds anything but this very tokenizer: language models may hang on what is there."""
    from audiolm_pytorch.saving.fingerprint import part_fingerprint
    from audiolm_pytorch.saving.modules import load_module

    try:
        found = part_fingerprint(load_module(folder))
    except ValueError as error:
        raise ValueError(f"{folder} holds another config.json; give a new folder as --out ({error})") from error
    if found != tokenizer.fingerprint():
        raise ValueError(
            f"{folder} holds another model (fingerprint {found}, that of the files is {tokenizer.fingerprint()}); "
            "give a new folder as --out"
        )


def _convert_musiccaps(command: MusicCaps) -> int:
    """Write the clips of MusicCaps that are there as a manifest, or as two."""
    check_file(command.out, (".jsonl",))
    if command.split != "none" and command.out.name != "train.jsonl":
        raise ValueError(
            f"--split writes train.jsonl and valid.jsonl; name --out {command.out.with_name('train.jsonl')}"
        )
    if command.missing is not None:
        check_file(command.missing, (".txt", ".csv"))
    from audiolm_pytorch.data.manifest import manifest_text
    from audiolm_pytorch.saving.files import staged_files
    from musiclm_pytorch.mulan.musiccaps import musiccaps_items

    found = musiccaps_items(command.csv, command.clips)
    sides: dict[Path, list[AudioItem]] = {command.out: found.items}
    if command.split != "none":
        train, valid = found.split(_SPLIT_COLUMNS[command.split])
        if not (train and valid):
            raise ValueError(f"--split {command.split} gives {len(train)} and {len(valid)} clips; leave it out")
        sides = {command.out: train, command.out.with_name("valid.jsonl"): valid}
    texts = {path: manifest_text(items, path.parent) for path, items in sides.items()}
    if command.missing is not None:
        texts[command.missing] = "".join(f"{ytid}\n" for ytid in dict.fromkeys(clip.ytid for clip in found.missing))
    known = {path: path.read_bytes() if path.exists() else None for path in texts}
    for path, text in texts.items():
        if known[path] not in (None, text.encode()):
            raise ValueError(f"{path} exists and holds something else; move it away or name another file")
    for path, text in texts.items():
        if known[path] != text.encode():
            with staged_files(path.parent) as stage:
                (stage / path.name).write_text(text, encoding="utf-8", newline="\n")
        about = f"{len(sides[path])} clips" if path in sides else f"{len(found.missing)} ids of missing clips"
        sys.stdout.write(f"{'unchanged:' if known[path] == text.encode() else 'wrote'} {path}  {about}\n")
    num_described = len(found.items) + len(found.rejected) + len(found.missing)
    sys.stdout.write(
        f"of {num_described} described clips {len(found.items)} can be used, "
        f"{len(found.rejected)} cannot, {len(found.missing)} are missing\n"
    )
    return 0
