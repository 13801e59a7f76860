"""Errors for unknown arguments of models and calls, with the names here of arguments of other libraries."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from audiolm_pytorch import AudioLM, SemanticTransformer, SemanticTransformerWrapper
from audiolm_pytorch.checks.names import _FORMER_NAMES, unknown_arguments
from audiolm_pytorch.checks.types import named
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.nn.transformer import Transformer
from audiolm_pytorch.training import LoopSettings
from musiclm_pytorch import MuLaNTrainer, MusicGen, MusicLM
from tests.helpers import small_models as small

SIZES = {"num_semantic_tokens": 12, "dim": 16, "depth": 1}
WAVE = torch.zeros(1, 800)
CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: AudioLM.forward(None, prime_wave_path="a.wav"), "AudioLM.forward .*'prime_wave_path'; use prime_wave$"),
    (lambda: AudioLM.forward(None, max_length=5), "AudioLM.forward has no argument 'max_length'; use seconds$"),
    (lambda: AudioLM.forward(None, return_coarse_generated_wave=True), "use coarse_only$"),
    (lambda: AudioLM(unique_consecutive=True), "^AudioLM .*; leave it out: .* deduplicate.ids=. merges them$"),
    (lambda: SemanticTransformerWrapper(None, unique_consecutive=True), "leave it out: tokens keep their repetitions"),
    (lambda: GenerationRequest(prime_wave_path="a", max_length=5), "use prime_wave. Gen.*'max_length'; use seconds$"),
    (lambda: SemanticTransformer(**SIZES, flash_attn=True), "use positions=.*attention is always that of torch.$"),
    (lambda: SemanticTransformer(**SIZES, flash_attn=True, rel_pos_bias=False), "'flash_attn', 'rel_pos_bias'; use po"),
    (
        lambda: SemanticTransformer(**SIZES, has_condition=True),
        "^SemanticTransformer .*; use text_dim, with text_as",
    ),
    (lambda: SemanticTransformer(**SIZES, cond_as_self_attn_prefix=True), 'use text_as="prefix"$'),
    (lambda: SamplingSettings(cfg_coef=3.0), "^SamplingSettings has no argument 'cfg_coef'; use guidance_scale$"),
    (lambda: MusicLM.forward(None, "a", duration=5), "^MusicLM.forward has no argument 'duration'; use seconds$"),
    (lambda: MusicGen.generate(None, descriptions=["a"], cfg_coef=3), "use texts. Music.*'cfg_coef'; use guidance_"),
    (lambda: MusicGen.forward(None, duration=5.0), "^MusicGen.forward has no argument 'duration'; use seconds$"),
    (lambda: small.small_soundstream()(WAVE, return_recons=True), "SoundStream.forward .*; use return_recons_only$"),
    (
        lambda: small.small_soundstream().tokenize(WAVE, input_sample_hz=8000),
        "^SoundStream.tokenize has no argument 'input_sample_hz'; convert the wave with resample.*first$",
    ),
    (lambda: small.small_soundstream().decode_from_codebook_indices(WAVE, num_sample=3), "use num_samples$"),
    (lambda: small.small_soundstream().encode(WAVE, length=3), "^Codec.encode has no argument 'length'; use lengths$"),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_former_and_similar_names_are_advised(call: Callable[[], object], message: str) -> None:
    """Models and methods name the argument here, as trainers do."""
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("name", ["max_length", "cfg_coef", "flash_attn", "epochs", "data", "dataset"])
def test_only_arguments_of_the_callee_are_advised(name: str) -> None:
    """A replacement that the callee lacks is no advice, nor is a word of a remark; then all arguments are listed."""
    known = ["folder", "optimizer", "attention", "train"]
    assert str(unknown_arguments("f", [name], known)) == f"f has no argument {name!r}; use {', '.join(known)}"


def test_every_former_name_has_a_replacement_here() -> None:
    """The advice names arguments that exist."""
    callees = (MuLaNTrainer, AudioLM.forward, MusicGen.generate, TokenTransformer, Transformer)
    known = {*LoopSettings.__dataclass_fields__}.union(*(inspect.signature(callee).parameters for callee in callees))
    for former, advice in _FORMER_NAMES.items():
        assert former not in known
        assert any(name in advice for name in known), advice


def test_methods_with_checked_names_can_be_compiled() -> None:
    """The check is no break of the graph, and other errors of the method pass unchanged."""

    @named
    def doubled(x: Any, *, times: int = 2) -> Any:
        return x * times

    x = torch.ones(3)
    compiled = torch.compile(doubled, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, times=3), 3 * x) and torch.equal(compiled(x), 2 * x)
    with pytest.raises(TypeError, match="doubled has no argument 'time'; use times"):
        doubled(x, time=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        doubled()  # type: ignore[call-arg]
