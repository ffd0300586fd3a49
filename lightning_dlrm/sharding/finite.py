"""Search for tensors with NaN or infinite elements."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def is_finite(values: Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    if not values.is_floating_point() or not values.numel():
        return True
    # A sum reads the elements once and needs no memory; a sum of finite elements may overflow.
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def nonfinite_tensors(values: Any, name: str) -> Iterator[str]:
    """Yield the paths of the tensors with NaN or infinite elements in nested mappings and sequences."""
    if isinstance(values, Tensor):
        if not is_finite(values):
            yield name
    elif isinstance(values, (Mapping, list, tuple)):
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from nonfinite_tensors(value, f"{name}.{key}")
