"""Wrong uses of the Python interface: one line with the reason and what to do, and no file is written.

Wrong command lines are in `tests/musiclm_pytorch/cli/test_app.py`, those of the page beside the page.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiolm_pytorch import (
    AudioLM,
    Codec,
    SemanticTransformer,
    SemanticTransformerTrainer,
    SoundStream,
    SoundStreamTrainer,
    load_module,
)
from audiolm_pytorch.audio import read_audio, resample, write_audio
from musiclm_pytorch import Mixture, MuLaN, MuLaNTrainer, MusicGen, MusicLM
from tests.helpers import small_models as small
from tests.helpers.bad_input import listing
from tests.helpers.micro import write_clips

WAVE = torch.zeros(8000)


@pytest.fixture(scope="module")
def musiclm() -> MusicLM:
    """A small model; read only."""
    return small.small_musiclm()


def _codec() -> SoundStream:
    return small.small_soundstream(rq_num_quantizers=3)


def _stage_trainer(folder: Path, **arguments: Any) -> SemanticTransformerTrainer:
    transformer = SemanticTransformer(num_semantic_tokens=12, dim=16, depth=1, heads=2)
    return SemanticTransformerTrainer(
        **{
            "transformer": transformer,
            "wav2vec": small.small_tokenizer(),
            "folder": folder,
            "batch_size": 1,
            **arguments,
        }
    )


def _codec_trainer(folder: Path, **arguments: Any) -> SoundStreamTrainer:
    return SoundStreamTrainer(_codec(), **{"folder": folder, "batch_size": 1, "num_train_steps": 1, **arguments})


# Name -> a call with a MusicLM, a folder of clips, and an empty folder; and a pattern of the message. The letter and
# number of a row of cases.md are in brackets.
USES: dict[str, tuple[Callable[[Any, Path, Path], object], str]] = {
    "no such model": (lambda m, data, out: MusicLM.from_pretrained("tinny"), "no folder tinny; pass .* tiny"),
    "codec as model": (lambda m, data, out: MusicLM.from_pretrained("codec_16khz"), "no complete MusicLM"),
    "MusicLM as MusicGen": (
        lambda m, data, out: MusicGen.from_pretrained("tiny"),
        "tiny has no MusicGen; MusicLM.from_pretrained opens the MusicLM in .*tiny$",
    ),
    "MusicGen as MusicLM": (
        lambda m, data, out: MusicLM.from_pretrained("musicgen_tiny"),
        "no complete MusicLM .*; MusicGen.from_pretrained opens the MusicGen in .*musicgen_tiny$",
    ),
    "tensor as a condition": (
        lambda m, data, out: m.audio_lm(conditioning={"semantic": {"tempo": torch.ones(1, 3)}}),
        "conditioning must be .*; convert each tensor with ConditionTensor.of.tensor.$",
    ),
    "model as codec": (
        lambda m, data, out: Codec.from_pretrained("musicnn"),
        "unknown module .*MusicNN|holds a MusicNN",
    ),
    "empty folder": (lambda m, data, out: AudioLM.from_pretrained(out), "contains no complete AudioLM"),
    "no MusicGen": (lambda m, data, out: MusicGen.from_pretrained(out), "MusicGen"),
    "hub, offline": (lambda m, data, out: MuLaN.from_pretrained("a/b", offline=True), "allow the download once"),
    "no module": (lambda m, data, out: load_module(out), "config.json"),
    "empty text": (lambda m, data, out: m(" "), "empty"),
    "no texts": (lambda m, data, out: m([]), "empty list of texts; pass at least one text"),
    "bytes as text": (lambda m, data, out: m(b"a jig"), "text must be"),
    "no candidates": (lambda m, data, out: m("a", num_samples=0), "num_samples"),
    "negative seconds": (lambda m, data, out: m("a", seconds=-1), "seconds.*must be positive"),
    "seconds as text": (lambda m, data, out: m("a", seconds="5"), "seconds must be float"),
    "endless music": (lambda m, data, out: m("a", seconds=float("inf")), "seconds"),
    "too few seeds": (lambda m, data, out: m("a", num_samples=3, seeds=[1]), "seeds"),
    "unknown stage": (lambda m, data, out: m("a", sampling={"semantics": {"top_k": 3}}), "stages are"),
    "unknown sampling": (lambda m, data, out: m("a", sampling={"semantic": {"topk": 3}}), "topk"),
    "no prompt file": (lambda m, data, out: m("a", prime_wave=out / "none.wav"), "none.wav: no such file"),
    "prompt longer than the music": (
        lambda m, data, out: m("a", prime_wave=WAVE, prime_wave_input_sample_hz=800, seconds=0.5),
        "prompt.*longer|longer.*prompt|request more",
    ),
    "melody without a melody model": (
        lambda m, data, out: m("a", melody=WAVE, melody_sample_hz=800),
        "does not follow melodies; leave out the melody",
    ),
    "weights of a mixture": (lambda m, data, out: Mixture([("a", -1.0), ("b", 0.5)]), "weights that are not negative"),
    "story after the end": (lambda m, data, out: m([(0, "a"), (9, "b")], seconds=1.0), "changes after 9 s"),
    "integers as a wave [A1]": (
        lambda m, data, out: write_audio(out / "a.wav", WAVE.short(), 16000),
        "wave must .*float|int16",
    ),
    "no format": (lambda m, data, out: write_audio(out / "a.xyz", WAVE, 16000), "cannot write .xyz; use one of .wav"),
    "impossible rate [E12]": (lambda m, data, out: resample(WAVE, 1, 16000), "1 Hz|1,000|1000"),
    "no audio file": (lambda m, data, out: read_audio(data / "train.jsonl"), "cannot be read as audio .it is a text"),
    "list as a wave [B10]": (lambda m, data, out: _codec().tokenize([0.0] * 800), "wave must be a"),
    "array as a wave [B10]": (lambda m, data, out: _codec().tokenize(np.zeros(800)), "wave must be a"),
    "codes out of range": (
        lambda m, data, out: _codec().decode_from_codebook_indices(torch.full((1, 4, 3), 99)),
        "codes must be in|0..15",
    ),
    "no quantizers [B10]": (lambda m, data, out: SoundStream(rq_num_quantizers=0), "rq_num_quantizers"),
    "stride of 0 [B10]": (lambda m, data, out: SoundStream(strides=(2, 0)), "strides"),
    "unknown argument": (lambda m, data, out: SoundStream(codebook_sise=8), "codebook_size"),
    "old argument of a trainer [B11]": (lambda m, data, out: _codec_trainer(data, lr=1e-4), "learning_rate"),
    "no data [B11]": (lambda m, data, out: _stage_trainer(None, num_train_steps=1), "folder"),
    "no such folder": (lambda m, data, out: _codec_trainer(out / "none"), "none.*no such folder|does not exist"),
    "empty data": (lambda m, data, out: _codec_trainer(out), "no audio files"),
    "text as batch size [B5]": (lambda m, data, out: _stage_trainer(data, batch_size="2"), "batch_size must be int"),
    "texts missing": (
        lambda m, data, out: MuLaNTrainer(mulan=small.small_mulan(), folder=out, batch_size=2, num_train_steps=1),
        "no audio files",
    ),
    "model over a file [E1]": (
        lambda m, data, out: m.save_pretrained(data / "00.wav"),
        "00.wav is a file, or is in a file; pass a folder",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_wrong_uses_are_explained_in_one_line(
    use: str,
    musiclm: MusicLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    low_rates: None,
) -> None:
    """A ValueError or TypeError with one line of at most 400 letters; nothing is written or changed."""
    run, message = USES[use]
    data, out = write_clips(tmp_path / "data", 2), tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    before = listing(tmp_path)
    with pytest.raises((ValueError, TypeError)) as caught:
        run(musiclm, data, out)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text and len(text) < 400
    assert listing(tmp_path) == before
