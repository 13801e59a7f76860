"""What a stage's tokens were made by travels with it; tokens of another tokenizer are refused wherever they meet."""

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
from tests.helpers.fakes import (
    CONDITION,
    SAMPLE_HZ,
    SIZES,
    FakeCodec,
    FakeConditioner,
    FakeSemanticTokenizer,
    tiny_stages,
)

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
# By stage: the arguments that make its tokens, and what it must remember of the fakes.
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
every_stage = pytest.mark.parametrize("name", list(MAKERS))
every_source = pytest.mark.parametrize("source", ["waves", "shards"])


def makers_of(name, **fingerprints):
    """The tokenizers of a stage, some of them with other fingerprints."""
    makers = {"wav2vec": FakeSemanticTokenizer(), "codec": FakeCodec()}
    for maker, fingerprint in fingerprints.items():
        makers[maker].fingerprint = lambda fingerprint=fingerprint: fingerprint
    return {maker: makers[maker] for maker in MAKERS[name]}


def shards_of(folder, **changes):
    """Shards that say what the fakes made them, or something else."""

    def make_record(index):
        return {"semantic": np.arange(25) % 12, "acoustic": np.repeat(np.arange(50)[:, None] % 16, 4, axis=1)}

    said = {**shard_fingerprint(FakeSemanticTokenizer(), FakeCodec()), **changes}
    write_shards(folder, make_record, 3, {key: value for key, value in said.items() if value is not None})
    return TokenShards(folder)


def trainer_of(name, source, tmp_path, write_folder, *, stage=None, other=None, **changes):
    """A trainer from waves or shards; `other` is the argument whose tokenizer is another one."""
    if source == "waves":
        folder = tmp_path / "corpus"
        data = {"folder": folder if folder.exists() else write_folder(num_files=4, sample_hz=SAMPLE_HZ)}
        data.update(makers_of(name, **({} if other is None else {other: "another"})))
    else:
        data = {
            "shards": shards_of(
                tmp_path / f"shards {other}", **({} if other is None else {IN_SHARDS[other]: "another"})
            )
        }
    stage = tiny_stages()[name] if stage is None else stage
    return TRAINERS[name](transformer=stage, **data, **{"results_folder": tmp_path / "run", **QUICK, **changes})


@every_stage
@every_source
def test_checkpoints_and_results_say_what_their_tokens_were_made_by(name, source, tmp_path, write_folder):
    """Fingerprints of the kinds that a stage uses, and of no others, are in its checkpoint, its file and its memory."""
    trainer = trainer_of(name, source, tmp_path, write_folder)
    assert trainer.transformer.token_fingerprints == {}
    trainer.train(stop_after_steps=1)
    assert trainer.transformer.token_fingerprints == KNOWN[name]
    state = read_json(tmp_path / "run" / "checkpoint" / "state.json")
    assert state["state"]["run"]["token_fingerprints"] == KNOWN[name]
    trainer.train()
    assert read_json(tmp_path / "run" / "finished.json")["run"]["token_fingerprints"] == KNOWN[name]
    # A finished run whose result was lost gives the same result again, also with a stage that does not know yet.
    (tmp_path / "run" / name / "config.json").unlink()
    again = trainer_of(name, source, tmp_path, write_folder)
    again.train()
    assert again.transformer.token_fingerprints == KNOWN[name]
    assert read_json(tmp_path / "run" / name / "config.json")["config"]["token_fingerprints"] == KNOWN[name]
    assert load_module(tmp_path / "run" / name).token_fingerprints == KNOWN[name]


@pytest.mark.parametrize(("name", "maker"), PAIRS)
@every_source
@pytest.mark.parametrize("finished", [False, True])
def test_a_run_is_not_continued_on_tokens_of_another_tokenizer(name, maker, source, finished, tmp_path, write_folder):
    """A checkpoint, or a finished run, of one tokenizer is refused with another, which leaves no trace in the stage."""
    trainer_of(name, source, tmp_path, write_folder).train(stop_after_steps=None if finished else 2)
    kind = KINDS[maker]
    other = trainer_of(name, source, tmp_path, write_folder, other=maker)
    with pytest.raises(ValueError, match=rf"token_fingerprints.{kind}: found {KNOWN[name][kind]}, expected another"):
        other.train()
    assert other.transformer.token_fingerprints == {}
    assert trainer_of(name, source, tmp_path, write_folder, stage=other.transformer).train().step == 3


@pytest.mark.parametrize(("name", "maker"), PAIRS)
def test_shards_of_another_tokenizer_than_the_one_at_hand_are_refused(name, maker, tmp_path):
    """Tokenizers, training shards and held-out shards must agree; the message shows both fingerprints and the mend."""
    ours, kind = shards_of(tmp_path / "ours"), KINDS[maker]
    theirs = shards_of(tmp_path / "theirs", **{IN_SHARDS[maker]: "another"})
    common = {"results_folder": tmp_path / "run", **QUICK}
    build, own = TRAINERS[name], KNOWN[name][kind]
    build(transformer=tiny_stages()[name], shards=ours, **makers_of(name), **common)
    with pytest.raises(
        ValueError, match=rf"the {kind} tokens .*ours were made with {own}, the passed Fake\w+ is another; pass the"
    ):
        build(transformer=tiny_stages()[name], shards=ours, **makers_of(name, **{maker: "another"}), **common)
    with pytest.raises(
        ValueError, match=rf"the {kind} tokens .*ours were made with {own}, .*theirs were made with another"
    ):
        build(transformer=tiny_stages()[name], shards=ours, valid_shards=theirs, **common)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "maker"), PAIRS)
def test_a_trained_stage_meets_no_other_tokenizer(name, maker, tmp_path):
    """Wrappers, AudioLM and further training refuse it, showing both fingerprints and the mend."""
    kind = KINDS[maker]
    stages = tiny_stages()
    config = {**stages[name].config, "token_fingerprints": KNOWN[name]}
    stages[name] = trained = type(stages[name]).from_config(config)
    right, wrong = makers_of("coarse"), makers_of("coarse", **{maker: "another"})
    message = (
        rf"the {kind} tokens .*the {name} transformer was trained with {KNOWN[name][kind]}, the passed Fake\w+ is "
        rf"another; pass the .*trained with, or train .*again.*remove '{kind}' from the transformer's"
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
def test_what_is_unknown_is_not_checked(name, tmp_path):
    """Stages of older releases, and shards that say something else of themselves, go with any tokenizer."""
    stage = tiny_stages()[name]
    assert "token_fingerprints" not in stage.config
    save_module(stage, tmp_path / "old")
    WRAPPERS[name](load_module(tmp_path / "old"), **makers_of(name, **dict.fromkeys(MAKERS[name], "another")))
    shards = shards_of(tmp_path / "shards", semantic_tokenizer=None, codec={"name": "mine"}, made="here")
    trainer = TRAINERS[name](transformer=stage, shards=shards, results_folder=tmp_path / "run", **QUICK)
    trainer.train()
    assert stage.token_fingerprints == {} and "token_fingerprints" not in stage.config
    assert read_json(tmp_path / "run" / "finished.json")["run"]["token_fingerprints"] == {}
    told = TRAINERS[name](
        transformer=tiny_stages()[name], shards=shards, results_folder=tmp_path / "told", **makers_of(name), **QUICK
    )
    told.train(stop_after_steps=1)
    assert told.transformer.token_fingerprints == KNOWN[name]


def test_fingerprints_of_what_a_stage_does_not_read_are_refused():
    """A misspelt kind would never be compared with anything."""
    with pytest.raises(ValueError, match="got fingerprints of {'acoustic'}"):
        SemanticTransformer(num_semantic_tokens=12, token_fingerprints={"acoustic": "codec"}, **SIZES)


def conditioner_of(fingerprint=None):
    """A conditioner that says who it is, or one that does not know."""
    conditioner = FakeConditioner()
    if fingerprint is not None:
        conditioner.fingerprint = lambda: fingerprint
    return conditioner


def conditioned_trainer(tmp_path, write_folder, conditioner, stage=None, **changes):
    """A trainer of the semantic stage from waves, conditioned on the codes of a conditioner."""
    stage = tiny_stages(**CONDITION)["semantic"] if stage is None else stage
    parts = {"stage": stage, "audio_conditioner": conditioner, **changes}
    return trainer_of("semantic", "waves", tmp_path, write_folder, **parts)


def test_a_stage_remembers_whose_codes_conditioned_it(tmp_path, write_folder):
    """It is in checkpoint, file and memory; another conditioner is refused wherever they meet, one unknown is not."""
    trainer = conditioned_trainer(tmp_path, write_folder, conditioner_of("A"))
    trainer.train()
    known, finished = {"semantic": "semantic", "conditioner": "A"}, read_json(tmp_path / "run" / "finished.json")["run"]
    trained = load_module(tmp_path / "run" / "semantic")
    assert trained.token_fingerprints == trainer.transformer.token_fingerprints == known
    assert finished["token_fingerprints"] == known
    stages = {f"{name}_transformer": stage for name, stage in tiny_stages(**CONDITION).items()}
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


def test_an_unconditional_stage_remembers_no_conditioner(tmp_path):
    """What a stage does not hear is not asked who it is, nor may a stream be taken for it."""
    stage = tiny_stages()["semantic"]
    SemanticTransformerWrapper(stage, audio_conditioner=conditioner_of("A"))
    assert "conditioner" not in stage.fingerprinted
    with pytest.raises(ValueError, match="got fingerprints of {'conditioner'}"):
        SemanticTransformer(num_semantic_tokens=12, token_fingerprints={"conditioner": "A"}, **SIZES)
    with pytest.raises(ValueError, match="cannot be named 'conditioner'"):
        extra = [Stream("conditioner", 5, rate_hz=10, is_input=True)]
        SemanticTransformer(num_semantic_tokens=12, extra_streams=extra, **SIZES)


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_is_not_continued_on_codes_of_another_conditioner(finished, tmp_path, write_folder):
    """It leaves no trace in the stage that was refused; the run goes on with its own."""
    conditioned_trainer(tmp_path, write_folder, conditioner_of("A")).train(stop_after_steps=None if finished else 2)
    other = conditioned_trainer(tmp_path, write_folder, conditioner_of("B"))
    with pytest.raises(ValueError, match="conditioner: found A, expected B"):
        other.train()
    assert other.transformer.token_fingerprints == {}
    again = conditioned_trainer(tmp_path, write_folder, conditioner_of("A"), other.transformer)
    assert again.train().step == 3 and other.transformer.token_fingerprints["conditioner"] == "A"


def test_fingerprints_are_asked_for_once_a_run(tmp_path, write_folder):
    """A tokenizer hashes all its weights to answer: no step of training does that again."""
    asked = []

    class CountingCodec(FakeCodec):
        def fingerprint(self):
            asked.append(1)
            return "codec"

    folder, counts = write_folder(num_files=4, sample_hz=SAMPLE_HZ), []
    for steps in (1, 6):
        FineTransformerTrainer(
            transformer=tiny_stages()["fine"],
            codec=CountingCodec(),
            folder=folder,
            results_folder=tmp_path / f"run {steps}",
            **{**QUICK, "num_train_steps": steps},
        ).train()
        counts.append(len(asked))
        asked.clear()
    assert 0 < counts[0] == counts[1]
