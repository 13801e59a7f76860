import pytest
import torch

from audiolm_pytorch.saving.modules import build_module, module_spec
from musiclm_pytorch.mulan.audio_tower import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.spectrogram import SpecAugment


def _tower(**changes: object) -> AudioSpectrogramTransformer:
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "patch_size": 8, "sample_hz": 8000, "num_mels": 24}
    tower = AudioSpectrogramTransformer(**{**sizes, "spec_n_fft": 256, **changes}).eval()
    if tower.encoder.position_bias is not None:
        torch.nn.init.normal_(tower.encoder.position_bias.amplitudes)  # as after training
    return tower


@pytest.mark.parametrize("changes", [{}, {"num_mels": None}, {"patch_stride": 5}, {"position_waves": 0}])
def test_tower_gives_the_same_alone_in_a_batch_and_padded(changes: dict[str, object]) -> None:
    """Padding, its content, and the rest of the batch do not change an embedding (1e-5)."""
    tower = _tower(**changes)
    lengths = torch.tensor([6000, 2345, 1, 900])
    wavs = torch.randn(4, 6000)
    batch = tower(wavs, lengths)
    padded = tower(torch.nn.functional.pad(wavs, (0, 3000), value=0.7), lengths)
    torch.testing.assert_close(batch, padded, atol=1e-5, rtol=0)
    for item, size in enumerate(lengths.tolist()):
        torch.testing.assert_close(batch[item], tower(wavs[item : item + 1, :size])[0], atol=1e-5, rtol=0)


def test_embeddings_depend_on_the_sound_but_hardly_on_its_level() -> None:
    """Another sound has another embedding; the same sound at half the level has nearly the same."""
    tower = _tower()
    time = torch.arange(8000) / 8000
    low, high = (torch.sin(2 * torch.pi * hz * time).unsqueeze(0) for hz in (220, 1760))
    other = (tower(low) - tower(high)).norm()
    assert other > 20 * (tower(low) - tower(low / 2)).norm()


def test_tower_embeds_silence_and_single_samples() -> None:
    """A clip shorter than a patch, and digital silence, have finite embeddings and gradients."""
    tower = _tower().train()
    for wavs in (torch.zeros(2, 4000), torch.randn(1, 1)):
        embedding = tower(wavs)
        embedding.square().sum().backward()
        assert embedding.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in tower.parameters())


def test_tower_augments_only_in_training() -> None:
    """Eval mode is deterministic; in training every kind of noise changes the output."""
    wavs = torch.randn(2, 8000)
    for noise in ("spec_aug_freq_mask", "spec_aug_time_mask", "patch_dropout"):
        tower = _tower(**{noise: 0.5})
        clean = tower(wavs)
        assert torch.equal(clean, tower(wavs))
        tower.train()
        assert not torch.allclose(clean, tower(wavs), atol=1e-4), noise
    tower = _tower(spec_aug_stretch_factor=0.8).train()
    assert not torch.allclose(tower(wavs), tower.eval()(wavs), atol=1e-4)
    plain = _tower()
    torch.testing.assert_close(plain.train()(wavs), plain.eval()(wavs))


def test_patch_dropout_keeps_a_share_of_every_clip() -> None:
    """Half the patches of each clip stay, and only real ones."""
    tower = _tower(patch_dropout=0.5).train()
    image, num_frames = torch.randn(2, 24, 64), torch.tensor([64, 16])
    tokens, places, mask = tower._patches(image, num_frames)
    assert tokens.shape[1] == 12 and mask.sum(dim=1).tolist() == [12, 3]
    assert places[1, mask[1], 0].max() < 2 and places[..., 1].max() == 2


def test_overlapping_patches_cover_every_frame() -> None:
    """Oracle: each patch is cut out of the image at its position; the last one reaches the end."""
    tower = _tower(patch_stride=5)
    torch.nn.init.eye_(tower.to_tokens.weight.data[:, : 8 * 8])
    torch.nn.init.zeros_(tower.to_tokens.bias)
    torch.nn.init.zeros_(tower.band_embedding)
    image = torch.randn(1, 24, 21)
    tokens, places, mask = tower._patches(image, torch.tensor([21]))
    assert tower.num_bands == 5 and mask.all() and tokens.shape[1] == 4 * 5  # frames 0..7, 5..12, 10..17, 15..22
    whole = torch.nn.functional.pad(image, (0, 2, 0, 4))[0]
    for token, (column, band) in zip(tokens[0], places[0].tolist()):
        patch = whole[5 * band : 5 * band + 8, 5 * column : 5 * column + 8]
        torch.testing.assert_close(token, patch.flatten()[:32])
    assert _tower(patch_stride=5)(torch.randn(1, 4000)).isfinite().all()


def test_front_end_is_that_of_mulan_by_default() -> None:
    """Defaults: 128 mels, 25 ms every 10 ms at any rate; a Fourier size alone means its linear bins (the snippet)."""
    sizes = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
    for sample_hz in (16_000, 48_000):
        front_end = AudioSpectrogramTransformer(**sizes, sample_hz=sample_hz).spectrogram
        assert front_end.num_bins == 128 and front_end.hop_length == sample_hz // 100
        assert front_end.win_length == sample_hz // 40
    front_end = AudioSpectrogramTransformer(**sizes, spec_n_fft=128, spec_win_length=24).spectrogram
    assert front_end.mel is None and front_end.num_bins == 65
    assert (front_end.win_length, front_end.hop_length) == (24, 9)


def test_tower_embeds_layers() -> None:
    """The last layer equals `forward`; layer 0 is the mean of the patches before the first block."""
    tower, wavs, lengths = _tower(), torch.randn(2, 4000), torch.tensor([4000, 1500])
    embedded = tower.embed_layers(wavs, lengths, layers=(0, 1, 2))
    assert embedded.shape == (3, 2, 32) and torch.equal(embedded[2], tower(wavs, lengths))
    image, num_frames = tower.spectrogram(wavs, lengths)
    tokens, _, mask = tower._patches(tower.spectrogram.standardise(image, num_frames), num_frames)
    expected = torch.stack([row[own].mean(dim=0) for row, own in zip(tokens, mask)])
    torch.testing.assert_close(embedded[0], expected, atol=1e-5, rtol=1e-5)


def test_stretch_plays_faster_and_slower() -> None:
    """Oracle: a ramp in time, stretched, is a ramp of another slope, and its length is divided by the speed."""
    torch.manual_seed(0)
    ramp = torch.arange(40.0).expand(6, 3, 40)
    augment = SpecAugment(0.5, 0.0, 0.0).train()
    stretched, num_frames = augment.stretch(ramp, torch.full((6,), 20))
    slopes = stretched[:, 0, 1] - stretched[:, 0, 0]
    assert slopes.min() > 0.5 and slopes.max() < 2 and slopes.std() > 0.1
    for row, slope, size in zip(stretched, slopes, num_frames.tolist()):
        assert size == int(20 / slope + 1e-4)
        torch.testing.assert_close(row[0, :size], (torch.arange(size) * slope).clamp(max=19), atol=1e-3, rtol=0)


def test_masks_stay_within_their_fraction() -> None:
    """In many draws at most the maximum fractions are masked, also of short clips."""
    torch.manual_seed(0)
    augment = SpecAugment(1.0, 0.25, 0.5).train()
    image = augment.mask(torch.ones(200, 20, 30), torch.tensor([30, 10] * 100))
    hidden_bins = (image == 0).all(dim=2).sum(dim=1)
    hidden_frames = (image == 0).all(dim=1)
    assert hidden_bins.max() == 5 and hidden_frames[::2].sum(dim=1).max() == 15
    assert hidden_frames[1::2].sum(dim=1).max() == 5 and not hidden_frames[1::2, 10:].any()


def test_tower_runs_in_bfloat16() -> None:
    """The embedding under autocast is close to that in float32."""
    tower, wavs = _tower(), torch.randn(2, 4000)
    with torch.autocast("cpu", torch.bfloat16):
        half = tower(wavs)
    assert torch.nn.functional.cosine_similarity(half, tower(wavs)).min() > 0.99


def test_tower_is_rebuilt_from_its_config() -> None:
    """A tower built from the config loads the weights and computes the same embedding."""
    tower, wavs = _tower(patch_dropout=0.25), torch.randn(1, 3000)
    again = build_module(module_spec(tower)).eval()
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again(wavs), tower(wavs)) and again.config == tower.config


def test_tower_rejects_what_it_cannot_use() -> None:
    """Error messages name the input and the requirement."""
    tower = _tower()
    with pytest.raises(ValueError, match=r"\[b, n\]"):
        tower(torch.randn(1, 2, 100))
    with pytest.raises(ValueError, match="NaN"):
        tower(torch.full((1, 100), torch.nan))
    with pytest.raises(ValueError, match="lengths"):
        tower(torch.randn(2, 100), torch.tensor([100, 0]))
    with pytest.raises(ValueError, match="mel"):
        _tower(num_mels=200)
    with pytest.raises(ValueError, match="spec_win_length"):
        _tower(spec_win_length=300)
    with pytest.raises(ValueError, match="patch_stride"):
        _tower(patch_stride=9)
    with pytest.raises(ValueError, match="patch_dropout"):
        _tower(patch_dropout=1.0)
    with pytest.raises(ValueError, match="stretch"):
        _tower(spec_aug_stretch_factor=0.0)
