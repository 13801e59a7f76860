"""A MusicLM of random weights whose windows are shorter than the music."""

from typing import Any

import torch

from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer
from tests.helpers.tiny_mulan import tiny_mulan
from tests.helpers.toy_audiolm import audiolm_of, streaming_codec

WINDOWS = {"max_seconds": 0.32}  # 8 semantic tokens, 16 acoustic frames
STAGES = ("semantic", "coarse", "fine")


def musiclm_of(codec: str = "causal", **changes: Any) -> MusicLM:
    """A MusicLM of random weights; the frames of its codec have 16 samples."""
    torch.manual_seed(0)
    quantizer = MuLaNEmbedQuantizer(
        mulan=tiny_mulan(), conditioning_dims=(8, 8, 8), namespaces=STAGES, rq_num_quantizers=2, codebook_size=8
    )
    quantizer.fit(torch.randn(64, 16), seed=0)
    audio_lm = audiolm_of(conditioned=True, codec=streaming_codec(codec), **WINDOWS, **changes)
    return MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=quantizer).eval()
