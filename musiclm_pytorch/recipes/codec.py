"""Training of the 16 kHz codec in rounds: `python -m musiclm_pytorch.recipes.codec --data corpus --out run`.

The second round starts from the weights of the first. Both train with the mel distance alone, in 63 and 18 minutes on
one CPU core. Running the command again continues an interrupted training.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from audiolm_pytorch import SoundStream, SoundStreamTrainer, SpectralSoundStream
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.training import MEL_ONLY
from audiolm_pytorch.data.manifest import AudioItem, load_items
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


@typed
def build_codec(seed: int = 0) -> SoundStream:
    """Create the codec with random weights, for 16 kHz audio at 50 frames per second and 8 levels of 1024 codes."""
    torch.manual_seed(seed)
    return SpectralSoundStream(dim=320, encoder_depth=4, decoder_depth=8, rq_num_quantizers=8, code_dim=128)


@typed
def main(data: tuple[Path, ...], out: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Train the codec and save its weights as float16 in the folder OUT/codec_16khz.

    Args:
        data: Folders with the manifests train.jsonl and valid.jsonl, such as the toy corpus of
            `python -m musiclm_pytorch.recipes.corpus`.
        out: Folder for the checkpoints and the codec.
        seed: Seed of weights and data order.
        scale: Factor for the number of training steps; use a factor below 1 for a quick test.
    """
    items = _items(data, "train"), _items(data, "valid")
    codec = build_codec(seed)
    for number, training in enumerate(_ROUNDS):
        num_steps = max(10, round(scale * training.num_steps))
        SoundStreamTrainer(
            codec,
            items=items,
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


def _items(folders: tuple[Path, ...], split: str) -> list[AudioItem]:
    return [item for folder in folders for item in load_items(folder / f"{split}.jsonl").items]


if __name__ == "__main__":
    tyro.cli(main)
