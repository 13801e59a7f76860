"""Measurement of the peak memory of a function in a separate process."""

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from audiolm_pytorch.checks.types import typed

__all__ = ["peak_bytes", "peak_bytes_of"]


@typed
def peak_bytes() -> int:
    """Return the largest resident memory of this process so far in bytes, including interpreter and libraries."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage cannot be used, because on Linux a new process inherits the peak of its parent.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@typed
def peak_bytes_of(job: Callable[..., Any], *arguments: Any) -> int:
    """Call a function in a new process, and return the largest resident memory of the process in bytes."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_after, job, arguments).result()


def _peak_after(job: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    job(*arguments)
    return peak_bytes()
