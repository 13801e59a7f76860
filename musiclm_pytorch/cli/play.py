"""`musiclm play FILE`: play an audio file with a program of this machine."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from audiolm_pytorch.saving.text import joined_lines

__all__ = ["Play"]

# Program -> its options, and the suffixes that it plays (None = all).
_PLAYERS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "ffplay": (("-nodisp", "-autoexit", "-loglevel", "error"), None),
    "mpv": (("--no-video", "--really-quiet"), None),
    "pw-play": ((), (".wav", ".flac", ".ogg", ".mp3")),
    "paplay": ((), (".wav", ".flac", ".ogg")),
    "aplay": (("-q",), (".wav",)),
    "afplay": ((), (".wav", ".flac", ".mp3", ".aiff")),
    "play": (("-q",), None),  # SoX
}


@dataclass(frozen=True)
class Play:
    """Play an audio file with the first of these programs that is installed.

    They are ffplay, mpv, pw-play, paplay, aplay (.wav), afplay (macOS) and play (SoX). Without them, Windows opens the
    file with its default program.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Audio file."""

    def execute(self) -> int:
        """Play the file to its end."""
        from audiolm_pytorch.audio.stream import open_sound

        with open_sound(self.file):
            pass
        suffix = self.file.suffix.lower()
        usable = [name for name, (_, suffixes) in _PLAYERS.items() if suffixes is None or suffix in suffixes]
        player = next(filter(shutil.which, usable), None)
        start_file = getattr(os, "startfile", None)  # of Windows
        if player is None and start_file is not None:
            start_file(self.file.absolute())
            return 0
        if player is None:
            raise ValueError(f"none of {', '.join(usable)} is installed; install one, e.g. ffmpeg, or open {self.file}")
        # An absolute path cannot begin with a dash.
        words = [player, *_PLAYERS[player][0], str(self.file.absolute())]
        ended = subprocess.run(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        if ended.returncode:
            reason = joined_lines(ended.stderr)[-200:] or f"exit status {ended.returncode}"
            raise ValueError(f"{player} cannot play {self.file}: {reason}; check the sound device of this machine")
        return 0
