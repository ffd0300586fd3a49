"""The dense layers that every model is made of, and how they start.

Shape suffixes: B samples, d features, V vectors, D their width, P pairs.
"""

import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.models.cross import CrossNetwork


class MLP(nn.Sequential):
    """Linear layers with a ReLU after each; after the last one too unless ``linear_output``.

    Args:
        widths: of the input and of every layer's output; at least two.
        linear_output: leave the last layer without a ReLU.
    """

    def __init__(self, widths: Sequence[int], linear_output: bool = False) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise UserError(f"MLP widths {list(widths)}: expected an input and at least one layer, each 1 or wider")
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        super().__init__(*(layers[:-1] if linear_output else layers))

    def linears(self) -> list[nn.Linear]:
        return [layer for layer in self if isinstance(layer, nn.Linear)]

    def multiply_adds(self) -> int:
        """Per sample."""
        return sum(a * b for a, b in itertools.pairwise(self.widths))


class DotInteraction(nn.Module):
    """Dot products of all pairs of vectors (Naumov et al. 2019, section 2.1.3).

    The pairs (i, j), j < i, come row by row; with ``self_interaction`` j <= i.
    """

    pairs: Tensor

    def __init__(self, vectors: int, width: int, self_interaction: bool = False) -> None:
        super().__init__()
        self.width = width
        i, j = torch.tril_indices(vectors, vectors, 0 if self_interaction else -1, device="cpu")
        self.register_buffer("pairs", i * vectors + j, persistent=False)

    def forward(self, vectors_BVD: Tensor) -> Tensor:
        """[B, V, D] -> [B, P]."""
        products_BVV = torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2))
        return products_BVV.flatten(1).index_select(1, self.pairs)

    def multiply_adds(self) -> int:
        """Per sample; only the pairs that are kept count."""
        return self.pairs.numel() * self.width


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Draws every dense weight of a model: a function of the seed and the layer's name alone.

    Linear: weights N(0, 2 / (in + out)), biases N(0, 1 / out), variances, as in the code published
    with Naumov et al. 2019. Cross networks: Xavier normal weights, zero biases. Tables are left as
    they are.
    """

    def fill(parameter: Tensor, variance: float, name: str) -> None:
        digest = hashlib.sha256(f"{seed}/dense/{name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        parameter.copy_(values.normal_(0.0, variance**0.5, generator=generator))

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not layer.weight.is_meta:
            fill(layer.weight, 2 / (layer.in_features + layer.out_features), f"{name}.weight")
            fill(layer.bias, 1 / layer.out_features, f"{name}.bias")
        elif isinstance(layer, CrossNetwork):
            for parameter, variance in layer.initial_variances().items():
                weight = layer.get_parameter(parameter)
                if not weight.is_meta:
                    fill(weight, variance, f"{name}.{parameter}")
