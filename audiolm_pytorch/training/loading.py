"""Loading of training batches, in the training process or ahead of it in worker processes."""

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from audiolm_pytorch.data.batches import BatchPlan
from audiolm_pytorch.training.distributed import map_tensors
from audiolm_pytorch.training.rng import seed_rng
from audiolm_pytorch.training.stopping import STOP_SIGNALS

__all__ = ["loaded_batches"]

LoadBatch = Callable[[list[tuple[int, int]]], Any]


@contextmanager
def loaded_batches(
    load: LoadBatch, plan: BatchPlan, numbers: Sequence[int], num_workers: int, pin_memory: bool = False
) -> Iterator[Iterator[Any]]:
    """Load the batches of `plan` with these numbers in order, as an iterator that a `with` block can use.

    Every batch is loaded with random generators of its own seed, so that the number of workers has no influence on the
    batches. Worker processes load at most two batches each ahead of the iterator, and end with the block. An error of a
    worker is raised again when the iterator reaches its batch.

    Args:
        load: Function that returns the batch of (epoch, item index) pairs, with tensors on the CPU.
        num_workers: Number of worker processes, which are forked, as `load` and data sets of users need no pickling
            then; 0 loads a batch when it is needed.
        pin_memory: Copy the tensors to page-locked memory, from which a copy to a GPU does not block.
    """
    if num_workers:
        # the tokenizers package warns about a fork after parallel calls, unless this variable is set
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader: DataLoader[Any] = DataLoader(
        _Batches(load, plan),
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        multiprocessing_context="fork" if num_workers else None,
    )
    # All processes of a group receive Ctrl-C and the like. Workers inherit the block, and leave them to the training.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if num_workers else None
    try:
        iterator = iter(loader)
    finally:
        if unblocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    try:
        yield map(_batch_or_error, iterator)
    finally:
        if num_workers:
            # an exception keeps references to the iterator, which would keep the workers alive
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            for worker in iterator._workers:  # type: ignore[attr-defined]
                worker.kill()  # still alive after several seconds: it waits, for example for a network drive
                worker.join()


@dataclass
class _Loaded:
    """Batch, or the error that the worker has raised with its traceback as text."""

    batch: Any = None
    error: Exception | None = None
    place: str = ""

    def pin_memory(self) -> "_Loaded":
        """Copy all tensors to page-locked memory; the DataLoader calls this method."""
        return _Loaded(map_tensors(self.batch, _pinned), self.error, self.place)


class _Batches(Dataset[_Loaded]):
    """Batches of a plan by number."""

    def __init__(self, load: LoadBatch, plan: BatchPlan) -> None:
        self.load, self.plan = load, plan
        self._can_be_sent = False

    def __getitem__(self, number: int) -> _Loaded:
        seed_rng(self.plan.seed, "batch", number, self.plan.rank, device=torch.device("cpu"))
        try:
            batch = self.load(self.plan.indices(number))
            if get_worker_info() is not None and not self._can_be_sent:
                _check_picklable(batch)
                self._can_be_sent = True
            return _Loaded(batch)
        except Exception as error:  # of any kind: data sets are code of the user
            if get_worker_info() is None:
                raise
            return _Loaded(error=_picklable(error), place=traceback.format_exc())


def _batch_or_error(loaded: _Loaded) -> Any:
    """Return the batch, or raise the error of the worker as if it had been raised in this process."""
    if loaded.error is not None:
        raise loaded.error from RuntimeError(f"in a worker process:\n{loaded.place}")
    return loaded.batch


def _check_picklable(batch: Any) -> None:
    """Check that a batch can be sent to the training process, which would wait for it without end otherwise."""
    try:
        ForkingPickler.dumps(map_tensors(batch, lambda tensor: None))
    except Exception as error:  # of any kind: batches are objects of the user
        raise TypeError(f"batches must be picklable for worker processes, got: {error}; pass num_workers=0") from error


def _picklable(error: Exception) -> Exception:
    """Return the error, or a RuntimeError with its message if it cannot be sent to another process."""
    try:
        return (
            error if str(ForkingPickler.loads(ForkingPickler.dumps(error))) == str(error) else RuntimeError(str(error))
        )
    except Exception:  # of any kind: classes of errors are code of the user
        return RuntimeError(f"{type(error).__name__}: {error}")


def _pinned(part: Any) -> Any:
    """Copy a tensor to page-locked memory; a module stays the same."""
    return part.pin_memory() if isinstance(part, torch.Tensor) else part


def _unchanged(loaded: Any) -> Any:
    return loaded
