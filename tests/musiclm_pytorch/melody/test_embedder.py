"""The melody embedder: notes, voices, the triplet loss, training and codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.data.items import AudioItem
from audiolm_pytorch.saving.modules import load_module
from musiclm_pytorch.evaluation.metrics.chroma import PitchClasses
from musiclm_pytorch.melody.embedder import MelodyEmbedder
from musiclm_pytorch.melody.notes import PITCH_CLASSES, PitchNote, excerpt_of, notes_of, pitch_classes_at
from musiclm_pytorch.melody.trainer import MelodyTrainer, melody_wave
from musiclm_pytorch.melody.triplets import semi_hard_triplet_loss
from musiclm_pytorch.melody.voices import KINDS, draw_voice, render_melody
from musiclm_pytorch.mulan import AudioSpectrogramTransformer
from tests.helpers.toy_musiclm import toy_embedder

SCALE = [PitchNote(0.5 * i, 0.5 * i + 0.45, pitch) for i, pitch in enumerate((0, 4, 7, 9, 2, 11))]


def item_of(rows: object) -> AudioItem:
    return AudioItem(Path("a.wav"), None, {"pitch_class": rows}, 8000, 19200)


def test_notes_are_read_cut_and_looked_up() -> None:
    """At the boundaries of notes, in rests, and played faster."""
    assert notes_of(item_of([[0, 0.5, "C"], [0.5, 1.0, "F#"]])) == [PitchNote(0.0, 0.5, 0), PitchNote(0.5, 1.0, 6)]
    assert notes_of(item_of([])) is None and notes_of(item_of(None)) is None
    for rows in ([[0, 0.5, "H"]], [[0.5, 0.1, "C"]], [[1, 2, "C"], [0, 1, "C"]], "C", [[0, 1]], 3):
        with pytest.raises(
            ValueError, match=r"a.wav: pitch_class must be a list of \[start_seconds, end_seconds, name\]"
        ):
            notes_of(item_of(rows))
    assert notes_of(item_of([[0, 3, "C"]])) == [PitchNote(0.0, 2.4, 0)]
    times = np.array([0.0, 0.44, 0.46, 0.5, 2.6, 9.0])
    assert pitch_classes_at(SCALE, times).tolist() == [0, 0, -1, 4, 11, -1]
    assert pitch_classes_at([], times).tolist() == [-1] * 6
    assert excerpt_of(SCALE, 0.25, 0.5, speed=2.0) == [PitchNote(0.0, pytest.approx(0.1), 0), PitchNote(0.125, 0.25, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_voice_plays_the_pitch_classes_of_the_notes(kind: str) -> None:
    """The metric of chroma similarity finds them in the middle of notes; rests are silent."""
    rng = np.random.default_rng(1)
    slow = [PitchNote(2 * start, 2 * end, pitch) for start, end, pitch in SCALE]
    waves = np.stack([render_melody(slow, 6.5, 32000, draw_voice(rng, kind), rng) for _ in range(3)])
    assert waves.dtype == np.float32 and np.abs(waves).max() <= 0.5 and not waves[:, int(6.2 * 32000) :].any()
    found = PitchClasses()(torch.from_numpy(waves))
    middles = [round((start + end) / 2 * 32000 / 4096) for start, end, _ in slow]
    right = (found[:, middles] == torch.tensor([pitch for *_, pitch in slow])).float().mean()
    assert right > 0.85
    assert not render_melody([], 1.0, 8000, draw_voice(rng, kind), rng).any()


def naive_loss(latents: Tensor, positives: Tensor, is_negative: Tensor, margin: float) -> float:
    """Oracle: one anchor after the other."""
    losses = []
    for anchor, positive in enumerate(positives.tolist()):
        distances = (latents - latents[anchor]).square().sum(dim=1)
        negatives = distances[is_negative[anchor]].tolist()
        if negatives:
            farther = [distance for distance in negatives if distance > distances[positive]]
            losses.append(max(0.0, float(distances[positive]) - (min(farther) if farther else max(negatives)) + margin))
    return sum(losses) / len(losses)


def test_triplet_loss_equals_a_loop() -> None:
    """With anchors that have no negatives, and with anchors whose negatives are all nearer than the positive."""
    torch.manual_seed(0)
    latents = torch.nn.functional.normalize(torch.randn(12, 3), dim=1).requires_grad_()
    positives, is_negative = torch.arange(12).roll(6), torch.rand(12, 12) < 0.4
    is_negative[3] = False
    loss = semi_hard_triplet_loss(latents, positives, is_negative)
    assert loss.item() == pytest.approx(naive_loss(latents.detach(), positives, is_negative, 0.2), abs=1e-5)
    loss.backward()
    assert latents.grad.isfinite().all()
    assert semi_hard_triplet_loss(latents, positives, torch.zeros(12, 12, dtype=torch.bool)) == 0


def test_windows_are_centred_on_their_hop_and_padding_changes_nothing() -> None:
    """The windows of a longer wave begin with those of a shorter one; codes of a padded wave are those of the wave."""
    embedder = toy_embedder()
    wave = 0.1 * torch.randn(1, 3000)
    wave = wave * (0.5 / wave.abs().max())
    latents, sounds = embedder.latents(wave)
    assert latents.shape == (1, 5, 4) and sounds.all()
    window = wave[:, 640 - 320 : 640 + 960]  # of hop 1, which lasts from sample 640 to 1280
    torch.testing.assert_close(embedder(window), latents[:, 1])
    padded = torch.cat((wave, torch.full((1, 2000), 7.0)), dim=1)
    codes = embedder.codes(padded, lengths=torch.tensor([3000]))
    assert torch.equal(codes[:, :5], embedder.codes(wave)) and (codes[:, 6:] == -1).all()
    assert torch.equal(embedder.codes(wave), embedder.codes(0.25 * wave))


def test_bad_embedders_and_codes_are_refused() -> None:
    """The message names the argument."""
    embedder = toy_embedder()
    with pytest.raises(ValueError, match="fitted already"):
        embedder.fit(torch.randn(64, 4))
    fresh = MelodyEmbedder(audio_transformer=embedder.audio)
    with pytest.raises(ValueError, match="no codebooks yet"):
        fresh.codes(torch.rand(1, 8000))
    with pytest.raises(ValueError, match=r"latents \[n, 64\] with n of at least 256"):
        fresh.fit(torch.randn(10, 64))
    with pytest.raises(ValueError, match="0 < hop_seconds <= window_seconds"):
        MelodyEmbedder(audio_transformer=embedder.audio, hop_seconds=2.0)
    with pytest.raises(ValueError, match=r"codes must be \[\.\.\., 2\] in -1..7"):
        embedder.vectors(torch.tensor([[8, 0]]))
    assert not embedder.vectors(torch.zeros(0, 2, dtype=torch.long)).numel()


def write_melodies(folder: Path, count: int = 3) -> None:
    """Recordings of sine melodies of 2.4 s with their notes."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        notes = [PitchNote(0.4 * i, 0.4 * i + 0.38, int(rng.integers(12))) for i in range(6)]
        wave = render_melody(notes, 2.4, 8000, draw_voice(rng, "sine"), rng)
        write_audio(folder / f"{number}.wav", torch.from_numpy(wave), 8000)
        labels = [[start, end, PITCH_CLASSES[pitch]] for start, end, pitch in notes]
        rows.append(json.dumps({"audio": f"{number}.wav", "pitch_class": labels}) + "\n")
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(rows))


def small_embedder() -> MelodyEmbedder:
    torch.manual_seed(0)
    sizes = {"patch_size": 20, "num_mels": 120, "spec_n_fft": 1024, "spec_win_length": 1024, "spec_hop_length": 256}
    audio = AudioSpectrogramTransformer(dim=64, depth=1, heads=2, dim_head=32, sample_hz=8000, **sizes)
    return MelodyEmbedder(audio_transformer=audio, dim_latent=16, rq_num_quantizers=2, codebook_size=16)


@pytest.mark.slow
def test_a_trained_embedder_depends_on_pitch_classes_and_not_on_the_voice(tmp_path: Path) -> None:
    """Few melodies are memorised: other voices and registers are near, and other melodies are far."""
    write_melodies(tmp_path)
    embedder = small_embedder()
    settings = {"batch_size": 8, "num_train_steps": 100, "learning_rate": 2e-3, "validate_every": 100}
    result = MelodyTrainer(embedder=embedder, folder=tmp_path, results_folder=tmp_path / "run", **settings).train()
    assert result.metrics["valid.same_pitch_classes"] > 2 * result.metrics["valid.same_by_chance"]
    rng = np.random.default_rng(5)
    rows = [json.loads(line)["pitch_class"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    melodies = [notes_of(item_of(notes)) for notes in rows]
    waves = [
        [render_melody(melody, 2.4, 8000, draw_voice(rng, kind), rng) for melody in melodies]
        for kind in ("hum", "whistle")
    ]
    first, second = (embedder.latents(torch.from_numpy(np.stack(part)))[0] for part in waves)
    same = (first * second).sum(dim=-1).mean()
    other = (first * second.roll(1, dims=0)).sum(dim=-1).mean()
    assert same > 0.5 and same > other + 0.15  # 0.78, and 0.41 to 0.46
    loaded = load_module(tmp_path / "run" / "melody", expect=MelodyEmbedder)
    assert loaded.fingerprint() == embedder.fingerprint() and bool(loaded.fitted)


def test_training_needs_notes_and_their_melody_is_the_condition(tmp_path: Path) -> None:
    """Batches depend on the seed alone; the wave of a file without notes is its recording."""
    write_melodies(tmp_path, count=2)
    settings = {"embedder": small_embedder(), "batch_size": 2, "num_train_steps": 1}
    trainers = [
        MelodyTrainer(folder=tmp_path, results_folder=tmp_path / str(number), seed=number // 2, **settings)
        for number in range(3)
    ]
    batches = [trainer.task.batch([(0, 0), (3, 1)]) for trainer in trainers]
    assert torch.equal(batches[0]["windows"], batches[1]["windows"])
    assert not torch.equal(batches[0]["windows"], batches[2]["windows"])
    assert batches[0]["windows"].shape == (2, 2, 6, 5120) and batches[0]["classes"].shape == (2, 2, 6, 8)
    items = trainers[0].task.items
    waves = [melody_wave(items[0][0], 8000, seed) for seed in range(12)]
    recording = items[0][0].read(8000)
    assert 0 < sum(torch.equal(wave, recording) for wave in waves) < 12
    assert {tuple(wave.shape) for wave in waves} == {(1, 19200)}
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text('{"audio": "0.wav"}\n{"audio": "1.wav"}\n')
    with pytest.raises(ValueError, match="none of 2 files has notes in the label pitch_class"):
        MelodyTrainer(folder=tmp_path, results_folder=tmp_path / "none", **settings)
    (tmp_path / "train.jsonl").write_text('{"audio": "0.wav", "pitch_class": [[0, 1, "C"], [50, 51, "C"]]}\n')
    with pytest.raises(ValueError, match=r"0.wav: pitch_class has a note that starts at 50 s.* file ends at 2.4 s"):
        MelodyTrainer(folder=tmp_path, results_folder=tmp_path / "none", **settings)
