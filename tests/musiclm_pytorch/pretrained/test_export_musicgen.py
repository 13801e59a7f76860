"""Export of a MusicGen that refers to the bundled codec, as the bundled MusicGen does."""

from pathlib import Path

import pytest
import soundfile
import torch

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.saving import sources
from audiolm_pytorch.saving.files import read_json
from musiclm_pytorch import MusicGen
from musiclm_pytorch.mulan import TextTransformer
from musiclm_pytorch.musicgen.text_tower import TextTowerEncoder
from musiclm_pytorch.pretrained.export import export_musicgen

REQUEST = {"texts": ["a slow waltz"], "melody": torch.ones(8000), "seconds": 0.5, "seeds": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training of a small MusicGen on the bundled codec."""
    torch.manual_seed(0)
    text = TextTowerEncoder(TextTransformer(dim=16, depth=1, heads=2, dim_head=8, num_tokens=256))
    sizes = {"dim": 32, "depth": 1, "heads": 2, "num_codebooks": 4, "max_seconds": 1.0}
    model = MusicGen(codec=Codec.from_pretrained("codec_16khz"), text_conditioner=text, melody=True, **sizes)
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "musicgen" / "musicgen", licence="mit")
    return folder


@pytest.mark.slow
def test_a_small_model_refers_to_the_bundled_codec(musiclm_command, run, tmp_path, monkeypatch, capsys) -> None:
    """The exported folder has no codec; as a bundled model it has the music of the whole export, without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shipped = tmp_path / "musicgen_small"
    assert musiclm_command("export", "--run", run, "--out", shipped, "--bundled", "codec", "codec_16khz") == 0
    assert "wrote" in capsys.readouterr().out
    assert sorted(path.name for path in shipped.iterdir()) == [
        *("README.md", "musicgen.json", "text_conditioner", "transformer")
    ]
    assert read_json(shipped / "musicgen.json")["bundled_parts"] == {"codec": "codec_16khz"}
    assert "license: mit\n" in (shipped / "README.md").read_text()
    assert export_musicgen(run, tmp_path / "whole") > 20_000_000
    bundled = {**sources.bundled_models(), "musicgen_small": shipped}
    monkeypatch.setattr(sources, "bundled_models", lambda: bundled)
    whole, small = (MusicGen.from_pretrained(name) for name in (tmp_path / "whole", "musicgen_small"))
    expected, music = whole.generate(**REQUEST), small.generate(**REQUEST)
    assert torch.equal(music.tokens, expected.tokens) and torch.equal(music.waves[0], expected.waves[0])
    words = ("generate", "a slow waltz", "--model", "musicgen_small", "--seconds", 0.5)
    assert musiclm_command(*words, "--out", tmp_path / "a.wav") == 0
    assert len(soundfile.read(tmp_path / "a.wav")[0]) == 8000


def test_other_parts_are_not_left_out(run, tmp_path) -> None:
    """A part without an equal bundled module must be in the folder."""
    with pytest.raises(ValueError, match="the codec is not the bundled module semantic_16khz"):
        export_musicgen(run, tmp_path / "out", bundled={"codec": "semantic_16khz"})
    with pytest.raises(ValueError, match="got --bundled codec codec; choose one of .*codec_16khz.* for codec"):
        export_musicgen(run, tmp_path / "out", bundled={"codec": "codec"})
    with pytest.raises(ValueError, match="got --bundled semantic semantic_16khz; choose one of transformer.*codec"):
        export_musicgen(run, tmp_path / "out", bundled={"semantic": "semantic_16khz"})
    assert not (tmp_path / "out").exists()
