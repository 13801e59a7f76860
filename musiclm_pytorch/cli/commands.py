"""The table of `musiclm` commands, their help, and one-line explanations of command lines that are wrong."""

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_type_hints

import tyro

from musiclm_pytorch.cli.checks import option_name
from musiclm_pytorch.cli.settings import PresetOptions, split_settings

__all__ = ["COMMANDS", "command_class", "help_text", "parse_options", "split_command"]

# Words of a command -> module of this package, class in the module, and a line of the help.
COMMANDS = {
    "generate": ("generate", "Generate", "music from a text, to a file or while it is played"),
    "web": ("web", "Web", "a web page and an HTTP API"),
    "play": ("play", "Play", "play an audio file"),
    "train": ("train", "Train", "train all models on a folder of audio, or one of them"),
    "train musicgen": ("musicgen", "TrainMusicGen", "train or fine-tune a MusicGen"),
    "train kmeans": ("kmeans", "TrainKmeans", "train a semantic tokenizer on a layer of any encoder"),
    "tokenize": ("tokenize", "Tokenize", "compute the tokens of a data set once, with many processes"),
    "plot": ("plot", "Plot", "draw loss curves of runs"),
    "export": ("export", "Export", "write the model of a run for inference"),
    "evaluate music": ("evaluate", "EvaluateMusic", "measure generated music"),
    "evaluate semantic": ("evaluate", "EvaluateSemantic", "measure a semantic tokenizer or encoder"),
    "evaluate mulan": ("evaluate", "EvaluateMuLaN", "measure a MuLaN or CLAP"),
    "codec encode": ("codec", "Encode", "encode sounds to files of codes"),
    "codec decode": ("codec", "Decode", "decode files of codes to sounds"),
    "codec evaluate": ("codec", "Evaluate", "measure a codec on sounds"),
    "convert hubert": ("convert", "Hubert", "a published HuBERT and its k-means to safetensors"),
    "convert vq-wav2vec": ("convert", "VqWav2vec", "a published vq-wav2vec to safetensors"),
    "convert musiccaps": ("convert", "MusicCaps", "MusicCaps to a training manifest"),
    "info": ("info", "Info", "versions, devices, bundled models and their words; or of a FILE"),
    "doctor": ("doctor", "Doctor", "check the results of this device"),
    "completion": ("completion", "Completion", "complete commands in bash or zsh"),
}
# First words that need a second word, with their line of the help.
_GROUPS = {
    "evaluate": "measure generated music and models",
    "codec": "encode, decode and evaluate sounds with a codec",
    "convert": "convert published checkpoints, and MusicCaps",
}
# Names of options in other programs -> the option here.
_OTHER_NAMES = {
    **dict.fromkeys(("output", "output_path", "outfile", "file", "o"), "out"),
    **dict.fromkeys(("duration", "length", "time", "s", "d"), "seconds"),
    **dict.fromkeys(("n", "count", "candidates", "num_candidates"), "num_samples"),
    **dict.fromkeys(("cfg", "cfg_coef", "guidance"), "guidance_scale"),
    **dict.fromkeys(("folder", "dataset", "input"), "data"),
    **dict.fromkeys(("checkpoint", "ckpt", "m"), "model"),
    **dict.fromkeys(("negative_prompt", "negative_text"), "negative"),
    **dict.fromkeys(("prompt", "text"), "TEXT"),
}
_NUMBERS = ("inf", "infinity", "nan")
_INDENT_OF_DESCRIPTIONS = 9  # in messages of tyro
# Patterns of messages of tyro -> what is printed.
_REWRITTEN = {
    r"Error parsing --mix: .*: \[(.*)\]\W*": (
        r'--mix: write the weight first, then the text or file, e.g. --mix 0.5 "a slow cello" 0.2 drums.wav; got \1'
    ),
    r"Error parsing (\S+): no type matching (?:\{None\}\|)?FLOAT could .* from \[(.*)\]\W*": (
        r"\1 must be a number such as 2.5, got \2"
    ),
    r"Error parsing (\S+): no type matching (?:\{None\}\|)?INT could .* from \[(.*)\]\W*": (
        r"\1 must be a whole number, got \2"
    ),
    r"Error parsing (\S+): no type matching (?:\{None\}\|)?(.*) could .* from \[(.*)\]\W*": r"\1 must be \2, got \3",
    r"Error parsing (\S+):": r"\1:",
    r"Missing from [^:]*:": "missing:",
    r"Unrecognized options:(.*)": r"not expected:\1; write a text of several words in quotation marks",
}
_ABOUT = "Generate music from text, and train, convert and evaluate the models for it."


def help_text(group: str = "") -> str:
    """Return the help of the program, or of the commands with this first word."""
    rows = {name: line for name, (_, _, line) in COMMANDS.items() if name.partition(" ")[0] == group}
    if not group:
        for name, (_, _, line) in COMMANDS.items():
            first = name.partition(" ")[0]
            rows.setdefault(first, _GROUPS.get(first, line))
    width = max(map(len, rows)) + 2
    lines = [f"usage: musiclm {group or 'COMMAND'} ...".replace(" ...", " COMMAND ..." if group else " ...")]
    lines += ["", _GROUPS[group].capitalize() + "." if group else _ABOUT, ""]
    lines += [f"  {name:{width}}{line}" for name, line in rows.items()]
    more = f"musiclm {group} COMMAND --help" if group else "musiclm COMMAND --help"
    return "\n".join([*lines, "", f"Options of a command: {more}", *([] if group else ["Version: musiclm --version"])])


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command at the beginning of a command line, and the words after it.

    The command is "" if the words ask for the help of the program or of a group of commands, which is returned.
    """
    for count in (2, 1):
        if (name := " ".join(words[:count])) in COMMANDS:
            return name, list(words[count:])
    group = words[0] if words and words[0] in _GROUPS else ""
    rest = words[1:] if group else words
    if rest and rest[0] in ("-h", "--help", "help"):
        return "", [group]
    names = dict.fromkeys(name.removeprefix(group).split()[0] for name in COMMANDS if name.startswith(group))
    known = f"the commands are {', '.join(names)}"
    if not rest:
        raise ValueError(f"a command is missing after musiclm {group}".rstrip() + f"; {known}; see musiclm --help")
    similar = " or ".join(get_close_matches(rest[0], names, n=2))
    advice = f"did you mean {similar}? See musiclm --help" if similar else known
    if " " in rest[0]:
        advice = f'did you mean musiclm generate "{rest[0]:.80}"?'
    raise ValueError(f"there is no command musiclm {' '.join([*([group] if group else []), rest[0]])!s:.80}; {advice}")


def command_class(name: str) -> Any:
    """Import the class of a command; the modules of the other commands are not imported."""
    module, class_name, _ = COMMANDS[name]
    return getattr(import_module(f"musiclm_pytorch.cli.{module}"), class_name)


def parse_options(name: str, words: Sequence[str]) -> Any:
    """Return the command with the options in `words`; a ValueError explains words that are wrong in one line.

    A SystemExit is raised after the help of the command is printed.
    """
    class_, prog = command_class(name), f"musiclm {name}"
    changes: dict[str, Any] = {}
    if issubclass(class_, PresetOptions):
        words, changes["settings"] = split_settings(class_, words)
    else:
        _check_options(class_, words, prog)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return replace(tyro.cli(class_, args=words, prog=prog, config=(tyro.conf.FlagCreatePairsOff,)), **changes)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_in_one_line(printed.getvalue())}; see {prog} --help") from None


def _check_options(class_: Any, words: Sequence[str], prog: str) -> None:
    """Raise a ValueError that names the similar options for a word that is an option of no command or another one."""
    hints = get_type_hints(class_, include_extras=True)
    names = {field.name: field.name for field in fields(class_)}
    positional = {name for name in names if tyro.conf.Positional in getattr(hints[name], "__metadata__", ())}
    options = [name for name in names if name not in positional]
    for word in words:
        option, dashes = word.partition("=")[0].lstrip("-").replace("-", "_"), len(word) - len(word.lstrip("-"))
        if not dashes or option in ("", "h", "help", *options) or not option[0].isalpha() or option in _NUMBERS:
            continue
        other = _OTHER_NAMES.get(option)
        if other is not None and other.lower() in positional:
            raise ValueError(f"{prog} has no option {word}; write the {other.lower()} without an option")
        similar = [other] if other in options else get_close_matches(option, options, n=2)
        advice = " or ".join(map(option_name, similar))
        advice = f"use {advice}" if similar else "leave it out"
        raise ValueError(f"{prog} has no option {word!s:.80}; {advice}; see {prog} --help")


def _in_one_line(message: str) -> str:
    """Return a message of tyro without its frame and the descriptions of options."""
    sections: list[list[str]] = [[]]
    for line in message.splitlines():
        text = line.strip("│╭╮╰╯").rstrip()
        if "──" in text:
            sections.append([])
        elif len(text) - len(text.lstrip()) < _INDENT_OF_DESCRIPTIONS:
            sections[-1].append(text.strip())
    texts = [" ".join(section) for section in sections if section]
    texts = [text for text in texts if not text.startswith(("For full helptext", "Argument helptext"))]
    explanation = "; ".join(text.partition(" Got errors:")[0].rstrip(".") for text in texts)
    for pattern, replacement in _REWRITTEN.items():
        explanation = re.sub(pattern, replacement, explanation)
    return explanation
