import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from audiolm_pytorch.audio import write_audio
from audiolm_pytorch.data.manifest import AudioItem, load_split
from audiolm_pytorch.io import load_module
from musiclm_pytorch.embed_quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.mulan import MuLaN
from musiclm_pytorch.training import MuLaNTrainer, fit_quantizer, retrieval_scores

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


def test_retrieval_equals_a_naive_loop() -> None:
    """Oracle: sort all clips for each distinct caption; any clip of that caption is right."""
    torch.manual_seed(0)
    captions = [f"caption {index % 13}" for index in range(30)]
    text = F.normalize(torch.randn(13, 8), dim=-1)[torch.arange(30) % 13]
    audio = F.normalize(text + 0.8 * torch.randn(30, 8), dim=-1)
    scores = retrieval_scores(audio, text, captions)
    for k in (1, 5, 10):
        hits = 0
        for query in range(13):
            ranked = sorted(range(30), key=lambda clip: -float(text[query] @ audio[clip]))
            hits += any(captions[clip] == captions[query] for clip in ranked[:k])
        assert scores[f"recall_at_{k}"] == pytest.approx(hits / 13)


def test_collapsed_latents_retrieve_nothing() -> None:
    """Ties do not count as found, so a model that says the same of everything scores 0 among enough clips."""
    latents = F.normalize(torch.ones(20, 4), dim=-1)
    scores = retrieval_scores(latents, latents, [str(index) for index in range(20)])
    assert scores == {"recall_at_1": 0.0, "recall_at_5": 0.0, "recall_at_10": 0.0}


def test_several_clips_of_a_caption_are_all_right() -> None:
    """A caption of two clips is found by either of them, where counting one clip as the answer would fail."""
    audio = F.normalize(torch.tensor([[1.0, 0.2], [1.0, 0.0], [0.0, 1.0]]), dim=-1)
    text = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=-1)
    assert retrieval_scores(audio, text, ["same", "same", "other"])["recall_at_1"] == 1.0


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
    with pytest.raises(ValueError, match="at least one"):
        retrieval_scores(torch.zeros(0, 2), torch.zeros(0, 2), [])
