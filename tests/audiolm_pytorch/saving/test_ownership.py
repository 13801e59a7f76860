"""Which files and folders this library may replace: those with its marks, whatever they are called."""

import json
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.saving.files import write_json, write_weights
from audiolm_pytorch.saving.ownership import check_folder_owner, is_own

MARKS = ("format_version", "class")


def test_marks_are_found_in_every_kind_of_file(tmp_path: Path) -> None:
    """The same file without one of the marks, or damaged, is of somebody else."""
    write_json(tmp_path / "a.json", {"format_version": 1, "class": "A"}, sealed=True)
    (tmp_path / "a.jsonl").write_text(json.dumps({"format_version": 1, "class": 2}) + "\nrest")
    write_weights(tmp_path / "a.safetensors", {"x": torch.ones(3)}, {"format_version": "1", "class": "A"})
    torch.save({"format_version": 1, "class": 1, "weight": torch.ones(10**5)}, tmp_path / "a.bin")
    sounds = [tmp_path / f"a{suffix}" for suffix in (".wav", ".flac", ".ogg")]
    for sound in sounds:
        write_audio(sound, torch.rand(10**5) - 0.5, 16000, comment="format_version of this class")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7
    for file in files:
        assert is_own(file, MARKS) and not is_own(file, (*MARKS, "other")), file
        (tmp_path / "cut").mkdir(exist_ok=True)
        cut = tmp_path / "cut" / file.name
        cut.write_bytes(file.read_bytes()[:20])
        assert not is_own(cut, MARKS), file
    assert not is_own(tmp_path, MARKS) and not is_own(tmp_path / "missing.json", MARKS)


@pytest.mark.parametrize("content", ["[]", "3", "null", "[" * 10**5, "", '{"mine": 1}', "\x00"])
def test_files_with_other_content_are_not_own(tmp_path: Path, content: str) -> None:
    """Also JSON that is no object; the folder is refused with the path of the file and advice."""
    (tmp_path / "run.json").write_text(content)
    assert not is_own(tmp_path / "run.json", MARKS)
    with pytest.raises(ValueError, match=r"run.json is damaged or does not belong to a run; restore .* new or empty"):
        check_folder_owner(tmp_path, {"run.json": MARKS}, "a run")


def test_one_complete_marker_is_enough(tmp_path: Path) -> None:
    """A damaged checkpoint does not make the folder foreign if the older checkpoint is whole."""
    markers = {"new": ("step",), "old": ("step",)}
    for name in markers:
        write_weights(tmp_path / name / "model.safetensors", {"x": torch.ones(3)}, {"step": "1"})
    (tmp_path / "new" / "state.json").write_text("{")
    check_folder_owner(tmp_path, markers, "a run")
    (tmp_path / "old" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="new.state.json is damaged"):
        check_folder_owner(tmp_path, markers, "a run")
