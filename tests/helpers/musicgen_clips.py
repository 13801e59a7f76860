"""Eight short clips with captions, and small MusicGen models that memorise them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.audio.files import read_audio, write_audio
from audiolm_pytorch.data.manifest import load_items
from musiclm_pytorch.musicgen.musicgen import MusicGen

__all__ = ["CAPTIONS", "HZ", "SECONDS", "all_items", "clips", "new_model", "share_of_equal_tokens", "write_clips"]

HZ, SECONDS = 32_000, 0.64
CAPTIONS = ["slow", "Fast", "piano", "violin jig", "drums", "a harp", "empty hall", "ballad played slowly"]


def write_clips(root: Path) -> Path:
    """Write noisy tones of eight different pitch classes, with captions; none is C, the chroma of a dropped melody."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for index, caption in enumerate(CAPTIONS):
        time = torch.arange(round(SECONDS * HZ)) / HZ
        noise = 0.02 * torch.randn(len(time), generator=generator).cumsum(0).clamp(-5, 5)
        tone = 0.5 * torch.sin(2 * torch.pi * 262 * 2 ** ((index + 1) / 12) * time)
        write_audio(root / f"{index}.wav", tone + noise, HZ)
        lines.append(json.dumps({"audio": f"{index}.wav", "caption": caption}))
    (root / "manifest.jsonl").write_text("\n".join(lines))
    return root


def all_items(folder: Path) -> Any:
    """All clips for training, and two of them for validation."""
    items = load_items(folder / "manifest.jsonl").items
    return items, items[:2]


def clips(folder: Path) -> list[Tensor]:
    """Waves `[n]` of all clips."""
    return [read_audio(folder / f"{index}.wav")[0][0] for index in range(len(CAPTIONS))]


def new_model(parts: MusicGen, **options: Any) -> MusicGen:
    """A small model with the EnCodec and T5 of `parts`; equal weights in every call."""
    torch.manual_seed(0)
    return MusicGen(
        codec=parts.codec, text_conditioner=parts.text_conditioner, dim=64, depth=2, heads=4, max_seconds=1, **options
    )


def share_of_equal_tokens(model: MusicGen, waves: list[Tensor], **inputs: Any) -> float:
    """Share of the tokens of `waves` that the most likely tokens of the inputs equal."""
    music = model.generate(**inputs, seconds=SECONDS, temperature=0, guidance_scale=1)
    return float((music.tokens == model.codec.tokenize(torch.stack(waves))).float().mean())
