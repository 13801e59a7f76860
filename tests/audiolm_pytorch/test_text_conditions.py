"""Codes of captions mixed into the training of stages: one remedy for the gap between texts and audio."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from audiolm_pytorch.data import TokenShards, write_shards
from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.stages.shard_source import ShardSource
from audiolm_pytorch.stages.sources import WaveSource
from audiolm_pytorch.stages.trainers import SemanticTransformerTrainer

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from fakes import CONDITION, SAMPLE_HZ, FakeConditioner, FakeSemanticTokenizer, tiny_stages

DRAWS = [(epoch, index) for epoch in range(50) for index in range(4)]


class TellingConditioner(FakeConditioner):
    """Codes of audio begin with a 1, those of texts with a 2 and tell the length of the text."""

    def codes(self, *, texts: list[str] | None = None, wavs: Tensor | None = None, lengths=None) -> Tensor:
        if texts is None:
            return torch.tensor([[1, 0, 0]] * len(wavs))
        return torch.tensor([[2, 0, len(text) % 10] for text in texts])

    def codes_from_latents(self, latents: Tensor, modality: str = "audio") -> Tensor:
        kind = 1 if modality == "audio" else 2
        return torch.stack([torch.full((len(latents),), kind), *latents.long().T[:2]], dim=1)


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    """Four records; number i has i captions, caption j of record i has the latent (i, j)."""

    def make_record(index: int) -> dict[str, np.ndarray]:
        return {
            "semantic": np.arange(50) % 12,
            "latents": np.full((1, 2), 9, dtype=np.float32),
            "text_latents": np.array([[index, j] for j in range(index)], dtype=np.float32).reshape(index, 2),
        }

    write_shards(tmp_path / "shards", make_record, 4, {})
    return TokenShards(tmp_path / "shards")


def _source(shards: TokenShards, **arguments: float) -> ShardSource:
    stage = tiny_stages(**CONDITION)["semantic"]
    return ShardSource(shards, stage, seconds=1.0, audio_conditioner=TellingConditioner(), **arguments)


def test_captions_stand_in_for_their_recording(shards: TokenShards) -> None:
    """With the probability asked for, own captions only, in turns; a record without captions hears itself."""
    source = _source(shards, text_prob=0.5)
    codes = source.read(source.batch(DRAWS)).condition["codes"].view(50, 4, 3)
    assert (codes[:, 0, 0] == 1).all()
    share = float((codes[:, 1:, 0] == 2).double().mean())
    assert 0.4 < share < 0.6
    for epoch, index in ((epoch, index) for epoch in range(50) for index in (1, 2, 3)):
        kind, *latent = codes[epoch, index].tolist()
        assert latent == ([index, epoch % index] if kind == 2 else [9, 9])


def test_the_draw_is_a_pure_function_and_leaves_crops_alone(shards: TokenShards) -> None:
    """The same numbers give the same batch; the tokens are those without captions; no probability, no captions."""
    once, again, none = (_source(shards, text_prob=p).batch(DRAWS) for p in (0.5, 0.5, 0.0))
    assert torch.equal(once.is_text, again.is_text) and torch.equal(once.latents, again.latents)
    assert torch.equal(once.tokens["semantic"], none.tokens["semantic"])
    assert not none.is_text.any() and _source(shards, text_prob=1).batch(DRAWS).is_text.sum() == 150


def test_captions_of_files_stand_in_too(tmp_path: Path, write_folder) -> None:
    """Training from waves does the same with the captions of a manifest."""
    folder = write_folder(num_files=4, sample_hz=SAMPLE_HZ)
    lines = [{"audio": f"{i:03d}.wav"} | ({"caption": "x" * (i + 2)} if i else {}) for i in range(4)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = WaveSource(
        load_items(folder).items,
        tiny_stages(**CONDITION)["semantic"],
        seconds=0.4,
        wav2vec=FakeSemanticTokenizer(),
        codec=None,
        audio_conditioner=TellingConditioner(),
        text_prob=0.5,
    )
    codes = source.read(source.batch(DRAWS)).condition["codes"].view(50, 4, 3)
    assert (codes[:, 0] == torch.tensor([1, 0, 0])).all()
    for index in (1, 2, 3):
        said = codes[:, index, 0] == 2
        assert 0.3 < said.double().mean() < 0.7 and (codes[said, index, 2] == index + 2).all()


def test_validation_hears_audio(shards: TokenShards, tmp_path: Path) -> None:
    """The held-out loss must not depend on how captions are worded; shards without captions are refused in words."""
    run = {"batch_size": 2, "num_train_steps": 2, "warmup_steps": 0, "results_folder": tmp_path / "run"}
    stage = tiny_stages(**CONDITION)["semantic"]
    trainer = SemanticTransformerTrainer(
        transformer=stage, audio_conditioner=TellingConditioner(), shards=shards, text_prob=1.0, **run
    )
    assert trainer.task.train.text_prob == 1.0 and trainer.task.valid.text_prob == 0.0
    assert trainer.train(stop_after_steps=1).step == 1
    others = SemanticTransformerTrainer(
        transformer=stage, audio_conditioner=TellingConditioner(), shards=shards, text_prob=0.5, **run
    )
    with pytest.raises(ValueError, match="text_prob"):
        others.train()
    assert trainer.train().step == 2
    with pytest.raises(ValueError, match="probability"):
        _source(shards, text_prob=1.5)
    with pytest.raises(ValueError, match="audio_conditioner"):
        ShardSource(shards, tiny_stages()["semantic"], seconds=1.0, audio_conditioner=None, text_prob=0.5)
    write_shards(tmp_path / "bare", lambda _: {"semantic": np.arange(50) % 12, "latents": np.ones((1, 2))}, 2, {})
    with pytest.raises(ValueError, match="text_latents"):
        _source(TokenShards(tmp_path / "bare"), text_prob=0.5)
