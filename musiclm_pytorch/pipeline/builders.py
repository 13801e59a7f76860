"""Functions that build untrained modules with the sizes of a preset."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from audiolm_pytorch.audio.units import exact_div, samples_in
from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs import Codec, SoundStream, SpectralSoundStream
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.semantic import BestRQ, BestRQEncoder, KMeansTokenizer, SemanticTokenizer
from musiclm_pytorch.melody.embedder import MelodyEmbedder
from musiclm_pytorch.mulan import AudioSpectrogramTransformer, JointEmbedding, MuLaN, TextTransformer
from musiclm_pytorch.pipeline.presets import ConvCodecConfig, Preset
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

__all__ = [
    "STAGES",
    "build_codec",
    "build_melody_embedder",
    "build_mulan",
    "build_quantizer",
    "build_semantic_encoder",
    "build_semantic_objective",
    "build_semantic_tokenizer",
    "build_stage",
]

STAGES = ("semantic", "coarse", "fine")

# 25 ms every 10 ms, at the 16 kHz of MuLaN
_MULAN_WINDOW_SAMPLES, _MULAN_HOP_SAMPLES = 400, 160
# BEST-RQ has the same durations at every rate of waves and tokens.
_MEL_HZ = 100
_SPECTRUM_SECONDS = 0.064
_WINDOW_SECONDS, _CONTEXT_SECONDS = 6, 1
_SPAN_SECONDS, _SPANS_PER_SECOND = 0.16, 3.75
_TARGET_REACH_SECONDS = 0.16


@typed
def build_codec(preset: Preset) -> SoundStream:
    """Build the codec."""
    c: Any = preset.codec
    codes = {"codebook_size": c.codebook_size, "rq_num_quantizers": c.num_quantizers, "target_sample_hz": c.sample_hz}
    if isinstance(c, ConvCodecConfig):
        return SoundStream(strides=c.strides, channels=c.channels, codebook_dim=c.dim, **codes)
    sizes = {"dim": c.dim, "encoder_depth": c.encoder_depth, "decoder_depth": c.decoder_depth}
    return SpectralSoundStream(hop_samples=c.hop_samples, code_dim=c.code_dim, **sizes, **codes)


@typed
def build_semantic_encoder(preset: Preset) -> BestRQEncoder:
    """Build the semantic encoder; 10 ms must be a whole number of samples, and a token must last 10, 20, 30 ... ms."""
    s = preset.semantic_tokenizer
    return BestRQEncoder(
        **s.sizes,
        sample_hz=s.sample_hz,
        n_fft=samples_in(_SPECTRUM_SECONDS, s.sample_hz),
        hop_length=exact_div(s.sample_hz, _MEL_HZ, "samples a second in mel frames of 10 ms"),
        frames_per_token=exact_div(_MEL_HZ, s.token_hz, "mel frames a second in semantic tokens"),
        window_tokens=_WINDOW_SECONDS * s.token_hz,
        context_tokens=_CONTEXT_SECONDS * s.token_hz,
    )


@typed
def build_semantic_objective(encoder: BestRQEncoder) -> BestRQ:
    """Build the training objective of the semantic encoder, which is masked prediction (BEST-RQ)."""
    token_hz = encoder.sample_hz / encoder.downsample_factor
    span_tokens = max(1, round(_SPAN_SECONDS * token_hz))
    reach_tokens = round(_TARGET_REACH_SECONDS * token_hz)
    return BestRQ(encoder, start_prob=_SPANS_PER_SECOND / token_hz, span_tokens=span_tokens, reach_tokens=reach_tokens)


@typed
def build_semantic_tokenizer(preset: Preset) -> KMeansTokenizer:
    """Build a semantic tokenizer with random weights and centroids."""
    s = preset.semantic_tokenizer
    encoder = build_semantic_encoder(replace(preset, semantic_tokenizer=replace(s, depth=s.layer)))
    return KMeansTokenizer(encoder=encoder, layer=s.layer, centroids=torch.randn(s.num_clusters, s.dim))


@typed
def build_mulan(preset: Preset, captions: Sequence[str]) -> MuLaN:
    """Build a MuLaN, and train its text tokenizer on the captions."""
    m = preset.mulan
    tokenizer = TextTokenizer.train(captions, vocab_size=m.text_vocab_size)
    audio = AudioSpectrogramTransformer(
        **m.sizes,
        num_mels=m.num_mels,
        spec_n_fft=m.n_fft,
        spec_win_length=min(_MULAN_WINDOW_SAMPLES, m.n_fft),
        spec_hop_length=_MULAN_HOP_SAMPLES,
        patch_dropout=m.patch_dropout,
    )
    text = TextTransformer(
        **m.sizes, num_tokens=tokenizer.vocab_size, max_seq_len=m.text_max_tokens, tokenizer=tokenizer
    )
    return MuLaN(audio_transformer=audio, text_transformer=text)


@typed
def build_melody_embedder(preset: Preset) -> MelodyEmbedder:
    """Build a melody embedder with random weights and without codebooks."""
    m = preset.melody
    audio = AudioSpectrogramTransformer(
        **m.sizes,
        patch_size=m.patch_size,
        sample_hz=m.sample_hz,
        num_mels=m.num_mels,
        spec_n_fft=m.n_fft,
        spec_win_length=m.n_fft,
        spec_hop_length=m.hop_length,
    )
    codes = {"rq_num_quantizers": m.num_quantizers, "codebook_size": m.codebook_size}
    return MelodyEmbedder(audio_transformer=audio, dim_latent=m.dim_latent, **codes)


@typed
def build_quantizer(preset: Preset, mulan: JointEmbedding, num_clips: int) -> MuLaNEmbedQuantizer:
    """Build an unfitted quantizer of MuLaN latents; a level has at most one code per training clip (`num_clips`)."""
    return MuLaNEmbedQuantizer(
        mulan=mulan,
        conditioning_dims=[getattr(preset, stage).dim for stage in STAGES],
        namespaces=STAGES,
        rq_num_quantizers=preset.quantizer.num_quantizers,
        codebook_size=min(preset.quantizer.codebook_size, num_clips),
    )


@typed
def build_stage(preset: Preset, stage: str, *, codec: Codec, tokenizer: SemanticTokenizer) -> StageTransformer:
    """Build the language model of a stage ("semantic", "coarse" or "fine").

    Vocabulary sizes and token rates are taken from the codec and the tokenizer, not from the preset. If the codec has
    more levels than the preset, the stages predict only the first levels of the codec.
    """
    levels, config = preset.codec.num_quantizers, getattr(preset, stage)
    if levels > codec.num_quantizers:
        raise ValueError(
            f"the codec has {codec.num_quantizers} levels, but the preset {preset.name} needs {levels}; "
            "pass a codec with more levels, or a preset with a smaller codec.num_quantizers"
        )
    semantic_hz = Fraction(tokenizer.target_sample_hz, tokenizer.downsample_factor)
    sizes: dict[str, Any] = dict(
        **config.sizes,
        dropout=config.dropout,
        cond_drop_prob=config.cond_drop_prob,
        audio_text_condition=True,
        # the length of a condition: then unconditional generation receives what a dropped condition is in training
        null_tokens=preset.quantizer.num_quantizers,
    )
    if stage == "semantic":
        return SemanticTransformer(num_semantic_tokens=tokenizer.codebook_size, rate_hz=semantic_hz, **sizes)
    sizes |= dict(
        codebook_size=codec.codebook_size,
        num_coarse_quantizers=preset.num_coarse_quantizers,
        rate_hz=Fraction(codec.target_sample_hz, codec.downsample_factor),
    )
    if stage == "coarse":
        return CoarseTransformer(
            num_semantic_tokens=tokenizer.codebook_size,
            semantic_rate_hz=semantic_hz,
            semantic_lookahead_seconds=config.semantic_lookahead_seconds,
            guide_semantic=config.guide_semantic,
            **sizes,
        )
    return FineTransformer(num_fine_quantizers=levels - preset.num_coarse_quantizers, **sizes)
