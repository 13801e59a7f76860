import numpy as np
import pytest
import soundfile
import torch

from audiolm_pytorch.codecs import SoundStream, SpectralSoundStream
from audiolm_pytorch.codecs.losses import MultiScaleMelLoss
from audiolm_pytorch.codecs.quantizer import code_usage
from audiolm_pytorch.codecs.training import SoundStreamTrainer
from audiolm_pytorch.training import TrainLoop

RATE_HZ = 16000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four clips of chords with a decay, 1.2 s."""
    folder = tmp_path_factory.mktemp("chords")
    time_seconds = np.arange(int(1.2 * RATE_HZ)) / RATE_HZ
    for number in range(4):
        partials = sum(np.sin(2 * np.pi * 110 * (number + 2) * k * time_seconds) / k for k in (1, 2, 3))
        soundfile.write(folder / f"{number}.wav", 0.2 * partials * np.exp(-2 * time_seconds), RATE_HZ)
    return folder


def trainer_of(folder, results, steps, **settings):
    torch.manual_seed(0)
    codec = SpectralSoundStream(
        dim=48, encoder_depth=1, decoder_depth=2, codebook_size=32, rq_num_quantizers=2, code_dim=8
    )
    return SoundStreamTrainer(
        codec, folder=folder, batch_size=4, num_train_steps=steps, results_folder=results, warmup_steps=2, **settings
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_codebooks_are_initialised_in_either_precision(folder, tmp_path, precision):
    """The codebooks start inside a training step; under autocast their frames arrive as bf16 and must not mix types."""
    trainer = trainer_of(folder, tmp_path, steps=4, unquantized_steps=2, precision=precision)
    before = trainer.task.codec.quantizer.codebooks.clone()
    trainer.train()
    after = trainer.task.codec.quantizer.codebooks
    assert after.dtype == torch.float32
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_codec_learns_a_few_clips_with_default_arguments(folder, tmp_path):
    """The worst experience of the replicas is noise for days: a few clips must be reproduced within a minute."""
    trainer = trainer_of(folder, tmp_path, steps=250, validate_every=250)
    codec = trainer.task.codec
    wave = trainer.task.valid.get(0, 0).waves[RATE_HZ][None]
    loss_fn = MultiScaleMelLoss(RATE_HZ)

    def distance():
        decoded = codec.decode_from_codebook_indices(codec.tokenize(wave), num_samples=wave.shape[-1])
        return loss_fn(decoded, wave[:, None]).item()

    codec.eval()
    before = distance()
    trainer.train()
    after = distance()
    assert after < before / 3
    clips = [trainer.task.train.get(0, index).waves[RATE_HZ][None] for index in range(len(trainer.task.train))]
    usage = code_usage(torch.cat([codec.tokenize(clip) for clip in clips]), 32)["usage"]
    assert usage.min() > 0.25, usage


def test_resumed_codec_is_bit_identical(folder, tmp_path):
    """Codebooks live in buffers and start in the middle of the run; resume must carry them exactly."""
    straight = trainer_of(folder, tmp_path / "straight", steps=6, unquantized_steps=3)
    straight.train()
    for stop in (2, 2, None):
        resumed = trainer_of(folder, tmp_path / "resumed", steps=6, unquantized_steps=3)
        resumed.train(stop_after_steps=stop)
    for (name, one), other in zip(
        straight.task.codec.state_dict().items(), resumed.task.codec.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_crop_length_is_given_once(folder, tmp_path):
    """Samples and seconds together would contradict each other silently."""
    with pytest.raises(ValueError, match="not both"):
        trainer_of(folder, tmp_path, steps=1, data_max_length=3200, data_max_length_seconds=1.0)


def test_only_the_first_process_saves_the_codec(folder, tmp_path, monkeypatch):
    """Every process of a run ends in `train`; two of them writing one file would tear it."""
    monkeypatch.setattr(TrainLoop, "on_main_process", lambda loop, job: None)
    trainer_of(folder, tmp_path, steps=2).train()
    assert not (tmp_path / "codec").exists()
    monkeypatch.undo()
    trainer_of(folder, tmp_path, steps=2).train()
    assert SoundStream.init_and_load_from(tmp_path / "codec").codebook_size == 32
