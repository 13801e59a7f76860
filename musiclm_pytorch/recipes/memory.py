"""How much memory a job takes, measured in a process of its own."""

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from beartype import beartype

__all__ = ["peak_bytes", "peak_bytes_of"]


@beartype
def peak_bytes() -> int:
    """Largest resident size that this process has had, interpreter and libraries included."""
    status = Path("/proc/self/status")
    if status.exists():
        # not getrusage there: Linux lets a process that was just started inherit the peak of the one that started it
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@beartype
def peak_bytes_of(job: Callable[..., Any], *arguments: Any) -> int:
    """Run a job in a fresh process, and tell the largest resident size of that process.

    Args:
        job: A function of a module.
        *arguments: What it is called with.

    Returns:
        Bytes, interpreter and libraries included.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_after, job, arguments).result()


def _peak_after(job: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    job(*arguments)
    return peak_bytes()
