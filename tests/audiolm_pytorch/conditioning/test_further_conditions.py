"""A condition that the library does not know, added to a stage, its training and its generation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.conditioning.fuser import ConditionSpec
from audiolm_pytorch.data.shards import TokenShards, write_shards
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.stages import SemanticTransformer
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.lm.trainers import SemanticTransformerTrainer
from audiolm_pytorch.lm.training_data import WaveBatch
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.tokens.layout import TokenLayout
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers.decoding import decode, decode_in_windows
from tests.helpers.fakes import (
    CONDITION,
    SAMPLE_HZ,
    SIZES,
    FakeCodec,
    FakeSemanticTokenizer,
    memorise,
    random_conditions,
    tiny_stages,
)

pytestmark = pytest.mark.usefixtures("low_rates")

WAYS = ["prepend", "cross", "sum"]
TEMPI = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5]])  # one vector per clip
RUN = {"batch_size": 4, "num_train_steps": 120, "learning_rate": 1e-2, "validate_every": 60, "log_every": 60}
GREEDY = {"temperature": 0.0, "guidance_scale": 1.5}


def stage_with_tempo(way: str, **changes: object) -> SemanticTransformer:
    torch.manual_seed(0)
    conditions = {"tempo": ConditionSpec(3, way)}
    return SemanticTransformer(num_semantic_tokens=12, eos=False, conditions=conditions, **{**SIZES, **changes})


def generated(stage: SemanticTransformer, tempi: Tensor = TEMPI) -> Tensor:
    """Semantic tokens of an AudioLM with the stage, with guidance."""
    stages = tiny_stages()
    audio_lm = AudioLM(
        wav2vec=FakeSemanticTokenizer(),
        codec=FakeCodec(),
        semantic_transformer=stage,
        coarse_transformer=stages["coarse"],
        fine_transformer=stages["fine"],
        sampling={"semantic": GREEDY},
    )
    return audio_lm.generate(GenerationRequest(conditions={"tempo": tempi}, seconds=0.4, seeds=0)).semantic


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_tempo_is_learned_from_shards(way: str, tmp_path: Path) -> None:
    """Tempo A generates tokens A and tempo B tokens B, in any order, with guidance."""
    tokens = np.random.default_rng(0).integers(0, 12, (2, 10))
    write_shards(tmp_path / "shards", lambda i: {"semantic": tokens[i], "tempo": TEMPI[i : i + 1].numpy()}, 2, {})
    stage = stage_with_tempo(way)
    SemanticTransformerTrainer(
        transformer=stage, shards=TokenShards(tmp_path / "shards"), results_folder=tmp_path / "run", **RUN
    ).train()
    loaded = load_module(tmp_path / "run" / "semantic")
    for model, order in ((stage, [0, 1]), (stage, [1, 0, 1]), (loaded, [1, 0])):
        assert torch.equal(generated(model, TEMPI[order]), torch.from_numpy(tokens)[order])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_tempo_is_learned_from_files_through_a_conditioner(way: str, tmp_path: Path) -> None:
    """The conditioner receives waves, captions and labels of the batch, and its tempo decides the tokens."""
    for index in range(2):
        write_audio(tmp_path / f"{index}.wav", torch.full((320,), 0.2 + 0.5 * index), SAMPLE_HZ)
    rows = [{"audio": f"{index}.wav", "caption": f"clip {index}", "tempo": TEMPI[index].tolist()} for index in range(2)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches: list[WaveBatch] = []

    class TempoOfLabels:
        sample_hz = 400

        def __call__(self, batch: WaveBatch) -> Tensor:
            batches.append(batch)
            return torch.tensor([label["tempo"] for label in batch.labels])

    stage = stage_with_tempo(way)
    SemanticTransformerTrainer(
        transformer=stage,
        wav2vec=FakeSemanticTokenizer(),
        folder=tmp_path,
        conditioners={"tempo": TempoOfLabels()},
        results_folder=tmp_path / "run",
        **RUN,
    ).train()
    assert batches[0].crops.waves[400].shape == (4, 160) and set(batches[0].captions) == {"clip 0", "clip 1"}
    tokens = generated(stage)
    assert tokens.tolist() == [[2] * 10, [8] * 10]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pattern", ["delayed", "parallel"])
def test_cached_decoding_with_guidance_equals_a_loop_without_cache(way: str, pattern: str) -> None:
    """With two further conditions beside codes and texts, and one embedding per frame for a sum."""
    torch.manual_seed(1)
    layout = TokenLayout([Stream("s", 10, 1, 25, is_input=True), Stream("a", 20, 2, 50)], pattern)
    conditions = {"tempo": ConditionSpec(3, way), "loudness": {"dim": 2, "way": way, "null": "zero"}}
    model = TokenTransformer(layout=layout, **SIZES, cond_dim=8, text_dim=6, conditions=conditions).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    for weight in model.heads.parameters():
        weight.data.mul_(10)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    passed = {
        **random_conditions(2),
        "text": ConditionTensor(torch.randn(2, 4, 6), mask),
        "tempo": ConditionTensor(torch.randn(2, 4, 3), mask),
        "loudness": ConditionTensor.of(torch.randn(2, 2)),
    }
    inputs = {"s": torch.randint(0, 10, (2, 3, 1)), "a": torch.randint(0, 20, (2, 2, 2))}
    lengths = {"s": 3, "a": torch.tensor([2, 0])}
    settings = SamplingSettings(temperature=0, guidance_scale=2.0)
    result = decode(model, inputs, {"a": 6}, lengths=lengths, conditioning=passed, settings=settings).streams["a"]
    grid = layout.grid(inputs, {"a": 6}, 2, lengths)
    ids, is_token = grid.packed.ids, grid.packed.input_mask
    nothing = {name: part.without_items(torch.tensor([True, True])) for name, part in passed.items()}
    both = [model.fuse(conditions, 2) for conditions in (passed, nothing)]
    with torch.inference_mode():
        for row in range(1, ids.shape[1]):
            hidden = [model.hidden(ids[:, :row], is_token[:, :row], one)[:, -1] for one in both]
            for item, column in grid.packed.loss_mask[:, row].nonzero().tolist():
                head = int(grid.head[item, row, column])
                with_all, null = (model.logits(states[item], head) for states in hidden)
                ids[item, row, column] = layout.heads[head].first_id + (null + 2 * (with_all - null)).argmax()
    assert torch.equal(result, layout.unpack(ids, grid.num_frames)["a"])


@pytest.mark.slow
def test_a_condition_per_frame_is_followed_in_windows_and_from_cropped_shards(tmp_path: Path) -> None:
    """One embedding per frame decides the token of its frame, also in crops and in later windows."""
    tokens = np.random.default_rng(0).integers(0, 12, (8, 40))
    table = np.random.default_rng(1).standard_normal((12, 3)).astype(np.float32)
    write_shards(tmp_path / "shards", lambda i: {"semantic": tokens[i], "tempo": table[tokens[i]]}, 8, {})
    stage = stage_with_tempo("sum", cond_drop_prob=0.0)
    SemanticTransformerTrainer(
        transformer=stage,
        shards=TokenShards(tmp_path / "shards"),
        data_max_length_seconds=0.4,
        results_folder=tmp_path / "run",
        **{**RUN, "num_train_steps": 250},
    ).train()
    wanted = torch.from_numpy(np.random.default_rng(2).integers(0, 12, (2, 33)))
    passed = {"tempo": ConditionTensor.of(torch.from_numpy(table)[wanted])}
    decoded = decode_in_windows(
        stage, {}, 33, batch_size=2, window_frames=10, conditioning=passed, settings=SamplingSettings(temperature=0)
    )
    assert torch.equal(decoded.streams["semantic"][..., 0], wanted)
    coarse = tiny_stages(conditions={"tempo": ConditionSpec(3, "sum")}, pattern="flat")["coarse"]
    with pytest.raises(ValueError, match="one embedding per frame needs a layout with one row per frame"):
        coarse.fuse(passed, 2)


def test_conditions_are_dropped_by_item_and_where_asked_for_by_name() -> None:
    """`cond_drop_prob` drops all conditions of an item together, `drop_prob` one condition alone."""
    stage = stage_with_tempo("prepend", **CONDITION, cond_drop_prob=0.5)
    stage.fuser.specs["tempo"] = ConditionSpec(3, drop_prob=0.5)
    received = []
    stage.fuser.register_forward_pre_hook(lambda _, arguments: received.append(arguments[0]))
    packed = stage.layout.pack({"semantic": torch.randint(0, 12, (200, 4, 1))})
    stage.train()(packed, {**random_conditions(1), "tempo": ConditionTensor.of(TEMPI[:1])})
    has_codes, has_tempo = (received[0][name].mask.any(dim=1) for name in ("codes", "tempo"))
    assert not (has_tempo & ~has_codes).any()
    assert 60 < int(has_codes.sum()) < 140 and 25 < int(has_tempo.sum()) < 80


def test_a_zero_null_is_no_parameter_and_specs_are_saved(tmp_path: Path) -> None:
    """Without a condition, a sum with a zero null adds nothing; a loaded stage has the same conditions."""
    stage = tiny_stages(conditions={"tempo": ConditionSpec(3, "sum", "zero", drop_prob=0.1)})["semantic"].eval()
    assert not stage.fuse(None, 2).row_sums.any()
    assert [name for name in stage.state_dict() if "tempo" in name] == [
        "fuser.entries.tempo.projection.weight",
        "fuser.entries.tempo.norm.weight",
    ]
    save_module(stage, tmp_path)
    assert load_module(tmp_path).fuser.specs == stage.fuser.specs
    assert "conditions" not in tiny_stages()["semantic"].config


@pytest.mark.slow
def test_a_memorised_condition_is_needed() -> None:
    """Fault 2: if dropped conditions were not removed, an unconditional item would have the conditional loss."""
    stage = stage_with_tempo("sum")
    packed = stage.layout.pack({"semantic": torch.randint(0, 12, (2, 10, 1))})
    conditions = {"tempo": ConditionTensor.of(TEMPI)}
    stage.cond_drop_prob = 0.0
    memorise(stage, packed, conditions)
    dropped = {"tempo": conditions["tempo"].without_items(torch.tensor([True, True]))}
    stage.cond_drop_prob = 1.0
    torch.testing.assert_close(stage.train()(packed, conditions).loss, stage(packed, dropped).loss)
    assert stage(packed, conditions).loss > 10 * stage.eval()(packed, conditions).loss


def test_wrong_conditions_raise_errors(tmp_path: Path) -> None:
    """The message names the condition and what to do."""
    with pytest.raises(ValueError, match="codes and text are set by cond_dim and text_dim"):
        tiny_stages(conditions={"text": ConditionSpec(3)})
    with pytest.raises(ValueError, match=r"cannot be named \['semantic'\]"):
        tiny_stages(conditions={"semantic": ConditionSpec(3)})
    with pytest.raises(ValueError, match="needs dim >= 1"):
        ConditionSpec(0)
    stage = stage_with_tempo("sum")
    with pytest.raises(ValueError, match=r"got the conditions \['tempo'\], the stages accept \[\]"):
        generated(tiny_stages()["semantic"])
    with pytest.raises(ValueError, match="tempo conditions of width 3, got width 2"):
        generated(stage, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"does not accept key conditions; build the model with conditions="):
        stage.fuse({"key": ConditionTensor.of(TEMPI)}, 2)
    write_audio(tmp_path / "a.wav", torch.zeros(800), SAMPLE_HZ)
    common = {"transformer": stage, "wav2vec": FakeSemanticTokenizer(), "results_folder": tmp_path / "run", **RUN}
    with pytest.raises(ValueError, match=r"conditions \['tempo'\], but got conditioners of \['key'\]"):
        SemanticTransformerTrainer(folder=tmp_path, conditioners={"key": len}, **common)
    write_shards(tmp_path / "shards", lambda i: {"semantic": np.arange(10)}, 2, {})
    shards = TokenShards(tmp_path / "shards")
    with pytest.raises(ValueError, match="store the condition embeddings in the shards"):
        SemanticTransformerTrainer(shards=shards, conditioners={"tempo": len}, **common)


@pytest.mark.parametrize("way", ["sum", "cross"])
def test_a_stage_is_trained_on_without_a_condition_that_the_data_lack(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning names the condition."""
    stage = stage_with_tempo(way)
    write_shards(tmp_path / "shards", lambda i: {"semantic": np.arange(10)}, 2, {})
    write_audio(tmp_path / "a.wav", torch.zeros(800), SAMPLE_HZ)
    common = {"transformer": stage, "wav2vec": FakeSemanticTokenizer(), **RUN, "num_train_steps": 3}
    for number, data in enumerate(({"shards": TokenShards(tmp_path / "shards")}, {"folder": tmp_path})):
        caplog.clear()
        trainer = SemanticTransformerTrainer(results_folder=tmp_path / f"run{number}", **data, **common)
        assert "the data lack ['tempo']; the semantic transformer is trained without" in caplog.text
        trainer.train()
        assert trainer.loop.is_finished
