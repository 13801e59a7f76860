"""Captions in the training of stages: their codes mixed into those of audio, and states of a text encoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from audiolm_pytorch.conditioning.tensors import Conditions
from audiolm_pytorch.data import TokenShards, write_shards
from audiolm_pytorch.data.captions import decode_texts, encode_texts
from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.generation.wrappers import SemanticTransformerWrapper
from audiolm_pytorch.lm.stages import SemanticTransformer
from audiolm_pytorch.lm.trainers import SemanticTransformerTrainer
from audiolm_pytorch.lm.training_data import ShardSource, WaveSource
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers.fakes import (
    CONDITION,
    SAMPLE_HZ,
    SIZES,
    FakeCodec,
    FakeConditioner,
    FakeSemanticTokenizer,
    FakeTextConditioner,
    tiny_stages,
)

DRAWS = [(epoch, index) for epoch in range(50) for index in range(4)]
HEARS = {"text_dim": 6}
RUN = {"batch_size": 2, "num_train_steps": 2, "warmup_steps": 0}


class TellingConditioner(FakeConditioner):
    """Codes of audio begin with a 1, those of texts with a 2 and tell the length of the text."""

    def codes(self, *, texts: list[str] | None = None, wavs: Tensor | None = None, lengths=None) -> Tensor:
        if texts is None:
            return torch.tensor([[1, 0, 0]] * len(wavs))
        return torch.tensor([[2, 0, len(text) % 10] for text in texts])

    def codes_from_latents(self, latents: Tensor, modality: str = "audio") -> Tensor:
        kind = 1 if modality == "audio" else 2
        return torch.stack([torch.full((len(latents),), kind), *latents.long().T[:2]], dim=1)


def caption_of(record: int, number: int) -> str:
    """A text whose length and whose letters tell whose it is."""
    return chr(ord("a") + number) * (record + 1)


def write_captions(folder: Path) -> Path:
    """A manifest of four files, of which number i has i captions, one of them in `caption`."""
    captions = [[caption_of(index, number) for number in range(index)] for index in range(4)]
    lines = [
        {"audio": f"{index:03d}.wav", "caption": (said or [None])[0], "captions": said[1:]}
        for index, said in enumerate(captions)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    """Four records; number i has i captions, caption j of record i has the latent (i, j)."""

    def make_record(index: int) -> dict[str, np.ndarray]:
        return {
            "semantic": np.arange(50) % 12,
            "latents": np.full((1, 2), 9, dtype=np.float32),
            "text_latents": np.array([[index, j] for j in range(index)], dtype=np.float32).reshape(index, 2),
            "captions": encode_texts([caption_of(index, j) for j in range(index)]),
        }

    write_shards(tmp_path / "shards", make_record, 4, {})
    return TokenShards(tmp_path / "shards")


def _source(shards: TokenShards, **arguments: float) -> ShardSource:
    stage = tiny_stages(**CONDITION)["semantic"]
    return ShardSource(shards, stage, seconds=1.0, audio_conditioner=TellingConditioner(), **arguments)


def test_captions_stand_in_for_their_recording(shards: TokenShards) -> None:
    """With the probability asked for, own captions only, in turns; a record without captions hears itself."""
    source = _source(shards, text_prob=0.5)
    codes = source.read(source.batch(DRAWS)).condition["codes"].view(50, 4, 3)
    assert (codes[:, 0, 0] == 1).all()
    share = float((codes[:, 1:, 0] == 2).double().mean())
    assert 0.4 < share < 0.6
    for epoch, index in ((epoch, index) for epoch in range(50) for index in (1, 2, 3)):
        kind, *latent = codes[epoch, index].tolist()
        assert latent == ([index, epoch % index] if kind == 2 else [9, 9])


def test_the_draw_is_a_pure_function_and_leaves_crops_alone(shards: TokenShards) -> None:
    """The same numbers give the same batch; the tokens are those without captions; no probability, no captions."""
    once, again, none = (_source(shards, text_prob=p).batch(DRAWS) for p in (0.5, 0.5, 0.0))
    assert torch.equal(once.is_text, again.is_text) and torch.equal(once.latents, again.latents)
    assert torch.equal(once.tokens["semantic"], none.tokens["semantic"])
    assert not none.is_text.any() and _source(shards, text_prob=1).batch(DRAWS).is_text.sum() == 150


def wave_source(folder: Path, **arguments: object) -> WaveSource:
    """Crops of files for a stage that hears captions as codes and as states."""
    stage = tiny_stages(**CONDITION, **HEARS)["semantic"]
    made = {"wav2vec": FakeSemanticTokenizer(), "codec": None, "audio_conditioner": TellingConditioner()}
    return WaveSource(load_items(folder).items, stage, seconds=0.4, **{**made, **arguments})


def test_captions_of_files_stand_in_too(tmp_path: Path, write_folder) -> None:
    """Training from waves does the same with the captions of a manifest, all of them, in turns."""
    folder = write_captions(write_folder(num_files=4, sample_hz=SAMPLE_HZ))
    source = wave_source(folder, text_prob=0.5)
    batch = source.batch(DRAWS)
    given = source.read(batch)
    codes = given.condition["codes"].view(50, 4, 3)
    assert (codes[:, 0] == torch.tensor([1, 0, 0])).all()
    for index in (1, 2, 3):
        said = codes[:, index, 0] == 2
        assert 0.3 < said.double().mean() < 0.7 and (codes[said, index, 2] == index + 1).all()
    expected = [caption_of(index, epoch % index) if index else None for epoch, index in DRAWS]
    assert given.texts == expected
    # one draw: codes are those of the very caption whose states are heard
    asked: list[str] = []
    source.conditioner.codes = lambda texts=None, wavs=None, lengths=None: (
        asked.extend(texts or []) or torch.zeros(len(wavs if texts is None else texts), 3, dtype=torch.long)
    )
    source.read(batch)
    assert asked == [expected[number] for number in batch.captioned.tolist()]


def test_validation_hears_audio(shards: TokenShards, tmp_path: Path) -> None:
    """The held-out loss must not depend on how captions are worded; shards without captions are refused in words."""
    run = {"batch_size": 2, "num_train_steps": 2, "warmup_steps": 0, "results_folder": tmp_path / "run"}
    stage = tiny_stages(**CONDITION)["semantic"]
    trainer = SemanticTransformerTrainer(
        transformer=stage, audio_conditioner=TellingConditioner(), shards=shards, text_prob=1.0, **run
    )
    assert trainer.task.train.text_prob == 1.0 and trainer.task.valid.text_prob == 0.0
    assert trainer.train(stop_after_steps=1).step == 1
    others = SemanticTransformerTrainer(
        transformer=stage, audio_conditioner=TellingConditioner(), shards=shards, text_prob=0.5, **run
    )
    with pytest.raises(ValueError, match="text_prob"):
        others.train()
    assert trainer.train().step == 2
    with pytest.raises(ValueError, match="probability"):
        _source(shards, text_prob=1.5)
    with pytest.raises(ValueError, match="audio_conditioner"):
        ShardSource(shards, tiny_stages()["semantic"], seconds=1.0, audio_conditioner=None, text_prob=0.5)
    write_shards(tmp_path / "bare", lambda _: {"semantic": np.arange(50) % 12, "latents": np.ones((1, 2))}, 2, {})
    with pytest.raises(ValueError, match="text_latents"):
        _source(TokenShards(tmp_path / "bare"), text_prob=0.5)


def test_nulls_that_training_never_shows_are_told_once(shards: TokenShards, tmp_path: Path, caplog) -> None:
    """A stage that would stand 8 nulls for 3 codes says so in training; one that was built for 3 has nothing to say."""
    for null_tokens, count in ((8, 1), (3, 0)):
        stage = tiny_stages(**CONDITION, null_tokens=null_tokens)["semantic"]
        caplog.clear()
        SemanticTransformerTrainer(
            transformer=stage,
            audio_conditioner=TellingConditioner(),
            shards=shards,
            results_folder=tmp_path / str(null_tokens),
            **RUN,
        ).train()
        assert sum("null_tokens=3" in record.getMessage() for record in caplog.records) == count


def test_captions_of_shards_take_turns_in_step_with_their_codes(shards: TokenShards) -> None:
    """Records give the captions that were stored, one an epoch; the codes of a caption go with its states."""
    stage = tiny_stages(**CONDITION, **HEARS)["semantic"]
    source = ShardSource(shards, stage, seconds=1.0, audio_conditioner=TellingConditioner(), text_prob=1.0)
    given = source.read(source.batch(DRAWS))
    assert given.texts == [caption_of(index, epoch % index) if index else None for epoch, index in DRAWS]
    for text, (kind, record, number) in zip(given.texts, given.condition["codes"].tolist()):
        assert (kind == 2) == (text is not None) and (text is None or text == caption_of(record, number))
    assert _source(shards).read(_source(shards).batch(DRAWS)).texts is None  # a stage without a text_dim hears none


def test_texts_survive_being_stored(tmp_path: Path) -> None:
    """Any text comes back from shards, also of records of unequal number; what is none is refused in words."""
    said = [[], [""], ["a\nb", "\x00", "Ünïcode 𝄞 \ud800"], ["x" * 5000]]
    write_shards(tmp_path / "texts", lambda i: {"captions": encode_texts(said[i])}, 4, {})
    records = TokenShards(tmp_path / "texts")
    assert [decode_texts(records[i]["captions"]) for i in range(4)] == said
    for wrong in (b"", b"[1]", b'"a"', b"{", b"\xff", b"[" * 10**5):
        with pytest.raises(ValueError, match="JSON list of texts"):
            decode_texts(np.frombuffer(wrong, dtype=np.uint8))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("origin", ["waves", "shards"])
def test_every_item_hears_its_own_caption(
    origin: str, both: bool, shards: TokenShards, tmp_path: Path, write_folder
) -> None:
    """From waves and from shards: each item's states, whoever else is in the batch; none where there is no caption."""
    stage, texts = tiny_stages(**(CONDITION if both else {}), **HEARS)["semantic"].eval(), FakeTextConditioner()
    data = {"shards": shards}
    if origin == "waves":
        folder = write_captions(write_folder(num_files=4, sample_hz=SAMPLE_HZ))
        data = {"items": (load_items(folder).items,) * 2, "wav2vec": FakeSemanticTokenizer()}
    conditioner = FakeConditioner() if both else None
    trainer = SemanticTransformerTrainer(
        transformer=stage,
        audio_conditioner=conditioner,
        text_conditioner=texts,
        results_folder=tmp_path / "run",
        data_max_length_seconds=0.4,
        **data,
        **RUN,
    )
    heard: list[Conditions | None] = []
    stage.register_forward_pre_hook(lambda _, arguments: heard.append(arguments[1]))
    trainer.task.loss(trainer.task.batch([(4, 3), (4, 0), (5, 2), (4, 1)]), 0)
    states = heard[0].text
    assert (heard[0].codes is not None) == both and states.embeddings.shape == (4, 4, 6)
    for item, caption in enumerate((caption_of(3, 1), None, caption_of(2, 1), caption_of(1, 0))):
        alone = None if caption is None else FakeTextConditioner()(caption)
        assert states.mask[item].sum() == (0 if caption is None else len(caption))
        assert caption is None or torch.equal(states.embeddings[item][states.mask[item]], alone.embeddings[0])
    heard.clear()
    trainer.task.loss(trainer.task.batch([(0, 0)]), 0)
    assert heard[0] is None if not both else heard[0].text is None
    result = trainer.train()
    assert result.step == 2 and stage.token_fingerprints["text_encoder"] == "text encoder"


def test_a_stage_follows_captions(tmp_path: Path) -> None:
    """Tokens that only the caption foretells are learnt, from states alone: far below what is possible without."""
    captions = ["aaa", "cc", "b", "dddd"]

    def make_record(index: int) -> dict[str, np.ndarray]:
        return {"semantic": np.full(10, index * 3), "captions": encode_texts([captions[index]])}

    write_shards(tmp_path / "shards", make_record, 4, {})
    torch.manual_seed(0)
    stage = SemanticTransformer(num_semantic_tokens=12, eos=False, cond_drop_prob=0.1, **HEARS, **SIZES)
    SemanticTransformerTrainer(
        transformer=stage,
        text_conditioner=FakeTextConditioner(),
        shards=TokenShards(tmp_path / "shards"),
        results_folder=tmp_path / "run",
        **{**RUN, "batch_size": 4, "num_train_steps": 80, "learning_rate": 1e-2},
    ).train()
    wrapper = SemanticTransformerWrapper(stage, text_conditioner=FakeTextConditioner())
    conditions = wrapper.condition(text=captions)
    greedy = SamplingSettings(temperature=0.0)
    drawn = wrapper.generate(10, conditioning=conditions, batch_size=4, settings=greedy)
    assert drawn.streams["semantic"][..., 0].tolist() == [[index * 3] * 10 for index in range(4)]


def test_a_text_speaks_through_all_that_a_stage_takes() -> None:
    """Codes and states of a text, or states beside the codes of a wave; what a stage does not take it is not given."""
    own = {"audio_conditioner": FakeConditioner(), "text_conditioner": FakeTextConditioner()}
    codes = torch.tensor([[1, 2, 3]])

    def wrapper_of(sizes: dict, **parts: object) -> SemanticTransformerWrapper:
        return SemanticTransformerWrapper(tiny_stages(**sizes)["semantic"], **parts)

    both = wrapper_of({**CONDITION, **HEARS}, **own)
    assert both.condition() is None
    spoken = both.condition(text=["a", "bb"])
    assert len(spoken.codes) == 2 and spoken.text.mask.sum(1).tolist() == [1, 2]
    beside = both.condition(text="bb", codes=codes)
    assert beside.text.mask.tolist() == [[True, True]]
    assert torch.equal(beside.codes.embeddings, both.condition(codes=codes).codes.embeddings)
    assert both.condition(codes=codes).text is None
    assert wrapper_of(HEARS, **own).condition(text="a").codes is None
    assert wrapper_of(CONDITION, **own).condition(text="a").text is None
    for sizes, parts, given, message in [
        ({}, own, {"text": "a"}, "does not accept such a condition: it needs an audio_conditioner"),
        (HEARS, own, {"codes": codes}, "does not accept such a condition"),
        (HEARS, {}, {"text": "a"}, "needs a text_conditioner"),
        (CONDITION, {}, {"codes": codes}, "needs an audio_conditioner"),
        ({**CONDITION, **HEARS}, {"text_conditioner": own["text_conditioner"]}, {"text": "a"}, "an audio_conditioner"),
        ({**CONDITION, "text_dim": 5}, own, None, "set text_dim=6"),
        ({**CONDITION, "cond_dim": 5}, own, None, "set cond_dim=8"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrapper_of(sizes, **parts).condition(**(given or {}))


def test_trainers_without_texts_or_their_reader_are_refused(shards: TokenShards, tmp_path: Path, write_folder) -> None:
    """Before anything is trained: no captions anywhere, no encoder, or an encoder for a stage that hears no texts."""
    common = {"results_folder": tmp_path / "run", **RUN}
    hearing, deaf = tiny_stages(**HEARS)["semantic"], tiny_stages()["semantic"]
    reader = {"text_conditioner": FakeTextConditioner()}
    with pytest.raises(ValueError, match="text_conditioner and a transformer with a text_dim need each other"):
        SemanticTransformerTrainer(transformer=hearing, shards=shards, **common)
    with pytest.raises(ValueError, match="text_conditioner and a transformer with a text_dim need each other"):
        SemanticTransformerTrainer(transformer=deaf, shards=shards, **reader, **common)
    write_shards(tmp_path / "bare", lambda _: {"semantic": np.arange(50) % 12}, 2, {})
    with pytest.raises(ValueError, match=r"the stage needs \['captions', 'semantic'\]"):
        SemanticTransformerTrainer(transformer=hearing, shards=TokenShards(tmp_path / "bare"), **reader, **common)
    folder = write_folder(num_files=4, sample_hz=SAMPLE_HZ)
    with pytest.raises(ValueError, match="none of 3 recordings has one; write captions in a manifest"):
        SemanticTransformerTrainer(
            transformer=hearing, wav2vec=FakeSemanticTokenizer(), folder=folder, **reader, **common
        )
    silent = {"semantic": np.arange(50) % 12, "captions": encode_texts([])}
    write_shards(tmp_path / "silent", lambda _: silent, 2, {})
    with pytest.raises(ValueError, match="none of 2 recordings has one; write captions in a manifest"):
        SemanticTransformerTrainer(transformer=hearing, shards=TokenShards(tmp_path / "silent"), **reader, **common)
    assert not (tmp_path / "run").exists()


def test_extra_streams_come_from_shards(tmp_path: Path) -> None:
    """A melody is cropped with the sound, ids of a text are taken whole and may be none; waves do not hold them."""

    def make_record(index: int) -> dict[str, np.ndarray]:
        frames = np.arange(100)
        acoustic = np.repeat(frames[:, None] % 16, 4, axis=1)
        return {"acoustic": acoustic, "melody": frames[:20] % 7, "words": np.arange(3 * index)[:, None] % 5}

    write_shards(tmp_path, make_record, 2, {})
    extra = [Stream("melody", 7, rate_hz=10, is_input=True), Stream("words", 5, rate_hz=None, is_input=True)]
    stage = tiny_stages()["fine"]
    stage = type(stage)(**{**stage.config, "extra_streams": extra})
    source = ShardSource(TokenShards(tmp_path), stage, seconds=0.5, audio_conditioner=None)
    batch = source.batch([(epoch, index) for epoch in range(8) for index in (0, 1)])
    given = source.read(batch)
    assert batch.lengths["acoustic"].eq(25).all() and batch.lengths["melody"].eq(5).all()
    assert batch.lengths["words"].tolist() == [0, 3] * 8
    starts = batch.tokens["acoustic"][:, 0, 0]
    assert len(set(starts.tolist())) > 3
    # crops begin with a tone, every fifth frame; 80 frames on, both counters would stand there again
    beginnings = {(frame % 16, frame // 5 % 7) for frame in range(0, 76, 5)}
    assert set(zip(starts.tolist(), batch.tokens["melody"][:, 0].tolist())) <= beginnings
    assert stage(stage.packed(given.tokens)).loss.isfinite()
    with pytest.raises(ValueError, match="'melody' tokens cannot be computed from waves"):
        WaveSource([], stage, seconds=1.0, wav2vec=None, codec=FakeCodec(), audio_conditioner=None)
