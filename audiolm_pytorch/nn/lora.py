"""Low-rank updates of frozen linear layers (LoRA, arXiv:2106.09685) by peft, which can be saved, loaded and merged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.saving.text import one_line

__all__ = ["ADAPTER_FILE", "LoRA", "load_lora", "require_peft"]

ADAPTER_FILE = "adapter_model.safetensors"


class LoRA:
    """Trainable low-rank updates of all linear layers of a module, whose weights are frozen until `merge`.

    Args:
        module: Module that is changed in place. It can be called and can generate before `merge`.
        rank: Rank of the updates.
        scale: Factor of the updates.
        frozen: Further modules whose weights are frozen until `merge`.
    """

    @typed
    def __init__(self, module: nn.Module, rank: int, scale: float = 1.0, frozen: Sequence[nn.Module] = ()) -> None:
        if rank < 1 or scale <= 0:
            raise ValueError(f"lora_rank must be at least 1, and lora_scale above 0, got {rank} and {scale}")
        peft = require_peft()
        weights = [weight for part in (module, *frozen) for weight in part.parameters()]
        self._trainable = [weight for weight in weights if weight.requires_grad]
        names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        for weight in self._trainable:
            weight.requires_grad_(False)
        settings = peft.LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=names)
        self._adapted = peft.get_peft_model(module, settings)
        self.is_merged = False

    @typed
    def save(self, folder: str | Path) -> None:
        """Write the updates in the format of peft, which `load_lora` and `peft.PeftModel.from_pretrained` read."""
        self._adapted.save_pretrained(folder, save_embedding_layers=False)

    def merge(self) -> None:
        """Add the updates to the weights, and make those weights trainable again that were before; once only."""
        if not self.is_merged:
            self._adapted.merge_and_unload()
            self._set_trainable()

    def remove(self) -> None:
        """Remove the updates, which leaves the module as it was."""
        self._adapted.unload()
        self._set_trainable()

    def _set_trainable(self) -> None:
        self.is_merged = True
        for weight in self._trainable:
            weight.requires_grad_(True)


@typed
def load_lora(module: nn.Module, folder: str | Path) -> None:
    """Add the updates that `LoRA.save` or peft has written to a folder to the weights of a module."""
    if not Path(folder, ADAPTER_FILE).is_file():
        raise ValueError(f"{folder} contains no LoRA updates; pass a folder with {ADAPTER_FILE}")
    peft, kind = require_peft(), type(module).__name__
    expected = (peft.PeftConfig.from_pretrained(str(folder)).auto_mapping or {}).get("base_model_class", kind)
    if kind != expected:
        raise ValueError(f"{folder} contains LoRA updates of a {expected}; pass those of a {kind}")
    trainable = [(weight, weight.requires_grad) for weight in module.parameters()]
    try:
        peft.PeftModel.from_pretrained(module, str(folder)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder} contains LoRA updates of another model ({one_line(error)})") from error
    for weight, is_trainable in trainable:
        weight.requires_grad_(is_trainable)


def require_peft() -> Any:
    """Return the module peft, or raise an ImportError that tells how to install it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "musiclm[lora]"') from error
    return peft
