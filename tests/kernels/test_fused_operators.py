"""Contract: the Triton kernels are operators of torch, with fake kernels and autograd, that check their arguments."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", "3.9", reason="needs Triton 3.9, whose interpreter runs with NumPy 2.4")

from lightning_dlrm.kernels import fused, native
from tests.kernels.test_operators import (
    DTYPES,
    KINDS,
    TABLES,
    TOLERANCES,
    check_operator,
    draw,
    draw_lookup,
    draw_update,
    one,
    tensors,
)

OPERATORS = torch.ops.lightning_dlrm


def draw_fused_lookup(kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    weight, ids, offsets, tables, factors = draw_lookup(kind, dtype, contiguous="strided" not in kind)
    return weight, ids, tables, offsets, factors


def draw_fused_update(rule: str, kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    *arguments, _, rule, rate, step, l2, decay, epsilon, beta1, beta2 = draw_update(rule, kind, dtype)
    scalars = torch.tensor([rate, 1 - rate * decay, 1 - beta1**step, 1 - beta2**step], dtype=torch.float32)
    return (*arguments, scalars, rule, l2, epsilon, beta1, beta2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "bags weighted strided"])
def test_the_lookup_keeps_torchs_rules_and_has_the_native_gradients(kind: str, dtype: torch.dtype) -> None:
    arguments = draw_fused_lookup(kind, dtype)
    check_operator(OPERATORS.fused_lookup.default, arguments, dtype)
    weight, ids, tables, offsets, factors = arguments
    inputs = [weight] if factors is None else [weight, factors]
    expected, _, _ = native.lookup(weight, ids, offsets, tables, factors)
    found = fused.lookup(*arguments)
    torch.testing.assert_close(found, expected, **TOLERANCES[dtype])
    seed = draw(*found.shape, dtype=dtype)
    grads = [torch.autograd.grad(output, inputs, seed) for output in (found, expected)]
    torch.testing.assert_close(*grads, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        ("sgd", "one"),
        ("adagrad", "ascending"),
        ("row_wise_adagrad", "bags"),
        ("adam", "bags weighted strided"),
        ("adam", "empty"),
    ],
)
def test_the_update_keeps_torchs_rules_and_is_the_native_one(rule: str, kind: str, dtype: torch.dtype) -> None:
    check_operator(OPERATORS.fused_update.default, draw_fused_update(rule, kind, dtype), dtype)
    found, expected = draw_fused_update(rule, kind, dtype), draw_update(rule, kind, dtype)
    OPERATORS.fused_update(*found)
    OPERATORS.update(*expected)
    torch.testing.assert_close(tensors(found)[:-1], tensors(expected), **TOLERANCES[dtype])


def test_indices_after_the_last_bag_have_no_gradient() -> None:
    weight, factors = draw(9, 4).requires_grad_(), draw(5).requires_grad_()
    vectors = fused.lookup(weight, one(5, 5), TABLES[:1], torch.tensor([0, 2, 3]), factors)
    of_weight, of_factors = torch.autograd.grad(vectors.sum(), [weight, factors])
    assert of_weight[:3].all() and not of_weight[3:].any() and of_factors[:3].all() and not of_factors[3:].any()


def move(weight: Tensor, rows: Tensor, state: dict[str, Tensor], factors: Tensor | None = None) -> None:
    fused.update(weight, rows, draw(3, 4), None, factors, state, "adagrad", {}, draw(4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fused.lookup(draw(9, 4).double(), one(3, 3), TABLES, None, None),
            TypeError,
            "weight is torch.float64",
        ),
        (lambda: fused.lookup(draw(9, 4), one(3, 3).float(), TABLES, None, None), TypeError, "ids is torch.float32"),
        (lambda: fused.lookup(draw(9, 4), one(3, 3), TABLES, one(3, 3), None), TypeError, "offsets is torch.int32"),
        (lambda: fused.lookup(draw(9, 4), one(3, 3), TABLES, None, draw(2)), ValueError, "factor for each"),
        (lambda: move(draw(9, 4, contiguous=False), one(3, 3), {"s": draw(9, 4)}), TypeError, "contiguous"),
        (lambda: move(draw(9, 4), one(3, 3), {"s": draw(8, 4)}), ValueError, "do not fit"),
        (lambda: move(draw(9, 4), one(3, 3), {}), ValueError, "0 tensors of state"),
        (lambda: move(draw(9, 4), one(3, 3), {"s": draw(9, 4)}, draw(2)), ValueError, "do not fit"),
    ],
)
def test_wrong_arguments_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
