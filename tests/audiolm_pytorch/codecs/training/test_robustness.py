"""Codes that survive inaudible changes, and decoders that receive wrong codes in training."""

import json

import numpy as np
import pytest
import torch

from audiolm_pytorch.codecs import SoundStream
from audiolm_pytorch.codecs.spectral import SpectralEncoder
from audiolm_pytorch.codecs.training import MEL_ONLY, SoundStreamTrainer, StableCodes, WrongCodes
from audiolm_pytorch.codecs.training.task import CodecBatch
from tests.helpers.small_codecs import RATE_HZ, tiny_codec, write_chords


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four decaying chords of 1 s."""
    return write_chords(tmp_path_factory.mktemp("chords"), seconds=1.0)


def trained_codebooks(codec, wave):
    codec.quantizer.initialise(codec.encode_frames(wave).reshape(-1, 16).detach())
    return codec


def trainer_of(folder, results, steps=6, codec=None, **settings):
    run = dict(batch_size=2, warmup_steps=2, data_max_length=6400, unquantized_steps=2, loss_weights=MEL_ONLY)
    everything = dict(stable_codes=StableCodes(), wrong_codes=WrongCodes(item_share=1.0))
    settings = {**run, **everything, **settings}
    codec = codec or tiny_codec()
    return SoundStreamTrainer(codec, folder=folder, num_train_steps=steps, results_folder=results, **settings)


def music(num_items=4):
    torch.manual_seed(1)
    time_seconds = torch.arange(RATE_HZ // 2) / RATE_HZ
    pitches = torch.randint(110, 880, (num_items, 3, 1))
    return (0.1 * torch.sin(2 * torch.pi * pitches * time_seconds)).sum(dim=1, keepdim=True)


def test_inaudible_noise_below_the_floor_does_not_reach_the_encoder():
    """White noise at -80 dB of full scale changes no input of the encoder where the music is below the floor."""
    noise = 1e-4 * torch.randn(1, 1, RATE_HZ, generator=torch.Generator().manual_seed(0))
    silence = torch.zeros_like(noise)
    sizes = dict(dim=8, depth=1, hop_samples=320)
    encoder, old_encoder = SpectralEncoder(**sizes, magnitude_floor=1e-4), SpectralEncoder(**sizes)
    assert torch.equal(encoder.features(noise), encoder.features(silence))
    assert not torch.equal(old_encoder.features(noise), old_encoder.features(silence))
    tone = 0.1 * torch.sin(torch.arange(RATE_HZ) * (2 * torch.pi * 440 / RATE_HZ)).view(1, 1, -1)

    def moved(network):
        return (network.features(tone + noise) - network.features(tone)).abs().mean()

    assert moved(encoder) < 0.05 * moved(old_encoder)


def test_default_floor_is_not_part_of_the_config():
    """Fingerprints of saved codecs stay as they are; another floor changes them, and is loaded again."""
    assert "magnitude_floor" not in json.dumps(tiny_codec().config)
    assert tiny_codec().fingerprint() != (codec := tiny_codec(magnitude_floor=1e-4)).fingerprint()
    assert codec.config["encoder"]["config"]["magnitude_floor"] == 1e-4
    with pytest.raises(ValueError, match="magnitude_floor must be above 0"):
        SpectralEncoder(dim=8, depth=1, hop_samples=320, magnitude_floor=0.0)


def test_copies_are_shifted_noisy_or_the_own_reconstruction():
    """Each change stays in its range, and an item without permission never becomes its own reconstruction."""
    wave, decoded = music(), torch.full((4, 1, RATE_HZ // 2), 0.5)
    only_shift = dict(own_copy_share=0.0, noise_db=(-200.0, -200.0), gain_db=0.0)
    torch.manual_seed(0)
    copies = StableCodes(**only_shift).copies(wave, decoded, torch.ones(4, dtype=torch.bool), RATE_HZ)
    shifts = [
        [k for k in range(-80, 81) if torch.allclose(c[0, 80:-80], w[0, 80 + k : w.shape[-1] - 80 + k], atol=1e-6)]
        for c, w in zip(copies, wave)
    ]
    assert all(shifts) and len({tuple(found) for found in shifts}) > 1
    flags = torch.tensor([True, False, True, False])
    own = StableCodes(own_copy_share=1.0, shift_seconds=0.0).copies(wave, decoded, flags, RATE_HZ)
    assert torch.equal(own[flags], decoded[flags]) and not torch.equal(own[~flags], decoded[~flags])
    noise = StableCodes(own_copy_share=0.0, shift_seconds=0.0, gain_db=0.0, noise_db=(-50.0, -50.0))
    difference = noise.copies(wave, decoded, flags, RATE_HZ) - wave
    ratio_db = 20 * (difference.square().mean((1, 2)).sqrt() / wave.square().mean((1, 2)).sqrt()).log10()
    assert torch.allclose(ratio_db, torch.full((4,), -50.0), atol=0.5)


def test_cross_entropy_follows_the_codes_of_earlier_levels():
    """The encoded codes have the lowest cross-entropy, equal shares of 1, and gradients reach only the encoder."""
    codec = trained_codebooks(tiny_codec(), music())
    frames = codec.encode_frames(music())
    codes = codec.quantizer.encode(frames)
    statistics = codec.quantizer.code_statistics(frames, codes, 0.1)
    assert statistics.cross_entropy.shape == (2,) and torch.equal(statistics.equal_share, torch.ones(2))
    assert (statistics.entropy > 0).all() and (statistics.entropy < np.log(16)).all()
    shuffled = codec.quantizer.code_statistics(frames, codes.roll(5, dims=1), 0.1)
    assert (shuffled.cross_entropy > statistics.cross_entropy).all()
    plain, spread = (StableCodes(min_entropy=nats).loss(codec.quantizer, frames, codes)[0] for nats in (0.0, 10.0))
    missing = 0.15 * ((10 - statistics.entropy) * torch.tensor([1.0, 0.6])).sum()
    torch.testing.assert_close(spread - plain, missing)
    statistics.cross_entropy.sum().backward()
    assert codec.encoder.embed.weight.grad.abs().sum() > 0
    assert not codec.quantizer.codebook(0).requires_grad


def test_stability_loss_gives_changed_waves_equal_codes():
    """A few steps of the stability loss alone raise the share of equal codes of noisy and shifted waves."""
    wave = music()
    codec = trained_codebooks(tiny_codec(), wave)
    codes = codec.tokenize(wave)
    settings = StableCodes(own_copy_share=0.0, noise_db=(-20.0, -20.0))
    can_be_own = torch.zeros(len(wave), dtype=torch.bool)

    def share():
        torch.manual_seed(5)
        return (codec.tokenize(settings.copies(wave, wave, can_be_own, RATE_HZ)) == codes).float().mean()

    before, optimizer = share(), torch.optim.Adam(codec.encoder.parameters(), 5e-4)
    for _ in range(40):
        frames = codec.encode_frames(settings.copies(wave, wave, can_be_own, RATE_HZ))
        loss, metrics = settings.loss(codec.quantizer, frames, codes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert share() > before + 0.1
    assert set(metrics) == {"stability", "same_level_1", "same_level_2"}


def test_wrong_codes_have_the_requested_shares():
    """Half of the items receive wrong codes, in each level a share from 0 to the largest share."""
    codec = tiny_codec(codebook_size=64)
    torch.manual_seed(0)
    codes = torch.randint(64, (400, 50, 2))
    settings = WrongCodes(item_share=0.5, max_code_share=0.4, near_share=0.0)
    is_wrong = settings.replaced(codec.quantizer, codes) != codes
    assert 0.42 < is_wrong.any(dim=2).any(dim=1).float().mean() < 0.58
    assert 0.5 * 0.2 * 0.85 < is_wrong.float().mean() < 0.5 * 0.2 * 1.15
    assert is_wrong.float().mean(dim=1).max() < 0.75
    near = WrongCodes(item_share=1.0, max_code_share=1.0, near_share=1.0, num_near=3).replaced(codec.quantizer, codes)
    for level in range(2):
        codebook = codec.quantizer.codebook(level)
        nearest = torch.cdist(codebook, codebook).argsort(dim=1)[:, 1:4]
        changed = (near != codes)[..., level]
        allowed = nearest[codes[..., level][changed]]
        assert (allowed == near[..., level][changed][:, None]).any(dim=1).all()
    assert torch.equal(WrongCodes(item_share=0.0).replaced(codec.quantizer, codes), codes)


def test_wrong_codes_reach_only_the_decoder(folder, tmp_path):
    """The target, the encoded codes and the codebooks do not change; the decoded wave does, with gradients."""
    task = trainer_of(folder, tmp_path, stable_codes=None).task
    codec = trained_codebooks(task.codec, music()).train()
    state, outputs = {name: value.clone() for name, value in codec.state_dict().items()}, []
    for replace in (None, lambda codes: codes, lambda codes: (codes + 1) % 16):
        codec.load_state_dict(state)
        torch.manual_seed(3)
        outputs.append((codec(music(), replace_codes=replace), codec.quantizer.codebook(0).clone()))
    (plain, book), (same, same_book), (wrong, wrong_book) = outputs
    assert torch.equal(plain.codes, wrong.codes) and torch.equal(book, wrong_book) and torch.equal(book, same_book)
    assert torch.equal(plain.wave, same.wave) and not torch.allclose(plain.wave, wrong.wave)
    wrong.wave.square().mean().backward()
    assert codec.encoder.embed.weight.grad.abs().sum() > 0
    batch = CodecBatch(music(), target := music())
    task._generator_loss(batch, step=10)
    assert torch.equal(batch.target, target)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_is_bit_identical(folder, tmp_path, precision):
    """Copies and wrong codes depend only on the seed and the step."""
    whole = trainer_of(folder, tmp_path / "whole", precision=precision)
    whole.train()
    for _ in range(3):
        parts = trainer_of(folder, tmp_path / "parts", precision=precision)
        parts.train(stop_after_steps=2)
    state = parts.task.codec.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.task.codec.state_dict().items())
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert "same_level_1" in rows[-1] or any("same_level_1" in row for row in rows)


def test_settings_are_part_of_the_run(folder, tmp_path):
    """A run is not resumed with other settings; without them, the config equals that of older runs."""
    config = trainer_of(folder, tmp_path).task.config
    assert config["stable_codes"]["noise_db"] == [-60.0, -40.0] and config["wrong_codes"]["item_share"] == 1.0
    plain = trainer_of(folder, tmp_path, stable_codes=None, wrong_codes=None).task.config
    assert set(config) - set(plain) == {"stable_codes", "wrong_codes"}


def test_impossible_settings_are_refused(folder, tmp_path):
    """Settings outside their ranges and quantizers without codebooks by level raise an error."""
    with pytest.raises(ValueError, match="need weight and temperature above 0"):
        StableCodes(weight=0.0)
    with pytest.raises(ValueError, match="noise_db = .lowest, highest."):
        StableCodes(noise_db=(-40.0, -60.0))
    with pytest.raises(ValueError, match="shares must be in 0..1"):
        WrongCodes(item_share=1.5)
    grouped = SoundStream(codebook_size=16, codebook_dim=16, channels=4, strides=(4, 4, 5), rq_groups=2)
    with pytest.raises(ValueError, match="need a codec with one residual quantizer, got GroupedQuantizer"):
        trainer_of(folder, tmp_path, codec=grouped)
