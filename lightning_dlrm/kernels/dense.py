"""Dot products of pairs of vectors, and ReLUs, on a CPU, with ``native.c``.

Sums are taken in float32; results do not depend on the number of threads.

Shape suffixes: B samples, V vectors, D their width, P pairs of them, d features, n any other.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_dlrm.kernels.compiled import call
from lightning_dlrm.kernels.operators import count_change, nothing, register, threads

_ROWS_PER_SUM = 64
"""ROWS_PER_SUM of ``native.c``."""


def pair_products(first_BD: Tensor, others_BVD: Tensor, self_interaction: bool) -> Tensor:
    """Return each sample's first vector, then the dot products of its pairs of vectors (i, j), j < i, row by row.

    Differentiable any number of times.

    Args:
        first_BD: float32 or bfloat16; the result has its dtype.
        others_BVD: the V - 1 other vectors, either dtype.
        self_interaction: also take the pairs (i, i).

    Returns:
        [B, D + P].
    """
    return torch.ops.lightning_dlrm.pair_products(first_BD, others_BVD, self_interaction)


def relu_bf16(values: Tensor) -> None:
    """Apply the ReLU to a contiguous bfloat16 tensor, in place. NaN stays."""
    torch.ops.lightning_dlrm.relu_bf16(values)


def relu_gradients(grad_Bd: Tensor, activation_Bd: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Compute the backward pass of a ReLU and of the bias before it.

    Args:
        grad_Bd: gradient of the ReLU's result, float32 or bfloat16, contiguous; overwritten by that of its input.
        activation_Bd: the ReLU's result, of the same dtype.
        transposed: whether to return the gradient of its input transposed, too.

    Returns:
        [d, B], or [0] without ``transposed``; float32 [d], the gradient of the bias.
    """
    return torch.ops.lightning_dlrm.relu_gradients(grad_Bd, activation_Bd, transposed)


def _pair_products(first_BD: Tensor, others_BVD: Tensor, self_interaction: bool) -> Tensor:
    out_Bn = _pair_results(first_BD, others_BVD, self_interaction)
    _call_pairs(first_BD, others_BVD, self_interaction, out_Bn, None, None)
    return out_Bn


def _pair_gradients(
    first_BD: Tensor, others_BVD: Tensor, grad_Bn: Tensor, self_interaction: bool
) -> tuple[Tensor, Tensor]:
    grads = _pair_gradient_results(first_BD, others_BVD, grad_Bn, self_interaction)
    _call_pairs(first_BD, others_BVD, self_interaction, grad_Bn.to(first_BD.dtype).contiguous(), *grads)
    return grads


def _pair_results(first_BD: Tensor, others_BVD: Tensor, self_interaction: bool) -> Tensor:
    """Return a tensor for ``pair_products``' result, not yet filled."""
    vectors = others_BVD.shape[1] + 1
    pairs = vectors * (vectors + 1 if self_interaction else vectors - 1) // 2
    return first_BD.new_empty(others_BVD.shape[0], others_BVD.shape[2] + pairs)


def _pair_gradient_results(
    first_BD: Tensor, others_BVD: Tensor, grad_Bn: Tensor, self_interaction: bool
) -> tuple[Tensor, Tensor]:
    """Return tensors for ``pair_gradients``' results, not yet filled; always contiguous."""
    return first_BD.new_empty(first_BD.shape), others_BVD.new_empty(others_BVD.shape)


def _call_pairs(
    first_BD: Tensor,
    others_BVD: Tensor,
    self_interaction: bool,
    out_Bn: Tensor,
    grad_first: Tensor | None,
    grad_others: Tensor | None,
) -> None:
    samples, others, width = others_BVD.shape
    expected = _pair_results(first_BD, others_BVD, self_interaction).shape
    if first_BD.shape != (samples, width) or out_Bn.shape != expected:
        raise ValueError(
            f"pairs: shapes {list(first_BD.shape)} (first), {list(others_BVD.shape)} (others) and {list(out_Bn.shape)} "
            "(products) do not fit each other"
        )
    thread_count, vectors_up, width_up = threads(out_Bn.numel()), others + 1 + 15 & ~15, width + 15 & ~15
    space = 3 * vectors_up * width_up + 2 * vectors_up * vectors_up + width_up
    call(
        "pair_products",
        thread_count,
        first=first_BD.contiguous(),
        others=others_BVD.contiguous(),
        out=out_Bn,
        grad_first=grad_first,
        grad_others=grad_others,
        # The kernel reads whole tiles: the padding beyond the vectors has to be zero.
        spaces=first_BD.new_zeros(thread_count, space, dtype=torch.float32),
        samples=samples,
        vectors=others + 1,
        width=width,
        space=space,
        bf16_first=first_BD.dtype == torch.bfloat16,
        bf16_others=others_BVD.dtype == torch.bfloat16,
        self_interaction=self_interaction,
    )


def _save_pairs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.self_interaction = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_products(ctx: Any, grad_Bn: Tensor) -> tuple[Tensor, Tensor, None]:
    grads = torch.ops.lightning_dlrm.pair_gradients(*ctx.saved_tensors, grad_Bn, ctx.self_interaction)
    return *grads, None


def _differentiate_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate ``pair_gradients``, which is (L + L') X for gradients L of the products and vectors X."""
    first_BD, others_BVD, grad_Bn = ctx.saved_tensors
    width, vectors = first_BD.shape[1], others_BVD.shape[1] + 1
    grad_first, grad_others = grads
    of_products = torch.cat([torch.zeros_like(first_BD), grad_Bn[:, width:]], dim=1)
    of_vectors = torch.ops.lightning_dlrm.pair_gradients(grad_first, grad_others, of_products, ctx.self_interaction)
    vectors_BVD = torch.cat([first_BD.float()[:, None], others_BVD.float()], dim=1)
    grads_BVD = torch.cat([grad_first.float()[:, None], grad_others.float()], dim=1)
    both_BVV = torch.bmm(grads_BVD, vectors_BVD.transpose(1, 2))
    both_BVV = both_BVV + both_BVV.transpose(1, 2)
    i, j = torch.tril_indices(vectors, vectors, 0 if ctx.self_interaction else -1, device=first_BD.device)
    of_grad = torch.cat([grad_first, both_BVV[:, i, j].to(first_BD.dtype)], dim=1)
    return *of_vectors, of_grad.to(grad_Bn.dtype), None


def _relu_bf16(values: Tensor) -> None:
    call("relu_bf16", threads(values.numel()), values=values, count=values.numel())
    count_change(values)


def _relu_gradients(grad_Bd: Tensor, activation_Bd: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    if grad_Bd.dim() != 2 or (grad_Bd.shape, grad_Bd.dtype) != (activation_Bd.shape, activation_Bd.dtype):
        raise ValueError(
            f"relu_gradients: the gradient is {list(grad_Bd.shape)} {grad_Bd.dtype} and the activation "
            f"{list(activation_Bd.shape)} {activation_Bd.dtype}; expected two dimensions, and equal shapes and dtypes"
        )
    samples, width = grad_Bd.shape
    transposed_dB, _ = _relu_results(grad_Bd, activation_Bd, transposed)
    sums = grad_Bd.new_zeros(max(-(-samples // _ROWS_PER_SUM), 1), width, dtype=torch.float32)
    call(
        "relu_gradients",
        threads(grad_Bd.numel()),
        grad=grad_Bd,
        activation=activation_Bd.contiguous(),
        transposed=transposed_dB if transposed else None,
        sums=sums,
        samples=samples,
        width=width,
        bf16=grad_Bd.dtype == torch.bfloat16,
    )
    count_change(grad_Bd)
    return transposed_dB, sums[0].clone()


def _relu_results(grad_Bd: Tensor, activation_Bd: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return tensors for ``relu_gradients``' results, not yet filled."""
    samples, width = grad_Bd.shape
    return (
        grad_Bd.new_empty((width, samples) if transposed else (0,)),
        grad_Bd.new_empty(width, dtype=torch.float32),
    )


register(
    "pair_products(Tensor first, Tensor others, bool self_interaction) -> Tensor",
    _pair_products,
    _pair_results,
    _differentiate_products,
    _save_pairs,
)
register(
    "pair_gradients(Tensor first, Tensor others, Tensor grad, bool self_interaction) -> (Tensor, Tensor)",
    _pair_gradients,
    _pair_gradient_results,
    _differentiate_gradients,
    _save_pairs,
)
register("relu_bf16(Tensor(a!) values) -> ()", _relu_bf16, nothing)
register(
    "relu_gradients(Tensor(a!) grad, Tensor activation, bool transposed) -> (Tensor, Tensor)",
    _relu_gradients,
    _relu_results,
)
