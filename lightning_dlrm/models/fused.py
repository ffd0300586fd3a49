"""Layers whose forward and backward pass are written by hand: the same maths in fewer, larger operations.

Shape suffixes: B samples, d features, V vectors, D their width, P pairs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_dlrm.kernels import dense

# Multiply-adds from which on oneDNN's kernel is worth its start; none without oneDNN.
_LARGE_PRODUCT = 2**23 if torch.backends.mkldnn.is_available() else math.inf

_WORTH_A_CALL = 2**14
"""Elements of a gradient from which on a kernel in C pays for its call."""
_NARROW = 32
"""Width of a layer's input up to which the BLAS takes half the time for its weights' gradient, transposed."""


def fused_mlp(
    x_Bd: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], linear_output: bool, by_native: bool = False
) -> Tensor:
    """relu(x W' + b), layer after layer; the last one without the ReLU where ``linear_output``.

    Under autocast each weight is cast once, for the forward and the backward pass, and gradients of
    biases are summed in float32.

    Args:
        x_Bd: the first layer's input.
        weights: [out, in] of each layer.
        biases: [out] of each layer.
        linear_output: whether the last layer has no ReLU.
        by_native: whether the kernels in C may be used.
    """
    out: Tensor = _FusedMLP.apply(x_Bd, linear_output, by_native, *weights, *biases)
    return out


def pair_products(
    vectors_BVD: Tensor, beside_Bd: Tensor, pairs: Tensor, mirrored: Tensor, self_interaction: bool
) -> Tensor:
    """[B, d + P]: ``beside_Bd``, then the dot products of pairs (i, j), j <= i, of vectors, in its type.

    Args:
        vectors_BVD: the vectors.
        beside_Bd: columns to stand beside the products; there may be none.
        pairs: int64 [P]: i * V + j of each pair.
        mirrored: int64 [V * V]: at i * V + j and j * V + i the pair (i, j)'s place in ``pairs``; anything
            on the diagonal without ``self_interaction``.
        self_interaction: whether there are pairs (i, i).
    """
    products: Tensor = _PairProducts.apply(vectors_BVD, beside_Bd, pairs, mirrored, self_interaction)
    return products


class _FusedMLP(torch.autograd.Function):
    """One node of the graph for all layers. A weight's gradient is dW = g' x, its input's dx = g W."""

    @staticmethod
    def forward(ctx: Any, x_Bd: Tensor, linear_output: bool, by_native: bool, *parameters: Tensor) -> Tensor:
        ctx.parameter_dtype = parameters[0].dtype
        ctx.input_dtype = x_Bd.dtype
        device = x_Bd.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x_Bd, parameters = x_Bd.to(dtype), tuple(parameter.to(dtype) for parameter in parameters)
        layers = len(parameters) // 2
        weights, biases = parameters[:layers], parameters[layers:]
        activations = [x_Bd]
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            y_Bd = _linear(activations[-1], weight, bias)
            activations.append(_relu(y_Bd, by_native) if layer < layers - 1 or not linear_output else y_Bd)
        ctx.linear_output, ctx.by_native = linear_output, by_native
        ctx.save_for_backward(*activations, *weights)
        return activations[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layers = len(ctx.saved_tensors) // 2
        activations, weights = ctx.saved_tensors[: layers + 1], ctx.saved_tensors[layers + 1 :]
        grad_Bd = grads[0]
        grad_weights: list[Tensor] = []
        grad_biases: list[Tensor] = []
        for layer in reversed(range(layers)):
            x_Bd, transposed_dB = activations[layer], None
            if layer == layers - 1 and ctx.linear_output:
                grad_bias = grad_Bd.sum(0, dtype=ctx.parameter_dtype)
            else:
                if layer == layers - 1:
                    # What follows is in place, and others may hold this one.
                    grad_Bd = grad_Bd.clone(memory_format=torch.contiguous_format)
                activation_Bd = activations[layer + 1]
                if (
                    ctx.by_native
                    and grad_Bd.numel() >= _WORTH_A_CALL
                    and grad_Bd.dtype in (torch.float32, torch.bfloat16)
                ):
                    transpose = _is_faster_transposed(x_Bd, grad_Bd)
                    transposed_dB, grad_bias = dense.relu_gradients(grad_Bd, activation_Bd, transpose)
                    transposed_dB, grad_bias = transposed_dB if transpose else None, grad_bias.to(ctx.parameter_dtype)
                else:
                    torch.ops.aten.threshold_backward.grad_input(grad_Bd, activation_Bd, 0, grad_input=grad_Bd)
                    grad_bias = grad_Bd.sum(0, dtype=ctx.parameter_dtype)
            grad_biases.append(grad_bias)
            if transposed_dB is not None:
                grad_weight = _linear(transposed_dB, x_Bd.t(), None)
            elif x_Bd.shape[1] < _NARROW:
                grad_weight = (x_Bd.t() @ grad_Bd).t().contiguous()
            else:
                grad_weight = grad_Bd.t() @ x_Bd
            grad_weights.append(grad_weight.to(ctx.parameter_dtype))
            if layer or ctx.needs_input_grad[0]:
                grad_Bd = _linear(grad_Bd, weights[layer].t(), None)
        grad_input = grad_Bd.to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
        return grad_input, None, None, *reversed(grad_weights), *reversed(grad_biases)


class _PairProducts(torch.autograd.Function):
    """With G the gradient of the products, mirrored, that of the vectors is G V: one product, not two."""

    @staticmethod
    def forward(
        ctx: Any, vectors_BVD: Tensor, beside_Bd: Tensor, pairs: Tensor, mirrored: Tensor, self_interaction: bool
    ) -> Tensor:
        ctx.save_for_backward(vectors_BVD, mirrored)
        ctx.beside, ctx.self_interaction = beside_Bd.shape[1], self_interaction
        products_BVV = torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2))
        if products_BVV.device.type == "cpu" and products_BVV.dtype in (torch.bfloat16, torch.float16):
            # A CPU picks columns of two bytes seven times as slowly as it picks wider ones.
            products_BVV = products_BVV.float()
        products_BP = products_BVV.flatten(1).index_select(1, pairs)
        return torch.cat([beside_Bd, products_BP.to(beside_Bd.dtype)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        vectors_BVD, mirrored = ctx.saved_tensors
        grad_Bn, vectors = grads[0], vectors_BVD.shape[1]
        # Picked from the whole gradient: a slice would have to be copied first.
        picked, factors_Bn = mirrored + ctx.beside, grad_Bn.to(vectors_BVD.dtype)
        if factors_Bn.element_size() == 2:
            # A CPU picks columns of two bytes four times as slowly by index_select, and wider ones a little faster.
            grad_BVV = factors_Bn.gather(1, picked.expand(len(factors_Bn), -1)).view(-1, vectors, vectors)
        else:
            grad_BVV = factors_Bn.index_select(1, picked).view(-1, vectors, vectors)
        diagonal = grad_BVV.diagonal(dim1=1, dim2=2)
        if ctx.self_interaction:
            # A product of a vector with itself changes with both of its factors.
            diagonal.mul_(2)
        else:
            diagonal.zero_()
        return torch.bmm(grad_BVV, vectors_BVD), grad_Bn[:, : ctx.beside], None, None, None


def _is_faster_transposed(x_Bd: Tensor, grad_Bd: Tensor) -> bool:
    """Whether the product g' x is to be made from a transposed copy of g.

    In float32, oneDNN then takes a quarter less time than the BLAS for g as it is. In bfloat16 both are oneDNN's, which
    gains a tenth, and loses as much where the width of x is odd.
    """
    if x_Bd.shape[1] * grad_Bd.numel() < _LARGE_PRODUCT:
        return False
    return x_Bd.dtype == torch.float32 or x_Bd.shape[1] % 4 == 0


def _linear(x_Bd: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b."""
    if x_Bd.device.type == "cpu" and x_Bd.dtype == torch.float32 and len(x_Bd) * weight.numel() >= _LARGE_PRODUCT:
        # oneDNN's kernel: a few hundredths faster than the BLAS behind addmm, and a quarter where the width is odd. Its
        # own ReLU is not used: it makes zeros of what is no number, which nobody would hear of.
        y_Bd: Tensor = torch.ops.mkldnn._linear_pointwise(x_Bd, weight, bias, "none", [], "")
        return y_Bd
    return functional.linear(x_Bd, weight, bias)


def _relu(y_Bd: Tensor, by_native: bool) -> Tensor:
    """In place."""
    if by_native and y_Bd.dtype == torch.bfloat16 and y_Bd.numel() >= _WORTH_A_CALL:
        dense.relu_bf16(y_Bd)
        return y_Bd
    return y_Bd.relu_()
