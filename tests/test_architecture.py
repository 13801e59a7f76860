"""The structure of the packages: which room may import which, and what library code must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "audiolm_pytorch").rglob("*.py"), *(ROOT / "musiclm_pytorch").rglob("*.py")])
COMMANDS = {"cli"}  # folders of commands, which may print
# The one file that reads pickles; it calls nothing that they name.
PICKLE_READER = ROOT / "audiolm_pytorch" / "saving" / "restricted_pickle.py"
# The one file that uses beartype; its decorator `typed` raises TypeErrors of one line.
TYPE_CHECKER = ROOT / "audiolm_pytorch" / "checks" / "types.py"
every_file = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])


# Rooms of each package, and the rooms of the same package that they may import. musiclm_pytorch may import every
# room of audiolm_pytorch, never the reverse. Metrics (`evaluation`) are below the models that report them in training.
ROOMS = {
    "audiolm_pytorch": {
        "checks": "",
        "saving": "checks",
        "audio": "checks",
        "nn": "checks saving",
        "tokens": "checks",
        "conditioning": "checks nn saving",
        "data": "audio checks saving",
        "training": "audio checks data nn saving",
        "codecs": "audio checks data nn saving training",
        "semantic": "audio checks data nn saving training",
        "lm": "audio checks codecs conditioning data nn saving semantic tokens training",
        "generation": "audio checks codecs conditioning lm nn semantic tokens training",
        "audiolm": "audio checks codecs conditioning generation lm nn saving semantic tokens",
    },
    "musiclm_pytorch": {
        "evaluation": "",
        "mulan": "evaluation",
        "quantizer": "mulan",
        "melody": "mulan quantizer",
        "generation": "mulan quantizer",
        "musiclm": "generation melody pretrained quantizer",
        "musicgen": "evaluation mulan",
        "pretrained": "melody mulan musicgen musiclm quantizer",
        "web": "generation mulan musicgen musiclm",
        "pipeline": "melody mulan musicgen musiclm pretrained quantizer",
        "cli": "evaluation generation mulan musicgen musiclm pipeline pretrained quantizer web",
        "recipes": "cli evaluation generation melody mulan musicgen musiclm pipeline pretrained quantizer",
    },
}


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.slow
@every_file
def test_file_keeps_the_house_rules(file):
    """No assert, prompt, pickle or torch.load in libraries; print only in commands; files and functions stay short."""
    text = file.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 450
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} has more than 80 lines"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "input", "a prompt in library code"
            assert node.func.id != "print" or file.parent.name in COMMANDS, f"print in line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), "torch.load unpickles"
    assert file == TYPE_CHECKER or "beartype" not in imported_modules(tree), "use @typed"
    banned = {"pickle", "joblib", "torchaudio", "fairseq"} & imported_modules(tree)
    assert banned == ({"pickle"} if file == PICKLE_READER else set())


def test_audiolm_never_names_musiclm():
    """The lower package must be usable without the upper one."""
    lower = [file for file in FILES if file.relative_to(ROOT).parts[0] == "audiolm_pytorch"]
    assert len(lower) > 20
    assert [file for file in lower if "musiclm_pytorch" in file.read_text()] == []


@pytest.mark.slow
@pytest.mark.parametrize("package", ["audiolm_pytorch", "musiclm_pytorch"])
def test_import_needs_no_optional_package(package):
    """transformers, torchaudio, fairseq, matplotlib and a network are not needed to import."""
    program = f"""
import socket, sys
for name in ("transformers", "torchaudio", "fairseq", "matplotlib", "sklearn"):
    sys.modules[name] = None
def refuse(*args, **kwargs): raise OSError("network")
socket.socket.connect = refuse
from {package} import *
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


@pytest.mark.slow
def test_import_of_both_packages_leaves_heavy_packages_out():
    """accelerate and others cost seconds and are imported where they are used."""
    program = """
import sys
from audiolm_pytorch import *
from musiclm_pytorch import *
heavy = ("accelerate", "huggingface_hub", "matplotlib", "scipy", "sklearn", "torch._dynamo", "transformers", "tyro",
         "vector_quantize_pytorch")
print([name for name in heavy if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], check=True, timeout=600, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports_of(node: ast.AST) -> set[str]:
    """Modules of the two packages that a file imports, in functions too, but not under TYPE_CHECKING."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports are not used"
            names = {f"{child.module}.{alias.name}" for alias in child.names}
            found |= {name if name in MODULES else child.module for name in names}
        else:
            found |= imports_of(child)
    return found & MODULES.keys()


GRAPH = {name: imports_of(ast.parse(file.read_text())) - {name} for name, file in MODULES.items()}


def test_no_circle_of_imports():
    """A file can be read and moved alone: no module imports itself through others."""
    left = dict(GRAPH)
    while leaves := {name for name, imports in left.items() if not imports & left.keys()}:
        left = {name: imports for name, imports in left.items() if name not in leaves}
    assert sorted(left) == []


@pytest.mark.parametrize(("package", "room"), [(package, room) for package, rooms in ROOMS.items() for room in rooms])
def test_room_imports_only_rooms_of_the_table(package, room):
    """The direction of the rooms; an import against it means to move the function, or to change the table."""
    allowed = {f"{package}.{name}" for name in (room, *ROOMS[package][room].split())}
    wrong = [
        f"{name} imports {imported}"
        for name, imports in GRAPH.items()
        if ".".join(name.split(".")[:2]) == f"{package}.{room}"
        for imported in sorted(imports)
        if imported.split(".")[0] == package and ".".join(imported.split(".")[:2]) not in allowed
    ]
    assert wrong == []


def test_table_of_rooms_is_complete_and_roots_hold_only_the_model():
    """Roots of the packages hold `__init__.py` and the model; every room is in the table."""
    for package, model in (("audiolm_pytorch", "audiolm"), ("musiclm_pytorch", "musiclm")):
        files = {file for file in FILES if file.relative_to(ROOT).parts[0] == package}
        assert {file.name for file in files if file.parent == ROOT / package} == {"__init__.py", f"{model}.py"}
        rooms = {file.relative_to(ROOT).parts[1] for file in files if file.parent != ROOT / package}
        assert rooms | {model} == ROOMS[package].keys()


def test_nothing_imports_the_recipes():
    """The recipes know the toy corpora; the library does not."""
    wrong = [
        f"{name} imports {imported}"
        for name, imports in GRAPH.items()
        if not name.startswith("musiclm_pytorch.recipes")
        for imported in imports
        if imported.startswith("musiclm_pytorch.recipes")
    ]
    assert wrong == []
