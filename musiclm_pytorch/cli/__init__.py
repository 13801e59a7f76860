"""The `musiclm` command-line program, with one file for each subcommand."""

from musiclm_pytorch.cli.app import main

__all__ = ["main"]
