"""Training of the bundled semantic tokenizer, on music and on speech.

`python -m musiclm_pytorch.recipes.semantic --music corpus --speech speech_digits --out run`

`corpus` is a folder that `python -m musiclm_pytorch.recipes.corpus` wrote. `speech_digits` is a folder of spoken digits
with a manifest that has the fields `digit` and `speaker`; held-out takes are not used for training. The same command
continues an interrupted run.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import torch
import tyro
from beartype import beartype

from audiolm_pytorch.audio.files import read_audio, write_audio
from audiolm_pytorch.audio.units import samples_in
from audiolm_pytorch.data import AudioItem
from audiolm_pytorch.data.manifest import load_items, load_split, manifest_text
from audiolm_pytorch.saving.modules import save_module
from audiolm_pytorch.semantic import BestRQEncoder, SemanticTokenizerTrainer

__all__ = ["build_encoder", "is_held_out", "join_words", "main", "write_probe_manifests"]

SAMPLE_HZ = 16_000
CROP_SECONDS = 5.0
# A quarter of the training clips are speech, though there are only twenty minutes of different words.
NUM_SPOKEN_CLIPS, NUM_SPOKEN_VALID, NUM_MUSIC_VALID = 1500, 40, 60
_PAUSE_SECONDS = (0.02, 0.4)

NUM_STEPS = 6000
LAYER, NUM_CLUSTERS = 3, 1024
FIRST_TRAINING_TAKE = 10


@beartype
def is_held_out(item: AudioItem) -> bool:
    """Whether a recording of a spoken digit is held out, which means takes 0 to 9 of each digit and speaker.

    The file name must be `digit_speaker_take`. Takes 0 to 4 are the test set of the Free Spoken Digit Dataset.
    """
    match = re.fullmatch(r"\d_[^_]+_(\d+)", item.path.stem)
    if match is None:
        raise ValueError(
            f"{item.path}: got an unknown file name, expected one like 7_jackson_12.wav (digit, speaker, take)"
        )
    return int(match[1]) < FIRST_TRAINING_TAKE


@beartype
def write_probe_manifests(music: Path, speech: Path, out: Path) -> None:
    """Write `train.jsonl` and `valid.jsonl` with the music and the digits, for `musiclm evaluate semantic`."""
    train, valid = load_split(music)
    words = load_items(speech).items
    out.mkdir(parents=True, exist_ok=True)
    for name, clips, held_out in (("train", train, False), ("valid", valid, True)):
        items = clips + [item for item in words if is_held_out(item) == held_out]
        (out / f"{name}.jsonl").write_text(manifest_text(items, out), encoding="utf-8")


@beartype
def build_encoder(seed: int = 0) -> BestRQEncoder:
    """Create the encoder with random weights: 16 kHz, 25 tokens per second."""
    torch.manual_seed(seed)
    return BestRQEncoder(dim=384, depth=4, heads=6)


@beartype
def join_words(
    words: Sequence[AudioItem],
    out: Path,
    num_clips: int,
    seed: int = 0,
    pause_seconds: tuple[float, float] = _PAUSE_SECONDS,
) -> list[AudioItem]:
    """Join recorded words of one speaker into clips of the length of a crop, with short pauses between them.

    Single words are much shorter than a training crop, so batches of them would be mostly padding. Pauses are digital
    silence, which does not depend on the speaker.

    Args:
        words: Spoken words with the label `speaker`.
        out: Folder for the clips; existing clips are kept.
        num_clips: Number of clips.
        seed: Seed of speakers, words and pauses.
        pause_seconds: Shortest and longest pause before a word.

    Returns:
        The joined clips as items with the label `speaker`.
    """
    by_speaker: dict[str, list[AudioItem]] = {}
    for item in words:
        by_speaker.setdefault(str(item.labels["speaker"]), []).append(item)
    num_samples = samples_in(CROP_SECONDS, SAMPLE_HZ)
    speakers: list[str] = []
    for index in range(num_clips):
        rng = Random(f"{seed} {index}")
        speakers.append(rng.choice(sorted(by_speaker)))
        path = out / f"spoken-{index:05d}.wav"
        if path.is_file():
            continue
        parts: list[torch.Tensor] = []
        while sum(len(part) for part in parts) < num_samples:
            parts.append(torch.zeros(round(rng.uniform(*pause_seconds) * SAMPLE_HZ)))
            parts.append(read_audio(rng.choice(by_speaker[speakers[-1]]).path, SAMPLE_HZ)[0][0])
        write_audio(path, torch.cat(parts)[:num_samples], SAMPLE_HZ)
    joined = load_items(out).items[:num_clips]
    return [replace(item, labels={"speaker": speaker}) for item, speaker in zip(joined, speakers, strict=True)]


@beartype
def main(music: Path, speech: Path, out: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Train the encoder, fit k-means to one of its layers, and write the tokenizer as fp16 into OUT/semantic_16khz.

    Args:
        music: Folder that `python -m musiclm_pytorch.recipes.corpus` wrote.
        speech: Folder of spoken digits with a manifest.
        out: Folder for the checkpoints and the tokenizer.
        seed: Seed of weights, data order and noise.
        scale: Factor of the number of steps; less than 1 for a quick test.
    """
    write_probe_manifests(music, speech, out / "probes")
    words = [item for item in load_items(speech).items if not is_held_out(item)]
    spoken = join_words(words, out / "speech", NUM_SPOKEN_CLIPS, seed)
    train_music, valid_music = load_split(music)
    num_steps = max(10, round(scale * NUM_STEPS))
    encoder = build_encoder(seed)
    trainer = SemanticTokenizerTrainer(
        encoder=encoder,
        items=(
            train_music + spoken[:-NUM_SPOKEN_VALID],
            valid_music[:NUM_MUSIC_VALID] + spoken[-NUM_SPOKEN_VALID:],
        ),
        batch_size=16,
        num_train_steps=num_steps,
        seconds=CROP_SECONDS,
        results_folder=out / "encoder",
        learning_rate=1e-3,
        warmup_steps=min(100, num_steps // 10),
        precision="bf16",
        seed=seed,
    )
    trainer.train()
    trainer.loop.final_module()
    save_module(encoder, out / "encoder" / "whole")
    fit = trainer.fit_tokenizer(layer=LAYER, num_clusters=NUM_CLUSTERS, results_folder=out / "kmeans")
    save_module(fit.tokenizer, out / "semantic_16khz", extra={"usage": asdict(fit.usage)}, dtype=torch.float16)
    sys.stdout.write(f"wrote {out / 'semantic_16khz'}: {fit.usage}\n")


if __name__ == "__main__":
    tyro.cli(main)
