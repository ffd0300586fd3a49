"""Cases of FuxiCTR's training runs: their model in this project, and where each of their arrays is in it.

``shared/golden_fuxictr/README.md`` defines every array.
"""

import itertools
import json
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import Batch, SparseIds
from lightning_dlrm.contracts.schema import Column, DatasetSchema, Split
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models.layers import BatchNorm
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.objectives.losses import ProbabilityLogLoss
from lightning_dlrm.objectives.regularization import Regularization
from lightning_dlrm.tables.embeddings import TableSettings
from tests.parity.layouts import RULES, Change
from tests.parity.networks import MODELS

DENSE_LAST = ("DeepFM", "xDeepFM")
"""Models that are older here than these files: their dense features come after the columns, in FuxiCTR before them."""


class Place(NamedTuple):
    """Where an array of FuxiCTR's is in our network."""

    tensor: Tensor
    """A parameter or a buffer."""
    view: Change
    """The part of it that is the array."""
    change: Change
    """The array in our layout."""


class Case:
    """One file.

    Args:
        path: an npz file.
    """

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as archive:
            self.meta: dict[str, Any] = json.loads(str(archive["meta"]))
            self.arrays = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "meta"}
        self.dim: int = self.meta["embedding_dim"]
        self.columns: list[str] = self.meta["categorical_features"]
        self.dense: list[str] = self.meta["numeric_features"]
        order, dense_last = self.meta["field_order"], self.meta["model"] in DENSE_LAST
        ours = [*self.columns, *self.dense] if dense_last else [*self.dense, *self.columns]
        self.fields = torch.tensor([order.index(name) for name in ours])
        self.features = (self.fields[:, None] * self.dim + torch.arange(self.dim)).flatten()

    @property
    def params(self) -> dict[str, Any]:
        """FuxiCTR's own options of the model."""
        return self.meta["model_params"]

    def schema(self) -> DatasetSchema:
        return DatasetSchema(
            dataset="fuxictr",
            protocol="fuxictr",
            columns=(
                Column(name="label", role="label"),
                *(Column(name=name, role="dense") for name in self.dense),
                *(
                    Column(name=name, role="categorical", cardinality=rows)
                    for name, rows in zip(self.columns, self.meta["tables"], strict=True)
                ),
            ),
            splits={"train": Split(rows=64), "validation": Split(rows=64), "test": Split(rows=64)},
        )

    def module(self) -> CTRModule:
        """The model under training, with the initial arrays."""
        kind, options = MODELS[self.meta["model"]](self)
        settings = TableSettings(dense_gradients=True, padding_row=self.meta["padding_idx"])
        adam = self.meta["optimizer"]
        assert adam["name"] == "Adam" and not adam["weight_decay"] and not adam["amsgrad"]
        module = CTRModule(
            partial(kind, embedding_dim=self.dim, tables=settings, **options),
            None,
            partial(torch.optim.Adam, lr=adam["lr"], betas=tuple(adam["betas"]), eps=adam["eps"]),
            loss=ProbabilityLogLoss(),
            regularization=Regularization(
                **norms("fields", self.meta["embedding_regularizer"]), **norms("network", self.meta["net_regularizer"])
            ),
            schema=self.schema(),
        )
        module.configure_model()
        self.load(module.network, "init")
        return module

    def batch(self, kind: str, index: Any) -> Batch:
        """A batch of the arrays ``dense``, ``ids`` and ``labels`` with a prefix such as ``eval_``."""
        ids_BF = self.arrays[f"{kind}ids"][index].to(torch.int32)
        dense = self.arrays.get(f"{kind}dense")
        label = self.arrays.get(f"{kind}labels")
        return Batch(
            label=None if label is None else label[index].to(torch.int8),
            dense=torch.zeros(len(ids_BF), 0) if dense is None else dense[index].float(),
            ids=SparseIds(values=ids_BF, tables=len(self.columns)),
            global_size=len(ids_BF),
        )

    def places(self, network: CTRNetwork) -> dict[str, Place]:
        """Where each array is; all of ``meta.state_arrays``."""
        found = {name: self.place(network, name) for name in self.meta["state_arrays"]}
        of_fields = {id(parameter) for parameter in network.field_parameters()}
        for name, place in found.items():
            assert ("embedding_layers." in name) == (id(place.tensor) in of_fields), name
        return found

    def place(self, network: CTRNetwork, name: str) -> Place:
        if match := re.search(r"embedding_layers\.(\w+)\.weight", name):
            return self.field(network, name, match[1])
        ours, change = RULES[self.meta["model"]](self, name)
        key, *index = ours.split("[")
        tensor = network.state_dict(keep_vars=True)[key]
        return Place(tensor, (lambda t: t[int(index[0].rstrip("]"))]) if index else lambda t: t, change)

    def field(self, network: CTRNetwork, name: str, feature: str) -> Place:
        """The vectors or the linear weights of a field."""
        gate = re.search(r"fs(\d)_ctx", name)
        purpose = "linear" if "lr_layer" in name else f"gate{gate[1]}" if gate else ""
        if feature in self.columns:
            table = f"{feature}/{purpose}".rstrip("/")
            lookup, piece = next((k, p) for k in network.lookups() for p in k.pieces if p.name == table)
            return Place(lookup.weight, piece.of, lambda t: t)
        row = self.dense.index(feature)
        if gate:
            row = [f for f in self.meta["field_order"] if f in self.params[f"fs{gate[1]}_context"]].index(feature)
        state = network.state_dict(keep_vars=True)
        keys = {
            "linear": ("linear.weight", "wide.weight"),
            "": ("fields.dense", "dense_vectors.weight"),
        }.get(purpose, (f"{purpose}.dense.weight",))
        weight = next(state[key] for key in keys if key in state)
        return Place(weight, lambda t: t[row], lambda t: t.squeeze())

    @torch.no_grad()
    def load(self, network: CTRNetwork, moment: str) -> None:
        """Copy the arrays of a moment, init or final, into the network."""
        places = self.places(network)
        state = network.state_dict(keep_vars=True)
        ours = {id(tensor): name for name, tensor in state.items() if tensor.numel()}
        missing = set(ours.values()) - {ours[id(place.tensor)] for place in places.values()}
        assert not missing, f"no array of FuxiCTR's is {', '.join(missing)}"
        for name, (tensor, view, change) in places.items():
            view(tensor).copy_(change(self.arrays[f"{moment}/{name}"]))

    def noisy(self, network: CTRNetwork) -> set[int]:
        """Biases before a BatchNorm, whose gradient is zero but for rounding, and the running means behind them."""
        found: set[int] = set()
        for module in network.modules():
            layers = list(module) if isinstance(module, torch.nn.Sequential) else []
            for layer, after in itertools.pairwise(layers):
                if isinstance(after, BatchNorm):
                    found |= {id(layer.bias), id(after.running_mean)}
        return found


def norms(prefix: str, given: Any) -> dict[str, float]:
    """Our options of one of FuxiCTR's regularizers: a number, pairs (p, lambda), or text such as l1_l2(1e-5,1e-3)."""
    if isinstance(given, str):
        values = [float(value) for value in given[given.index("(") + 1 : -1].split(",")]
        given = list(zip([int(p) for p in re.findall(r"l(\d)", given)], values, strict=True))
    pairs = [(2, given)] if isinstance(given, (int, float)) else given or []
    return {f"{prefix}_l{p}": float(value) for p, value in pairs}
