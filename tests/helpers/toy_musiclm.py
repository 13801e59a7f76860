"""A MusicLM of random weights whose windows are shorter than the music, and a MusicGen."""

from typing import Any

import torch

from audiolm_pytorch.conditioning.fuser import ConditionSpec
from musiclm_pytorch.melody.embedder import MelodyEmbedder
from musiclm_pytorch.mulan import AudioSpectrogramTransformer
from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musicgen.text_tower import TextTowerEncoder
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer
from tests.helpers.small_models import small_soundstream
from tests.helpers.tiny_mulan import tiny_mulan
from tests.helpers.toy_audiolm import audiolm_of, streaming_codec

WINDOWS = {"max_seconds": 0.32}  # 8 semantic tokens, 16 acoustic frames
STAGES = ("semantic", "coarse", "fine")


def toy_embedder(**changes: Any) -> MelodyEmbedder:
    """A melody embedder of random weights at 8 kHz, with windows of 0.16 s every 0.08 s (2 semantic tokens)."""
    torch.manual_seed(0)
    audio = AudioSpectrogramTransformer(
        dim=16, depth=1, heads=2, dim_head=8, patch_size=8, sample_hz=8000, num_mels=16, spec_n_fft=256
    )
    sizes = {"dim_latent": 4, "window_seconds": 0.16, "hop_seconds": 0.08, "rq_num_quantizers": 2, "codebook_size": 8}
    embedder = MelodyEmbedder(audio_transformer=audio, **{**sizes, **changes})
    embedder.fit(torch.nn.functional.normalize(torch.randn(64, embedder.dim_latent), dim=-1))
    return embedder.eval()


def musiclm_of(codec: str = "causal", melody: bool = False, **changes: Any) -> MusicLM:
    """A MusicLM of random weights; the frames of its codec have 16 samples."""
    torch.manual_seed(0)
    if melody:
        changes = {"conditions": {"melody": ConditionSpec(4, "sum", "zero", projection="linear")}, **changes}
    quantizer = MuLaNEmbedQuantizer(
        mulan=tiny_mulan(), conditioning_dims=(8, 8, 8), namespaces=STAGES, rq_num_quantizers=2, codebook_size=8
    )
    quantizer.fit(torch.randn(64, 16), seed=0)
    audio_lm = audiolm_of(conditioned=True, codec=streaming_codec(codec), **WINDOWS, **changes)
    embedder = toy_embedder() if melody else None
    return MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=quantizer, melody_embedder=embedder).eval()


def musicgen_of() -> MusicGen:
    """A MusicGen of random weights with texts."""
    torch.manual_seed(0)
    text_conditioner = TextTowerEncoder(tiny_mulan().text)
    return MusicGen(
        codec=small_soundstream(), text_conditioner=text_conditioner, dim=16, depth=1, heads=2, max_seconds=1.0
    )
