import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.codecs import SoundStream
from audiolm_pytorch.codecs.base import EncodedWave, StreamingCodec
from audiolm_pytorch.codecs.code_file import CodesInfo, StoredCodes, read_codes, write_codes
from audiolm_pytorch.codecs.transcode import FileCodec
from tests.helpers.fakes import FakeCodec

pytestmark = pytest.mark.usefixtures("low_rates")

INFO = CodesInfo("FakeCodec", "codec", 16, 800, 150, 1, 44100, 8268, 2)


def stored(codebook_size=16, **changes):
    """Ten frames of four levels."""
    return StoredCodes(torch.randint(codebook_size, (10, 4)), replace(INFO, codebook_size=codebook_size, **changes))


@pytest.mark.parametrize(
    ("codebook_size", "dtype"), [(2, "I16"), (1024, "I16"), (32768, "I16"), (32769, "I32"), (2**20, "I32")]
)
def test_written_codes_are_read_back(tmp_path, codebook_size, dtype):
    """Codes are stored in the smallest type that holds every code, with the metadata as text in the header."""
    path, written = tmp_path / "new" / "a.safetensors", stored(codebook_size)
    written.codes[0, 0] = codebook_size - 1
    write_codes(path, written)
    got = read_codes(path)
    assert torch.equal(got.codes, written.codes) and got.codes.dtype == torch.int64
    assert got.info == written.info
    with safe_open(path, framework="pt") as opened:
        assert opened.get_slice("codes").get_dtype() == dtype
        header = json.loads(opened.metadata()["audio_codes"])
    assert header["format_version"] == 1 and header["codec_fingerprint"] == "codec"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]


def test_bitrate_and_length():
    """150 samples at 800 Hz are 0.1875 s, in which 40 codes of 4 bits lie."""
    assert stored().seconds == 0.1875
    assert stored().kbps == pytest.approx(40 * 4 / 0.1875 / 1000)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(10, dtype=torch.long), r"\[f, q\].*\[10\]"),
        (torch.zeros(0, 4, dtype=torch.long), r"at least one frame"),
        (torch.zeros(10, 4), "float32"),
        (torch.full((10, 4), 16), r"0..15, got 16..16"),
        (torch.full((10, 4), -1), r"0..15, got -1..-1"),
    ],
)
def test_invalid_codes_raise(codes, message):
    """Wrong rank, no frames, no integers, out of range."""
    with pytest.raises(ValueError, match=message):
        StoredCodes(codes, INFO)


def damaged_files(folder):
    """Files that are no stored codes, each with words of the message."""
    header = {"format_version": 1, **vars(INFO)}
    codes = torch.zeros(10, 4, dtype=torch.int16)
    cases = {
        "other tensor": ({"weights": codes}, header, "is not a file of codes"),
        "two tensors": ({"codes": codes, "more": codes.clone()}, header, "is not a file of codes"),
        "no header": ({"codes": codes}, None, "is not a file of codes"),
        "no json": ({"codes": codes}, "{", "header is damaged"),
        "list": ({"codes": codes}, [1], "format_version None"),
        "version": (
            {"codes": codes},
            {**header, "format_version": 2},
            "format_version 2, but this release of the library reads 1",
        ),
        "lacking": ({"codes": codes}, {"format_version": 1}, "lacks .*codec_class"),
        "unknown": ({"codes": codes}, {**header, "more": 1}, "unknown entries .*more"),
        "range": ({"codes": codes + 16}, header, "must lie in 0..15"),
        "rank": ({"codes": codes[0]}, header, r"\[f, q\]"),
        "floats": ({"codes": codes.float()}, header, "must be int16 or int32, got torch.float32"),
        "bool rate": ({"codes": codes}, {**header, "sample_hz": True}, "sample_hz must be an integer"),
        "no rate": ({"codes": codes}, {**header, "sample_hz": 0}, "sample_hz must be .* at least 1 .* got 0"),
        "huge": ({"codes": codes}, {**header, "codebook_size": 2**70}, "codebook_size must be .* at most"),
        "no name": ({"codes": codes}, {**header, "codec_class": 3}, "codec_class must be a non-empty string"),
    }
    for name, (tensors, said, message) in cases.items():
        path = folder / f"{name}.safetensors"
        text = said if isinstance(said, str) else json.dumps(said)
        save_file(tensors, path, metadata={} if said is None else {"audio_codes": text})
        yield path, message
    junk = folder / "junk.safetensors"
    junk.write_bytes(b"\x00" * 40)
    yield junk, "not a readable safetensors file"
    yield folder / "none.safetensors", "no file"


def test_damaged_files_raise(tmp_path):
    """Only complete and consistent files are read; the message names the file and the fault."""
    for path, message in damaged_files(tmp_path):
        with pytest.raises(ValueError, match=message) as caught:
            read_codes(path)
        assert str(path) in str(caught.value)
    good = tmp_path / "good.safetensors"
    write_codes(good, stored())
    assert read_codes(good).info == INFO
    data = good.read_bytes()
    for place in (data.index(b"44100"), len(data) - 40):  # of the header, and of the codes
        good.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match="has changed since it was written"):
            read_codes(good)
    with pytest.raises(ValueError, match="ends in .safetensors"):
        write_codes(tmp_path / "a.bin", stored())


def test_codes_of_another_codec_raise():
    """Another codec, or a header that contradicts the codec, is an error."""
    codec = FakeCodec()
    stored().check_codec(codec, "codec")
    with pytest.raises(
        ValueError,
        match="from the codec FakeCodec other, got the codec FakeCodec codec; decode with the codec that encoded",
    ):
        stored(codec_fingerprint="other").check_codec(codec, "codec")
    changes = (
        {"num_samples": 10**12},
        {"num_samples": 161},
        {"original_num_samples": 1},
        {"channels": 2},
        {"sample_hz": 16000},
    )
    for one in changes:
        with pytest.raises(ValueError, match="frames and levels are .* in the file, but .* in the codec"):
            stored(**one).check_codec(codec, "codec")
    with pytest.raises(ValueError, match="frames and levels are .* in the file, but .* in the codec"):
        StoredCodes(torch.zeros(10, 5, dtype=torch.long), INFO).check_codec(codec, "codec")


class StreamingFake(FakeCodec, StreamingCodec):
    """The fake codec with streams that hold back what does not fill a frame, and one frame more."""

    class Encoding:
        def __init__(self, codec):
            self.codec, self.kept = codec, torch.zeros(1, 1, 0)

        def push(self, wave):
            wave = torch.cat([self.kept, wave], dim=-1)
            ready = max(wave.shape[-1] // 16 - 1, 0) * 16
            self.kept = wave[..., ready:]
            return self.codec.tokenize(wave[..., :ready]) if ready else torch.zeros(1, 0, 4, dtype=torch.long)

        def finish(self):
            return self.codec.tokenize(self.kept)

    class Decoding:
        def __init__(self, codec):
            self.codec, self.kept = codec, None

        def push(self, codes):
            codes = codes if self.kept is None else torch.cat([self.kept, codes], dim=1)
            self.kept = codes[:, -1:]
            return self.codec.decode_from_codebook_indices(codes[:, :-1])

        def finish(self):
            return self.codec.decode_from_codebook_indices(self.kept)

    encoder_latency_seconds, decoder_latency_seconds = 0.04, 0.02

    def encoder_stream(self):
        return self.Encoding(self)

    def decoder_stream(self):
        return self.Decoding(self)


class LoudFake(FakeCodec):
    """The fake codec on waves of loudness 1/2, of which only the scales know how loud they were."""

    has_scales = True

    def encode(self, wave):
        scales = wave.abs().amax(dim=(1, 2))[:, None]
        return EncodedWave(self.tokenize(wave / (2 * scales[..., None])), scales)

    def decode(self, codes, scales, num_samples=None):
        return super().decode_from_codebook_indices(codes, num_samples) * 2 * scales[..., None]


def small_codec(audio_channels=1):
    """A convolutional codec with random weights."""
    codec = SoundStream(
        channels=2,
        codebook_dim=8,
        codebook_size=16,
        rq_num_quantizers=3,
        strides=(2, 5),
        audio_channels=audio_channels,
        target_sample_hz=8000,
    )
    return codec.eval()


@pytest.mark.parametrize("make", [FakeCodec, StreamingFake, small_codec])
@pytest.mark.parametrize(("seconds", "sample_hz", "channels"), [(3.7, 44100, 2), (1.0, 8000, 1), (0.0002, 44100, 1)])
def test_a_file_has_the_codes_of_its_wave(tmp_path, write_tone, make, seconds, sample_hz, channels):
    """Any rate, channels and length, chunked or whole: the codes of tokenize, and equally many samples decoded."""
    codec = make()
    path = write_tone("sound.wav", seconds, sample_hz, channels=channels)
    wave = read_audio(path, codec.target_sample_hz)[0]
    got = FileCodec(codec).encode(path)
    assert torch.equal(got.codes, codec.tokenize(wave)[0])
    assert (got.info.num_samples, got.info.original_sample_hz) == (wave.shape[1], sample_hz)
    assert (got.info.original_num_samples, got.info.original_channels) == (round(seconds * sample_hz), channels)
    write_codes(tmp_path / "codes.safetensors", got)
    FileCodec(codec).decode(read_codes(tmp_path / "codes.safetensors"), tmp_path / "back.wav")
    back, rate = soundfile.read(tmp_path / "back.wav", dtype="float32")
    assert (len(back), rate) == (wave.shape[1], codec.target_sample_hz)
    wanted = codec.decode_from_codebook_indices(got.codes[None], num_samples=wave.shape[1])[0, 0]
    assert np.abs(back - wanted.detach().clamp(-1, 1).numpy()).max() < 1 / 16000


def test_scales_are_stored(tmp_path, write_tone):
    """The scales of a codec that normalises segments are stored and used for decoding."""
    codec, path = LoudFake(), write_tone("sound.wav")
    got = FileCodec(codec).encode(path)
    peak = read_audio(path, codec.target_sample_hz)[0].abs().max()
    assert torch.equal(got.scales, peak[None])
    assert got.kbps == pytest.approx(50 * 4 * 4 / 1000 + 32 / 1000)
    write_codes(tmp_path / "codes.safetensors", got)
    FileCodec(codec).decode(read_codes(tmp_path / "codes.safetensors"), tmp_path / "back.wav")
    wanted = codec.decode(got.codes[None], got.scales[None], num_samples=800)[0, 0]
    back = soundfile.read(tmp_path / "back.wav", dtype="float32")[0]
    assert np.abs(back - wanted.numpy()).max() < 1 / 16000
    with pytest.raises(ValueError, match="the file contains no scales, but the codec needs one scale per segment"):
        replace(got, scales=None).check_codec(codec, "codec")
    with pytest.raises(ValueError, match="the file contains scales, but the codec needs no scales"):
        got.check_codec(FakeCodec(), "codec")
    for scales in (torch.ones(1, 1), torch.ones(1).double(), torch.tensor([torch.nan]), -torch.ones(1)):
        with pytest.raises(ValueError, match="scales must be float32"):
            replace(got, scales=scales)


def test_original_rate_restores_the_length(tmp_path, write_tone):
    """Resampled to the original rate, a file has its original number of samples."""
    codec = StreamingFake()
    for seconds in (1.0, 1.2345):
        path = write_tone("sound.wav", seconds, 44100)
        FileCodec(codec).decode(FileCodec(codec).encode(path), tmp_path / "back.flac", original_rate=True)
        info = soundfile.info(tmp_path / "back.flac")
        assert (info.frames, info.samplerate) == (round(seconds * 44100), 44100)


def test_levels(tmp_path, write_tone):
    """Fewer levels are a prefix of the codes, when encoding and when decoding."""
    codec = FakeCodec()
    files, path = FileCodec(codec), write_tone("sound.wav")
    everything, two = files.encode(path), files.encode(path, num_levels=2)
    assert torch.equal(two.codes, everything.codes[:, :2])
    files.decode(two, tmp_path / "a.wav")
    files.decode(everything, tmp_path / "b.wav", num_levels=2)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    with pytest.raises(ValueError, match="1..4, got 5"):
        files.encode(path, num_levels=5)
    with pytest.raises(ValueError, match="1..2, got 3"):
        files.decode(two, tmp_path / "c.wav", num_levels=3)
    assert not (tmp_path / "c.wav").exists()


def test_stereo_codec_encodes_mono(tmp_path, write_tone):
    """A stereo codec repeats the channel of a mono file; five channels raise."""
    codec = small_codec(audio_channels=2)
    got = FileCodec(codec).encode(write_tone("mono.wav", 0.1))
    FileCodec(codec).decode(got, tmp_path / "back.wav")
    assert soundfile.info(tmp_path / "back.wav").channels == 2
    with pytest.raises(ValueError, match="five.wav: the file has 5 channels, need 1 or 2"):
        FileCodec(codec).encode(write_tone("five.wav", 0.1, channels=5))
