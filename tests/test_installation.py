"""What an import reports about the installation."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["audiolm_pytorch", "musiclm_pytorch"])
def test_packages_of_another_project_with_the_same_names_are_reported(package, tmp_path):
    """Their files replace files of this library, so every import warns, and says how to repair the installation."""
    command = [sys.executable, "-c", f"import {package}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path)])}
    alone = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (alone.returncode, alone.stderr) == (0, "")
    (tmp_path / "audiolm_pytorch-99.0.dist-info").mkdir()
    metadata = tmp_path / "audiolm_pytorch-99.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: audiolm-pytorch\nVersion: 99.0\n")
    both = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert both.returncode == 0
    assert "the distribution audiolm-pytorch 99.0 of another project is installed" in both.stderr
    assert "pip uninstall audiolm-pytorch musiclm-pytorch && pip install --force-reinstall" in both.stderr
