"""Dense layers of the models, and their initial parameters.

Shape suffixes: B samples, I dense features, d features, V vectors, D their width, P pairs, H rows of a
CIN layer.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.kernels import dense
from lightning_dlrm.kernels.choice import Kernels, choose
from lightning_dlrm.models.fused import fused_mlp, fusible_layers, pair_products


class MLP(nn.Sequential):
    """Linear layers with a ReLU after each; the last ReLU is left out with ``linear_output``.

    Args:
        widths: widths of the input and of every layer's output; at least two.
        linear_output: leave the last layer without a ReLU.
        batch_norm: normalize over the batch between each linear layer and its ReLU (Ioffe and Szegedy
            2015, algorithm 1), but not after a last layer without a ReLU. Each rank normalizes over its own slice of
            the batch; with trainer.sync_batchnorm over the whole batch.
        norm_output: whether ``batch_norm`` concerns the last layer too, if that has a ReLU.
        dropout: share of each hidden layer's outputs, after the ReLU, that training sets to 0 at random
            (Srivastava et al. 2014, section 4; other outputs are multiplied by 1 / (1 - dropout)).
    """

    kernels: Kernels = "auto"
    """The code of the ReLUs and of the backward pass."""

    def __init__(
        self,
        widths: Sequence[int],
        linear_output: bool = False,
        batch_norm: bool = False,
        dropout: float = 0.0,
        norm_output: bool = True,
    ) -> None:
        require(0 <= dropout < 1, f"dropout is {dropout}; expected 0 or more, below 1")
        require(
            len(widths) >= 2 and min(widths) >= 1,
            f"dense layers' widths {list(widths)}: expected an input and at least one layer, each 1 or wider",
        )
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            normalize = [BatchNorm(width_out)] if batch_norm else []
            drop = [Dropout(dropout)] if dropout else []
            layers += [nn.Linear(width_in, width_out), *normalize, nn.ReLU(), *drop]
        if linear_output:
            del layers[-1 - bool(batch_norm) - bool(dropout) :]
        elif batch_norm and not norm_output:
            del layers[-2 - bool(dropout)]
        super().__init__(*layers)

    def forward(self, x_Bd: Tensor) -> Tensor:
        """Return the output of the last layer: [B, d] -> [B, width of the last layer].

        Linear layers and ReLUs run in one fused pass if ``fusible_layers`` allows it.
        """
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
        """Return the multiply-adds of a sample."""
        return sum(a * b for a, b in itertools.pairwise(self.widths))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization that uses the running statistics if a batch has fewer than two samples."""

    sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    """Differentiable sum of a tensor over the ranks; with it, training normalizes over the global batch, and without it
    over this rank's slice."""

    def forward(self, x_Bd: Tensor) -> Tensor:
        """Return the normalized features: [B, d] -> [B, d]."""
        if self.training and self.sum_over_ranks is not None:
            return self._over_ranks(x_Bd, self.sum_over_ranks)
        if self.training and len(x_Bd) < 2:
            return nn.functional.batch_norm(
                x_Bd, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(x_Bd)

    def _over_ranks(self, x_Bd: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        wide_Bd = x_Bd if x_Bd.dtype == torch.float64 else x_Bd.float()
        sums = sum_over_ranks(torch.cat([wide_Bd.sum(0), wide_Bd.new_tensor([float(len(x_Bd))])]))
        samples, is_few = sums[-1], sums[-1] < 2
        mean_d = torch.where(is_few, self.running_mean, sums[:-1] / samples)
        # The mean first: sums of squares of uncentered values would lose digits.
        variance_d = sum_over_ranks((wide_Bd - mean_d).square().sum(0)) / samples
        variance_d = torch.where(is_few, self.running_var, variance_d)
        with torch.no_grad():
            unbiased_d = torch.where(is_few, variance_d, variance_d * samples / (samples - 1).clamp(min=1))
            self.running_mean.lerp_(mean_d.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased_d.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        scaled_Bd = (wide_Bd - mean_d) * (variance_d + self.eps).rsqrt() * self.weight + self.bias
        return scaled_Bd.to(x_Bd.dtype)


class Dropout(nn.Dropout):
    """Dropout whose masks can be a function of a sample's position in the training.

    After ``seek`` the mask of a sample depends on the key and the sample's position in the global batch, so that the
    masks of a global batch are the same in any slices, on any number of ranks. Without it they come from torch's
    random numbers, as in ``nn.Dropout``.

    Args:
        p: share of the values that training sets to 0; others are multiplied by 1 / (1 - p).
    """

    position: Tensor

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        self.is_placed = False
        # Tensors, because a compiled step would be compiled again for every new Python number.
        self.register_buffer("position", torch.zeros(2, dtype=torch.int32), persistent=False)

    def seek(self, key: int, start: int) -> None:
        """Set the key, 0 to 2**31 - 1, and the position in the global batch of the next slice's first sample."""
        self.is_placed = True
        self.position[0] = key
        self.position[1] = start

    def forward(self, x_Bd: Tensor) -> Tensor:
        """Return the values, of which training sets some to 0: [B, d] -> [B, d]."""
        if not self.training or not self.is_placed or self.p == 0:
            return super().forward(x_Bd)
        samples, width = x_Bd.shape
        sample_B = torch.arange(samples, dtype=torch.int32, device=x_Bd.device) + self.position[1]
        row_B = _mixed(_mixed(sample_B) + self.position[0])
        column_d = _mixed(torch.arange(width, dtype=torch.int32, device=x_Bd.device) + _COLUMNS)
        drawn_Bd = _mixed(row_B[:, None] + column_d) & 0x7FFFFFFF
        kept_Bd = drawn_Bd >= int(self.p * 2**31)
        return x_Bd * kept_Bd * (1 / (1 - self.p))


_COLUMNS = 1 << 30
"""Keeps the random bits of column numbers apart from those of sample positions."""


def _mixed(values: Tensor) -> Tensor:
    """Return 32 random bits of each value: int32 -> int32, the finalizer lowbias32 (Wellons 2018).

    Sums and products of int32 are modulo 2**32 in torch, and the masks make its shifts logical ones.
    """
    values = (values ^ ((values >> 16) & 0xFFFF)) * 0x7FEB352D
    values = (values ^ ((values >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return values ^ ((values >> 16) & 0xFFFF)


def place_dropout(layers: Sequence[Dropout], seed: int, batch: str, start: int) -> None:
    """Set the masks of a network's Dropout layers for a slice of a global batch.

    Args:
        layers: the layers, in the same order in every step.
        seed: seed of the training.
        batch: what names the global batch in the training.
        start: position in it of the slice's first sample.
    """
    for number, layer in enumerate(layers):
        digest = hashlib.sha256(f"{seed}/dropout/{batch}/{number}".encode()).digest()
        layer.seek(int.from_bytes(digest[:4], "little") >> 1, start)


class MissingValues(nn.Module):
    """Replacement of missing dense values (NaN) by a number.

    The number is 0, or with ``learned`` a parameter a_i of feature i, which starts at 0. A learned number has the same
    effect as 0 and an indicator of missing values with a_i times the feature's weight.

    Args:
        features: I.
        learned: whether the numbers are learned.
    """

    def __init__(self, features: int, learned: bool) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(features)) if learned else None

    def forward(self, dense_BI: Tensor) -> Tensor:
        """Return the features without NaN: [B, I] -> [B, I]."""
        if self.value is None:
            # Infinite values stay, so that the loss becomes infinite or NaN and is reported.
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
    """The code of the products."""

    def __init__(self, vectors: int, width: int, self_interaction: bool = False) -> None:
        super().__init__()
        self.width = width
        i, j = torch.tril_indices(vectors, vectors, 0 if self_interaction else -1, device="cpu")
        self.register_buffer("pairs", i * vectors + j, persistent=False)
        mirrored = torch.zeros(vectors, vectors, dtype=torch.int64, device="cpu")
        mirrored[i, j] = mirrored[j, i] = torch.arange(len(i), device="cpu")
        self.register_buffer("mirrored", mirrored.flatten(), persistent=False)
        self._self_interaction = self_interaction

    def forward(self, first_BD: Tensor | None, others_Bn: Tensor) -> Tensor:
        """Return the first vector and the products, in the first vector's dtype: [B, D + P].

        Args:
            first_BD: the first vector; None to return the products of the others alone.
            others_Bn: [B, (V - 1) * D], the other vectors; [B, V * D] without the first one.
        """
        if first_BD is None:
            vectors_BVD = others_Bn.unflatten(1, (-1, self.width))
            return torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        if not self.pairs.numel():  # there is one vector
            return first_BD
        others_BVD = others_Bn.unflatten(1, (-1, self.width))
        if torch.compiler.is_compiling():
            # Compilers fuse plain operations, and an exported network must not need our kernels.
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
        """Return the multiply-adds of a sample, of the returned pairs only."""
        return self.pairs.numel() * self.width


class ProjectionInteraction(nn.Module):
    """Dot products of two sets of vectors, each made from all vectors by an MLP of its own.

    The projection architecture of torchrec's DLRM: the MLPs make F1 and F2 vectors, whose F1 * F2 pairs replace all
    V (V - 1) / 2 pairs. The second MLP's output is read as [D, F2].

    Args:
        vectors: V.
        width: D.
        branches: widths of the two MLPs' layers; the last widths are multiples of D.
    """

    def __init__(self, vectors: int, width: int, branches: Sequence[Sequence[int]]) -> None:
        super().__init__()
        require(
            len(branches) == 2,
            f"projection is {branches}; expected two lists of widths, such as [[512, 64], [512, 64]]",
        )
        for branch in branches:
            require(
                branch and branch[-1] % width == 0,
                f"a projection branch ends in {branch[-1] if branch else 'nothing'} and embedding_dim is {width}: "
                f"its output is cut into vectors, so end in a multiple of {width}",
            )
        self.width = width
        self.left, self.right = (MLP([vectors * width, *branch]) for branch in branches)
        self.outputs = branches[0][-1] // width * (branches[1][-1] // width)

    def forward(self, joined_Bn: Tensor) -> Tensor:
        """Return the products of all pairs of the two sets: [B, V * D] -> [B, F1 * F2]."""
        left_BFD = self.left(joined_Bn).unflatten(1, (-1, self.width))
        right_BDF = self.right(joined_Bn).unflatten(1, (self.width, -1))
        return torch.bmm(left_BFD, right_BDF).flatten(1)

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample."""
        return self.left.multiply_adds() + self.right.multiply_adds() + self.outputs * self.width


class PairwiseSum(nn.Module):
    """The sum of the dot products of all pairs of vectors, the second order of a factorization machine.

    Rendle 2010, equation 1, in the linear time of lemma 3.1: sum_{i<j} v_i . v_j = ((sum v)^2 - sum v^2) / 2.
    """

    def forward(self, vectors_BVD: Tensor) -> Tensor:
        """Return the sum of the products: [B, V, D] -> [B]."""
        return 0.5 * (vectors_BVD.sum(1).square() - vectors_BVD.square().sum(1)).sum(1)


class CompressedInteraction(nn.Module):
    """Compressed interaction network (CIN): crosses of vectors of growing degree (Lian et al. 2018, equations 6 and 7).

    X^k_h = sum_ij W^{k,h}_ij X^{k-1}_i * X^0_j, element by element; the output is every X^k_h, summed
    over its D elements.

    Args:
        vectors: V, the rows of X^0.
        width: D.
        layers: rows H_k of each layer's X^k.
    """

    def __init__(self, vectors: int, width: int, layers: Sequence[int]) -> None:
        super().__init__()
        require(
            layers and min(layers) >= 1, f"cin_layers is {list(layers)}; expected at least one layer, each 1 or wider"
        )
        self.rows = (vectors, *layers)
        self.width = width
        self.layers = nn.ModuleList(nn.Linear(rows * vectors, out) for rows, out in itertools.pairwise(self.rows))
        self.outputs = sum(layers)

    def forward(self, vectors_BVD: Tensor) -> Tensor:
        """Return the crosses of every layer, summed over D: [B, V, D] -> [B, sum of the layers' rows]."""
        base_BDV = vectors_BVD.transpose(1, 2)
        rows_BDH, sums = base_BDV, []
        for layer, rows in zip(self.layers, self.rows[:-1], strict=True):
            # The product of weights and X^0 takes less memory than all products of pairs if H is below V.
            linear = cast(nn.Linear, layer)
            weight = linear.weight.view(-1, rows, self.rows[0])
            mixed_BDHh = (base_BDV @ weight.flatten(0, 1).T).unflatten(2, (-1, rows))
            rows_BDH = (mixed_BDHh * rows_BDH[..., None, :]).sum(3) + linear.bias
            sums.append(rows_BDH.sum(1))
        return torch.cat(sums, dim=1)

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample: weights times X^0, and the result times X^{k-1}."""
        return self.width * sum(rows * out * (self.rows[0] + 1) for rows, out in itertools.pairwise(self.rows))


@runtime_checkable
class HasInitialVariances(Protocol):
    """A layer that defines the variances of its initial parameters."""

    def initial_variances(self) -> dict[str, float]:
        """Return the variance of the initial normal values of each parameter; 0 for parameters that start at zero."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter by its name."""


@runtime_checkable
class HasXavierVariances(Protocol):
    """A layer with other variances of its initial parameters in ``initialize`` with ``xavier``."""

    def xavier_variances(self) -> dict[str, float]:
        """Return the variance of the initial normal values of some parameters."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter by its name."""


@torch.no_grad()
def initialize(module: nn.Module, seed: int, xavier: bool = False) -> None:
    """Draw the initial dense parameters of a model as a function of the seed and the layers' names.

    Linear layers get weights N(0, 2 / (in + out)) and biases N(0, 1 / out), given as variances, as in the code
    published with Naumov et al. 2019. Other layers get the variances of ``initial_variances``. Tables do not change.

    Args:
        module: the model.
        seed: the seed.
        xavier: draw as FuxiCTR does: all weights Xavier normal (Glorot and Bengio 2010, equation 12), also the vectors
            and linear weights of dense features; biases of linear layers zero.
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
                fill(layer.bias, 0.0 if xavier else 1 / layer.out_features, f"{name}.bias")
        elif xavier and isinstance(layer, HasXavierVariances):
            for parameter, variance in layer.xavier_variances().items():
                weight = layer.get_parameter(parameter)
                if not weight.is_meta:
                    fill(weight, variance, f"{name}.{parameter}")
        elif isinstance(layer, HasInitialVariances):
            for parameter, variance in layer.initial_variances().items():
                weight = layer.get_parameter(parameter)
                if not weight.is_meta:
                    fill(weight, variance, f"{name}.{parameter}")
