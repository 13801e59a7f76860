"""Every python block of the README runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_readme_has_blocks():
    """An empty list would make the test below pass without running anything."""
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_block_runs(block, tmp_path, monkeypatch):
    """What a newcomer pastes must work."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {})
