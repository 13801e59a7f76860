"""Melody codes of a set of audio files, and token shards with the melody of every record."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.items import AudioItem
from audiolm_pytorch.data.shards import TokenShards, write_shards
from audiolm_pytorch.lm.stage_transformer import StageTransformer
from audiolm_pytorch.training.stopping import stop_signals
from musiclm_pytorch.melody.embedder import CONDITION, MelodyEmbedder, per_frame
from musiclm_pytorch.melody.trainer import melody_wave

if TYPE_CHECKING:
    import accelerate

__all__ = ["MelodyShards", "with_melodies"]


@typed
def with_melodies(
    tokens: TokenShards,
    folder: Path,
    items: Sequence[AudioItem],
    embedder: MelodyEmbedder,
    *,
    stage: StageTransformer,
    seed: int,
    accelerator: "accelerate.Accelerator",
) -> "MelodyShards":
    """Add the melodies of the files to the tokens of a stage.

    Melody codes `[m, q]` (see `melody_wave`) are stored in shards in `folder`. They are computed where they are
    missing; an interrupted call can be continued. Each process of the accelerator computes a share of the files.
    """
    fingerprint = {CONDITION: embedder.fingerprint(), "seed": seed, "tokens": tokens.digest}

    def make_record(index: int) -> dict[str, np.ndarray]:
        request.end_if_requested(f"before record {index + 1} of {len(items)} of the melodies; complete chunks are kept")
        wave = melody_wave(items[index], embedder.sample_hz, [seed, index])
        return {"codes": embedder.codes(wave.to(accelerator.device))[0].cpu().numpy()}

    processes = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    with stop_signals() as request:
        write_shards(folder, make_record, len(items), fingerprint, **processes)
    accelerator.wait_for_everyone()
    melodies = TokenShards(folder, fingerprint)
    return MelodyShards(tokens, melodies, embedder, stage.layout.predicted[0].exact_hz)


class MelodyShards(TokenShards):
    """Token shards with one further field `melody`, one vector per predicted frame of a stage.

    Args:
        tokens: Token shards without melodies.
        melodies: Melody codes of the same files, in the same order.
        embedder: Embedder that computed the codes.
        frame_hz: Predicted frames of the stage per second.
    """

    @typed
    def __init__(
        self, tokens: TokenShards, melodies: TokenShards, embedder: MelodyEmbedder, frame_hz: Fraction
    ) -> None:
        super().__init__(tokens.folder)
        if len(melodies) != len(tokens):
            raise ValueError(
                f"{melodies.folder} has the melodies of {len(melodies)} files, but {tokens.folder} has the tokens of "
                f"{len(tokens)}; delete {melodies.folder} to compute the melodies again"
            )
        self.fingerprint = {**self.fingerprint, CONDITION: embedder.fingerprint()}
        self.digest = f"{self.digest}, melodies {melodies.digest}"
        self._melodies, self._embedder, self._frame_hz = melodies, embedder, frame_hz

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of every record."""
        return (*super().fields, CONDITION)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Read a record as a dict of arrays."""
        codes = torch.from_numpy(self._melodies[index]["codes"].astype(np.int64))
        vectors = per_frame(self._embedder.vectors(codes), self._embedder.rate_hz, self._frame_hz)
        return {**super().__getitem__(index), CONDITION: vectors.cpu().numpy()}
