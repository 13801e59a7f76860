"""A small corpus and a few spoken "digits" for the semantic probes, written without a synthesizer."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from audiolm_pytorch.audio.files import write_audio
from musiclm_pytorch.recipes.corpus.planning import plan_clip

RATE_HZ = 8000


def written_corpus(folder: Path, num_train: int = 6, num_valid: int = 4, seed: int = 3) -> Path:
    """A corpus as `make_corpus` writes it, played by sines."""
    for split, count in (("train", num_train), ("valid", num_valid)):
        rows = [plan_clip(split, index, seed).row for index in range(count)]
        for row in rows:
            write_audio(folder / row["audio"], sines(row["pitch_class"], row["duration"]), RATE_HZ)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sines(events: Sequence, seconds: float) -> Tensor:
    """A melody `[n]` of events `[start, end, pitch class]` as plain sines."""
    times = torch.arange(round(seconds * RATE_HZ)) / RATE_HZ
    wave = 1e-3 * torch.randn(len(times))
    for start, end, name in events:
        sounding = (times >= start) & (times < end)
        hz = 440 * 2 ** (("C C# D D# E F F# G G# A A# B".split().index(name) - 9) / 12)
        wave += 0.3 * sounding * torch.sin(2 * torch.pi * hz * (times - start))
    return wave


def written_digits(folder: Path, takes: Iterable[int] = range(5, 14), speakers: Sequence[str] = ("ann", "bob")) -> Path:
    """Recordings of 'digits': a tone whose pitch is the digit, in one of two timbres; the shortest has 30 ms."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for digit in range(3):
        for number, speaker in enumerate(speakers):
            for take in takes:
                times = torch.arange(240 if (digit, take) == (0, 12) else 1600 + 80 * take) / RATE_HZ
                tone = torch.sin(2 * torch.pi * 300 * (1 + digit) * times) + 0.01 * torch.randn(len(times))
                name = f"clips/{digit}_{speaker}_{take}.wav"
                write_audio(folder / name, 0.3 * (tone.sign() if number else tone).clamp(-1, 1), RATE_HZ)
                lines.append(json.dumps({"audio": name, "digit": digit, "speaker": speaker}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder
