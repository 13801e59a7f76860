import numpy as np
import pytest
import soundfile
import torch

from audiolm_pytorch.audio.files import read_audio, write_audio
from audiolm_pytorch.audio.resample import StreamingResampler, resample
from audiolm_pytorch.audio.stream import AudioSource, AudioWriter
from tests.helpers.full_disk import full_disk


@pytest.mark.parametrize(("from_hz", "to_hz"), [(44100, 16000), (24000, 16000), (16000, 48000), (8000, 8000)])
def test_streaming_resampler_is_resample(from_hz, to_hz):
    """Chunks of any size, concatenated, equal the whole to the last bit, in length too."""
    for num_samples, size in ((1, 1), (100, 7), (30001, 1000), (30001, 30001)):
        wave = torch.randn(2, num_samples)
        stream = StreamingResampler(from_hz, to_hz, channels=2)
        got = torch.cat([*map(stream.push, wave.split(size, dim=1)), stream.finish()], dim=1)
        assert torch.equal(got, resample(wave, from_hz, to_hz))


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
@pytest.mark.parametrize(
    ("sample_hz", "channels"),
    [pytest.param(None, None, marks=pytest.mark.slow), (16000, 1), pytest.param(24000, 2, marks=pytest.mark.slow)],
)
def test_source_is_read_audio(tmp_path, suffix, sample_hz, channels):
    """The concatenated blocks of a file equal `read_audio`; `info` is exact afterwards."""
    path = tmp_path / f"sound{suffix}"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal((200_000, 2)), 44100)
    source = AudioSource(path, sample_hz, channels)
    blocks = list(source)
    assert len(blocks) > 1
    wanted, rate = read_audio(path, sample_hz, channels)
    assert torch.equal(torch.cat(blocks, dim=1), wanted)
    assert (source.num_samples, source.sample_hz) == (wanted.shape[1], rate)
    assert (source.info.sample_hz, source.info.channels) == (44100, 2)


def test_source_repeats_mono_and_refuses_five_channels(write_tone):
    """Mono is repeated for stereo; five channels for two raise an error."""
    stereo = torch.cat(list(AudioSource(write_tone("mono.wav"), channels=2)), dim=1)
    assert stereo.shape[0] == 2 and torch.equal(stereo[0], stereo[1])
    with pytest.raises(ValueError, match=r"five.wav: the file has 5 channels, need 1 or 2"):
        list(AudioSource(write_tone("five.wav", channels=5), channels=2))


def test_writer_shows_a_file_only_when_it_is_complete(tmp_path):
    """Chunks become one file; an error, or nothing written, leaves no file and no folder."""
    path = tmp_path / "new" / "sound.wav"
    pieces = 0.1 * torch.randn(3, 2, 1000)
    with AudioWriter(path, 16000, 2) as writer:
        for piece in pieces:
            writer.write(piece)
            assert not path.exists()
    got = soundfile.read(path, dtype="float32")[0].T
    assert np.abs(got - torch.cat(list(pieces), dim=1).numpy()).max() < 1 / 32000
    with pytest.raises(RuntimeError, match="stop"):
        with AudioWriter(tmp_path / "a.wav", 16000, 2) as writer:
            writer.write(pieces[0])
            raise RuntimeError("stop")
    with pytest.raises(ValueError, match="a.wav: no samples were written"):
        with AudioWriter(tmp_path / "other" / "a.wav", 16000, 2):
            pass
    with pytest.raises(ValueError, match="NaN"):
        with AudioWriter(tmp_path / "other" / "a.wav", 16000, 2) as writer:
            writer.write(pieces[0] * torch.nan)
    with pytest.raises(ValueError, match="a.txt: cannot write .txt"):
        AudioWriter(tmp_path / "a.txt", 16000, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]
    assert [entry.name for entry in path.parent.iterdir()] == ["sound.wav"]


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_a_comment_changes_no_sample(tmp_path, suffix):
    """The comment field holds any text; the wave is that of a file without comment."""
    wave, comment = 0.1 * torch.randn(1000), 'two\nlines, "quotes", 笛子 ' + "x" * 4000
    write_audio(tmp_path / f"a{suffix}", wave, 16000)
    write_audio(tmp_path / f"b{suffix}", wave, 16000, comment=comment)
    with soundfile.SoundFile(tmp_path / f"b{suffix}") as file:
        escaped = comment.encode("ascii", "backslashreplace").decode()
        # 2,000 bytes, of which two letters have three each
        assert file.comment == (escaped[:2000] if suffix == ".mp3" else comment[:1996])
    assert torch.equal(read_audio(tmp_path / f"a{suffix}")[0], read_audio(tmp_path / f"b{suffix}")[0])
    write_audio(tmp_path / f"c{suffix}", wave, 16000, comment="a\ud800")
    assert soundfile.SoundFile(tmp_path / f"c{suffix}").comment == r"a\ud800"


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_a_full_disk_is_never_silent(tmp_path, suffix):
    """libsndfile writes the last block of FLAC and Ogg files when it closes them, and reports no error there."""
    path, wave = tmp_path / f"sound{suffix}", 0.1 * torch.randn(20_000)
    write_audio(path, wave, 16000)
    num_bytes = path.stat().st_size
    path.unlink()
    for missing in (1, 20, 500, num_bytes // 2, num_bytes):
        with full_disk(num_bytes - missing), pytest.raises((OSError, ValueError), match="the file cannot be written"):
            write_audio(path, wave, 16000)
    assert list(tmp_path.iterdir()) == []
    with full_disk(num_bytes):
        write_audio(path, wave, 16000)
    assert read_audio(path)[0].shape == (1, 20_000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_streams_take_every_float_type(dtype):
    """A chunk of any float type, also with a gradient, is resampled as float32; a wrong shape is named."""
    wave = torch.rand(1, 4000).to(dtype).requires_grad_()
    stream = StreamingResampler(16000, 8000, 1)
    output = torch.cat([stream.push(wave), stream.finish()], dim=1)
    assert torch.equal(output, resample(wave.float(), 16000, 8000))
    with pytest.raises(ValueError, match=r"wave must be \[1, n\], got shape \[4000\]"):
        StreamingResampler(16000, 8000, 1).push(wave[0])


def test_parts_and_channels_that_no_file_has(write_tone):
    """Numbers of channels, begins and durations outside the file are named; an endless part is the whole file."""
    path = write_tone("tone.wav", 1.0, 8000)
    for channels in (0, -1):
        for read in (read_audio, AudioSource):
            with pytest.raises(ValueError, match="channels must be in 1..1024"):
                read(path, channels=channels)
    with pytest.raises(ValueError, match="start_seconds=inf must be less than the 1.000 s"):
        read_audio(path, start_seconds=float("inf"))
    with pytest.raises(ValueError, match="duration_seconds=1e-09 must be at least one sample"):
        read_audio(path, duration_seconds=1e-9)
    for seconds in (1e18, float("inf")):
        assert read_audio(path, duration_seconds=seconds)[0].shape == (1, 8000)


def test_file_names_of_the_writer(tmp_path, monkeypatch):
    """A name of 255 letters is written; of other names the true reason is told, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    name = "a" * 251 + ".wav"
    write_audio(name, torch.zeros(10), 8000)
    for path, reason in (
        (f"a{name}", "[Nn]ame too long"),
        (f"{name}/b.wav", "File exists"),
        ("b\0.wav", "cannot contain the character NUL"),
    ):
        with pytest.raises((OSError, ValueError), match=reason) as caught:
            write_audio(path, torch.zeros(10), 8000)
        assert "free space" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    writer = AudioWriter("c.wav", 8000, 1)
    with writer:
        writer.write(torch.zeros(1, 10))
    with pytest.raises(ValueError, match="the file is complete"):
        writer.write(torch.zeros(1, 10))


@pytest.mark.parametrize("to_hz", [8000, 16000])
def test_a_finished_stream_accepts_no_more(to_hz: int) -> None:
    """The rest of the wave is returned once; a further chunk would be resampled with old samples."""
    stream = StreamingResampler(8000, to_hz, channels=1)
    first = stream.push(torch.rand(1, 800))
    assert first.shape[1] + stream.finish().shape[1] == 800 * to_hz // 8000 and stream.finish().shape == (1, 0)
    with pytest.raises(ValueError, match="the wave is finished; create another StreamingResampler"):
        stream.push(torch.rand(1, 800))


def test_the_target_of_a_link_is_written(tmp_path):
    """A link, also one whose target does not exist yet, stays a link, as with other programs that write files."""
    link, target = tmp_path / "link.wav", tmp_path / "disk" / "sound.flac"
    link.symlink_to(target)
    for num_samples in (10, 20):
        write_audio(link, torch.zeros(num_samples), 8000)
        assert link.is_symlink() and soundfile.info(target).frames == num_samples
    assert [file.name for file in target.parent.iterdir()] == [target.name]
