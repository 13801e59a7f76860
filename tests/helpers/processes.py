"""Programs of tests in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run_python(*arguments: str | Path, timeout: int = 600, **named: Any) -> subprocess.CompletedProcess[str]:
    """Run Python on the CPU with one thread, and return its output. This checkout can be imported."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, **named)


def run_two_processes(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a file with arguments in two processes of one group.

    gloo may abort at exit after all work is done, so the exit status says nothing.
    """
    return run_python(*_LAUNCHER, *arguments)


def with_default_sigint(command: Sequence[str]) -> list[str]:
    """Return a command that starts another one with Ctrl-C as in a terminal.

    A shell starts background processes with SIGINT ignored.
    """
    program = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    return [sys.executable, "-c", program + "os.execv(sys.argv[1], sys.argv[1:])", *command]
