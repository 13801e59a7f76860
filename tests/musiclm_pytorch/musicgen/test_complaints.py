"""Complaints of MusicGen users that no other file of this folder disproves; search for `Complaint:` to find all 20."""

import gc
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.conditioning.base import ConditionTensor
from musiclm_pytorch.musicgen.musicgen import AudioGen, MusicGen
from musiclm_pytorch.recipes.memory import peak_bytes_of

transformers = pytest.importorskip("transformers")

from tests.helpers.published_musicgen import VOCAB, oracle, write_audiocraft_files, write_musicgen  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model with a melody, whose window has 0.8 s."""
    root = tmp_path_factory.mktemp("models") / "melody"
    model = MusicGen.from_pretrained(write_musicgen(root / "published", melody=True))
    model.transformer.max_seconds = 0.8
    model.save_pretrained(root / "own")
    return root


@pytest.fixture(scope="module")
def model(folder: Path) -> MusicGen:
    """The small model."""
    return MusicGen.from_pretrained(folder / "own")


def test_last_frames_are_those_of_longer_music(model: MusicGen) -> None:
    """Complaint: noise in the last second. All levels have codes up to the end, also with a prompt.

    Cells that are predicted before the end of the first level are equal. Later, its cells contain the special token.
    """
    prompt = 0.2 * torch.randn(2000)
    options: dict[str, Any] = {"texts": ["drums", None], "prompt": [prompt, None], "temperature": 0}
    short, long = (model.generate(**options, seconds=seconds).tokens for seconds in (0.4, 0.8))
    assert int(short.min()) >= 0
    assert int(short.max()) < VOCAB
    is_before_end = torch.arange(20).unsqueeze(1) + torch.arange(4) <= 20
    assert torch.equal(short[:, is_before_end], long[:, :20][:, is_before_end])


def test_no_other_program_or_package_is_needed(
    model: MusicGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complaint: needs xformers/ffmpeg/spacy/demucs. None of them can be imported or started here."""
    for name in ("xformers", "ffmpeg", "av", "torchcodec", "torchaudio", "spacy", "demucs", "audiocraft"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("PATH", "")
    write_audio(tmp_path / "bach.wav", 0.3 * torch.randn(2, 9000).clamp(-1, 1), 22_050)
    music = model.generate(texts="drums", melody=tmp_path / "bach.wav", prompt=tmp_path / "bach.wav", seconds=0.5)
    assert music.waves[0].shape == (16_000,)


@pytest.mark.slow
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "older_files"])
def test_files_of_audiocraft_need_no_old_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_zip: bool) -> None:
    """Complaint: Python 3.12 and torch 2.6+ refuse the files. Both kinds of files that torch.save wrote are read."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "")
    model = MusicGen.from_pretrained(write_musicgen(tmp_path / "published"))
    write_audiocraft_files(tmp_path / "files", oracle(tmp_path / "published"))
    for path in (tmp_path / "files").glob("*.bin"):
        content = torch.load(path, weights_only=True)
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    other = MusicGen.from_pretrained(tmp_path / "files", text_conditioner=model.text_conditioner)
    weight = model.transformer.heads[0].weight
    assert torch.equal(other.transformer.heads[0].weight, weight.half().float())


@pytest.mark.parametrize(
    "format", ["own", *(pytest.param(one, marks=pytest.mark.slow) for one in ("transformers", "audiocraft"))]
)
def test_folders_need_no_network(model: MusicGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any) -> None:
    """Complaint: folders reach for the hub. No socket is opened, without `offline` and without its variables."""
    model.save_pretrained(tmp_path / "model", format=format)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a folder was loaded with the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = MusicGen.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.transformer.heads[0].weight, model.transformer.heads[0].weight)


def test_dropped_conditions_do_not_reach_the_loss(model: MusicGen) -> None:
    """Complaint: melody of the target leaks in fine-tuning. Neither classes nor lengths of dropped conditions matter.

    With as many null embeddings as the text has, a model recognised the text of an item by its length.
    """
    transformer, drop_prob = model.transformer, model.transformer.cond_drop_prob
    codes = torch.randint(VOCAB, (4, 6, 4), generator=torch.Generator().manual_seed(0))
    packed = transformer.layout.pack({"acoustic": codes})
    width = transformer.fuser.specs["text"].dim
    losses = []
    try:
        transformer.cond_drop_prob = 1.0
        for seed in range(2):
            torch.manual_seed(seed)
            lengths = torch.randperm(4) + 1
            mask = torch.arange(4) < lengths.unsqueeze(1)
            melody = torch.eye(12)[torch.randint(12, (4, 9))]
            conditions = {"text": ConditionTensor(torch.randn(4, 4, width), mask), "melody": ConditionTensor.of(melody)}
            torch.manual_seed(5)
            with torch.no_grad():
                losses.append(float(transformer.train()(packed, conditions).loss))
    finally:
        transformer.cond_drop_prob = drop_prob
        transformer.eval()
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_stereo_audio_of_all_inputs(tmp_path: Path) -> None:
    """Stereo prompts and melodies for a stereo model, and for a mono model."""
    wave = 0.2 * torch.randn(2, 12_000)
    write_audio(tmp_path / "stereo.wav", wave.clamp(-1, 1), 32_000)
    for channels, melody in ((2, False), (1, True)):
        model = MusicGen.from_pretrained(write_musicgen(tmp_path / str(channels), channels=channels, melody=melody))
        model.transformer.max_seconds = 0.4
        inputs: dict[str, Any] = {"melody": [wave, tmp_path / "stereo.wav"]} if melody else {}
        music = model.generate(texts="drums", prompt=[tmp_path / "stereo.wav", wave], seconds=0.7, **inputs)
        assert music.waves[0].shape == ((2, 22_400) if channels == 2 else (22_400,))
        chunks = list(model.stream("drums", prompt=[wave], seconds=0.7, chunk_seconds=0.2))
        assert sum(chunk.waves[0].shape[-1] for chunk in chunks) == 22_400


@pytest.mark.slow
def test_memory_does_not_grow_from_call_to_call(model: MusicGen) -> None:
    """Complaint: memory grows call by call. Tensors of a call are freed, also of an unfinished stream."""

    def living_bytes() -> int:
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())

    def call(seed: int) -> None:
        melody = np.random.default_rng(seed).normal(0, 0.1, 9000 + seed).astype("f")
        options: dict[str, Any] = {"texts": ["drums"] * (1 + seed), "melody": melody, "seeds": seed}
        model.generate(**options, seconds=0.3 + 0.1 * seed)
        next(model.stream(**options, seconds=1.0, chunk_seconds=0.1))

    call(0)
    before = living_bytes()
    for seed in range(3):
        call(seed)
    assert living_bytes() < before + 10_000  # a melody alone has 36,000


@pytest.mark.slow
def test_audiogen_of_audiocraft_is_written_for_transformers(tmp_path: Path) -> None:
    """Complaint: AudioGen missing in transformers. Files of audiocraft become a folder that transformers loads."""
    published = MusicGen.from_pretrained(write_musicgen(tmp_path / "published", audiogen=True))
    write_audiocraft_files(tmp_path / "files", oracle(tmp_path / "published"))
    model = AudioGen.from_pretrained(tmp_path / "files", text_conditioner=published.text_conditioner)
    assert model.generate(texts="drums", seconds=0.1, seeds=0).waves[0].shape == (1600,)
    model.save_pretrained(tmp_path / "saved", format="transformers")
    reference = oracle(tmp_path / "saved")
    assert torch.equal(reference.decoder.lm_heads[0].weight, model.transformer.heads[0].weight)
    assert torch.equal(reference.enc_to_dec_proj.weight, model.transformer.fuser.entries["text"].projection.weight)


def _stream(folder: Path, seconds: float) -> None:
    """Stream music in windows of 10 s; the cache of a window has 16 MB, and that of three minutes would have 290 MB."""
    torch.manual_seed(0)
    parts = MusicGen.from_pretrained(folder)
    model = MusicGen(
        codec=parts.codec,
        text_conditioner=parts.text_conditioner,
        melody=True,
        dim=256,
        depth=4,
        heads=4,
        max_seconds=10,
    )
    inputs: dict[str, Any] = {"melody": torch.randn(64_000), "prompt": 0.1 * torch.randn(1, 2, 32_000)}
    num_samples = 0
    for chunk in model.stream("drums", **inputs, seconds=seconds, seeds=0, chunk_seconds=2):
        num_samples += chunk.waves[0].shape[-1]
    assert num_samples == round(seconds * 32_000)


@pytest.mark.slow
def test_three_minutes_need_the_memory_of_a_few_windows(folder: Path) -> None:
    """Complaint: memory grows with the length of the music. The peak memory of a process is that of a few windows."""
    few, many = (peak_bytes_of(_stream, folder / "published", seconds) for seconds in (30.0, 180.0))
    print(f"peak memory of a few windows {few / 1e6:.0f} MB, of three minutes {many / 1e6:.0f} MB")
    assert many < few + 100e6  # a third of the cache that grows with the music; other memory differs by up to 10 MB
