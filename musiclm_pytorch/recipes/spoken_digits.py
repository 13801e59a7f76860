"""Training and evaluation of an AudioLM on spoken digits, in about an hour on one CPU core.

Run as `python -m musiclm_pytorch.recipes.spoken_digits --data speech_digits --out run`.

The folder `speech_digits` contains the Free Spoken Digit Dataset and a manifest with the fields `digit` and `speaker`.
Prompts and test words are takes 5 to 9 of each digit and speaker, which are never used for training. The stages are
trained on takes 10 to 47 and validated on takes 48 and 49. The codec and the semantic tokenizer are trained on takes 10
to 49.

One word is too short to train continuations, so words of one speaker are joined into clips of 5 s, with pauses of 0.15
to 0.4 s of digital silence. Running the command again continues an interrupted training.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from audiolm_pytorch import (
    AudioLM,
    CoarseTransformer,
    CoarseTransformerTrainer,
    FineTransformer,
    FineTransformerTrainer,
    GenerationRequest,
    SemanticTransformer,
    SemanticTransformerTrainer,
    SoundStream,
    SoundStreamTrainer,
)
from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.audio.units import samples_in
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.training import MEL_ONLY
from audiolm_pytorch.data import AudioItem
from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.data.shards import TokenShards, write_shards
from audiolm_pytorch.lm.compatibility import shard_fingerprint
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.semantic.base import SemanticTokenizer
from musiclm_pytorch.evaluation.clips import labels_of, load_clips
from musiclm_pytorch.evaluation.report import MetricValue, markdown_table, write_report
from musiclm_pytorch.recipes.memory import peak_bytes_of
from musiclm_pytorch.recipes.metrics.generation_metrics import reconstruct
from musiclm_pytorch.recipes.metrics.spoken_metrics import (
    classifier_metrics,
    confidence_metrics,
    confidence_table,
    fit_word_classifier,
    generated_waves,
    recognized_words,
    speaker_metrics,
    speakers_of,
)
from musiclm_pytorch.recipes.semantic import is_held_out, join_words

__all__ = ["Words", "build_stages", "evaluate", "main", "memory_metrics", "open_audiolm", "split_words"]

# Pauses are longer than a stop inside a word, see `cut_words`.
PAUSE_SECONDS = (0.15, 0.4)
FIRST_VALID_TAKE = 48
NUM_CODEC_CLIPS, NUM_CODEC_VALID = 1200, 16
NUM_CLIPS, NUM_VALID_CLIPS = 2400, 64
CODEC_STEPS = 1300
# The classifier needs two of the eight levels. The coarse stage predicts two, the fine stage two more.
NUM_COARSE_LEVELS, NUM_LEVELS = 2, 4

# Temperatures of AudioLM for speech (arXiv:2209.03143, sec. IV-B).
SAMPLING = {"semantic": {"temperature": 0.6}, "coarse": {"temperature": 0.8}, "fine": {"temperature": 0.6}}
NUM_PROMPTS, NUM_SAMPLES = 240, 240
PROMPT_SECONDS, WAVE_SECONDS = 1.0, 3.0
# The receptive field of the decoder is 0.58 s: later samples do not depend on the tokens of the prompt.
DECODER_SECONDS = 0.6
MEMORY_SECONDS, MEMORY_RUNS = (10, 60), 3


@dataclass(frozen=True)
class _Stage:
    """Training settings of one stage: number of steps, clips per step, and length of a clip."""

    num_steps: int
    batch_size: int
    seconds: float


STAGES = {"semantic": _Stage(1500, 32, 3.0), "coarse": _Stage(1800, 16, 3.0), "fine": _Stage(1200, 16, 2.0)}
_SIZES: dict[str, Any] = dict(dim=192, depth=6, heads=3, dim_head=64, dropout=0.1)


@dataclass(frozen=True)
class Words:
    """Recorded words, split into words for training, validation and test."""

    train: list[AudioItem]
    valid: list[AudioItem]
    test: list[AudioItem]


@typed
def split_words(items: Sequence[AudioItem]) -> Words:
    """Split recordings by their takes: 10 to 47 for training, 48 and 49 for validation, and 0 to 9 for test."""
    not_held_out = [item for item in items if not is_held_out(item)]
    is_valid = [int(item.path.stem.rpartition("_")[2]) >= FIRST_VALID_TAKE for item in not_held_out]
    words = Words(
        [item for item, valid in zip(not_held_out, is_valid) if not valid],
        [item for item, valid in zip(not_held_out, is_valid) if valid],
        [item for item in items if is_held_out(item)],
    )
    if not (words.train and words.valid and words.test):
        raise ValueError(
            f"got {len(words.test)} recordings of takes 0 to 9, {len(words.train)} of takes 10 to "
            f"{FIRST_VALID_TAKE - 1} and {len(words.valid)} of later takes; add recordings of the missing takes"
        )
    return words


@typed
def build_stages(codec: Codec, tokenizer: SemanticTokenizer, seed: int = 0) -> dict[str, StageTransformer]:
    """Create unconditional AudioLM stages with random weights, for the tokens of `codec` and `tokenizer`."""
    torch.manual_seed(seed)
    semantic_hz = Fraction(tokenizer.target_sample_hz, tokenizer.downsample_factor)
    frame_hz = Fraction(codec.target_sample_hz, codec.downsample_factor)
    acoustic: dict[str, Any] = dict(
        codebook_size=codec.codebook_size, num_coarse_quantizers=NUM_COARSE_LEVELS, rate_hz=frame_hz
    )
    return {
        "semantic": SemanticTransformer(
            num_semantic_tokens=tokenizer.codebook_size, rate_hz=semantic_hz, eos=False, **_SIZES
        ),
        "coarse": CoarseTransformer(
            num_semantic_tokens=tokenizer.codebook_size, semantic_rate_hz=semantic_hz, **acoustic, **_SIZES
        ),
        "fine": FineTransformer(num_fine_quantizers=NUM_LEVELS - NUM_COARSE_LEVELS, **acoustic, **_SIZES),
    }


def _train_codec(words: Sequence[AudioItem], out: Path, seed: int, scale: float) -> SoundStream:
    """Continue the training of the bundled codec, which was trained only on music, with joined words."""
    clips = join_words(words, out / "codec_clips", NUM_CODEC_CLIPS, seed)
    codec = Codec.from_pretrained("codec_16khz")
    if not isinstance(codec, SoundStream):
        raise ValueError(f"the bundled codec is a {type(codec).__name__}, this script needs a SoundStream")
    codec.train().requires_grad_(True)
    SoundStreamTrainer(
        codec,
        items=(clips[:-NUM_CODEC_VALID], clips[-NUM_CODEC_VALID:]),
        batch_size=16,
        results_folder=out / "codec",
        loss_weights=MEL_ONLY,
        **_schedule(scale * CODEC_STEPS, seed),
    ).train()
    save_module(codec, out / "model" / "codec")
    return codec.eval().requires_grad_(False)


def _schedule(num_steps: float, seed: int) -> dict[str, Any]:
    """Return the training options that the codec and all stages share."""
    steps = max(10, round(num_steps))
    return {
        "num_train_steps": steps,
        "learning_rate": 1e-3,
        "warmup_steps": min(100, steps // 10),
        "precision": "bf16",
        "seed": seed,
        "validate_every": 300,
        "log_every": 50,
    }


@torch.inference_mode()
def _tokens(clips: Sequence[AudioItem], codec: Codec, tokenizer: SemanticTokenizer, folder: Path) -> TokenShards:
    """Write the semantic and acoustic tokens of clips to token shards."""

    def make_record(index: int) -> dict[str, np.ndarray]:
        wave = read_audio(clips[index].path, codec.target_sample_hz)[0]
        return {
            "semantic": tokenizer.forward(wave, codec.target_sample_hz)[0].numpy(),
            "acoustic": codec.tokenize(wave)[0].numpy(),
        }

    fingerprint = shard_fingerprint(tokenizer, codec)
    write_shards(folder, make_record, len(clips), fingerprint)
    return TokenShards(folder, fingerprint)


def _train_stages(
    stages: dict[str, StageTransformer], shards: tuple[TokenShards, TokenShards], out: Path, seed: int, scale: float
) -> None:
    """Train and save the semantic, the coarse and the fine stage."""
    trainers: dict[str, Any] = {
        "semantic": SemanticTransformerTrainer,
        "coarse": CoarseTransformerTrainer,
        "fine": FineTransformerTrainer,
    }
    for name, transformer in stages.items():
        run = STAGES[name]
        trainers[name](
            transformer=transformer,
            shards=shards,
            data_max_length_seconds=run.seconds,
            batch_size=run.batch_size,
            results_folder=out / name,
            **_schedule(scale * run.num_steps, seed),
        ).train()
        save_module(transformer, out / "model" / name)


@typed
def open_audiolm(folder: str | Path) -> AudioLM:
    """Load the AudioLM in the folder `OUT/model`, in eval mode."""
    parts: dict[str, Any] = {name: load_module(Path(folder) / name) for name in ("codec", *STAGES)}
    stages = {f"{name}_transformer": parts[name] for name in STAGES}
    return AudioLM(
        wav2vec=SemanticTokenizer.from_pretrained("semantic_16khz"), codec=parts["codec"], sampling=SAMPLING, **stages
    ).eval()


@typed
def evaluate(audiolm: AudioLM, words: Words, out: Path, seed: int = 0) -> tuple[list[MetricValue], str]:
    """Measure continuations of held-out prompts and unconditional samples with a classifier of spoken words.

    Args:
        audiolm: AudioLM to measure.
        words: Recorded words; the classifier is fitted to `words.train`, and prompts consist of `words.test`.
        out: Folder for clips of joined words.
        seed: Seed of the random choice of words and pauses.

    Returns:
        The metrics, and the distribution of the classifier confidences as Markdown text.
    """
    hz, codec = audiolm.codec.target_sample_hz, audiolm.codec
    classifier = fit_word_classifier(words.train)
    metrics = classifier_metrics(classifier, audiolm, words.test)
    clips = join_words(words.test, out / "test_clips", NUM_PROMPTS, seed, PAUSE_SECONDS)
    real = load_clips(clips, hz, WAVE_SECONDS)
    copies = reconstruct(codec, real, num_levels=NUM_LEVELS)
    start = samples_in(PROMPT_SECONDS, hz)
    continued = generated_waves(audiolm, NUM_PROMPTS, WAVE_SECONDS, real[:, :start], hz)
    samples = generated_waves(audiolm, NUM_SAMPLES, WAVE_SECONDS)
    waves = {"continuations": continued, "real continuations": real, "real continuations after the codec": copies}
    parts = {name: wave[:, start:] for name, wave in waves.items()}
    parts["unconditional samples"] = samples[:, start:]
    later = start + samples_in(DECODER_SECONDS, hz)
    parts |= {f"{name}, later than {DECODER_SECONDS} s": wave[:, later:] for name, wave in waves.items()}
    speakers = {name: speakers_of(classifier, part, hz) for name, part in parts.items()}
    metrics += speaker_metrics(labels_of(clips, "speaker"), speakers)
    recognized = {
        "real clips": recognized_words(classifier, real, hz),
        "real clips after the codec": recognized_words(classifier, copies, hz),
        "unconditional samples": recognized_words(classifier, samples, hz),
        "real clips backwards": recognized_words(classifier, real, hz, backwards=True),
    }
    metrics += confidence_metrics(recognized, "real clips")
    return metrics, confidence_table(recognized)


def _generate(folder: Path, seconds: int, in_chunks: bool) -> None:
    """Generate audio with a saved AudioLM, in the process whose memory is measured."""
    audiolm, request = open_audiolm(folder), GenerationRequest(seconds=seconds, seeds=0)
    if in_chunks:
        for _ in audiolm.stream(request):
            pass
    else:
        audiolm.generate(request)


@typed
def memory_metrics(folder: Path, sample_hz: int) -> list[MetricValue]:
    """Measure the peak memory (MiB) of processes that generate 10 s and 60 s, as one wave and as a stream of chunks.

    Each memory metric contains the median, the smallest and the largest value of three processes. Further metrics are
    how much the peak memory grows from 10 s to 60 s, and the size of 60 s of float32 audio.
    """
    metrics = []
    for name, in_chunks in (("generate", False), ("stream", True)):
        short, long = (
            np.array([peak_bytes_of(_generate, folder, seconds, in_chunks) for _ in range(MEMORY_RUNS)])
            for seconds in MEMORY_SECONDS
        )
        rows = {f"peak at {seconds} s": peaks for seconds, peaks in zip(MEMORY_SECONDS, (short, long))}
        rows["difference"] = np.subtract.outer(long, short).flatten()
        metrics += [_memory_metric(f"{name}, {what}", values) for what, values in rows.items()]
    audio_bytes = np.array([4 * MEMORY_SECONDS[1] * sample_hz])
    return [*metrics, _memory_metric(f"audio of {MEMORY_SECONDS[1]} s", audio_bytes)]


def _memory_metric(name: str, num_bytes: np.ndarray) -> MetricValue:
    middle, low, high = (float(value) / 2**20 for value in (np.median(num_bytes), num_bytes.min(), num_bytes.max()))
    return MetricValue(f"memory (MiB) / {name}", middle, low, high, None, len(num_bytes), "median, smallest, largest")


@typed
def main(data: Path, out: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Train the codec and the stages, measure the AudioLM, and write OUT/metrics.json and OUT/metrics.md.

    Args:
        data: Folder of spoken digits with a manifest that has the fields `digit` and `speaker`.
        out: Folder for checkpoints, models and metrics.
        seed: Seed of weights, data order and joined clips.
        scale: Factor for the numbers of training steps; use a factor below 1 for a quick test.
    """
    items = load_items(data).items
    words = split_words(items)
    tokenizer = SemanticTokenizer.from_pretrained("semantic_16khz")
    codec = _train_codec([item for item in items if not is_held_out(item)], out, seed, scale)
    shards = []
    for name, items_of_split, count in (("train", words.train, NUM_CLIPS), ("valid", words.valid, NUM_VALID_CLIPS)):
        clips = join_words(items_of_split, out / f"{name}_clips", count, seed, PAUSE_SECONDS)
        shards.append(_tokens(clips, codec, tokenizer, out / f"{name}_tokens"))
    _train_stages(build_stages(codec, tokenizer, seed), (shards[0], shards[1]), out, seed, scale)
    metrics, table = evaluate(open_audiolm(out / "model"), words, out, seed)
    metrics += memory_metrics(out / "model", codec.target_sample_hz)
    settings = {"seed": seed, "scale": scale, "codec": codec.fingerprint(), "sampling": SAMPLING}
    write_report(out / "metrics.json", metrics, settings, f"{markdown_table(metrics)}\n{table}")
    sys.stdout.write(f"wrote {out / 'metrics.md'}\n")


if __name__ == "__main__":
    tyro.cli(main)
