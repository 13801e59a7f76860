"""`musiclm completion SHELL`: completion of commands and options in a shell."""

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

import tyro

from musiclm_pytorch.cli.commands import COMMANDS, command_class

__all__ = ["Completion"]


@dataclass(frozen=True)
class Completion:
    """Print a script that completes commands and options.

    bash: `musiclm completion bash > ~/.local/share/bash-completion/completions/musiclm`; zsh: write it into a file
    `_musiclm` of a folder in `$fpath`.
    """

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")]
    """bash or zsh."""

    def execute(self) -> int:
        """Print the script."""
        groups: dict[str, list[Any]] = {}
        for name in COMMANDS:
            first, _, second = name.partition(" ")
            command = tyro.conf.subcommand(second or first)
            groups.setdefault(first, []).append(Annotated[command_class(name), command])
        # A word after `train` is a step of its own command, so the other trainings are not completed.
        commands = [
            classes[0] if name in COMMANDS else Annotated[reduce(or_, classes), tyro.conf.subcommand(name)]
            for name, classes in groups.items()
        ]
        every: Any = reduce(or_, commands)
        try:
            tyro.cli(every, prog="musiclm", args=["--tyro-print-completion", self.shell])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0
