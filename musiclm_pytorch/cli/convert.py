"""`musiclm convert hubert | vq-wav2vec | musiccaps`: convert published files to the formats of this library."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from musiclm_pytorch.cli.checks import check_file, check_folder

if TYPE_CHECKING:
    from audiolm_pytorch.data.manifest import AudioItem

from audiolm_pytorch.saving.text import printable

__all__ = ["Hubert", "MusicCaps", "VqWav2vec"]

_SPLIT_COLUMNS = {"eval": "is_audioset_eval", "balanced": "is_balanced_subset"}


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    checkpoint: Path
    """The published checkpoint (hubert_base_ls960.pt, vq-wav2vec.pt, ...), or for HuBERT a folder of transformers."""
    out: Path
    """Folder to write, new or empty."""

    def execute(self) -> int:
        """Convert the checkpoint, and never overwrite an existing file."""
        _convert_checkpoint(self)
        return 0


@dataclass(frozen=True, kw_only=True)
class Hubert(_Checkpoint):
    """Convert a HuBERT checkpoint and its k-means model, which are pickle files, to one folder of safetensors files."""

    kmeans: Path
    """The published k-means of one layer, e.g. hubert_base_ls960_L9_km500.bin, or centroids as .safetensors."""
    output_layer: int = 9
    """The layer that the k-means was fitted on."""


@dataclass(frozen=True, kw_only=True)
class VqWav2vec(_Checkpoint):
    """Convert a vq-wav2vec checkpoint, which is a pickle file, to a folder of safetensors files."""


@dataclass(frozen=True, kw_only=True)
class MusicCaps:
    """Write a training manifest from the MusicCaps table and a folder of MusicCaps clips."""

    csv: Path
    """The published table, musiccaps-public.csv, or another one with its columns."""
    clips: Path
    """Folder of the clips, named {ytid}, {ytid}-{start} or [{ytid}]-[{start}-{end}]."""
    out: Path
    """Manifest to write, e.g. train.jsonl. Paths of clips below its folder are relative."""
    split: Literal["none", "eval", "balanced"] = "none"
    """Clips for valid.jsonl beside train.jsonl: AudioSet's evaluation part, or the genre-balanced 1,000."""
    missing: Path | None = None
    """Also write the ids of the clips that are not in the folder, one a line."""

    def execute(self) -> int:
        """Write the manifests of the clips, and never overwrite an existing file."""
        _convert_musiccaps(self)
        return 0


def _convert_checkpoint(command: _Checkpoint) -> None:
    from audiolm_pytorch.saving.fingerprint import part_fingerprint
    from audiolm_pytorch.saving.modules import MODULE_MARKS, load_module, save_module
    from audiolm_pytorch.saving.ownership import check_folder_owner
    from audiolm_pytorch.semantic.pretrained import FairseqVQWav2Vec, HubertWithKmeans

    sources = [command.checkpoint, command.kmeans] if isinstance(command, Hubert) else [command.checkpoint]
    for source in sources:
        if not source.exists():
            raise ValueError(f"{source}: no such file; download the published checkpoint and pass its path")
    check_folder(command.out)
    check_folder_owner(command.out, {"config.json": MODULE_MARKS}, "a converted model")
    is_taken = (command.out / "config.json").is_file()
    tokenizer: HubertWithKmeans | FairseqVQWav2Vec
    if isinstance(command, Hubert):
        tokenizer = HubertWithKmeans(command.checkpoint, command.kmeans, output_layer=command.output_layer)
    else:
        tokenizer = FairseqVQWav2Vec(command.checkpoint)
    if is_taken:
        try:
            fingerprint = part_fingerprint(load_module(command.out))
        except ValueError as error:
            raise ValueError(
                f"--out {command.out} contains a config.json of another model ({error}); pass a new folder"
            ) from error
        if fingerprint != tokenizer.fingerprint():
            raise ValueError(
                f"--out {command.out} contains a model with fingerprint {fingerprint}, the checkpoint has fingerprint "
                f"{tokenizer.fingerprint()}; pass a new folder"
            )
    else:
        save_module(tokenizer, command.out, extra={"converted_from": [source.name for source in sources]})
    num_bytes = sum(file.stat().st_size for file in command.out.iterdir() if file.is_file())
    print(
        f"{'unchanged:' if is_taken else 'wrote'} {printable(command.out)}  {type(tokenizer).__name__}, "
        f"{tokenizer.codebook_size} tokens, {num_bytes / 1e6:.1f} MB, fingerprint {tokenizer.fingerprint()}"
    )


def _convert_musiccaps(command: MusicCaps) -> None:
    check_file(command.out, (".jsonl",))
    if command.split != "none" and command.out.name != "train.jsonl":
        raise ValueError(
            f"with --split, --out must be called train.jsonl; pass --out {command.out.with_name('train.jsonl')}"
        )
    if command.missing is not None:
        check_file(command.missing, (".txt", ".csv"))

    from audiolm_pytorch.data.manifest import manifest_text
    from audiolm_pytorch.saving.files import staged_files
    from musiclm_pytorch.mulan.musiccaps import musiccaps_items

    clips = musiccaps_items(command.csv, command.clips)
    manifests: dict[Path, list[AudioItem]] = {command.out: clips.items}
    if command.split != "none":
        train, valid = clips.split(_SPLIT_COLUMNS[command.split])
        if not (train and valid):
            raise ValueError(
                f"--split {command.split} leaves {len(train)} training and {len(valid)} held-out clips; omit --split"
            )
        manifests = {command.out: train, command.out.with_name("valid.jsonl"): valid}
    texts = {path: manifest_text(items, path.parent) for path, items in manifests.items()}
    if command.missing is not None:
        texts[command.missing] = "".join(f"{ytid}\n" for ytid in dict.fromkeys(clip.ytid for clip in clips.missing))
    existing = {path: path.read_bytes() for path in texts if path.exists()}
    for path, content in existing.items():
        if content != texts[path].encode():
            raise ValueError(f"{path} exists with other contents; move that file away or name another file")
    for path, text in texts.items():
        if path not in existing:
            with staged_files(path.parent) as staging:
                (staging / path.name).write_text(text, encoding="utf-8", newline="\n")
        content_info = (
            f"{len(manifests[path])} clips" if path in manifests else f"{len(clips.missing)} ids of missing clips"
        )
        print(f"{'unchanged:' if path in existing else 'wrote'} {printable(path)}  {content_info}")
    num_described = len(clips.items) + len(clips.rejected) + len(clips.missing)
    print(
        f"of {num_described} described clips {len(clips.items)} can be used, {len(clips.rejected)} cannot, "
        f"{len(clips.missing)} are missing"
    )
