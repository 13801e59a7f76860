"""Presets of the training of MusicGen and AudioGen."""

from dataclasses import dataclass, replace
from typing import Literal

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.pipeline.presets import RunConfig, TransformerConfig

__all__ = ["MUSICGEN_PRESETS", "MusicGenPreset", "musicgen_preset"]


@typed
@dataclass(frozen=True, kw_only=True)
class MusicGenPreset(TransformerConfig):
    """Sizes of a MusicGen and settings of its training.

    Attributes:
        codec: Codec of a new model, a bundled name or a hub id.
        num_codebooks: Number of levels of the codec that the model predicts.
        text_encoder: Published text encoder of a new model, a hub id; None = a small one, trained with the model.
        melody: Whether a new model is conditioned on melodies.
        melody_way: How a new model receives melodies, see `MusicGenTransformer`.
        cond_drop_prob: Probability that training drops all conditions of an item.
        melody_drop_prob: Probability that training drops only the melody of an item.
        text_drop_prob: Probability that training of a model with a melody drops only the text of an item.
        word_dropout: Probability that a word of a caption is left out.
        merge_prob: Probability that tags of the manifest are merged into a caption.
        mix_prob: Probability that a clip is mixed with another one, as in AudioGen.
        schedule: Decay of the learning rate after the warm-up.
        ema_decay: Decay of the EMA in every step. audiocraft's 0.99 in every tenth step is 0.999 here.
    """

    name: str
    codec: str
    num_codebooks: int = 4
    text_encoder: str | None = None
    melody: bool = False
    melody_way: Literal["prepend", "sum"] = "prepend"
    cond_drop_prob: float = 0.3
    melody_drop_prob: float = 0.5
    text_drop_prob: float = 0.1
    word_dropout: float = 0.3
    merge_prob: float = 0.25
    mix_prob: float = 0.0
    schedule: Literal["cosine", "inverse_sqrt"] = "cosine"
    final_lr_fraction: float = 0.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999

    def scaled(self, scale: float) -> "MusicGenPreset":
        """Copy the preset and multiply the number of training steps by `scale`; the result is at least 10 steps."""
        return replace(self, run=self.run.scaled(scale))


# For one or two CPU cores: 10 to 40 minutes.
_TINY = MusicGenPreset(
    name="tiny", dim=192, depth=6, heads=3, codec="codec_16khz", melody=True, melody_way="sum",
    cond_drop_prob=0.1, melody_drop_prob=0.4, word_dropout=0.1, merge_prob=0.0, weight_decay=0.01, betas=(0.9, 0.99),
    final_lr_fraction=0.05, run=RunConfig(3000, 8, 5.0, 1e-3),
)  # fmt: skip

# audiocraft: config/model/lm/model_scale, config/solver/musicgen, config/conditioner, audiocraft/grids/musicgen, at
# commit 896ec7c. The published batch size of 192 is over all processes; `batch_size` is that of one process. The small
# model was trained with D-Adaptation, for which 1e-4 with AdamW is a replacement; and all models in fp16.
_SMALL = MusicGenPreset(
    name="small", dim=1024, depth=24, heads=16, codec="facebook/encodec_32khz", text_encoder="t5-base",
    run=RunConfig(1_000_000, 192, 30.0, 1e-4, warmup_steps=4000),
)  # fmt: skip
_MEDIUM = replace(_SMALL, name="medium", dim=1536, depth=48, heads=24)
_LARGE = replace(
    _SMALL, name="large", dim=2048, depth=48, heads=32, cond_drop_prob=0.2, word_dropout=0.2, max_grad_norm=3.0
)
_MELODY = replace(_MEDIUM, name="melody", melody=True, cond_drop_prob=0.2, word_dropout=0.2)
# audiocraft: config/solver/audiogen. The codec of the published model is part of its files, so that a new model has the
# bundled codec of equal rates. The published weights (version 2) were trained without mixing.
_AUDIOGEN = MusicGenPreset(
    name="audiogen", dim=1536, depth=48, heads=24, codec="codec_16khz", text_encoder="t5-large", cond_drop_prob=0.1,
    word_dropout=0.0, merge_prob=0.0, mix_prob=0.5, schedule="inverse_sqrt",
    run=RunConfig(200_000, 128, 10.0, 5e-4, warmup_steps=3000),
)  # fmt: skip

MUSICGEN_PRESETS = {preset.name: preset for preset in (_TINY, _SMALL, _MEDIUM, _LARGE, _MELODY, _AUDIOGEN)}


@typed
def musicgen_preset(name: str) -> MusicGenPreset:
    """Return the preset with this name; raise a ValueError with all preset names for an unknown name."""
    if name not in MUSICGEN_PRESETS:
        raise ValueError(f"there is no preset {name!r} of a MusicGen; choose one of: {', '.join(MUSICGEN_PRESETS)}")
    return MUSICGEN_PRESETS[name]
