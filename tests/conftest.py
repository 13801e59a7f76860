"""Fixtures that every test may use: seeded randomness and small synthetic sounds."""

import gc
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

gc.disable()  # collection creates half a million lasting objects, which the garbage collector would visit repeatedly

WriteTone = Callable[..., Path]
WriteFolder = Callable[..., Path]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that needs no GPU as `full`, so that `pytest -m full` runs all of them."""
    for item in items:
        if item.get_closest_marker("gpu") is None:
            item.add_marker("full")


def pytest_collection_finish() -> None:
    """Switch the garbage collector on, and let it ignore the objects of the collection."""
    gc.freeze()
    gc.enable()


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes 1.5 ms
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, on one thread."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """Start fixtures that tests share from the same state, too: they do not depend on the tests before."""
    if fixturedef.scope != "function":
        _seed()


@pytest.fixture
def rng() -> np.random.Generator:
    """A random generator that is the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def low_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow files at the rate of `tests.helpers.fakes`, 800 Hz, which is too low for a real sound."""
    monkeypatch.setattr("audiolm_pytorch.audio.waves.MIN_HZ", 800)


@pytest.fixture
def write_tone(tmp_path: Path) -> WriteTone:
    """A function that writes a tone in a little noise under the test's folder and returns its path."""

    def write(
        name: str = "tone.wav", seconds: float = 1.0, sample_hz: int = 24000, tone_hz: float = 440.0, channels: int = 1
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        num_samples = round(seconds * sample_hz)
        noise = np.random.default_rng(len(name)).standard_normal((num_samples, channels)) * 0.05
        tone = 0.3 * np.sin(2 * np.pi * tone_hz * np.arange(num_samples) / sample_hz)
        soundfile.write(path, tone[:, None] + noise, sample_hz)
        return path

    return write


@pytest.fixture
def write_folder(tmp_path: Path, write_tone: WriteTone) -> WriteFolder:
    """A function that writes a folder of tones of different pitch and returns its path."""

    def write(name: str = "corpus", num_files: int = 3, seconds: float = 1.0, sample_hz: int = 24000) -> Path:
        for number in range(num_files):
            write_tone(f"{name}/{number:03d}.wav", seconds, sample_hz, tone_hz=220.0 + 55.0 * number)
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny text encoders in published formats, by kind; read only."""
    from tests.helpers.published_texts import KINDS, write_text_encoder

    root = tmp_path_factory.mktemp("published")
    return {kind: write_text_encoder(root / kind, kind) for kind in KINDS}
