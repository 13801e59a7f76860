"""Chroma conditions of melodies."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from musiclm_pytorch.musicgen.chroma import ChromaConditioner
from musiclm_pytorch.musicgen.inputs import MusicRequest
from musiclm_pytorch.musicgen.melody import Melody
from musiclm_pytorch.musicgen.musicgen import MusicGen

HZ = 32_000


def tone(hz: float, seconds: float) -> torch.Tensor:
    """A sine `[n]`."""
    return 0.5 * torch.sin(2 * torch.pi * hz * torch.arange(round(seconds * HZ)) / HZ)


def test_scale_of_sines_gives_its_pitch_classes() -> None:
    """An octave of semitones from C; A is class 9. Frames at the borders of two tones are left out."""
    classes = [0, 2, 4, 5, 7, 9, 11, 1, 9]
    wave = torch.cat([tone(261.6256 * 2 ** (one / 12), 1.0) for one in classes])
    frames = ChromaConditioner().frames(wave.unsqueeze(0))[0].argmax(-1)
    for number, expected in enumerate(classes):
        inside = frames[int((number + 0.3) * HZ / 4096) : int((number + 0.7) * HZ / 4096)]
        assert inside.tolist() == [expected] * len(inside)


def test_silence_short_and_long_melodies() -> None:
    """Silence is class C; 30 s have 235 frames, longer music is cut, and shorter music is repeated."""
    chroma = ChromaConditioner()
    assert chroma.frames(torch.zeros(1, 100)).shape == (1, 5, 12)
    assert chroma(torch.zeros(2, 40_000)).argmax(-1).unique().tolist() == [0]
    assert chroma.frames(tone(440, 30).unsqueeze(0)).shape == (1, 235, 12)
    assert chroma(tone(440, 40)).shape == (1, 235, 12)
    wave = torch.cat((tone(440, 1), tone(523.25, 1)))
    short = chroma.frames(wave.unsqueeze(0))
    assert torch.equal(chroma(wave)[:, : short.shape[1]], short)
    assert torch.equal(chroma(wave)[:, short.shape[1] : 2 * short.shape[1]], short)


def test_items_of_unequal_length_equal_single_items() -> None:
    """Padding of a batch does not change the melody."""
    chroma, waves = ChromaConditioner(20), torch.randn(2, 50_000) * 0.1
    both = chroma(waves, torch.tensor([50_000, 30_000]))
    assert torch.equal(both[1], chroma(waves[1, :30_000])[0])


def test_equals_the_filter_bank_and_features_of_transformers() -> None:
    """The features with transformers' own filters, computed here as a sum over the spectrum."""
    audio_utils = pytest.importorskip("transformers.audio_utils")
    filters = torch.from_numpy(audio_utils.chroma_filter_bank(2**14, 12, HZ, tuning=0.0)).double()
    wave = torch.cat([tone(hz, 0.4) for hz in (440, 330, 262, 700, 1234)])
    spectrum = torch.stft(wave.double(), 2**14, 4096, window=torch.hann_window(2**14).double(), return_complex=True)
    expected = (filters @ spectrum.abs().square()).argmax(0)
    assert torch.equal(ChromaConditioner().frames(wave.unsqueeze(0))[0].argmax(-1), expected)


def test_melody_of_a_window_is_shifted_and_repeated() -> None:
    """Windows after the first start later in the melody, which is repeated modulo its length."""
    chroma = ChromaConditioner(16)  # 2 s
    melody = Melody(wave=torch.cat((tone(440, 2), tone(523.25, 2))))  # A, then C
    assert melody.window(chroma, None).argmax(-1)[:13].unique().tolist() == [9]
    assert melody.window(chroma, 2.0).argmax(-1)[2:13].unique().tolist() == [0]
    assert torch.equal(melody.window(chroma, 4.0), melody.window(chroma, 0.0))
    notes = Melody(frames=torch.eye(12))
    assert notes.window(chroma, None).argmax(-1).tolist() == [*range(12), 0, 1, 2, 3]
    assert notes.window(chroma, 3 * 4096 / HZ).argmax(-1).tolist() == [*range(3, 12), 0, 1, 2, 3, 4, 5, 6]


def melodies(**inputs: Any) -> list[Melody | None]:
    """Melodies of a request for a model of 16 chroma frames."""
    return MusicRequest(**inputs).melodies(HZ, ChromaConditioner(16))


def test_notes_have_the_pitch_classes_of_the_same_sines() -> None:
    """Notes of any octave, with pauses; a list of notes is one item, and a list of such lists has several items."""
    chroma = ChromaConditioner(16)
    notes = [(57, 0.0, 1.0), (84, 1.0, 2.0)]  # A, then C
    expected = Melody(wave=torch.cat((tone(440, 1), tone(261.6256, 1)))).window(chroma, None)
    one, several = melodies(melody=notes), melodies(melody=[notes, None, [(64, 0.5, 2)]])
    assert [len(one), len(several), several[1]] == [1, 3, None]
    assert torch.equal(one[0].window(chroma, None), expected)
    assert torch.equal(several[0].window(chroma, 0.7), one[0].window(chroma, 0.7))
    assert several[2].window(chroma, None).argmax(-1).unique().tolist() == [0, 4]


def test_chroma_arrays_are_melodies() -> None:
    """A numpy array or tensor `[f, 12]`, of one item or in a list."""
    vectors = np.eye(12, dtype=np.float32)[[9, 0, 4]]
    for value in (vectors, torch.from_numpy(vectors), [vectors], [torch.from_numpy(vectors)]):
        assert melodies(melody=value)[0].window(ChromaConditioner(16), None).argmax(-1)[:4].tolist() == [9, 0, 4, 9]


def test_stems_of_any_separator(tmp_path: Path) -> None:
    """Complaint: needs demucs. All stems except drums and bass are the melody; stereo and mono, waves and files."""
    chroma = ChromaConditioner(16)
    loud = {"drums": 3 * torch.randn(2, 2 * HZ), "bass": 2 * tone(370, 2)}
    write_audio(tmp_path / "vocals.wav", torch.stack((tone(440, 2), tone(440, 2))), HZ)
    stems = {
        **loud,
        "vocals": tmp_path / "vocals.wav",
        "other": 0.01 * np.random.default_rng(0).normal(size=(2, 2 * HZ)),
    }
    for item in (melodies(stems=stems)[0], melodies(stems=[None, stems])[1]):
        assert item.window(chroma, None).argmax(-1).unique().tolist() == [9]
    with pytest.raises(ValueError, match="stems 0 need a stem other than drums and bass"):
        melodies(stems=loud)
    with pytest.raises(ValueError, match="stems 0 must have equal lengths"):
        melodies(stems={**stems, "guitar": tone(440, 1)})
    with pytest.raises(ValueError, match="pass only one of them"):
        melodies(stems=stems, melody=tone(440, 1))


def test_stereo_file_has_the_melody_of_its_mono_mix(tmp_path: Path) -> None:
    """Files of two channels and of another rate are mixed and resampled."""
    wave = torch.stack((tone(440, 2), 0.3 * tone(523.25, 2)))
    write_audio(tmp_path / "bach.wav", wave.repeat_interleave(2, dim=1), 2 * HZ)
    expected = Melody(wave=wave.mean(dim=0)).window(ChromaConditioner(16), None)
    assert torch.equal(melodies(melody=tmp_path / "bach.wav")[0].window(ChromaConditioner(16), None), expected)


@pytest.mark.slow
def test_prompt_melody_and_text_together(tmp_path: Path) -> None:
    """Complaint: prompt with melody impossible. Each of them changes the result; items do not depend on the batch."""
    pytest.importorskip("transformers")
    from tests.helpers.published_musicgen import write_musicgen

    model = MusicGen.from_pretrained(write_musicgen(tmp_path, melody=True))
    model.transformer.max_seconds = 0.8
    melodies = [tone(440, 2), None, tone(523.25, 1)]
    prompts = [0.2 * torch.randn(5000), None, 0.2 * torch.randn(2000)]
    texts = ["drums", "a harp, slow piano", None]
    music = model.generate(texts=texts, melody=melodies, prompt=prompts, seconds=1.6, seeds=1, temperature=0)
    for item in range(3):
        alone = model.generate(
            texts=texts[item : item + 1],
            melody=melodies[item : item + 1],
            prompt=prompts[item : item + 1],
            seconds=1.6,
            temperature=0,
        )
        assert torch.equal(alone.tokens[0], music.tokens[item])
    other = model.generate(texts=texts, melody=tone(622.25, 2), prompt=prompts, seconds=1.6, seeds=1, temperature=0)
    assert not torch.equal(other.tokens[0], music.tokens[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(0, 12), "melody 0 is empty"),
        (torch.zeros(1, 0), "melody 0 is empty"),
        ([None, torch.full((5, 12), torch.nan)], "melody 1 contains NaN"),
        ([None, torch.full((9000,), torch.nan)], "melody 1 contains NaN"),
        (torch.ones(5, 12, dtype=torch.int64), "melody 0 must be a float tensor"),
        ([None, torch.zeros(1, 1, 9)], r"melody 1 must be \[n\] or \[c, n\]"),
        ([(60, 1.0, 0.5)], r"a note of melody 0 must be .* got \(60, 1.0, 0.5\)"),
        ([None, [(200, 0.0, 1.0)]], "a note of melody 1 must be"),
        ([[(60, 0.0)]], "a note of melody 0 must be"),
        ([None, []], "melody 1 has no notes"),
    ],
)
def test_wrong_melodies_are_named(wrong, message: str) -> None:
    """Waves and chroma vectors have the same checks, and the message has the number of the item."""
    request = MusicRequest(melody=wrong)
    with pytest.raises(ValueError, match=message):
        request.melodies(HZ, ChromaConditioner(16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_waves_of_all_float_dtypes_have_a_melody(dtype: torch.dtype) -> None:
    """The melody is float32, and equals that of the float32 wave."""
    chroma, wave = ChromaConditioner(16), tone(440, 1)
    assert torch.equal(chroma(wave.to(dtype)), chroma(wave))
