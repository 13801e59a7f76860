"""Audio in and out: every file that users have, exact times, honest errors."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiolm_pytorch.audio.files import decoded_info, peak_safe, read_audio, write_audio
from audiolm_pytorch.audio.mel import MelSpectrogram, mel_filterbank
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audio.stream import AudioInfo, AudioSource


def sine(tone_hz: float, sample_hz: int) -> torch.Tensor:
    """One second of a tone; in double precision, since float32 phases of a second are already noisy."""
    return torch.sin(2 * torch.pi * tone_hz * torch.arange(sample_hz, dtype=torch.float64) / sample_hz).float()


RATE_PAIRS = [(24000, 16000), (44100, 24000), (44100, 16000), (16000, 24000), (8000, 24000), (48000, 44100)]


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
@pytest.mark.parametrize("channels", [1, 2])
def test_written_audio_reads_back(tmp_path: Path, suffix: str, channels: int) -> None:
    """Guards writing and reading of every format offered, and that nothing but the file is left behind."""
    phase = torch.arange(4800) * 2 * torch.pi * 440 / 24000
    wave = torch.stack([0.5 * torch.sin(phase), 0.25 * torch.cos(phase)])[:channels]
    path = tmp_path / "new" / f"sound{suffix}"
    write_audio(path, wave, 24000)
    back, hz = read_audio(path, channels=None)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert hz == 24000 and back.shape == wave.shape and back.dtype == torch.float32
    assert (back - wave).abs().max() < (0.05 if suffix in (".ogg", ".mp3") else 1 / 32000)
    assert AudioSource(path).info == AudioInfo(24000, 4800, channels)


def test_one_dimensional_wave_is_mono_and_loud_samples_are_clipped(tmp_path: Path) -> None:
    """Guards against 16-bit overflow turning loud samples into noise."""
    write_audio(tmp_path / "a.wav", torch.tensor([0.0, 3.0, -3.0, 0.5]), 16000)
    back, _ = read_audio(tmp_path / "a.wav")
    assert torch.allclose(back, torch.tensor([[0.0, 1.0, -1.0, 0.5]]), atol=1e-4)


def test_long_ogg_is_written(tmp_path: Path) -> None:
    """Guards against libsndfile overflowing its stack on Vorbis files of some minutes."""
    write_audio(tmp_path / "long.ogg", torch.zeros(2_000_000), 8000)
    assert AudioSource(tmp_path / "long.ogg").info.num_samples == 2_000_000


def test_invalid_writes_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    """Guards the old file and the folder when a write is refused or fails."""
    old = tmp_path / "old.wav"
    write_audio(old, torch.zeros(8), 8000)
    before = old.read_bytes()
    for name, wave, hz, message in [
        ("x.mp4", torch.zeros(8), 8000, "cannot write .mp4; use one of .wav"),
        ("old.wav", torch.tensor([0.0, float("nan")]), 8000, "NaN"),
        ("x.wav", torch.zeros(0), 8000, r"at least one sample, got shape \(0,\)"),
        ("x.flac", torch.zeros(9, 8), 8000, "9 channels at 8000 Hz"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_audio(tmp_path / name, wave, hz)
    assert old.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["old.wav"]


def test_stereo_mp3_at_44100_becomes_mono_at_24000(tmp_path: Path) -> None:
    """Guards the most common file of users: a stereo mp3."""
    hz, tone_hz = 44100, 1000.0
    tone = 0.4 * np.sin(2 * np.pi * tone_hz * np.arange(hz) / hz)
    soundfile.write(tmp_path / "song.mp3", np.stack([tone, 0.5 * tone], axis=1), hz)
    wave, rate = read_audio(tmp_path / "song.mp3", 24000)
    length = decoded_info(tmp_path / "song.mp3").num_samples
    assert rate == 24000 and wave.shape == (1, -(-length * 24000 // hz))
    spectrum = torch.fft.rfft(wave[0, :24000]).abs()
    assert abs(spectrum.argmax().item() - tone_hz) <= 1  # bins of 1 Hz
    assert wave[0, 6000:18000].abs().max().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(("from_hz", "to_hz"), [*RATE_PAIRS, (24000, 24000)])
def test_a_part_equals_the_slice_of_the_whole(write_tone: Callable[..., Path], from_hz: int, to_hz: int) -> None:
    """Guards crops against clicks and shifts at their edges, at the start, inside and at the end of the file."""
    path = write_tone(seconds=1.5, sample_hz=from_hz)
    whole, _ = read_audio(path, to_hz)
    for start, duration in [(0.0, 0.25), (0.04, 0.5), (0.52, 0.333), (0.777, 0.4), (1.2, None), (1.4, 5.0)]:
        part, _ = read_audio(path, to_hz, start_seconds=start, duration_seconds=duration)
        begin = round(start * to_hz)
        end = whole.shape[1] if duration is None else min(begin + round(duration * to_hz), whole.shape[1])
        assert part.shape == (1, end - begin)
        assert torch.allclose(part, whole[:, begin:end], atol=2e-6)


def test_channels_are_averaged_kept_repeated_or_refused(write_tone: Callable[..., Path]) -> None:
    """Guards what happens to stereo files in mono models and the reverse."""
    stereo = write_tone("stereo.wav", channels=2)
    kept, _ = read_audio(stereo, channels=None)
    assert torch.allclose(read_audio(stereo)[0], kept.mean(dim=0, keepdim=True), atol=1e-7)
    assert torch.equal(read_audio(stereo, channels=2)[0], kept)
    mono = write_tone("mono.wav")
    assert torch.equal(read_audio(mono, channels=2)[0], read_audio(mono)[0].expand(2, -1))
    with pytest.raises(ValueError, match="has 2 channels, need 1 or 3"):
        read_audio(stereo, channels=3)


@pytest.fixture
def bad_files(tmp_path: Path, write_tone: Callable[..., Path]) -> dict[str, Path]:
    """Unusable files of users."""
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is not a sound\n" * 100)
    (tmp_path / "corrupt.flac").write_bytes(b"fLaC" + bytes(range(256)) * 20)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan, 0.1]), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "header-only.wav", np.zeros(0), 16000)
    (tmp_path / "folder.wav").mkdir()
    names = ["empty.wav", "text.wav", "corrupt.flac", "nan.wav", "header-only.wav", "folder.wav", "missing.wav"]
    return {name: tmp_path / name for name in names}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.wav", "the file is empty"),
        ("text.wav", "cannot be read as audio"),
        ("corrupt.flac", "cannot be read as audio"),
        ("nan.wav", "contains NaN or infinite samples"),
        ("header-only.wav", "no samples"),
        ("folder.wav", "is a folder"),
        ("missing.wav", "no such file"),
    ],
)
def test_unusable_files_are_named_with_a_reason(bad_files: dict[str, Path], name: str, reason: str) -> None:
    """Guards the message: file and reason."""
    with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
        decoded_info(bad_files[name])
    with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
        read_audio(bad_files[name])


def test_a_pipe_is_not_a_missing_file(tmp_path: Path) -> None:
    """Opening a pipe without a writer would wait for ever."""
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(ValueError, match=r"pipe.wav: is not a regular file"):
        read_audio(tmp_path / "pipe.wav")


def test_reading_after_the_end_is_an_error(write_tone: Callable[..., Path]) -> None:
    """Guards against empty crops that fail much later."""
    with pytest.raises(ValueError, match=r"start_seconds=2\.0 must be less than the 1\.000 s of the file"):
        read_audio(write_tone(), start_seconds=2.0)
    with pytest.raises(ValueError, match="start_seconds must be >= 0"):
        read_audio(write_tone(), start_seconds=-0.1)


@pytest.mark.parametrize(("from_hz", "to_hz"), RATE_PAIRS)
def test_resampled_length_is_the_exact_ceiling(rng: np.random.Generator, from_hz: int, to_hz: int) -> None:
    """Guards the promise that lengths can be computed without resampling."""
    for num_samples in [0, 1, 2, 3, 100, 999, 1000, int(rng.integers(2000, 9000))]:
        wave = torch.zeros(2, 1, num_samples)
        assert resample(wave, from_hz, to_hz).shape == (2, 1, -(-num_samples * to_hz // from_hz))


@pytest.mark.parametrize(("from_hz", "to_hz"), RATE_PAIRS)
def test_resampling_keeps_pitch_and_phase(from_hz: int, to_hz: int) -> None:
    """Guards against delay, the wrong ratio and the wrong level: a sine stays that sine."""
    wave, expected = sine(500, from_hz), sine(500, to_hz)
    middle = slice(to_hz // 10, to_hz - to_hz // 10)
    assert torch.allclose(resample(wave, from_hz, to_hz)[middle], expected[middle], atol=1e-4)


def test_resampling_removes_what_the_new_rate_cannot_hold() -> None:
    """Guards against aliasing: a tone above the new half rate must vanish, not fold back."""
    wave = sine(11000, 24000)
    assert resample(wave, 24000, 16000)[1600:-1600].abs().max() < 1e-3


def test_equal_rates_change_nothing_and_wrong_ones_are_refused(rng: np.random.Generator) -> None:
    """Guards the shortcut and the check of rates."""
    wave = torch.from_numpy(rng.standard_normal(100)).float()
    assert resample(wave, 16000, 16000) is wave
    with pytest.raises(ValueError, match="from_hz=16000 to to_hz=0"):
        resample(wave, 16000, 0)


def test_peak_safe_scales_down_only() -> None:
    """Guards quiet waves from a change, and loud ones from clipping."""
    quiet, loud = torch.tensor([0.1, -0.5]), torch.tensor([0.5, -2.0])
    assert peak_safe(quiet) is quiet
    assert torch.allclose(peak_safe(loud), torch.tensor([0.2475, -0.99]))
    assert peak_safe(torch.zeros(0)).numel() == 0


def naive_mel(wave: np.ndarray, hz: int, n_fft: int, win: int, hop: int, mels: int, power: float) -> np.ndarray:
    """A mel spectrogram in loops, written from the definitions."""

    def to_mel(f: float) -> float:
        return 1127.01048 * np.log(1 + f / 700)

    edges = [700 * (np.exp(to_mel(hz / 2) * i / (mels + 1) / 1127.01048) - 1) for i in range(mels + 2)]
    window = np.zeros(n_fft)
    for i in range(win):
        window[(n_fft - win) // 2 + i] = 0.5 - 0.5 * np.cos(2 * np.pi * i / win)
    padded = np.pad(wave, n_fft // 2, mode="reflect")
    frames = []
    for start in range(0, len(padded) - n_fft + 1, hop):
        magnitudes = np.abs(np.fft.fft(padded[start : start + n_fft] * window))[: n_fft // 2 + 1] ** power
        bands = []
        for low, mid, high in zip(edges, edges[1:], edges[2:], strict=False):
            total = 0.0
            for k, value in enumerate(magnitudes):
                f = k * hz / n_fft
                if low < f <= mid:
                    total += value * (f - low) / (mid - low)
                elif mid < f < high:
                    total += value * (high - f) / (high - mid)
            bands.append(total)
        frames.append(bands)
    return np.array(frames).T


@pytest.mark.parametrize(("win", "power"), [(256, 1.0), (200, 2.0)])
def test_mel_spectrogram_equals_a_naive_loop(rng: np.random.Generator, win: int, power: float) -> None:
    """Guards scale, filters, window placement, padding and power against an independent implementation."""
    wave = rng.standard_normal(1000).astype(np.float32)
    module = MelSpectrogram(sample_hz=16000, n_fft=256, win_length=win, hop_length=100, num_mels=20, power=power)
    mine = module(torch.from_numpy(wave)).numpy()
    oracle = naive_mel(wave, 16000, 256, win, 100, 20, power)
    assert mine.shape == oracle.shape == (20, module.num_frames(1000))
    np.testing.assert_allclose(mine, oracle, rtol=2e-4, atol=2e-4)


def test_mel_filters_cover_the_band_and_nothing_else() -> None:
    """Guards the edges: zero outside, and neighbours that add up to one between the first and the last centre."""
    filters = mel_filterbank(16000, 1024, 32, f_min_hz=500, f_max_hz=4000)
    bins_hz = torch.arange(513) * 16000 / 1024
    assert filters[:, (bins_hz <= 500) | (bins_hz >= 4000)].abs().max() < 1e-12
    inner = (bins_hz > 700) & (bins_hz < 3500)
    assert torch.allclose(filters.sum(dim=0)[inner], torch.ones(int(inner.sum())), atol=1e-5)


def test_mel_shapes_of_batches_and_short_waves(rng: np.random.Generator) -> None:
    """Guards leading dimensions, waves too short to reflect, frames without centring, and gradients at silence."""
    module = MelSpectrogram(sample_hz=16000, n_fft=128, win_length=24, hop_length=32, num_mels=8)
    waves = torch.from_numpy(rng.standard_normal((2, 3, 640))).float()
    assert module(waves).shape == (2, 3, 8, 21)
    assert torch.allclose(module(waves)[1, 2], module(waves[1, 2]), atol=1e-6)
    assert module(waves[..., :10]).shape == (2, 3, 8, 1)
    plain = MelSpectrogram(sample_hz=16000, n_fft=128, hop_length=32, num_mels=8, center=False)
    assert plain(waves).shape == (2, 3, 8, plain.num_frames(640)) == (2, 3, 8, 17)
    with pytest.raises(ValueError, match="wave has 127 samples, must have at least 128"):
        plain(waves[..., :127])
    silence = torch.zeros(640, requires_grad=True)
    module(silence).sum().backward()
    assert silence.grad is not None and torch.isfinite(silence.grad).all()


def test_mel_is_float32_under_autocast(rng: np.random.Generator) -> None:
    """Guards against bfloat16 spectrograms, whose error is audible as noise."""
    module = MelSpectrogram(sample_hz=16000, n_fft=256, hop_length=64, num_mels=16)
    wave = torch.from_numpy(rng.standard_normal(1000)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(wave)
    assert inside.dtype == torch.float32 and torch.equal(inside, module(wave))
    assert module.to(torch.bfloat16)(wave).dtype == torch.float32


def test_mel_settings_that_cannot_work_are_refused() -> None:
    """Guards against filters that are always zero and against windows longer than the transform."""
    with pytest.raises(ValueError, match="of 80 mel filters would be empty.* n_fft=128"):
        MelSpectrogram(sample_hz=16000, n_fft=128, hop_length=32, num_mels=80)
    with pytest.raises(ValueError, match="win_length <= n_fft"):
        MelSpectrogram(sample_hz=16000, n_fft=128, win_length=256, hop_length=32, num_mels=8)
    with pytest.raises(ValueError, match="f_max_hz <= 8000"):
        mel_filterbank(16000, 512, 20, f_max_hz=9000)
    with pytest.raises(ValueError, match="20 mel filters of n_fft=10000000 are too large"):
        mel_filterbank(16000, 10**7, 20)
    with pytest.raises(ValueError, match="num_mels must be at most"):
        mel_filterbank(16000, 512, 10**10)


def test_mel_adds_nothing_to_a_checkpoint() -> None:
    """Guards checkpoints from constants that would tie them to one front end."""
    assert not MelSpectrogram(sample_hz=16000, n_fft=256, hop_length=64, num_mels=16).state_dict()
