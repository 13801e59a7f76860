"""Locks by which any number of processes share the work in a folder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from audiolm_pytorch.saving.ownership import LOCK_FILE
from audiolm_pytorch.saving.text import logger_named

__all__ = ["claims"]

logger = logger_named(__name__)


@contextmanager
def claims(folder: Path, wait: bool = False) -> Iterator[Callable[[int], bool]]:
    """Yield a function that claims a numbered part of the work in a folder, until the end of the block.

    The function returns False if another process has claimed the part; with `wait`, it waits until the other process
    ends. The system releases the claims of a process that is killed. Without locks (Windows, some network drives), the
    function always returns True, so that processes may do the same work.
    """
    try:
        import fcntl
    except ImportError:
        yield lambda number: True
        return
    with (folder / LOCK_FILE).open("a") as file:

        def claim(number: int) -> bool:
            try:
                # One byte of the file for each part. Such locks belong to the process, and work over NFS.
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
            except (BlockingIOError, PermissionError):  # POSIX allows both for a locked file
                return False
            except OSError as error:
                logger.warning("%s cannot be locked (%s); processes may do the same work", folder, error)
            return True

        yield claim
