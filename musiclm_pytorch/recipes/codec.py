"""Training of the bundled 16 kHz codec: `python -m musiclm_pytorch.recipes.codec --data corpus --out run`.

The codec is trained twice, and the second training starts from the weights of the first training. The two trainings of
the codec take 80 minutes in total on one CPU core. Running the command again continues an interrupted training.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from beartype import beartype

from audiolm_pytorch import SoundStream, SoundStreamTrainer, SpectralSoundStream
from audiolm_pytorch.codecs.training import MEL_ONLY
from audiolm_pytorch.saving.modules import save_module

__all__ = ["build_codec", "main"]


@dataclass(frozen=True)
class _Round:
    """Settings of one codec training: number of steps, steps before quantization starts, and peak learning rate."""

    name: str
    num_steps: int
    unquantized_steps: int
    learning_rate: float


_ROUNDS = (_Round("first", 10_000, 600, 1e-3), _Round("second", 3_000, 0, 5e-4))


@beartype
def build_codec(seed: int = 0) -> SoundStream:
    """Create the codec with random weights, for 16 kHz audio at 50 frames per second and 8 levels of 1024 codes."""
    torch.manual_seed(seed)
    return SpectralSoundStream(dim=320, encoder_depth=4, decoder_depth=8, rq_num_quantizers=8, code_dim=128)


@beartype
def main(data: Path, out: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Train the codec and save its weights as float16 in the folder OUT/codec_16khz.

    Args:
        data: Folder of audio files, such as the toy corpus of `python -m musiclm_pytorch.recipes.corpus`.
        out: Folder for the checkpoints and the codec.
        seed: Seed of weights, data order and noise.
        scale: Factor for the number of training steps; use a factor below 1 for a quick test.
    """
    codec = build_codec(seed)
    for number, training in enumerate(_ROUNDS):
        num_steps = max(10, round(scale * training.num_steps))
        SoundStreamTrainer(
            codec,
            folder=data,
            batch_size=16,
            num_train_steps=num_steps,
            results_folder=out / training.name,
            loss_weights=MEL_ONLY,
            unquantized_steps=num_steps * training.unquantized_steps // training.num_steps,
            learning_rate=training.learning_rate,
            warmup_steps=min(100, num_steps // 10),
            precision="bf16",
            seed=seed + number,
        ).train()
    save_module(codec, out / "codec_16khz", dtype=torch.float16)
    sys.stdout.write(f"wrote {out / 'codec_16khz'}\n")


if __name__ == "__main__":
    tyro.cli(main)
