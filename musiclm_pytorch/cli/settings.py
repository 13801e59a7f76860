"""Options of trainings with a preset: the preset, a file of settings, and every setting as an option."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from musiclm_pytorch.cli.checks import ModelOptions, option_name

__all__ = ["PresetOptions", "print_settings", "split_settings"]


@dataclass(frozen=True, kw_only=True)
class PresetOptions(ModelOptions):
    """Options of trainings with a preset, any setting of which is an option too, see `split_settings`."""

    data: Path | None = None
    """Folder of audio files, or a folder or file with a JSONL manifest (audio, caption, labels)."""
    out: Path | None = None
    """Folder of the run: checkpoints, metrics, and at the end the trained model."""
    preset: str | None = None
    """Sizes and training settings, see above; by default tiny."""
    config: Path | None = None
    """YAML file with settings that differ from those of the preset."""
    print_config: bool = False
    """Print all settings as YAML, which --config accepts with the same --preset, and end. --data and --out are not
    needed."""
    scale: float = 1.0
    """Factor for all step counts of the preset."""
    track: tuple[str, ...] = ()
    """Also log metrics with these trackers of accelerate: tensorboard (in OUT/trackers, with audio), wandb, trackio,
    mlflow and others. metrics.jsonl is always written."""
    timeout_seconds: float | None = None
    """How long the processes of a training wait for each other before they end with an error; by default 1800."""
    num_workers: int = 0
    """Worker processes of each training process, which load batches ahead of the training. They do not change the
    result, and their number may differ when a run is continued."""
    settings: Annotated[dict[str, str], tyro.conf.Suppress, tyro.conf.Fixed] = field(default_factory=dict)

    @staticmethod
    def presets() -> dict[str, Any]:
        """Return the presets by name."""
        raise NotImplementedError

    def resolved(self, preset: Any) -> Any:
        """Return a preset with the values of `scale`, of the file `config` and of the options, in this order."""
        from musiclm_pytorch.pipeline.settings import read_settings, with_settings

        file = {} if self.config is None else read_settings(self.config)
        return with_settings(preset.scaled(self.scale), {**file, **self.settings})

    def folders(self) -> tuple[Path, Path]:
        """Return --data and --out, or raise a ValueError if one is missing."""
        if self.data is None or self.out is None:
            missing = "--data" if self.data is None else "--out"
            raise ValueError(f"{missing} is missing; add it, or print the settings with --print-config")
        return self.data, self.out


def print_settings(preset: Any) -> None:
    """Print all settings of a preset as YAML."""
    import yaml

    print(yaml.safe_dump(asdict(preset), sort_keys=False), end="")


def split_settings(command: type[PresetOptions], words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate the words of a command from those that are settings of its preset, and return both.

    `--semantic.run.learning-rate 1e-4` is the setting "semantic.run.learning_rate" with the value "1e-4".
    """
    options = [field.name for field in fields(command) if field.name != "settings"]
    own = {"help", "from", *options, *(f"no_{name}" for name in options)}
    kept, settings, left = [], {}, iter(words)
    for word in left:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name in own:
            kept.append(word)
            continue
        from musiclm_pytorch.pipeline.settings import check_setting, setting_paths

        paths = {path for preset in command.presets().values() for path in setting_paths(preset)}
        check_setting(name, [*sorted(paths), *options], option_name)
        settings[name] = value if equals else next(left, "--")
        if settings[name].startswith("--"):
            raise ValueError(f"{word} needs a value; write it after the option")
    return kept, settings
