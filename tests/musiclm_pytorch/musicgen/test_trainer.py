"""Training of MusicGen: memorisation by text; low-rank fine-tuning; resumption; saved models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audiolm_pytorch.audio.files import read_audio, write_audio
from audiolm_pytorch.codecs.pretrained.encodec import EncodecWrapper
from audiolm_pytorch.data.manifest import load_items
from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musicgen.trainer import MusicGenTrainer

pytest.importorskip("transformers")

from tests.helpers.published_musicgen import write_musicgen

HZ, NUM_CLIPS, SECONDS = 32_000, 8, 0.64
CAPTIONS = ["slow", "Fast", "piano", "violin jig", "drums", "a harp", "empty hall", "ballad played slowly"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of noisy tones of different pitch classes, with captions."""
    root = tmp_path_factory.mktemp("songs")
    generator = torch.Generator().manual_seed(0)
    lines = []
    for index, caption in enumerate(CAPTIONS):
        time = torch.arange(round(SECONDS * HZ)) / HZ
        noise = 0.02 * torch.randn(len(time), generator=generator).cumsum(0).clamp(-5, 5)
        write_audio(root / f"{index}.wav", 0.5 * torch.sin(2 * torch.pi * 262 * 2 ** (index / 12) * time) + noise, HZ)
        lines.append(json.dumps({"audio": f"{index}.wav", "caption": caption}))
    (root / "manifest.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> MusicGen:
    """A model with a random EnCodec and T5."""
    return MusicGen.from_pretrained(write_musicgen(tmp_path_factory.mktemp("parts")))


def new_model(parts: MusicGen, **options: Any) -> MusicGen:
    """A small model with the EnCodec and T5 of `parts`; equal weights in every call."""
    torch.manual_seed(0)
    return MusicGen(
        codec=parts.codec, text_conditioner=parts.text_conditioner, dim=64, depth=2, heads=4, max_seconds=1, **options
    )


def all_items(folder: Path) -> Any:
    """All clips for training, and two of them for validation."""
    items = load_items(folder / "manifest.jsonl").items
    return items, items[:2]


def clips(folder: Path) -> list[Tensor]:
    """Waves `[n]` of all clips."""
    return [read_audio(folder / f"{index}.wav")[0][0] for index in range(NUM_CLIPS)]


def share_of_equal_tokens(model: MusicGen, folder: Path, **inputs: Any) -> float:
    """Share of the clips' tokens that the most likely tokens equal."""
    assert isinstance(model.codec, EncodecWrapper)
    expected = model.codec.tokenize(torch.stack(clips(folder)))
    music = model.generate(**inputs, seconds=SECONDS, temperature=0, guidance_scale=1)
    return float((music.tokens == expected).float().mean())


@pytest.mark.slow
def test_clips_are_memorised_by_text(folder: Path, parts: MusicGen, tmp_path: Path) -> None:
    """Most likely tokens of eight texts in one batch; the items differ only in their texts."""
    model = new_model(parts, melody=True)
    model.transformer.cond_drop_prob = 0.1
    trainer = MusicGenTrainer(
        model,
        items=all_items(folder),
        batch_size=8,
        num_train_steps=600,
        learning_rate=3e-3,
        warmup_steps=10,
        ema_decay=None,
        results_folder=tmp_path / "run",
    )
    trainer.train()
    assert share_of_equal_tokens(model, folder, texts=CAPTIONS) > 0.95


@pytest.mark.slow
def test_low_rank_updates_learn_clips_and_merge_exactly(folder: Path, parts: MusicGen, tmp_path: Path) -> None:
    """Complaint: LoRA missing or wrong loss. Only updates are trained; a resumed run and the merged model are equal."""
    options: dict[str, Any] = {
        "items": all_items(folder),
        "batch_size": 8,
        "num_train_steps": 250,
        "learning_rate": 1e-2,
        "warmup_steps": 10,
        "ema_decay": None,
        "lora_rank": 8,
    }
    model = new_model(parts)
    before = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    trainer = MusicGenTrainer(model, results_folder=tmp_path / "run", **options)
    trainable = sum(weight.numel() for weight in model.transformer.parameters() if weight.requires_grad)
    assert trainable < 0.5 * sum(weight.numel() for weight in model.transformer.parameters())
    trainer.train(stop_after_steps=50)
    again = new_model(parts)
    resumed = MusicGenTrainer(again, results_folder=tmp_path / "run", **options)
    resumed.train()
    assert share_of_equal_tokens(again, folder, texts=CAPTIONS) > 0.4  # chance is 1/64; heads and embeddings are frozen
    after = again.transformer.state_dict()
    assert after.keys() == before.keys()
    assert torch.equal(after["embedding.weight"], before["embedding.weight"])
    loaded = MusicGen.from_pretrained(tmp_path / "run" / "musicgen").transformer.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in after.items())


def test_short_run_saves_a_whole_model(folder: Path, parts: MusicGen, tmp_path: Path) -> None:
    """Complaint: own checkpoints are not loadable. The folder contains codec and text encoder."""
    model = new_model(parts, melody=True)
    MusicGenTrainer(
        model, folder=folder / "manifest.jsonl", batch_size=2, num_train_steps=2, results_folder=tmp_path / "run"
    ).train()
    loaded = MusicGen.from_pretrained(tmp_path / "run" / "musicgen")
    expected = model.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.transformer.state_dict().items())
    assert loaded.transformer.token_fingerprints["acoustic"] == model.codec.fingerprint()
