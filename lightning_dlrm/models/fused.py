"""Layers with hand-written forward and backward passes: the same maths in fewer, larger operations.

Shape suffixes: B samples, d features, V vectors, D their width, P pairs.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# torch has no public function that tells whether hooks are registered.
from torch.nn.modules.module import _has_any_global_hook

from lightning_dlrm.kernels import dense

_LARGE_PRODUCT = 2**23
"""Multiply-adds from which on oneDNN takes a tenth less time for a weight's gradient from a transposed copy."""
_NATIVE_ELEMENTS = 2**14
"""Elements of a gradient from which on a kernel in C pays for its call."""
_NARROW_INPUT = 32
"""Width of a layer's input below which the BLAS takes half the time for the transposed gradient of its weights."""
_ALIGNED_WIDTH = 8
"""If the width of a matrix is not a multiple of this, its rows are not aligned, and its products can take 1.5 times as
long."""
_MANY_SAMPLES = 512
"""Samples from which on aligned products save more time than columns of zeros cost."""


def fusible_layers(modules: Iterable[nn.Module], x_Bd: Tensor) -> list[tuple[nn.Linear, bool]] | None:
    """Return the linear layers, each with whether a ReLU follows; None if the modules must be called separately.

    They must if a module is not exactly a Linear with a bias or a ReLU, if a module has hooks (pruning uses a hook), an
    own forward method or parametrizations, if global module hooks are registered, or if the call is compiled, exported
    or traced. Widths that do not fit each other are left to torch, which says so.

    Args:
        modules: the modules in the order of their calls.
        x_Bd: input of the first module.
    """
    if torch.compiler.is_compiling() or type(x_Bd) is not Tensor or torch.jit.is_tracing() or _has_any_global_hook():
        return None
    layers: list[tuple[nn.Linear, bool]] = []
    width = x_Bd.shape[-1]
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
            if module.weight.shape[1] != width:
                return None
            width = len(module.weight)
            layers.append((module, False))
        elif type(module) is nn.ReLU and layers:
            layers[-1] = (layers[-1][0], True)
        else:
            return None
    return layers or None


def missing_columns(width: int, samples: int) -> int:
    """Return the number of columns of zeros that align the rows of a matrix; 0 if it is narrow or has few samples."""
    # A compiled or exported program serves any number of samples.
    is_small = width < _NARROW_INPUT or (not torch.compiler.is_compiling() and samples < _MANY_SAMPLES)
    return 0 if is_small else -width % _ALIGNED_WIDTH


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
    """Return ``beside_Bd``, then the dot products of pairs (i, j), j <= i, of vectors, in its dtype: [B, d + P].

    Args:
        vectors_BVD: the vectors.
        beside_Bd: columns before the products; d may be 0.
        pairs: int64 [P], i * V + j of each pair.
        mirrored: int64 [V * V], the position of pair (i, j) in ``pairs``, at i * V + j and j * V + i; the diagonal is
            ignored without ``self_interaction``.
        self_interaction: whether there are pairs (i, i).
    """
    products: Tensor = _PairProducts.apply(vectors_BVD, beside_Bd, pairs, mirrored, self_interaction)
    return products


class _FusedMLP(torch.autograd.Function):
    """One node of the graph for all layers. A weight's gradient is dW = g' x, its input's dx = g W."""

    @staticmethod
    def forward(ctx: Any, x_Bd: Tensor, relus: tuple[bool, ...], by_native: bool, *parameters: Tensor) -> Tensor:
        device, inputs = x_Bd.device.type, (x_Bd, *parameters)
        ctx.autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if ctx.autocast_dtype is not None:
            x_Bd, parameters = x_Bd.to(ctx.autocast_dtype), tuple(p.to(ctx.autocast_dtype) for p in parameters)
        samples, biases = len(x_Bd), parameters[len(relus) :]
        weights = [_aligned(weight, samples) for weight in parameters[: len(relus)]]
        activations: list[Tensor] = []
        for weight, bias, relu in zip(weights, biases, relus, strict=True):
            activations.append(_aligned(x_Bd, samples))
            x_Bd = functional.linear(activations[-1], weight, bias)
            if relu:
                x_Bd = _relu(x_Bd, by_native)
        ctx.relus, ctx.by_native = relus, by_native
        ctx.save_for_backward(*inputs, *activations, x_Bd, *weights)
        return x_Bd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layers, grad_Bd = len(ctx.relus), grads[0]
        inputs, saved = ctx.saved_tensors[: 2 * layers + 1], ctx.saved_tensors[2 * layers + 1 :]
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, inputs, grad_Bd)
        activations, weights, dtype = saved[: layers + 1], saved[layers + 1 :], inputs[1].dtype
        grad_weights: list[Tensor] = []
        grad_biases: list[Tensor] = []
        for layer in reversed(range(layers)):
            x_Bd, transposed_dB, width = activations[layer], None, inputs[1 + layer].shape[1]
            if not ctx.relus[layer]:
                grad_bias = grad_Bd.sum(0, dtype=dtype)
            else:
                if grad_Bd is grads[0]:
                    # The next operations are in place, and the caller may hold this tensor.
                    grad_Bd = grad_Bd.clone(memory_format=torch.contiguous_format)
                result_Bd = _columns(activations[layer + 1], grad_Bd.shape[1])
                grad_bias, transposed_dB = _differentiate_relu(
                    grad_Bd, result_Bd, ctx.by_native, _is_faster_transposed(x_Bd, grad_Bd)
                )
            grad_biases.append(grad_bias.to(dtype))
            if transposed_dB is not None:
                grad_weight = functional.linear(transposed_dB, x_Bd.t())
            elif x_Bd.shape[1] < _NARROW_INPUT:
                grad_weight = (x_Bd.t() @ grad_Bd).t().contiguous()
            else:
                grad_weight = grad_Bd.t() @ x_Bd
            grad_weights.append(_columns(grad_weight, width).to(dtype))
            if layer or ctx.needs_input_grad[0]:
                grad_Bd = _columns(functional.linear(grad_Bd, weights[layer].t()), width)
        grad_input = grad_Bd.to(inputs[0].dtype) if ctx.needs_input_grad[0] else None
        return grad_input, None, None, *reversed(grad_weights), *reversed(grad_biases)


def _differentiable_gradients(ctx: Any, inputs: Sequence[Tensor], grad_Bd: Tensor) -> tuple[Tensor | None, ...]:
    """Return differentiable gradients: compute the layers again with plain torch."""
    y_Bd, *parameters = inputs
    weights, biases = parameters[: len(ctx.relus)], parameters[len(ctx.relus) :]
    with torch.autocast(y_Bd.device.type, dtype=ctx.autocast_dtype, enabled=ctx.autocast_dtype is not None):
        for weight, bias, relu in zip(weights, biases, ctx.relus, strict=True):
            y_Bd = functional.linear(y_Bd, weight, bias)
            y_Bd = y_Bd.relu() if relu else y_Bd
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    grads = iter(torch.autograd.grad(y_Bd, wanted, grad_Bd, create_graph=True))
    grad_input, *of_parameters = (next(grads) if tensor.requires_grad else None for tensor in inputs)
    return grad_input, None, None, *of_parameters


def _differentiate_relu(
    grad_Bd: Tensor, activation_Bd: Tensor, by_native: bool, transpose: bool
) -> tuple[Tensor, Tensor | None]:
    """Turn the gradient of a ReLU's result into the gradient of its input, in place.

    Returns:
        The gradient of the bias before the ReLU, [d]; the transposed gradient of the input, [d, B], or None.
    """
    if by_native and grad_Bd.numel() >= _NATIVE_ELEMENTS and grad_Bd.dtype in (torch.float32, torch.bfloat16):
        transposed_dB, grad_bias = dense.relu_gradients(grad_Bd, activation_Bd, transpose)
        return grad_bias, transposed_dB if transpose else None
    torch.ops.aten.threshold_backward.grad_input(grad_Bd, activation_Bd, 0, grad_input=grad_Bd)
    return grad_Bd.sum(0, dtype=torch.promote_types(grad_Bd.dtype, torch.float32)), None


class _PairProducts(torch.autograd.Function):
    """Dot products of pairs, with one product G V in the backward pass; G is the gradient of the products, mirrored."""

    @staticmethod
    def forward(
        ctx: Any, vectors_BVD: Tensor, beside_Bd: Tensor, pairs: Tensor, mirrored: Tensor, self_interaction: bool
    ) -> Tensor:
        ctx.save_for_backward(vectors_BVD, mirrored)
        ctx.beside, ctx.self_interaction = beside_Bd.shape[1], self_interaction
        products_BVV = torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2))
        if products_BVV.device.type == "cpu" and products_BVV.dtype in (torch.bfloat16, torch.float16):
            # On a CPU, index_select of columns takes seven times as long with elements of two bytes.
            products_BVV = products_BVV.float()
        products_BP = products_BVV.flatten(1).index_select(1, pairs)
        return torch.cat([beside_Bd, products_BP.to(beside_Bd.dtype)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        vectors_BVD, mirrored = ctx.saved_tensors
        grad_Bn, vectors = grads[0], vectors_BVD.shape[1]
        # Indexes the whole gradient: a slice would have to be copied first.
        positions, factors_Bn = mirrored + ctx.beside, grad_Bn.to(vectors_BVD.dtype)
        if factors_Bn.element_size() == 2:
            # On a CPU, gather takes a quarter of the time of index_select for two-byte elements, and more for wider.
            grad_BVV = factors_Bn.gather(1, positions.expand(len(factors_Bn), -1)).view(-1, vectors, vectors)
        else:
            grad_BVV = factors_Bn.index_select(1, positions).view(-1, vectors, vectors)
        diagonal = grad_BVV.diagonal(dim1=1, dim2=2)
        if ctx.self_interaction:
            # A product of a vector with itself changes with both of its factors.
            diagonal.mul_(2)
        else:
            diagonal.zero_()
        return torch.bmm(grad_BVV, vectors_BVD), grad_Bn[:, : ctx.beside], None, None, None


def _aligned(values_nd: Tensor, samples: int) -> Tensor:
    """Return the values, with ``missing_columns`` of zeros if there are many samples."""
    missing = missing_columns(values_nd.shape[1], samples)
    return functional.pad(values_nd, (0, missing)) if missing else values_nd


def _columns(values_nd: Tensor, width: int) -> Tensor:
    """Return the first columns, contiguous."""
    return values_nd if values_nd.shape[1] == width else values_nd[:, :width].contiguous()


def _is_faster_transposed(x_Bd: Tensor, grad_Bd: Tensor) -> bool:
    """Return whether g' x is faster from a transposed copy of g.

    In bfloat16 the copy saves a tenth of the time if the width of x is a multiple of 4, and costs as much if it is odd.
    """
    large = x_Bd.shape[1] * grad_Bd.numel() >= _LARGE_PRODUCT
    return large and x_Bd.dtype == torch.bfloat16 and x_Bd.shape[1] % 4 == 0


def _relu(y_Bd: Tensor, by_native: bool) -> Tensor:
    """Apply the ReLU in place."""
    if by_native and y_Bd.dtype == torch.bfloat16 and y_Bd.numel() >= _NATIVE_ELEMENTS:
        dense.relu_bf16(y_Bd)
        return y_Bd
    return y_Bd.relu_()
