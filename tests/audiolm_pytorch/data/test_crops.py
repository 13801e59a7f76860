"""Crops: the same instants at every rate, and nothing but a function of seed, epoch and index."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.data.crops import Crop, CropDataset
from audiolm_pytorch.data.manifest import AudioItem, load_items


def same(left: Crop, right: Crop) -> bool:
    """Whether two crops hold the same bits."""
    waves = all(torch.equal(left.waves[hz], right.waves[hz]) for hz in left.waves)
    return waves and (left.start_seconds, left.ends_file) == (right.start_seconds, right.ends_file)


@pytest.fixture
def items(write_folder: Callable[..., Path]) -> list[AudioItem]:
    """Three files of two seconds at 24 kHz."""
    return load_items(write_folder(seconds=2.0)).items


def test_a_crop_at_the_rate_of_a_16_bit_file_is_exact(items: list[AudioItem]) -> None:
    """Guards the 16-bit cache: a common file keeps all its bits, and `start_seconds` is the position of the crop."""
    data = CropDataset(items, 0.5, [24000])
    for epoch in range(5):
        crop = data.get(epoch, 1)
        whole, _ = read_audio(items[1].path)
        start = round(crop.start_seconds * 24000)
        assert torch.equal(crop.waves[24000], whole[0, start : start + 12000])


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize("file_hz", [8000, 24000, 44100])
def test_all_rates_show_the_same_instants(write_folder: Callable[..., Path], file_hz: int, cache_bytes: int) -> None:
    """Guards equal instants at different rates, with and without the cache."""
    items = load_items(write_folder(seconds=1.5, sample_hz=file_hz)).items
    data = CropDataset(items, 0.4, [16000, 24000, 16000], cache_bytes=cache_bytes)
    for epoch in range(6):
        crop = data.get(epoch, 0)
        assert list(crop.waves) == [16000, 24000]
        for hz, wave in crop.waves.items():
            whole, _ = read_audio(items[0].path, hz)
            start = round(crop.start_seconds * hz)
            assert wave.shape == (round(0.4 * hz),) and wave.dtype == torch.float32
            # 2e-2: a file at 44.1 kHz reaches 16 kHz through 24 kHz, whose filter takes a little of the noise at 8 kHz.
            tolerance = 2e-2 if file_hz == 44100 else 2e-4
            assert torch.allclose(wave, whole[0, start : start + len(wave)], atol=tolerance)


def test_crops_are_a_pure_function_of_seed_epoch_and_index(items: list[AudioItem]) -> None:
    """Guards resuming: the same bits in another process, in any order."""
    first, second = (CropDataset(items, 0.5, [24000, 16000], seed=3) for _ in range(2))
    asked = [(epoch, index) for epoch in range(4) for index in range(3)]
    forward = {place: first.get(*place) for place in asked}
    assert all(same(forward[place], second.get(*place)) for place in reversed(asked))
    assert len({crop.start_seconds for (_, index), crop in forward.items() if index == 0}) > 1
    other = CropDataset(items, 0.5, [24000], seed=4)
    assert [other.get(*place).start_seconds for place in asked] != [forward[place].start_seconds for place in asked]


def test_a_small_cache_keeps_the_first_files_in_any_order_of_use(items: list[AudioItem]) -> None:
    """Guards resuming with a full cache: which files are kept must not depend on which came first."""
    one_file = 2 * items[0].num_samples
    first, second = (CropDataset(items, 0.5, [24000, 16000], cache_bytes=one_file) for _ in range(2))
    forward = [first.get(0, index) for index in range(3)]
    backward = [second.get(0, index) for index in (2, 1, 0)][::-1]
    assert all(same(left, right) for left, right in zip(forward, backward, strict=True))
    assert (first._scales > 0).tolist() == (second._scales > 0).tolist() == [True]


def test_starts_lie_on_the_40_ms_grid_and_reach_both_ends(items: list[AudioItem]) -> None:
    """Guards whole frames of tokens, and the marks of beginnings and endings of files."""
    data = CropDataset(items, 1.6, [24000])
    crops = [data.get(epoch, 0) for epoch in range(120)]
    steps = [crop.start_seconds * 25 for crop in crops]
    assert np.allclose(steps, np.round(steps)) and set(np.round(steps)) == set(range(11))
    for crop in crops:
        assert crop.ends_file == (crop.start_seconds == 0.4)


def test_the_end_of_a_file_between_two_grid_points_is_marked(write_tone: Callable[..., Path], tmp_path: Path) -> None:
    """Guards files whose length is not a multiple of 40 ms: their last crop ends less than a frame before the end."""
    write_tone("a.wav", seconds=1.03, sample_hz=16000)
    data = CropDataset(load_items(tmp_path).items, 0.8, [16000])
    crops = [data.get(epoch, 0) for epoch in range(60)]
    assert {round(crop.start_seconds, 2): crop.ends_file for crop in crops} == {
        0.0: False, 0.04: False, 0.08: False, 0.12: False, 0.16: False, 0.2: True,
    }  # fmt: skip


def test_a_short_file_gives_all_it_has_without_padding(write_tone: Callable[..., Path], tmp_path: Path) -> None:
    """Guards against silence that a model would learn as music."""
    path = write_tone("a.wav", seconds=0.3, sample_hz=16000)
    crop = CropDataset(load_items(tmp_path).items, 1.0, [16000, 24000]).get(7, 0)
    assert crop.waves[16000].shape == (4800,) and crop.waves[24000].shape == (7200,)
    assert crop.ends_file and crop.start_seconds == 0
    assert torch.allclose(crop.waves[24000], read_audio(path, 24000)[0][0], atol=1e-4)


def test_no_length_means_whole_files(items: list[AudioItem]) -> None:
    """Guards encoders that receive every file once and whole."""
    crop = CropDataset(items, None, [16000, 24000]).get(5, 2)
    assert crop.waves[16000].shape == (32000,) and crop.waves[24000].shape == (48000,)
    assert crop.ends_file and crop.start_seconds == 0


def test_stereo_of_another_rate_among_the_files(tmp_path: Path, write_tone: Callable[..., Path]) -> None:
    """Guards the mixed folder: a 44.1 kHz stereo mp3 among 24 kHz files gives crops like all others."""
    write_tone("a.wav", seconds=1.0)
    tone = 0.5 * np.sin(2 * np.pi * 300 * np.arange(44100) / 44100)
    soundfile.write(tmp_path / "b.mp3", np.stack([tone, tone], axis=1), 44100)
    data = CropDataset(load_items(tmp_path).items, 0.5, [24000])
    crop = data.get(0, 1)
    assert crop.waves[24000].shape == (12000,)
    assert crop.waves[24000].abs().max().item() == pytest.approx(0.5, abs=0.03)


def test_samples_beyond_full_scale_are_not_clipped(tmp_path: Path) -> None:
    """Guards float files and loud mp3 files, whose decoded peaks exceed one, from distortion by the 16-bit cache."""
    wave = 2.5 * np.sin(np.linspace(0, 60, 16000))
    soundfile.write(tmp_path / "loud.wav", wave, 16000, subtype="FLOAT")
    crop = CropDataset(load_items(tmp_path).items, None, [16000]).get(0, 0)
    np.testing.assert_allclose(crop.waves[16000].numpy(), wave, atol=1e-4)


def test_a_changed_crop_does_not_change_the_cache(items: list[AudioItem]) -> None:
    """Guards the shared memory: augmenting a crop in place must not touch the next one."""
    data = CropDataset(items, 0.5, [24000])
    before = data.get(0, 0).waves[24000].clone()
    data.get(0, 0).waves[24000].mul_(0)
    assert torch.equal(data.get(0, 0).waves[24000], before)


def test_a_file_that_vanished_is_named(items: list[AudioItem]) -> None:
    """Guards the message when the disk changes during training."""
    data = CropDataset(items, 0.5, [24000])
    items[0].path.unlink()
    with pytest.raises(ValueError, match=r"000\.wav: no such file"):
        data.get(0, 0)


def test_impossible_settings_are_refused(items: list[AudioItem]) -> None:
    """Guards the constructor and the index."""
    with pytest.raises(ValueError, match="items and rates_hz must not be empty"):
        CropDataset([], 1.0, [16000])
    with pytest.raises(ValueError, match="multiples of 25 Hz"):
        CropDataset(items, 1.0, [16001])
    with pytest.raises(ValueError, match="at least one sample at .* got seconds="):
        CropDataset(items, 0.0, [16000])
    with pytest.raises(IndexError, match="index 3 is out of range; the data set has 3 files"):
        CropDataset(items, 1.0, [16000]).get(0, 3)


@pytest.mark.parametrize("seconds", [1e18, 1e19])
def test_an_endless_crop_is_the_whole_file(items: list[AudioItem], seconds: float) -> None:
    """Guards against numbers of samples that no integer can hold."""
    assert same(CropDataset(items, seconds, [24000]).get(0, 1), CropDataset(items, None, [24000]).get(0, 1))
