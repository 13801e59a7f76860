import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from audiolm_pytorch.codecs.discriminators import (
    ComplexSTFTDiscriminator,
    Discriminators,
    MultiScaleSTFTDiscriminator,
    MultiScaleWaveDiscriminator,
    encodec_discriminators,
    soundstream_discriminators,
)
from audiolm_pytorch.codecs.training.losses import discriminator_hinge
from audiolm_pytorch.saving.modules import load_module, save_module
from tests.helpers.quick import only_quick

KINDS: dict[str, Callable[..., nn.Module]] = {
    "wave": lambda **kwargs: MultiScaleWaveDiscriminator(width=4, **kwargs),
    "stft": lambda **kwargs: ComplexSTFTDiscriminator(width=2, window_samples=128, hop_samples=32, **kwargs),
    "multi_stft": lambda **kwargs: MultiScaleSTFTDiscriminator(width=4, windows_samples=(128, 64, 32), **kwargs),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def tensors_of(outputs) -> list[Tensor]:
    return [tensor for output in outputs for tensor in (output.logits, *output.features)]


@every_kind
@pytest.mark.parametrize("num_samples", only_quick([1, 2, 3, 7, 63, 64, 65, 500], [1, 7, 64, 500]))
@pytest.mark.parametrize("channels", [1, 2])
def test_any_length_and_channels(make, num_samples, channels):
    """Waves of a few samples have logits at every scale, for mono and stereo."""
    outputs = make(channels=channels)(torch.randn(2, channels, num_samples))
    assert len(outputs) >= 1
    for output in outputs:
        assert output.logits.shape[:2] == (2, 1)
        assert all(tensor.numel() > 0 and tensor.shape[0] == 2 for tensor in [output.logits, *output.features])


@pytest.mark.slow
def test_default_shapes_are_those_of_the_papers():
    """Channels, strides and frames of SoundStream III-D / MelGAN and EnCodec 3.4."""
    wave = torch.randn(1, 1, 8192)
    with torch.no_grad():
        waves = MultiScaleWaveDiscriminator()(wave)
        (stft,) = ComplexSTFTDiscriminator()(wave)
        multi = MultiScaleSTFTDiscriminator()(wave)
    for half, output in enumerate(waves):
        num = 8192 >> half
        steps = [num, num // 4, num // 16, num // 64, num // 256, num // 256]
        widths = [16, 64, 256, 1024, 1024, 1024]
        assert [tuple(feature.shape[1:]) for feature in output.features] == list(zip(widths, steps))
        assert output.logits.shape == (1, 1, num // 256)
    # 33 frames are filled up to 40; the paper: T / (H * 2^3) times F / 2^6 at the end
    assert [feature.shape[1] for feature in stft.features] == [32, 64, 128, 128, 256, 256, 512]
    assert stft.features[-1].shape[2:] == (5, 512 // 64)
    assert stft.logits.shape == (1, 1, 5)
    for window, output in zip((2048, 1024, 512, 256, 128), multi):
        frames, bins = 8192 // (window // 4) + 1, window // 2
        assert [feature.shape[1] for feature in output.features] == [32] * 5
        widths = [bins + 1, bins // 2 + 1, bins // 4 + 1, bins // 8 + 1, bins // 8 + 1]
        assert [tuple(feature.shape[2:]) for feature in output.features] == [(frames, width) for width in widths]
        assert output.logits.shape == (1, 1, frames, bins // 8 + 1)


def test_sets_of_the_papers():
    """SoundStream has four scales, EnCodec five; `width` and channels apply to all of them."""
    soundstream, encodec = soundstream_discriminators(2, width=8), encodec_discriminators(2, width=4)
    wave = torch.randn(1, 2, 600)
    assert (len(soundstream(wave)), len(encodec(wave))) == (4, 5)
    assert soundstream_discriminators().config["parts"][0]["config"]["width"] == 16
    assert soundstream_discriminators().config["parts"][1]["config"]["width"] == 32
    assert [output.features[0].shape[1] for output in soundstream(wave)] == [4, 4, 4, 8]


def test_lower_scales_receive_the_pooled_wave():
    """Scale k has the output for the wave pooled k times (4 samples every 2; the ends average real samples only)."""
    discriminator = MultiScaleWaveDiscriminator(width=4)
    wave = torch.randn(1, 1, 50)
    pooled = []
    for step in range(25):
        there = [wave[0, 0, i] for i in range(2 * step - 1, 2 * step + 3) if 0 <= i < 50]
        pooled.append(sum(there) / len(there))
    expected = discriminator.scales[1](torch.stack(pooled)[None, None])
    torch.testing.assert_close(discriminator(wave)[1].features[0], expected.features[0])


@pytest.mark.parametrize("channels", [1, 2])
def test_spectrogram_is_the_normalised_fourier_sum(channels):
    """Compared with a naive sum in float64; real parts of all channels come before imaginary parts."""
    discriminator = MultiScaleSTFTDiscriminator(channels=channels, width=1, windows_samples=(16,))
    wave = torch.randn(1, channels, 60)
    image = discriminator.scales[0].spectrogram(wave)
    assert image.shape == (1, 2 * channels, 16, 9)
    window = [0.5 - 0.5 * math.cos(2 * math.pi * i / 16) for i in range(16)]
    frame, bin_ = 5, 3  # samples 12..27
    for channel in range(channels):
        total = sum(
            window[i] * complex(wave[0, channel, frame * 4 - 8 + i]) * complex(math.cos(a), -math.sin(a))
            for i in range(16)
            for a in [2 * math.pi * bin_ * i / 16]
        ) / math.sqrt(sum(w * w for w in window))
        assert image[0, channel, frame, bin_].item() == pytest.approx(total.real, abs=1e-5)
        assert image[0, channels + channel, frame, bin_].item() == pytest.approx(total.imag, abs=1e-5)


def test_normalised_spectrogram_has_the_level_of_the_wave():
    """White noise of variance 1 has coefficients of variance 1 for every window."""
    noise = torch.randn(4, 1, 40000)
    for scale in MultiScaleSTFTDiscriminator(width=1).scales:
        image = scale.spectrogram(noise)[..., 1:-1]
        assert image.square().sum(dim=1).mean().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("kind", ["stft", "multi_stft"])
def test_features_depend_on_phase(kind):
    """A wave and its negative have equal magnitudes and different features."""
    discriminator = KINDS[kind](channels=1)
    wave = torch.randn(1, 1, 500)
    one, other = discriminator(wave), discriminator(-wave)
    assert (one[0].features[0] - other[0].features[0]).abs().max() > 0.1


@every_kind
def test_channels_are_processed_together(make):
    """Swapped channels change the output."""
    discriminator = make(channels=2)
    wave = torch.randn(1, 2, 400)
    assert not torch.allclose(discriminator(wave)[0].logits, discriminator(wave.flip(1))[0].logits, atol=1e-4)


@every_kind
def test_an_item_alone_equals_itself_in_a_batch(make):
    """There are no statistics over the batch."""
    discriminator = make(channels=1)
    wave = torch.randn(3, 1, 300)
    for alone, together in zip(tensors_of(discriminator(wave[1:2])), tensors_of(discriminator(wave))):
        torch.testing.assert_close(alone, together[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("level", [0.0, 1.0, 1e4, 1e-20])
def test_degenerate_waves_stay_finite(make, level):
    """Silence, DC and absurd levels: outputs and the gradients of wave and parameters are finite, also in bf16.

    The seed fixes weights, but not the memory that a faulty kernel reads beside its input: several seeds in one test.
    """
    for seed, enabled in itertools.product(range(4), (False, True)):
        torch.manual_seed(seed)
        discriminator = make(channels=1)
        wave = torch.full((1, 1, 300), level, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = discriminator(wave)
        sum(tensor.float().square().mean() for tensor in tensors_of(outputs)).backward()
        assert all(torch.isfinite(tensor).all() for tensor in tensors_of(outputs))
        assert torch.isfinite(wave.grad).all()
        assert all(torch.isfinite(parameter.grad).all() for parameter in discriminator.parameters())


def test_grouped_convolutions_compute_in_float32_under_autocast():
    """In bfloat16 their gradients are NaN in some runs on CPUs with AMX, for short waves (oneDNN issue 5717)."""
    discriminator = MultiScaleWaveDiscriminator(width=4)
    grouped = [module for module in discriminator.modules() if isinstance(module, nn.Conv1d) and module.groups > 1]
    assert len(grouped) == 9  # of every scale the second to the fourth; the first has one group at this width
    first = [scale.layers[1] for scale in discriminator.scales]
    computed = []
    for module in [*grouped, *first]:
        module.register_forward_hook(lambda module, inputs, output: computed.append(output))
    wave = torch.ones(1, 1, 300, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = discriminator(wave)
    assert len(computed) == 12 and {output.dtype for output in computed} == {torch.float32}
    sum(tensor.float().square().mean() for tensor in tensors_of(outputs)).backward()
    assert all(module.parametrizations.weight.original1.grad.isfinite().all() for module in grouped)
    for module in grouped:
        x = torch.randn(1, module.in_channels, 8).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = module(x)
        assert torch.equal(mixed, module(x.float()))


@every_kind
def test_every_parameter_and_every_sample_has_a_gradient(make):
    """Including the first and the last sample."""
    discriminator = make(channels=2)
    wave = torch.randn(1, 2, 333, requires_grad=True)
    sum(output.logits.square().sum() for output in discriminator(wave)).backward()
    assert all((parameter.grad != 0).any() for parameter in discriminator.parameters())
    assert (wave.grad != 0).all()


def test_no_strided_pointwise_convolution():
    """One with few channels writes outside its memory in backward on a CPU (oneDNN issue 6035) and may crash later."""
    for make in (soundstream_discriminators, encodec_discriminators):
        for module in make(width=8).modules():
            if isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1}:
                assert set(module.stride) == {1}


@every_kind
def test_autocast_stays_near_fp32(make):
    """Under bf16 autocast the logits are close to those in fp32."""
    discriminator = make(channels=1)
    wave = torch.randn(1, 1, 500)
    plain = discriminator(wave)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = discriminator(wave)
    for one, other in zip(plain, mixed):
        assert other.features[0].dtype == torch.bfloat16
        assert (one.logits - other.logits.float()).abs().max() < 0.05 * one.features[-1].abs().max() + 0.01


def test_spectrogram_is_fp32_under_autocast():
    """bf16 would lose quiet partials beside loud ones."""
    spectrogram = ComplexSTFTDiscriminator(width=1).spectrogram
    wave = torch.randn(1, 1, 4000)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = spectrogram(wave.bfloat16())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, spectrogram(wave.bfloat16().float()), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("make", [soundstream_discriminators, encodec_discriminators])
def test_saved_discriminators_load_equal(make, tmp_path):
    """Weights and sizes are restored, so that a published codec can be fine-tuned."""
    discriminators = make(channels=2, width=8)
    save_module(discriminators, tmp_path / "discriminators")
    loaded = load_module(tmp_path / "discriminators", expect=Discriminators)
    wave = torch.randn(1, 2, 300)
    for one, other in zip(tensors_of(discriminators(wave)), tensors_of(loaded(wave))):
        assert torch.equal(one, other)


@every_kind
@pytest.mark.parametrize("shape", [(1, 300), (1, 3, 300), (1, 2, 0), (300,)])
def test_wrong_waves_raise_with_the_reason(make, shape):
    """Wrong rank, channels and empty waves."""
    with pytest.raises(ValueError, match=r"\[b, 2, n\]"):
        make(channels=2)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiScaleWaveDiscriminator(width=6), "multiple of 4"),
        (lambda: MultiScaleWaveDiscriminator(scales=0), r"scales in 1\.\.16"),
        (lambda: MultiScaleWaveDiscriminator(scales=40), r"scales in 1\.\.16"),
        (lambda: ComplexSTFTDiscriminator(window_samples=1000), "multiple of 128"),
        (lambda: MultiScaleSTFTDiscriminator(windows_samples=()), "windows"),
        (lambda: soundstream_discriminators(width=4), "multiple of 8"),
        (lambda: Discriminators([]), "at least one"),
    ],
)
def test_impossible_sizes_raise(make, message):
    """Each message names the number and what is needed."""
    with pytest.raises(ValueError, match=message):
        make()


def tones(num_items: int) -> Tensor:
    """Harmonic tones of random pitch, phase and level `[b, 1, 1024]` at 16 kHz."""
    time_seconds = torch.arange(1024) / 16000
    pitch_hz = 100 + 400 * torch.rand(num_items, 1)
    angle = 2 * math.pi * (pitch_hz * time_seconds + torch.rand(num_items, 1))
    wave = sum(torch.sin(k * angle) / k for k in range(1, 6))
    return (0.1 + 0.3 * torch.rand(num_items, 1)).mul(wave)[:, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiScaleWaveDiscriminator(width=4, scales=2),
        lambda: ComplexSTFTDiscriminator(width=4, window_samples=128, hop_samples=64),
        lambda: MultiScaleSTFTDiscriminator(width=4, windows_samples=(256, 128)),
    ],
    ids=KINDS,
)
def test_discriminator_learns_to_separate_clean_from_noisy_tones(make):
    """Architecture and loss together: within 400 steps the hinge loss on unseen tones falls from 2 to below 0.5."""
    torch.manual_seed(0)
    discriminator = make()
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=3e-3, betas=(0.5, 0.9))

    def hinge(num_items: int) -> Tensor:
        clean = tones(num_items)
        noisy = tones(num_items)
        noisy = noisy + 0.3 * torch.randn_like(noisy)
        return discriminator_hinge(discriminator(clean), discriminator(noisy))

    def unseen() -> float:
        with torch.no_grad():
            return hinge(32).item()

    assert unseen() == pytest.approx(2.0, abs=0.2)
    for step in range(400):
        optimizer.zero_grad()
        hinge(8).backward()
        optimizer.step()
        if step % 10 == 9 and unseen() < 0.5:
            return
    pytest.fail(f"the loss is {unseen():.2f}")
