"""The files of texts of `musiclm generate`, and the checks of its arguments before a model is loaded."""

import sys
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from musiclm_pytorch.cli.checks import check_apart, check_at_least, check_file, check_needs, check_seconds, option_name

if TYPE_CHECKING:
    from musiclm_pytorch.cli.generate import Generate

__all__ = ["LAST_SECONDS", "STANDARD_OUTPUT", "check_request", "read_prompts", "read_story"]

LAST_SECONDS = 5.0  # that are added to a recording without --seconds
STANDARD_OUTPUT = Path("-")
_AUDIO_FILES, _STREAM_FILES = (".wav", ".flac", ".ogg", ".mp3"), (".wav", ".raw")


def _read_text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the {name} {path}: {error}") from error


def read_prompts(path: Path) -> list[str]:
    """Read the texts of a file, one a line; empty lines and lines with # are skipped."""
    lines = [line.strip() for line in _read_text(path, "prompts").splitlines()]
    texts = [line for line in lines if line and not line.startswith("#")]
    if not texts:
        raise ValueError(f"{path} has no lines; write one text a line")
    return texts


def read_story(path: Path) -> list[tuple[float, str]]:
    """Read the lines of a story, see `story_of_lines`."""
    from musiclm_pytorch.generation.prompts import story_of_lines

    story = story_of_lines(_read_text(path, "story"), str(path))
    if not story:
        raise ValueError(f'{path} has no lines; write lines like "15 a slow waltz", of which the first starts at 0')
    return story


def check_request(command: "Generate") -> None:
    """Check the arguments and that the files can be written, before the model is loaded."""
    for name in ("continue_from", "melody", "story", "prompts"):
        if (path := getattr(command, name)) is not None and (path.is_dir() or not path.exists()):
            reason = "is a folder; name a file" if path.is_dir() else "no such file; check the name"
            raise ValueError(f"{option_name(name)}: {path}: {reason}")
    sources = {"the text": command.text, "--story": command.story, "--prompts": command.prompts}
    if len(given := [name for name, value in sources.items() if value not in (None, "")]) > 1:
        raise ValueError(f"got {' and '.join(given)}; pass only one of them")
    if command.story is not None:
        read_story(command.story)
    elif command.prompts is not None:
        read_prompts(command.prompts)
        if command.out == STANDARD_OUTPUT:
            raise ValueError("--prompts writes several files and cannot be used with --out -; name a file")
    elif not command.text.strip():
        raise ValueError('the text is empty; describe the music, e.g. "a slow waltz on the cello"')
    mixed = [part for _, part in command.mix]
    for text in (command.text, command.negative or "", *(part for part in mixed if not Path(part).is_file())):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"the text {text!r:.60} is not UTF-8; type it in a terminal that uses UTF-8")
    check_at_least(command, num_samples=1, seed=0)
    check_seconds(command.seconds)
    check_needs(command, {"rank_seconds": "stream", "raw": "stream", "continue_seconds": "continue_from"})
    for name in ("rank_seconds", "continue_seconds"):
        if (seconds := getattr(command, name)) is not None and not 0 < seconds < inf:
            raise ValueError(f"{option_name(name)} must be above 0, got {seconds:g}")
    if command.stream and command.plot is not None:
        raise ValueError("--plot needs the whole music and cannot be used with --stream")
    if command.stream and (command.keep_all or command.json):
        option = "--keep-all" if command.keep_all else "--json"
        raise ValueError(f"{option} needs the whole music; leave out {option} or --stream")
    for name, limit in {"temperature": 10.0, "guidance_scale": 100.0}.items():
        if (value := getattr(command, name)) is not None and not 0 <= value <= limit:
            raise ValueError(f"{option_name(name)} must be from 0 to {limit:g}, got {value:g}")
    if not command.stream and command.out == STANDARD_OUTPUT:
        raise ValueError("--out - needs --stream")
    if command.out != STANDARD_OUTPUT:
        check_file(command.out, _STREAM_FILES if command.stream else _AUDIO_FILES)
    elif sys.stdout is None or sys.stdout.isatty():
        raise ValueError("standard output is a terminal or closed; pipe the samples into a player, or name a file")
    inputs = [command.continue_from, command.melody, command.story, command.prompts, *map(Path, mixed)]
    check_apart(command.out, inputs)
    if command.plot is not None:
        from musiclm_pytorch.evaluation.plots import PICTURE_SUFFIXES, require_matplotlib

        check_file(command.plot, PICTURE_SUFFIXES)
        require_matplotlib()
    _check_recordings(command)


def _check_recordings(command: "Generate") -> None:
    """Check that the recordings can be opened, and that the music is longer than the recording that is continued."""
    from audiolm_pytorch.audio.formats import AUDIO_SUFFIXES
    from audiolm_pytorch.audio.stream import open_sound

    mixed = [Path(part) for _, part in command.mix]
    mixed = [path for path in mixed if path.suffix.lower() in AUDIO_SUFFIXES or path.is_file()]
    for path in (command.continue_from, command.melody, *mixed):
        if path is not None:
            with open_sound(path):
                pass
    if command.seconds is not None and (prompt_seconds := command.prompt_seconds) > command.seconds:
        raise ValueError(
            f"{command.continue_from}: {prompt_seconds:.2f} s are continued, longer than --seconds "
            f"{command.seconds:g}, which includes them; write --continue-seconds {command.seconds / 2:g} to continue "
            f"only the end, or --seconds {prompt_seconds + LAST_SECONDS:.0f}"
        )
