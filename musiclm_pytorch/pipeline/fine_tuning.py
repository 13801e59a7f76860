"""Models that the training pipeline trains further, split into the parts of its steps."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.codecs.soundstream import SoundStream
from audiolm_pytorch.nn.lora import require_peft
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.semantic import BestRQEncoder, KMeansTokenizer, SemanticTokenizer
from musiclm_pytorch.melody.embedder import CONDITION as MELODY
from musiclm_pytorch.mulan import JointEmbedding
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pipeline.builders import STAGES

__all__ = ["START_KINDS", "FineTuning", "warn_of_unread_captions"]

logger = logger_named(__name__)

# Kinds of models for the steps that train one part; all other steps start from a MusicLM.
START_KINDS: dict[str, Any] = {"codec": Codec, "semantic-tokenizer": SemanticTokenizer, "mulan": JointEmbedding}


@typed
@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """A model to train further, and what of it is trained.

    Args:
        model: A MusicLM, whose stages are trained with its other parts unchanged; or a codec, a semantic tokenizer or a
            MuLaN, which is the start of its step. The pipeline trains copies. None = all models are new.
        lora_rank: Train low-rank updates of the stages instead of all weights, see `StageTrainer`.
        freeze: Names of parameters that are not trained, see `LoopSettings`.
    """

    model: nn.Module | None = None
    lora_rank: int | None = None
    freeze: tuple[str, ...] = ()
    trained: dict[str, nn.Module] = field(init=False)
    unchanged: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        trained, unchanged = ({}, {}) if self.model is None else _parts(self.model)
        if self.lora_rank is not None and (self.lora_rank < 1 or not unchanged):
            raise ValueError(
                f"lora_rank must be at least 1, and needs a MusicLM to train further; got lora_rank={self.lora_rank} "
                f"and a {type(self.model).__name__}; leave out lora_rank, or start from a MusicLM"
            )
        if self.lora_rank is not None:
            require_peft()  # before anything is computed
        object.__setattr__(self, "trained", trained)
        object.__setattr__(self, "unchanged", unchanged)

    @typed
    def copy_of(self, step: str) -> Any:
        """Return a copy of the module that a step trains further, or None if it trains a new one."""
        return copy.deepcopy(self.trained.get(step))

    @property
    def facts(self) -> dict[str, Any]:
        """Entry of the settings of a run, which must not change when the run continues; empty without a model."""
        if self.model is None:
            return {}
        parts = {name: part_fingerprint(part) for name, part in (self.trained | self.unchanged).items()}
        return {"start": {"parts": parts, "lora_rank": self.lora_rank, "freeze": list(self.freeze)}}

    @property
    def about(self) -> dict[str, Any]:
        """Settings for generation of a MusicLM, as in its card."""
        return self.model.generation_settings if isinstance(self.model, MusicLM) else {}


def warn_of_unread_captions(stage: str, captions: Sequence[str], text_prob: float) -> None:
    """Log a warning if the captions of few recordings have no influence on a stage."""
    if captions and text_prob == 0:
        logger.warning(
            "the %s stage is trained further without the captions, since text_prob=0; set --%s.text-prob 0.9",
            *(stage, stage),
        )


def _parts(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the parts of a model that are trained, and those that are not, by the name of their step."""
    if isinstance(model, MusicLM):
        audio_lm, quantizer = model.audio_lm, model.mulan_embed_quantizer
        stages: dict[str, Any] = {name: audio_lm.stages[name] for name in STAGES if name in audio_lm.stages}
        if quantizer is None or len(stages) < len(STAGES) or any(_has_other_conditions(one) for one in stages.values()):
            raise ValueError(
                "this pipeline trains a MusicLM with a MuLaN and three stages, and without text states; train the "
                "stages of other models with SemanticTransformerTrainer, CoarseTransformerTrainer and "
                "FineTransformerTrainer in Python"
            )
        modules: dict[str, Any] = {"codec": audio_lm.codec, "semantic-tokenizer": audio_lm.wav2vec}
        if model.melody_embedder is not None:
            modules["melody"] = model.melody_embedder
        return stages, {**modules, "mulan": quantizer.mulan, "quantizer": quantizer}
    if isinstance(model, SoundStream):
        return {"codec": model}, {}
    if isinstance(model, KMeansTokenizer) and isinstance(model.encoder, BestRQEncoder):
        return {"semantic-tokenizer": model}, {}
    if isinstance(model, JointEmbedding):
        return {"mulan": model}, {}
    raise ValueError(
        f"a {type(model).__name__} cannot be trained further; pass a MusicLM, a SoundStream, a KMeansTokenizer of a "
        "BestRQEncoder, or a MuLaN"
    )


def _has_other_conditions(stage: Any) -> bool:
    return not set(stage.further_conditions) <= {MELODY} or stage.text_dim is not None
