"""Codecs, towers and tokenizers are traced and exported, for waves of any length."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musiclm_pytorch.pipeline.builders import build_codec, build_semantic_tokenizer
from tests.helpers.micro import MICRO
from tests.helpers.small_models import small_mulan, small_soundstream


class Called(nn.Module):
    """A module whose `forward` is one call of another module."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module.eval(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


def wave(num_samples: int) -> Tensor:
    """Noise of two items."""
    return 0.1 * torch.randn(2, num_samples, generator=torch.Generator().manual_seed(num_samples))


# Functions that build a module, the call, and two inputs of other lengths.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], Tensor, Tensor]] = {
    "spectral codec, encoder": (lambda: build_codec(MICRO), lambda m, x: m.tokenize(x), wave(16000), wave(19200)),
    "codec, encoder": (small_soundstream, lambda m, x: m.tokenize(x), wave(3200), wave(4000)),
    "spectral codec, decoder": (
        lambda: build_codec(MICRO),
        lambda m, x: m.decode_from_codebook_indices(x),
        torch.arange(2 * 50 * 3).reshape(2, 50, 3) % 16,
        torch.arange(2 * 30 * 3).reshape(2, 30, 3) % 16,
    ),
    "semantic tokenizer": (lambda: build_semantic_tokenizer(MICRO), lambda m, x: m(x), wave(16000), wave(19200)),
    "audio tower": (small_mulan, lambda m, x: m.get_audio_latents(x), wave(16000), wave(19200)),
}


def same(one: Callable[[Tensor], Tensor], other: nn.Module, x: Tensor) -> None:
    """Check that two functions return the same for an input."""
    with torch.no_grad():
        torch.testing.assert_close(one(x), other(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_trace(name: str) -> None:
    """A traced module returns the same for another length: no value of the data decides in the traced path."""
    build, call, x, longer = CASES[name]
    torch.manual_seed(0)
    module = Called(build(), call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, (x,), check_trace=False)
    same(traced, module, x)
    same(traced, module, longer)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_export(name: str) -> None:
    """`torch.export` finds no guard that depends on the data, and the length stays dynamic."""
    build, call, x, longer = CASES[name]
    torch.manual_seed(0)
    module = Called(build(), call)
    shapes = {"x": {1: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False).module()
    same(exported, module, x)
    same(exported, module, longer)


def test_compiled_transformers_are_used_in_generation() -> None:
    """The parts that the documentation advises to compile are compiled inside a generation too."""
    torch.manual_seed(0)
    audio_lm = small.small_audiolm()
    arguments = {"text": ["a"], "seconds": 0.1, "seeds": [1]}
    expected, counter = audio_lm(**arguments), CompileCounter()
    for stage in audio_lm.stages.values():
        stage.transformer.compile(backend=counter)
    assert torch.equal(audio_lm(**arguments), expected)
    assert counter.frame_count >= 1
