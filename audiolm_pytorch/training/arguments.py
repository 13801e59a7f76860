"""Checks of the keyword arguments of trainers, with suggestions for unknown names."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

import numpy as np

__all__ = ["trainer_arguments"]

Class = TypeVar("Class", bound=type)

# Arguments of the trainers in lucidrains/audiolm-pytorch and lucidrains/musiclm-pytorch, and what replaces them.
_FORMER_NAMES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "use_lion": "optimizer",
    "ema_beta": "ema_decay",
    "save_model_every": "checkpoint_every_steps",
    "save_results_every": "validate_every",
    "log_losses_every": "log_every",
    "random_split_seed": "seed",
    "valid_frac": "items=(train, valid), or valid_fraction of MuLaNTrainer",
    "force_clear_prev_results": "another results_folder",
    **dict.fromkeys(("scheduler", "scheduler_kwargs", "discr_scheduler"), "schedule"),
    **dict.fromkeys(("dataset", "train_dataloader"), "folder or items=(train, valid)"),
    **dict.fromkeys(("valid_dataset", "val_dataset", "val_dataloader"), "items=(train, valid)"),
    **dict.fromkeys(("accelerate_kwargs", "use_wandb_tracking"), "accelerator"),
}


def trainer_arguments(settings: type | None = None) -> Callable[[Class], Class]:
    """Return a class decorator that checks keyword names in the constructor, and converts numpy numbers and lists."""

    def decorate(cls: Class) -> Class:
        init = cls.__init__  # type: ignore[misc]
        known = [name for name in inspect.signature(init).parameters if name != "self"]
        if settings is not None:
            known[-1:] = [field.name for field in fields(settings)]  # instead of **settings

        @functools.wraps(init)
        def checked_init(self: Any, *args: Any, **keywords: Any) -> None:
            for name in keywords:
                if name not in known:
                    suggestion = _FORMER_NAMES.get(name) or ", ".join(get_close_matches(name, known) or known)
                    raise TypeError(f"{type(self).__name__} has no argument {name!r}; use {suggestion}")
            init(self, *map(_plain, args), **{name: _plain(value) for name, value in keywords.items()})

        cls.__init__ = checked_init  # type: ignore[misc]
        return cls

    return decorate


def _plain(value: Any) -> Any:
    """Convert numpy numbers to Python numbers, and lists to tuples."""
    if isinstance(value, list | tuple):
        return tuple(_plain(item) if isinstance(item, np.generic) else item for item in value)
    return value.item() if isinstance(value, np.generic) else value
