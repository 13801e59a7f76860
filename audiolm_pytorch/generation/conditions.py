"""Conditions of the stages, computed from the inputs of a generation request."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from audiolm_pytorch.conditioning.base import Conditioner, TextEncoder
from audiolm_pytorch.conditioning.tensors import Conditions, ConditionTensor
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.lm.stage_transformer import StageTransformer

__all__ = ["request_conditions", "stage_conditions"]


def request_conditions(
    request: GenerationRequest,
    stages: Mapping[str, StageTransformer],
    audio_conditioner: Conditioner | None,
    text_conditioner: TextEncoder | None,
) -> dict[str, Conditions]:
    """Return the conditions of all stages by stage name, from the request or computed from its inputs."""
    finished = request.conditioning or {}
    unknown = set(finished) - set(stages)
    if unknown:
        raise ValueError(f"got conditioning for unknown stages {sorted(unknown)}; the stages are {list(stages)}")
    states = None
    needs_states = any(stage.text_dim and name not in finished for name, stage in stages.items())
    if request.text is not None and text_conditioner is not None and needs_states:
        states = text_conditioner.forward(request.text)  # once, because all stages use the same states
    conditioners: dict[str, Any] = {"audio_conditioner": audio_conditioner, "text_conditioner": text_conditioner}
    inputs: dict[str, Any] = {"text": request.text, "wavs": request.wavs, "codes": request.codes, "states": states}
    further = {name: ConditionTensor.of(value) for name, value in (request.conditions or {}).items()}
    accepted = {name for stage in stages.values() for name in stage.fuser.specs}
    if not further.keys() <= accepted:
        raise ValueError(f"got the conditions {sorted(further)}, the stages accept {sorted(accepted)}")
    if "codes" not in accepted and ("text" not in accepted or request.wavs is not None or request.codes is not None):
        # Raises an error if there are inputs, because no stage uses them.
        stage_conditions(next(iter(stages.values())), **conditioners, **inputs)
    conditions: dict[str, Conditions] = {}
    for name, stage in stages.items():
        names = stage.fuser.specs.keys()
        of_stage: Conditions | None = None
        if name in finished:
            of_stage = finished[name]
        elif "codes" in names:
            of_stage = stage_conditions(stage, **conditioners, **inputs)
        elif "text" in names:
            of_stage = stage_conditions(stage, **conditioners, text=request.text, states=states)
        conditions[name] = {key: further[key] for key in names & further.keys()} | dict(of_stage or {})
    return conditions


def stage_conditions(
    stage: StageTransformer,
    *,
    audio_conditioner: Conditioner | None,
    text_conditioner: TextEncoder | None,
    text: str | Sequence[str] | None = None,
    wavs: Tensor | None = None,
    codes: Tensor | None = None,
    states: ConditionTensor | None = None,
) -> Conditions | None:
    """Compute the conditions `codes` and `text` of a stage. Return None if there is no text, wave or code.

    States are computed from the text. Codes are also computed from the text, unless `wavs` or `codes` is passed.

    Args:
        stage: The stage.
        audio_conditioner: Computes codes of texts or waves; needed by a stage with `audio_text_condition`.
        text_conditioner: Computes states of texts; needed by a stage with `text_dim`.
        text: One text per item, or one text for all items.
        wavs: Waves `[b, n]` at the sample rate of the audio conditioner.
        codes: Codes `[b, q]` of the audio conditioner.
        states: Precomputed states of the texts, which all stages share; None = computed from `text`.

    Raises:
        ValueError: If a conditioner is missing, or the stage does not accept the passed conditions.
    """
    if text is None and wavs is None and codes is None:
        return None
    accepts_codes, accepts_states = stage.cond_dim is not None, stage.text_dim is not None
    if not (accepts_codes or (accepts_states and wavs is None and codes is None)):
        raise ValueError(
            f"the {stage.namespace} stage does not accept such conditions: it needs an audio_conditioner and a "
            "transformer with audio_text_condition=True, or for texts a text_conditioner and a transformer with a "
            "text_dim"
        )
    texts = [text] if isinstance(text, str) else text
    conditions: dict[str, ConditionTensor] = {}
    if accepts_states and texts is not None:
        if text_conditioner is None:
            raise ValueError(f"the {stage.namespace} stage is conditioned on texts; pass a text_conditioner")
        conditions["text"] = text_conditioner.forward(texts) if states is None else states
        if wavs is not None or codes is not None:
            texts = None
    if accepts_codes:
        if audio_conditioner is None:
            raise ValueError(f"the {stage.namespace} stage is conditioned on codes; pass an audio_conditioner")
        conditions["codes"] = audio_conditioner.conditioning(
            texts=texts, wavs=wavs, codes=codes, namespace=stage.namespace
        )
    return conditions
