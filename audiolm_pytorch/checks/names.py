"""Errors for unknown keyword arguments, with the names here of arguments of other libraries."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = ["unknown_arguments"]

_SPLIT = "(train, valid)"

# Arguments in lucidrains/audiolm-pytorch, lucidrains/musiclm-pytorch, audiocraft, transformers and lightning, and what
# replaces them. Remarks are in parentheses. The advice is given for classes and functions that have such an argument.
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
    "prime_wave_path": "prime_wave",
    "return_coarse_generated_wave": "coarse_only",
    "descriptions": "texts",
    **dict.fromkeys(("max_length", "duration"), "seconds"),
    **dict.fromkeys(("cfg_coef", "cond_scale"), "guidance_scale"),
    **dict.fromkeys(
        ("flash_attn", "rel_pos_bias"),
        'positions="rotary" or positions="relative" (attention is always that of torch)',
    ),
    "has_condition": 'text_dim, with text_as="cross" or text_as="prefix"',
    "cond_as_self_attn_prefix": 'text_as="prefix"',
}
# Arguments that no argument replaces, and what to do instead.
_REMOVED = {
    "unique_consecutive": "leave it out: tokens keep their repetitions, and deduplicate(ids=) merges them",
    "input_sample_hz": "convert the wave with resample(wave=, from_hz=, to_hz=) first",
}


def unknown_arguments(callee: str, names: Iterable[str], known: Iterable[str]) -> TypeError:
    """Return the error for arguments that a class or function does not have, with advice for each of them.

    Args:
        callee: Name of the class or function in the message.
        names: The unknown arguments.
        known: The arguments of the class or function.
    """
    arguments = list(dict.fromkeys(known))
    by_advice: dict[str, list[str]] = {}
    for name in names:
        by_advice.setdefault(_advice(name, arguments), []).append(repr(name))
    sentences = [f"{callee} has no argument {', '.join(group)}; {advice}" for advice, group in by_advice.items()]
    return TypeError(". ".join(sentences))


def _advice(name: str, known: Sequence[str]) -> str:
    """Return what to use instead of an unknown argument: its name here, similar names, or else all names."""
    former = _FORMER_NAMES.get(name, "")
    words = re.findall(r"\w+", re.sub(r"\(.*?\)", "", former))
    # Only trainers that validate accept a pair of training and validation items.
    if set(words) & set(known) and (_SPLIT not in former or "validate_every" in known):
        return f"use {former}"
    similar = get_close_matches(name, known)
    if not similar and name in _REMOVED:
        return _REMOVED[name]
    return f"use {', '.join(similar or known) or 'none'}"
