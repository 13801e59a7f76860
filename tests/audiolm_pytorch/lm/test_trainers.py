"""Trainers of stages: aligned crops, tokenizing, the table of the conditioner, resuming, results."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from audiolm_pytorch.data import TokenShards, write_shards
from audiolm_pytorch.data.captions import encode_texts
from audiolm_pytorch.generation.wrappers import CoarseTransformerWrapper
from audiolm_pytorch.lm.task import StageObjective, StageTask, _drop_levels
from audiolm_pytorch.lm.trainers import CoarseTransformerTrainer, FineTransformerTrainer, SemanticTransformerTrainer
from audiolm_pytorch.lm.training_data import ShardSource
from audiolm_pytorch.saving.files import read_weights
from audiolm_pytorch.saving.modules import load_module
from tests.helpers.fakes import (
    CONDITION,
    SAMPLE_HZ,
    FakeCodec,
    FakeConditioner,
    FakeSemanticTokenizer,
    FakeTextConditioner,
    random_conditions,
    tiny_stages,
)

pytestmark = pytest.mark.usefixtures("low_rates")

TRAINERS = {
    "semantic": SemanticTransformerTrainer,
    "coarse": CoarseTransformerTrainer,
    "fine": FineTransformerTrainer,
}
QUICK = {
    "num_train_steps": 4,
    "batch_size": 2,
    "warmup_steps": 0,
    "data_max_length_seconds": 0.4,
    "learning_rate": 1e-2,
}


def make_shards(folder, num_records=4, seconds=2.0):
    """Records whose tokens are their time: semantic token t is t mod 12, acoustic frame f is f mod 16."""

    def make_record(index):
        frames = int(seconds * 50) + 10 * index
        return {
            "semantic": np.arange(frames // 2) % 12,
            "acoustic": np.repeat(np.arange(frames)[:, None] % 16, 4, axis=1),
            "latents": np.full((3, 8), [[0.1], [0.2], [0.3]], dtype=np.float32),
            "duration_seconds": np.float32(frames / 50),
        }

    write_shards(folder, make_record, num_records, {"made": "here"})
    return TokenShards(folder)


def tokenizers_of(name):
    """The tokenizers of a stage."""
    parts = {"wav2vec": FakeSemanticTokenizer(), "codec": FakeCodec()}
    needed = {"semantic": ["wav2vec"], "coarse": ["wav2vec", "codec"], "fine": ["codec"]}[name]
    return {part: parts[part] for part in needed}


@pytest.mark.parametrize("name", TRAINERS)
def test_trains_from_a_folder_of_audio(name, tmp_path, write_folder):
    """Training from waves saves the stage; one task serves all stages (fault 8); only its own table is trained."""
    conditioner = FakeConditioner()
    before = {key: table.weight.clone() for key, table in conditioner.tables.items()}
    stage = tiny_stages(**CONDITION)[name]
    trainer = TRAINERS[name](
        transformer=stage,
        **tokenizers_of(name),
        audio_conditioner=conditioner,
        folder=write_folder(num_files=4, sample_hz=SAMPLE_HZ),
        results_folder=tmp_path / "run",
        **{**QUICK, "data_max_length_seconds": None, "data_max_length": 320},
    )
    assert type(trainer.task) is StageTask
    result = trainer.train()
    assert result.step == 4 and math.isfinite(result.metrics["valid.loss"])
    loaded = load_module(tmp_path / "run" / name, expect=type(stage))
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), stage.state_dict().values()))
    assert loaded.max_seconds == pytest.approx(0.4)
    assert set(conditioner.asked) == {name}
    changed = {key for key, table in conditioner.tables.items() if not torch.equal(table.weight, before[key])}
    assert changed == {name}
    saved = read_weights(tmp_path / "run" / "conditioning_table.safetensors")[0]
    assert torch.equal(saved["weight"], conditioner.tables[name].weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_learns_from_shards_and_reports_chance(name, tmp_path):
    """A stage learns predictable tokens: the held-out loss is far below the chance level in the metrics."""
    shards = make_shards(tmp_path / "shards")
    trainer = TRAINERS[name](
        transformer=tiny_stages(**CONDITION)[name],
        audio_conditioner=FakeConditioner(),
        shards=shards,
        results_folder=tmp_path / "run",
        objective=StageObjective(level_drop_prob=0.5),
        **{**QUICK, "num_train_steps": 60, "batch_size": 4},
    )
    metrics = trainer.train().metrics
    chance = trainer.task.chance["loss"]
    assert chance == pytest.approx(math.log(12 if name == "semantic" else 16))
    assert metrics["valid.loss"] < 0.4 * chance and metrics["valid.accuracy"] > 0.6
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(chance, rel=0.1) and rows[0][f"loss_{name}"] > 0


@pytest.mark.parametrize("name", TRAINERS)
def test_shard_crops_cover_the_same_time_in_every_stream(name, tmp_path):
    """Crops are aligned, have the requested length, and are a pure function of epoch and index."""
    stage = tiny_stages(**CONDITION)[name]
    shards = make_shards(tmp_path)
    source = ShardSource(shards, stage, seconds=0.5, audio_conditioner=FakeConditioner(), seed=3)
    batch = source.batch([(epoch, 1) for epoch in range(40)])
    ends = []
    for item in range(40):
        frames = {kind: int(count[item]) for kind, count in batch.lengths.items()}
        if name == "coarse":
            assert frames == {"semantic": 12, "acoustic": 24}
            semantic, acoustic = batch.tokens["semantic"][item], batch.tokens["acoustic"][item, :, 0]
            start = next(
                s for s in range(0, 110) if s % 16 == acoustic[0] and s // 2 % 12 == semantic[0] and s % 2 == 0
            )
            assert torch.equal(acoustic, torch.arange(start, start + 24) % 16)
            assert torch.equal(semantic, torch.arange(start // 2, start // 2 + 12) % 12)
        else:
            assert frames == ({"semantic": 12} if name == "semantic" else {"acoustic": 25})
        ends.append(bool(batch.ends[item]))
    kind = stage.kinds[0]
    assert len({tuple(tokens.flatten().tolist()) for tokens in batch.tokens[kind]}) > 5
    again = source.batch([(7, 1)])
    assert torch.equal(again.tokens[kind][0], batch.tokens[kind][7])
    assert any(ends) and not all(ends)
    assert {round(float(latent[0]), 1) for latent in batch.latents} == {0.1, 0.2, 0.3}


def test_short_records_are_not_cropped(tmp_path):
    """A record shorter than the crop is complete, has its end, and its padding is not in the loss."""
    stage = tiny_stages()["coarse"]
    source = ShardSource(make_shards(tmp_path), stage, seconds=2.4, audio_conditioner=None)
    batch = source.batch([(0, 0), (0, 3)])
    assert batch.lengths["acoustic"].tolist() == [100, 120] and batch.lengths["semantic"].tolist() == [50, 60]
    assert batch.ends[0]
    packed = stage.packed(source.read(batch).tokens)
    assert packed.loss_mask[0].sum() == 200 and packed.loss_mask[1].sum() == 240


def test_tokens_of_waves_equal_those_of_shards(tmp_path, write_folder):
    """The same recordings have the same loss from waves and from shards."""
    folder = write_folder(num_files=3, sample_hz=SAMPLE_HZ)
    codec, wav2vec, stage = FakeCodec(), FakeSemanticTokenizer(), tiny_stages()["coarse"].eval()
    common = {"transformer": stage, "results_folder": tmp_path / "run", "num_train_steps": 1, "batch_size": 3}
    from_waves = CoarseTransformerTrainer(codec=codec, wav2vec=wav2vec, folder=folder, **common).task
    crops = from_waves.train.crops

    def make_record(index):
        wave = crops.get(0, index).waves[SAMPLE_HZ][None]
        return {"semantic": wav2vec(wave)[0].numpy(), "acoustic": codec.tokenize(wave)[0].numpy()}

    write_shards(tmp_path / "shards", make_record, len(crops), {})
    from_shards = CoarseTransformerTrainer(shards=TokenShards(tmp_path / "shards"), **common).task
    indices = [(0, index) for index in range(len(crops))]
    losses = [task.loss(task.batch(indices), 0).loss.item() for task in (from_waves, from_shards)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_resumed_run_equals_an_unbroken_one(tmp_path):
    """Stopping and resuming a run changes no bit of its weights."""
    results = []
    for stops in ([None], [2, None]):
        for stop in stops:
            torch.manual_seed(5)
            conditioner = FakeConditioner()
            trainer = SemanticTransformerTrainer(
                transformer=tiny_stages(**CONDITION, cond_drop_prob=0.3)["semantic"],
                audio_conditioner=conditioner,
                shards=make_shards(tmp_path / "shards"),
                results_folder=tmp_path / f"run{len(stops)}",
                objective=StageObjective(level_drop_prob=0.5),
                **QUICK,
            )
            trainer.train(stop_after_steps=stop)
        results.append(trainer.task.module.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_only_trailing_levels_are_dropped():
    """The first level is never dropped, and probability 0 drops nothing."""
    conditioning = random_conditions(200, levels=4)["codes"]
    masks = _drop_levels(conditioning, 1.0).mask.int()
    assert set(masks.sum(1).tolist()) == {1, 2, 3}
    assert (masks.diff(dim=1) <= 0).all() and masks[:, 0].all()
    assert _drop_levels(conditioning, 0.0).mask.all()
    assert _drop_levels(random_conditions(5, levels=1)["codes"], 1.0).mask.all()


def test_incompatible_arguments_raise_errors(tmp_path):
    """Wrong vocabularies, wrong rates, missing parts and several sources of data raise errors before training."""
    stages, shards = tiny_stages(), make_shards(tmp_path / "shards")
    common = {"num_train_steps": 1, "batch_size": 1, "results_folder": tmp_path / "run"}
    with pytest.raises(ValueError, match="pass both or neither"):
        SemanticTransformerTrainer(transformer=tiny_stages(**CONDITION)["semantic"], shards=shards, **common)
    with pytest.raises(ValueError, match="pass only one of folder, items and shards"):
        SemanticTransformerTrainer(transformer=stages["semantic"], shards=shards, folder=tmp_path, **common)
    with pytest.raises(ValueError, match="data_max_length_seconds, not both"):
        SemanticTransformerTrainer(
            transformer=stages["semantic"], shards=shards, data_max_length=9, data_max_length_seconds=1.0, **common
        )
    other = FakeSemanticTokenizer()
    other.codebook_size = 13
    with pytest.raises(ValueError, match="12 tokens, its tokenizer has 13"):
        SemanticTransformerTrainer(transformer=stages["semantic"], wav2vec=other, shards=shards, **common)
    other = FakeSemanticTokenizer()
    other.downsample_factor = 16
    with pytest.raises(ValueError, match="frames per second"):
        CoarseTransformerTrainer(
            transformer=stages["coarse"], wav2vec=other, codec=FakeCodec(), shards=shards, **common
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", TRAINERS)
def test_files_too_short_for_a_token_are_left_out(name, tmp_path, write_folder, write_tone, caplog):
    """A very short file is logged and does not stop the training."""
    folder = write_folder(num_files=3, sample_hz=SAMPLE_HZ)
    write_tone("corpus/sliver.wav", seconds=0.01, sample_hz=SAMPLE_HZ)
    trainer = TRAINERS[name](
        transformer=tiny_stages()[name], **tokenizers_of(name), folder=folder, results_folder=tmp_path / "run", **QUICK
    )
    assert "sliver.wav (too short" in caplog.text
    assert trainer.train().step == 4


@pytest.mark.parametrize("seconds", [0.4, 30.0, None])
def test_max_seconds_is_the_longest_crop(seconds, tmp_path, write_folder):
    """Recordings may be shorter than the crop; positions after them are not trained."""
    common = {**QUICK, "data_max_length_seconds": seconds, "results_folder": tmp_path / "run"}
    shards = make_shards(tmp_path / "shards")  # the longest of four lasts 2.6 s
    for name in TRAINERS:
        stage = tiny_stages()[name]
        TRAINERS[name](transformer=stage, shards=shards, **common)
        assert stage.max_seconds == pytest.approx(min(seconds or 99, 2.6))
    stage = tiny_stages()["fine"]
    FineTransformerTrainer(transformer=stage, codec=FakeCodec(), folder=write_folder(sample_hz=SAMPLE_HZ), **common)
    assert stage.max_seconds == pytest.approx(min(seconds or 99, 1.0))


@pytest.mark.parametrize("crop_seconds", [3.0, 20.0])
def test_latents_belong_to_the_window_of_the_crop(tmp_path, crop_seconds):
    """With windows of 10 s, a shorter crop has a window that covers it, and a longer crop has one inside it."""

    def make_record(index):
        return {
            "semantic": np.arange(60 * 25) % 12,
            "acoustic": np.repeat(np.arange(60 * 50)[:, None] % 16, 4, axis=1),
            "latents": np.arange(51, dtype=np.float32)[:, None],
            "duration_seconds": np.float32(60),
        }

    write_shards(tmp_path, make_record, 1, {})
    source = ShardSource(
        TokenShards(tmp_path), tiny_stages()["semantic"], seconds=crop_seconds, audio_conditioner=FakeConditioner()
    )
    spans = []
    for epoch in range(200):
        draws = np.random.default_rng([0, epoch, 0])
        start = int(draws.integers(int((60 - crop_seconds) * 25) + 1)) / 25
        window = float(source.batch([(epoch, 0)]).latents[0, 0])
        inner, outer = sorted(
            [(start, start + crop_seconds), (window, window + 10)], key=lambda span: span[1] - span[0]
        )
        assert outer[0] - 0.5 <= inner[0] and inner[1] <= outer[1] + 0.5, (start, window)
        spans.append(start)
    assert min(spans) < 3 and max(spans) > 57 - crop_seconds


def _run_of(tmp_path, *, stage=None, **changes):
    """A trainer in one folder with changed arguments."""
    settings = {**QUICK, "objective": StageObjective(level_drop_prob=0.5), **changes}
    return SemanticTransformerTrainer(
        transformer=tiny_stages(**{**CONDITION, **(stage or {})})["semantic"],
        audio_conditioner=FakeConditioner(),
        shards=make_shards(tmp_path / "shards"),
        results_folder=tmp_path / "run",
        **settings,
    )


OTHER_RUNS = [
    ({"objective": StageObjective()}, r"level_drop_prob: found 0.5, expected 0.0"),
    ({"data_max_length_seconds": 0.8}, r"crop_seconds: found 0.4, expected 0.8"),
    ({"data_max_length_seconds": None}, r"crop_seconds: found 0.4, expected None"),
    ({"stage": {"cond_drop_prob": 0.3}}, r"transformer.cond_drop_prob: found 0.1, expected 0.3"),
    ({"stage": {"dropout": 0.2}}, r"transformer.dropout: found 0.0, expected 0.2"),
    ({"stage": {"forget_prob": 0.2}}, r"transformer.forget_prob: found nothing, expected 0.2"),
]


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_is_not_resumed_with_another_config(finished, tmp_path):
    """Other crops, dropped levels or stage sizes raise an error; options that only save memory may change."""
    _run_of(tmp_path).train(None if finished else 2)
    for changes, message in OTHER_RUNS:
        with pytest.raises(ValueError, match=message):
            _run_of(tmp_path, **changes).train()
    assert _run_of(tmp_path, stage={"checkpoint_blocks": True}).train().step == 4


@pytest.mark.slow
def test_shards_of_other_rates_raise_errors(tmp_path):
    """The error has the seconds of each kind of token; a few lost frames are allowed."""
    for folder, rate_hz, lost in (("double", 50, 0), ("hubert", 25, 2)):

        def make_record(index, rate_hz=rate_hz, lost=lost):
            frames = {"semantic": np.arange(2 * rate_hz - lost) % 12}
            return {**frames, "acoustic": np.repeat(np.arange(100)[:, None] % 16, 4, axis=1)}

        write_shards(tmp_path / folder, make_record, 2, {})
    for pattern in ("flat", "delayed", "parallel"):
        stage = tiny_stages()["coarse"]
        stage = type(stage)(**{**stage.config, "pattern": pattern})
        source = ShardSource(TokenShards(tmp_path / "double"), stage, seconds=0.5, audio_conditioner=None)
        with pytest.raises(ValueError, match=r"durations \{'semantic': 4.0, 'acoustic': 2.0\} .*; build the stage"):
            source.batch([(0, 0)])
        source = ShardSource(TokenShards(tmp_path / "hubert"), stage, seconds=None, audio_conditioner=None)
        assert source.batch([(0, 1)]).lengths["acoustic"].tolist() == [96]


WEIGHT_FILES = ("checkpoint/model.safetensors", "coarse/model.safetensors")
TEXTS = ["aaa", "cc", "b", "dddd"]
FRESH_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tests.audiolm_pytorch.lm.test_trainers import loaded_draws
print(json.dumps([loaded_draws(folder) for folder in sys.argv[2:]]))
"""


def conditioned_trainer(folder, ema_decay):
    """A trainer of a small coarse stage with both kinds of conditions."""

    def make_record(index):
        frames = np.arange(20)
        return {
            "semantic": (frames[:10] * (index + 1)) % 12,
            "acoustic": np.stack([(frames * (index + 2) + level) % 16 for level in range(4)], axis=1),
            "latents": np.full((1, 1), 0.1 * (index + 1), dtype=np.float32),
            "captions": encode_texts([TEXTS[index]]),
        }

    shards = folder.with_name(f"shards of {folder.name}")
    write_shards(shards, make_record, 4, {})
    torch.manual_seed(1)
    return CoarseTransformerTrainer(
        transformer=tiny_stages(**CONDITION, text_dim=6, dropout=0.1)["coarse"],
        audio_conditioner=FakeConditioner(),
        text_conditioner=FakeTextConditioner(),
        shards=TokenShards(shards),
        results_folder=folder,
        objective=StageObjective(level_drop_prob=0.3),
        ema_decay=ema_decay,
        **{**QUICK, "batch_size": 4, "num_train_steps": 30, "data_max_length_seconds": None},
    )


def draws(stage, conditioner):
    """Generated tokens with and without conditions, at temperature 1."""
    wrapper = CoarseTransformerWrapper(stage, audio_conditioner=conditioner, text_conditioner=FakeTextConditioner())
    semantic = {"semantic": torch.arange(40).view(4, 10) % 12}
    conditions = wrapper.condition(text=TEXTS, codes=torch.tensor([[1, 2, 3]]))
    return [
        wrapper.generate(20, streams=semantic, batch_size=4, conditioning=one, seeds=[5, 6, 7, 8])
        .streams["coarse"]
        .tolist()
        for one in (conditions, None)
    ]


def loaded_draws(folder):
    """Generated tokens of the saved stage and table."""
    conditioner = FakeConditioner()
    table = read_weights(Path(folder) / "conditioning_table.safetensors")[0]
    conditioner.table("coarse").load_state_dict(table)
    return draws(load_module(Path(folder) / "coarse"), conditioner)


@pytest.mark.slow
def test_generation_after_training_equals_that_of_a_new_process(tmp_path):
    """Tokens are equal with and without conditions and EMA, so no restart is needed."""
    folders, found = [], []
    for ema_decay in (None, 0.9):
        folders.append(str(tmp_path / f"ema {ema_decay}"))
        trainer = conditioned_trainer(Path(folders[-1]), ema_decay)
        trainer.train()
        found.append(draws(trainer.transformer, trainer.conditioner))
        weights = {part: read_weights(tmp_path / folders[-1] / part)[0] for part in WEIGHT_FILES}
        chosen = weights["checkpoint/model.safetensors"]
        if ema_decay is not None:
            chosen |= read_weights(tmp_path / folders[-1] / "checkpoint" / "ema.safetensors")[0]
        own = {f"transformer.{name}": weight for name, weight in weights["coarse/model.safetensors"].items()}
        assert all(torch.equal(weight, chosen[name]) for name, weight in own.items())
    assert found[0] != found[1] and found[0][0] != found[0][1]
    command = [sys.executable, "-c", FRESH_PROCESS, str(Path(__file__).parents[3]), *folders]
    fresh = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    assert json.loads(fresh) == found


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_generation_between_steps_changes_nothing(ema_decay, tmp_path):
    """Generation during a training does not change the training, and has no dropout."""
    straight = conditioned_trainer(tmp_path / "straight", ema_decay)
    straight.train()
    paused = conditioned_trainer(tmp_path / "paused", ema_decay)
    paused.train(stop_after_steps=10)
    assert draws(paused.transformer, paused.conditioner) == draws(paused.transformer, paused.conditioner)
    paused.train()
    expected, found = straight.task.module.state_dict(), paused.task.module.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_wrong_arguments_raise_errors(tmp_path, write_folder):
    """Crops shorter than a token, and dropped levels of a stage without codes."""
    folder = write_folder(num_files=4, sample_hz=SAMPLE_HZ)
    common = {**QUICK, "results_folder": tmp_path / "run"}
    for wrong, message in [
        ({"data_max_length_seconds": 0.03}, "crops of 0.03 s, but a token lasts 0.04 s"),
        (
            {"objective": StageObjective(level_drop_prob=0.5)},
            "level_drop_prob=0.5 for a stage without conditioning codes",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            SemanticTransformerTrainer(
                transformer=tiny_stages()["semantic"],
                wav2vec=FakeSemanticTokenizer(),
                folder=folder,
                **{**common, **wrong},
            )
    assert not (tmp_path / "run").exists()
