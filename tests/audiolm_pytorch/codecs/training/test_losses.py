from dataclasses import replace

import pytest
import torch
from torch import nn

from audiolm_pytorch.codecs.discriminators import (
    MultiScaleSTFTDiscriminator,
    MultiScaleWaveDiscriminator,
    ScaleOutput,
)
from audiolm_pytorch.codecs.training.balancer import LossBalancer
from audiolm_pytorch.codecs.training.losses import discriminator_hinge, feature_matching, generator_hinge
from audiolm_pytorch.training import LossOutput, TrainLoop
from tests.helpers.quick import only_quick
from tests.helpers.toy_training import SETTINGS, Tiny, assert_same_run


def outputs_of(seed: int) -> list[ScaleOutput]:
    """Three scales of different sizes and depths."""
    torch.manual_seed(seed)
    return [
        ScaleOutput(2 * torch.randn(2, 1, 5 - k), [torch.randn(2, 3, 4, layer + 2) for layer in range(k + 1)])
        for k in range(3)
    ]


def mean_of(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def test_hinges_equal_a_naive_loop():
    """Oracle in float64: SoundStream eq. 3 and 4, mean over scales of means over items and times."""
    real, fake = outputs_of(0), outputs_of(1)
    wanted_real = mean_of([mean_of([max(0.0, 1 - x) for x in r.logits.double().flatten().tolist()]) for r in real])
    wanted_fake = mean_of([mean_of([max(0.0, 1 + x) for x in f.logits.double().flatten().tolist()]) for f in fake])
    wanted_generator = mean_of([mean_of([max(0.0, 1 - x) for x in f.logits.double().flatten().tolist()]) for f in fake])
    assert discriminator_hinge(real, fake).item() == pytest.approx(wanted_real + wanted_fake, rel=1e-6)
    assert generator_hinge(fake).item() == pytest.approx(wanted_generator, rel=1e-6)


def test_hinge_is_two_for_zero_logits_and_zero_for_large_ones():
    """Signs: positive for real waves, negative for decoded ones; for the generator the opposite."""
    undecided = [ScaleOutput(torch.zeros(1, 1, 3), [])]
    positive, negative = [ScaleOutput(torch.full((1, 1, 3), sign), []) for sign in (1.5, -1.5)]
    assert discriminator_hinge(undecided, undecided).item() == 2.0
    assert discriminator_hinge([positive], [negative]).item() == 0.0
    assert discriminator_hinge([negative], [positive]).item() == 5.0
    assert (generator_hinge([positive]).item(), generator_hinge([negative]).item()) == (0.0, 2.5)


def test_feature_matching_equals_a_naive_loop():
    """Oracle in float64: EnCodec eq. 2, layers of a scale before scales."""
    real, fake = outputs_of(0), outputs_of(1)
    scales = []
    for r, f in zip(real, fake):
        layers = []
        for wanted, got in zip(r.features, f.features):
            pairs = list(zip(wanted.double().flatten().tolist(), got.double().flatten().tolist()))
            distance = mean_of([abs(a - b) for a, b in pairs])
            layers.append(distance / mean_of([abs(a) for a, _ in pairs]))
        scales.append(mean_of(layers))
    assert feature_matching(real, fake).item() == pytest.approx(mean_of(scales), rel=1e-6)


def test_feature_matching_is_relative():
    """EnCodec's form: a discriminator that doubles its features does not change the loss."""
    real, fake = outputs_of(0), outputs_of(1)
    twice = [[ScaleOutput(o.logits, [2 * x for x in o.features]) for o in outputs] for outputs in (real, fake)]
    assert feature_matching(*twice).item() == pytest.approx(feature_matching(real, fake).item(), rel=1e-6)


def test_losses_are_fp32_and_finite():
    """bf16 outputs are summed in float32; real features of zero divide nothing by zero."""
    real = [
        ScaleOutput(o.logits.bfloat16(), [torch.zeros_like(x).bfloat16() for x in o.features]) for o in outputs_of(0)
    ]
    fake = [ScaleOutput(o.logits.bfloat16(), [x.bfloat16() for x in o.features]) for o in outputs_of(1)]
    for loss in (discriminator_hinge(real, fake), generator_hinge(fake), feature_matching(real, fake)):
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        assert torch.isfinite(loss)


@pytest.mark.parametrize("loss", [discriminator_hinge, feature_matching])
def test_outputs_of_other_discriminators_are_refused(loss):
    """A zip that stops early would silently train on a part of the scales."""
    with pytest.raises(ValueError, match="3 outputs for real and 2"):
        loss(outputs_of(0), outputs_of(1)[:2])
    with pytest.raises(ValueError, match="at least one"):
        generator_hinge([])


@pytest.mark.parametrize(
    "discriminator",
    [MultiScaleWaveDiscriminator(width=4), MultiScaleSTFTDiscriminator(width=2, windows_samples=(64, 32))],
)
def test_gradients_of_the_two_sides_do_not_leak(discriminator):
    """The generator's losses leave no gradients on the discriminators, and the reverse."""
    generator = nn.Conv1d(1, 1, 5, padding=2)
    real = torch.randn(2, 1, 200)
    fake = generator(real)
    judged_real, judged_fake = discriminator(real), discriminator(fake)
    loss = generator_hinge(judged_fake) + feature_matching(judged_real, judged_fake)
    loss.backward(inputs=list(generator.parameters()))
    assert all((parameter.grad != 0).any() for parameter in generator.parameters())
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    generator.zero_grad()
    loss = discriminator_hinge(discriminator(real), discriminator(generator(real).detach()))
    loss.backward(inputs=list(discriminator.parameters()))
    # where no logit is beyond the hinge, biases get -1 + 1
    weights = [parameter for name, parameter in discriminator.named_parameters() if not name.endswith("bias")]
    assert all((parameter.grad != 0).any() for parameter in weights)
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_feature_matching_moves_decoded_features_only():
    """Real features are the target: no gradient flows into them, even if one discriminator received both waves."""
    real, fake = outputs_of(0), outputs_of(1)
    for output in [*real, *fake]:
        for feature in output.features:
            feature.requires_grad_()
    feature_matching(real, fake).backward()
    assert all(feature.grad is None for output in real for feature in output.features)
    assert all((feature.grad != 0).any() for output in fake for feature in output.features)


# --- the balancer

WEIGHTS = {"mel": 3.0, "adversarial": 1.0}


def two_losses(wave, target, scale=1.0):
    """Two means over the batch of very different size; the second can be scaled."""
    return {"mel": (wave - target).abs().mean(), "adversarial": scale * (wave * target).square().mean()}


def norm_of(gradient):
    """Root mean square over the batch of the norm of each item's own loss."""
    items = [(len(gradient) * item).double().norm().item() for item in gradient]
    return mean_of([norm**2 for norm in items]) ** 0.5


def explicit_mix(losses, wave, weights, norms):
    """EnCodec eq. 4 term by term, in float64."""
    total = sum(weights[name] for name in losses)
    gradients = {name: torch.autograd.grad(loss, wave, retain_graph=True)[0].double() for name, loss in losses.items()}
    return sum(weights[name] / total * gradients[name] / norms[name] for name in losses)


def test_mix_equals_equation_four_over_several_steps():
    """Oracle: explicit gradients, norms averaged by a bias-corrected loop; right from the first step on."""
    balancer = LossBalancer(WEIGHTS, decay=0.9)
    sums, counts = dict.fromkeys(WEIGHTS, 0.0), 0.0
    for step in range(5):
        wave = torch.randn(3, 1, 50, requires_grad=True)
        losses = two_losses(wave, torch.randn(3, 1, 50) * (step + 1))
        counts = 0.9 * counts + 0.1
        for name, loss in losses.items():
            sums[name] = 0.9 * sums[name] + 0.1 * norm_of(torch.autograd.grad(loss, wave, retain_graph=True)[0])
        norms = {name: value / counts for name, value in sums.items()}
        expected = explicit_mix(losses, wave, WEIGHTS, norms)
        (gradient,) = torch.autograd.grad(balancer(losses, wave), wave)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-7)
        running = balancer.norm_sums / balancer.norm_counts
        assert running.tolist() == pytest.approx([norms[name] for name in WEIGHTS], rel=1e-5)


def test_generator_receives_the_explicit_gradient():
    """The gradient of each parameter is the mix, backpropagated through the generator."""
    generator = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 1, 3, padding=1))
    source, target = torch.randn(2, 2, 1, 40).unbind()
    wave = generator(source)
    losses = two_losses(wave, target)
    norms = {name: norm_of(torch.autograd.grad(loss, wave, retain_graph=True)[0]) for name, loss in losses.items()}
    mix = explicit_mix(losses, wave, WEIGHTS, norms).float()
    expected = torch.autograd.grad(wave, list(generator.parameters()), mix, retain_graph=True)
    LossBalancer(WEIGHTS)(losses, wave).backward(inputs=list(generator.parameters()))
    for parameter, wanted in zip(generator.parameters(), expected):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1000.0, 1e-3])
def test_scale_of_a_loss_does_not_matter_once_its_norm_settled(scale):
    """A loss that becomes 1000 times larger during the run returns to its old share."""
    torch.manual_seed(1)
    wave, target = torch.randn(2, 1, 30, requires_grad=True), torch.randn(2, 1, 30)
    balancer = LossBalancer(WEIGHTS, decay=0.9)
    (before,) = torch.autograd.grad(balancer(two_losses(wave, target), wave), wave)
    for _ in range(250):
        (after,) = torch.autograd.grad(balancer(two_losses(wave, target, scale), wave), wave)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5)


def test_weights_are_shares_of_the_gradient():
    """Losses on separate halves of the wave: the norms of the halves are their shares."""
    wave = torch.randn(1, 1, 40, requires_grad=True)
    losses = {"a": wave[..., :20].square().sum(), "b": 100 * wave[..., 20:].abs().sum()}
    (gradient,) = torch.autograd.grad(LossBalancer({"a": 3, "b": 1})(losses, wave), wave)
    assert gradient[..., :20].norm().item() == pytest.approx(0.75, rel=1e-5)
    assert gradient[..., 20:].norm().item() == pytest.approx(0.25, rel=1e-5)


def test_losses_that_are_present_share_the_whole_gradient():
    """Before the adversarial phase only some losses are passed; these share the whole gradient."""
    wave = torch.randn(1, 1, 40, requires_grad=True)
    balancer = LossBalancer({"mel": 1.0, "adversarial": 9.0, "off": 0.0})
    (gradient,) = torch.autograd.grad(balancer({"mel": wave.square().mean(), "off": wave.sum()}, wave), wave)
    assert gradient.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert (balancer.norm_counts > 0).tolist() == [True, False, False]


def test_parts_of_a_batch_average_to_the_batch():
    """Accumulation and processes average gradients of means; one batch of four equals two of two."""
    directions = nn.functional.normalize(torch.randn(4, 1, 25), dim=-1)
    wave = torch.randn(4, 1, 25, requires_grad=True)

    def gradient_of(part: slice) -> torch.Tensor:
        piece = wave[part]
        loss = 7 * (piece * directions[part]).sum(dim=(1, 2)).mean()
        return torch.autograd.grad(LossBalancer({"a": 1.0})({"a": loss}, piece), wave)[0]

    whole = gradient_of(slice(0, 4))
    halves = (gradient_of(slice(0, 2)) + gradient_of(slice(2, 4))) / 2
    torch.testing.assert_close(whole, halves, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(whole, directions / 4, rtol=1e-5, atol=1e-7)


def test_zero_gradients_are_finite_and_do_not_count():
    """Exact reconstruction and a saturated hinge: no division by zero, and the next gradient is not blown up."""
    balancer = LossBalancer(WEIGHTS, decay=0.5)
    wave = torch.randn(2, 1, 30, requires_grad=True)
    for target in (wave.detach(), wave.detach(), wave.detach() + 1):
        losses = {"mel": (wave - target).square().mean(), "adversarial": wave.new_zeros(())}
        surrogate = balancer(losses, wave)
        (gradient,) = torch.autograd.grad(surrogate, wave)
        assert torch.isfinite(surrogate)
        assert torch.isfinite(gradient).all()
        assert norm_of(gradient) == pytest.approx(0.0 if torch.equal(target, wave.detach()) else 0.75, rel=1e-4)
    assert balancer.norm_sums[1] == balancer.norm_counts[1] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_loss_shows_and_leaves_the_norms_alone(bad):
    """The guard of the loop receives the NaN; the running norms do not change."""
    balancer = LossBalancer(WEIGHTS)
    wave, target = torch.randn(2, 1, 30, requires_grad=True), torch.randn(2, 1, 30)
    balancer(two_losses(wave, target), wave)
    before = {name: buffer.clone() for name, buffer in balancer.state_dict().items()}
    surrogate = balancer(two_losses(wave, target, bad), wave)
    assert not torch.isfinite(surrogate)
    after = balancer.state_dict()
    assert torch.equal(before["norm_sums"][1], after["norm_sums"][1])
    assert torch.equal(before["norm_counts"][1], after["norm_counts"][1])


def test_bad_gradient_of_a_finite_loss_shows():
    """sqrt at 0: the loss is 0, its gradient is not finite, and so is the mixed loss."""
    wave = torch.zeros(1, 1, 5, requires_grad=True)
    assert torch.isnan(LossBalancer({"a": 1.0})({"a": (wave * 0).sqrt().sum()}, wave))


def test_value_is_the_weighted_mean_of_the_losses():
    """The value of the mixed loss is the weighted mean, although only its gradient is used."""
    wave, target = torch.randn(2, 1, 30, requires_grad=True), torch.randn(2, 1, 30)
    losses = two_losses(wave, target)
    expected = (3 * losses["mel"] + losses["adversarial"]) / 4
    assert LossBalancer(WEIGHTS)(losses, wave).item() == pytest.approx(expected.item(), rel=1e-6)


def test_autocast_changes_little():
    """A bf16 wave under autocast: norms and mix in float32, close to the fp32 run."""
    source, target = torch.randn(2, 2, 1, 200).unbind()
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        generator, balancer = nn.Conv1d(1, 1, 5, padding=2), LossBalancer(WEIGHTS)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            wave = generator(source)
            surrogate = balancer(two_losses(wave.float(), target) if not enabled else two_losses(wave, target), wave)
        surrogate.backward()
        assert (surrogate.dtype, balancer.norm_sums.dtype) == (torch.float32, torch.float32)
        gradients.append(generator.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.02)


def test_what_cannot_be_balanced_is_refused():
    """A commitment loss, a misspelt name or a wave without gradient would otherwise be dropped silently."""
    wave = torch.randn(1, 1, 20, requires_grad=True)
    other = torch.randn(3, requires_grad=True)
    balancer = LossBalancer({"mel": 1.0, "off": 0})
    with pytest.raises(ValueError, match="'mel' does not depend on the wave"):
        balancer({"mel": other.sum()}, wave)
    with pytest.raises(ValueError, match="waveform"):
        balancer({"waveform": wave.sum()}, wave)
    with pytest.raises(ValueError, match="at least one"):
        balancer({"off": wave.sum()}, wave)
    with pytest.raises(ValueError, match="must require a gradient"):
        balancer({"mel": wave.sum()}, wave.detach())
    for weights in ({}, {"mel": 0.0}, {"mel": -1.0, "b": 2.0}):
        with pytest.raises(ValueError, match="weights of 0 or more"):
            LossBalancer(weights)
    with pytest.raises(ValueError, match="decay"):
        LossBalancer(WEIGHTS, decay=1.0)


@pytest.mark.parametrize("precision", only_quick(["fp32", "bf16"], ["bf16"]))
def test_balanced_run_resumes_bit_for_bit(tmp_path, monkeypatch, precision):
    """In the loop, with accumulated batches: the norms are checkpointed and restored."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def task() -> Tiny:
        torch.manual_seed(0)
        module = nn.ModuleDict({"generator": nn.Linear(4, 4), "balancer": LossBalancer(WEIGHTS, decay=0.9)})

        def loss(batch: torch.Tensor, step: int) -> LossOutput:
            wave = module["generator"](batch)
            surrogate = module["balancer"](two_losses(wave, batch), wave)
            return LossOutput(surrogate + module["generator"].weight.square().mean())

        return Tiny(module, loss)

    settings = replace(SETTINGS, grad_accum_every=2, precision=precision)
    straight = task()
    TrainLoop(straight, settings, tmp_path / "straight").train()
    for _ in range(2):
        TrainLoop(task(), settings, tmp_path / "resumed").train(stop_after_steps=6)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    # 24 gradients were averaged: 1 - 0.9^24
    assert straight.module["balancer"].norm_counts.tolist() == pytest.approx([1 - 0.9**24] * 2, rel=1e-5)
