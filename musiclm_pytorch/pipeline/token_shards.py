"""Tokens of a corpus: what codec, semantic tokenizer and MuLaN say about every file, computed once into shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from beartype import beartype

from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.data.captions import encode_texts
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.data.shards import TokenShards, write_shards
from audiolm_pytorch.lm.compatibility import shard_fingerprint
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.semantic import SemanticTokenizer
from musiclm_pytorch.mulan import JointEmbedding
from musiclm_pytorch.mulan.captions import texts_of

if TYPE_CHECKING:
    import accelerate

__all__ = ["compute_tokens"]


@beartype
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
    """Write records that stage trainers learn from, or open those that are there.

    Args:
        folder: Of the shards; chunks that are complete are not computed again.
        items: The files, a record each: `semantic [t]`, `acoustic [f, q]`, `latents [w, d]` of windows,
            `captions` (see `encode_texts`), `text_latents [k, d]` of these captions and `duration_seconds`.
        codec: Makes `acoustic`, of all its channels; the others hear their average.
        semantic_tokenizer: Makes `semantic`.
        mulan: Makes `latents`, one for each window, and `text_latents`, one for each caption.
        origin: What else tells one set of records from another.
        accelerator: Its processes share the work.

    Returns:
        The records.

    Raises:
        ValueError: If the folder holds tokens of other models, or of another number of files.
    """
    fingerprint = {
        **shard_fingerprint(semantic_tokenizer, codec),
        "mulan": part_fingerprint(mulan),
        **origin,
    }
    codec_hz, semantic_hz, mulan_hz = codec.target_sample_hz, semantic_tokenizer.target_sample_hz, mulan.sample_hz
    files = CropDataset(items, None, (semantic_hz, codec_hz, mulan_hz), cache_bytes=0, channels=codec.channels)

    @torch.no_grad()
    def make_record(index: int) -> dict[str, np.ndarray]:
        waves = {hz: wave.to(accelerator.device) for hz, wave in files.get(0, index).waves.items()}
        mono = {hz: wave if wave.ndim == 1 else wave.mean(dim=0) for hz, wave in waves.items()}
        return {
            "semantic": semantic_tokenizer.forward(mono[semantic_hz][None])[0].cpu().numpy(),
            "acoustic": codec.tokenize(waves[codec_hz][None])[0].cpu().numpy(),
            "latents": mulan.window_latents(mono[mulan_hz]).half().cpu().numpy(),
            "captions": encode_texts(texts_of(items[index])),
            "text_latents": _of_captions(mulan, items[index]),
            "duration_seconds": np.asarray(items[index].num_samples / items[index].sample_hz, dtype=np.float32),
        }

    write_shards(
        folder,
        make_record,
        len(items),
        fingerprint,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    accelerator.wait_for_everyone()
    return TokenShards(folder, fingerprint)


def _of_captions(mulan: JointEmbedding, item: AudioItem) -> np.ndarray:
    """Latents `[k, d]` float16 of the texts that describe a file, of which there may be none."""
    texts = texts_of(item)
    latents = mulan.get_text_latents(texts) if texts else torch.empty(0, mulan.dim_latent)
    return latents.half().cpu().numpy()
