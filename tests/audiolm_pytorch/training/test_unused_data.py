"""Warnings about data and parts that a trainer does not use, and bounded work before the first step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audiolm_pytorch import SoundStream, SoundStreamTrainer
from audiolm_pytorch.data.shards import TokenShards, write_shards
from audiolm_pytorch.lm.trainers import FineTransformerTrainer, SemanticTransformerTrainer
from audiolm_pytorch.semantic.best_rq import training as best_rq_training
from audiolm_pytorch.semantic.best_rq.training import SemanticTokenizerTrainer
from musiclm_pytorch.pipeline.builders import build_semantic_encoder
from tests.helpers.fakes import (
    CONDITION,
    SAMPLE_HZ,
    FakeCodec,
    FakeConditioner,
    FakeSemanticTokenizer,
    FakeTextConditioner,
    tiny_stages,
)
from tests.helpers.micro import MICRO

pytestmark = pytest.mark.usefixtures("low_rates")

SIZES: dict[str, Any] = {"num_train_steps": 2, "batch_size": 2, "data_max_length_seconds": 0.5}


@pytest.fixture
def captioned(write_folder: Any) -> Path:
    """Recordings of which one has a caption."""
    folder: Path = write_folder(num_files=4, sample_hz=SAMPLE_HZ)
    (folder / "001.txt").write_text("a low tone")
    return folder


def semantic_trainer(folder: Path, **options: Any) -> SemanticTransformerTrainer:
    """A trainer of the semantic stage; with an audio_conditioner or a text_conditioner, the stage has the condition."""
    condition = dict(CONDITION) if "audio_conditioner" in options else {}
    condition |= {"text_dim": 6} if "text_conditioner" in options else {}
    stage = tiny_stages(**condition)["semantic"]
    return SemanticTransformerTrainer(
        transformer=stage, wav2vec=FakeSemanticTokenizer(), folder=folder, **SIZES, **options
    )


def test_captions_that_nothing_uses_are_reported_once(captioned: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fine-tuning on captioned clips would not learn the captions; the warning names the arguments that change it."""
    semantic_trainer(captioned, audio_conditioner=FakeConditioner())
    [message] = caplog.messages
    assert "without the captions" in message and "text_prob=0" in message and "text_dim" in message
    caplog.clear()
    semantic_trainer(captioned)
    assert "the stage has no condition" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"audio_conditioner": FakeConditioner(), "text_prob": 0.5},
        {"text_conditioner": FakeTextConditioner()},
    ],
    ids=["text_prob", "text_dim"],
)
def test_used_captions_are_not_reported(
    captioned: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    """A stage that reads captions needs no warning."""
    semantic_trainer(captioned, **options)
    assert caplog.messages == []


def test_recordings_without_captions_are_not_reported(write_folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Audio alone is enough for a stage that is conditioned on audio."""
    semantic_trainer(write_folder(num_files=4, sample_hz=SAMPLE_HZ), audio_conditioner=FakeConditioner())
    assert caplog.messages == []


def test_text_prob_without_captions_is_refused(write_folder: Any, tmp_path: Path) -> None:
    """The stage would be trained on codes of audio alone, from files and from shards."""
    condition: dict[str, Any] = {"audio_conditioner": FakeConditioner(), "text_prob": 0.5}
    with pytest.raises(ValueError, match="text_prob=0.5, but none of 3 recordings has a caption"):
        semantic_trainer(write_folder(num_files=4, sample_hz=SAMPLE_HZ), **condition)
    record = {"semantic": np.arange(50) % 12, "latents": np.ones((1, 2)), "text_latents": np.ones((0, 2))}
    write_shards(tmp_path / "shards", lambda _: record, 2, {})
    with pytest.raises(ValueError, match="text_prob=0.5, but none of 2 recordings has a caption"):
        SemanticTransformerTrainer(
            transformer=tiny_stages(**CONDITION)["semantic"],
            shards=TokenShards(tmp_path / "shards"),
            **condition,
            **SIZES,
        )


def test_unused_tokenizers_are_reported(write_folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A codec for the semantic stage, and a semantic tokenizer for the fine stage, have no influence."""
    folder = write_folder(num_files=4, sample_hz=SAMPLE_HZ)
    semantic_trainer(folder, codec=FakeCodec())
    assert "semantic transformer has no acoustic tokens; codec is not used" in caplog.text
    options: Any = {"transformer": tiny_stages()["fine"], "codec": FakeCodec(), "wav2vec": FakeSemanticTokenizer()}
    FineTransformerTrainer(**options, folder=folder, **SIZES)
    assert "fine transformer has no semantic tokens; wav2vec is not used" in caplog.text


def small_codec() -> SoundStream:
    """A codec of 50 frames per second with 32 codes."""
    return SoundStream(
        channels=2, codebook_dim=8, strides=(4, 4, 10), target_sample_hz=8000, codebook_size=32, rq_num_quantizers=2
    )


def test_unused_settings_of_the_codec_trainer_are_reported(write_folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Settings of discriminators and of noise without discriminators and noise."""
    unused: dict[str, Any] = {"adversarial_start_step": 1, "discriminator_lead_steps": 1, "noise_snr_db": (0.0, 5.0)}
    SoundStreamTrainer(small_codec(), folder=write_folder(num_files=3, sample_hz=8000), **SIZES, **unused)
    assert [message.partition("=")[0] for message in caplog.messages] == list(unused)


def test_a_codec_must_train_its_quantizer(write_folder: Any) -> None:
    """With too many unquantized steps, the saved codec would have untrained codebooks."""
    with pytest.raises(ValueError, match="never be trained in 2 steps; lower unquantized_steps=2"):
        SoundStreamTrainer(small_codec(), folder=write_folder(num_files=3), unquantized_steps=2, **SIZES)


def test_crops_of_the_semantic_encoder_have_a_token(write_folder: Any) -> None:
    """Shorter crops are refused before the training, as by the trainers of stages."""
    encoder = build_semantic_encoder(MICRO)
    with pytest.raises(ValueError, match="crops of 0.001 s, but a token lasts"):
        SemanticTokenizerTrainer(
            encoder=encoder, folder=write_folder(num_files=3), seconds=0.001, batch_size=1, num_train_steps=1
        )


def test_codebooks_start_from_two_passes_of_the_encoder(
    write_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a few short files, the work before the first quantized step is two passes in batches, without the decoder."""
    folder = write_folder(num_files=10, seconds=0.2, sample_hz=8000)
    codec = small_codec()
    trainer = SoundStreamTrainer(codec, folder=folder, results_folder=tmp_path / "run", unquantized_steps=0, **SIZES)
    batches: list[tuple[int, ...]] = []
    encode, initialise = codec.encode_frames, codec.quantizer.initialise
    frames: list[int] = []
    monkeypatch.setattr(
        codec, "encode_frames", lambda wave, flags: (batches.append(tuple(wave.shape)), encode(wave, flags))[1]
    )
    monkeypatch.setattr(codec.quantizer, "initialise", lambda rows: (frames.append(len(rows)), initialise(rows)))
    trainer.task._initialise_codebooks()
    count = trainer.task.num_items
    assert sum(shape[0] for shape in batches) == 2 * count and len(batches) == -(-2 * count // 16)
    assert frames == [2 * count * 10]
    monkeypatch.undo()
    assert trainer.train().step == 2


def test_codebooks_of_much_data_need_no_second_pass(write_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder reads only as many crops as the codebooks need: 25 frames per code, 25 frames per crop of 0.5 s."""
    folder = write_folder(num_files=60, seconds=0.5, sample_hz=8000)
    codec = small_codec()
    trainer = SoundStreamTrainer(codec, folder=folder, unquantized_steps=0, **SIZES)
    encode, counts = codec.encode_frames, []
    monkeypatch.setattr(codec, "encode_frames", lambda wave, flags: (counts.append(len(wave)), encode(wave, flags))[1])
    trainer.task._initialise_codebooks()
    assert trainer.task.num_items > 40 and counts == [16, 16]


def test_statistics_of_the_semantic_encoder_need_a_bounded_number_of_crops(
    write_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work before the first step of BEST-RQ: every file once, and no more than a fixed number of files."""
    folder = write_folder(num_files=9, seconds=0.5, sample_hz=16000)
    encoder = build_semantic_encoder(MICRO)
    trainer = SemanticTokenizerTrainer(
        encoder=encoder, folder=folder, seconds=0.3, batch_size=2, num_train_steps=1, results_folder=tmp_path / "run"
    )
    assert len(list(trainer.task._statistics_waves())) == trainer.task.num_items
    monkeypatch.setattr(best_rq_training, "_STATISTICS_CROPS", 3)
    assert len(list(trainer.task._statistics_waves())) == 3
