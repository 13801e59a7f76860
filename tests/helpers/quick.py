"""Selection of the parameters of a test that belong to the default run."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def only_quick(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return the values as parameters of a test; those that are not `quick` are marked as slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
