"""Files of a k-means run that were changed by hand: a ValueError that names the file or folder."""

from pathlib import Path

import pytest
import torch

from audiolm_pytorch.training.checkpoint import Checkpoint, CheckpointFolder
from tests.audiolm_pytorch.semantic.test_kmeans_trainer import job, write_sounds


@pytest.mark.parametrize("content", ["[]", "{}", '{"usage": {}}', '{"run": 3}', '{"run": {}, "sha256": "0"}'])
def test_an_altered_record_is_named(tmp_path: Path, content: str) -> None:
    """The record is read before anything is computed."""
    trainer = job(write_sounds(tmp_path / "audio", [1.0] * 3), tmp_path / "run", num_clusters=4)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kmeans.json").write_text(content)
    with pytest.raises(ValueError, match=r"kmeans.json|run with other settings .*expected"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock"] == ["kmeans.json"]


@pytest.mark.parametrize("tensors", [{}, {"other": {"a": torch.ones(1)}}, {"state": {"centroids": torch.ones(1)}}])
def test_a_checkpoint_of_something_else_is_named(tmp_path: Path, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    """A checkpoint without the centroids and their scale is an error, never a KeyError."""
    trainer = job(write_sounds(tmp_path / "audio", [1.0] * 3), tmp_path / "run", num_clusters=4)
    CheckpointFolder(tmp_path / "run" / "kmeans").write(Checkpoint(1, tensors, {}))
    CheckpointFolder(tmp_path / "run").write(Checkpoint(1, {}, {}))  # a run of ours
    with pytest.raises(ValueError, match="run/kmeans/checkpoint has no state of k-means; remove"):
        trainer.train()
