"""Freezing of parameters by name."""

import pytest
from torch import nn

from audiolm_pytorch.training.freezing import frozen_parameters


def test_names_and_whole_parts_of_names_freeze() -> None:
    """`0` is layer 0 and not layer 10; afterwards all parameters are trainable again."""
    module = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(11)), "head": nn.Linear(2, 2)})
    with frozen_parameters(module, ["blocks.0", "head.bias"]):
        frozen = {name for name, weight in module.named_parameters() if not weight.requires_grad}
        assert frozen == {"blocks.0.weight", "blocks.0.bias", "head.bias"}
    assert all(weight.requires_grad for weight in module.parameters())


@pytest.mark.parametrize(
    ("names", "message"),
    [(["haed"], "no trainable parameter has the name 'haed'; use head"), (["head"], "leaves no parameter to train")],
)
def test_names_without_effect_and_all_names_are_refused(names: list[str], message: str) -> None:
    """A misspelt name freezes nothing, and a training needs a parameter."""
    with pytest.raises(ValueError, match=message), frozen_parameters(nn.ModuleDict({"head": nn.Linear(2, 2)}), names):
        raise AssertionError
