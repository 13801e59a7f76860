"""Removal of repeated semantic tokens (run-length coding), and its exact inverse."""

from dataclasses import dataclass

import torch
from torch import Tensor

from audiolm_pytorch.audio.padding import length_mask
from audiolm_pytorch.checks.types import typed

__all__ = ["Runs", "deduplicate", "expand"]

PADDING = -1


@dataclass(frozen=True)
class Runs:
    """Tokens without consecutive repetitions, with the length of each run (AudioLM, arXiv:2209.03143, section III-B).

    Attributes:
        ids: `[b, r]` int64, the token of each run; -1 at padding.
        run_lengths: `[b, r]` int64, the number of tokens of each run; 0 at padding.
        num_tokens: Number of columns of the token ids before merging; None means the length of the longest item.
    """

    ids: Tensor
    run_lengths: Tensor
    num_tokens: int | None = None


@typed
def deduplicate(ids: Tensor) -> Runs:
    """Merge equal consecutive ids of a `SemanticTokenizer`, `[b, t]`, into runs; `expand` is the inverse.

    The merged ids have no constant frame rate; only the run lengths contain the durations.
    """
    _check_integers("ids", ids)
    real = ids >= 0
    if bool((ids < PADDING).any()) or bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise ValueError("ids must be at least 0, or -1 at padding at the end; got an id after padding, or below -1")
    is_start = real.clone()
    is_start[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    num_runs = int(is_start.sum(dim=1).max()) if is_start.numel() else 0
    # Tokens of a run share its place. Padding belongs to the last run and adds 0 to its length.
    place = (is_start.cumsum(dim=1) - 1).clamp(min=0)
    run_lengths = ids.new_zeros(len(ids), num_runs, dtype=torch.int64)
    run_ids = torch.full_like(run_lengths, PADDING)
    if num_runs:
        run_lengths.scatter_add_(1, place, real.long())
        rows = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(ids)
        run_ids[rows[is_start], place[is_start]] = ids[is_start].long()
    return Runs(run_ids, run_lengths, ids.shape[1])


@typed
def expand(runs: Runs) -> Tensor:
    """Repeat the token of every run by the run length; return ids `[b, t]` int64, -1 at padding.

    Two neighbouring runs can have the same token. More tokens than `num_tokens` raise a ValueError.
    """
    ids, run_lengths = runs.ids, runs.run_lengths
    _check_integers("ids", ids)
    _check_integers("run_lengths", run_lengths)
    if ids.shape != run_lengths.shape:
        raise ValueError(f"ids {tuple(ids.shape)} and run_lengths {tuple(run_lengths.shape)} must have equal shapes")
    if not torch.equal(ids >= 0, run_lengths > 0) or bool((run_lengths < 0).any()) or bool((ids < PADDING).any()):
        raise ValueError("ids of 0 or more need a run length of 1 or more, and padding (id -1) needs run length 0")
    totals = run_lengths.sum(dim=1)
    longest = int(totals.max()) if totals.numel() else 0
    num_tokens = longest if runs.num_tokens is None else runs.num_tokens
    if longest > num_tokens:
        raise ValueError(f"the runs have {longest} tokens, more than num_tokens = {num_tokens}")
    expanded = torch.full((len(ids), num_tokens), PADDING, dtype=torch.int64, device=ids.device)
    expanded[length_mask(totals, num_tokens)] = ids.reshape(-1).long().repeat_interleave(run_lengths.reshape(-1))
    return expanded


def _check_integers(name: str, value: Tensor) -> None:
    if value.ndim != 2 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must be int [b, t], got {value.dtype} {tuple(value.shape)}")
