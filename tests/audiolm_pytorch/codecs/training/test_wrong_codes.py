"""Decoders that receive wrong codes in training, and decoders that are trained on fixed codes."""

import json

import pytest
import torch

from audiolm_pytorch.codecs import SoundStream
from audiolm_pytorch.codecs.spectral import SpectralEncoder
from audiolm_pytorch.codecs.training import MEL_ONLY, SoundStreamTrainer, WrongCodes
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
    settings = {**run, "wrong_codes": WrongCodes(item_share=1.0), **settings}
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
    task = trainer_of(folder, tmp_path).task
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


def test_decoder_is_trained_on_fixed_codes(folder, tmp_path):
    """With frozen encoder and quantizer, only the decoder changes; the codebooks keep all their buffers."""
    codec = trained_codebooks(tiny_codec(), music())
    codec.encoder.requires_grad_(False)
    codec.quantizer.requires_grad_(False)
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    trainer_of(folder, tmp_path, codec=codec, steps=3).train()
    changed = {name for name, value in codec.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_is_bit_identical(folder, tmp_path, precision):
    """Wrong codes depend only on the seed and the step."""
    whole = trainer_of(folder, tmp_path / "whole", precision=precision)
    whole.train()
    for _ in range(3):
        parts = trainer_of(folder, tmp_path / "parts", precision=precision)
        parts.train(stop_after_steps=2)
    state = parts.task.codec.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.task.codec.state_dict().items())


def test_settings_are_part_of_the_run(folder, tmp_path):
    """A run is not resumed with other settings; without them, the config equals that of older runs."""
    config = trainer_of(folder, tmp_path).task.config
    assert config["wrong_codes"]["item_share"] == 1.0
    plain = trainer_of(folder, tmp_path, wrong_codes=None).task.config
    assert set(config) - set(plain) == {"wrong_codes"}


def test_impossible_settings_are_refused(folder, tmp_path):
    """Settings outside their ranges and quantizers without codebooks by level raise an error."""
    with pytest.raises(ValueError, match="shares must be in 0..1"):
        WrongCodes(item_share=1.5)
    grouped = SoundStream(codebook_size=16, codebook_dim=16, channels=4, strides=(4, 4, 5), rq_groups=2)
    with pytest.raises(ValueError, match="needs a codec with one residual quantizer, got GroupedQuantizer"):
        trainer_of(folder, tmp_path, codec=grouped)
