"""The optimizer step of one phase: backward, averaging over processes, clipping, AdamW, a guard against NaN."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from audiolm_pytorch.training.distributed import PersistentBuffers, average_gradients, broadcast_tensors
from audiolm_pytorch.training.task import LoopSettings, LossOutput, Phase

if TYPE_CHECKING:
    import accelerate

__all__ = ["PhaseOptimizer"]


class PhaseOptimizer:
    """AdamW (arXiv:1711.05101) over the parameters of one phase, and its step.

    Args:
        phase: Its parameters are on their device already.
        names: Name of every trainable parameter in the task's module.
        buffers: Buffers of the task's module.

    Raises:
        ValueError: If the phase trains nothing, or parameters that are not in the task's module.
    """

    def __init__(
        self,
        phase: Phase,
        names: Mapping[nn.Parameter, str],
        buffers: PersistentBuffers,
        settings: LoopSettings,
        accelerator: "accelerate.Accelerator",
    ) -> None:
        self.phase = phase
        self._settings, self._accelerator, self._buffers = settings, accelerator, buffers
        parameters = {parameter: None for module in phase.modules for parameter in module.parameters()}
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        num_outside = sum(parameter not in names for parameter in self._parameters)
        if num_outside or not self._parameters:
            raise ValueError(
                f"phase {phase.name!r} has {len(self._parameters)} trainable parameters, {num_outside} of them outside "
                "the task's module; it needs at least one, and all inside, since only that module is checkpointed"
            )
        self._names = [names[parameter] for parameter in self._parameters]
        self.optimizer = torch.optim.AdamW(
            self._groups(),
            lr=settings.learning_rate,
            betas=settings.betas,
            # one elementwise kernel for all tensors, hence deterministic; on other devices torch chooses
            fused=True if accelerator.device.type in ("cpu", "cuda") else None,
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Weight decay on matrices and filters only, not on gains and biases."""
        matrices = [parameter for parameter in self._parameters if parameter.ndim >= 2]
        vectors = [parameter for parameter in self._parameters if parameter.ndim < 2]
        groups = [(matrices, self._settings.weight_decay), (vectors, 0.0)]
        return [{"params": members, "weight_decay": decay} for members, decay in groups if members]

    def step(self, batches: Sequence[Any], step: int, learning_rate: float) -> list[dict[str, Tensor | float]] | None:
        """Train the phase's parameters for one step.

        Args:
            batches: Their gradients are averaged with equal weights.
            step: Number of steps done before this one.

        Returns:
            The metrics of each batch. None if the loss or the gradients were not finite; then parameters and buffers
            are as before the step.
        """
        before = self._buffers.copy()
        metrics: list[dict[str, Tensor | float]] = []
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            output = self._loss(batch, step)
            # gradients of other phases' parameters are not computed
            self._accelerator.backward(output.loss / len(batches), inputs=self._parameters)
            metrics.append(_scalars({"loss": output.loss, **output.metrics}))
        losses = torch.stack([torch.as_tensor(values["loss"]).float() for values in metrics])
        loss = average_gradients(self._accelerator, self._parameters, losses.sum())
        used = [parameter for parameter in self._parameters if parameter.grad is not None]
        grad_norm = nn.utils.clip_grad_norm_(used, self._settings.max_grad_norm).to(loss.device)
        # the only wait for the device in a step
        if not bool(torch.isfinite(torch.stack([loss.float(), grad_norm.float()])).all()):
            self.optimizer.zero_grad(set_to_none=True)
            self._buffers.restore(before)
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        broadcast_tensors(self._accelerator, self._buffers.tensors())
        metrics[-1]["grad_norm"] = grad_norm.detach()
        return metrics

    def _loss(self, batch: Any, step: int) -> LossOutput:
        """Loss in the precision of the run."""
        enabled = self._settings.precision == "bf16"
        with torch.autocast(self._accelerator.device.type, dtype=torch.bfloat16, enabled=enabled):
            return self.phase.loss(batch, step)

    def state(self) -> dict[str, Tensor]:
        """Tensors of the optimizer as `parameter name/state name`."""
        return {
            f"{name}/{state_name}": value.detach()
            for name, parameter in zip(self._names, self._parameters, strict=True)
            for state_name, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state`; those of other phases are ignored."""
        state: dict[nn.Parameter, dict[str, Tensor]] = {}
        parameters = dict(zip(self._names, self._parameters, strict=True))
        for key, value in tensors.items():
            name, _, state_name = key.rpartition("/")
            if name in parameters:
                parameter = parameters[name]
                if value.shape == parameter.shape:
                    # files hold contiguous tensors, the fused step needs the memory order of the parameter
                    value = torch.empty_like(parameter, dtype=value.dtype).detach().copy_(value)
                state.setdefault(parameter, {})[state_name] = value
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # load_state_dict moves tensors to the device, apart from those that stay on the CPU
        self.optimizer.load_state_dict(
            {
                "state": {index: state[parameter] for index, parameter in enumerate(ordered) if parameter in state},
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )


def _scalars(metrics: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
    """Metrics as scalars without their graphs; `[1]` counts as a scalar."""
    scalars: dict[str, Tensor | float] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}; a metric is one number, e.g. a mean")
        scalars[name] = value.detach().reshape(()) if isinstance(value, Tensor) else float(value)
    return scalars
