"""Tokens, MuLaN latents and melodies of a set of audio files, computed once and stored in shards."""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.data.captions import encode_texts, tags_in
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.items import items_digest
from audiolm_pytorch.data.manifest import AudioItem, captions_of
from audiolm_pytorch.data.shards import TokenShards, write_shards
from audiolm_pytorch.lm.compatibility import shard_fingerprint
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.saving.fingerprint import digest_of, part_fingerprint
from audiolm_pytorch.semantic import SemanticTokenizer
from audiolm_pytorch.training.stopping import stop_signals
from audiolm_pytorch.training.tracking import ProgressLog
from musiclm_pytorch.melody.embedder import CONDITION, MelodyEmbedder
from musiclm_pytorch.melody.shards import MelodyShards
from musiclm_pytorch.melody.trainer import melody_wave
from musiclm_pytorch.mulan import JointEmbedding
from musiclm_pytorch.mulan.captions import texts_of
from musiclm_pytorch.musicgen.chroma import ChromaConditioner

if TYPE_CHECKING:
    import accelerate

__all__ = ["MIN_SECONDS", "compute_melodies", "compute_music_tokens", "compute_token_split", "compute_tokens"]

# Shorter files are left out.
MIN_SECONDS = 1.0


@typed
def compute_token_split(
    folder: Path, items: tuple[Sequence[AudioItem], Sequence[AudioItem]], **models_and_accelerator: Any
) -> tuple[TokenShards, TokenShards]:
    """Compute the tokens of training and held-out files in `folder/train` and `folder/valid`, see `compute_tokens`."""
    train, valid = (
        compute_tokens(folder / part, side, origin={"part": part, **_origin(side)}, **models_and_accelerator)
        for part, side in zip(("train", "valid"), items)
    )
    return train, valid


def _origin(items: Sequence[AudioItem]) -> dict[str, str]:
    """Return the identity of waves and texts; labels that are no texts may change."""
    texts = digest_of({"texts": [texts_of(item) for item in items]}, {})
    return {"items": items_digest(items, waves_only=True), "texts": texts}


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

    return _write(folder, make_record, len(items), fingerprint, accelerator)


@typed
def compute_music_tokens(
    folder: Path,
    items: Sequence[AudioItem],
    *,
    codec: Codec,
    num_codebooks: int,
    seconds: float,
    chroma: ChromaConditioner | None,
    origin: Mapping[str, str],
    accelerator: "accelerate.Accelerator",
) -> TokenShards:
    """Encode audio files for the training of a MusicGen, with one record per `seconds` of a file.

    A record has the codes `acoustic [f, num_codebooks]`, the texts `captions` and `tags` (see `encode_texts`) and, with
    `chroma`, the melody `melody [m, 12]`. A rest of a file that is shorter than half of `seconds` has no record.
    `compute_tokens` documents the other arguments.
    """
    melody = None if chroma is None else [chroma.num_frames, chroma.sample_hz, chroma.n_fft]
    facts = {"seconds": seconds, "num_codebooks": num_codebooks, "melody": melody}
    fingerprint = {"codec": codec.fingerprint(), "items": items_digest(items), **facts, **origin}
    parts = [
        (item, number * seconds)
        for item in items
        for number in range(max(1, round(item.num_samples / item.sample_hz / seconds)))
    ]

    @torch.no_grad()
    def make_record(index: int) -> dict[str, np.ndarray]:
        item, start_seconds = parts[index]

        def wave(sample_hz: int, channels: int) -> Tensor:
            return item.read(sample_hz, channels, start_seconds, seconds).to(accelerator.device)

        codes = codec.tokenize(wave(codec.target_sample_hz, codec.channels)[None])[0, :, :num_codebooks]
        texts = {"captions": encode_texts(captions_of(item)), "tags": encode_texts(tags_in(item.labels))}
        record = {"acoustic": codes.cpu().numpy(), **texts}
        return record if chroma is None else {**record, "melody": chroma(wave(chroma.sample_hz, 1))[0].cpu().numpy()}

    return _write(folder, make_record, len(parts), fingerprint, accelerator)


@typed
def compute_melodies(
    folder: Path,
    items: Sequence[AudioItem],
    tokens: TokenShards,
    embedder: MelodyEmbedder,
    *,
    stage: StageTransformer,
    seed: int,
    accelerator: "accelerate.Accelerator",
) -> MelodyShards:
    """Add the melodies of audio files to their tokens for a stage; the melody codes `[m, q]` are stored in `folder`.

    See `melody_wave` for the melody of a file.
    """

    def make_record(index: int) -> dict[str, np.ndarray]:
        wave = melody_wave(items[index], embedder.sample_hz, [seed, index])
        return {"codes": embedder.codes(wave.to(accelerator.device))[0].cpu().numpy()}

    fingerprint = {CONDITION: embedder.fingerprint(), "seed": seed, "tokens": tokens.digest}
    melodies = _write(folder, make_record, len(items), fingerprint, accelerator)
    return MelodyShards(tokens, melodies, embedder, stage.layout.predicted[0].exact_hz)


def _chunk_size(num_records: int) -> int:
    """Return the number of records per chunk, small enough that many processes share the work."""
    return min(256, max(16, num_records // 256))


def _write(
    folder: Path,
    make_record: Callable[[int], dict[str, np.ndarray]],
    num_records: int,
    fingerprint: dict[str, Any],
    accelerator: "accelerate.Accelerator",
) -> TokenShards:
    """Write shards; each process computes a share of the records, and a signal ends it between two records."""
    starter, log = multiprocessing.parent_process(), None

    def check(place: str) -> None:
        request.end_if_requested(f"{place} of {num_records} in {folder}; complete chunks are kept")
        if starter is not None and not starter.is_alive():
            raise SystemExit(1)  # the program that started this process was killed

    def interruptible(index: int) -> dict[str, np.ndarray]:
        nonlocal log
        check(f"before record {index + 1}")
        log = log or ProgressLog(f"tokens in {folder}", index, num_records, accelerator.is_main_process)
        record = make_record(index)
        log.update(index + 1, {})
        return record

    with stop_signals() as request:
        wait = partial(check, "while other processes computed the last records")
        write_shards(folder, interruptible, num_records, fingerprint, _chunk_size(num_records), wait)
    accelerator.wait_for_everyone()
    return TokenShards(folder, fingerprint)
