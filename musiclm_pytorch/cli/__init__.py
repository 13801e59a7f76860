"""The `musiclm` command; one file per command."""

from musiclm_pytorch.cli.app import main

__all__ = ["main"]
