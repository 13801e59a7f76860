"""Training of a MusicGen with a preset: a new model, the tokens of its data, and its trainer."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.codecs.channelwise import ChannelwiseCodec
from audiolm_pytorch.conditioning.base import TextEncoder
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.data.items import items_digest
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.lm.task import trained_modules
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.training import inverse_square_root
from audiolm_pytorch.training.distributed import create_accelerator
from audiolm_pytorch.training.freezing import frozen_parameters
from audiolm_pytorch.training.rng import seed_rng
from musiclm_pytorch.mulan import TextTransformer
from musiclm_pytorch.musicgen.augmentation import Mixing, TextAugmentation
from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musicgen.text_tower import TextTowerEncoder
from musiclm_pytorch.musicgen.trainer import MusicGenTrainer
from musiclm_pytorch.pipeline.musicgen_presets import MusicGenPreset
from musiclm_pytorch.pipeline.run_folder import claimed_run
from musiclm_pytorch.pipeline.token_shards import compute_music_tokens
from musiclm_pytorch.pipeline.trainers import loop_settings

if TYPE_CHECKING:
    import accelerate

__all__ = ["build_musicgen", "musicgen_trainer"]

_TOKENS_FOLDER = "tokens"
# The small text encoder that is trained with a new model.
_TEXT_SIZES = {"dim": 128, "depth": 2, "heads": 2, "dim_head": 64, "max_seq_len": 96}
_TEXT_VOCABULARY = 2048


@typed
def build_musicgen(
    preset: MusicGenPreset,
    *,
    codec: Codec,
    text_conditioner: TextEncoder | None = None,
    captions: Sequence[str] = (),
    stereo: bool = False,
    seed: int = 0,
) -> MusicGen:
    """Build an untrained model with the sizes of a preset.

    Without a `text_conditioner`, the model has a small text encoder, whose tokenizer is trained on the captions, or no
    text condition if there are no captions. A stereo model applies a mono codec to both channels.
    """
    channels = 2 if stereo and codec.channels == 1 else 1
    with preserve_rng():
        seed_rng(seed, "musicgen", device=torch.device("cpu"))
        if text_conditioner is None and captions:
            tokenizer = TextTokenizer.train(captions, vocab_size=_TEXT_VOCABULARY)
            sizes: dict[str, Any] = {**_TEXT_SIZES, "num_tokens": tokenizer.vocab_size}
            text_conditioner = TextTowerEncoder(TextTransformer(tokenizer=tokenizer, **sizes))
        return MusicGen(
            codec=codec if channels == 1 else ChannelwiseCodec(codec, channels),
            text_conditioner=text_conditioner,
            melody="sum" if preset.melody and preset.melody_way == "sum" else preset.melody,
            dim=preset.dim,
            depth=preset.depth,
            heads=preset.heads,
            num_codebooks=channels * min(preset.num_codebooks, codec.num_quantizers),
            max_seconds=preset.run.seconds,
            cond_drop_prob=preset.cond_drop_prob,
            melody_drop_prob=preset.melody_drop_prob,
            text_drop_prob=preset.text_drop_prob,
        )


@typed
def musicgen_trainer(
    preset: MusicGenPreset,
    model: MusicGen,
    items: tuple[Sequence[AudioItem], Sequence[AudioItem]],
    *,
    out: str | Path,
    lora_rank: int | None = None,
    freeze: Sequence[str] = (),
    seed: int = 0,
    accelerator: "accelerate.Accelerator | None" = None,
    allow_changed: Sequence[str] = (),
    num_workers: int = 0,
) -> MusicGenTrainer:
    """Build the trainer of a MusicGen with the settings of a preset; missing tokens are computed first.

    The folder `out` belongs to one run. It contains the tokens and melodies of the data in `tokens`, and the results of
    the trainer in `musicgen`.

    Args:
        model: New or trained model, which is trained in place.
        items: Training items and validation items.
        lora_rank: Rank of low-rank updates, see `MusicGenTrainer`.
        freeze: Names of parameters that are not trained, see `LoopSettings`.
        allow_changed: Names of settings that may differ from those of the interrupted run.
        num_workers: Worker processes that load batches, see `LoopSettings`. The result does not depend on it.
    """
    out, accelerator = Path(out), accelerator or create_accelerator()
    if lora_rank is None:
        with frozen_parameters(trained_modules(model.transformer, model.text_conditioner), freeze):
            pass  # wrong names are found before the tokens are computed
    data: dict[str, Any] = {}
    if model.text_conditioner is not None:
        data["augment_text"] = TextAugmentation(word_dropout=preset.word_dropout, merge_prob=preset.merge_prob)
    seconds = min(preset.run.seconds, model.transformer.max_seconds or inf)
    if preset.mix_prob > 0:
        mixing = Mixing(probability=preset.mix_prob)
        data |= {"items": items, "data_max_length_seconds": seconds, "augment_waves": mixing}
    model.codec.to(accelerator.device)
    tokens: dict[str, Any] = {
        "codec": model.codec,
        "num_codebooks": model.transformer.layout.predicted[0].num_levels,
        "seconds": seconds,
        "chroma": model.chroma,
        "accelerator": accelerator,
    }
    facts = {"preset": asdict(preset), "seed": seed, "data": items_digest([*items[0], *items[1]])}
    with claimed_run(out, facts, accelerator, allow_changed):
        if preset.mix_prob == 0:
            data["shards"] = tuple(
                compute_music_tokens(out / _TOKENS_FOLDER / part, part_items, origin={"part": part}, **tokens)
                for part, part_items in zip(("train", "valid"), items)
            )
    return MusicGenTrainer(
        model,
        **data,
        **_settings(preset),
        lora_rank=lora_rank,
        freeze=tuple(freeze),
        results_folder=out / model.transformer.namespace,
        accelerator=accelerator,
        seed=seed,
        allow_changed=tuple(allow_changed),
        num_workers=num_workers,
    )


def _settings(preset: MusicGenPreset) -> dict[str, Any]:
    """Return the settings of the training loop."""
    names = ("weight_decay", "betas", "max_grad_norm", "ema_decay")
    settings = {**loop_settings(preset.run), **{name: getattr(preset, name) for name in names}}
    if preset.schedule == "cosine":
        return {**settings, "final_lr_fraction": preset.final_lr_fraction}
    warmup_steps = settings.pop("warmup_steps")
    return {**settings, "schedule": partial(inverse_square_root, warmup_steps=warmup_steps)}
