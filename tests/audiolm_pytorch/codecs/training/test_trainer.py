"""Training of codecs: adversarial phases, their isolation and resume, fine-tuning, what is shown and refused."""

import json
import logging
import math
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.codecs import SoundStream
from audiolm_pytorch.codecs.discriminators import (
    ComplexSTFTDiscriminator,
    Discriminators,
    MultiScaleSTFTDiscriminator,
    MultiScaleWaveDiscriminator,
    soundstream_discriminators,
)
from audiolm_pytorch.codecs.quantizers import code_usage
from audiolm_pytorch.codecs.training import MEL_ONLY, CodecLossWeights, SoundStreamTrainer
from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from audiolm_pytorch.codecs.training.monitoring import CodeUsage, MelWarning
from audiolm_pytorch.codecs.training.task import CodecBatch, codebooks_are_untrained
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.saving.modules import load_module
from audiolm_pytorch.training import TrainLoop
from audiolm_pytorch.training.distributed import PersistentBuffers
from audiolm_pytorch.training.optimizer import PhaseOptimizer
from tests.helpers.quick import only_quick
from tests.helpers.small_codecs import RATE_HZ, tiny_codec, write_chords

ALL_LOSSES = CodecLossWeights()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four clips of chords with a decay, 1.2 s."""
    return write_chords(tmp_path_factory.mktemp("chords"), seconds=1.2)


def tiny_discriminators(seed=1):
    torch.manual_seed(seed)
    stft = MultiScaleSTFTDiscriminator(width=2, windows_samples=(256, 128))
    return Discriminators([MultiScaleWaveDiscriminator(width=4, scales=1), stft])


def trainer_of(folder, results, steps, codec=None, loss_weights=MEL_ONLY, discriminators=None, **settings):
    codec = codec or tiny_codec()
    if loss_weights.adversarial and discriminators is None:
        discriminators = tiny_discriminators()
    return SoundStreamTrainer(
        codec,
        folder=folder,
        num_train_steps=steps,
        results_folder=results,
        loss_weights=loss_weights,
        discriminators=discriminators,
        **{"batch_size": 2, "warmup_steps": 2, "data_max_length": 6400, **settings},
    )


def rows_of(results, phase=None):
    rows = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return [row for row in rows if phase in (None, row["phase"])]


def state_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def codebooks_of(codec):
    return torch.stack([codec.quantizer.codebook(level) for level in range(codec.num_quantizers)])


def same_state(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def optimizers_of(trainer):
    """Optimizers of the phases as the loop builds them."""
    names = {parameter: name for name, parameter in trainer.task.module.named_parameters() if parameter.requires_grad}
    buffers, settings = PersistentBuffers(trainer.task.module), trainer.loop.settings
    trainer.task.module.train()
    return [PhaseOptimizer(one, names, buffers, settings, Accelerator(cpu=True)) for one in trainer.task.phases]


@pytest.mark.parametrize("precision", only_quick(["fp32", "bf16"], ["bf16"]))
def test_codebooks_are_initialised_in_either_precision(folder, tmp_path, precision):
    """The codebooks are initialised inside a training step; under autocast their frames are bf16."""
    trainer = trainer_of(folder, tmp_path, steps=4, unquantized_steps=2, precision=precision)
    before = codebooks_of(trainer.task.codec)
    trainer.train()
    after = codebooks_of(trainer.task.codec)
    assert after.dtype == torch.float32
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_optimizers_of_the_phases_can_be_chosen(folder, tmp_path):
    """A function is called for both phases; a dict chooses for some, and the others keep the defaults of a codec."""
    rmsprop = partial(torch.optim.RMSprop, lr=np.float64(1e-3))
    trainer = trainer_of(folder, tmp_path / "both", 4, loss_weights=ALL_LOSSES, optimizer=rmsprop, max_grad_norm=1)
    assert [type(phase.optimizer) for phase in optimizers_of(trainer)] == [torch.optim.RMSprop] * 2
    trainer.train(stop_after_steps=2)
    assert trainer.train().step == 4
    trainer = trainer_of(folder, tmp_path / "one", 4, loss_weights=ALL_LOSSES, optimizer={"discriminator": rmsprop})
    generator, discriminator = (phase.optimizer for phase in optimizers_of(trainer))
    assert generator.defaults["betas"] == (0.8, 0.99) and type(discriminator) is torch.optim.RMSprop
    with pytest.raises(ValueError, match="has phases .'discriminator', 'generator'., but .*'critic'"):
        trainer_of(folder, tmp_path / "none", 4, loss_weights=ALL_LOSSES, optimizer={"critic": rmsprop})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "steps", "gain"), [(MEL_ONLY, 120, 2), (ALL_LOSSES, 80, 1.5)], ids=["mel", "adversarial"]
)
def test_codec_learns_a_few_clips(folder, tmp_path, weights, steps, gain, caplog):
    """The codec reproduces a few clips within seconds of training."""
    codec = tiny_codec(dim=48, decoder_depth=2)
    settings = dict(batch_size=4, data_max_length=RATE_HZ // 4, learning_rate=5e-4, validate_every=40)
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(folder, tmp_path, steps, codec, weights, **settings)
        wave = trainer.task.valid.get(0, 0).waves[RATE_HZ][None]
        loss_fn = MultiScaleMelLoss(RATE_HZ)

        def distance():
            decoded = codec.decode_from_codebook_indices(codec.tokenize(wave), num_samples=wave.shape[-1])
            return loss_fn(decoded, wave[:, None]).item()

        codec.eval()
        before = distance()
        trainer.train()
    assert distance() < before / gain
    clips = [trainer.task.train.get(0, index).waves[RATE_HZ][None] for index in range(len(trainer.task.train))]
    usage = code_usage(torch.cat([codec.tokenize(clip) for clip in clips]), 16)["usage"]
    assert usage.min() > 0.1, usage
    if weights is MEL_ONLY:
        assert not [record for record in caplog.records if "codec training" in record.message]


@pytest.mark.slow
@pytest.mark.parametrize("adversarial", [False, True])
def test_resumed_codec_is_bit_identical(folder, tmp_path, adversarial):
    """Codebooks and discriminators begin in the middle of the run; resume restores them and the balancer."""
    settings = dict(steps=6, unquantized_steps=2, log_every=2, validate_every=4)
    if adversarial:
        settings |= dict(loss_weights=ALL_LOSSES, adversarial_start_step=3, grad_accum_every=2)
    trainer_of(folder, tmp_path / "straight", **settings).train()
    for number, stop in enumerate((3, 1, None)):
        codec, discriminators = tiny_codec(), tiny_discriminators(seed=1 + number) if adversarial else None
        trainer_of(
            folder, tmp_path / "resumed", codec=codec, discriminators=discriminators, **settings
        ).train(stop_after_steps=stop)  # fmt: skip
    files = sorted(path.relative_to(tmp_path / "straight") for path in (tmp_path / "straight").rglob("*.safetensors"))
    assert len(files) == (4 if adversarial else 3)
    for file in files:
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes(), file
    assert rows_of(tmp_path / "straight") == rows_of(tmp_path / "resumed")
    names = (tmp_path / "straight" / "checkpoint" / "model.safetensors").read_bytes()[:20000].decode(errors="ignore")
    assert ("balancer.norm_sums" in names and "discriminators.parts" in names) == adversarial


def test_mel_alone_needs_no_balancer(folder, tmp_path):
    """The bundled model's recipe: no discriminators, no balancer, the loss bit for bit mel + commitment."""
    task = trainer_of(folder, tmp_path, steps=2, unquantized_steps=0).task
    assert [phase.name for phase in task.phases] == ["generator"] and task.balancer is task.discriminators is None
    task.codec.quantizer.initialise(torch.randn(100, 16))
    task.module.train()
    batch, oracle = task.batch([(0, 0), (0, 1)]), tiny_codec().train()
    oracle.load_state_dict(task.codec.state_dict())
    torch.manual_seed(5)
    output = task.phases[0].loss(batch, 0)
    output.loss.backward()
    torch.manual_seed(5)
    expected = oracle(batch.wave)
    loss = MultiScaleMelLoss(RATE_HZ)(expected.wave, batch.wave) + expected.commitment_loss
    loss.backward()
    assert torch.equal(output.loss, loss)
    for (name, one), other in zip(task.codec.named_parameters(), oracle.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def convolutional_codec():
    torch.manual_seed(0)
    return SoundStream(
        codebook_size=16, rq_num_quantizers=2, codebook_dim=8, channels=2, strides=(4, 5), attn_depth=1
    )  # fmt: skip


@torch.no_grad()
def spread_logits(discriminators, wave):
    """Within -1..1 the hinge is linear, and the gradients of real and decoded waves into biases may cancel."""
    last = [module for name, module in discriminators.named_modules() if name.endswith(".last")]
    for module, scale in zip(last, discriminators(wave), strict=True):
        module.parametrizations.weight.original0 *= 3 / scale.logits.std()


@pytest.mark.slow
@pytest.mark.parametrize("make_codec", [tiny_codec, convolutional_codec])
def test_phases_do_not_leak_and_reach_every_parameter(folder, tmp_path, make_codec):
    """A step of one phase changes all weights of its module and none of the other."""
    codec, discriminators = make_codec(), tiny_discriminators()
    discriminators.parts.append(ComplexSTFTDiscriminator(width=8, window_samples=256, hop_samples=128))
    trainer = trainer_of(
        folder, tmp_path, 2, codec, ALL_LOSSES, discriminators, unquantized_steps=0, adversarial_start_step=0
    )
    optimizers = optimizers_of(trainer)
    in_groups = [one for phase in optimizers for group in phase.optimizer.param_groups for one in group["params"]]
    trained = [parameter for parameter in trainer.task.module.parameters() if parameter.requires_grad]
    assert len(in_groups) == len(set(in_groups)) == len(trained) and set(in_groups) == set(trained)
    batches = [trainer.task.batch([(0, 0), (0, 1)])]
    spread_logits(discriminators, batches[0].wave)
    modules = {"codec": codec, "discriminators": discriminators}
    for phase, (moved, still) in zip(optimizers, [("codec", "discriminators"), ("discriminators", "codec")]):
        before = {name: state_of(module) for name, module in modules.items()}
        assert phase.step(batches, 0) is not None
        assert same_state(before[still], modules[still].state_dict())
        unmoved = [
            name for name, value in modules[moved].named_parameters() if torch.equal(value, before[moved][name])
        ]  # fmt: skip
        assert unmoved == []
        assert all(parameter.grad is None for parameter in trained)


@pytest.mark.slow
def test_a_plain_backward_does_not_leak_either(folder, tmp_path):
    """Without the loop: the discriminators are frozen for one loss, the wave is detached for the other."""
    task = trainer_of(
        folder, tmp_path, 2, loss_weights=ALL_LOSSES, unquantized_steps=0, adversarial_start_step=0
    ).task  # fmt: skip
    task.module.train()
    batch = task.batch([(0, 0), (0, 1)])
    task.phases[0].loss(batch, 0).loss.backward()
    reached = [name for name, parameter in task.module.named_parameters() if parameter.grad is not None]
    assert reached and all(name.startswith("codec.") for name in reached)
    task.module.zero_grad(set_to_none=True)
    task.phases[1].loss(batch, 0).loss.backward()
    reached = [name for name, parameter in task.module.named_parameters() if parameter.grad is not None]
    assert reached and all(name.startswith("discriminators.") for name in reached)
    assert all(parameter.requires_grad for parameter in task.discriminators.parameters())


@pytest.mark.slow
def test_one_reconstruction_serves_both_phases(folder, tmp_path):
    """With several batches per step, the discriminators receive the reconstruction of each batch, computed once."""
    trainer = trainer_of(
        folder, tmp_path, 2, loss_weights=ALL_LOSSES, unquantized_steps=0, adversarial_start_step=0, grad_accum_every=3
    )
    task, made, judged = trainer.task, [], []
    task.codec.register_forward_hook(lambda module, inputs, output: made.append(output))
    task.discriminators.register_forward_pre_hook(lambda module, inputs: judged.append(inputs[0]))
    trainer.train(stop_after_steps=1)
    made = [output.wave.detach() for output in made if output.codes[0, 0, 0] >= 0]
    assert len(made) == 3
    in_second_phase = judged[-6:]
    assert not any(wave.requires_grad for wave in in_second_phase)
    for number, wave in enumerate(made):
        assert torch.equal(in_second_phase[2 * number + 1], wave)
    with pytest.raises(RuntimeError, match="must follow the generator phase"):
        task.phases[1].loss(CodecBatch(torch.zeros(1, 1, 640), torch.zeros(1, 1, 640)), 0)


def poison(task, bad_steps):
    """Make the generator's loss NaN at some steps."""
    inner = task._generator_loss

    def loss(batch, step):
        output = inner(batch, step)
        if step not in bad_steps:
            return output
        return type(output)(output.loss * torch.nan, output.metrics)

    task.phases = (type(task.phases[0])("generator", (task.codec,), loss), *task.phases[1:])


@pytest.mark.slow
def test_skipped_step_while_codebooks_start(folder, tmp_path):
    """A skipped step restores the untrained codebooks; the next step initialises them again."""
    trainer = trainer_of(folder, tmp_path, 5, unquantized_steps=2, log_every=1)
    poison(trainer.task, bad_steps=(2,))
    starts = []
    inner = trainer.task._initialise_codebooks
    trainer.task._initialise_codebooks = lambda: (starts.append(1), inner())
    trainer.train(stop_after_steps=3)
    assert len(starts) == 1 and codebooks_are_untrained(trainer.task.codec)
    trainer.train()
    assert len(starts) == 2 and not codebooks_are_untrained(trainer.task.codec)


@pytest.mark.slow
def test_codebooks_start_again_when_a_run_returns_to_its_checkpoint(folder, tmp_path):
    """An error after the initialisation drops the codebooks with the state in memory."""
    trainer = trainer_of(folder, tmp_path / "returned", 4, unquantized_steps=1)
    inner, calls = trainer.task.batch, []

    def batch(indices):
        calls.append(len(indices))
        if calls.count(2) == 3:
            raise KeyboardInterrupt
        return inner(indices)

    trainer.task.batch = batch
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    straight = trainer_of(folder, tmp_path / "straight", 4, unquantized_steps=1)
    straight.train()
    assert same_state(state_of(straight.task.codec), trainer.task.codec.state_dict())


@pytest.mark.slow
def test_skipped_generator_step_does_not_skip_the_discriminators(folder, tmp_path):
    """A NaN in one phase skips that phase; the other uses the reconstruction of the same step."""
    trainer = trainer_of(
        folder, tmp_path, 4, loss_weights=ALL_LOSSES, unquantized_steps=0, adversarial_start_step=0, log_every=1
    )
    poison(trainer.task, bad_steps=(1,))
    trainer.train()
    last = rows_of(tmp_path, "generator")[-1]
    assert last["skipped"] == 1
    assert all(row["loss"] is not None for row in rows_of(tmp_path, "discriminator"))
    assert all(torch.isfinite(value).all() for value in trainer.task.module.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_discriminators_begin_at_their_step(folder, tmp_path, precision):
    """Before that step the loss is reconstruction alone; from it on both phases write metrics, in either precision."""
    trainer = trainer_of(
        folder,
        tmp_path,
        4,
        loss_weights=ALL_LOSSES,
        unquantized_steps=1,
        adversarial_start_step=2,
        log_every=1,
        precision=precision,
    )
    before = state_of(trainer.task.discriminators)
    trainer.train(stop_after_steps=2)
    assert same_state(before, trainer.task.discriminators.state_dict())
    trainer.train()
    generator, discriminator = rows_of(tmp_path, "generator"), rows_of(tmp_path, "discriminator")
    assert [row["step"] for row in discriminator] == [3, 4]
    assert ["adversarial" in row and "feature_matching" in row for row in generator] == [False, False, True, True]
    assert all({"mel", "waveform"} <= set(row) for row in generator)
    assert ["commitment" in row for row in generator] == [False, True, True, True]
    assert all(0 < row["loss"] < 4 for row in discriminator)
    assert not same_state(before, trainer.task.discriminators.state_dict())


@pytest.mark.slow
def test_fine_tuning_continues_with_codebooks_and_discriminators(folder, tmp_path):
    """A second run loads the result of the first, and does not initialise the codebooks again."""
    weights = dict(loss_weights=ALL_LOSSES, adversarial_start_step=1)
    first = trainer_of(folder, tmp_path / "first", 3, **weights)
    assert first.task.unquantized_steps == 0 and trainer_of(folder, tmp_path / "x", 30).task.unquantized_steps == 3
    first.train()
    codec = SoundStream.init_and_load_from(tmp_path / "first" / "codec")
    discriminators = load_module(tmp_path / "first" / "discriminators", expect=Discriminators)
    assert same_state(state_of(first.task.discriminators), discriminators.state_dict())
    assert codebooks_are_untrained(tiny_codec()) and not codebooks_are_untrained(codec)
    second = trainer_of(folder, tmp_path / "second", 30, codec, ALL_LOSSES, discriminators, adversarial_start_step=0)
    assert second.task.unquantized_steps == 0
    second.task._initialise_codebooks = lambda: pytest.fail("trained codebooks were started anew")
    before = codebooks_of(codec)
    second.train(stop_after_steps=1)
    moved = (codebooks_of(codec) - before).norm() / before.norm()
    assert 0 < moved < 0.5


def test_quantizers_without_codebooks_are_never_untrained():
    """Finite scalars and signs need no initialisation, so training uses their codes from the first step."""
    for flags in ({"use_finite_scalar_quantizer": True}, {"use_lookup_free_quantizer": True}):
        codec = SoundStream(codebook_size=64, rq_num_quantizers=2, codebook_dim=8, channels=2, **flags)
        assert not codebooks_are_untrained(codec)
    grouped = SoundStream(codebook_size=16, rq_num_quantizers=2, rq_groups=2, codebook_dim=8, channels=2)
    assert codebooks_are_untrained(grouped)
    grouped.quantizer.initialise(torch.randn(64, 8))
    assert not codebooks_are_untrained(grouped)


@pytest.mark.slow
def test_validation_reports_distances_and_use_of_the_codes(folder, tmp_path):
    """Oracle: the distances by hand; there are no metrics of codes before quantization begins."""
    trainer = trainer_of(folder, tmp_path, 4, unquantized_steps=2, validate_every=1)
    trainer.train()
    early, late = rows_of(tmp_path, "valid")[0], rows_of(tmp_path, "valid")[-1]
    assert not any(name.startswith(("usage", "perplexity")) for name in early)
    assert {"mel_distance", "si_sdr_db"} <= set(early)
    assert {"mel_distance_half_levels", "usage_level_2", "perplexity_level_2"} <= set(late)
    codec, loss_fn = trainer.task.codec.eval(), MultiScaleMelLoss(RATE_HZ)
    waves = [trainer.task.valid.get(0, index).waves[RATE_HZ][None, None] for index in range(len(trainer.task.valid))]
    half = [codec.decode_from_codebook_indices(codec.tokenize(wave)[..., :1], wave.shape[-1]) for wave in waves]
    expected = sum(loss_fn(one, wave).item() for one, wave in zip(half, waves)) / len(waves)
    assert late["mel_distance_half_levels"] == pytest.approx(expected, rel=1e-5)


def test_training_rows_report_the_use_of_the_codes():
    """Oracle: `code_usage` for one batch; unused codes fade; a level that was left out keeps its counts."""
    usage = CodeUsage(num_quantizers=2, codebook_size=8)
    codes = torch.randint(8, (2, 5, 2))
    first = usage(codes)
    for name, values in code_usage(codes, 8).items():
        assert [float(first[f"{name}_level_{level}"]) for level in (1, 2)] == pytest.approx(values.tolist())
    kept = usage.counts[1].clone()
    one_code = torch.stack([torch.zeros(2, 5), torch.full((2, 5), -1)], dim=-1).long()
    for _ in range(300):
        last = usage(one_code)
    assert float(last["usage_level_1"]) == 1 / 8
    assert float(last["perplexity_level_1"]) == pytest.approx(1 / 8, rel=0.01)
    assert torch.equal(usage.counts[1], kept)


@pytest.mark.slow
def test_samples_are_pairs_of_original_and_reconstruction(folder, tmp_path):
    """WAV files of the same length; the reconstructions carry their step."""
    trainer_of(folder, tmp_path / "run", 2, unquantized_steps=0, validate_every=1).train()
    samples = tmp_path / "run" / "samples"
    expected = {"1_original.wav", "1_step_0000001.wav", "1_step_0000002.wav"}
    assert {path.name for path in samples.iterdir()} == expected
    waves = [read_audio(samples / name)[0] for name in sorted(expected)]
    assert waves[0].shape == waves[1].shape and waves[0].abs().max() > 0.1


def rows_of_distances(distances, codes_from=0):
    """Rows of validation every 50 steps; codes are in use from that step on."""
    rows = []
    for number, distance in enumerate(distances, start=1):
        row = {"step": 50 * number, "phase": "valid", "mel_distance": distance}
        rows += [{"step": 50 * number, "phase": "generator", "mel": distance}]
        rows += [row | ({"usage_level_1": 0.5} if 50 * number >= codes_from else {})]
    return rows


@pytest.mark.parametrize(
    ("distances", "codes_from", "num_warnings"),
    [
        ([3.0, 2.0, 1.5, 1.4], 0, 0),
        ([3.0, 3.0, 3.0, 3.1], 0, 1),
        ([3.0, 5.0, 2.9, 2.8], 0, 1),
        ([3.0, math.nan, None, math.nan], 0, 1),
        ([1.0, 0.9, 2.0, 1.9], 150, 0),
        ([1.0, 0.9, 2.0, 2.1], 150, 1),
    ],
    ids=["falls", "stays", "rises", "not finite", "falls with codes", "rises with codes"],
)
def test_one_warning_if_the_mel_distance_does_not_fall(distances, codes_from, num_warnings, caplog):
    """The comparison starts again where quantization begins, because the distance jumps there in every run."""
    warning = MelWarning(num_train_steps=200)
    with caplog.at_level(logging.WARNING):
        for row in rows_of_distances(distances, codes_from):
            warning(row)
    assert len(caplog.records) == num_warnings
    assert all("has not fallen" in record.getMessage() for record in caplog.records)


@pytest.mark.slow
def test_training_warns_if_the_mel_distance_does_not_fall(folder, tmp_path, caplog):
    """A learning rate of nearly 0, over the loop and after a resume: one warning in the log."""
    settings = dict(learning_rate=1e-20, unquantized_steps=0, validate_every=50, data_max_length=1600, batch_size=1)
    with caplog.at_level(logging.WARNING):
        for stop in (60, None):
            trainer_of(folder, tmp_path, 150, loss_weights=MEL_ONLY, **settings).train(stop_after_steps=stop)
    assert sum("has not fallen" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.slow
def test_stereo_codec_trains_from_stereo_and_mono_files(tmp_path):
    """Channels reach the codec as they are in the file, through the cache and without it; mono is copied."""
    data = tmp_path / "data"
    data.mkdir()
    stereo = np.random.default_rng(0).uniform(-0.3, 0.3, (RATE_HZ, 2))
    soundfile.write(data / "0.wav", stereo, RATE_HZ)
    soundfile.write(data / "1.wav", stereo[:, 0], RATE_HZ)
    codec = tiny_codec(audio_channels=2)
    trainer = trainer_of(data, tmp_path / "run", 2, codec, ALL_LOSSES, soundstream_discriminators(2, width=8))
    both = [*trainer.task.train.items, *trainer.task.valid.items]
    for cache_bytes in (0, 2**30):
        crops = CropDataset(sorted(both, key=lambda item: item.path), 0.4, [RATE_HZ], 0, cache_bytes, channels=2)
        first, second = (crops.get(0, index).waves[RATE_HZ] for index in (0, 1))
        assert first.shape == second.shape == (2, 6400)
        assert torch.equal(second[0], second[1]) and not torch.equal(first[0], first[1])
        start = round(crops.get(0, 0).start_seconds * RATE_HZ)
        assert np.allclose(first.numpy(), stereo[start : start + 6400].T, atol=1e-4)
    assert trainer.task.batch([(0, 0), (1, 0)]).wave.shape == (2, 2, 6400)
    trainer.train()
    assert rows_of(tmp_path / "run", "generator")[-1]["skipped"] == 0


@pytest.mark.parametrize("num_files", only_quick([1, 3], [1]))
def test_few_files_train(folder, tmp_path, num_files):
    """One file, and fewer files than a batch: training repeats them with other crops."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(num_files):
        (data / f"{number}.wav").write_bytes((folder / f"{number}.wav").read_bytes())
    assert trainer_of(data, tmp_path / "run", 1, batch_size=5).train().step == 1


def test_unusable_files_are_named(folder, tmp_path):
    """A corrupt file is left out; one that breaks later ends the run. Both are named."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "good.wav").write_bytes((folder / "0.wav").read_bytes())
    (data / "bad.wav").write_bytes(b"RIFF but no audio")
    trainer = trainer_of(data, tmp_path / "run", 2)
    assert [item.path.name for item in trainer.task.train.items] == ["good.wav"]
    (data / "good.wav").write_bytes(b"RIFF gone")
    with pytest.raises(ValueError, match="good.wav"):
        trainer.train()
    with pytest.raises(ValueError, match="bad.wav"):
        trainer_of(data, tmp_path / "none", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        trainer_of(tmp_path / "empty", tmp_path / "none", 2)


@pytest.mark.slow
def test_silent_crops_keep_the_losses_finite(tmp_path):
    """Silence alone: no loss, metric or weight may become NaN, with discriminators and balancer."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        soundfile.write(data / f"{number}.wav", np.zeros(RATE_HZ // 2), RATE_HZ)
    weights = dict(loss_weights=ALL_LOSSES, adversarial_start_step=1)
    trainer = trainer_of(data, tmp_path / "run", 4, unquantized_steps=1, log_every=1, **weights)
    trainer.train()
    values = [value for row in rows_of(tmp_path / "run") for value in row.values()]
    assert all(value is not None and (isinstance(value, str) or math.isfinite(value)) for value in values)
    assert rows_of(tmp_path / "run")[-2]["skipped"] == 0


def test_impossible_losses_and_parts_are_refused(folder, tmp_path):
    """The constructor raises an error for each."""
    with pytest.raises(ValueError, match="above 0"):
        CodecLossWeights(mel=0.0, waveform=0.0, adversarial=0.0, feature_matching=0.0)
    with pytest.raises(ValueError, match="feature_matching needs adversarial"):
        CodecLossWeights(adversarial=0.0)
    with pytest.raises(ValueError, match="pass both or neither"):
        trainer_of(folder, tmp_path, 1, discriminators=tiny_discriminators())
    only_judged = CodecLossWeights(mel=0.0, waveform=0.0)
    assert trainer_of(folder, tmp_path, 8, loss_weights=only_judged).task.adversarial_start_step == 0
    with pytest.raises(ValueError, match="no loss in the 3 steps"):
        trainer_of(folder, tmp_path, 8, loss_weights=only_judged, adversarial_start_step=3)
    with pytest.raises(TypeError, match="not a registered module class"):
        trainer_of(folder, tmp_path, 1, loss_weights=ALL_LOSSES, discriminators=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no denoising condition"):
        trainer_of(folder, tmp_path, 1, noise_folder=folder)


def test_without_discriminators_the_losses_are_reconstruction_only(folder, tmp_path):
    """Without discriminators the default has no adversarial losses."""
    trainer = SoundStreamTrainer(
        tiny_codec(), folder=folder, batch_size=1, num_train_steps=100, results_folder=tmp_path
    )  # fmt: skip
    assert [phase.name for phase in trainer.task.phases] == ["generator"]
    assert set(trainer.task.weights.on_wave) == {"mel", "waveform"}
    with pytest.raises(ValueError, match="no discriminators and an adversarial weight of 0.1; pass both"):
        SoundStreamTrainer(
            tiny_codec(), folder=folder, batch_size=1, num_train_steps=1, loss_weights=CodecLossWeights()
        )  # fmt: skip


def test_a_run_is_not_resumed_with_other_losses(folder, tmp_path):
    """The losses must not change when a run is resumed."""
    trainer_of(folder, tmp_path, 4, unquantized_steps=1).train(stop_after_steps=2)
    with pytest.raises(ValueError, match="loss_weights"):
        trainer_of(
            folder, tmp_path, 4, loss_weights=CodecLossWeights().reconstruction_only, unquantized_steps=1
        ).train()
    with pytest.raises(ValueError, match="unquantized_steps"):
        trainer_of(folder, tmp_path, 4, unquantized_steps=0).train()


def test_incompatible_discriminators_are_refused_at_the_start(folder, tmp_path):
    """Mono discriminators of a stereo codec, or unused ones, raise an error in the constructor."""
    stereo = tiny_codec(audio_channels=2)
    with pytest.raises(ValueError, match=r"\[b, 1, n\]"):
        trainer_of(folder, tmp_path, 8, stereo, ALL_LOSSES)
    with pytest.raises(ValueError, match="never use the discriminators in 8 steps"):
        trainer_of(folder, tmp_path, 8, loss_weights=ALL_LOSSES, adversarial_start_step=8)


@pytest.mark.slow
def test_discriminators_lead_before_the_codec_uses_them(folder, tmp_path):
    """Discriminators begin at a quarter of the run, and the codec uses their losses some steps later."""
    trainer = trainer_of(folder, tmp_path, 48, loss_weights=ALL_LOSSES, unquantized_steps=1, log_every=1)
    assert [(phase.name, phase.first_step) for phase in trainer.task.phases] == [
        ("generator", 0),
        ("discriminator", 12),
    ]
    trainer.train(stop_after_steps=17)
    heeded = [row["step"] for row in rows_of(tmp_path, "generator") if "adversarial" in row]
    judging = [row["step"] for row in rows_of(tmp_path, "discriminator")]
    assert (judging, heeded) == ([13, 14, 15, 16, 17], [16, 17])


def test_crop_length_is_given_once(folder, tmp_path):
    """Samples and seconds together raise an error."""
    with pytest.raises(ValueError, match="not both"):
        trainer_of(folder, tmp_path, steps=1, data_max_length=3200, data_max_length_seconds=1.0)


def test_only_the_first_process_saves_the_codec(folder, tmp_path, monkeypatch):
    """All processes end in `train`; if two wrote one file, it would be damaged."""
    monkeypatch.setattr(TrainLoop, "on_main_process", lambda loop, job: None)
    trainer_of(folder, tmp_path, steps=2).train()
    assert not (tmp_path / "codec").exists()
    monkeypatch.undo()
    trainer_of(folder, tmp_path, steps=2).train()
    assert SoundStream.init_and_load_from(tmp_path / "codec").codebook_size == 16
