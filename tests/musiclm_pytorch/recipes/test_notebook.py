"""The notebook of the recipes: it runs, and shows the results of a real run when it is opened."""

import json
import os
import sys
from pathlib import Path

import pytest

import musiclm_pytorch

NOTEBOOK = Path(musiclm_pytorch.__file__).parent / "recipes" / "fine_tuning.ipynb"
# A training of seconds in place of minutes.
OPTIONS = "--scale 0.01 " + " ".join(
    f"--{stage}.run.{name} {value}"
    for stage in ("semantic", "coarse", "fine")
    for name, value in (("batch-size", 1), ("seconds", 2))
)


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    """From clips to a fine-tuned model and its sound; an error of any cell fails."""
    nbformat = pytest.importorskip("nbformat", reason='needs pip install -e ".[docs]"')
    nbclient = pytest.importorskip("nbclient", reason='needs pip install -e ".[docs]"')
    pytest.importorskip("ipykernel", reason='needs pip install -e ".[docs]"')
    pytest.importorskip("matplotlib", reason='needs pip install -e ".[plot]"')
    root = Path(musiclm_pytorch.__file__).parents[1]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for setting, quick in (("NUM_CLIPS = 24", "NUM_CLIPS = 2"), ('OPTIONS = "--scale 0.3"', f'OPTIONS = "{OPTIONS}"')):
        assert setting in parameters.source
        parameters.source = parameters.source.replace(setting, quick)
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    for name in ("before.ogg", "after.ogg", "jig.ogg", "run/model/musiclm.json"):
        assert (tmp_path / name).is_file(), name


def test_notebook_shows_results():
    """Sounds and plots are in the file, which is small and names no folder of the machine that made it."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    kinds = [kind for output in outputs for kind in output.get("data", ())]
    assert kinds.count("text/html") >= 4 and kinds.count("image/png") >= 2  # players and plots
    assert len(text) < 500_000
    assert [name for name in ("/tmp/", "/home/", "/work/", "/root/") if name in text] == []
