"""How kernels become operators of torch, ``torch.ops.lightning_dlrm.*``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

_ALONE = 2**10
"""Indices from which on a second thread is worth waking."""

_operators = torch.library.Library("lightning_dlrm", "FRAGMENT")


def register(
    schema: str,
    implementation: Callable[..., Any],
    results: Callable[..., Any],
    differentiate: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    devices: Sequence[str] = ("CPU",),
) -> None:
    """Make a kernel an operator of torch.

    Args:
        schema: the operator's, with its name.
        implementation: what it does.
        results: makes tensors of its results' shapes and dtypes, for fake tensors.
        differentiate: the backward pass; None if the operator is not differentiable.
        save: sets up the context of the backward pass.
        devices: torch's dispatch keys of the devices that it works on.
    """
    name = schema.partition("(")[0]
    _operators.define(schema)
    for device in devices:
        _operators.impl(name, implementation, device)
    torch.library.register_fake(f"lightning_dlrm::{name}", results, lib=_operators)
    if differentiate is not None:
        torch.library.register_autograd(f"lightning_dlrm::{name}", differentiate, setup_context=save, lib=_operators)


def nothing(*arguments: Any) -> None:
    """The results of an operator that only changes its arguments."""


def threads(count: int) -> int:
    """Return how many threads work on as many indices or elements."""
    return torch.get_num_threads() if count >= _ALONE else 1


def count_change(*tensors: Tensor) -> None:
    """Tell autograd that tensors have changed, so that it refuses those that it has saved."""
    increment_version([tensor for tensor in tensors if not tensor.is_inference()])
