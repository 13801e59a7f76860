"""The sets of clips and the models of `musiclm evaluate music`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musiclm_pytorch.cli.checks import check_apart

if TYPE_CHECKING:
    import torch

    from audiolm_pytorch.codecs.base import Codec
    from audiolm_pytorch.data.items import ItemEntry
    from audiolm_pytorch.data.manifest import AudioItem
    from musiclm_pytorch.cli.evaluate import EvaluateMusic
    from musiclm_pytorch.evaluation.metric import Metric
    from musiclm_pytorch.evaluation.report import MetricValue
    from musiclm_pytorch.musiclm import MusicLM

__all__ = ["Prompt", "generate_clips", "load_real", "measured_sets", "prompts_of", "read_prompts", "write_codec_copies"]

_MANIFEST, _CODEC_COPIES, _GENERATED = "manifest.jsonl", "codec_copies", "generated"
_SECONDS, _NUM_SAMPLES, _TOKENIZER = 5.0, 4, "semantic_16khz"


@dataclass(frozen=True)
class Prompt:
    """Caption to generate from, the name of the real clip that it describes, and the labels of the real clip."""

    caption: str
    reference: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)


def load_real(source: Path, musiccaps: Path | None, limit: int | None, seed: int) -> "list[AudioItem]":
    """Load real clips: a manifest, a folder (its valid.jsonl if there is one), or clips of the MusicCaps table."""
    from musiclm_pytorch.mulan.evaluation import held_out_items
    from musiclm_pytorch.mulan.musiccaps import musiccaps_items

    if musiccaps is None:
        return held_out_items(source, limit, seed)
    return musiccaps_items(musiccaps, source).items[:limit]


def read_prompts(source: Path, limit: int | None) -> list[Prompt]:
    """Read the captions of a JSON-lines manifest (the audio files may be missing) or of the MusicCaps table."""
    from audiolm_pytorch.data.captions import caption_and_labels, manifest_rows
    from musiclm_pytorch.mulan.musiccaps import read_musiccaps

    if source.suffix.lower() == ".csv":
        prompts = [Prompt(clip.captions[0], clip.file_names[0]) for clip in read_musiccaps(source) if clip.captions]
        return prompts[:limit]
    prompts = []
    for place, fields in manifest_rows(source):
        audio = fields.pop("audio", None)
        caption, labels = caption_and_labels(fields)
        if not caption:
            raise ValueError(f"{source}, {place}: has no caption; add one, or delete the line")
        prompts.append(Prompt(caption, None if audio is None else Path(str(audio)).name, labels))
    if not prompts:
        raise ValueError(f"{source}: the manifest has no lines; write one JSON object with a caption per line")
    return prompts[:limit]


def prompts_of(items: "Sequence[AudioItem]") -> list[Prompt]:
    """Return the captions of real clips as prompts."""
    missing = [item.path for item in items if not item.caption]
    if missing:
        raise ValueError(f"{len(missing)} real clips have no caption, such as {missing[0]}; pass --captions")
    return [Prompt(item.caption or "", item.path.name, item.labels) for item in items]


def generate_clips(
    musiclm: "MusicLM",
    prompts: Sequence[Prompt],
    folder: Path,
    seconds: float,
    num_samples: int = 4,
    seed: int = 0,
    max_batch: int = 16,
    announce: Callable[[str], None] = lambda words: None,
) -> Path:
    """Write the best of `num_samples` candidates for every prompt as FLAC, and return the path of the manifest.

    Candidate i of every prompt has the seed `seed + i`.
    """
    from audiolm_pytorch.audio.files import write_audio
    from audiolm_pytorch.data.items import ItemEntry

    prompts_per_batch = max(max_batch // num_samples, 1)
    entries = []
    for number, prompt in enumerate(prompts):
        known = {} if prompt.reference is None else {"reference": prompt.reference}
        entries.append(ItemEntry(folder / f"{number:05d}.flac", prompt.caption, {**prompt.labels, **known}))
    manifest = _write_manifest(folder, entries)
    for first in range(0, len(prompts), prompts_per_batch):
        part = prompts[first : first + prompts_per_batch]
        announce(f"generating clip {first + 1} of {len(prompts)}")
        waves = musiclm(
            [prompt.caption for prompt in part],
            num_samples=num_samples,
            seconds=seconds,
            seeds=list(range(seed, seed + num_samples)),
            max_batch=max_batch,
        )
        for number, (prompt, wave) in enumerate(zip(part, waves), start=first):
            if not wave.isfinite().all():
                raise RuntimeError(f"the model generated NaN samples for {prompt.caption!r}; train it longer")
            write_audio(entries[number].path, wave.cpu(), musiclm.sample_hz)
    return manifest


def write_codec_copies(codec: "Codec", items: "Sequence[AudioItem]", folder: Path, seconds: float | None) -> Path:
    """Write a decoded copy of every clip as FLAC, with its caption and labels, and return the path of the manifest."""
    import torch

    from audiolm_pytorch.audio.files import peak_safe, write_audio
    from audiolm_pytorch.data.items import ItemEntry
    from audiolm_pytorch.nn.module_state import device_of

    entries = []
    for number, item in enumerate(items):
        labels = {**item.labels, "reference": item.path.name}
        entries.append(ItemEntry(folder / f"{number:05d}.flac", item.caption, labels))
    manifest = _write_manifest(folder, entries)
    for item, entry in zip(items, entries):
        wave = item.read(codec.target_sample_hz, codec.channels, duration_seconds=seconds)
        with torch.no_grad():
            codes, scales = codec.encode(wave[None].to(device_of(codec)))
            copy = codec.decode(codes, scales, wave.shape[-1])[0].float().cpu()
        write_audio(entry.path, peak_safe(copy), codec.target_sample_hz)
    return manifest


def _write_manifest(folder: Path, entries: "Sequence[ItemEntry]") -> Path:
    """Write the manifest of the clips in a folder, and return its path."""
    from audiolm_pytorch.data.manifest import manifest_text
    from audiolm_pytorch.saving.files import staged_files

    with staged_files(folder) as stage:
        (stage / _MANIFEST).write_text(manifest_text(entries, folder), encoding="utf-8")
    return folder / _MANIFEST


def measured_sets(
    command: "EvaluateMusic", device: "torch.device", announce: Callable[[str], None]
) -> "tuple[list[MetricValue], dict[str, Any]]":
    """Generate or load all sets of clips and measure them; return the values, and facts for the report."""
    from musiclm_pytorch.evaluation.metric import ClipSet, evaluate, extract, pair_with

    _check_clip_folders(command)
    real = None if command.real is None else load_real(command.real, command.musiccaps, command.limit, command.seed)
    metrics = _metrics(command, device)
    sources = _generated_sources(command, real, device, announce)

    def clip_set(name: str, items: "list[AudioItem]", selected: "Sequence[Metric]", pairs: Any = None) -> ClipSet:
        announce(f"{name}: {len(items)} clips")
        extractors = [metric.extractor for metric in selected]
        return ClipSet(name, items, extract(items, extractors, command.seconds, announce), pairs)

    held_out = None if real is None else clip_set("real clips", real, metrics)
    training = None
    if command.training is not None:
        users = [metric for metric in metrics if metric.uses_training]
        training = clip_set("training clips", _load_clips(command.training, None), users)
    sets = [clip_set(name, items, metrics, pair_with(items, real or [])) for name, items in sources.items()]
    values, left_out = evaluate(metrics, sets, held_out, training, announce)
    if not values:
        raise ValueError(f"no metric can be computed for these clips: {'; '.join(left_out.values())}")
    counts = {part.name: len(part) for part in (*sets, held_out, training) if part is not None}
    return values, {"clips": counts, "left_out": left_out}


def _check_clip_folders(command: "EvaluateMusic") -> None:
    """Check that the folders of new clips have no files of others, and none that the command reads."""
    from audiolm_pytorch.saving.ownership import check_folder_owner

    used = {_CODEC_COPIES: command.codec is not None, _GENERATED: command.model is not None}
    for folder in (command.out / name for name, is_used in used.items() if is_used):
        check_apart(folder, [command.real, command.training, command.labelled, command.captions, *command.generated])
        check_folder_owner(folder, {_MANIFEST: ("audio", "caption")}, "the clips of this command")


def _generated_sources(
    command: "EvaluateMusic",
    real: "list[AudioItem] | None",
    device: "torch.device",
    announce: Callable[[str], None],
) -> "dict[str, list[AudioItem]]":
    """Return the clips of every set to measure by its name; generate clips and write codec copies if asked to."""
    from audiolm_pytorch.codecs.base import Codec
    from musiclm_pytorch.musiclm import MusicLM

    sources: dict[str, list[AudioItem]] = {}
    if command.codec is not None and real is not None:
        codec = Codec.from_pretrained(**command.source_of(command.codec), device=device)
        manifest = write_codec_copies(codec, real, command.out / _CODEC_COPIES, command.seconds)
        sources["codec copies"] = _load_clips(manifest, None)
    for path in command.generated:
        name = path.parent.name if path.name == _MANIFEST else path.stem
        sources[name if name not in sources else str(path)] = _load_clips(path, command.limit)
    if command.model is not None:
        if command.captions is not None:
            prompts = read_prompts(command.captions, command.limit)
        elif real is not None:
            prompts = prompts_of(real)
        else:
            raise ValueError("--model needs --captions, or --real clips with captions")
        num_samples = command.num_samples or _NUM_SAMPLES
        manifest = generate_clips(
            MusicLM.from_pretrained(**command.source_of(command.model), device=device),
            prompts,
            command.out / _GENERATED,
            command.seconds or _SECONDS,
            num_samples,
            command.seed,
            announce=announce,
        )
        sources[f"{Path(command.model).name}, best of {num_samples}"] = _load_clips(manifest, None)
    if not sources and real is None:
        raise ValueError("nothing to measure; pass --generated, --model with --captions, or --real")
    return sources


def _load_clips(source: Path, limit: int | None) -> "list[AudioItem]":
    """Load a folder (its manifest if there is one) or a manifest."""
    from audiolm_pytorch.data.manifest import load_items

    manifest = source / _MANIFEST
    return load_items(manifest if manifest.is_file() else source).items[:limit]


def _metrics(command: "EvaluateMusic", device: "torch.device") -> "list[Metric]":
    """Open the models and list the metrics; with `--metrics`, only those whose name contains one of the texts."""
    from audiolm_pytorch.semantic.base import SemanticTokenizer
    from musiclm_pytorch.evaluation.classifier import fitted_classifier
    from musiclm_pytorch.evaluation.joint_embedder import JointEmbedder
    from musiclm_pytorch.evaluation.metrics.memorisation import SemanticTokens
    from musiclm_pytorch.evaluation.music import music_metrics
    from musiclm_pytorch.evaluation.musicnn import MusicNNExtractor, bundled_musicnn
    from musiclm_pytorch.mulan.joint import JointEmbedding

    models = {"MuLan": command.mulan} | ({} if command.clap is None else {"CLAP": command.clap})
    joint: list[Any] = [
        JointEmbedder(JointEmbedding.from_pretrained(**command.source_of(source), device=device), name)
        for name, source in models.items()
    ]
    tokens = None
    if command.training is not None:
        tokenizer = SemanticTokenizer.from_pretrained(
            **command.source_of(command.tokenizer or _TOKENIZER), device=device
        )
        tokens = SemanticTokens(tokenizer)
    fitted = None
    if command.labelled is not None or command.classifier is not None:
        if command.labelled is None and not (command.classifier or Path()).joinpath("config.json").is_file():
            raise ValueError(f"{command.classifier}: contains no classifier; pass --labelled, clips to fit one to")
        fitted = fitted_classifier(command.labelled or "", None, command.classifier).to(device)
    metrics = music_metrics(
        joint=joint,
        musicnn=MusicNNExtractor(bundled_musicnn().to(device)),
        classifier=fitted,
        tokens=tokens,
    )
    usable = [metric for metric in metrics if command.training is not None or not metric.uses_training]
    selected = [metric for metric in usable if not command.metrics or any(n in metric.name for n in command.metrics)]
    if not selected:
        names = ", ".join(metric.name for metric in usable)
        hint = "" if command.training is not None else "; more with --training"
        raise ValueError(f"--metrics {' '.join(command.metrics)}: no metric has such a name; there are {names}{hint}")
    return selected
