"""Exports are imported on first use, and a saved module finds its class without an import by the user."""

import importlib
import os

import pytest
import torch

from audiolm_pytorch import SpectralSoundStream
from audiolm_pytorch.saving.modules import load_module, save_module
from tests.helpers.processes import run_python

PACKAGES = [
    *("audiolm_pytorch", "audiolm_pytorch.codecs", "audiolm_pytorch.data", "audiolm_pytorch.semantic"),
    *("audiolm_pytorch.training", "musiclm_pytorch", "musiclm_pytorch.mulan"),
]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_export_exists(name):
    package = importlib.import_module(name)
    assert len(package.__all__) > 5 and set(package.__all__) <= set(dir(package))
    for export in package.__all__:
        assert getattr(package, export) is not None
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        _ = package.nothing
    assert getattr(package, "nothing.at_all", None) is None


def test_exports_and_submodules_are_those_of_an_import():
    import audiolm_pytorch
    from audiolm_pytorch.semantic.base import FrameEncoder

    assert audiolm_pytorch.semantic.base.FrameEncoder is FrameEncoder
    assert audiolm_pytorch.SpectralSoundStream is SpectralSoundStream
    with pytest.raises(ImportError, match="cannot import name 'Soundstream'"):
        from audiolm_pytorch import Soundstream  # noqa: F401


@pytest.mark.slow
def test_a_new_process_imports_only_what_it_needs(tmp_path):
    """Imports and the parsing of a command do not import torch; loading a codec imports few rooms."""
    save_module(SpectralSoundStream(dim=16, encoder_depth=1, decoder_depth=1, codebook_size=8), tmp_path)
    program = """
import sys, audiolm_pytorch, musiclm_pytorch, musiclm_pytorch.cli
assert musiclm_pytorch.cli.main(["generate", "--help"]) == 0
assert musiclm_pytorch.cli.main(["generate", "a jig", "--seed=-1"]) == 2
assert "torch" not in sys.modules
from audiolm_pytorch.saving.modules import load_module
codec = load_module(sys.argv[1])
rooms = {".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("audiolm_pytorch.")}
print(type(codec).__name__, sorted(rooms))
"""
    loaded, rooms = run_python("-c", program, tmp_path).stdout.splitlines()[-1].split(" ", 1)
    assert loaded == "SoundStream"
    expected = ("audio", "checks", "codecs", "nn", "saving", "training")
    assert rooms == str([f"audiolm_pytorch.{room}" for room in expected])


def test_loading_draws_no_random_weights(tmp_path, monkeypatch):
    """The file replaces all weights; random values would take most of the time of loading."""
    codec = SpectralSoundStream(dim=16, encoder_depth=1, decoder_depth=1, codebook_size=8)
    save_module(codec, tmp_path)
    rng = torch.get_rng_state()
    loaded = load_module(tmp_path)
    assert torch.equal(torch.get_rng_state(), rng)
    for name, weight in codec.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


@pytest.mark.slow
def test_a_type_checker_reports_unknown_names(tmp_path):
    api = pytest.importorskip("mypy.api")
    code = "from audiolm_pytorch import AudioLM, AudioLN\nimport musiclm_pytorch\nmusiclm_pytorch.MusicLN, AudioLM\n"
    options = ["--config-file", os.devnull, "--cache-dir", str(tmp_path), "--follow-imports", "silent"]
    report, _, _ = api.run([*options, "-c", code])
    assert 'has no attribute "AudioLN"' in report and 'has no attribute "MusicLN"' in report and "Found 2" in report
