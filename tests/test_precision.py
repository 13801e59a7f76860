"""Every module computes with weights of half and double precision, from waves and texts of the usual types."""

import pytest
import torch

from audiolm_pytorch.nn.film import FiLM
from tests.helpers import small_models as small

DTYPES = [torch.float16, torch.bfloat16, torch.float64]
WAVE = 0.1 * torch.sin(torch.arange(2 * 4000).float()).view(2, 4000)


def codec_outputs(codec):
    """Tokens, their wave, the wave of `forward`, and the wave without quantization."""
    codes = codec.tokenize(WAVE)
    waves = [codec(WAVE).wave, codec(WAVE, return_recons_only=True), codec(WAVE, quantize=False).wave]
    return [codes, codec.decode_from_codebook_indices(codes), *waves]


CODECS = {
    "causal": lambda: small.small_soundstream(),
    "attention": lambda: small.small_soundstream(attn_depth=1, attn_window_size=8),
    "groups": lambda: small.small_soundstream(rq_groups=2),
    "denoising": lambda: small.small_soundstream(denoising=FiLM(dim=16)),
    "lookup-free": lambda: small.small_soundstream(use_lookup_free_quantizer=True),
    "finite scalar": lambda: small.small_soundstream(use_finite_scalar_quantizer=True, codebook_size=64),
    "spectral": lambda: small.small_spectral_codec().eval(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CODECS)
def test_codecs(kind, dtype):
    """Encoder, quantizers of every kind and decoder."""
    for output in codec_outputs(CODECS[kind]().to(dtype)):
        assert output.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_towers_quantizer_and_tokenizer(dtype):
    """MuLaN and its loss, the codes of waves and texts, semantic tokens."""
    mulan, tokenizer = small.small_mulan().to(dtype), small.small_tokenizer().to(dtype)
    quantizer = small.small_quantizer().to(dtype)
    mulan(WAVE, ["a low tone", "a high tone"]).backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in mulan.parameters())
    assert mulan.get_long_audio_latents(WAVE.repeat(1, 3)).isfinite().all()
    assert quantizer.codes(wavs=WAVE).shape == quantizer.codes(texts=["a", "b"]).shape == (2, 2)
    assert tokenizer(WAVE, input_sample_hz=16_000).shape == (2, 25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_musiclm_with_prompt(dtype):
    """Text, audio prompt and ranking, whole and as a stream."""
    musiclm = small.small_musiclm(codec=small.small_spectral_codec().eval()).to(dtype)
    prompt = {"prime_wave": WAVE[0, :400], "prime_wave_input_sample_hz": 16_000}
    assert musiclm("a low tone", seconds=0.1, seed=1, num_samples=2, **prompt).isfinite().all()
    times = {"seconds": 0.2, "chunk_seconds": 0.1, "rank_seconds": 0.1}
    chunks = list(musiclm.stream("a low tone", num_samples=2, seed=1, **times, **prompt))
    assert sum(chunk.wave.shape[-1] for chunk in chunks) == 1600
    assert musiclm.audio_lm(text=["a low tone"], seconds=0.1).isfinite().all()
