"""Checks of pretrained modules that replace steps of the training pipeline."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from audiolm_pytorch.audio.units import frames_inside
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.modules import module_spec
from audiolm_pytorch.semantic import SemanticTokenizer
from musiclm_pytorch.mulan import JointEmbedding
from musiclm_pytorch.pipeline.builders import STAGES, build_codec, build_semantic_tokenizer, build_stage
from musiclm_pytorch.pipeline.presets import Preset

__all__ = ["PRETRAINED_KINDS", "check_pretrained"]

# Steps whose result may be a pretrained part, and its class.
PRETRAINED_KINDS: dict[str, Any] = {"codec": Codec, "semantic-tokenizer": SemanticTokenizer, "mulan": JointEmbedding}


@typed
def check_pretrained(preset: Preset, parts: Mapping[str, nn.Module]) -> None:
    """Check that the modules of all steps are compatible, and that the pretrained ones in `parts` can be saved."""
    for step, module in parts.items():
        if step not in PRETRAINED_KINDS:
            raise ValueError(f"step {step} accepts no pretrained module; pass one for: {', '.join(PRETRAINED_KINDS)}")
        kind = PRETRAINED_KINDS[step]
        if not isinstance(module, kind):
            raise ValueError(f"the pretrained {step} must be a {kind.__name__}, got a {type(module).__name__}")
        try:
            module_spec(module)
        except TypeError as error:
            raise ValueError(f"the pretrained {step} {type(module).__name__} cannot be saved: {error}") from error
    one_layer = replace(preset, semantic_tokenizer=replace(preset.semantic_tokenizer, depth=1, layer=1))
    with preserve_rng():
        tokenizer = parts.get("semantic-tokenizer") or build_semantic_tokenizer(one_layer)
        with torch.device("meta"):
            codec = parts.get("codec") or build_codec(preset)
            for stage in STAGES:
                _check_stage(preset, stage, codec, tokenizer)


def _check_stage(preset: Preset, stage: str, codec: Any, tokenizer: Any) -> None:
    """Check that a training crop of a stage contains a time at which frames of all token streams start together."""
    layout = build_stage(preset, stage, codec=codec, tokenizer=tokenizer).layout
    frame_hz, seconds = layout.predicted[0].exact_hz, getattr(preset, stage).run.seconds
    if frames_inside(seconds, frame_hz) < layout.frame_alignment:
        rates_hz = {stream.name: float(stream.exact_hz) for stream in layout.streams}
        raise ValueError(
            f"frames of {rates_hz} Hz start together only every {float(layout.frame_alignment / frame_hz):g} s, but "
            f"the training crops of {stage} last {seconds:g} s; pass a codec and a semantic tokenizer whose rates have "
            "a larger common divisor, or a preset with longer crops"
        )
