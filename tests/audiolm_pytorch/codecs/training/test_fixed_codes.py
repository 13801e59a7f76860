"""Encoders with a floor, and decoders that are trained on fixed codes."""

import json

import pytest
import torch

from audiolm_pytorch.codecs.spectral import SpectralEncoder
from audiolm_pytorch.codecs.training import MEL_ONLY, SoundStreamTrainer
from tests.helpers.small_codecs import RATE_HZ, tiny_codec, write_chords


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four decaying chords of 1 s."""
    return write_chords(tmp_path_factory.mktemp("chords"), seconds=1.0)


def trained_codebooks(codec, wave):
    codec.quantizer.initialise(codec.encode_frames(wave).reshape(-1, 16).detach())
    return codec


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


def test_decoder_is_trained_on_fixed_codes(folder, tmp_path):
    """With frozen encoder and quantizer, only the decoder changes; the codebooks keep all their buffers."""
    codec = trained_codebooks(tiny_codec(), music())
    codec.encoder.requires_grad_(False)
    codec.quantizer.requires_grad_(False)
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    SoundStreamTrainer(
        codec,
        folder=folder,
        batch_size=2,
        num_train_steps=3,
        data_max_length=6400,
        results_folder=tmp_path,
        loss_weights=MEL_ONLY,
    ).train()
    changed = {name for name, value in codec.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
