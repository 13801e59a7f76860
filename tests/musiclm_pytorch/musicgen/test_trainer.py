"""Trainer of MusicGen: saved models."""

from pathlib import Path

import pytest
import torch

from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musicgen.trainer import MusicGenTrainer
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer

pytest.importorskip("transformers")

from tests.helpers.musicgen_clips import new_model, write_clips
from tests.helpers.published_musicgen import write_musicgen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of noisy tones of different pitch classes, with captions."""
    return write_clips(tmp_path_factory.mktemp("songs"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> MusicGen:
    """A model with a random EnCodec and T5."""
    return MusicGen.from_pretrained(write_musicgen(tmp_path_factory.mktemp("parts")))


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


def test_new_tokens_have_the_scale_of_the_positions() -> None:
    """Sinusoidal positions have an amplitude of 1. Far smaller embeddings of tokens have no influence at first."""
    embedding = MusicGenTransformer(dim=32, depth=1, heads=2, codebook_size=100).embedding.weight[1:-2]
    assert 0.7 < float(embedding.detach().std()) < 1.4


def test_error_of_the_trainer_leaves_the_model_unchanged(parts: MusicGen, tmp_path: Path) -> None:
    """A low-rank training of a missing folder adds no updates, and freezes nothing."""
    model = new_model(parts, melody=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="missing"):
        MusicGenTrainer(model, folder=tmp_path / "missing", batch_size=2, num_train_steps=2, lora_rank=2)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


def test_arguments_without_effect_are_refused(parts: MusicGen, tmp_path: Path) -> None:
    """The parts to train are those of the model, and a factor of low-rank updates needs their rank."""
    options = {"folder": tmp_path, "batch_size": 1, "num_train_steps": 1, "results_folder": tmp_path / "run"}
    with pytest.raises(TypeError, match="MusicGenTrainer has no argument 'codec'"):
        MusicGenTrainer(parts, codec=parts.codec, **options)
    with pytest.raises(ValueError, match="lora_scale=2.0 needs a lora_rank"):
        MusicGenTrainer(parts, lora_scale=2.0, **options)
