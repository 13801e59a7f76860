"""The README is short, its figures are right, and the names in the guide for users of other libraries exist."""

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


def test_readme_is_short():
    """A newcomer reads it in a few minutes; longer texts are beside the code that they explain."""
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150


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
