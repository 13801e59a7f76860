"""Functions that build trainers with the settings of a preset."""

from collections.abc import Sequence
from typing import Any

from audiolm_pytorch.codecs.discriminators import soundstream_discriminators
from audiolm_pytorch.codecs.soundstream import SoundStream
from audiolm_pytorch.codecs.training import MEL_ONLY, SoundStreamTrainer
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.lm.trainers import CoarseTransformerTrainer, FineTransformerTrainer, SemanticTransformerTrainer
from audiolm_pytorch.semantic import BestRQEncoder
from audiolm_pytorch.semantic.best_rq.training import SemanticTokenizerTrainer
from musiclm_pytorch.melody.trainer import MelodyTrainer
from musiclm_pytorch.mulan import JointEmbedding
from musiclm_pytorch.mulan.captions import CaptionSampler
from musiclm_pytorch.mulan.trainer import MuLaNTrainer
from musiclm_pytorch.pipeline.builders import (
    build_codec,
    build_melody_embedder,
    build_mulan,
    build_semantic_encoder,
    build_semantic_objective,
)
from musiclm_pytorch.pipeline.presets import Preset, RunConfig

__all__ = [
    "NUM_VALIDATIONS",
    "codec_trainer",
    "loop_settings",
    "melody_trainer",
    "mulan_trainer",
    "semantic_tokenizer_trainer",
    "stage_trainer",
]

NUM_VALIDATIONS = 8
_STAGE_TRAINERS: dict[str, Any] = {
    "semantic": SemanticTransformerTrainer,
    "coarse": CoarseTransformerTrainer,
    "fine": FineTransformerTrainer,
}

# Training and held-out items
Items = tuple[Sequence[AudioItem], Sequence[AudioItem]]


def codec_trainer(preset: Preset, items: Items, codec: SoundStream | None = None, **loop: Any) -> SoundStreamTrainer:
    """Build the trainer of a codec, which has discriminators or the mel distance as the only loss; None = a new one."""
    run, is_adversarial = preset.codec.run, preset.codec.adversarial
    codec = build_codec(preset) if codec is None else codec
    return SoundStreamTrainer(
        codec,
        items=items,
        data_max_length_seconds=run.seconds,
        loss_weights=None if is_adversarial else MEL_ONLY,
        discriminators=soundstream_discriminators(channels=codec.channels) if is_adversarial else None,
        **loop_settings(run),
        **loop,
    )


def semantic_tokenizer_trainer(
    preset: Preset, items: Items, encoder: BestRQEncoder | None = None, **loop: Any
) -> SemanticTokenizerTrainer:
    """Build the trainer of a semantic encoder; None = a new one."""
    run, encoder = preset.semantic_tokenizer.run, build_semantic_encoder(preset) if encoder is None else encoder
    return SemanticTokenizerTrainer(
        encoder=encoder,
        objective=build_semantic_objective(encoder),
        items=items,
        seconds=run.seconds,
        **loop_settings(run),
        **loop,
    )


def mulan_trainer(
    preset: Preset,
    items: Items,
    captions: Sequence[str],
    *,
    seed: int,
    mulan: JointEmbedding | None = None,
    **loop: Any,
) -> MuLaNTrainer:
    """Build the trainer of a MuLaN; None = a new one, whose text tokenizer is trained on the captions."""
    m = preset.mulan
    return MuLaNTrainer(
        mulan=build_mulan(preset, captions) if mulan is None else mulan,
        items=items,
        seconds=m.run.seconds,
        captions=CaptionSampler(caption_dropout=m.caption_dropout, seed=seed),
        chunk_size=m.chunk_size,
        seed=seed,
        **loop_settings(m.run),
        **loop,
    )


def melody_trainer(preset: Preset, items: Items, **loop: Any) -> MelodyTrainer:
    """Build an untrained melody embedder and its trainer."""
    return MelodyTrainer(
        embedder=build_melody_embedder(preset), items=items, **loop_settings(preset.melody.run), **loop
    )


def stage_trainer(preset: Preset, transformer: StageTransformer, stage: str, **data_and_loop: Any) -> Any:
    """Build the trainer of the language model of a stage."""
    config = getattr(preset, stage)
    return _STAGE_TRAINERS[stage](
        transformer=transformer,
        data_max_length_seconds=config.run.seconds,
        objective=config.objective,
        text_prob=config.text_prob,
        sample_every=max(1, config.run.num_train_steps // 2),
        **loop_settings(config.run),
        **data_and_loop,
    )


def loop_settings(run: RunConfig) -> dict[str, Any]:
    """Return the arguments of a trainer for the settings of a preset, except the length of the crops."""
    settings = {name: value for name, value in vars(run).items() if name != "seconds"}
    return {**settings, "validate_every": max(1, run.num_train_steps // NUM_VALIDATIONS)}
