"""Random numbers of a training run as a pure function of (seed, step, rank): generators need no checkpoint."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["preserved_generators", "seed_generators"]


def seed_generators(seed: int, *position: int | str) -> None:
    """Seed the global generators of torch, numpy and `random` from a seed and a position in the run.

    Args:
        seed: Seed of the run.
        position: Anything that tells the moment, e.g. step and rank; hashed, so that neighbours are unrelated.
    """
    name = "/".join(str(part) for part in (seed, *position))
    digest = hashlib.sha256(name.encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))
    np.random.seed(int.from_bytes(digest[8:12], "little"))
    random.seed(int.from_bytes(digest[16:24], "little"))


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Give the global generators back as they were: a training run must not seed the program around it."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
