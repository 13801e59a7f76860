"""Every public function that receives a wave accepts the same shapes, and refuses the rest in the same words."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiolm_pytorch.audio import MelSpectrogram, peak_safe, read_audio, resample, write_audio
from audiolm_pytorch.audio.resample import StreamingResampler
from audiolm_pytorch.audio.stream import AudioSource, AudioWriter
from audiolm_pytorch.audio.waves import checked_wave, mono_waves, with_channels
from audiolm_pytorch.codecs import SoundStream
from audiolm_pytorch.data.batches import collate_crops
from audiolm_pytorch.data.crops import Crop
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.generation.wrappers import FineTransformerWrapper
from audiolm_pytorch.lm.stages import FineTransformer
from tests.helpers.fakes import SIZES
from tests.helpers.tiny_mulan import tiny_mulan
from tests.helpers.toy_audiolm import audiolm_of

NUM = 3200


def codec(channels: int = 1, levels: int = 2) -> SoundStream:
    """A tiny codec at 16 kHz."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(codebook_size=16, rq_num_quantizers=levels, codebook_dim=8, channels=4, strides=(4, 8))
    return SoundStream(**sizes, audio_channels=channels).eval()


def fine_stage() -> FineTransformer:
    """A fine stage for `codec()`, which has 500 frames per second."""
    return FineTransformer(num_coarse_quantizers=1, num_fine_quantizers=1, codebook_size=16, rate_hz=500, **SIZES)


@cache
def mono_doors() -> dict[str, Callable[[Any], Any]]:
    """Functions of a mono wave, each with a result that has one row per item."""
    from audiolm_pytorch.semantic import KMeansTokenizer
    from audiolm_pytorch.semantic.best_rq.model import BestRQ, BestRQEncoder

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(dim=32, depth=1, heads=2, dim_head=16, sample_hz=8000, num_mels=20, n_fft=256)
    encoder = BestRQEncoder(**sizes, hop_length=40).eval()
    tokenizer = KMeansTokenizer(encoder=encoder, layer=1, centroids=torch.randn(8, 32))
    mulan, soundstream = tiny_mulan(), codec()
    fine = FineTransformerWrapper(fine_stage(), codec=soundstream)
    best_rq = BestRQ(encoder, codebook_size=8, num_targets=1)

    return {
        "Codec.tokenize": soundstream.tokenize,
        "Codec.encode": lambda wave: soundstream.encode(wave).codes,
        "SoundStream.forward": lambda audio: soundstream(audio, return_recons_only=True),
        "EncoderStream.push": lambda wave: soundstream.encoder_stream().push(wave),
        "KMeansTokenizer": tokenizer,
        "KMeansTokenizer, another rate": lambda wave: tokenizer(wave, input_sample_hz=16000),
        "BestRQEncoder.features": lambda wave: encoder.features(wave)[0],
        "BestRQ front end": lambda wave: encoder.front_end(wave)[0],
        "BestRQ": lambda wave: best_rq(wave).hidden,
        "MuLaN.get_audio_latents": mulan.get_audio_latents,
        "MuLaN.get_long_audio_latents": mulan.get_long_audio_latents,
        "MuLaN audio tower": mulan.audio,
        "fine stage": lambda wave: fine(wave).loss.expand(len(checked_wave(wave))),
    }


DOORS = (
    "Codec.tokenize",
    "Codec.encode",
    "SoundStream.forward",
    "EncoderStream.push",
    "KMeansTokenizer",
    "KMeansTokenizer, another rate",
    "BestRQEncoder.features",
    "BestRQ front end",
    "BestRQ",
    "MuLaN.get_audio_latents",
    "MuLaN.get_long_audio_latents",
    "MuLaN audio tower",
    "fine stage",
)


@pytest.mark.parametrize("door", DOORS)
def test_a_mono_wave_may_have_one_two_or_three_axes(door: str) -> None:
    """`[n]`, `[b, n]` and `[b, 1, n]` have the same result everywhere."""
    call = mono_doors()[door]
    wave = 0.1 * torch.randn(2, NUM)
    results = []
    for same in (wave, wave.unsqueeze(1)):
        torch.manual_seed(0)
        results.append(call(same))
    assert len(results[0]) == 2 and torch.equal(results[0], results[1])
    torch.manual_seed(0)
    alone = call(wave[0])
    torch.manual_seed(0)
    assert len(alone) == 1 and torch.equal(alone, call(wave[:1]))


REFUSED = {
    "two channels": (
        torch.zeros(1, 2, NUM),
        r"\[n\], \[b, n\] or \[b, 1, n\].*got shape \[1, 2, 3200\].*mean\(dim=1\)",
    ),
    "channels last": (torch.zeros(1, NUM, 1), r"got shape \[1, 3200, 1\]; samples are the last axis"),
    "sparse": (torch.zeros(1, NUM).to_sparse(), r"must be a dense tensor, got torch.sparse_coo; .*to_dense"),
    "four axes": (torch.zeros(1, 1, 1, NUM), r"got shape \[1, 1, 1, 3200\]"),
    "no axis": (torch.tensor(0.5), r"got shape \[\]"),
    "no samples": (torch.zeros(1, 0), "not empty, got shape"),
    "no items": (torch.zeros(0, NUM), "not empty, got shape"),
    "int16": (torch.zeros(1, NUM, dtype=torch.int16), "float tensor .* got torch.int16; divide integers"),
    "uint8": (torch.zeros(1, NUM, dtype=torch.uint8), "float tensor .* got torch.uint8"),
    "bool": (torch.zeros(1, NUM, dtype=torch.bool), "float tensor .* got torch.bool"),
    "complex": (torch.zeros(1, NUM, dtype=torch.complex64), "float tensor .* got torch.complex64"),
    "NaN": (torch.full((1, NUM), torch.nan), "NaN or infinite"),
    "infinite": (torch.full((1, NUM), -torch.inf), "NaN or infinite"),
    "scale of 16 bits": (torch.full((1, NUM), -32768.0), r"-1\.\.1, got samples from -3.277e\+04 to"),
}


@pytest.mark.parametrize("door", [*DOORS, "MuLaN.window_latents", "AudioLM prompt"])
def test_other_waves_are_refused_in_the_same_words(door: str) -> None:
    """Shapes, types and values that are no wave; the message names the argument and the fix."""
    doors = dict(mono_doors())
    doors["MuLaN.window_latents"] = tiny_mulan().window_latents
    doors["AudioLM prompt"] = lambda wave: audiolm_of().generate(GenerationRequest(seconds=0.5, prime_wave=wave))
    for name, (wave, message) in REFUSED.items():
        if door == "EncoderStream.push" and name == "no samples":
            continue  # the end of a stream
        if door == "AudioLM prompt" and wave.ndim in (0, 4):
            message = "must be .n., .b, n. or .b, c, n."
        elif door == "AudioLM prompt" and (not wave.numel() or wave.ndim == 3):
            continue  # prompts may be empty, and have channels
        with pytest.raises(ValueError, match=f"(?s)(wav|wave|wavs|audio|prompt 0|prime_wave) .*{message}"):
            doors[door](wave)
    for wrong in (np.zeros((1, NUM), dtype=np.float32), [[0.0] * NUM], None):
        if door != "AudioLM prompt" and not (door == "fine stage" and wrong is None):
            with pytest.raises(TypeError, match="wav|wave|wavs|audio"):
                doors[door](wrong)


def test_a_stereo_codec_needs_an_axis_of_channels() -> None:
    """Mono and stereo are never guessed; the advice in the message works."""
    stereo = codec(channels=2)
    assert stereo.tokenize(torch.zeros(1, 2, NUM)).shape[0] == 1
    with pytest.raises(ValueError, match=r"\[b, 2, n\].*unsqueeze\(0\)"):
        stereo.tokenize(torch.zeros(2, NUM))
    for mono in (torch.zeros(NUM), torch.zeros(3, NUM), torch.zeros(3, 1, NUM)):
        with pytest.raises(ValueError, match=r"repeat\(1, 2, 1\)"):
            stereo.tokenize(mono)


def test_padding_may_hold_anything_everywhere() -> None:
    """NaN behind the length of an item changes no result, in a codec as in a tokenizer."""
    wave, lengths = 0.1 * torch.randn(2, NUM), torch.tensor([NUM, 1600])
    dirty = wave.clone()
    dirty[1, 1600:] = torch.nan
    soundstream, mulan = codec(), tiny_mulan()
    assert torch.equal(soundstream.tokenize(wave, lengths), soundstream.tokenize(dirty, lengths))
    assert torch.equal(mulan.get_audio_latents(wave, lengths), mulan.get_audio_latents(dirty, lengths))
    with pytest.raises(ValueError, match="NaN"):
        soundstream.tokenize(dirty)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8, torch.int64, torch.bool])
def test_integers_are_never_written_or_resampled_as_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    """An int16 wave written as floats would be a square wave at full scale."""
    wave = torch.ones(2, 100, dtype=dtype)
    with AudioWriter(tmp_path / "b.wav", 16000, 2) as writer:
        writer.write(torch.zeros(2, 10))
        with pytest.raises(ValueError, match="b.wav: wave must be a float tensor"):
            writer.write(wave)
    doors: dict[str, Callable[[], Any]] = {
        "write_audio": lambda: write_audio(tmp_path / "a.wav", wave, 16000),
        "resample": lambda: resample(wave, 16000, 24000),
        "resample, equal rates": lambda: resample(wave, 16000, 16000),
        "peak_safe": lambda: peak_safe(wave),
        "mel": lambda: MelSpectrogram(sample_hz=16000, n_fft=64, hop_length=32, num_mels=4)(wave),
        "stream": lambda: StreamingResampler(16000, 24000, 2).push(wave),
    }
    for door, call in doors.items():
        with pytest.raises(ValueError, match="must be a float tensor"):
            call()
            pytest.fail(door)
    assert not (tmp_path / "a.wav").exists()


def test_implausible_samples_are_not_written(tmp_path: Path) -> None:
    """Samples of 1e10 would become a square wave; a peak of 3 is clipped as documented."""
    with pytest.raises(ValueError, match=r"-1\.\.1, got samples from 0 to 1e\+10"):
        write_audio(tmp_path / "a.wav", torch.tensor([0.0, 1e10]), 16000)
    with pytest.raises(ValueError, match="must be .2, n., got shape .3, 5."):
        with AudioWriter(tmp_path / "a.wav", 16000, 2) as writer:
            writer.write(torch.zeros(3, 5))
    assert list(tmp_path.iterdir()) == []
    assert peak_safe(torch.tensor([0.0, 1e10])).abs().max() < 1


@pytest.mark.parametrize("hz", [0, -16000, 1, 999, 768_001, 2**31 - 1])
def test_rates_that_no_sound_has_are_refused(tmp_path: Path, write_tone: Callable[..., Path], hz: int) -> None:
    """A rate of 1 Hz would need gigabytes for a small file."""
    wave = torch.zeros(2, NUM)
    tokenizer, audio_lm = mono_doors()["KMeansTokenizer"], audiolm_of()
    doors: dict[str, Callable[[], Any]] = {
        "write_audio": lambda: write_audio(tmp_path / "a.wav", wave, hz),
        "AudioWriter": lambda: AudioWriter(tmp_path / "a.wav", hz, 1),
        "read_audio": lambda: read_audio(write_tone(), hz),
        "AudioSource": lambda: AudioSource(write_tone(), hz),
        "tokenizer": lambda: tokenizer(wave, input_sample_hz=hz),
        "prompt": lambda: audio_lm.generate(
            GenerationRequest(seconds=0.2, prime_wave=wave, prime_wave_input_sample_hz=hz)
        ),
    }
    if hz != 999:  # models of tests have rates below 1 kHz
        doors["resample"] = lambda: resample(wave, hz, 24000)
        doors["resample to"] = lambda: resample(wave, 24000, hz)
        doors["StreamingResampler"] = lambda: StreamingResampler(24000, hz, 1)
    for door, call in doors.items():
        with pytest.raises(ValueError, match=rf"{hz}|768000"):
            call()
            pytest.fail(door)


@pytest.mark.slow
def test_values_are_not_checked_while_a_codec_is_exported() -> None:
    """A check of values would be a guard that depends on the data; shapes are still checked."""

    class Checked(torch.nn.Module):
        def forward(self, wave: torch.Tensor) -> torch.Tensor:
            return mono_waves(wave) * 2

    exported = torch.export.export(Checked(), (torch.zeros(2, 1, 100),), strict=False).module()
    assert exported(torch.full((2, 1, 100), torch.nan)).isnan().all()
    with pytest.raises(ValueError, match="got shape"):
        torch.export.export(Checked(), (torch.zeros(2, 3, 100),), strict=False)


def test_channels_are_averaged_repeated_or_refused() -> None:
    """One conversion of channels serves files, prompts and stages."""
    stereo = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    assert torch.equal(with_channels(stereo, 1), torch.tensor([[0.5, 0.25]]))
    assert with_channels(stereo, None) is stereo and with_channels(stereo, 2) is stereo
    assert torch.equal(with_channels(stereo[None, :1], 2)[0], stereo[:1].expand(2, -1))
    with pytest.raises(ValueError, match="song.wav has 2 channels, need 1 or 3"):
        with_channels(stereo, 3, "song.wav")


def test_stereo_crops_are_collated_along_time() -> None:
    """Crops `[c, n]` of unequal length are padded at the end, not along the channels."""
    crops = [Crop({16000: torch.ones(2, count)}, 0.0, True) for count in (3, 5)]
    batch = collate_crops(crops)
    assert batch.waves[16000].shape == (2, 2, 5) and batch.lengths[16000].tolist() == [3, 5]
    assert batch.waves[16000][0, :, 3:].abs().sum() == 0


def test_a_stage_with_a_stereo_codec_is_trained_on_mono_and_stereo(
    write_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The codec receives two channels, also of mono files; without the conversion the first step fails."""
    from audiolm_pytorch.lm.trainers import FineTransformerTrainer

    folder = write_folder(num_files=3, seconds=0.5, sample_hz=16000)
    write_audio(folder / "stereo.wav", 0.1 * torch.randn(2, 8000), 16000)
    with caplog.at_level(logging.WARNING):
        trainer = FineTransformerTrainer(
            transformer=fine_stage(),
            codec=codec(channels=2),
            folder=folder,
            data_max_length=3200,
            batch_size=4,
            num_train_steps=1,
            results_folder=tmp_path / "run",
        )
    assert trainer.train().step == 1
