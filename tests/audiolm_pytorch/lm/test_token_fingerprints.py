"""Fingerprints of tokenizers and conditioners are saved with stages and compared wherever the modules meet."""

import shutil

import numpy as np
import pytest

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.data import TokenShards, write_shards
from audiolm_pytorch.generation.wrappers import (
    CoarseTransformerWrapper,
    FineTransformerWrapper,
    SemanticTransformerWrapper,
)
from audiolm_pytorch.lm.compatibility import shard_fingerprint
from audiolm_pytorch.lm.stages import SemanticTransformer
from audiolm_pytorch.lm.trainers import CoarseTransformerTrainer, FineTransformerTrainer, SemanticTransformerTrainer
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers import fakes
from tests.helpers.quick import only_quick

pytestmark = pytest.mark.usefixtures("low_rates")

TRAINERS = {
    "semantic": SemanticTransformerTrainer,
    "coarse": CoarseTransformerTrainer,
    "fine": FineTransformerTrainer,
}
WRAPPERS = {
    "semantic": SemanticTransformerWrapper,
    "coarse": CoarseTransformerWrapper,
    "fine": FineTransformerWrapper,
}
# By stage: the arguments of its tokenizers, and the fingerprints that it must store.
MAKERS = {"semantic": ("wav2vec",), "coarse": ("wav2vec", "codec"), "fine": ("codec",)}
KINDS = {"wav2vec": "semantic", "codec": "acoustic"}
IN_SHARDS = {"wav2vec": "semantic_tokenizer", "codec": "codec"}
KNOWN = {
    "semantic": {"semantic": "semantic"},
    "coarse": {"semantic": "semantic", "acoustic": "codec"},
    "fine": {"acoustic": "codec"},
}
PAIRS = [(name, maker) for name in MAKERS for maker in MAKERS[name]]
QUICK = {"num_train_steps": 3, "batch_size": 2, "warmup_steps": 0, "data_max_length_seconds": 0.4}
every_stage = pytest.mark.parametrize("name", only_quick(MAKERS, ["coarse"]))
every_source = pytest.mark.parametrize("source", ["waves", "shards"])


def makers_of(name, **fingerprints):
    """The tokenizers of a stage; `fingerprints` replaces some of their fingerprints."""
    makers = {"wav2vec": fakes.FakeSemanticTokenizer(), "codec": fakes.FakeCodec()}
    for maker, fingerprint in fingerprints.items():
        makers[maker].fingerprint = lambda fingerprint=fingerprint: fingerprint
    return {maker: makers[maker] for maker in MAKERS[name]}


def shards_of(folder, **changes):
    """Shards with the fingerprints of the fake tokenizers; `changes` replaces some of them."""

    def make_record(index):
        return {"semantic": np.arange(25) % 12, "acoustic": np.repeat(np.arange(50)[:, None] % 16, 4, axis=1)}

    said = {**shard_fingerprint(fakes.FakeSemanticTokenizer(), fakes.FakeCodec()), **changes}
    write_shards(folder, make_record, 3, {key: value for key, value in said.items() if value is not None})
    return TokenShards(folder)


def trainer_of(name, source, tmp_path, write_folder, *, stage=None, other=None, **changes):
    """A trainer from waves or shards; the tokenizer of argument `other` has another fingerprint."""
    if source == "waves":
        folder = tmp_path / "corpus"
        data = {"folder": folder if folder.exists() else write_folder(num_files=4, sample_hz=fakes.SAMPLE_HZ)}
        data.update(makers_of(name, **({} if other is None else {other: "another"})))
    else:
        data = {
            "shards": shards_of(
                tmp_path / f"shards {other}", **({} if other is None else {IN_SHARDS[other]: "another"})
            )
        }
    stage = fakes.tiny_stages()[name] if stage is None else stage
    return TRAINERS[name](transformer=stage, **data, **{"results_folder": tmp_path / "run", **QUICK, **changes})


@every_stage
@every_source
def test_checkpoints_and_results_store_fingerprints(name, source, tmp_path, write_folder):
    """Checkpoint, saved stage and stage have the fingerprints of the kinds that the stage uses."""
    trainer = trainer_of(name, source, tmp_path, write_folder)
    assert trainer.transformer.token_fingerprints == {}
    trainer.train(stop_after_steps=1)
    assert trainer.transformer.token_fingerprints == KNOWN[name]
    state = read_json(tmp_path / "run" / "checkpoint" / "state.json")
    assert state["state"]["run"]["token_fingerprints"] == KNOWN[name]
    trainer.train()
    assert read_json(tmp_path / "run" / "finished.json")["run"]["token_fingerprints"] == KNOWN[name]
    # A finished run writes a lost result again, also from a stage without fingerprints.
    shutil.rmtree(tmp_path / "run" / name)
    again = trainer_of(name, source, tmp_path, write_folder)
    again.train()
    assert again.transformer.token_fingerprints == KNOWN[name]
    assert read_json(tmp_path / "run" / name / "config.json")["config"]["token_fingerprints"] == KNOWN[name]
    assert load_module(tmp_path / "run" / name).token_fingerprints == KNOWN[name]


@pytest.mark.parametrize(
    ("name", "maker"),
    [pytest.param(*pair, marks=[] if pair[0] == "coarse" else pytest.mark.slow) for pair in PAIRS],
)
@every_source
@pytest.mark.parametrize("finished", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_is_not_resumed_with_another_tokenizer(name, maker, source, finished, tmp_path, write_folder):
    """Resuming a run with another tokenizer raises an error and does not change the stage."""
    trainer_of(name, source, tmp_path, write_folder).train(stop_after_steps=None if finished else 2)
    kind = KINDS[maker]
    other = trainer_of(name, source, tmp_path, write_folder, other=maker)
    with pytest.raises(ValueError, match=rf"token_fingerprints.{kind}: found {KNOWN[name][kind]}, expected another"):
        other.train()
    assert other.transformer.token_fingerprints == {}
    assert trainer_of(name, source, tmp_path, write_folder, stage=other.transformer).train().step == 3


@pytest.mark.parametrize(("name", "maker"), PAIRS)
def test_shards_of_another_tokenizer_raise_errors(name, maker, tmp_path):
    """Tokenizers, training shards and held-out shards must agree; the message has both fingerprints and the fix."""
    ours, kind = shards_of(tmp_path / "ours"), KINDS[maker]
    theirs = shards_of(tmp_path / "theirs", **{IN_SHARDS[maker]: "another"})
    common = {"results_folder": tmp_path / "run", **QUICK}
    build, own = TRAINERS[name], KNOWN[name][kind]
    build(transformer=fakes.tiny_stages()[name], shards=ours, **makers_of(name), **common)
    with pytest.raises(
        ValueError, match=rf"the {kind} tokens .*ours were made with {own}, the passed Fake\w+ is another; pass the"
    ):
        build(transformer=fakes.tiny_stages()[name], shards=ours, **makers_of(name, **{maker: "another"}), **common)
    with pytest.raises(
        ValueError, match=rf"the {kind} tokens .*ours were made with {own}, .*theirs were made with another"
    ):
        build(transformer=fakes.tiny_stages()[name], shards=(ours, theirs), **common)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "maker"), PAIRS)
def test_a_trained_stage_accepts_no_other_tokenizer(name, maker, tmp_path):
    """Wrappers, AudioLM and trainers raise an error with both fingerprints and the fix."""
    kind = KINDS[maker]
    stages = fakes.tiny_stages()
    config = {**stages[name].config, "token_fingerprints": KNOWN[name]}
    stages[name] = trained = type(stages[name]).from_config(config)
    right, wrong = makers_of("coarse"), makers_of("coarse", **{maker: "another"})
    message = (
        rf"the {kind} tokens .*the {name} transformer was trained with {KNOWN[name][kind]}, the passed Fake\w+ is "
        rf"another; pass the .*trained with, or remove '{kind}' from token_fingerprints"
    )
    parts = {f"{stage}_transformer": module for stage, module in stages.items()}
    AudioLM(**right, **parts)
    WRAPPERS[name](trained, **{one: right[one] for one in MAKERS[name]})
    WRAPPERS[name](trained)
    with pytest.raises(ValueError, match=message):
        AudioLM(**wrong, **parts)
    with pytest.raises(ValueError, match=message):
        WRAPPERS[name](trained, **{one: wrong[one] for one in MAKERS[name]})
    theirs = shards_of(tmp_path / "theirs", **{IN_SHARDS[maker]: "another"})
    with pytest.raises(ValueError, match=rf"the {name} transformer was trained with .*theirs were made with another"):
        TRAINERS[name](transformer=trained, shards=theirs, results_folder=tmp_path / "run", **QUICK)
    del trained.token_fingerprints[kind]
    AudioLM(**wrong, **parts)


@every_stage
def test_unknown_fingerprints_are_not_checked(name, tmp_path):
    """Stages and shards without fingerprints accept any tokenizer."""
    stage = fakes.tiny_stages()[name]
    assert "token_fingerprints" not in stage.config
    save_module(stage, tmp_path / "old")
    WRAPPERS[name](load_module(tmp_path / "old"), **makers_of(name, **dict.fromkeys(MAKERS[name], "another")))
    shards = shards_of(tmp_path / "shards", semantic_tokenizer=None, codec={"name": "mine"}, made="here")
    trainer = TRAINERS[name](transformer=stage, shards=shards, results_folder=tmp_path / "run", **QUICK)
    trainer.train()
    assert stage.token_fingerprints == {} and "token_fingerprints" not in stage.config
    assert read_json(tmp_path / "run" / "finished.json")["run"]["token_fingerprints"] == {}
    informed = TRAINERS[name](
        transformer=fakes.tiny_stages()[name],
        shards=shards,
        results_folder=tmp_path / "informed",
        **makers_of(name),
        **QUICK,
    )
    informed.train(stop_after_steps=1)
    assert informed.transformer.token_fingerprints == KNOWN[name]


def test_fingerprints_of_unused_kinds_raise_errors():
    """A misspelt kind would never be compared."""
    with pytest.raises(ValueError, match="got unused token_fingerprints {'acoustic'}"):
        SemanticTransformer(num_semantic_tokens=12, token_fingerprints={"acoustic": "codec"}, **fakes.SIZES)


def conditioner_of(fingerprint=None):
    """A conditioner with a fingerprint, or without one."""
    conditioner = fakes.FakeConditioner()
    if fingerprint is not None:
        conditioner.fingerprint = lambda: fingerprint
    return conditioner


def conditioned_trainer(tmp_path, write_folder, conditioner, stage=None, **changes):
    """A trainer of the semantic stage from waves, with a conditioner."""
    stage = fakes.tiny_stages(**fakes.CONDITION)["semantic"] if stage is None else stage
    parts = {"stage": stage, "audio_conditioner": conditioner, **changes}
    return trainer_of("semantic", "waves", tmp_path, write_folder, **parts)


def test_a_stage_stores_the_fingerprint_of_its_conditioner(tmp_path, write_folder):
    """Another conditioner raises an error wherever they meet; one without a fingerprint does not."""
    trainer = conditioned_trainer(tmp_path, write_folder, conditioner_of("A"))
    trainer.train()
    known, finished = {"semantic": "semantic", "conditioner": "A"}, read_json(tmp_path / "run" / "finished.json")["run"]
    trained = load_module(tmp_path / "run" / "semantic")
    assert trained.token_fingerprints == trainer.transformer.token_fingerprints == known
    assert finished["token_fingerprints"] == known
    stages = {f"{name}_transformer": stage for name, stage in fakes.tiny_stages(**fakes.CONDITION).items()}
    parts = {**makers_of("coarse"), **stages, "semantic_transformer": trained}
    for other in (conditioner_of("A"), conditioner_of(), None):
        AudioLM(**parts, audio_conditioner=other)
        SemanticTransformerWrapper(trained, audio_conditioner=other)
    message = (
        "the conditioning codes have different fingerprints: the semantic transformer was trained with A, the passed "
        r"FakeConditioner is B; pass the conditioner \(audio_conditioner\) that .* remove 'conditioner' from"
    )
    with pytest.raises(ValueError, match=message):
        AudioLM(**parts, audio_conditioner=conditioner_of("B"))
    with pytest.raises(ValueError, match=message):
        SemanticTransformerWrapper(trained, audio_conditioner=conditioner_of("B"))
    with pytest.raises(ValueError, match=message):
        conditioned_trainer(tmp_path, write_folder, conditioner_of("B"), trained, results_folder=tmp_path / "more")
    tuned = conditioned_trainer(tmp_path, write_folder, conditioner_of(), trained, results_folder=tmp_path / "more")
    tuned.train()
    assert tuned.transformer.token_fingerprints == known


def test_an_unconditional_stage_has_no_conditioner_fingerprint(tmp_path):
    """An unconditional stage ignores the conditioner, and no extra stream may have its name."""
    stage = fakes.tiny_stages()["semantic"]
    SemanticTransformerWrapper(stage, audio_conditioner=conditioner_of("A"))
    assert "conditioner" not in stage.fingerprinted
    with pytest.raises(ValueError, match="got unused token_fingerprints {'conditioner'}"):
        SemanticTransformer(num_semantic_tokens=12, token_fingerprints={"conditioner": "A"}, **fakes.SIZES)
    with pytest.raises(ValueError, match="cannot be named 'conditioner'"):
        extra = [Stream("conditioner", 5, rate_hz=10, is_input=True)]
        SemanticTransformer(num_semantic_tokens=12, extra_streams=extra, **fakes.SIZES)


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_is_not_resumed_with_another_conditioner(finished, tmp_path, write_folder):
    """The error does not change the stage; the run can be resumed with its own conditioner."""
    conditioned_trainer(tmp_path, write_folder, conditioner_of("A")).train(stop_after_steps=None if finished else 2)
    other = conditioned_trainer(tmp_path, write_folder, conditioner_of("B"))
    with pytest.raises(ValueError, match="conditioner: found A, expected B"):
        other.train()
    assert other.transformer.token_fingerprints == {}
    again = conditioned_trainer(tmp_path, write_folder, conditioner_of("A"), other.transformer)
    assert again.train().step == 3 and other.transformer.token_fingerprints["conditioner"] == "A"


def test_fingerprints_are_computed_once_per_run(tmp_path, write_folder):
    """A fingerprint hashes all weights, so training steps must not compute it."""
    asked = []

    class CountingCodec(fakes.FakeCodec):
        def fingerprint(self):
            asked.append(1)
            return "codec"

    folder, counts = write_folder(num_files=4, sample_hz=fakes.SAMPLE_HZ), []
    for steps in (1, 6):
        FineTransformerTrainer(
            transformer=fakes.tiny_stages()["fine"],
            codec=CountingCodec(),
            folder=folder,
            results_folder=tmp_path / f"run {steps}",
            **{**QUICK, "num_train_steps": steps},
        ).train()
        counts.append(len(asked))
        asked.clear()
    assert 0 < counts[0] == counts[1]
