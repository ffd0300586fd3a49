"""Layers whose forward and backward pass are written by hand: the same maths in fewer, larger operations.

Shape suffixes: B samples, d features, V vectors, D their width, P pairs.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Torch has no public way to ask for hooks, neither for those of all modules nor for those of one.
from torch.nn.modules.module import _has_any_global_hook

from lightning_dlrm.kernels import dense

_LARGE_PRODUCT = 2**23
"""Multiply-adds from which on oneDNN takes a tenth less time for a weight's gradient from a transposed copy."""
_WORTH_A_CALL = 2**14
"""Elements of a gradient from which on a kernel in C pays for its call."""
_NARROW = 32
"""Width of a layer's input up to which the BLAS takes half the time for its weights' gradient, transposed."""


def fusible_layers(modules: Iterable[nn.Module], x_Bd: Tensor) -> list[tuple[nn.Linear, bool]] | None:
    """Return each linear layer with whether a ReLU follows it; None if the modules must be called one by one.

    They must be if any is not exactly a Linear with a bias or a ReLU, has hooks, a forward method or parametrisations
    of its own (pruning works by a hook), if hooks of all modules are registered, or if the call is compiled, exported
    or traced.

    Args:
        modules: in the order of their calls.
        x_Bd: the first one's input.
    """
    if torch.compiler.is_compiling() or type(x_Bd) is not Tensor or torch.jit.is_tracing() or _has_any_global_hook():
        return None
    layers: list[tuple[nn.Linear, bool]] = []
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return None
        if type(module) is nn.Linear:
            if module.bias is None or type(module.weight) not in (nn.Parameter, Tensor):
                return None
            layers.append((module, False))
        elif type(module) is nn.ReLU and layers:
            layers[-1] = (layers[-1][0], True)
        else:
            return None
    return layers or None


def fused_mlp(
    x_Bd: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], relus: Sequence[bool], by_native: bool = False
) -> Tensor:
    """Return relu(x W' + b), layer after layer, without the ReLU if a layer has none.

    Under autocast each weight is cast once, for the forward and the backward pass, and gradients of
    biases are summed in float32.

    Args:
        x_Bd: the first layer's input.
        weights: [out, in] of each layer.
        biases: [out] of each layer.
        relus: whether each layer has a ReLU.
        by_native: whether the kernels in C may be used.
    """
    out: Tensor = _FusedMLP.apply(x_Bd, tuple(relus), by_native, *weights, *biases)
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
    def forward(ctx: Any, x_Bd: Tensor, relus: tuple[bool, ...], by_native: bool, *parameters: Tensor) -> Tensor:
        device, given = x_Bd.device.type, (x_Bd, *parameters)
        ctx.autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if ctx.autocast_dtype is not None:
            x_Bd, parameters = x_Bd.to(ctx.autocast_dtype), tuple(p.to(ctx.autocast_dtype) for p in parameters)
        weights, biases = parameters[: len(relus)], parameters[len(relus) :]
        activations = [x_Bd]
        for weight, bias, relu in zip(weights, biases, relus, strict=True):
            y_Bd = functional.linear(activations[-1], weight, bias)
            activations.append(_relu(y_Bd, by_native) if relu else y_Bd)
        ctx.relus, ctx.by_native = relus, by_native
        ctx.save_for_backward(*given, *activations, *weights)
        return activations[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layers, grad_Bd = len(ctx.relus), grads[0]
        given, saved = ctx.saved_tensors[: 2 * layers + 1], ctx.saved_tensors[2 * layers + 1 :]
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, given, grad_Bd)
        activations, weights, dtype = saved[: layers + 1], saved[layers + 1 :], given[1].dtype
        grad_weights: list[Tensor] = []
        grad_biases: list[Tensor] = []
        for layer in reversed(range(layers)):
            x_Bd, transposed_dB = activations[layer], None
            if not ctx.relus[layer]:
                grad_bias = grad_Bd.sum(0, dtype=dtype)
            else:
                if grad_Bd is grads[0]:
                    # What follows is in place, and others may hold this one.
                    grad_Bd = grad_Bd.clone(memory_format=torch.contiguous_format)
                grad_bias, transposed_dB = _differentiate_relu(
                    grad_Bd, activations[layer + 1], ctx.by_native, _is_faster_transposed(x_Bd, grad_Bd)
                )
            grad_biases.append(grad_bias.to(dtype))
            if transposed_dB is not None:
                grad_weight = functional.linear(transposed_dB, x_Bd.t())
            elif x_Bd.shape[1] < _NARROW:
                grad_weight = (x_Bd.t() @ grad_Bd).t().contiguous()
            else:
                grad_weight = grad_Bd.t() @ x_Bd
            grad_weights.append(grad_weight.to(dtype))
            if layer or ctx.needs_input_grad[0]:
                grad_Bd = functional.linear(grad_Bd, weights[layer].t())
        grad_input = grad_Bd.to(given[0].dtype) if ctx.needs_input_grad[0] else None
        return grad_input, None, None, *reversed(grad_weights), *reversed(grad_biases)


def _differentiable_gradients(ctx: Any, given: Sequence[Tensor], grad_Bd: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients by plain torch, from the layers once more, so that they have gradients themselves."""
    y_Bd, *parameters = given
    weights, biases = parameters[: len(ctx.relus)], parameters[len(ctx.relus) :]
    with torch.autocast(y_Bd.device.type, dtype=ctx.autocast_dtype, enabled=ctx.autocast_dtype is not None):
        for weight, bias, relu in zip(weights, biases, ctx.relus, strict=True):
            y_Bd = functional.linear(y_Bd, weight, bias)
            y_Bd = y_Bd.relu() if relu else y_Bd
    wanted = [tensor for tensor in given if tensor.requires_grad]
    grads = iter(torch.autograd.grad(y_Bd, wanted, grad_Bd, create_graph=True))
    grad_input, *of_parameters = (next(grads) if tensor.requires_grad else None for tensor in given)
    return grad_input, None, None, *of_parameters


def _differentiate_relu(
    grad_Bd: Tensor, activation_Bd: Tensor, by_native: bool, transpose: bool
) -> tuple[Tensor, Tensor | None]:
    """Make the gradient of a ReLU's result that of its input, in place.

    Returns:
        [d], the gradient of the bias before the ReLU, and [d, B], the other one transposed, if a kernel made it.
    """
    if by_native and grad_Bd.numel() >= _WORTH_A_CALL and grad_Bd.dtype in (torch.float32, torch.bfloat16):
        transposed_dB, grad_bias = dense.relu_gradients(grad_Bd, activation_Bd, transpose)
        return grad_bias, transposed_dB if transpose else None
    torch.ops.aten.threshold_backward.grad_input(grad_Bd, activation_Bd, 0, grad_input=grad_Bd)
    return grad_Bd.sum(0, dtype=torch.promote_types(grad_Bd.dtype, torch.float32)), None


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
    """Return whether the product g' x is to be made from a transposed copy of g: in bfloat16 that gains a tenth, and
    loses as much if the width of x is odd."""
    large = x_Bd.shape[1] * grad_Bd.numel() >= _LARGE_PRODUCT
    return large and x_Bd.dtype == torch.bfloat16 and x_Bd.shape[1] % 4 == 0


def _relu(y_Bd: Tensor, by_native: bool) -> Tensor:
    """Apply the ReLU in place."""
    if by_native and y_Bd.dtype == torch.bfloat16 and y_Bd.numel() >= _WORTH_A_CALL:
        dense.relu_bf16(y_Bd)
        return y_Bd
    return y_Bd.relu_()
