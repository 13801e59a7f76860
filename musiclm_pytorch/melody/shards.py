"""Token shards with the melody of every record."""

from fractions import Fraction

import numpy as np
import torch

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.data.shards import TokenShards
from musiclm_pytorch.melody.embedder import CONDITION, MelodyEmbedder, per_frame

__all__ = ["MelodyShards"]


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
