"""The dense layers that every model is made of, and how they start.

Shape suffixes: B samples, I dense features, d features, V vectors, D their width, P pairs, H rows of a
CIN layer.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.kernels import dense
from lightning_dlrm.kernels.choice import Kernels, choose
from lightning_dlrm.models.fused import fused_mlp, fusible_layers, pair_products


class MLP(nn.Sequential):
    """Linear layers with a ReLU after each; after the last one too unless ``linear_output``.

    Args:
        widths: of the input and of every layer's output; at least two.
        linear_output: leave the last layer without a ReLU.
        batch_norm: normalise over the batch between each linear layer and its ReLU (Ioffe and Szegedy
            2015, algorithm 1); an output without a ReLU stays as it is. Of several ranks, each normalises
            over its own slice of the batch; on GPUs, trainer.sync_batchnorm makes that the whole batch.
        dropout: share of each hidden layer's outputs, after the ReLU, that training leaves out at random
            (Srivastava et al. 2014, section 4; the others are scaled up by 1 / (1 - dropout)).
    """

    kernels: Kernels = "auto"
    """Which code makes the backward pass."""

    def __init__(
        self, widths: Sequence[int], linear_output: bool = False, batch_norm: bool = False, dropout: float = 0.0
    ) -> None:
        if not 0 <= dropout < 1:
            raise UserError(f"dropout is {dropout}; expected 0 or more, below 1")
        if len(widths) < 2 or min(widths) < 1:
            raise UserError(
                f"dense layers' widths {list(widths)}: expected an input and at least one layer, each 1 or wider"
            )
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            normalise = [BatchNorm(width_out)] if batch_norm else []
            leave_out = [nn.Dropout(dropout)] if dropout else []
            layers += [nn.Linear(width_in, width_out), *normalise, nn.ReLU(), *leave_out]
        if linear_output:
            del layers[-1 - bool(batch_norm) - bool(dropout) :]
        super().__init__(*layers)

    def forward(self, x_Bd: Tensor) -> Tensor:
        """[B, d] -> [B, width of the last layer]: what the modules return one after the other; in one pass if they are
        linear layers and ReLUs that nothing observes or changes."""
        layers = fusible_layers(self, x_Bd)
        if layers is None:
            return cast(Tensor, super().forward(x_Bd))
        return fused_mlp(
            x_Bd,
            [layer.weight for layer, _ in layers],
            [layer.bias for layer, _ in layers],
            [relu for _, relu in layers],
            by_native=choose(self.kernels, x_Bd.device.type, layers[0][0].weight.dtype) == "native",
        )

    def linears(self) -> list[nn.Linear]:
        return [layer for layer in self if isinstance(layer, nn.Linear)]

    def multiply_adds(self) -> int:
        """Per sample."""
        return sum(a * b for a, b in itertools.pairwise(self.widths))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes the running statistics where a batch has too few samples for its own."""

    def forward(self, x_Bd: Tensor) -> Tensor:
        """[B, d] -> [B, d]."""
        if self.training and len(x_Bd) < 2:
            return nn.functional.batch_norm(
                x_Bd, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(x_Bd)


class MissingValues(nn.Module):
    """Puts a number in place of each missing dense value, so that no layer after it sees NaN.

    The number is 0. With ``learned``, feature i has one of its own, a_i, which starts at 0: the same as
    0 and an indicator of missing values that weighs a_i times as much as the feature itself.

    Args:
        features: I.
        learned: whether the numbers are learned.
    """

    def __init__(self, features: int, learned: bool) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(features)) if learned else None

    def forward(self, dense_BI: Tensor) -> Tensor:
        """[B, I], NaN where missing -> [B, I]."""
        if self.value is None:
            # Infinities stay, so that the loss tells of them.
            return dense_BI.nan_to_num(0.0, posinf=math.inf, neginf=-math.inf)
        return torch.where(dense_BI.isnan(), self.value.to(dense_BI.dtype), dense_BI)


class DotInteraction(nn.Module):
    """Dot products of all pairs of vectors (Naumov et al. 2019, section 2.1.3).

    The pairs (i, j), j < i, come row by row; with ``self_interaction`` j <= i.

    Args:
        vectors: V.
        width: D.
        self_interaction: also take each vector's product with itself.
    """

    pairs: Tensor
    mirrored: Tensor
    kernels: Kernels = "auto"
    """Which code multiplies."""

    def __init__(self, vectors: int, width: int, self_interaction: bool = False) -> None:
        super().__init__()
        self.width = width
        i, j = torch.tril_indices(vectors, vectors, 0 if self_interaction else -1, device="cpu")
        self.register_buffer("pairs", i * vectors + j, persistent=False)
        mirrored = torch.zeros(vectors, vectors, dtype=torch.int64, device="cpu")
        mirrored[i, j] = mirrored[j, i] = torch.arange(len(i), device="cpu")
        self.register_buffer("mirrored", mirrored.flatten(), persistent=False)
        self._self_interaction = self_interaction

    def forward(self, first_BD: Tensor, others_Bn: Tensor) -> Tensor:
        """[B, D] and the V - 1 other vectors, [B, (V - 1) D] -> [B, D + P]: the first one, then the products, in its
        type."""
        if not self.pairs.numel():  # of one vector
            return first_BD
        others_BVD = others_Bn.unflatten(1, (-1, self.width))
        if torch.compiler.is_compiling():
            # Compilers fuse plain operations; an exported network needs no kernels of ours.
            vectors_BVD = torch.cat([first_BD[:, None], others_BVD], dim=1)
            products_BVV = torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2))
            products_BP = products_BVV.flatten(1).index_select(1, self.pairs)
            return torch.cat([first_BD, products_BP.to(first_BD.dtype)], dim=1)
        kernels = choose(self.kernels, others_Bn.device.type, others_Bn.dtype)
        if kernels == "native" and first_BD.dtype in (torch.float32, torch.bfloat16):
            return dense.pair_products(first_BD, others_BVD, self._self_interaction)
        vectors_BVD = torch.cat([first_BD.to(others_Bn.dtype)[:, None], others_BVD], dim=1)
        return pair_products(vectors_BVD, first_BD, self.pairs, self.mirrored, self._self_interaction)

    def multiply_adds(self) -> int:
        """Per sample; only the pairs that are kept count."""
        return self.pairs.numel() * self.width


class ProjectionInteraction(nn.Module):
    """Dot products of two sets of vectors, each made from all vectors by an MLP of its own.

    The projection architecture of torchrec's DLRM: a product takes F1 * F2 pairs where F1 + F2 vectors
    are made, in place of all V (V - 1) / 2. The second set is read as [D, F2].

    Args:
        vectors: V.
        width: D.
        branches: widths of the two MLPs' layers; the last ones are multiples of D.
    """

    def __init__(self, vectors: int, width: int, branches: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if len(branches) != 2:
            raise UserError(f"projection is {branches}; expected two lists of widths, such as [[512, 64], [512, 64]]")
        for branch in branches:
            if not branch or branch[-1] % width:
                raise UserError(
                    f"a projection branch ends in {branch[-1] if branch else 'nothing'} and embedding_dim is {width}: "
                    f"its output is cut into vectors, so end in a multiple of {width}"
                )
        self.width = width
        self.left, self.right = (MLP([vectors * width, *branch]) for branch in branches)
        self.outputs = branches[0][-1] // width * (branches[1][-1] // width)

    def forward(self, joined_Bn: Tensor) -> Tensor:
        """[B, V * D] -> [B, F1 * F2]."""
        left_BFD = self.left(joined_Bn).unflatten(1, (-1, self.width))
        right_BDF = self.right(joined_Bn).unflatten(1, (self.width, -1))
        return torch.bmm(left_BFD, right_BDF).flatten(1)

    def multiply_adds(self) -> int:
        """Per sample."""
        return self.left.multiply_adds() + self.right.multiply_adds() + self.outputs * self.width


class PairwiseSum(nn.Module):
    """The sum of the dot products of all pairs of vectors: second order of a factorisation machine.

    Rendle 2010, equation 1, in the linear time of lemma 3.1: sum_{i<j} v_i . v_j = ((sum v)^2 - sum v^2) / 2.
    """

    def forward(self, vectors_BVD: Tensor) -> Tensor:
        """[B, V, D] -> [B]."""
        return 0.5 * (vectors_BVD.sum(1).square() - vectors_BVD.square().sum(1)).sum(1)


class CompressedInteraction(nn.Module):
    """CIN, crosses of vectors of growing degree (Lian et al. 2018, equations 6 and 7).

    X^k_h = sum_ij W^{k,h}_ij X^{k-1}_i * X^0_j, element by element; the output is every X^k_h, summed
    over its D elements.

    Args:
        vectors: V, the rows of X^0.
        width: D.
        layers: rows H_k of each layer's X^k.
    """

    def __init__(self, vectors: int, width: int, layers: Sequence[int]) -> None:
        super().__init__()
        if not layers or min(layers) < 1:
            raise UserError(f"cin_layers is {list(layers)}; expected at least one layer, each 1 or wider")
        self.rows = (vectors, *layers)
        self.width = width
        self.layers = nn.ModuleList(nn.Linear(rows * vectors, out) for rows, out in itertools.pairwise(self.rows))
        self.outputs = sum(layers)

    def forward(self, vectors_BVD: Tensor) -> Tensor:
        """[B, V, D] -> [B, sum of the layers' rows]."""
        base_BDV = vectors_BVD.transpose(1, 2)
        rows_BDH, sums = base_BDV, []
        for layer, rows in zip(self.layers, self.rows[:-1], strict=True):
            # Weights times X^0 first: with fewer rows than vectors, less memory than all products of pairs.
            linear = cast(nn.Linear, layer)
            weight = linear.weight.view(-1, rows, self.rows[0])
            mixed_BDHh = (base_BDV @ weight.flatten(0, 1).T).unflatten(2, (-1, rows))
            rows_BDH = (mixed_BDHh * rows_BDH[..., None, :]).sum(3) + linear.bias
            sums.append(rows_BDH.sum(1))
        return torch.cat(sums, dim=1)

    def multiply_adds(self) -> int:
        """Per sample: weights times X^0, and the result times X^{k-1}."""
        return self.width * sum(rows * out * (self.rows[0] + 1) for rows, out in itertools.pairwise(self.rows))


@runtime_checkable
class DrawsOwnWeights(Protocol):
    """A layer whose initial weights have variances of their own."""

    def initial_variances(self) -> dict[str, float]:
        """Parameter name -> variance of its initial normal weights; 0 for those that start at zero."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter by its name."""


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Draws every dense weight of a model: a function of the seed and the layer's name alone.

    Linear: weights N(0, 2 / (in + out)), biases N(0, 1 / out), variances, as in the code published
    with Naumov et al. 2019. Layers that say their own variances get those. Tables are left as they are.
    """

    def fill(parameter: Tensor, variance: float, name: str) -> None:
        digest = hashlib.sha256(f"{seed}/dense/{name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        parameter.copy_(values.normal_(0.0, variance**0.5, generator=generator))

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not layer.weight.is_meta:
            fill(layer.weight, 2 / (layer.in_features + layer.out_features), f"{name}.weight")
            if layer.bias is not None:
                fill(layer.bias, 1 / layer.out_features, f"{name}.bias")
        elif isinstance(layer, DrawsOwnWeights):
            for parameter, variance in layer.initial_variances().items():
                weight = layer.get_parameter(parameter)
                if not weight.is_meta:
                    fill(weight, variance, f"{name}.{parameter}")
