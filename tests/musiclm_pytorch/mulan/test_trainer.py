import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.data.manifest import AudioItem, load_split
from audiolm_pytorch.saving.modules import load_module
from musiclm_pytorch.mulan import AudioSpectrogramTransformer, MuLaN, TextTransformer
from musiclm_pytorch.mulan.captions import CaptionSampler
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.mulan.layers import LayerContrast
from musiclm_pytorch.mulan.trainer import MuLaNTrainer
from tests.helpers.tiny_mulan import tiny_mulan, tones

PITCHES_HZ = (110, 180, 300, 500, 800, 1300, 2100, 3400)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Eight captioned tones to learn from, four held-out files of the same pitches, one file without a caption."""
    folder = tmp_path / "corpus"
    for name, indices in (("train", range(8)), ("valid", range(0, 8, 2))):
        lines = []
        for index in indices:
            write_audio(folder / f"{name}{index}.wav", tones(PITCHES_HZ[index], seconds=0.7)[0], 8000)
            labels = {"register": "low" if index < 4 else "high", "aspects": [f"{PITCHES_HZ[index]} hertz", "a tone"]}
            caption = f"tone of {PITCHES_HZ[index]} hertz"
            lines.append({"audio": f"{name}{index}.wav", "caption": caption, **(labels if name == "valid" else {})})
        if name == "train":
            write_audio(folder / "silent.wav", tones(100)[0], 8000)
            lines.append({"audio": "silent.wav"})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def _trainer(corpus: Path, results: Path, steps: int = 30, **changes: object) -> MuLaNTrainer:
    settings = {
        "mulan": tiny_mulan(),
        "folder": corpus,
        "batch_size": 8,
        "num_train_steps": steps,
        "seconds": 0.4,
        "results_folder": results,
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        "validate_every": steps,
        "log_every": 10,
    }
    return MuLaNTrainer(**{**settings, **changes})


def _with_several_texts(corpus: Path) -> tuple[list[AudioItem], list[AudioItem]]:
    """The corpus with two captions and two aspects a clip to learn from."""
    train, valid = load_split(corpus)
    described = [
        replace(item, labels={"captions": [f"{item.caption}, played softly"], "aspects": [item.caption[8:], "soft"]})
        for item in train
        if item.caption
    ]
    return described, valid


def _noisy_mulan() -> MuLaN:
    """A tiny MuLaN with everything in it that is random in training."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 16}
    audio = AudioSpectrogramTransformer(
        **sizes, patch_size=8, sample_hz=8000, num_mels=24, spec_n_fft=256, patch_dropout=0.25, dropout=0.1
    )
    return tiny_mulan(audio_transformer=audio, text_transformer=TextTransformer(**sizes, num_tokens=256, dropout=0.1))


def _weights(trainer: MuLaNTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.task.mulan.state_dict().items()}


def _rows(results: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
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
    rows = _rows(tmp_path / "run")
    assert rows[0]["chance"] == pytest.approx(math.log(8)) and "temperature" in rows[0]


def test_every_metric_has_its_chance(corpus: Path, tmp_path: Path) -> None:
    """Loss, recalls and precisions of both directions, and tagging have their chance in each row."""
    trainer = _trainer(corpus, tmp_path / "run", steps=1)
    trainer.train()
    train_row, valid_row = _rows(tmp_path / "run")
    assert train_row["chance"] == pytest.approx(math.log(8))
    directions = [f"{way}{name}" for way in ("", "audio_") for name in ("recall_at_1", "recall_at_5", "map")]
    for name in [*directions, "register_auc", "register_accuracy"]:
        assert 0 <= valid_row[name] <= 1 and 0 < valid_row[f"{name}_chance"] <= 1
    assert valid_row["register_auc_chance"] == valid_row["register_accuracy_chance"] == 0.5
    assert valid_row["map_chance"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


@pytest.mark.slow
def test_killed_run_resumes_exactly(corpus: Path, tmp_path: Path) -> None:
    """Killed in step 4 after a checkpoint at 2: the same bits as without interruption, with texts and dropout."""

    def make(name: str) -> MuLaNTrainer:
        sampler = CaptionSampler(captions_per_clip=2, aspect_prob=0.5, caption_dropout=0.3)
        items = _with_several_texts(corpus)
        choices = {"folder": None, "items": items, "captions": sampler, "chunk_size": 3, "checkpoint_every_steps": 2}
        return _trainer(corpus, tmp_path / name, steps=5, mulan=_noisy_mulan(), **choices)

    straight = make("a")
    straight.train()
    killed = make("b")
    calls = 0

    def die_in_step_4(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    killed.task.mulan.register_forward_hook(die_in_step_4)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make("b")
    resumed.train()
    expected = _weights(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _weights(resumed).items())
    untrained = _noisy_mulan().state_dict()
    assert not torch.equal(expected["audio_to_latent.weight"], untrained["audio_to_latent.weight"])


@pytest.mark.slow
def test_run_is_not_continued_with_other_texts_or_chunks(corpus: Path, tmp_path: Path) -> None:
    """Settings that change the weights belong to the run; defaults are not stored in a checkpoint."""
    run = tmp_path / "run"
    trainer = _trainer(corpus, run)
    assert trainer.task.config.keys() == {"data"}
    trainer.train(stop_after_steps=1)
    with pytest.raises(ValueError, match="chunk_size"):
        _trainer(corpus, run, chunk_size=4).train()
    with pytest.raises(ValueError, match="caption_dropout"):
        _trainer(corpus, run, captions=CaptionSampler(caption_dropout=0.1)).train()
    assert _trainer(corpus, run, captions=CaptionSampler()).train(stop_after_steps=1).step == 2


@pytest.mark.slow
def test_chunks_do_not_change_the_weights(corpus: Path, tmp_path: Path) -> None:
    """Three steps with chunks of 3 clips and with one chunk end at the same weights."""
    ends = []
    for chunk_size in (None, 3):
        sampler = CaptionSampler(captions_per_clip=2)
        items = _with_several_texts(corpus)
        choices = {"folder": None, "items": items, "captions": sampler, "chunk_size": chunk_size}
        trainer = _trainer(corpus, tmp_path / str(chunk_size), steps=3, **choices)
        embedded: list[int] = []
        trainer.task.mulan.audio_to_latent.register_forward_pre_hook(
            lambda _, rows, to=embedded: to.append(len(rows[0]))
        )
        trainer.train()
        assert max(embedded) == (chunk_size or 8)
        ends.append(_weights(trainer))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-5, rtol=0, msg=name)


def test_chance_counts_the_layers_that_are_contrasted_too(corpus: Path, tmp_path: Path) -> None:
    """Oracle: the loss of a model whose projections are zero, so that every latent is the same."""
    mulan = tiny_mulan(layer_contrast=LayerContrast(layers=((0, 1), (1, 1)), weight=0.5))
    with torch.no_grad():
        for name, parameter in mulan.named_parameters():
            if "to_latent" in name:
                parameter.fill_(float(name.endswith("bias")))
    task = _trainer(corpus, tmp_path, mulan=mulan).task
    loss = task.loss(task.batch([(0, index) for index in range(8)]), 0).loss.item()
    assert task.chance["loss"] == pytest.approx(2 * math.log(8)) and loss == pytest.approx(2 * math.log(8))


def test_batch_holds_every_text_with_its_clip(corpus: Path, tmp_path: Path) -> None:
    """Several texts per clip, fewer if it has fewer, aspects too; `clip_index` is the row of the batch."""
    items, _ = load_split(corpus)
    first = replace(items[0], labels={"captions": ["second"]})
    third = replace(items[2], caption=None, labels={"aspects": ["soft"]})
    sampler = CaptionSampler(captions_per_clip=2, aspect_prob=0.0)
    choices = {"folder": None, "items": ([first, items[1], third, items[8]], []), "captions": sampler}
    task = _trainer(corpus, tmp_path, **choices).task
    assert task.num_items == 3
    batch = task.batch([(0, 2), (0, 0), (0, 1)])
    texts = task.mulan.text.tokenizer.decode(batch["texts"])
    assert texts == ["soft", first.caption, "second", items[1].caption] and batch["clip_index"].tolist() == [0, 1, 1, 2]
    assert batch["wavs"].shape == (3, 3200) and batch["lengths"].tolist() == [3200] * 3
    # four texts of three clips: each text is contrasted with two other clips, and with three or two other texts
    assert task.chance["loss"] == pytest.approx(math.log(8), rel=0.2)


def test_several_captions_of_a_file_alternate(corpus: Path, tmp_path: Path) -> None:
    """Without a sampler every caption has its epoch, and a batch is a pure function of epochs and indices."""
    items, _ = load_split(corpus)
    item = replace(items[0], labels={"captions": [items[0].caption, "second", " ", "third"]})
    task = _trainer(corpus, tmp_path, folder=None, items=([item], [])).task
    seen = [task.mulan.text.tokenizer.decode(task.batch([(epoch, 0)])["texts"])[0] for epoch in (0, 1, 2, 3, 1)]
    assert seen == [item.caption, "second", "third", item.caption, "second"]


def test_batches_without_contrast_are_reported(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One clip per batch, or one caption for all clips: loss and gradient are 0."""
    with pytest.raises(ValueError, match="batch_size=1.* use 2 or more"):
        _trainer(corpus, tmp_path, batch_size=1)
    items = [replace(item, caption="music", labels={}) for item in load_split(corpus)[0][:4]]
    _trainer(corpus, tmp_path, folder=None, items=(items, []))
    assert "all 4 files have the text 'music'" in caplog.text


def test_hard_negatives_of_a_manifest_are_contrasted(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each epoch has the next hard negative of every clip; they are left out, with a warning, if a clip has none."""
    items, _ = load_split(corpus)
    marked = [replace(item, labels={"hard_negatives": [f"not {item.caption}", "wrong"]}) for item in items[:4]]
    task = _trainer(corpus, tmp_path, folder=None, items=(marked, [])).task
    batches = [task.batch([(epoch, index) for index in (2, 0)]) for epoch in (0, 1)]
    decoded = [task.mulan.text.tokenizer.decode(batch["negatives"]) for batch in batches]
    assert decoded == [[f"not {marked[2].caption}", f"not {marked[0].caption}"], ["wrong", "wrong"]]
    assert batches[0]["negative_index"].tolist() == [0, 1]
    without = {name: part for name, part in batches[0].items() if "negative" not in name}
    assert task.loss(batches[0], 0).loss > task.loss(without, 0).loss
    assert task.chance["loss"] == pytest.approx((math.log(8) + math.log(9)) / 2)
    mixed = _trainer(corpus, tmp_path / "mixed", folder=None, items=([*marked, items[5]], [])).task
    assert "negatives" not in mixed.batch([(0, 0)]) and "1 of 5 files have none" in caplog.text


def test_validation_counts_every_clip_of_a_caption(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clips with one caption: either clip is correct, ties count against the model, also in chance."""
    items, valid = load_split(corpus)
    held_out = [replace(valid[0], caption="same"), replace(valid[1], caption="same"), replace(valid[3], caption="b")]
    mulan = tiny_mulan()
    task = _trainer(corpus, tmp_path, mulan=mulan, folder=None, items=(items, held_out), batch_size=3, labels=()).task
    assert task.chance["recall_at_1"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert task.chance["audio_recall_at_1"] == pytest.approx(1 / 2)
    clips = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.1]])
    monkeypatch.setattr(mulan, "get_audio_latents", lambda wavs, lengths: clips)
    monkeypatch.setattr(mulan, "get_text_latents", lambda texts: torch.tensor([[0.1, 0.9, -9.0], [0.0, 0.0, 1.0]]))
    recalls = [f"{way}recall_at_{k}" for way in ("", "audio_") for k in (1, 5, 10)]
    found = task.validate()
    assert set(found) == {*recalls, "map", "audio_map"} and set(found) < set(task.chance)
    assert [found[name] for name in recalls] == [1.0] * 6
    # "same" finds one of its clips first and the other one second; "b" finds its clip
    assert found["map"] == pytest.approx(1.0) and found["audio_map"] == pytest.approx(1.0)
    monkeypatch.setattr(mulan, "get_text_latents", lambda texts: torch.tensor([[0.0, 1.0, 0.0]] * 2))
    found = task.validate()
    assert found["recall_at_1"] == found["audio_recall_at_1"] == 0.0


def test_held_out_clips_are_described_by_their_first_caption(corpus: Path, tmp_path: Path) -> None:
    """Only the first caption is used; without captions, the aspects."""
    items, valid = load_split(corpus)
    held_out = [replace(valid[0], labels={"captions": ["another"]}), replace(valid[1], caption=None)]
    task = _trainer(corpus, tmp_path, folder=None, items=(items, held_out)).task
    asked: list[str] = []
    embed = task.mulan.get_text_latents

    def spy(texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return embed(texts)

    task.mulan.get_text_latents = spy  # type: ignore[method-assign]
    task.validate()
    assert asked == [valid[0].caption, ", ".join(valid[1].labels["aspects"])]


def test_validation_keeps_close_clips_apart_in_bfloat16(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Similarities are float32 also under autocast; in bfloat16, near clips would tie."""
    trainer = _trainer(corpus, tmp_path, precision="bf16", labels=())
    angles = torch.arange(4) * 1e-3
    latents = torch.stack([angles.cos(), angles.sin()], dim=1)
    monkeypatch.setattr(trainer.task.mulan, "get_audio_latents", lambda wavs, lengths: latents)
    monkeypatch.setattr(trainer.task.mulan, "get_text_latents", lambda texts: latents)
    with torch.autocast("cpu", torch.bfloat16):
        found = trainer.task.validate()
    assert found["recall_at_1"] == found["audio_recall_at_1"] == 1.0


def test_tagging_names_the_labels_of_held_out_clips(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with clips at the words of their register scores 1, one that exchanges them scores 0."""
    task = _trainer(corpus, tmp_path, labels=["register"]).task
    assert task.chance["register_auc"] == task.chance["register_accuracy"] == 0.5
    low, high = torch.eye(2)
    monkeypatch.setattr(task.mulan, "get_audio_latents", lambda wavs, lengths: torch.stack([low, low, high, high]))
    places = {"low": low, "high": high}

    def embed(texts: list[str]) -> torch.Tensor:
        return torch.stack([next((place for word, place in places.items() if word in text), low) for text in texts])

    monkeypatch.setattr(task.mulan, "get_text_latents", embed)
    found = task.validate()
    assert found["register_auc"] == found["register_accuracy"] == 1.0
    places |= {"low": high, "high": low}
    found = task.validate()
    assert found["register_auc"] == found["register_accuracy"] == 0.0
    assert "register_auc" not in _trainer(corpus, tmp_path, labels=()).task.chance
    with pytest.raises(ValueError, match=r"mood.*register"):
        _trainer(corpus, tmp_path, labels=["mood"])
    with pytest.raises(ValueError, match=r"register.*need held-out files"):
        _trainer(corpus, tmp_path, folder=None, items=(load_split(corpus)[0], []), labels=["register"])


def _silence(corpus: Path) -> None:
    for path in corpus.glob("*.wav"):
        write_audio(path, torch.zeros(5600), 8000)


def _freeze(mulan: MuLaN) -> None:
    for part in (mulan.audio, mulan.text, mulan.audio_to_latent, mulan.text_to_latent):
        part.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silent files", "frozen towers", "no learning rate", None])
def test_loss_stuck_at_chance_warns(
    fault: str | None, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A loss that stays at ln(batch) is reported, and a loss that falls is not."""
    mulan = tiny_mulan()
    if fault == "silent files":
        _silence(corpus)
    if fault == "frozen towers":
        _freeze(mulan)
    rate = 1e-12 if fault == "no learning rate" else 3e-3
    trainer = _trainer(corpus, tmp_path / "run", steps=110, mulan=mulan, learning_rate=rate)
    with caplog.at_level(logging.WARNING):
        result = trainer.train()
    told = [record.getMessage() for record in caplog.records if "chance loss" in record.getMessage()]
    if fault is None:
        assert told == [] and trainer.watch.warning is None and result.metrics["mulan.loss"] < 0.5
        return
    assert told == [trainer.watch.warning] and f"{math.log(8):.3f}" in told[0]
    if fault == "silent files":
        assert result.metrics["mulan.loss"] == pytest.approx(math.log(8), rel=0.01)


def test_trainer_accepts_whole_numbers_and_numpy_numbers(corpus: Path, tmp_path: Path) -> None:
    """The fraction without a split in manifests, and a crop length of numpy."""
    trainer = _trainer(corpus / "train.jsonl", tmp_path, valid_fraction=0, seconds=np.float32(0.5), seed=np.int64(3))
    assert trainer.task.num_items == 7 and trainer.loop.settings.seed == 3


def test_trainer_rejects_what_it_cannot_use(corpus: Path, tmp_path: Path) -> None:
    """Error messages name the input and the requirement."""
    with pytest.raises(ValueError, match="got neither folder nor items"):
        MuLaNTrainer(mulan=tiny_mulan(), batch_size=2, num_train_steps=1)
    silent = AudioItem(corpus / "silent.wav", None, {}, 8000, 3200)
    with pytest.raises(ValueError, match="caption"):
        MuLaNTrainer(mulan=tiny_mulan(), items=([silent], []), batch_size=2, num_train_steps=1)
    with pytest.raises(ValueError, match="chunk_size must be at least 1.*got 0"):
        _trainer(corpus, tmp_path, chunk_size=0)
    with pytest.raises(ValueError, match="frozen"):
        _trainer(corpus, tmp_path, mulan=tiny_mulan().requires_grad_(False))
    with pytest.raises(ValueError, match="batch_size"):
        _trainer(corpus, tmp_path, batch_size=0)

    class Pretrained(JointEmbedding):
        get_audio_latents = get_text_latents = lambda self, *_: torch.zeros(1, 2)

    with pytest.raises(ValueError, match="Pretrained cannot be trained"):
        _trainer(corpus, tmp_path, mulan=Pretrained(dim_latent=2, sample_hz=8000))


@pytest.mark.slow
def test_model_saves_the_words_of_its_training(corpus: Path, tmp_path: Path) -> None:
    """Words of captions and aspects are saved with the model, together with earlier ones."""
    mulan = tiny_mulan()
    mulan.text.known_words = ["flute"]
    _trainer(corpus, tmp_path / "run", steps=1, mulan=mulan, folder=None, items=_with_several_texts(corpus)).train()
    known = load_module(tmp_path / "run" / "mulan", MuLaN).text.known_words
    assert known == ["flute", "hertz", "of", "played", "soft", "softly", "tone"]


def test_any_joint_embedding_with_a_loss_can_be_trained(corpus: Path, tmp_path: Path) -> None:
    """Another class than MuLaN trains if it has the same `forward` and a tokenizer; it needs no loss module."""
    inner = tiny_mulan()

    class Wrapped(JointEmbedding):
        def __init__(self) -> None:
            super().__init__(dim_latent=16, sample_hz=8000)
            self.inner, self.text = inner, inner.text

        def forward(self, wavs, ids, lengths, *, clip_index, chunk_size):
            return self.inner(wavs, ids, lengths, clip_index=clip_index, chunk_size=chunk_size)

        def get_audio_latents(self, wavs, lengths=None):
            return self.inner.get_audio_latents(wavs, lengths)

        def get_text_latents(self, texts):
            return self.inner.get_text_latents(texts)

    trainer = _trainer(corpus, tmp_path / "run", steps=2, mulan=Wrapped())
    assert trainer.train(stop_after_steps=1).step == 1 and trainer.task.chance["loss"] == pytest.approx(math.log(8))


WAVEFORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pure": torch.sin,
    "rough": lambda phase: torch.sign(torch.sin(phase)) * 0.5,
    "bright": lambda phase: (torch.sin(phase) + torch.sin(2 * phase) + torch.sin(3 * phase) + torch.sin(4 * phase)) / 3,
    "hollow": lambda phase: (torch.sin(phase) + torch.sin(5 * phase)) / 2,
}
RHYTHMS_HZ = {"held": 0.0, "slowly pulsing": 2.5, "pulsing": 5.0, "trembling": 15.0}
NOTES_HZ = [100 * 2 ** (step / 4) for step in range(16)]


def _write_pairs(folder: Path, seed: int) -> list[AudioItem]:
    """256 sounds of 1.2 s in noise, every combination of note, waveform and rhythm, and what each is."""
    generator, items = torch.Generator().manual_seed(seed), []
    time = torch.arange(9600) / 8000
    for note, hz in enumerate(NOTES_HZ):
        for waveform, shape in WAVEFORMS.items():
            for rhythm, rate_hz in RHYTHMS_HZ.items():
                start = torch.rand(2, generator=generator) * 2 * math.pi
                pulse = 0.5 + 0.5 * torch.cos(2 * math.pi * rate_hz * time + start[0]) if rate_hz else 1.0
                wave = 0.4 * shape(2 * math.pi * hz * time + start[1]) * pulse
                path = folder / f"{len(items):03d}.wav"
                write_audio(path, wave + 0.005 * torch.randn(len(time), generator=generator), 8000)
                items.append(AudioItem(path, f"a {waveform} tone at note {note}, {rhythm}", {}, 8000, len(time)))
    return items


@pytest.mark.slow
def test_mulan_distinguishes_256_sounds_after_100_steps(tmp_path: Path) -> None:
    """A small MuLaN of usual shape, trained on 256 pairs, retrieves over 80% in batches of 64 held-out sounds."""
    train, valid = _write_pairs(tmp_path / "train", seed=0), _write_pairs(tmp_path / "valid", seed=1)
    tokenizer = TextTokenizer.train([item.caption for item in train if item.caption], vocab_size=320)
    sizes = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16}
    spectrogram = {"num_mels": 64, "spec_n_fft": 512, "spec_win_length": 400, "spec_hop_length": 80}
    torch.manual_seed(0)
    audio = AudioSpectrogramTransformer(**sizes, **spectrogram, sample_hz=8000)
    text = TextTransformer(**sizes, num_tokens=tokenizer.vocab_size, tokenizer=tokenizer)
    mulan = MuLaN(audio_transformer=audio, text_transformer=text)
    settings = {"learning_rate": 2e-3, "warmup_steps": 20, "validate_every": 100, "seconds": 0.8}
    trainer = MuLaNTrainer(
        mulan=mulan, items=(train, []), batch_size=64, num_train_steps=100, results_folder=tmp_path / "run", **settings
    )
    assert trainer.task.chance["loss"] == pytest.approx(math.log(64))
    trainer.train()
    heard = MuLaNTrainer(mulan=mulan, items=(valid, []), batch_size=64, num_train_steps=1, seconds=0.8).task
    found = []
    with torch.no_grad():
        for rows in torch.randperm(256).split(64):
            batch = heard.batch([(0, int(row)) for row in rows])
            clips = mulan.get_audio_latents(batch["wavs"], batch["lengths"])
            similarities = mulan.get_text_latents(batch["texts"]) @ clips.T
            found += [similarities.argmax(dim=way) == torch.arange(64) for way in (0, 1)]
    assert torch.cat(found).float().mean() > 0.8  # 0.93 and 0.95 with two seeds
