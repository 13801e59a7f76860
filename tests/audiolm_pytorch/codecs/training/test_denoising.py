"""Noise mixtures and the codec that learns to remove noise: exact ratios, exact resume, and a gain in the end."""

import json

import numpy as np
import pytest
import soundfile
import torch

from audiolm_pytorch.codecs.distances import si_sdr_db
from audiolm_pytorch.codecs.quantizers import ResidualQuantizer
from audiolm_pytorch.codecs.soundstream import SoundStream
from audiolm_pytorch.codecs.spectral import SpectralDecoder, SpectralEncoder
from audiolm_pytorch.codecs.training import MEL_ONLY, SoundStreamTrainer, monitoring
from audiolm_pytorch.codecs.training.denoising import NoiseMixer
from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from audiolm_pytorch.codecs.training.monitoring import denoising_metrics
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import load_items
from audiolm_pytorch.nn.film import FiLM

RATE_HZ = 16000


def write(folder, name, wave):
    folder.mkdir(exist_ok=True)
    soundfile.write(folder / f"{name}.wav", wave, RATE_HZ)


def tones(seed, seconds=1.0):
    """Chords of three low partials that are struck four times a second."""
    draws = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    pitches = draws.choice([220, 275, 330, 440, 550], size=(int(4 * seconds) + 1, 2))[(time * 4).astype(int)]
    return 0.2 * (np.sin(2 * np.pi * pitches * time[:, None]).sum(axis=1)) * np.exp(-6 * (time % 0.25))


def hiss(seed, seconds=1.0):
    """Noise above 2 kHz."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(int(seconds * RATE_HZ)))
    spectrum[: int(2000 * seconds)] = 0
    return 0.1 * np.fft.irfft(spectrum)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of clean tones, of noise (one clip shorter than a crop), of silence; the last of each held out."""
    root = tmp_path_factory.mktemp("denoising")
    for number in range(6):
        write(root / "clean", str(number), tones(number))
        write(root / "noise", str(number), hiss(100 + number, seconds=0.2 if number == 0 else 1.0))
    write(root / "silence", "0", np.zeros(RATE_HZ))
    return root


def crops(folder, seconds=0.5, keep=slice(None)):
    return CropDataset(load_items(folder).items[keep], seconds, [RATE_HZ])


def mixer(data, **settings):
    return NoiseMixer(crops(data / "clean"), crops(data / "noise"), sample_hz=RATE_HZ, **settings)


@pytest.mark.slow
def test_mixtures_have_their_ratio_and_their_target(data):
    """Oracle: the noise has the power of the ratio; the target is clean where the flag is set."""
    made = [mixer(data, snr_db=(-5, 15)).get(epoch, index) for epoch in range(8) for index in range(6)]
    assert {mixture.denoise for mixture in made} == {True, False}
    noisy = [mixture for mixture in made if np.isfinite(mixture.snr_db)]
    assert 0 < len(made) - len(noisy) < 15 and all(-5 <= mixture.snr_db <= 15 for mixture in noisy)
    assert np.std([mixture.snr_db for mixture in noisy]) > 3
    for mixture in made:
        assert mixture.wave.abs().max() <= 1.0 + 1e-6 and mixture.wave.shape == mixture.clean.shape == (RATE_HZ // 2,)
        assert torch.equal(mixture.target, mixture.clean if mixture.denoise else mixture.wave)
    for mixture in noisy:
        noise = mixture.wave - mixture.clean
        ratio = 10 * (mixture.clean.square().sum() / noise.square().sum()).log10()
        assert float(ratio) == pytest.approx(mixture.snr_db, abs=0.01)


def test_mixtures_are_a_function_of_seed_epoch_and_index(data):
    """Resume needs no state: only the arguments matter, not global generators or the order of calls."""
    first, again = mixer(data), mixer(data)
    expected = first.get(3, 2)
    again.get(0, 0)
    torch.manual_seed(9)
    np.random.seed(9)
    other = again.get(3, 2)
    assert torch.equal(expected.wave, other.wave) and (expected.denoise, expected.snr_db) == (
        other.denoise,
        other.snr_db,
    )
    changed = [first.get(4, 2), first.get(3, 1), mixer(data, seed=1).get(3, 2)]
    assert not any(torch.equal(expected.wave, one.wave) for one in changed)


def test_silence_stays_silence(data):
    """A ratio to silence is not defined: silent audio receives no noise, and silent noise is not added."""
    silence, clean = crops(data / "silence"), crops(data / "clean")
    for pair in [(silence, crops(data / "noise")), (clean, silence)]:
        mixture = NoiseMixer(*pair, sample_hz=RATE_HZ, clean_share=0.0).get(0, 0)
        assert torch.equal(mixture.wave, mixture.clean) and mixture.snr_db == float("inf")
        assert torch.isfinite(mixture.wave).all()


def test_impossible_mixers_are_refused(data):
    """The constructor checks each number."""
    for settings in [{"snr_db": (5.0, 0.0)}, {"clean_share": -0.1}, {"seed": -1}]:
        with pytest.raises(ValueError, match="need snr_db"):
            mixer(data, **settings)
    with pytest.raises(ValueError, match="noise crops are at"):
        NoiseMixer(crops(data / "clean"), CropDataset(load_items(data / "noise").items, 0.5, [8000]), sample_hz=RATE_HZ)


def denoising_codec(dim=16, depth=1, codebook_size=16, num_quantizers=2):
    torch.manual_seed(0)
    return SoundStream(
        encoder=SpectralEncoder(dim=dim, depth=depth, hop_samples=320),
        decoder=SpectralDecoder(dim=dim, depth=depth, hop_samples=320),
        quantizer=ResidualQuantizer(
            dim=dim, codebook_size=codebook_size, num_quantizers=num_quantizers, codebook_dim=min(dim, 16)
        ),
        denoising=FiLM(dim=dim),
    )


def trainer_of(data, results, steps, codec, **settings):
    return SoundStreamTrainer(
        codec,
        items=(load_items(data / "clean").items[:5], load_items(data / "clean").items[5:]),
        noise_items=(load_items(data / "noise").items[:5], load_items(data / "noise").items[5:]),
        num_train_steps=steps,
        results_folder=results,
        loss_weights=MEL_ONLY,
        **{"batch_size": 2, "warmup_steps": 2, "data_max_length_seconds": 0.4, **settings},
    )


@pytest.mark.slow
def test_denoising_run_resumes_bit_for_bit_and_reports(data, tmp_path):
    """A resumed run has the mixtures, flags and codebooks of a straight one; validation reports all three kinds."""
    settings = dict(unquantized_steps=1, log_every=1, validate_every=2)
    trainer_of(data, tmp_path / "straight", 4, denoising_codec(), **settings).train()
    for stop in (1, 2, None):
        trainer_of(data, tmp_path / "resumed", 4, denoising_codec(), **settings).train(stop_after_steps=stop)
    for file in ("checkpoint/model.safetensors", "checkpoint/optimizer.safetensors"):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    kinds = ("noisy", "denoise_off", "denoise_on")
    assert {f"{name}_{kind}" for name in ("si_sdr_db", "mel_distance") for kind in kinds} <= set(last)
    assert 0 <= last["si_sdr_db_noisy"] <= 15


def test_the_flag_reaches_every_row_of_the_condition(data, tmp_path):
    """Both flags receive gradients, also in a batch with one of each."""
    task = trainer_of(data, tmp_path, 3, denoising_codec(), unquantized_steps=2).task
    task.module.train()
    batches = (task.batch([(epoch, index) for index in range(4)]) for epoch in range(9))
    batch = next(batch for batch in batches if 0 < int(batch.denoise.sum()) < 4)
    task.phases[0].loss(batch, 0).loss.backward()
    assert (task.codec.denoising.table.grad.abs().sum(dim=1) > 0).all()
    difference = batch.target - batch.wave
    changed = difference.abs().amax(dim=(1, 2)) > 0
    assert not (changed & ~batch.denoise).any() and (changed & batch.denoise).any()


@pytest.mark.slow
def test_the_flag_removes_noise_from_held_out_mixtures(data, tmp_path):
    """Trained on tones in hiss, the codec is nearer to the clean sound with the flag, on held-out clips."""
    codec = denoising_codec(dim=32, codebook_size=64, num_quantizers=4)
    settings = dict(batch_size=8, learning_rate=3e-3, warmup_steps=20, validate_every=160)
    trainer_of(data, tmp_path, 160, codec, **settings).train()
    codec.eval()
    held_out = NoiseMixer(
        crops(data / "clean", 1.0, slice(5, 6)), crops(data / "noise", 1.0, slice(5, 6)),
        sample_hz=RATE_HZ, snr_db=(5.0, 5.0), clean_share=0.0, seed=3,
    )  # fmt: skip
    mixtures = [held_out.get(epoch, 0) for epoch in range(4)]
    metrics = denoising_metrics(codec, mixtures.__getitem__, len(mixtures), MultiScaleMelLoss(RATE_HZ))
    assert metrics["si_sdr_db_noisy"] == pytest.approx(5.0, abs=0.2)
    assert metrics["mel_distance_denoise_on"] < 0.75 * metrics["mel_distance_denoise_off"], metrics
    assert metrics["mel_distance_denoise_on"] < metrics["mel_distance_noisy"], metrics
    # what the flag is asked to keep it keeps: without it the hiss is still there
    off = monitoring.reconstruct(codec, mixtures[0].wave[None, None])
    on = monitoring.reconstruct(codec, mixtures[0].wave[None, None], denoise=True)
    loss_fn = MultiScaleMelLoss(RATE_HZ)
    noisy = mixtures[0].wave[None, None]
    assert loss_fn(off, noisy) < loss_fn(on, noisy)
    assert float(si_sdr_db(mixtures[0].wave, mixtures[0].clean)) == pytest.approx(5.0, abs=0.2)
