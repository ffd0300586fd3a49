"""Training steps that benchmarks compare: ours as in ``fit``, and plain steps as in most published code.

Shape suffixes: B samples, I dense features, F tables, V vectors, D width, P pairs, n any other.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.generate.demo import KAGGLE_CARDINALITIES
from datamodules.generate.random import PRESETS
from lightning_dlrm.bench.measurement import finisher
from lightning_dlrm.contracts.batch import Batch, SparseIds
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.dcn import DCN, CrossKind
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.objectives.losses import LogLoss
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD, UpdateRule
from lightning_dlrm.tables.embeddings import TableSettings

LEARNING_RATE = 0.1
"""Learning rate of plain SGD, for all parameters, in every contender."""

Model = Literal["dlrm", "dlrm_dcn", "dcn", "dcn_v2"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and the shape of its batches."""

    tables: tuple[int, ...]
    """Rows of each table."""
    dense: int
    width: int
    bottom: tuple[int, ...] = ()
    """Widths of the bottom MLP; empty for a model without one."""
    top: tuple[int, ...] = ()
    """Hidden widths of the top MLP or of the deep network."""
    bags: tuple[int, int] | None = None
    """Fewest and most ids of a bag, with uniform ids; None for one log-uniform id a bag."""
    bag_sizes: tuple[int, ...] = ()
    """Ids of each table's bags, log-uniform; empty for ``bags``."""
    model: Model = "dlrm"
    """``dlrm_dcn`` is DLRM with 3 low-rank cross layers, the DLRM-DCNv2 of MLPerf."""
    cross_rank: int = 512
    """Rank of the cross layers of ``dlrm_dcn``."""

    @property
    def pairs(self) -> int:
        """Number of DLRM's dot products: of the vectors of all tables and the bottom MLP's."""
        return math.comb(len(self.tables) + 1, 2)

    @property
    def joined(self) -> int:
        """Width of what the top MLP, or the cross and deep networks, take."""
        if self.model == "dlrm":
            return self.width + self.pairs
        return self.width * len(self.tables) + (self.width if self.model == "dlrm_dcn" else self.dense)

    @property
    def crosses(self) -> tuple[int, int, int]:
        """Cross layers, the weights of a layer, and the numbers that a layer computes for a sample; DLRM has none."""
        n, rank = self.joined, self.cross_rank
        of_model = {"dlrm_dcn": (3, 2 * n * rank, n + rank), "dcn": (6, n, n), "dcn_v2": (6, n * n, n)}
        return of_model.get(self.model, (0, 0, 0))

    def cut(self, max_rows: int | None) -> "Workload":
        """Return the workload with no table of more than ``max_rows`` rows; None for no limit."""
        return replace(self, tables=tuple(min(rows, max_rows or rows) for rows in self.tables))

    @property
    def features(self) -> Features:
        return Features(dense=self.dense, tables={f"C{i}": rows for i, rows in enumerate(self.tables, 1)})

    def network(self, tables: TableSettings | None = None) -> CTRNetwork:
        """Return our network."""
        layers = self.crosses[0]
        if self.bottom:
            options: dict[str, Any] = {"embedding_dim": self.width, "bottom_mlp": self.bottom, "top_mlp": self.top}
            if layers:
                options |= {"interaction": "cross", "cross": "low_rank", "cross_layers": layers}
                options |= {"cross_rank": self.cross_rank}
            return DLRM(self.features, 1, tables=tables, **options)
        cross: CrossKind = "vector" if self.model == "dcn" else "matrix"
        return DCN(
            self.features, 1, embedding_dim=self.width, cross=cross, cross_layers=layers, deep=self.top, tables=tables
        )


def kaggle(max_rows: int | None = None, model: Model = "dlrm") -> Workload:
    """Return a model at Criteo Kaggle's table sizes, 540 million parameters; tables are cut to ``max_rows``."""
    bottom = (512, 256, 64, 16) if model == "dlrm" else ()
    whole = Workload(tables=KAGGLE_CARDINALITIES, dense=13, width=16, bottom=bottom, top=(512, 256), model=model)
    return whole.cut(max_rows)


def paper(max_rows: int | None = None) -> Workload:
    """Return the single-socket benchmark of Naumov et al. 2019, section 5.2; tables are cut to ``max_rows``."""
    preset = PRESETS["paper"]
    whole = Workload(
        tables=preset["tables"],
        dense=preset["dense"],
        width=64,
        bottom=(512, 64),
        top=(1024, 1024, 1024),
        bags=(preset["min_indices"], preset["indices"]),
    )
    return whole.cut(max_rows)


def nvidia(max_rows: int | None = None) -> Workload:
    """Return the DLRM of NVIDIA's DeepLearningExamples, Criteo Terabyte without values seen fewer than 15 times."""
    rows = (
        7912889, 33823, 17139, 7339, 20046, 4, 7105, 1382, 63, 5554114, 582469, 245828, 11,
        2209, 10667, 104, 4, 968, 15, 8165896, 2675940, 7156453, 302516, 12022, 97, 35,
    )  # fmt: skip
    whole = Workload(tables=rows, dense=13, width=128, bottom=(512, 256, 128), top=(1024, 1024, 512, 256))
    return whole.cut(max_rows)


def mlperf(max_rows: int | None = None) -> Workload:
    """Return MLPerf's DLRM-DCNv2, 26 billion parameters; tables are cut to ``max_rows``."""
    preset = PRESETS["mlperf"]
    whole = Workload(
        tables=preset["tables"],
        dense=preset["dense"],
        width=128,
        bottom=(512, 256, 128),
        top=(1024, 1024, 512, 256),
        bag_sizes=preset["indices"],
        model="dlrm_dcn",
    )
    return whole.cut(max_rows)


def draw_batch(workload: Workload, size: int, seed: int) -> Batch:
    """Draw a batch of a workload; a seed always gives the same batch."""
    generator = np.random.default_rng(seed)
    offsets = None
    if workload.bag_sizes:
        lengths = np.tile(workload.bag_sizes, size)
        rows_of_each = np.repeat(np.tile(workload.tables, size), lengths)
        values = np.minimum(rows_of_each ** generator.random(len(rows_of_each)) - 1, rows_of_each - 1).astype(np.int32)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    elif workload.bags is None:
        # Ids whose logarithms are uniform, so that low ids are frequent.
        columns = [np.minimum(rows ** generator.random(size) - 1, rows - 1) for rows in workload.tables]
        values = np.stack(columns, axis=1).astype(np.int32)
    else:
        fewest, most = workload.bags
        lengths = generator.integers(fewest, most + 1, size * len(workload.tables))
        rows_of_bag = np.tile(workload.tables, size)
        values = (generator.random(lengths.sum()) * np.repeat(rows_of_bag, lengths)).astype(np.int32)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    return Batch(
        label=torch.from_numpy((generator.random(size) < 0.25).astype(np.int8)),
        dense=torch.from_numpy(generator.standard_normal((size, workload.dense), dtype=np.float32)),
        ids=SparseIds(values=torch.from_numpy(values), tables=len(workload.tables), offsets=offsets),
        global_size=size,
    )


class _Step:
    """One training step: forward, loss, backward and update, without Lightning.

    Args:
        network: to be trained.
        optimizer: of the network.
        loss: gives the mean loss of a batch on the device, a 0-dim tensor.
        precision: ``32-true`` or ``bf16-mixed``.
        device: of the network.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Any], Tensor],
        precision: str,
        device: torch.device,
    ) -> None:
        self.network, self.optimizer, self._loss = network, optimizer, loss
        self._precision, self._device = precision, device

    def __call__(self, batch: Any, mark: Callable[[str], object] = lambda part: None) -> Tensor:
        """Train on a batch, which may still be in host memory, and return its loss.

        Args:
            mark: called where another part of the step begins: see ``breakdown.mark``.
        """
        mark("data")
        batch = batch.to(self._device)
        mark("update")
        self.optimizer.zero_grad()
        mark("")
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16-mixed"):
            loss = self._loss(batch)
        loss.backward()
        mark("update")
        self.optimizer.step()
        mark("")
        return loss.detach()


class OurStep(_Step):
    """The step of ``fit``; ``rule`` updates the tables, by default plain SGD."""

    def __init__(
        self, network: CTRNetwork, precision: str, device: torch.device, rule: UpdateRule | None = None
    ) -> None:
        dense = partial(torch.optim.SGD, lr=LEARNING_RATE)
        optimizer = CTROptimizer(network.dense_parameters(), network.lookups(), dense, rule or SGD(LEARNING_RATE))
        super().__init__(network, optimizer, self._mean_loss, precision, device)

    def _mean_loss(self, batch: Batch) -> Tensor:
        assert batch.label is not None
        return LogLoss().summed(self.network(batch.dense, batch.ids), batch.label) / batch.global_size


class PlainStep(_Step):
    """The step with one sparse ``nn.EmbeddingBag`` for each table and ``torch.optim.SGD``."""

    def __init__(self, network: nn.Module, precision: str, device: torch.device) -> None:
        optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
        super().__init__(network, optimizer, self._mean_loss, precision, device)

    def _mean_loss(self, batch: "PlainBatch") -> Tensor:
        logits = self.network(batch.dense, batch.ids)
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.label)


def repeat(
    step: Callable[[Any], object], batches: Iterator[Any], steps: int, device: torch.device
) -> Callable[[], None]:
    """Return a function that makes some steps on the next batches of an endless iterator, and waits for their end."""
    finish = finisher(device)

    def make() -> None:
        for _ in range(steps):
            step(next(batches))
        finish()

    return make


@dataclass(frozen=True)
class PlainBatch:
    """A batch in the form that networks with one ``nn.EmbeddingBag`` for each table take."""

    label: Tensor
    """float32 [B]."""
    dense: Tensor
    """float32 [B, I]."""
    ids: list[tuple[Tensor, Tensor]]
    """For each table: int64 ids, and the offset of each sample's first id."""

    @staticmethod
    def of(batch: Batch) -> "PlainBatch":
        """Return our batch in this form."""
        assert batch.label is not None
        if batch.ids.offsets is None:
            starts_B = torch.arange(len(batch), device=batch.dense.device)
            ids = [(values_B, starts_B) for values_B in batch.ids.values.long().T.contiguous()]
        else:
            tables = torch.arange(batch.ids.tables, device=batch.dense.device).split(1)
            bags: Any = map(batch.ids.of_tables, tables)
            ids = [(bag.values.long(), bag.offsets[:-1]) for bag in bags]
        return PlainBatch(batch.label.float(), batch.dense, ids)

    def to(self, device: torch.device) -> "PlainBatch":
        ids = [(values.to(device), starts.to(device)) for values, starts in self.ids]
        return PlainBatch(self.label.to(device), self.dense.to(device), ids)


class PlainTables(nn.Module):
    """One ``nn.EmbeddingBag`` for each table."""

    def __init__(self, tables: Sequence[int], width: int) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(
                torch.empty(rows, width).uniform_(-(rows**-0.5), rows**-0.5), freeze=False, mode="sum", sparse=True
            )
            for rows in tables
        )

    def forward(self, ids: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return F tensors [B, D]."""
        return [bag(values, starts) for bag, (values, starts) in zip(self.bags, ids, strict=True)]


class PlainDLRM(nn.Module):
    """DLRM from torch's own modules (Naumov et al. 2019, section 2)."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.tables = PlainTables(workload.tables, workload.width)
        self.bottom = _plain_mlp([workload.dense, *workload.bottom])
        self.top = _plain_mlp([workload.joined, *workload.top], 1)

    def forward(self, dense_BI: Tensor, ids: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return logits [B]."""
        bottom_BD = self.bottom(dense_BI)
        vectors_BVD = torch.stack([bottom_BD, *(vector.to(bottom_BD.dtype) for vector in self.tables(ids))], dim=1)
        products_BVV = torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2))
        i, j = torch.tril_indices(products_BVV.shape[1], products_BVV.shape[2], -1, device=products_BVV.device)
        return self.top(torch.cat([bottom_BD, products_BVV[:, i, j]], dim=1)).squeeze(1)


class PlainDCN(nn.Module):
    """Deep & Cross Network from torch's own modules: Wang et al. 2017, section 2, or 2021, equation 1 (matrices)."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        width = workload.joined
        outputs = 1 if workload.model == "dcn" else width
        self.tables = PlainTables(workload.tables, workload.width)
        self.cross = nn.ModuleList(nn.Linear(width, outputs, bias=False) for _ in range(6))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(6))
        self.deep = _plain_mlp([width, *workload.top])
        self.logit = nn.Linear(width + workload.top[-1], 1)

    def forward(self, dense_BI: Tensor, ids: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return logits [B]."""
        base_Bn = torch.cat([*self.tables(ids), dense_BI], dim=1)
        crossed_Bn = base_Bn
        for weight, bias in zip(self.cross, self.biases, strict=True):
            if weight.out_features == 1:
                crossed_Bn = base_Bn * weight(crossed_Bn) + bias + crossed_Bn
            else:
                crossed_Bn = base_Bn * (weight(crossed_Bn) + bias) + crossed_Bn
        return self.logit(torch.cat([crossed_Bn, self.deep(base_Bn)], dim=1)).squeeze(1)


def plain_network(workload: Workload) -> nn.Module:
    return PlainDLRM(workload) if workload.model == "dlrm" else PlainDCN(workload)


def _plain_mlp(widths: Sequence[int], outputs: int | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.Linear(widths[-1], outputs)] if outputs else []))
