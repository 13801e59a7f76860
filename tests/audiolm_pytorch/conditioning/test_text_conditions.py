"""Captions in the training of stages, as codes instead of those of audio, and as states of a text encoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from audiolm_pytorch.conditioning.base import Conditions
from audiolm_pytorch.data import TokenShards, write_shards
from audiolm_pytorch.data.captions import decode_texts, encode_texts
from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.generation.wrappers import SemanticTransformerWrapper
from audiolm_pytorch.lm.stages import SemanticTransformer
from audiolm_pytorch.lm.trainers import SemanticTransformerTrainer
from audiolm_pytorch.lm.training_data import ShardSource, WaveSource
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers import fakes

pytestmark = pytest.mark.usefixtures("low_rates")

DRAWS = [(epoch, index) for epoch in range(50) for index in range(4)]
TEXT = {"text_dim": 6}
RUN = {"batch_size": 2, "num_train_steps": 2, "warmup_steps": 0}


class MarkingConditioner(fakes.FakeConditioner):
    """Codes of audio begin with 1; codes of texts begin with 2 and contain the length of the text."""

    def codes(self, *, texts: list[str] | None = None, wavs: Tensor | None = None, lengths=None) -> Tensor:
        if texts is None:
            return torch.tensor([[1, 0, 0]] * len(wavs))
        return torch.tensor([[2, 0, len(text) % 10] for text in texts])

    def codes_from_latents(self, latents: Tensor, modality: str = "audio") -> Tensor:
        kind = 1 if modality == "audio" else 2
        return torch.stack([torch.full((len(latents),), kind), *latents.long().T[:2]], dim=1)


def caption_of(record: int, number: int) -> str:
    """A text whose length identifies the record and whose letter identifies the caption."""
    return chr(ord("a") + number) * (record + 1)


def write_captions(folder: Path) -> Path:
    """Write a manifest of four files, of which number i has i captions, one of them in `caption`."""
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
    stage = fakes.tiny_stages(**fakes.CONDITION)["semantic"]
    return ShardSource(shards, stage, seconds=1.0, audio_conditioner=MarkingConditioner(), **arguments)


def test_codes_of_captions_replace_codes_of_audio(shards: TokenShards) -> None:
    """Captions of the record take turns with the right probability; a record without captions keeps its own codes."""
    source = _source(shards, text_prob=0.5)
    codes = source.read(source.batch(DRAWS)).condition["codes"].view(50, 4, 3)
    assert (codes[:, 0, 0] == 1).all()
    share = float((codes[:, 1:, 0] == 2).double().mean())
    assert 0.4 < share < 0.6
    for epoch, index in ((epoch, index) for epoch in range(50) for index in (1, 2, 3)):
        kind, *latent = codes[epoch, index].tolist()
        assert latent == ([index, epoch % index] if kind == 2 else [9, 9])


def test_caption_draws_are_deterministic_and_do_not_change_crops(shards: TokenShards) -> None:
    """Equal seeds give equal batches; tokens do not depend on the probability; probability 0 uses no captions."""
    once, again, none = (_source(shards, text_prob=p).batch(DRAWS) for p in (0.5, 0.5, 0.0))
    assert torch.equal(once.is_text, again.is_text) and torch.equal(once.latents, again.latents)
    assert torch.equal(once.tokens["semantic"], none.tokens["semantic"])
    assert not none.is_text.any() and _source(shards, text_prob=1).batch(DRAWS).is_text.sum() == 150


def wave_source(folder: Path, **arguments: object) -> WaveSource:
    """Crops of files for a stage with captions as codes and as states."""
    stage = fakes.tiny_stages(**fakes.CONDITION, **TEXT)["semantic"]
    made = {"wav2vec": fakes.FakeSemanticTokenizer(), "codec": None, "audio_conditioner": MarkingConditioner()}
    return WaveSource(load_items(folder).items, stage, seconds=0.4, **{**made, **arguments})


def test_captions_of_files_replace_codes_too(tmp_path: Path, write_folder) -> None:
    """Training from waves uses all captions of a manifest in turns."""
    folder = write_captions(write_folder(num_files=4, sample_hz=fakes.SAMPLE_HZ))
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
    # codes and states are of the same caption
    asked: list[str] = []
    source.conditioner.codes = lambda texts=None, wavs=None, lengths=None: (
        asked.extend(texts or []) or torch.zeros(len(wavs if texts is None else texts), 3, dtype=torch.long)
    )
    source.read(batch)
    assert asked == [expected[number] for number in batch.captioned.tolist()]


def test_validation_uses_codes_of_audio(shards: TokenShards, tmp_path: Path) -> None:
    """The held-out loss does not depend on captions; shards without caption latents raise an error."""
    run = {"batch_size": 2, "num_train_steps": 2, "warmup_steps": 0, "results_folder": tmp_path / "run"}
    stage = fakes.tiny_stages(**fakes.CONDITION)["semantic"]
    trainer = SemanticTransformerTrainer(
        transformer=stage, audio_conditioner=MarkingConditioner(), shards=shards, text_prob=1.0, **run
    )
    assert trainer.task.train.text_prob == 1.0 and trainer.task.valid.text_prob == 0.0
    assert trainer.train(stop_after_steps=1).step == 1
    others = SemanticTransformerTrainer(
        transformer=stage, audio_conditioner=MarkingConditioner(), shards=shards, text_prob=0.5, **run
    )
    with pytest.raises(ValueError, match="text_prob"):
        others.train()
    assert trainer.train().step == 2
    with pytest.raises(ValueError, match="text_prob must be in 0..1, got 1.5"):
        _source(shards, text_prob=1.5)
    with pytest.raises(ValueError, match="audio_conditioner"):
        ShardSource(shards, fakes.tiny_stages()["semantic"], seconds=1.0, audio_conditioner=None, text_prob=0.5)
    write_shards(tmp_path / "bare", lambda _: {"semantic": np.arange(50) % 12, "latents": np.ones((1, 2))}, 2, {})
    with pytest.raises(ValueError, match="text_latents"):
        _source(TokenShards(tmp_path / "bare"), text_prob=0.5)


def test_another_number_of_null_tokens_logs_one_warning(shards: TokenShards, tmp_path: Path, caplog) -> None:
    """A stage with 8 null tokens for 3 codes logs a warning in training; one with 3 does not."""
    for null_tokens, count in ((8, 1), (3, 0)):
        stage = fakes.tiny_stages(**fakes.CONDITION, null_tokens=null_tokens)["semantic"]
        caplog.clear()
        SemanticTransformerTrainer(
            transformer=stage,
            audio_conditioner=MarkingConditioner(),
            shards=shards,
            results_folder=tmp_path / str(null_tokens),
            **RUN,
        ).train()
        assert sum("null_tokens=3" in record.getMessage() for record in caplog.records) == count


def test_captions_and_codes_of_shards_take_the_same_turns(shards: TokenShards) -> None:
    """Each epoch uses the next caption of a record, for codes and for states."""
    stage = fakes.tiny_stages(**fakes.CONDITION, **TEXT)["semantic"]
    source = ShardSource(shards, stage, seconds=1.0, audio_conditioner=MarkingConditioner(), text_prob=1.0)
    given = source.read(source.batch(DRAWS))
    assert given.texts == [caption_of(index, epoch % index) if index else None for epoch, index in DRAWS]
    for text, (kind, record, number) in zip(given.texts, given.condition["codes"].tolist()):
        assert (kind == 2) == (text is not None) and (text is None or text == caption_of(record, number))
    assert _source(shards).read(_source(shards).batch(DRAWS)).texts is None  # a stage without a text_dim has no texts


def test_texts_in_shards_are_lossless(tmp_path: Path) -> None:
    """Any list of texts comes back from shards; other data raises an error."""
    said = [[], [""], ["a\nb", "\x00", "Ünïcode 𝄞 \ud800"], ["x" * 5000]]
    write_shards(tmp_path / "texts", lambda i: {"captions": encode_texts(said[i])}, 4, {})
    records = TokenShards(tmp_path / "texts")
    assert [decode_texts(records[i]["captions"]) for i in range(4)] == said
    for wrong in (b"", b"[1]", b'"a"', b"{", b"\xff", b"[" * 10**5):
        with pytest.raises(ValueError, match="JSON list of texts"):
            decode_texts(np.frombuffer(wrong, dtype=np.uint8))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("origin", ["waves", "shards"])
def test_every_item_is_conditioned_on_its_own_caption(
    origin: str, both: bool, shards: TokenShards, tmp_path: Path, write_folder
) -> None:
    """From waves and from shards, states do not depend on the batch; an item without a caption has none."""
    stage, texts = (
        fakes.tiny_stages(**(fakes.CONDITION if both else {}), **TEXT)["semantic"].eval(),
        fakes.FakeTextConditioner(),
    )
    data = {"shards": shards}
    if origin == "waves":
        folder = write_captions(write_folder(num_files=4, sample_hz=fakes.SAMPLE_HZ))
        data = {"items": (load_items(folder).items,) * 2, "wav2vec": fakes.FakeSemanticTokenizer()}
    conditioner = fakes.FakeConditioner() if both else None
    trainer = SemanticTransformerTrainer(
        transformer=stage,
        audio_conditioner=conditioner,
        text_conditioner=texts,
        results_folder=tmp_path / "run",
        data_max_length_seconds=0.4,
        **data,
        **RUN,
    )
    received: list[Conditions] = []
    stage.register_forward_pre_hook(lambda _, arguments: received.append(arguments[1]))
    trainer.task.loss(trainer.task.batch([(4, 3), (4, 0), (5, 2), (4, 1)]), 0)
    states = received[0]["text"]
    assert ("codes" in received[0]) == both and states.embeddings.shape == (4, 4, 6)
    for item, caption in enumerate((caption_of(3, 1), None, caption_of(2, 1), caption_of(1, 0))):
        alone = None if caption is None else fakes.FakeTextConditioner()(caption)
        assert states.mask[item].sum() == (0 if caption is None else len(caption))
        assert caption is None or torch.equal(states.embeddings[item][states.mask[item]], alone.embeddings[0])
    received.clear()
    trainer.task.loss(trainer.task.batch([(0, 0)]), 0)
    assert list(received[0]) == (["codes"] if both else [])
    result = trainer.train()
    assert result.step == 2 and stage.token_fingerprints["text_encoder"] == "text encoder"


@pytest.mark.slow
def test_a_stage_follows_captions(tmp_path: Path) -> None:
    """A stage learns tokens that depend on the caption only, with a loss far below that without captions."""
    captions = ["aaa", "cc", "b", "dddd"]

    def make_record(index: int) -> dict[str, np.ndarray]:
        return {"semantic": np.full(10, index * 3), "captions": encode_texts([captions[index]])}

    write_shards(tmp_path / "shards", make_record, 4, {})
    torch.manual_seed(0)
    stage = SemanticTransformer(num_semantic_tokens=12, eos=False, cond_drop_prob=0.1, **TEXT, **fakes.SIZES)
    SemanticTransformerTrainer(
        transformer=stage,
        text_conditioner=fakes.FakeTextConditioner(),
        shards=TokenShards(tmp_path / "shards"),
        results_folder=tmp_path / "run",
        **{**RUN, "batch_size": 4, "num_train_steps": 80, "learning_rate": 1e-2},
    ).train()
    wrapper = SemanticTransformerWrapper(stage, text_conditioner=fakes.FakeTextConditioner())
    conditions = wrapper.condition(text=captions)
    greedy = SamplingSettings(temperature=0.0)
    drawn = wrapper.generate(10, conditioning=conditions, batch_size=4, settings=greedy)
    assert drawn.streams["semantic"][..., 0].tolist() == [[index * 3] * 10 for index in range(4)]


def test_a_text_conditions_codes_and_states() -> None:
    """A stage gets the codes and states that it accepts; codes of a wave replace those of the text."""
    own = {"audio_conditioner": fakes.FakeConditioner(), "text_conditioner": fakes.FakeTextConditioner()}
    codes = torch.tensor([[1, 2, 3]])

    def wrapper_of(sizes: dict, **parts: object) -> SemanticTransformerWrapper:
        return SemanticTransformerWrapper(fakes.tiny_stages(**sizes)["semantic"], **parts)

    both = wrapper_of({**fakes.CONDITION, **TEXT}, **own)
    assert both.condition() is None
    spoken = both.condition(text=["a", "bb"])
    assert len(spoken["codes"]) == 2 and spoken["text"].mask.sum(1).tolist() == [1, 2]
    beside = both.condition(text="bb", codes=codes)
    assert beside["text"].mask.tolist() == [[True, True]]
    assert torch.equal(beside["codes"].embeddings, both.condition(codes=codes)["codes"].embeddings)
    assert list(both.condition(codes=codes)) == ["codes"]
    assert list(wrapper_of(TEXT, **own).condition(text="a")) == ["text"]
    assert list(wrapper_of(fakes.CONDITION, **own).condition(text="a")) == ["codes"]
    for sizes, parts, given, message in [
        ({}, own, {"text": "a"}, "does not accept the passed text, wavs or codes: it needs an audio_conditioner"),
        (TEXT, own, {"codes": codes}, "does not accept the passed text, wavs or codes"),
        (TEXT, {}, {"text": "a"}, "pass a text_conditioner"),
        (fakes.CONDITION, {}, {"codes": codes}, "pass an audio_conditioner"),
        (
            {**fakes.CONDITION, **TEXT},
            {"text_conditioner": own["text_conditioner"]},
            {"text": "a"},
            "an audio_conditioner",
        ),
        ({**fakes.CONDITION, "text_dim": 5}, own, None, "set text_dim=6"),
        ({**fakes.CONDITION, "cond_dim": 5}, own, None, "set cond_dim=8"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrapper_of(sizes, **parts).condition(**(given or {}))


def test_missing_captions_or_text_encoders_raise_errors(shards: TokenShards, tmp_path: Path, write_folder) -> None:
    """Missing captions, a missing encoder, or an encoder for a stage without a text_dim is an error."""
    common = {"results_folder": tmp_path / "run", **RUN}
    with_texts, without_texts = fakes.tiny_stages(**TEXT)["semantic"], fakes.tiny_stages()["semantic"]
    reader = {"text_conditioner": fakes.FakeTextConditioner()}
    with pytest.raises(ValueError, match="only one of a text_conditioner and a transformer with a text_dim"):
        SemanticTransformerTrainer(transformer=with_texts, shards=shards, **common)
    with pytest.raises(ValueError, match="only one of a text_conditioner and a transformer with a text_dim"):
        SemanticTransformerTrainer(transformer=without_texts, shards=shards, **reader, **common)
    write_shards(tmp_path / "bare", lambda _: {"semantic": np.arange(50) % 12}, 2, {})
    with pytest.raises(ValueError, match=r"the stage needs \['captions', 'semantic'\]"):
        SemanticTransformerTrainer(transformer=with_texts, shards=TokenShards(tmp_path / "bare"), **reader, **common)
    folder = write_folder(num_files=4, sample_hz=fakes.SAMPLE_HZ)
    with pytest.raises(ValueError, match="none of 3 recordings has a caption; add captions to the manifest"):
        SemanticTransformerTrainer(
            transformer=with_texts, wav2vec=fakes.FakeSemanticTokenizer(), folder=folder, **reader, **common
        )
    silent = {"semantic": np.arange(50) % 12, "captions": encode_texts([])}
    write_shards(tmp_path / "silent", lambda _: silent, 2, {})
    with pytest.raises(ValueError, match="none of 2 recordings has a caption; add captions to the manifest"):
        SemanticTransformerTrainer(transformer=with_texts, shards=TokenShards(tmp_path / "silent"), **reader, **common)
    assert not (tmp_path / "run").exists()


def test_extra_streams_come_from_shards(tmp_path: Path) -> None:
    """A melody is cropped with the audio; ids of a text are not cropped and may be empty; waves have neither."""

    def make_record(index: int) -> dict[str, np.ndarray]:
        frames = np.arange(100)
        acoustic = np.repeat(frames[:, None] % 16, 4, axis=1)
        return {"acoustic": acoustic, "melody": frames[:20] % 7, "words": np.arange(3 * index)[:, None] % 5}

    write_shards(tmp_path, make_record, 2, {})
    extra = [Stream("melody", 7, rate_hz=10, is_input=True), Stream("words", 5, rate_hz=None, is_input=True)]
    stage = fakes.tiny_stages()["fine"]
    stage = type(stage)(**{**stage.config, "extra_streams": extra})
    source = ShardSource(TokenShards(tmp_path), stage, seconds=0.5, audio_conditioner=None)
    batch = source.batch([(epoch, index) for epoch in range(8) for index in (0, 1)])
    given = source.read(batch)
    assert batch.lengths["acoustic"].eq(25).all() and batch.lengths["melody"].eq(5).all()
    assert batch.lengths["words"].tolist() == [0, 3] * 8
    starts = batch.tokens["acoustic"][:, 0, 0]
    assert len(set(starts.tolist())) > 3
    # crops start every fifth frame; both counters repeat after 80 frames
    beginnings = {(frame % 16, frame // 5 % 7) for frame in range(0, 76, 5)}
    assert set(zip(starts.tolist(), batch.tokens["melody"][:, 0].tolist())) <= beginnings
    assert stage(stage.packed(given.tokens)).loss.isfinite()
    with pytest.raises(ValueError, match="'melody' tokens cannot be computed from waves"):
        WaveSource([], stage, seconds=1.0, wav2vec=None, codec=fakes.FakeCodec(), audio_conditioner=None)
