"""The codec recipe and the table of code stability."""

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from audiolm_pytorch import SoundStream, SpectralSoundStream
from musiclm_pytorch.recipes import codec as recipe
from musiclm_pytorch.recipes.metrics import code_stability as metrics
from musiclm_pytorch.recipes.metrics.code_stability import code_stability, stability_table

RATE_HZ = 16000


def tiny_codec(seed: int = 0) -> SoundStream:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(dim=16, encoder_depth=1, decoder_depth=1, code_dim=8, codebook_size=16)
    return SpectralSoundStream(**sizes, rq_num_quantizers=4)


def clicks(period_seconds: float, num_seconds: int = 4) -> torch.Tensor:
    """Decaying clicks in a little noise, `[1, n]`."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num_seconds * RATE_HZ, generator=generator)
    phase = torch.arange(num_seconds * RATE_HZ) / RATE_HZ % period_seconds
    return (noise * (torch.exp(-30 * phase) + 1e-3) * 0.2)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus of four clips for training and two for validation."""
    for split, count in (("train", 4), ("valid", 2)):
        rows = []
        for number in range(count):
            name = f"{split}{number}.wav"
            soundfile.write(tmp_path / name, clicks(0.3 + 0.05 * number)[0].numpy(), RATE_HZ)
            rows.append(json.dumps({"audio": name, "caption": "clicks", "duration": 4.0, "sample_rate": RATE_HZ}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_rows_have_the_shares_of_equal_codes() -> None:
    """The shares of a change equal a count by hand, and the table has a row for each measurement."""
    codec, waves = tiny_codec().eval(), torch.cat([clicks(0.4, 2), clicks(0.3, 2)])
    rows = code_stability(codec, waves)
    same = codec.tokenize(waves * 10 ** (-1 / 20)) == codec.tokenize(waves)
    assert rows["gain -1 dB"] == pytest.approx([float(same[..., level].float().mean()) for level in range(4)])
    assert all(len(rows[name]) == 4 for name in ("own copy", "shift 5 ms", "usage", "mel distance", "beat"))
    assert len(rows["beat, wrong codes"]) == 3
    lines = stability_table({"tiny": rows}).splitlines()
    assert len(lines) == 2 + len(rows) and all("tiny" in line for line in lines[2:])


@pytest.mark.slow
def test_recipe_trains_all_rounds_and_continues(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second round continues the first; a second run trains nothing."""
    monkeypatch.setattr(recipe, "build_codec", tiny_codec)
    recipe.main((folder,), tmp_path / "run", scale=1e-4)
    rows = {part.name: (tmp_path / "run" / part.name / "metrics.jsonl").read_text() for part in recipe._ROUNDS}
    recipe.main((folder,), tmp_path / "run", scale=1e-4)
    assert all((tmp_path / "run" / name / "metrics.jsonl").read_text() == lines for name, lines in rows.items())
    start = str(tmp_path / "run" / "codec_16khz")
    metrics.main(folder, codecs=(start,), limit=2, json=tmp_path / "stability.json")
    assert "own copy" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "stability.json").read_text())["codecs"]) == {start}
