"""Codecs, towers and tokenizers are exported, traced and compiled with any length of waves and texts."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from audiolm_pytorch.lm.stage_transformer import AudioTokens
from musiclm_pytorch.pipeline.builders import build_codec, build_semantic_tokenizer
from musiclm_pytorch.pretrained.onnx import MethodCall
from tests.helpers import small_models as small
from tests.helpers.micro import MICRO

# The example has the first length; the others are shorter, longer, and no multiple of a frame.
NUM_SAMPLES = (4000, 1237, 6801)
NUM_FRAMES = (40, 7, 90)
NUM_TOKENS = (12, 5, 20)


def wave(num_samples: int) -> Tensor:
    """A batch of two waves."""
    return 0.3 * torch.randn(2, num_samples)


def codes(num_frames: int) -> Tensor:
    """Codes of a batch of two waves."""
    return torch.randint(16, (2, num_frames, 3))


def text(num_tokens: int) -> Tensor:
    """Token ids of a batch of two texts."""
    return torch.randint(1, 256, (2, num_tokens))


CODECS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": lambda: small.small_soundstream(rq_num_quantizers=3),
    "attention": lambda: small.small_soundstream(rq_num_quantizers=3, attn_depth=1, attn_window_size=8),
    "lookup-free": lambda: small.small_soundstream(rq_num_quantizers=3, use_lookup_free_quantizer=True),
    "spectral": lambda: small.small_spectral_codec().eval(),
}
# Module, method, inputs, and the lengths of the inputs.
PARTS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[int], Tensor], tuple[int, ...]]] = {
    **{f"{name} encoder": (make, "tokenize", wave, NUM_SAMPLES) for name, make in CODECS.items()},
    **{f"{name} decoder": (make, "decode_from_codebook_indices", codes, NUM_FRAMES) for name, make in CODECS.items()},
    "tokenizer": (lambda: small.small_tokenizer(window_tokens=60), "forward", wave, (4000, 1237, 13_001)),
    "codec of the pipeline": (lambda: build_codec(MICRO).eval(), "tokenize", wave, (16_000, 19_200)),
    "tokenizer of the pipeline": (lambda: build_semantic_tokenizer(MICRO), "forward", wave, (16_000, 19_200)),
    "audio tower": (small.small_mulan, "get_audio_latents", wave, (4000, 2237, 3201)),
    "text tower": (small.small_mulan, "get_text_latents", text, NUM_TOKENS),
}
TRACED_IN_DEFAULT_RUN = ("spectral encoder", "tokenizer", "audio tower", "text tower")
every_part = pytest.mark.parametrize("part", PARTS)


def check_equal(part: str, converted: Callable[[Tensor], Tensor], original: nn.Module) -> None:
    """Compare the outputs of a converted part with those of the original for all lengths."""
    make_input, lengths = PARTS[part][2:]
    for length in lengths:
        x = make_input(length)
        with torch.no_grad():
            expected = original(x)
            torch.testing.assert_close(converted(x), expected, atol=1e-5, rtol=1e-4)


def built(part: str) -> tuple[nn.Module, Tensor]:
    """Return a part, and an input of the first length."""
    torch.manual_seed(0)
    make, method, make_input, lengths = PARTS[part]
    return MethodCall(make().eval(), method), make_input(lengths[0])


@pytest.mark.slow
@every_part
def test_export_with_a_dynamic_length(part: str) -> None:
    """torch.export finds no constant length and no guard on values."""
    module, x = built(part)
    shapes = ({1: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False)
    check_equal(part, exported.module(), module)


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=() if part in TRACED_IN_DEFAULT_RUN else pytest.mark.slow) for part in PARTS]
)
def test_trace(part: str) -> None:
    """torch.jit.trace keeps the length dynamic."""
    module, x = built(part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, x, check_trace=False)
    check_equal(part, traced, module)


@pytest.mark.slow
def test_compiled_language_model() -> None:
    """The loss of a compiled stage and its gradients, for batches of several lengths."""
    torch.manual_seed(0)
    stage = small.small_stages(audio_text_condition=False)["coarse_transformer"]
    compiled = torch.compile(stage, backend="aot_eager", dynamic=True)
    for length in (10, 7, 21):
        tokens = {"semantic": torch.randint(12, (2, length)), "acoustic": torch.randint(16, (2, 2 * length, 3))}
        packed = stage.packed(AudioTokens(tokens, {}))
        losses = []
        for model in (stage, compiled):
            stage.zero_grad()
            loss = model(packed).loss
            loss.backward()
            losses.append((loss.detach(), [weight.grad for weight in stage.parameters() if weight.grad is not None]))
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_codec_and_towers() -> None:
    """Parts that are worth compiling, in place of the originals."""
    torch.manual_seed(0)
    codec, mulan = small.small_spectral_codec().eval(), small.small_mulan()
    outputs = []
    for is_compiled in (False, True):
        if is_compiled:
            for module in (codec.encoder, codec.decoder, mulan.audio, mulan.text):
                module.compile(backend="aot_eager", dynamic=True)
        torch.manual_seed(1)
        outputs.append([])
        for length in (4000, 2400):
            codes = codec.tokenize(wave(length))
            waves = codec.decode_from_codebook_indices(codes)
            outputs[-1] += [codes, waves, mulan.get_audio_latents(wave(length)), mulan.get_text_latents(text(9))]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_generation_is_not_compiled() -> None:
    """torch.compile of a whole AudioLM or MusicLM changes nothing; it took minutes and failed."""
    musiclm = small.small_musiclm()
    for model, text, more in ((musiclm.audio_lm, ["a"], {}), (musiclm, "a", {"num_samples": 1})):
        arguments = {"text": text, "seconds": 0.1, "seeds": [1], **more}
        counter = CompileCounter()
        assert torch.equal(torch.compile(model, backend=counter)(**arguments), model(**arguments))
        assert counter.frame_count <= 1


@pytest.mark.slow
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
