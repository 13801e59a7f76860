"""Presets of MusicGen, and the token shards of its training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.data.captions import decode_texts
from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.lm.training_data import ShardSource
from audiolm_pytorch.training.distributed import create_accelerator
from musiclm_pytorch import MusicGen
from musiclm_pytorch.mulan import TextTransformer
from musiclm_pytorch.musicgen.augmentation import TextAugmentation
from musiclm_pytorch.musicgen.chroma import ChromaConditioner
from musiclm_pytorch.musicgen.text_tower import TextTowerEncoder
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer
from musiclm_pytorch.pipeline.estimate import extrapolated, num_bytes
from musiclm_pytorch.pipeline.estimate_musicgen import _Probe, _with_depth
from musiclm_pytorch.pipeline.musicgen_presets import MUSICGEN_PRESETS, musicgen_preset
from musiclm_pytorch.pipeline.presets import RunConfig
from musiclm_pytorch.pipeline.token_shards import compute_music_tokens
from tests.helpers.small_codecs import tiny_codec

# Millions of parameters of the published language models, and widths of their text encoders.
PUBLISHED = {
    "small": (420.4, 768),
    "medium": (1838.7, 768),
    "large": (3257.0, 768),
    "melody": (1385.6, 768),
    "audiogen": (1839.1, 1024),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_have_the_published_numbers_of_parameters(name: str) -> None:
    """Heads of width 64, and the size of the language model to 0.1 million."""
    preset, (millions, text_dim) = musicgen_preset(name), PUBLISHED[name]
    assert preset.dim == 64 * preset.heads
    sizes = {"dim": preset.dim, "depth": preset.depth, "heads": preset.heads, "num_codebooks": preset.num_codebooks}
    with torch.device("meta"):
        model = MusicGenTransformer(**sizes, text_dim=text_dim, melody_frames=235 if preset.melody else None)
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_unknown_preset() -> None:
    """The message lists the names."""
    assert PUBLISHED.keys() < MUSICGEN_PRESETS.keys()
    with pytest.raises(ValueError, match="no preset 'huge' of a MusicGen.*tiny, small"):
        musicgen_preset("huge")


def test_shards_have_the_tokens_and_melodies_of_their_windows(tmp_path: Path) -> None:
    """A file of 2.7 s has windows of 1, 1 and 0.7 s; the rest of a file of 2.3 s is left out. Tags are merged."""
    rows = []
    for number, seconds in enumerate((2.7, 2.3, 0.6)):
        time = np.arange(round(seconds * 16000)) / 16000
        frequency = 220 * 2 ** ((number + np.floor(time)) * 3 / 12)
        soundfile.write(tmp_path / f"{number}.wav", 0.3 * np.sin(2 * np.pi * np.cumsum(frequency) / 16000), 16000)
        rows.append(json.dumps({"audio": f"{number}.wav", "caption": f"tone {number}", "genre": "rock"}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    items, codec = load_items(tmp_path).items, tiny_codec().eval()
    chroma = ChromaConditioner(num_frames=8)
    options = {"codec": codec, "num_codebooks": 2, "seconds": 1.0, "chroma": chroma, "origin": {"part": "train"}}
    shards = compute_music_tokens(tmp_path / "tokens", items, **options, accelerator=create_accelerator())
    windows = [(0, 0, 1), (0, 1, 2), (0, 2, 2.7), (1, 0, 1), (1, 1, 2), (2, 0, 0.6)]
    assert len(shards) == len(windows)
    melodies = set()
    for record, (number, start, end) in zip(shards, windows):
        wave = read_audio(items[number].path)[0][:, start * 16000 : round(end * 16000)]
        assert np.array_equal(record["acoustic"], codec.tokenize(wave[None])[0, :, :2].numpy())
        at_32khz = items[number].read(32000, 1, float(start), float(end - start))
        assert np.array_equal(record["melody"], chroma(at_32khz)[0].numpy())
        melodies.add(record["melody"].tobytes())
        assert decode_texts(record["captions"]) == [f"tone {number}"]
    assert len(melodies) > 2
    text = TextTowerEncoder(TextTransformer(dim=16, depth=1, heads=2, dim_head=8, num_tokens=256))
    model = MusicGen(codec=codec, text_conditioner=text, melody=True, dim=16, depth=1, heads=2, max_seconds=1.0)
    augment = TextAugmentation(word_dropout=0, merge_prob=1, drop_tag_prob=0, drop_caption_prob=0)
    source = ShardSource(shards, model.transformer, seconds=1.0, audio_conditioner=None, augment_text=augment)
    batch = source.batch([(0, 5), (1, 0)])
    assert batch.captions == ["tone 2. genre: rock", "tone 0. genre: rock"]
    assert batch.conditions["melody"].embeddings.shape == (2, 8, 12)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_estimates_grow_with_the_depth_and_have_frozen_weights(tmp_path: Path, lora_rank: int | None) -> None:
    """Models of one and two blocks stand for a deep one. Memory and disk contain frozen weights and the EMA."""
    soundfile.write(tmp_path / "a.wav", np.zeros(32000), 16000)
    items = load_items(tmp_path).items
    run = RunConfig(6, 4, 1.0, 1e-3, precision="fp32")
    preset = replace(musicgen_preset("tiny"), run=run)
    text = TextTowerEncoder(TextTransformer(dim=16, depth=1, heads=2, dim_head=8, num_tokens=256))
    codec = tiny_codec().eval()
    model = MusicGen(codec=codec, text_conditioner=text, melody=True, dim=16, depth=5, heads=2, max_seconds=1.0)
    options = preset, (items, items), "a100"
    one, two = (_Probe(_with_depth(model, depth), *options, 1).training(lora_rank) for depth in (1, 2))
    many = _Probe(_with_depth(model, 5), *options, 2).training(lora_rank)
    frozen_bytes, module_bytes = num_bytes(codec), num_bytes(model.transformer)
    whole = _Probe(model, *options, 1).training(lora_rank)
    for name, value in vars(extrapolated(one, two, 5)).items():
        assert value == (pytest.approx(vars(whole)[name], rel=0.01) if name != "step" else "musicgen"), name
    trained = whole.num_parameters
    assert many.memory_bytes - whole.memory_bytes == 4 * trained
    assert whole.memory_bytes > 20 * trained + frozen_bytes + (0 if lora_rank is None else module_bytes)
    assert whole.disk_bytes >= 24 * trained + 3 * module_bytes + frozen_bytes
