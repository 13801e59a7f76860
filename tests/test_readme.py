"""Every python block of the README and of the guides runs; links and figures are right."""

import inspect
import math
import re
from pathlib import Path

import pytest

import audiolm_pytorch
import musiclm_pytorch
from audiolm_pytorch import AudioLMSoundStream, MusicLMSoundStream, audio
from audiolm_pytorch.training import LoopSettings
from musiclm_pytorch import MusicLM

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = ROOT / "musiclm_pytorch" / "guides"
PAGES = [README, *sorted(ROOT.glob("*_pytorch/**/*.md"))]
BLOCKS = [
    pytest.param(page, block, id=f"{page.relative_to(ROOT)}-{n}")
    for page in PAGES
    for n, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))
]
REPOSITORY = "https://github.com/musiclm-pytorch/musiclm-pytorch/blob/main/"


def test_names_for_users_of_other_libraries_exist():
    """Every `Name(argument=)` and `Name.method(argument=)` in the right column of the table is accepted here."""
    text = (GUIDES / "migrating.md").read_text(encoding="utf-8")
    cells = [line.rsplit("|", 2)[1] for line in text.splitlines() if line.startswith("| ")]
    calls = [call for cell in cells for call in re.findall(r"`(\w+)(?:\.(\w+))?\(([^`]*)\)`", cell)]
    assert len(calls) > 12
    for name, method, arguments in calls:
        owner = next(getattr(room, name) for room in (musiclm_pytorch, audiolm_pytorch, audio) if hasattr(room, name))
        called = getattr(owner, method) if method else owner
        known = set(inspect.signature(called).parameters)
        if name.endswith("Trainer"):
            known |= set(LoopSettings.__dataclass_fields__)
        assert set(re.findall(r"(\w+)=", arguments)) <= known, name


def test_pages_have_blocks():
    """Without blocks the test below would pass without running anything."""
    assert len(BLOCKS) >= 12 and sum(block.values[0] == README for block in BLOCKS) >= 6


def test_readme_is_short():
    """A newcomer reads it in a few minutes; longer texts are beside the code that they explain."""
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_block_runs(page, block, tmp_path, monkeypatch):
    """A block that a newcomer pastes into a file works as it is."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_exist(page):
    """Links lead to files; those of the README are absolute, since PyPI shows it without the repository."""
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(REPOSITORY):
            assert (ROOT / link.removeprefix(REPOSITORY)).exists(), link
        elif not link.startswith("http"):
            assert page != README and (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.slow
def test_table_of_rates():
    """Tokens per second and bitrates follow from the other columns; rows of own codecs and stages equal the modules."""
    rows = {}
    for line in README.read_text(encoding="utf-8").partition("## Rates")[2].partition("## Train")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[1][:1].isdigit():
            rows[cells[0]] = tuple(float(cell) for cell in cells[1:])
    assert len(rows) == 11
    for _, frames_hz, codebooks, size, tokens_hz, kbps in rows.values():
        assert tokens_hz == pytest.approx(frames_hz * codebooks, abs=0.5)
        assert kbps == pytest.approx(tokens_hz * math.log2(size) / 1000, abs=0.005)
    musiclm = MusicLM.from_pretrained("tiny")
    codecs = {
        "included codec `codec_16khz`": musiclm.audio_lm.codec,
        "`MusicLMSoundStream`": MusicLMSoundStream(),
        "`AudioLMSoundStream`": AudioLMSoundStream(),
    }
    for name, codec in codecs.items():
        frames_hz = codec.target_sample_hz / codec.downsample_factor
        assert rows[name][:4] == (codec.target_sample_hz, frames_hz, codec.num_quantizers, codec.codebook_size)
    for name, row in {
        "semantic": "semantic stage of the included model",
        "coarse": "coarse stage",
        "fine": "fine stage",
    }.items():
        stream = musiclm.audio_lm.stages[name].layout.predicted[0]
        assert rows[row][1:4] == (float(stream.rate_hz), stream.num_levels, stream.vocab_size)
