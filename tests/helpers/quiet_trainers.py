"""Trainers of all kinds whose losses have no randomness, so that two processes can be compared with one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.codecs.training import MEL_ONLY, SoundStreamTrainer
from audiolm_pytorch.data import TokenShards, write_shards
from audiolm_pytorch.data.captions import encode_texts
from audiolm_pytorch.data.manifest import load_split
from audiolm_pytorch.lm.trainers import CoarseTransformerTrainer, FineTransformerTrainer, SemanticTransformerTrainer
from audiolm_pytorch.semantic import BestRQ, BestRQEncoder
from audiolm_pytorch.semantic.best_rq.training import SemanticTokenizerTrainer
from musiclm_pytorch.mulan import TextTransformer
from musiclm_pytorch.mulan.layers import LayerContrast
from musiclm_pytorch.mulan.trainer import MuLaNTrainer
from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musicgen.text_tower import TextTowerEncoder
from musiclm_pytorch.musicgen.trainer import MusicGenTrainer
from tests.helpers.fakes import CONDITION, FakeConditioner, tiny_stages
from tests.helpers.micro import write_clips
from tests.helpers.small_models import small_soundstream
from tests.helpers.tiny_mulan import tiny_mulan

RANDOM_MASK = "audiolm_pytorch.semantic.best_rq.model.sample_span_mask"
SHARDED = ("semantic", "coarse", "fine", "musicgen", "mulan", "best_rq")
# In two of four steps one of two processes has only items without captions, and does not use its text encoder.
CAPTIONS = [["aa"], [], [], ["b", "cccc"], ["d"]]
SETTINGS = {"num_train_steps": 4, "warmup_steps": 1, "validate_every": 2, "ema_decay": 0.9, "max_grad_norm": 0.5}
_STAGES: dict[str, Any] = {
    "semantic": SemanticTransformerTrainer,
    "coarse": CoarseTransformerTrainer,
    "fine": FineTransformerTrainer,
}


def write_data(folder: Path) -> Path:
    """Write clips and token shards."""
    write_clips(folder / "clips", 5)
    write_shards(folder / "shards", _record, len(CAPTIONS), {})
    return folder


def _record(index: int) -> dict[str, np.ndarray]:
    return {
        "semantic": (np.arange(20) * (index + 1)) % 12,
        "acoustic": (np.arange(160).reshape(40, 4) * (index + 1)) % 16,
        "latents": np.full((1, 1), 0.1 * (index + 1), dtype=np.float32),
        "captions": encode_texts(CAPTIONS[index]),
    }


def quiet_trainers(data: Path, **settings: Any) -> dict[str, Callable[[Path], Any]]:
    """Functions that build the trainer of each kind for a results folder; `settings` go to the training loop."""
    builders: dict[str, Callable[..., Any]] = {
        **{name: partial(_stage, name) for name in _STAGES},
        **{"musicgen": _musicgen, "mulan": _mulan, "best_rq": _best_rq, "codec": _codec},
    }

    def build(name: str, folder: Path) -> Any:
        torch.manual_seed(0)
        return builders[name](data, results_folder=folder, **{**SETTINGS, **settings})

    return {name: partial(build, name) for name in builders}


def every_other_token(valid: Tensor, *_: Any) -> Tensor:
    """Replace the random masks of BEST-RQ, see `RANDOM_MASK`."""
    return valid & (torch.arange(valid.shape[1], device=valid.device) % 2 == 0)


def _text_tower() -> TextTowerEncoder:
    return TextTowerEncoder(TextTransformer(dim=6, depth=1, heads=2, dim_head=4, num_tokens=256))


def _stage(name: str, data: Path, **settings: Any) -> Any:
    """A stage with codes and a trained text encoder, which some batches do not use."""
    return _STAGES[name](
        transformer=tiny_stages(**CONDITION, text_dim=6, cond_drop_prob=0.0)[name],
        audio_conditioner=FakeConditioner(),
        text_conditioner=_text_tower(),
        shards=TokenShards(data / "shards"),
        **settings,
    )


def _musicgen(data: Path, **settings: Any) -> MusicGenTrainer:
    text = _text_tower()
    sizes = {"dim": 16, "depth": 2, "heads": 2, "max_seconds": 0.5, "cond_drop_prob": 0.0}
    model = MusicGen(codec=small_soundstream(), text_conditioner=text, num_codebooks=3, **sizes)
    return MusicGenTrainer(model, items=load_split(data / "clips"), **settings)


def _mulan(data: Path, **settings: Any) -> MuLaNTrainer:
    model = tiny_mulan(layer_contrast=LayerContrast(layers=((1, 1),), weight=0.5))
    return MuLaNTrainer(mulan=model, items=load_split(data / "clips"), seconds=0.4, chunk_size=1, **settings)


def _best_rq(data: Path, **settings: Any) -> SemanticTokenizerTrainer:
    encoder = BestRQEncoder(
        **{"dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "sample_hz": 8000, "num_mels": 8, "n_fft": 256},
        **{"hop_length": 40, "frames_per_token": 2},
    )
    objective = BestRQ(encoder, noise_std=0.0, num_directions=16, num_targets=4)
    return SemanticTokenizerTrainer(
        encoder=encoder, objective=objective, items=load_split(data / "clips"), seconds=0.4, **settings
    )


def _codec(data: Path, **settings: Any) -> SoundStreamTrainer:
    items = load_split(data / "clips")
    # codebooks of k-means depend on random numbers, and balanced losses on the norms of a process's own gradients
    codec = small_soundstream(use_finite_scalar_quantizer=True, codebook_size=64)
    settings["loss_weights"] = MEL_ONLY
    return SoundStreamTrainer(codec, items=items, data_max_length_seconds=0.25, **settings)
