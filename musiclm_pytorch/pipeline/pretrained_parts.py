"""The parts that a model is made around: what each must be, and how it is stored without rounding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import nn

from audiolm_pytorch.audio.units import frames_inside
from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.saving.modules import load_module, module_spec
from audiolm_pytorch.saving.weights import weights_of
from audiolm_pytorch.semantic import SemanticTokenizer
from audiolm_pytorch.training.rng import preserve_rng
from musiclm_pytorch.mulan import JointEmbedding
from musiclm_pytorch.pipeline.builders import (
    LANGUAGE_MODELS,
    build_codec,
    build_language_model,
    build_semantic_tokenizer,
)
from musiclm_pytorch.pipeline.presets import Preset

__all__ = ["PRETRAINED_KINDS", "check_pretrained", "exact_dtype", "is_a", "load_part"]

# Stages whose result may be a finished part from elsewhere, with what that must be.
PRETRAINED_KINDS: dict[str, Any] = {"codec": Codec, "semantic-tokenizer": SemanticTokenizer, "mulan": JointEmbedding}


def is_a(module: object, kind: Any) -> bool:
    """Whether a module is of a class or protocol; a codec is no semantic tokenizer, though it has all its names."""
    return isinstance(module, kind) and not (kind is SemanticTokenizer and isinstance(module, Codec))


@beartype
def load_part(folder: str | Path, kind: Any, device: str | torch.device = "cpu") -> Any:
    """Load a saved module of a class or protocol.

    Args:
        folder: Where `save_module` wrote it.
        kind: What it must be.
        device: Where it shall live.

    Returns:
        The module in eval mode.

    Raises:
        ValueError: If the folder holds nothing readable, or something else.
    """
    module = load_module(folder, expect=kind, device=device)
    if not is_a(module, kind):
        raise ValueError(f"{folder} holds a {type(module).__name__}, but a {kind.__name__} is needed")
    return module


@beartype
def exact_dtype(module: nn.Module, dtype: torch.dtype, *, but: Sequence[str] = ()) -> torch.dtype | None:
    """The type to store a module in that must not change: `dtype` where it rounds nothing, else None, as it is.

    Args:
        module: The module.
        dtype: The type wanted.
        but: Names of its parts that may be rounded.
    """
    named = {name: weight for name, weight in weights_of(module).items() if name.partition(".")[0] not in but}
    weights = [weight for weight in named.values() if weight.is_floating_point()]
    exact = all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights)
    return dtype if exact else None


@beartype
def check_pretrained(preset: Preset, given: Mapping[str, nn.Module]) -> None:
    """Refuse finished parts that a run could not use, before anything is trained around them.

    Args:
        preset: Of the run.
        given: Finished parts by stage.

    Raises:
        ValueError: If there is no such stage, a part is of another kind or cannot be saved, or the language models of
            the preset do not fit its tokens.
    """
    for stage, module in given.items():
        if stage not in PRETRAINED_KINDS:
            raise ValueError(f"{stage} cannot be a pretrained part; these can: {', '.join(PRETRAINED_KINDS)}")
        kind = PRETRAINED_KINDS[stage]
        if not is_a(module, kind):
            raise ValueError(f"a {kind.__name__} is needed for {stage}, got a {type(module).__name__}")
        try:
            module_spec(module)
        except TypeError as error:
            raise ValueError(f"the {type(module).__name__} for {stage} cannot be saved: {error}") from error
    if "codec" in given or "semantic-tokenizer" in given:
        with preserve_rng():
            codec = given.get("codec") or build_codec(preset)
            tokenizer = given.get("semantic-tokenizer") or build_semantic_tokenizer(preset)
            for stage in LANGUAGE_MODELS:
                _check_language_model(preset, stage, codec, tokenizer)


def _check_language_model(preset: Preset, stage: str, codec: Any, tokenizer: Any) -> None:
    """Build a language model without weights, and see whether a crop holds frames that begin together."""
    with torch.device("meta"):
        layout = build_language_model(preset, stage, codec=codec, tokenizer=tokenizer).layout
    frame_hz, seconds = layout.predicted[0].exact_hz, getattr(preset, stage).run.seconds
    if frames_inside(seconds, frame_hz) < layout.frame_alignment:
        rates_hz = {stream.name: float(stream.exact_hz) for stream in layout.streams}
        raise ValueError(
            f"tokens of {rates_hz} frames a second begin together every {float(layout.frame_alignment / frame_hz):g} s "
            f"only, but {stage} learns from {seconds:g} s at a time; give a codec and a semantic tokenizer whose rates "
            "go together, or a preset with longer crops"
        )
