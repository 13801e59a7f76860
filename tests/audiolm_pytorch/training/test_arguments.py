"""Arguments of trainers and settings: numpy numbers, lists, whole numbers, and errors for unknown names."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiolm_pytorch import KMeansTrainer, SemanticTransformer, SemanticTransformerTrainer, SoundStreamTrainer
from audiolm_pytorch.codecs.training.task import CodecLossWeights
from audiolm_pytorch.lm.trainers import StageTrainer
from audiolm_pytorch.semantic.best_rq.training import SemanticTokenizerTrainer
from audiolm_pytorch.training import LoopSettings
from audiolm_pytorch.training.arguments import trainer_arguments
from musiclm_pytorch import MuLaNTrainer
from tests.helpers.fakes import SAMPLE_HZ, FakeSemanticTokenizer, tiny_stages

pytestmark = pytest.mark.usefixtures("low_rates")

SIZES = {"num_train_steps": 1, "batch_size": 1}


def test_arguments_of_trainers_are_attributes(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The names of the constructor, also those with default values."""
    folder = write_folder(num_files=3, seconds=0.5, sample_hz=SAMPLE_HZ)
    trainer = SemanticTransformerTrainer(
        transformer=tiny_stages()["semantic"],
        wav2vec=FakeSemanticTokenizer(),
        folder=folder,
        data_max_length=400,
        results_folder=tmp_path / "run",
        **SIZES,
    )
    names = inspect.signature(StageTrainer.__init__).parameters
    assert [name for name in names if name not in ("self", "settings") and not hasattr(trainer, name)] == []
    assert trainer.folder == folder and trainer.codec is None and trainer.data_max_length == 400


def test_constructors_of_trainers_leave_the_random_generators_alone() -> None:
    """A trainer may create modules with random weights."""

    @trainer_arguments()
    class Trainer:
        def __init__(self, *, size: int) -> None:
            self.weights = torch.randn(size)

    before = torch.get_rng_state()
    assert Trainer(size=3).weights.shape == (3,) and torch.equal(before, torch.get_rng_state())


def test_settings_accept_whole_numbers_numpy_numbers_and_lists() -> None:
    """They are stored as Python's own types, which JSON holds."""
    settings = LoopSettings(
        num_train_steps=np.int64(7),
        batch_size=np.int32(2),
        learning_rate=np.float32(0.5),
        weight_decay=0,
        max_grad_norm=1,
        betas=[0.9, np.float64(0.99)],
        seed=np.int64(3),
        checkpoint_every_seconds=10,
    )
    plain = LoopSettings(
        num_train_steps=7, batch_size=2, learning_rate=0.5, weight_decay=0.0, betas=(0.9, 0.99), seed=3
    )
    assert settings.fixed() == plain.fixed()
    assert type(settings.seed) is int and type(settings.betas) is tuple and type(settings.learning_rate) is float


@pytest.mark.parametrize("wrong", [{"seed": 1.5}, {"seed": np.float32(1)}, {"betas": [0.9]}, {"learning_rate": "1"}])
def test_other_types_raise_errors(wrong: dict[str, Any]) -> None:
    """A conversion does not hide a mistake."""
    with pytest.raises(TypeError):
        LoopSettings(**SIZES, **wrong)


def test_trainers_accept_numpy_numbers_and_lists(tmp_path: Path, write_folder: Any) -> None:
    """Lengths, probabilities and the settings behind them."""
    trainer = SemanticTransformerTrainer(
        transformer=tiny_stages()["semantic"],
        wav2vec=FakeSemanticTokenizer(),
        folder=write_folder(num_files=4, sample_hz=SAMPLE_HZ),
        results_folder=tmp_path / "run",
        num_train_steps=np.int64(1),
        batch_size=np.int64(2),
        data_max_length_seconds=np.float32(0.5),
        text_prob=0,
        betas=[0.9, 0.99],
        seed=np.int64(3),
    )
    assert trainer.train().step == 1


@pytest.mark.parametrize(
    "trainer", [SemanticTransformerTrainer, SoundStreamTrainer, MuLaNTrainer, SemanticTokenizerTrainer]
)
def test_unknown_names_raise_an_error_with_advice(trainer: Any) -> None:
    """The error names the trainer, and the name here of an argument of lucidrains' trainers, or similar names."""
    for name, advice in [
        ("lr", "learning_rate$"),
        ("save_model_every", "checkpoint_every_steps$"),
        ("valid_frac", "items=.train, valid., or valid_fraction of MuLaNTrainer$"),
        ("dataset", "folder or items=.train, valid.$"),
        ("ds", "folder or items=.train, valid.$"),
        ("max_epochs", "num_train_steps"),
        ("mixed_precision", 'precision="bf16"$'),
        ("lr_scheduler", "schedule$"),
        ("learning_rates", "learning_rate"),
        ("num_steps", "num_train_steps"),
        ("zzz", "folder, .*num_train_steps, .*seed"),
    ]:
        stage = {"transformer": tiny_stages()["semantic"]} if trainer is SemanticTransformerTrainer else {}
        with pytest.raises(TypeError, match=f"^{trainer.__name__} has no argument '{name}'; use .*{advice}"):
            trainer(**stage, **{name: 1}, **SIZES)
    with pytest.raises(TypeError, match="^LoopSettings has no argument 'weight_deca'; use weight_decay"):
        LoopSettings(**SIZES, weight_deca=0.1)


@pytest.mark.parametrize("name", ["lr", "bs", "valid_dataset", "dataset"])
def test_advice_is_true_for_the_class(name: str) -> None:
    """Former names of arguments that only other trainers have are no advice."""
    with pytest.raises(
        TypeError, match=f"^KMeansTrainer has no argument '{name}'; use encoder, layer, .*, accelerator"
    ):
        KMeansTrainer(**{name: 1})
    with pytest.raises(TypeError, match="^SemanticTransformer has no argument 'n_heads'; use heads"):
        SemanticTransformer(num_semantic_tokens=16, dim=32, depth=1, n_heads=1)


def test_all_unknown_names_are_in_one_error() -> None:
    """Each with its advice; names without a similar one share the list of arguments, which has no repetitions."""
    with pytest.raises(TypeError) as raised:
        SemanticTransformerTrainer(transformer=tiny_stages()["semantic"], **SIZES, lr=1, zzz=2, wd=3, yyy=4)
    name = "SemanticTransformerTrainer has no argument"
    first, second, third = str(raised.value).split(". ")
    assert first == f"{name} 'lr'; use learning_rate" and third == f"{name} 'wd'; use weight_decay"
    assert second.startswith(f"{name} 'zzz', 'yyy'; use transformer, wav2vec, ")
    listed = second.partition("use ")[2].split(", ")
    assert len(listed) == len(set(listed)) and {"num_train_steps", "batch_size", "seed"} <= set(listed)
    with pytest.raises(
        TypeError, match="'weight_deca'; use weight_decay, ema_decay. LoopSettings has no argument 'see'; use"
    ):
        LoopSettings(**SIZES, weight_deca=0.1, see=1)


@pytest.mark.parametrize("both", [False, True], ids=["neither", "both"])
def test_one_source_of_audio_is_needed(both: bool, tmp_path: Path) -> None:
    """The message states whether neither or both were passed."""
    source = {"folder": tmp_path, "items": ([], [])} if both else {}
    message = "got both folder and items" if both else "got neither folder nor items"
    with pytest.raises(ValueError, match=message):
        SemanticTransformerTrainer(
            transformer=tiny_stages()["semantic"], wav2vec=FakeSemanticTokenizer(), **SIZES, **source
        )


def test_settings_objects_accept_numpy_numbers_and_lists() -> None:
    """The settings of the codec trainer that are objects of their own convert numbers too, and advise on names."""
    weights = CodecLossWeights(mel=np.float32(2), waveform=1, adversarial=np.int64(0), feature_matching=0)
    assert weights == CodecLossWeights(mel=2.0, waveform=1.0, adversarial=0.0, feature_matching=0.0)
    with pytest.raises(TypeError, match="CodecLossWeights has no argument 'adversary'; use adversarial"):
        CodecLossWeights(adversary=1)  # type: ignore[call-arg]
