"""Training of the 16 kHz codec in rounds: `python -m musiclm_pytorch.recipes.codec --data corpus --out run`.

Each round starts from the weights of the round before. The first two rounds train with the mel distance alone. The
robust rounds make the codes survive inaudible changes, and train the decoder on partly wrong codes. All rounds take
about four hours on one CPU core. Running the command again continues an interrupted training.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from beartype import beartype

from audiolm_pytorch import SoundStream, SoundStreamTrainer
from audiolm_pytorch.codecs.quantizers import ResidualQuantizer
from audiolm_pytorch.codecs.spectral import SpectralDecoder, SpectralEncoder
from audiolm_pytorch.codecs.training import MEL_ONLY, StableCodes, WrongCodes
from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.saving.modules import save_module
from musiclm_pytorch.pretrained.bundled import codec_named

__all__ = ["build_codec", "main"]


@dataclass(frozen=True)
class _Round:
    """Settings of one codec training: number of steps, steps before quantization starts, and learning rates."""

    name: str
    num_steps: int
    unquantized_steps: int
    learning_rate: float
    final_lr_fraction: float = 0.05
    is_robust: bool = False


_ROUNDS = (
    _Round("first", 10_000, 600, 1e-3),
    _Round("second", 3_000, 0, 5e-4),
    _Round("robust_first", 2_000, 0, 5e-4, final_lr_fraction=0.4, is_robust=True),
    _Round("robust_second", 2_000, 0, 2e-4, is_robust=True),
)
_STABLE_CODES, _WRONG_CODES = StableCodes(weight=0.1, level_decay=0.6, min_entropy=4.3), WrongCodes()


@beartype
def build_codec(seed: int = 0, *, is_robust: bool = False) -> SoundStream:
    """Create the codec with random weights, for 16 kHz audio at 50 frames per second and 8 levels of 1024 codes.

    A robust codec has an encoder that receives no sound below -80 dB, and codebooks that change slowly. Both kinds have
    the same weights.
    """
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(dim=320, hop_samples=320)
    floor: dict[str, Any] = {"magnitude_floor": 1e-4} if is_robust else {}
    codebooks: dict[str, Any] = {"decay": 0.99, "dead_below_share": 0.03} if is_robust else {}
    return SoundStream(
        encoder=SpectralEncoder(depth=4, **sizes, **floor),
        decoder=SpectralDecoder(depth=8, **sizes),
        quantizer=ResidualQuantizer(dim=320, codebook_dim=128, num_quantizers=8, **codebooks),
    )


@beartype
def main(data: tuple[Path, ...], out: Path, start: str | None = None, seed: int = 0, scale: float = 1.0) -> None:
    """Train the codec and save its weights as float16 in the folder OUT/codec_16khz.

    Args:
        data: Folders with the manifests train.jsonl and valid.jsonl, such as the toy corpus of
            `python -m musiclm_pytorch.recipes.corpus`.
        out: Folder for the checkpoints and the codec.
        start: Name or folder of a codec of the same sizes; the robust rounds start from its weights, and the rounds
            before are left out.
        seed: Seed of weights, data order and noise.
        scale: Factor for the number of training steps; use a factor below 1 for a quick test.
    """
    items = _items(data, "train"), _items(data, "valid")
    codec = build_codec(seed) if start is None else codec_named(start)
    for number, training in enumerate(_ROUNDS):
        if start is not None and not training.is_robust:
            continue
        weights, codec = codec.float().state_dict(), build_codec(seed, is_robust=training.is_robust)
        codec.load_state_dict(weights)
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
            final_lr_fraction=training.final_lr_fraction,
            warmup_steps=min(100, num_steps // 10),
            precision="bf16",
            seed=seed + number,
            stable_codes=_STABLE_CODES if training.is_robust else None,
            wrong_codes=_WRONG_CODES if training.is_robust else None,
        ).train()
    save_module(codec, out / "codec_16khz", dtype=torch.float16)
    sys.stdout.write(f"wrote {out / 'codec_16khz'}\n")


def _items(folders: tuple[Path, ...], split: str) -> list[AudioItem]:
    return [item for folder in folders for item in load_items(folder / f"{split}.jsonl").items]


if __name__ == "__main__":
    tyro.cli(main)
