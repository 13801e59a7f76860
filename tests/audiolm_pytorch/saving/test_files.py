"""Sealed JSON files and digests: a changed bit in a file is an error."""

from pathlib import Path

import pytest
import torch
from torch import nn

from audiolm_pytorch.saving.files import (
    check_digest,
    digest_of_file,
    read_json,
    read_weights,
    temporary_folder,
    write_json,
)
from audiolm_pytorch.saving.modules import load_module, register, save_module


@register
class Twig(nn.Module):
    """A module with one weight."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.config = {"width": width}
        self.weight = nn.Parameter(torch.randn(width))


@register
class TwigOfAnotherClass(Twig):
    """The same weight in another class."""


def flipped(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_changed_bit_of_a_sealed_file_is_an_error(tmp_path: Path) -> None:
    """No bit is left out: values, names, white space, and the digest and its name."""
    path = tmp_path / "x.json"
    write_json(path, {"step": 12, "ä": [1.5, None]}, sealed=True)
    assert read_json(path) == {"step": 12, "ä": [1.5, None]}
    for bit in range(8 * path.stat().st_size):
        flipped(path, bit)
        with pytest.raises(ValueError, match="x.json (has changed since it was written|is not a JSON file)"):
            read_json(path)
        flipped(path, bit)
    assert read_json(path)["step"] == 12


def test_own_changes_of_a_sealed_file_are_possible(tmp_path: Path) -> None:
    """The message states how: without the digest, the file is an ordinary JSON file."""
    path = tmp_path / "x.json"
    write_json(path, {"temperature": 0.9}, sealed=True)
    text = path.read_text().replace("0.9", "0.8")
    path.write_text(text)
    with pytest.raises(ValueError, match='remove the line "sha256" to use your own changes'):
        read_json(path)
    path.write_text(text[: text.index(",\n")] + "\n}\n")
    assert read_json(path) == {"temperature": 0.8}


@pytest.mark.parametrize("obj", [{"sha256": 5}, {"files": {"a": "0" * 64}}, ["0" * 64], {"a": "0" * 63}])
def test_other_files_with_digests_are_read(tmp_path: Path, obj: object) -> None:
    """Only the last entry "sha256" is a seal."""
    write_json(tmp_path / "x.json", obj)
    assert read_json(tmp_path / "x.json") == obj


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_every_changed_bit_of_a_saved_module_is_an_error(tmp_path: Path, file: str) -> None:
    """Weights, header, class, config and further entries."""
    save_module(Twig(), tmp_path, extra={"note": "made by a test"})
    path = tmp_path / file
    for bit in range(0, 8 * path.stat().st_size, 3):
        flipped(path, bit)
        with pytest.raises(ValueError, match=file):
            load_module(tmp_path)
        flipped(path, bit)
    load_module(tmp_path)


def test_digest_of_a_missing_or_changed_file(tmp_path: Path) -> None:
    """The error names the file."""
    path = tmp_path / "x"
    with pytest.raises(ValueError, match="there is no file .*x"):
        check_digest(path, "")
    path.write_bytes(b"a" * 3_000_000)
    digest = digest_of_file(path)
    check_digest(path, digest)
    flipped(path, 9_000_000)
    with pytest.raises(ValueError, match="x has changed since it was written"):
        check_digest(path, digest)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    for read in (lambda: check_digest(path, digest), lambda: read_weights(path)):
        with pytest.raises(ValueError, match="x is a pointer of Git LFS; download the file with git lfs pull"):
            read()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_of_others_are_not_overwritten(tmp_path: Path, name: str) -> None:
    """A saved module is replaced, also one whose config was edited; files of the user are named in an error."""
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=f"{name} exists, and was not written by this library; move it away"):
        save_module(Twig(), tmp_path)
    assert (tmp_path / name).read_text() == '{"mine": 1}' and len(list(tmp_path.iterdir())) == 1
    (tmp_path / name).unlink()
    save_module(Twig(), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"width": 3', '"width": 4'))
    save_module(Twig(), tmp_path)
    with pytest.raises(
        ValueError, match="contains a saved Twig, which a TwigOfAnotherClass would replace; move it away"
    ):
        save_module(TwigOfAnotherClass(), tmp_path)
    load_module(tmp_path, expect=Twig)


def test_folders_of_killed_saves_are_removed(tmp_path: Path) -> None:
    """The folder of a process that still writes stays."""
    (tmp_path / ".writing-killed").mkdir()
    (tmp_path / ".writing-killed" / "model.safetensors").write_bytes(b"half")
    with temporary_folder(tmp_path) as active:
        save_module(Twig(), tmp_path)
        assert active.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
