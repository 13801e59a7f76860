"""A finished run of the micro preset, trained once a session, and the command line with that preset."""

from collections.abc import Callable
from pathlib import Path

import pytest

from musiclm_pytorch.cli import app as cli
from musiclm_pytorch.pipeline import presets as config
from musiclm_pytorch.pipeline.pipeline import Pipeline
from tests.helpers.micro import MICRO, write_clips


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of captioned tones; read only."""
    return write_clips(tmp_path_factory.mktemp("micro") / "data")


@pytest.fixture(scope="session")
def micro_run(micro_data: Path) -> Path:
    """The folder of a finished run over `micro_data`; read only."""
    out = micro_data.parent / "run"
    list(Pipeline(MICRO, data=micro_data, out=out).run())
    return out


@pytest.fixture
def musiclm_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The `musiclm` command as a function of words that returns the exit status; it also accepts the preset micro."""
    monkeypatch.setitem(config.PRESETS, "micro", MICRO)
    return lambda *words: cli.main([str(word) for word in words])
