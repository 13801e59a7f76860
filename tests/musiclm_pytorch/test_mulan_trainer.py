import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.audio import write_audio
from audiolm_pytorch.data.manifest import AudioItem, load_split
from audiolm_pytorch.io import load_module
from musiclm_pytorch.embed_quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.mulan import MuLaN
from musiclm_pytorch.training import MuLaNTrainer, captions_of, fit_quantizer

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tiny_mulan import tiny_mulan, tones

PITCHES_HZ = (110, 180, 300, 500, 800, 1300, 2100, 3400)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Eight captioned tones to learn from, two held-out files of the same pitches, one file without a caption."""
    folder = tmp_path / "corpus"
    captions = [f"tone of {hz} hertz" for hz in PITCHES_HZ]
    for name, indices in (("train", range(8)), ("valid", range(0, 8, 2))):
        lines = []
        for index in indices:
            write_audio(folder / f"{name}{index}.wav", tones(PITCHES_HZ[index], seconds=0.7)[0], 8000)
            lines.append({"audio": f"{name}{index}.wav", "caption": captions[index]})
        if name == "train":
            write_audio(folder / "silent.wav", tones(100)[0], 8000)
            lines.append({"audio": "silent.wav"})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def _trainer(corpus: Path, results: Path, steps: int = 30) -> MuLaNTrainer:
    return MuLaNTrainer(
        mulan=tiny_mulan(),
        folder=corpus,
        batch_size=8,
        num_train_steps=steps,
        seconds=0.4,
        results_folder=results,
        learning_rate=3e-3,
        warmup_steps=5,
        validate_every=steps,
        log_every=10,
    )


def test_training_learns_to_retrieve(corpus: Path, tmp_path: Path) -> None:
    """From chance (ln 8) to finding held-out tones by their captions; the model is written and loads."""
    trainer = _trainer(corpus, tmp_path / "run", steps=60)
    assert trainer.task.num_items == 8
    assert trainer.task.chance["loss"] == pytest.approx(math.log(8))
    assert trainer.task.chance["recall_at_1"] == pytest.approx(1 / 4)
    result = trainer.train()
    assert result.metrics["mulan.loss"] < 0.5 and result.metrics["valid.recall_at_1"] >= 0.75
    again = load_module(tmp_path / "run" / "mulan", MuLaN)
    wavs = tones(440)
    assert torch.equal(again.get_audio_latents(wavs), trainer.task.mulan.get_audio_latents(wavs))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["chance"] == pytest.approx(math.log(8)) and "temperature" in rows[0]


def test_training_resumes_exactly(corpus: Path, tmp_path: Path) -> None:
    """Six steps at once are two, and then four from the checkpoint, bit for bit."""
    straight = _trainer(corpus, tmp_path / "a", steps=6)
    straight.train()
    _trainer(corpus, tmp_path / "b", steps=6).train(stop_after_steps=2)
    resumed = _trainer(corpus, tmp_path / "b", steps=6)
    resumed.train()
    expected = straight.task.mulan.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.task.mulan.state_dict().items())


def test_validation_counts_every_clip_of_a_caption(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clips of one caption: a query that finds the other one has found it, ties count against, chance knows."""
    items, valid = load_split(corpus)
    held_out = [
        replace(valid[0], caption="same"),
        replace(valid[0], caption="same"),
        replace(valid[3], caption="other"),
    ]
    mulan = tiny_mulan()
    trainer = MuLaNTrainer(
        mulan=mulan, items=(items, held_out), batch_size=3, num_train_steps=1, results_folder=tmp_path
    )
    assert trainer.task.chance["recall_at_1"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    clips = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.1]])
    monkeypatch.setattr(mulan, "get_audio_latents", lambda wavs, lengths: clips)
    monkeypatch.setattr(mulan, "get_text_latents", lambda ids: torch.tensor([[0.1, 0.9, -9.0]] * 2 + [[0.0, 0.0, 1.0]]))
    assert trainer.task.validate() == {"recall_at_1": 1.0, "recall_at_5": 1.0, "recall_at_10": 1.0}
    monkeypatch.setattr(mulan, "get_text_latents", lambda ids: torch.tensor([[0.0, 1.0, 0.0]] * 3))
    assert trainer.task.validate()["recall_at_1"] == 0.0


def test_several_captions_of_a_file_take_turns(corpus: Path, tmp_path: Path) -> None:
    """Every caption has its epoch, the choice is a pure function of epoch and index, blanks are left out."""
    items, _ = load_split(corpus)
    item = replace(items[0], labels={"captions": [items[0].caption, "second", " ", "third", 7]})
    assert captions_of(item) == [items[0].caption, "second", "third"]
    assert captions_of(replace(item, caption=None, labels={"captions": "text"})) == []
    trainer = MuLaNTrainer(
        mulan=tiny_mulan(), items=([item], []), batch_size=1, num_train_steps=1, results_folder=tmp_path, seconds=0.4
    )
    decode = trainer.task.mulan.text.tokenizer.decode
    seen = [decode(trainer.task.batch([(epoch, 0)])["ids"])[0] for epoch in (0, 1, 2, 3, 1)]
    assert seen == [item.caption, "second", "third", item.caption, "second"]


def test_quantizer_is_fitted_to_files(corpus: Path) -> None:
    """The job embeds every window of the files, fits once, and reports the agreement of audio and captions."""
    quantizer = MuLaNEmbedQuantizer(
        mulan=tiny_mulan(), conditioning_dims=(8,), namespaces=("semantic",), rq_num_quantizers=2, codebook_size=4
    )
    items, _ = load_split(corpus)
    captioned = [item for item in items if item.caption]
    agreement = fit_quantizer(quantizer, captioned)
    assert bool(quantizer.fitted) and len(agreement) == 2 and all(0 <= value <= 1 for value in agreement)
    again = MuLaNEmbedQuantizer(
        mulan=tiny_mulan(), conditioning_dims=(8,), namespaces=("semantic",), rq_num_quantizers=2, codebook_size=4
    )
    assert fit_quantizer(again, items) == []


def test_trainer_rejects_what_it_cannot_use(corpus: Path, tmp_path: Path) -> None:
    """Errors name what was given and what is needed."""
    with pytest.raises(ValueError, match="either"):
        MuLaNTrainer(mulan=tiny_mulan(), batch_size=2, num_train_steps=1)
    silent = AudioItem(corpus / "silent.wav", None, {}, 8000, 3200)
    with pytest.raises(ValueError, match="caption"):
        MuLaNTrainer(mulan=tiny_mulan(), items=([silent], []), batch_size=2, num_train_steps=1)
