"""Tokens and MuLaN latents of a set of audio files, computed once and stored in shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.data.captions import encode_texts
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.data.shards import TokenShards, write_shards
from audiolm_pytorch.lm.compatibility import shard_fingerprint
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.semantic import SemanticTokenizer
from audiolm_pytorch.training.stopping import stop_signals
from musiclm_pytorch.mulan import JointEmbedding
from musiclm_pytorch.mulan.captions import texts_of

if TYPE_CHECKING:
    import accelerate

__all__ = ["compute_tokens"]


@typed
def compute_tokens(
    folder: Path,
    items: Sequence[AudioItem],
    *,
    codec: Codec,
    semantic_tokenizer: SemanticTokenizer,
    mulan: JointEmbedding,
    origin: Mapping[str, str],
    accelerator: "accelerate.Accelerator",
) -> TokenShards:
    """Encode every audio file, and write one record per file into shards; an interrupted call can be continued.

    A record has the tokens `semantic [t]` and `acoustic [f, q]`, the texts `captions` (see `encode_texts`), and
    `duration_seconds`. The MuLaN latents of a record are `latents [w, d]` (windows) and `text_latents [k, d]`
    (captions). The codec receives all channels of a wave, the other models receive the mean of the channels. `origin`
    is added to the fingerprint of the shards. Each process of the accelerator encodes a share of the files.
    """
    fingerprint = {**shard_fingerprint(semantic_tokenizer, codec), "mulan": part_fingerprint(mulan), **origin}
    codec_hz, semantic_hz, mulan_hz = codec.target_sample_hz, semantic_tokenizer.target_sample_hz, mulan.sample_hz
    files = CropDataset(items, None, (semantic_hz, codec_hz, mulan_hz), cache_bytes=0, channels=codec.channels)

    @torch.no_grad()
    def make_record(index: int) -> dict[str, np.ndarray]:
        item, texts = items[index], texts_of(items[index])
        waves = {hz: wave.to(accelerator.device) for hz, wave in files.get(0, index).waves.items()}
        mono = {hz: wave if wave.ndim == 1 else wave.mean(dim=0) for hz, wave in waves.items()}
        text_latents = mulan.get_text_latents(texts) if texts else torch.empty(0, mulan.dim_latent)
        return {
            "semantic": semantic_tokenizer.forward(mono[semantic_hz][None])[0].cpu().numpy(),
            "acoustic": codec.tokenize(waves[codec_hz][None])[0].cpu().numpy(),
            "latents": mulan.window_latents(mono[mulan_hz]).half().cpu().numpy(),
            "captions": encode_texts(texts),
            "text_latents": text_latents.half().cpu().numpy(),
            "duration_seconds": np.asarray(item.num_samples / item.sample_hz, dtype=np.float32),
        }

    def interruptible(index: int) -> dict[str, np.ndarray]:
        request.end_if_requested(f"before record {index + 1} of {len(items)} of the tokens; complete chunks are kept")
        return make_record(index)

    processes = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    with stop_signals() as request:
        write_shards(folder, interruptible, len(items), fingerprint, **processes)
    accelerator.wait_for_everyone()
    return TokenShards(folder, fingerprint)
