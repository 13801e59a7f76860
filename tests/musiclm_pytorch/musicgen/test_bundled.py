"""The bundled MusicGen: it loads offline and follows a melody."""

from pathlib import Path

import pytest
import torch

import musiclm_pytorch
from audiolm_pytorch.audio.resample import resample
from musiclm_pytorch import MusicGen
from musiclm_pytorch.evaluation.metrics.chroma import PitchClasses

FOLDER = Path(musiclm_pytorch.__file__).parent / "bundled" / "musicgen_tiny"


def test_the_bundled_model_generates_music_with_text_and_melody() -> None:
    """A name is enough, the folder has at most 15 MB."""
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 15e6
    model = MusicGen.from_pretrained("musicgen_tiny")
    music = model.generate(texts="a slow waltz on the cello", seconds=0.5, melody=[(69, 0.0, 0.5)], seeds=0)
    assert music.waves[0].shape == (8000,) and music.waves[0].isfinite().all() and music.waves[0].abs().max() > 0.001


@pytest.mark.slow
def test_the_bundled_model_follows_melodies() -> None:
    """Three melodies of notes: most frames have the pitch class of the own melody, few that of another one.

    60 unseen melodies in unseen timbres gave the similarities in the card; chance is 1 in 12.
    """
    model, pitch_classes = MusicGen.from_pretrained("musicgen_tiny"), PitchClasses()
    scales = ((60, 64, 67, 72, 67, 64), (62, 65, 69, 74, 69, 65), (66, 70, 73, 66, 70, 73))
    melodies = [[(pitch, 0.8 * i, 0.8 * (i + 1)) for i, pitch in enumerate(scale)] for scale in scales]
    music = model.generate(texts=["a tune played on the piano"] * 3, melody=melodies, seconds=4.8, seeds=0)
    waves = torch.stack([resample(wave, music.sample_hz, 32_000) for wave in music.waves])
    found = pitch_classes(waves)  # at 32 kHz, frames of 0.128 s
    times = torch.arange(found.shape[1]) * 4096 / 32_000
    asked = torch.tensor([[scale[min(int(time / 0.8), 5)] % 12 for time in times.tolist()] for scale in scales])
    own = (found == asked).float().mean()
    other = (found == asked.roll(1, dims=0)).float().mean()
    assert own > 0.35 and own > 2 * other, (float(own), float(other))
