"""The pages of the documentation: every block of code runs, every command exists, and the site builds."""

import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest

from musiclm_pytorch.cli import main
from musiclm_pytorch.cli.commands import parse_options, split_command
from tests.helpers.public_doors import exports

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/musiclm-pytorch/musiclm-pytorch/blob/main/"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*_pytorch/**/*.md"))]
# `python` and `bash` run; the commands of `sh` and of blocks without a language are only parsed
LANGUAGES = {"python", "bash", "sh", "", "text", "json", "yaml", "toml"}
every_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


class Block(NamedTuple):
    """A block of code, with the number of lines before it."""

    language: str
    code: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^ *```([^\n]*)\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(match[1].strip(), match[2], text[: match.start(2)].count("\n")) for match in found]


def commands_of(code: str) -> list[list[str]]:
    """The words after `musiclm` of every command of a block; pipes and redirections end a command."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        for part in re.split(r" && | \| | > ", line):
            words = shlex.split(part, comments=True)
            if words[:1] == ["musiclm"]:
                commands.append(words[1:])
            elif "musiclm_pytorch.cli" in words:  # torchrun ... -m musiclm_pytorch.cli
                commands.append(words[words.index("musiclm_pytorch.cli") + 1 :])
    return commands


def modules_of(code: str) -> list[str]:
    return re.findall(r"python -m ((?:audiolm|musiclm)_pytorch[.\w]*)", code)


@every_page
def test_languages_of_blocks_are_known(page):
    """A block with a misspelt language would neither run nor be highlighted."""
    blocks = blocks_of(page)
    assert {block.language for block in blocks} <= LANGUAGES
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks)


@pytest.mark.slow
@every_page
def test_commands_exist(page):
    """Every `musiclm` command of a page is accepted with its options, and every `python -m` module exists."""
    for block in blocks_of(page):
        if block.language in ("bash", "sh", ""):
            for words in commands_of(block.code):
                name, rest = split_command(words)
                assert not name or parse_options(name, rest), words
            for module in modules_of(block.code):
                assert importlib.util.find_spec(module), module


RUN = [page for page in PAGES if {"python", "bash"} & {block.language for block in blocks_of(page)}]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=[str(page.relative_to(ROOT)) for page in RUN])
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    """A reader who follows a page from top to bottom in one folder meets no error; every block imports what it uses."""
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page):
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), {"__name__": "__main__"})
        elif block.language == "bash":
            for words in commands_of(block.code):
                assert main(words) == 0, f"{words}\n{capsys.readouterr().err}"


def test_many_pages_run():
    """Without blocks the test above would pass without running anything."""
    languages = [block.language for page in RUN for block in blocks_of(page)]
    assert len(RUN) >= 10 and languages.count("python") >= 20


@every_page
def test_links_exist(page):
    """Links lead to files; those of the README are absolute, since PyPI shows it without the repository."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(REPOSITORY):
            assert (ROOT / link.removeprefix(REPOSITORY)).exists(), link
        elif not link.startswith("http"):
            assert page.name != "README.md" or page.parent != ROOT, link
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_public_names_are_documented():
    """Every exported function and class, and every public method and property of its own, has a docstring."""
    missing = []
    for name, value in exports(modules=True).items():
        if not inspect.getdoc(value):
            missing.append(name)
        for member, attribute in vars(value).items() if inspect.isclass(value) else ():
            is_code = inspect.isroutine(attribute) or isinstance(attribute, property | classmethod | staticmethod)
            if is_code and member[0] != "_" and not inspect.getdoc(getattr(value, member)):
                missing.append(f"{name}.{member}")
    assert missing == []


@pytest.mark.slow
def test_site_builds(tmp_path):
    """mkdocs builds the site without a warning; it has every public name, and loads nothing from the network."""
    pytest.importorskip("mkdocs", reason='needs pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs.yml", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert built.returncode == 0, built.stderr[-3000:]
    inventory = zlib.decompress((tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    documented = {line.split()[0] for line in inventory.splitlines()}
    assert exports(modules=True).keys() - documented == set()
    loads = re.compile(r"""<(?:script|img|iframe)[^>]* src="?http|<link[^>]* rel="?stylesheet[^>]* href="?http""")
    assert [page for page in tmp_path.rglob("*.html") if loads.search(page.read_text(encoding="utf-8"))] == []
