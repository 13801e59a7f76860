"""A folder with broken files of ten kinds."""

import logging
import sys
from pathlib import Path

import pytest

from audiolm_pytorch.data import load_items
from tests.helpers.broken_files import broken, train, write_files


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")
def test_training_with_broken_files_of_ten_kinds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each broken file is listed once with a reason, the others are trained on, and the memory does not grow."""
    names = write_files(tmp_path / "data", 200, 30)
    assert len(names) == 30 == 3 * len(broken())
    with caplog.at_level(logging.WARNING):
        report = load_items(tmp_path / "data")
    assert {item.path.name for item in report.rejected} == names and len(report.items) == 170
    assert all(caplog.text.count(f"/{name} (") == 1 for name in names)
    memory = train(tmp_path / "data", tmp_path / "run", steps=90, every=15)
    assert len(memory) == 6 and memory[-1] - memory[1] < 20
