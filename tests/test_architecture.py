"""The shape of the house: what may import what, and what library code never does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "audiolm_pytorch").rglob("*.py"), *(ROOT / "musiclm_pytorch").rglob("*.py")])
COMMANDS = {"cli"}  # folders of commands, which may print
every_file = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@every_file
def test_file_keeps_the_house_rules(file):
    """No assert, prompt, pickle or torch.load in libraries; print only in commands; files and functions stay short."""
    text = file.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 500
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} has more than 80 lines"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "input", "a prompt in library code"
            assert node.func.id != "print" or file.parent.name in COMMANDS, f"print in line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), "torch.load unpickles"
    assert not {"pickle", "joblib", "torchaudio", "fairseq"} & imported_modules(tree)


def test_audiolm_never_names_musiclm():
    """The lower package must be usable without the upper one."""
    lower = [file for file in FILES if file.relative_to(ROOT).parts[0] == "audiolm_pytorch"]
    assert len(lower) > 20
    assert [file for file in lower if "musiclm_pytorch" in file.read_text()] == []


@pytest.mark.parametrize("package", ["audiolm_pytorch", "musiclm_pytorch"])
def test_import_needs_no_optional_package(package):
    """transformers, torchaudio, fairseq, matplotlib and a network are not needed to import."""
    program = f"""
import socket, sys
for name in ("transformers", "torchaudio", "fairseq", "matplotlib", "sklearn"):
    sys.modules[name] = None
def refuse(*args, **kwargs): raise OSError("network")
socket.socket.connect = refuse
import {package}
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_import_of_both_packages_leaves_heavy_packages_out():
    """accelerate and others cost seconds and are imported where they are used."""
    program = """
import sys, audiolm_pytorch, musiclm_pytorch
print([name for name in ("accelerate", "transformers", "sklearn", "scipy", "matplotlib", "huggingface_hub", "tyro")
       if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
