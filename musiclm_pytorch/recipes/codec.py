"""Training of the 16 kHz codec in rounds: `python -m musiclm_pytorch.recipes.codec --data corpus --out run`.

Each round starts from the weights of the round before. The first two rounds train with the mel distance alone, in 63
and 18 minutes on one CPU core. In the last round (about 25 minutes), the encoder receives no sound below -90 dB, its
codes are fixed, and the decoder is trained on partly wrong codes. Running the command again continues an interrupted
training.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from audiolm_pytorch import SoundStream, SoundStreamTrainer
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.codecs.quantizers import ResidualQuantizer
from audiolm_pytorch.codecs.spectral import SpectralDecoder, SpectralEncoder
from audiolm_pytorch.codecs.training import MEL_ONLY, WrongCodes
from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.saving.modules import save_module

__all__ = ["build_codec", "main"]


@dataclass(frozen=True)
class _Round:
    """Settings of one codec training: number of steps, steps before quantization starts, and peak learning rate.

    With `decoder_only`, encoder and quantizer keep their weights, and the decoder receives wrong codes.
    """

    name: str
    num_steps: int
    unquantized_steps: int
    learning_rate: float
    decoder_only: bool = False
    magnitude_floor: float = 1e-5


_ROUNDS = (
    _Round("first", 10_000, 600, 1e-3),
    _Round("second", 3_000, 0, 5e-4),
    _Round("decoder", 1_300, 0, 5e-4, decoder_only=True, magnitude_floor=3e-5),
)


@typed
def build_codec(seed: int = 0, *, magnitude_floor: float = 1e-5) -> SoundStream:
    """Create the codec with random weights, for 16 kHz audio at 50 frames per second and 8 levels of 1024 codes."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(dim=320, hop_samples=320)
    return SoundStream(
        encoder=SpectralEncoder(depth=4, magnitude_floor=magnitude_floor, **sizes),
        decoder=SpectralDecoder(depth=8, **sizes),
        quantizer=ResidualQuantizer(dim=320, num_quantizers=8, codebook_dim=128),
    )


@typed
def main(data: tuple[Path, ...], out: Path, start: str | None = None, seed: int = 0, scale: float = 1.0) -> None:
    """Train the codec and save its weights as float16 in the folder OUT/codec_16khz.

    Args:
        data: Folders with the manifests train.jsonl and valid.jsonl, such as the toy corpus of
            `python -m musiclm_pytorch.recipes.corpus`.
        out: Folder for the checkpoints and the codec.
        start: Name or folder of a codec of the same sizes; only the last round, of the decoder, starts from its
            weights.
        seed: Seed of weights, data order and noise.
        scale: Factor for the number of training steps; use a factor below 1 for a quick test.
    """
    items = _items(data, "train"), _items(data, "valid")
    codec = build_codec(seed) if start is None else Codec.from_pretrained(start)
    for number, training in enumerate(_ROUNDS):
        if start is not None and not training.decoder_only:
            continue
        weights = codec.float().state_dict()
        codec = build_codec(seed, magnitude_floor=training.magnitude_floor)
        codec.load_state_dict(weights)
        codec.encoder.requires_grad_(not training.decoder_only)
        codec.quantizer.requires_grad_(not training.decoder_only)
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
            final_lr_fraction=0.02 if training.decoder_only else 0.1,
            warmup_steps=min(100, num_steps // 10),
            precision="bf16",
            seed=seed + number,
            wrong_codes=WrongCodes() if training.decoder_only else None,
        ).train()
    save_module(codec, out / "codec_16khz", dtype=torch.float16)
    sys.stdout.write(f"wrote {out / 'codec_16khz'}\n")


def _items(folders: tuple[Path, ...], split: str) -> list[AudioItem]:
    return [item for folder in folders for item in load_items(folder / f"{split}.jsonl").items]


if __name__ == "__main__":
    tyro.cli(main)
