"""Small models of every kind with random weights: codecs, a tokenizer, a MuLaN, a quantizer, stages, and a MusicLM."""

import torch

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.codecs import SoundStream, SpectralSoundStream
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.semantic import BestRQEncoder, KMeansTokenizer
from musiclm_pytorch.mulan import AudioSpectrogramTransformer, MuLaN, TextTransformer
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

SAMPLE_HZ = 8000
STAGES = ("semantic", "coarse", "fine")


def small_soundstream(**changes):
    """A causal codec of 200 frames per second."""
    sizes = {"codebook_size": 16, "rq_num_quantizers": 3, "target_sample_hz": SAMPLE_HZ}
    return SoundStream(**{**sizes, "codebook_dim": 16, "channels": 4, "strides": (2, 4, 5), **changes}).eval()


def small_spectral_codec(**changes):
    """A codec with look-ahead of 200 frames per second."""
    sizes = {"codebook_size": 16, "rq_num_quantizers": 3, "target_sample_hz": SAMPLE_HZ, "hop_samples": 40}
    return SpectralSoundStream(**{**sizes, "dim": 16, "encoder_depth": 1, "decoder_depth": 1, "code_dim": 4, **changes})


def small_tokenizer(**changes):
    """A tokenizer of 100 tokens per second."""
    encoder = BestRQEncoder(
        dim=16,
        depth=1,
        heads=2,
        dim_head=8,
        sample_hz=SAMPLE_HZ,
        num_mels=8,
        n_fft=256,
        hop_length=40,
        frames_per_token=2,
        **changes,
    )
    return KMeansTokenizer(encoder=encoder, layer=1, centroids=torch.randn(12, 16))


def small_mulan():
    """A MuLaN with windows of half a second."""
    audio = AudioSpectrogramTransformer(
        dim=16, depth=1, heads=2, dim_head=8, patch_size=8, sample_hz=SAMPLE_HZ, num_mels=16, spec_n_fft=256
    )
    text = TextTransformer(dim=16, depth=1, heads=2, dim_head=8, num_tokens=256)
    parts = {"audio_transformer": audio, "text_transformer": text, "dim_latent": 8}
    return MuLaN(**parts, window_seconds=0.5, window_stride_seconds=0.25).eval()


def small_quantizer(mulan=None):
    """A fitted quantizer with the namespaces of all stages."""
    mulan = small_mulan() if mulan is None else mulan
    sizes = {"conditioning_dims": (16, 16, 16), "namespaces": STAGES, "rq_num_quantizers": 2, "codebook_size": 4}
    quantizer = MuLaNEmbedQuantizer(mulan=mulan, **sizes)
    quantizer.fit(torch.randn(32, 8))
    return quantizer.eval()


def small_stages(**changes):
    """The three stages, conditioned on the codes of a quantizer."""
    sizes = {
        "dim": 16,
        "depth": 1,
        "heads": 2,
        "dim_head": 8,
        "audio_text_condition": True,
        "null_tokens": 2,
        **changes,
    }
    rates = {"num_semantic_tokens": 12, "semantic_rate_hz": 100, "rate_hz": 200}
    return {
        "semantic_transformer": SemanticTransformer(num_semantic_tokens=12, rate_hz=100, **sizes),
        "coarse_transformer": CoarseTransformer(codebook_size=16, num_coarse_quantizers=1, **rates, **sizes),
        "fine_transformer": FineTransformer(
            codebook_size=16, num_coarse_quantizers=1, num_fine_quantizers=2, rate_hz=200, **sizes
        ),
    }


def small_audiolm(codec=None, quantizer=None):
    """An AudioLM of small models."""
    torch.manual_seed(0)
    codec = small_soundstream() if codec is None else codec
    quantizer = small_quantizer() if quantizer is None else quantizer
    return AudioLM(wav2vec=small_tokenizer(), codec=codec, **small_stages(), audio_conditioner=quantizer).eval()


def small_musiclm(**changes):
    """A MusicLM of small models."""
    audio_lm = small_audiolm(**changes)
    return MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=audio_lm.audio_conditioner).eval()
