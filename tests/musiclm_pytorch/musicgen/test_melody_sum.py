"""A melody that is added to the tokens of the same time: it acts from its time on, alone as in a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from audiolm_pytorch import SoundStream
from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from musiclm_pytorch import MusicGen
from musiclm_pytorch.musicgen.melody import melody_of
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer
from tests.helpers.published_musicgen import write_musicgen


@pytest.fixture(scope="module")
def model() -> MusicGen:
    """A small model with 50 frames per second and windows of 1.5 s, whose conditions have a large influence."""
    torch.manual_seed(0)
    codec = SoundStream(channels=4, strides=(4, 8, 10), codebook_dim=8, codebook_size=16, rq_num_quantizers=2)
    model = MusicGen(codec=codec, melody="sum", dim=32, depth=2, heads=2, max_seconds=1.5).eval()
    with torch.no_grad():
        model.transformer.fuser.entries["melody"].projection.weight.normal_()
    return model


def notes(*pitches: int) -> list[tuple[int, float, float]]:
    """Notes of 1 s, one after the other."""
    return [(pitch, float(start), start + 1.0) for start, pitch in enumerate(pitches)]


def test_a_melody_acts_at_its_time(model: MusicGen) -> None:
    """Two melodies that differ from 1 s on give equal tokens before, also with guidance, and other tokens after."""
    for scale in (1.0, 3.0):
        first, second, none = (
            model.generate(melody=melody, seconds=1.4, temperature=0, guidance_scale=scale).tokens[0]
            for melody in (notes(60, 60), notes(60, 67), None)
        )
        same = int((first == second).all(dim=1).long().cumprod(dim=0).sum())
        assert 40 <= same <= 60  # frames of a melody have 0.128 s
        assert not torch.equal(first[:40], none[:40])


def test_items_and_windows(model: MusicGen) -> None:
    """Items of a batch equal single items over two windows, and a melody acts in the second window too."""
    melodies = [notes(60, 67, 62), None, notes(60, 67, 65)]
    options: dict[str, Any] = {"seconds": 2.6, "temperature": 0, "guidance_scale": 2.0}
    batch = model.generate(melody=melodies, **options).tokens
    for item, melody in enumerate(melodies):
        assert torch.equal(batch[item], model.generate(melody=melody, **options).tokens[0])
    assert torch.equal(batch[0, :75], batch[2, :75]) and not torch.equal(batch[0, 75:], batch[2, 75:])


def test_decoding_equals_the_whole_sequence(model: MusicGen) -> None:
    """Greedy tokens of the cache are the most likely ones of one pass over the whole sequence."""
    tokens = model.generate(melody=notes(60, 67), seconds=1.4, temperature=0, guidance_scale=1.0).tokens
    assert model.chroma is not None
    melody = melody_of(notes(60, 67), 32_000, model.chroma, "melody").window(model.chroma, None).unsqueeze(0)
    packed = model.transformer.packed(
        AudioTokens({"acoustic": tokens}, {"acoustic": torch.tensor([tokens.shape[1]])}),
        torch.zeros(1, dtype=torch.bool),
    )
    with torch.no_grad():
        loss = model.transformer(packed, {"melody": ConditionTensor.of(melody)})
    assert float(loss.accuracy) == 1


def test_published_formats_have_no_sum(tmp_path: Path) -> None:
    """Weights whose melody is no prefix cannot be written in a published format; an own folder keeps the way."""
    published = MusicGen.from_pretrained(write_musicgen(tmp_path / "published", melody=True))
    config = published.transformer.config
    model = MusicGen(
        codec=published.codec,
        text_conditioner=published.text_conditioner,
        transformer=MusicGenTransformer(**{**config, "melody_way": "sum"}),
    )
    for name in ("transformers", "audiocraft"):
        with pytest.raises(ValueError, match="melodies as a prefix, not melody_way='sum'"):
            model.save_pretrained(tmp_path / name, format=name)
    model.save_pretrained(tmp_path / "own")
    assert MusicGen.from_pretrained(tmp_path / "own").transformer.melody_way == "sum"
