"""Registration of kernels as operators of torch, ``torch.ops.lightning_dlrm.*``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

_SINGLE_THREAD = 2**10
"""Number of indices or elements below which one thread works alone."""

_STATES = {"sgd": 0, "adagrad": 1, "row_wise_adagrad": 1, "adam": 2}
"""Update rule -> number of tensors of optimizer state."""

_operators = torch.library.Library("lightning_dlrm", "FRAGMENT")


def register(
    schema: str,
    implementation: Callable[..., Any],
    results: Callable[..., Any],
    differentiate: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    devices: Sequence[str] = ("CPU",),
) -> None:
    """Register a kernel as an operator of torch.

    Args:
        schema: name and signature of the operator.
        implementation: computes the results.
        results: returns empty tensors of the results' shapes and dtypes, for fake tensors.
        differentiate: the backward pass; None if the operator is not differentiable.
        save: saves what the backward pass needs.
        devices: dispatch keys of the devices that the kernel supports.
    """
    name = schema.partition("(")[0]
    _operators.define(schema)
    for device in devices:
        _operators.impl(name, implementation, device)
    torch.library.register_fake(f"lightning_dlrm::{name}", results, lib=_operators)
    if differentiate is not None:
        torch.library.register_autograd(f"lightning_dlrm::{name}", differentiate, setup_context=save, lib=_operators)


def nothing(*arguments: Any) -> None:
    """Return None: the result of an operator that only changes its arguments."""


def threads(count: int) -> int:
    """Return the number of threads for a number of indices or elements."""
    return torch.get_num_threads() if count >= _SINGLE_THREAD else 1


def count_change(*tensors: Tensor) -> None:
    """Tell autograd that tensors were changed in place, so that a backward pass that saved them fails."""
    increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def check_update(
    weight_RD: Tensor,
    state: list[Tensor],
    rows_N: Tensor,
    grad_BD: Tensor,
    bags_N: Tensor | None,
    factors_N: Tensor | None,
    rule: str,
) -> None:
    """Check that the shapes of an update's tensors fit each other.

    Raises:
        ValueError: they do not fit.
    """
    if _STATES.get(rule) != len(state):
        raise ValueError(
            f"update by {rule!r} with {len(state)} tensors of state; expected a rule and its number in {_STATES}"
        )
    shape = weight_RD.shape[: 1 if rule == "row_wise_adagrad" else 2]
    shapes = [tuple(x.shape) for x in (weight_RD, *state, rows_N, grad_BD)]
    per_index = [rows_N, *(x for x in (bags_N, factors_N) if x is not None)]
    if (
        weight_RD.dim() != 2
        or any(x.shape != shape for x in state)
        or any(x.shape != (len(rows_N),) for x in per_index)
        or grad_BD.shape != (len(grad_BD) if bags_N is not None else len(rows_N), weight_RD.shape[1])
    ):
        raise ValueError(
            f"update by {rule}: weight, state, rows and gradient have shapes {shapes}, which do not fit each other"
        )
