"""Checks of the keyword arguments of trainers, with suggestions for unknown names."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from audiolm_pytorch.checks.types import keep_arguments, unknown_argument
from audiolm_pytorch.saving.construction import preserve_rng

__all__ = ["trainer_arguments"]

Class = TypeVar("Class", bound=type)

# Only trainers with a training loop, whose settings are `LoopSettings`, have validation items.
_SPLIT = "(train, valid)"

# Arguments of trainers in lucidrains/audiolm-pytorch, lucidrains/musiclm-pytorch, audiocraft, transformers and
# lightning, and what replaces them.
_FORMER_NAMES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "use_lion": "optimizer",
    "ema_beta": "ema_decay",
    "save_model_every": "checkpoint_every_steps",
    "save_results_every": "validate_every",
    "log_losses_every": "log_every",
    "random_split_seed": "seed",
    "valid_frac": f"items={_SPLIT}, or valid_fraction of MuLaNTrainer",
    "force_clear_prev_results": "another results_folder",
    "bs": "batch_size",
    "ema": "ema_decay",
    "random_seed": "seed",
    "adam_betas": "betas",
    **dict.fromkeys(("warmup", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("optim", "optimizer_cls"), "optimizer"),
    **dict.fromkeys(("max_steps", "num_steps", "max_iters"), "num_train_steps"),
    **dict.fromkeys(("epochs", "max_epochs", "num_train_epochs"), "num_train_steps (optimizer steps, not epochs)"),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate_grad_batches"), "grad_accum_every"),
    **dict.fromkeys(("max_norm", "clip_grad_norm", "gradient_clip_val"), "max_grad_norm"),
    **dict.fromkeys(("fp16", "bf16", "amp", "mixed_precision"), 'precision="fp16" or precision="bf16"'),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "checkpoint_blocks"),
    "torch_compile": "compile",
    **dict.fromkeys(("output_dir", "save_dir", "log_dir", "out"), "results_folder"),
    **dict.fromkeys(("save_every", "save_steps"), "checkpoint_every_steps"),
    **dict.fromkeys(("eval_every", "eval_steps", "val_every"), "validate_every"),
    **dict.fromkeys(("logging_steps", "log_steps"), "log_every"),
    **dict.fromkeys(("workers", "dataloader_num_workers"), "num_workers"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "scheduler_kwargs", "discr_scheduler"), "schedule"),
    **dict.fromkeys(("dataset", "ds", "dl", "data", "train_dataset", "train_dataloader"), f"folder or items={_SPLIT}"),
    **dict.fromkeys(("valid_dataset", "val_dataset", "val_dataloader"), f"items={_SPLIT}"),
    **dict.fromkeys(("accelerate_kwargs", "use_wandb_tracking"), "accelerator"),
}


def trainer_arguments(settings: type | None = None) -> Callable[[Class], Class]:
    """Return a class decorator: the constructor checks keyword names, and its arguments become attributes."""

    def decorate(cls: Class) -> Class:
        init = cls.__init__  # type: ignore[misc]
        known = [name for name in inspect.signature(init).parameters if name != "self"]
        if settings is not None:
            known[-1:] = [field.name for field in fields(settings)]  # instead of **settings

        @functools.wraps(init)
        def checked_init(self: Any, *args: Any, **keywords: Any) -> None:
            for name in keywords:
                if name not in known:
                    advice = _FORMER_NAMES.get(name, "")
                    is_true = set(known) & set(re.findall(r"\w+", advice)) and (settings or _SPLIT not in advice)
                    raise unknown_argument(self, name, known, advice if is_true else None)
            with preserve_rng():  # modules that the trainer creates
                init(self, *args, **keywords)
            arguments = inspect.signature(init).bind(self, *args, **keywords)
            arguments.apply_defaults()
            keep_arguments(self, {name: arguments.arguments[name] for name in known if name in arguments.arguments})

        cls.__init__ = checked_init  # type: ignore[misc]
        return cls

    return decorate
