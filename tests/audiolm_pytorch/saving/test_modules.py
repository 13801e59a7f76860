"""Saved modules and files: what is written comes back, what does not fit is named, nothing is seen half written."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audiolm_pytorch.saving import files
from audiolm_pytorch.saving.files import read_json, read_weights, write_json, write_weights
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.modules import build_module, load_module, module_spec, read_config, register, save_module
from audiolm_pytorch.saving.weights import load_weights, weights_of
from audiolm_pytorch.training.ema import WeightEMA
from tests.helpers.small_models import small_soundstream


@register
class Leaf(nn.Module):
    """A saved module with a parameter, buffers of several types and one that is not kept."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.randn(width, 2))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("scratch", torch.randn(4), persistent=False)

    @property
    def config(self) -> dict[str, Any]:
        return {"width": self.width}


@register
class Tree(nn.Module):
    """A composed module whose parts are nested specs; two of its tensors are tied."""

    def __init__(self, leaf: nn.Module, sizes: tuple[int, ...] = (2, 3)) -> None:
        super().__init__()
        self.leaf, self.sizes = leaf, tuple(sizes)
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    @property
    def config(self) -> dict[str, Any]:
        return {"leaf": module_spec(self.leaf), "sizes": self.sizes}


@register
class Bush(nn.Module):
    """Another registered class."""

    config: dict[str, Any] = {}


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    """All parameters and persistent buffers are equal, in value and type."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def test_saved_module_comes_back(tmp_path: Path) -> None:
    """Nested configs, tied weights, integer, bool and empty buffers."""
    tree = Tree(Leaf(width=5))
    save_module(tree, tmp_path / "a" / "tree", extra={"note": "tree"})
    loaded = load_module(tmp_path / "a" / "tree", expect=Tree)
    assert isinstance(loaded, Tree) and not loaded.training and loaded.sizes == (2, 3)
    assert_same_state(tree, loaded)
    assert loaded.second.weight is loaded.first.weight
    assert read_config(tmp_path / "a" / "tree")["note"] == "tree"
    assert sorted(path.name for path in (tmp_path / "a" / "tree").iterdir()) == ["config.json", "model.safetensors"]


def test_saving_twice_gives_the_same_bytes_and_keeps_other_files(tmp_path: Path) -> None:
    """A save is a function of the module, and the folder's other files are not its business."""
    tree = Tree(Leaf())
    (tmp_path / "README.md").write_text("mine")
    save_module(tree, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_module(tree, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert first["README.md"] == b"mine"


def test_half_precision_file_fills_a_float32_module(tmp_path: Path) -> None:
    """A file of half the size is loaded as float32; integers keep their type; overflow is refused."""
    leaf = Leaf(width=64)
    save_module(leaf, tmp_path / "half", dtype=torch.float16)
    save_module(leaf, tmp_path / "full")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert stored["weight"].dtype == torch.float16 and stored["count"].dtype == torch.int64
    loaded = load_module(tmp_path / "half")
    assert loaded.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.weight, leaf.weight, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        leaf.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="weight has values up to 1e\\+06, too large for torch.float16"):
        save_module(leaf, tmp_path / "half", dtype=torch.float16)


def test_fingerprint_tells_modules_apart() -> None:
    """It changes with any weight, buffer or config, and with nothing else."""
    torch.manual_seed(0)
    leaf = Leaf()
    same = Leaf()
    same.load_state_dict(leaf.state_dict())
    prints = [fingerprint_of(leaf), fingerprint_of(Leaf(width=4))]
    assert fingerprint_of(same.eval()) == prints[0] and len(prints[0]) == 16
    same.scratch += 1
    assert fingerprint_of(same) == prints[0]
    same.count += 1
    prints.append(fingerprint_of(same))
    with torch.no_grad():
        leaf.weight[0, 0] += 1e-6
    prints.append(fingerprint_of(leaf))
    assert len(set(prints)) == 4
    assert fingerprint_of(nn.Linear(2, 2).to(torch.bfloat16)) != fingerprint_of(nn.Linear(2, 2))


def test_fingerprint_survives_the_file(tmp_path: Path) -> None:
    """Shards made with a module are recognised after it was saved and loaded."""
    tree = Tree(Leaf())
    save_module(tree, tmp_path)
    assert fingerprint_of(load_module(tmp_path)) == fingerprint_of(tree)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    """Missing folder, wrong class, unknown class or format, damaged JSON: the message names the folder."""
    with pytest.raises(ValueError, match="nowhere is not a saved module"):
        load_module(tmp_path / "nowhere")
    save_module(Leaf(), tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} holds a Leaf, but a Tree is needed"):
        load_module(tmp_path, expect=Tree)
    config = read_config(tmp_path)
    for change, message in [
        ({"class": "Weed"}, "unknown module class 'Weed'"),
        ({"format_version": 2}, "format_version 2, but this release of the library reads 1"),
        ({"format_version": True}, "format_version True"),
        ({"weights_sha256": "0" * 64}, "model.safetensors has changed since it was written"),
        ({"config": {"width": 9}}, r"weight \(3, 2\) instead of \(9, 2\)"),
    ]:
        write_json(tmp_path / "config.json", config | change)
        with pytest.raises(ValueError, match=message):
            load_module(tmp_path)
    (tmp_path / "config.json").write_text('{"class": "Leaf"')
    with pytest.raises(ValueError, match="config.json is not a JSON file"):
        load_module(tmp_path)
    write_json(tmp_path / "config.json", config)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="there is no file .*model.safetensors"):
        load_module(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    """A pickle under the right name is refused, not executed."""
    save_module(Leaf(), tmp_path)
    torch.save(Leaf().state_dict(), tmp_path / "model.safetensors")
    digest = files.digest_of_file(tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", read_config(tmp_path) | {"weights_sha256": digest})
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_module(tmp_path)


def test_keys_that_differ_are_listed() -> None:
    """Missing and surplus names are told, the first few of many; the module is left as it was."""
    leaf = Leaf()
    before = leaf.weight.detach().clone()
    weights = weights_of(leaf)
    surplus = {f"extra.{number}": torch.zeros(1) for number in range(10)}
    with pytest.raises(ValueError, match="missing: count; not known to the module: extra.0, .*extra.7 and 2 more"):
        load_weights(leaf, {name: value + 0 for name, value in weights.items() if name != "count"} | surplus)
    assert torch.equal(leaf.weight, before)


def test_tied_weights_are_missing_only_together() -> None:
    """A tied tensor may come under either name; under none it is missing."""
    tree = Tree(Leaf())
    weights = weights_of(tree)
    assert "first.weight" in weights and "second.weight" not in weights
    other = {("second.weight" if name == "first.weight" else name): value for name, value in weights.items()}
    fresh = Tree(Leaf())
    load_weights(fresh, other)
    assert torch.equal(fresh.first.weight, tree.first.weight)
    with pytest.raises(ValueError, match=r"missing: first.weight, second.weight"):
        load_weights(fresh, {name: value for name, value in weights.items() if name != "first.weight"})


def test_overlapping_and_transposed_memory_is_saved(tmp_path: Path) -> None:
    """Views of one memory that are not tied, and tensors out of row order, come back with their values."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(4, 3)
            self.register_buffer("whole", whole)
            self.register_buffer("part", whole[1:3])
            self.turned = nn.Parameter(torch.randn(5, 2).t())

    views, fresh = Views(), Views()
    write_weights(tmp_path / "x.safetensors", weights_of(views))
    load_weights(fresh, read_weights(tmp_path / "x.safetensors")[0])
    assert_same_state(views, fresh)


def test_interrupted_save_is_noticed_or_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before, between and after the renames: the old module, an error that says so, or the new one."""
    old, new = Leaf(), Leaf()
    save_module(old, tmp_path)
    original, calls = os.replace, 0
    for fatal_call, expected in [(1, old), (4, None), (99, new)]:
        save_module(old, tmp_path)
        calls = 0

        def replace(source: Any, target: Any, fatal_call: int = fatal_call) -> None:
            nonlocal calls
            calls += 1
            if calls == fatal_call:
                raise KeyboardInterrupt
            original(source, target)

        monkeypatch.setattr(files.os, "replace", replace)
        try:
            save_module(new, tmp_path)
        except KeyboardInterrupt:
            assert expected is not new
        monkeypatch.setattr(files.os, "replace", original)
        if expected is None:
            with pytest.raises(ValueError, match="model.safetensors has changed since it was written"):
                load_module(tmp_path)
        else:
            assert_same_state(load_module(tmp_path), expected)


def test_only_registered_modules_with_a_config_are_saved(tmp_path: Path) -> None:
    """What could not be loaded again is refused when it is saved."""

    class Homeless(nn.Module):
        pass

    class Silent(nn.Module):
        pass

    with pytest.raises(TypeError, match="Homeless is not a registered module class"):
        save_module(Homeless(), tmp_path)
    with pytest.raises(TypeError, match="needs an attribute or property `config`"):
        save_module(register(Silent)(), tmp_path)
    with pytest.raises(ValueError, match="may not be called \\['class'\\]"):
        save_module(Leaf(), tmp_path, extra={"class": "Tree"})
    with pytest.raises(ValueError, match="needs the keys 'class' and 'config'"):
        build_module({"class": "Leaf"})
    assert list(tmp_path.iterdir()) == []


def test_two_classes_of_one_name_are_refused() -> None:
    """A shadowed class would load another's weights; a class defined again replaces itself."""

    def make(module: str) -> type[nn.Module]:
        made = type("Bush", (Bush,), {"__module__": module})
        made.__qualname__ = Bush.__qualname__
        return made

    with pytest.raises(ValueError, match="the name Bush is taken by"):
        register(make("elsewhere"))
    again = make(Bush.__module__)
    assert register(again) is again
    assert type(build_module({"class": "Bush", "config": {}})) is again
    register(Bush)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """What JSON cannot hold leaves the old file as it was."""
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"ä": [1, 2.5, None]})
    assert read_json(path) == {"ä": [1, 2.5, None]}
    for bad in (float("nan"), {1, 2}, Path("x")):
        with pytest.raises(ValueError, match="x.json: the object cannot be stored as JSON"):
            write_json(path, {"bad": bad})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, 2.5, None]}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]
    with pytest.raises(ValueError, match="there is no file"):
        read_json(tmp_path / "none.json")


def test_state_that_is_no_tensor_is_refused() -> None:
    """Extra state of a module would be lost without a word."""

    class Odd(nn.Module):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(ValueError, match="_extra_state of Odd is a dict"):
        weights_of(Odd())


def test_files_of_other_programs_load_with_a_digest_of_the_weights(tmp_path: Path) -> None:
    """A config and weights written by hand are a saved module, if the config has the digest of the weights."""
    leaf = Leaf()
    tensors: dict[str, Tensor] = weights_of(leaf)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"format_version": 1, "class": "Leaf", "config": {"width": 3}}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=r"config.json lacks the keys \['weights_sha256'\]; save the module again"):
        load_module(tmp_path)
    digest = files.digest_of_file(tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {**config, "weights_sha256": digest})
    assert_same_state(load_module(tmp_path, device=torch.device("cpu")), leaf)


@pytest.mark.parametrize("config", [{"breadth": 3}, {"width": "wide"}, [], {"width": None}], ids=str)
def test_config_of_another_release_is_named(tmp_path: Path, config: Any) -> None:
    """Arguments that a constructor does not know are an error of one line with the folder, not a TypeError."""
    save_module(Leaf(), tmp_path)
    write_json(tmp_path / "config.json", read_config(tmp_path) | {"config": config})
    with pytest.raises(ValueError, match=f"{tmp_path}: the config of Leaf does not fit this release"):
        load_module(tmp_path)


def test_saved_files_have_the_usual_permissions(tmp_path: Path) -> None:
    """safetensors writes files for their owner alone; a model that others are given must be readable."""
    (tmp_path / "plain").touch()
    save_module(Leaf(), tmp_path / "module")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "module").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_fingerprint_is_computed_once_for_the_same_weights(monkeypatch):
    """Guards speed and truth: asked again it costs no hashing; a written weight, another weight, another fact does."""
    hashed = []
    monkeypatch.setattr(
        "audiolm_pytorch.saving.fingerprint.digest_of", lambda spec, weights: hashed.append(spec) or str(len(hashed))
    )
    module = torch.nn.Linear(2, 2)
    assert [fingerprint_of(module), fingerprint_of(module)] == ["1", "1"]
    with torch.no_grad():
        module.weight.add_(1.0)
    assert fingerprint_of(module) == "2"
    module.load_state_dict(torch.nn.Linear(2, 2).state_dict())
    assert fingerprint_of(module) == "3"
    module.bias = torch.nn.Parameter(module.bias.detach())
    assert fingerprint_of(module) == "4"
    module.config = {"layer": 3}
    assert [fingerprint_of(module), fingerprint_of(module)] == ["5", "5"]
    assert fingerprint_of(torch.nn.Linear(2, 2)) == "6"


def test_fingerprint_follows_exchanged_memory():
    """Guards what no version counts: rounding to half and back, and averages computed with in place of the weights."""
    module = torch.nn.Linear(3, 3)
    first = fingerprint_of(module)
    seen = {first}
    for change in (module.half, module.float):
        change()
        seen.add(fingerprint_of(module))
        assert fingerprint_of(module) == fingerprint_of(copy.deepcopy(module))
    assert len(seen) == 3
    average = WeightEMA(dict(module.named_parameters()), decay=0.5)
    with torch.no_grad():
        module.weight.add_(1.0)
    raw = fingerprint_of(module)
    with average.in_place():
        assert fingerprint_of(module) == fingerprint_of(copy.deepcopy(module)) != raw
    assert fingerprint_of(module) == raw


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6 imports its compiler")
def test_loading_does_not_import_the_compiler_of_torch() -> None:
    """The meta version of some functions imports sympy and torch._dynamo, a second of computing time."""
    code = (
        "import sys; from musiclm_pytorch import MusicLM as M; M.from_pretrained('tiny'); print('sympy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_writes_to_the_data_of_weights_change_the_fingerprint():
    """torch does not count these writes, which copies of averaged weights use."""
    module = small_soundstream()
    fingerprint = module.fingerprint()
    for weight in module.parameters():
        weight.data.mul_(1.5)
    assert module.fingerprint() != fingerprint
