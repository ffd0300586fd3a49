"""A small dataset in memory, for tests of what trains on one."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_dlrm.contracts.batch import Batch, SparseIds
from lightning_dlrm.contracts.schema import Column, DatasetSchema, Features, Split
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models.dcn import DCN
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.compatibility import torch_optimizer
from lightning_dlrm.optim.dense import DenseOptimizer
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import Adagrad, RowWiseAdagrad, UpdateRule
from lightning_dlrm.optim.schedules import Schedule

TABLES = {"C1": 5, "C2": 100, "C3": 3, "C4": 1000}
ROWS = {"train": 700, "validation": 300, "test": 100}


def toy_schema(tables: dict[str, int] | None = None, protocol: str = "toy") -> DatasetSchema:
    tables = tables or TABLES
    return DatasetSchema(
        dataset="toy",
        protocol=protocol,
        columns=(
            Column(name="label", role="label"),
            Column(name="I1", role="dense"),
            Column(name="I2", role="dense"),
            *(Column(name=name, role="categorical", cardinality=rows) for name, rows in tables.items()),
        ),
        splits={name: Split(rows=rows) for name, rows in ROWS.items()},
    )


def toy_batch(size: int, seed: int, tables: dict[str, int] | None = None) -> Batch:
    """Random rows whose label depends on them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(list((tables or TABLES).values()))
    dense = torch.rand(size, 2, generator=generator)
    ids = (torch.rand(size, len(sizes), generator=generator) ** 2 * sizes).int()
    chance = torch.sigmoid(4 * dense[:, 0] - 2 + (ids[:, 0] == 0) * (ids[:, 1] % 2 * 2.0 - 1))
    label = (torch.rand(size, generator=generator) < chance).to(torch.int8)
    return Batch(
        label=label,
        dense=dense,
        ids=SparseIds(values=ids, tables=len(sizes)),
        global_size=size,
        rows=torch.arange(size),
    )


class ToyLoader:
    """Batches of a split; remembers where it is, as the stream does."""

    def __init__(self, split: str, batch_size: int) -> None:
        rows = ROWS[split]
        seeds = {"train": 0, "validation": 10_000, "test": 20_000}[split]
        self.batches = [toy_batch(min(batch_size, rows - start), seeds + start) for start in range(0, rows, batch_size)]
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning counts the batches, so that an epoch's generator is not always run to its end.
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class ToyData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 50, schema: DatasetSchema | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.schema = schema or toy_schema()

    def train_dataloader(self) -> ToyLoader:
        return ToyLoader("train", self.batch_size)

    def val_dataloader(self) -> ToyLoader:
        return ToyLoader("validation", self.batch_size)

    def test_dataloader(self) -> ToyLoader:
        return ToyLoader("test", self.batch_size)

    def predict_dataloader(self) -> ToyLoader:
        return ToyLoader("test", self.batch_size)


def toy_dlrm(features: Features, seed: int) -> DLRM:
    return DLRM(features, seed, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8])


def wide_dlrm(features: Features, seed: int) -> DLRM:
    return DLRM(features, seed, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8], wide=True)


def toy_dcn(features: Features, seed: int) -> DCN:
    return DCN(features, seed, embedding_dim=4, cross_layers=2, deep=[8])


def toy_module(
    network: Any = toy_dlrm,
    table_rule: UpdateRule | None = None,
    dense: DenseOptimizer | UpdateRule | None = None,
    schedule: Schedule | None = None,
    schema: DatasetSchema | None = None,
    seed: int = 3,
    wide_rule: UpdateRule | None = None,
    **options: Any,
) -> CTRModule:
    return CTRModule(
        network,
        table_rule or RowWiseAdagrad(0.1),
        as_dense(dense or Adagrad(0.05)),
        schedule,
        wide_optimizer=wide_rule,
        **options,
        schema=schema or toy_schema(),
        seed=seed,
    )


def optimizer_of(network: CTRNetwork, dense: DenseOptimizer | UpdateRule, table_rule: UpdateRule) -> CTROptimizer:
    lookups = network.lookups()
    rule = None if any(lookup.dense_gradients for lookup in lookups) else table_rule
    return CTROptimizer(network.dense_parameters(), lookups, as_dense(dense), rule)


def as_dense(given: DenseOptimizer | UpdateRule) -> DenseOptimizer:
    """The class of torch.optim that does to dense layers what a rule does to rows; Adagrad for RowWiseAdagrad."""
    if not isinstance(given, UpdateRule):
        return given
    name, arguments = torch_optimizer(type(given).__name__.removeprefix("RowWise"), vars(given))
    return partial(getattr(torch.optim, name), **arguments)
