"""Fits of small networks over ranks, for test_sharded: run in each rank's process, and alone in the test's own.

``python -m tests.sharded_fits FOLDER`` runs those of four, three and two ranks one after the other, and with ``slow``
after the folder, those of the slow tests. Every rank of each number is a process of its own, forked from one that has
imported everything.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from torch import Tensor

from lightning_dlrm.contracts.batch import Batch, SparseIds
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.engine.batch_norm import SyncBatchNorm
from lightning_dlrm.engine.checkpointing import FolderCheckpointIO, RunCheckpoints
from lightning_dlrm.engine.metrics_logger import MetricsLogger
from lightning_dlrm.engine.strategy import EmbeddingShardedDDP
from lightning_dlrm.models.dcn import DCN
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule
from lightning_dlrm.sharding.collectives import Ranks, reserve_port
from lightning_dlrm.sharding.plan import Piece, Plan
from lightning_dlrm.tables.embeddings import QuotientRemainder, TableSettings
from lightning_dlrm.tracking.run_folder import JsonLinesLogger, RunFolder
from tests.ranks import environment
from tests.toy import TABLES, toy_dcn, toy_dlrm, toy_module, toy_schema, wide_dlrm

STEPS = 10
GLOBAL_BATCH = 24
RULES: dict[str, Any] = {
    "sgd": lambda: SGD(0.5),
    "plain_sgd": lambda: SGD(1.0),
    "adagrad": lambda: Adagrad(0.1),
    "row_wise": lambda: RowWiseAdagrad(0.1),
    "adam": lambda: Adam(0.02),
}


def many_lookups(features: Features, seed: int) -> DLRM:
    """Tables of several widths, some split in two, and a learned factor for every row."""
    tables = TableSettings(
        dims={"C2": 2},
        project=True,
        quotient_remainder=QuotientRemainder(collisions=10, threshold=500),
        pooling="mean",
        pooling_weights="learned",
    )
    return DLRM(features, seed, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8], tables=tables)


def means(features: Features, seed: int) -> DLRM:
    tables = TableSettings(dims={"C2": 2}, project=True, pooling="mean")
    return DLRM(features, seed, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8], tables=tables)


def with_dropout(features: Features, seed: int) -> DLRM:
    return DLRM(features, seed, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8], dropout=0.5)


def with_batch_norm(features: Features, seed: int) -> DCN:
    return DCN(features, seed, embedding_dim=4, cross_layers=2, deep=[8, 4], batch_norm=True, dropout=0.3)


def with_own_dropout(features: Features, seed: int) -> DLRM:
    """A network with torch's dropout, whose masks each rank draws for itself."""
    network = DLRM(features, seed, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8])
    network.top.insert(2, torch.nn.Dropout(0.5))
    return network


def some_on_host(features: Features, seed: int) -> DLRM:
    tables = TableSettings(on_host=["C2", "C4"])
    return DLRM(features, seed, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8], tables=tables)


def cut(features: Features, seed: int) -> DLRM:
    tables = TableSettings(on_host={"C2": 10, "C4": 100})
    return DLRM(features, seed, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8], tables=tables)


NETWORKS: dict[str, Any] = {
    "dlrm": toy_dlrm,
    "dcn": toy_dcn,
    "many": many_lookups,
    "means": means,
    "host": some_on_host,
    "cut": cut,
    "dropout": with_dropout,
    "own_dropout": with_own_dropout,
    "batch_norm": with_batch_norm,
    "wide": wide_dlrm,
}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One fit; ``name`` is its folder."""

    name: str
    rule: str
    plan: str
    wide_rule: str | None = None
    hot: str = "one"
    precision: Any = "64-true"
    steps: int = STEPS
    network: str = "dlrm"
    resume_from: str | None = None
    wire: Any = "full"
    pooled: tuple[str, ...] = ()
    """Tables that are summed where their rows are."""
    recorded: bool = False
    """Whether every step is logged, as a fit of the command line would; else only losses are kept."""
    trainer: tuple[tuple[str, Any], ...] = ()


PARITY = (
    Fit(name="sgd_whole", rule="sgd", plan="whole"),
    Fit(name="sgd_ranges_multi", rule="sgd", plan="ranges", hot="multi"),
    Fit(name="adagrad_ranges", rule="adagrad", plan="ranges", recorded=True),
    Fit(name="adagrad_mixed_weighted", rule="adagrad", plan="mixed", hot="weighted", network="dcn", recorded=True),
    Fit(name="row_wise_mixed", rule="row_wise", plan="mixed", network="dcn"),
    Fit(name="row_wise_whole_multi", rule="row_wise", plan="whole", hot="multi"),
    Fit(name="adam_mixed", rule="adam", plan="mixed"),
    Fit(name="many_lookups_weighted", rule="adam", plan="auto", hot="weighted", network="many"),
    Fit(name="wide", rule="row_wise", wide_rule="adam", plan="auto", network="wide"),
    Fit(
        name="clipped_accumulated",
        rule="row_wise",
        plan="auto",
        trainer=(("accumulate_grad_batches", 3), ("gradient_clip_val", 0.05)),
    ),
    Fit(
        name="pooled_ranges_weighted",
        rule="adam",
        plan="ranges",
        hot="weighted",
        pooled=("C1", "C2", "C3", "C4"),
        recorded=True,
    ),
    Fit(
        name="pooled_mixed_means",
        rule="row_wise",
        plan="mixed",
        hot="multi",
        pooled=("C2", "C4"),
        network="means",
        recorded=True,
        trainer=(("accumulate_grad_batches", 2), ("gradient_clip_val", 0.05)),
    ),
    Fit(name="dropout", rule="sgd", plan="auto", network="dropout"),
    Fit(
        name="batch_norm",
        rule="adagrad",
        plan="auto",
        network="batch_norm",
        trainer=(("accumulate_grad_batches", 2), ("sync_batchnorm", True)),
    ),
    Fit(name="host_auto", rule="adagrad", plan="auto", network="host", recorded=True),
    Fit(name="hot_rows_weighted", rule="adam", plan="auto", hot="weighted", network="cut"),
    Fit(
        name="host_pooled_weighted",
        rule="adam",
        plan="mixed",
        hot="weighted",
        pooled=("C1", "C4"),
        network="host",
        trainer=(("accumulate_grad_batches", 2),),
    ),
)
FIRST_STEP = Fit(name="float32", rule="plain_sgd", plan="mixed", precision="32-true", steps=1)
BF16 = Fit(name="bf16", rule="row_wise", plan="ranges", precision="bf16-mixed", steps=10, wire="bf16")
HALF = Fit(name="half", rule="row_wise", plan="mixed", hot="multi", steps=STEPS // 2)
RESUMED = Fit(name="resumed", rule="row_wise", plan="ranges", hot="multi", resume_from="half/checkpoints/last")
WIDE_HALF = Fit(name="wide_half", rule="row_wise", wide_rule="adam", plan="auto", network="wide", steps=STEPS // 2)
WIDE_RESUMED = replace(WIDE_HALF, name="wide_resumed", steps=STEPS, resume_from="wide_half/checkpoints/last")


OWN_DROPOUT = (
    Fit(name="own_dropout", rule="sgd", plan="auto", network="own_dropout"),
    Fit(name="own_half", rule="sgd", plan="auto", network="own_dropout", steps=STEPS // 2),
    Fit(name="own_resumed", rule="sgd", plan="auto", network="own_dropout", resume_from="own_half/checkpoints/last"),
)


def plan_of(kind: str, ranks: int, pooled: tuple[str, ...] = ()) -> Plan | None:
    """Whole tables; ranges on all ranks; or both, with the first rank left empty where there are three."""
    if kind == "auto":
        return None
    pieces = []
    for i, (name, rows) in enumerate(TABLES.items()):
        if kind == "whole" or (kind == "mixed" and i % 2 == 0):
            pieces.append(Piece(table=name, start=0, stop=rows, rank=ranks - 1 - i % min(ranks, 2)))
            continue
        owners = list(range(ranks)) if kind == "ranges" else list(range(ranks - 1, 0 if ranks > 2 else -1, -1))
        # More ranges than rows leave some ranks without one.
        cuts = [rows * n // len(owners) for n in range(len(owners) + 1)]
        pieces += [
            Piece(table=name, start=a, stop=b, rank=owner)
            for owner, a, b in zip(owners, cuts, cuts[1:], strict=False)
            if a < b
        ]
    return Plan(ranks=ranks, pieces=tuple(pieces), pooled=pooled)


def global_batch(index: int, hot: str) -> Batch:
    """Rows of which many look up the same few rows."""
    generator = torch.Generator().manual_seed(index)
    sizes = torch.tensor(list(TABLES.values()))
    dense = torch.rand(GLOBAL_BATCH, 2, generator=generator)
    label = (torch.rand(GLOBAL_BATCH, generator=generator) < dense[:, 0]).to(torch.int8)
    if hot == "one":
        values = (torch.rand(GLOBAL_BATCH, len(sizes), generator=generator) ** 3 * sizes).int()
        ids = SparseIds(values=values, tables=len(sizes))
    else:
        lengths = torch.randint(0, 5, (GLOBAL_BATCH * len(sizes),), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        bags = torch.repeat_interleave(lengths)
        values = (torch.rand(len(bags), generator=generator) ** 3 * sizes[bags % len(sizes)]).int()
        weights = torch.rand(len(bags), generator=generator) if hot == "weighted" else None
        ids = SparseIds(values=values, tables=len(sizes), offsets=offsets, weights=weights)
    return Batch(label=label, dense=dense, ids=ids, global_size=GLOBAL_BATCH)


def slice_of(batch: Batch, index: int, rank: int, ranks: int) -> Batch:
    """Uneven slices, some of them empty."""
    generator = torch.Generator().manual_seed(1000 + index)
    cuts = [0, *sorted(torch.randint(0, GLOBAL_BATCH + 1, (ranks - 1,), generator=generator).tolist()), GLOBAL_BATCH]
    if index % 7 == 3:
        cuts = [0] * ranks + [GLOBAL_BATCH]
    start, stop = cuts[rank], cuts[rank + 1]
    ids = batch.ids
    if ids.offsets is None:
        sliced = SparseIds(values=ids.values[start:stop], tables=ids.tables)
    else:
        offsets = ids.offsets[start * ids.tables : stop * ids.tables + 1]
        taken = slice(int(offsets[0]), int(offsets[-1]))
        sliced = SparseIds(
            values=ids.values[taken],
            tables=ids.tables,
            offsets=offsets - offsets[0],
            weights=None if ids.weights is None else ids.weights[taken],
        )
    assert batch.label is not None
    return Batch(label=batch.label[start:stop], dense=batch.dense[start:stop], ids=sliced, global_size=GLOBAL_BATCH)


class SlicedLoader:
    """This rank's slices of the global batches; remembers where it is."""

    def __init__(self, hot: str, batches: int, rank: int, ranks: int) -> None:
        self.hot, self.batches, self.rank, self.ranks = hot, batches, rank, ranks
        self.position = 0
        self.prefetch: Callable[[Batch], None] | None = None

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        upcoming = None
        while self.position < self.batches:
            batch = self._slice(self.position + 1) if upcoming is None else upcoming
            upcoming = self._slice(self.position + 2) if self.position + 1 < self.batches else None
            if self.prefetch is not None and upcoming is not None:
                self.prefetch(upcoming)
            self.position += 1
            yield batch

    def _slice(self, index: int) -> Batch:
        return slice_of(global_batch(index, self.hot), index, self.rank, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Losses(pl.Callback):
    """Keeps each step's loss over the global batch, and writes them at the end as the recorder would."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.losses: list[list[Tensor]] = [[]]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.losses[-1].append(outputs["step_loss"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.losses.append([])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        here = torch.stack([torch.stack(of_step).mean() for of_step in self.losses if of_step])
        losses = Ranks().sum(here.double()) / trainer.world_size
        if trainer.is_global_zero:
            lines = [json.dumps({"train/loss": loss}) + "\n" for loss in losses.tolist()]
            self.folder.write_text("metrics.jsonl", "".join(lines))


class SlicedData(pl.LightningDataModule):
    batch_size = GLOBAL_BATCH

    def __init__(self, hot: str, batches: int) -> None:
        super().__init__()
        self.hot, self.batches = hot, batches
        self.schema = toy_schema()

    def train_dataloader(self) -> SlicedLoader:
        return SlicedLoader(self.hot, self.batches, self.trainer.global_rank, self.trainer.world_size)


def run(fit: Fit, parent: Path, ranks: int) -> None:
    """Trains in ``parent / fit.name``, alone or as one of several ranks."""
    # Fits follow each other in one process.
    torch.manual_seed(1)
    folder = RunFolder(parent / fit.name)
    options: dict[str, Any] = dict(fit.trainer)
    micro = options.get("accumulate_grad_batches", 1)
    if ranks > 1:
        plan = plan_of(fit.plan, ranks, fit.pooled)
        if plan is not None:
            folder.path.mkdir(exist_ok=True)
            folder.write_text(f"plan-{Ranks().rank}.yaml", yaml.safe_dump(plan.document()))
        path = None if plan is None else str(folder.path / f"plan-{Ranks().rank}.yaml")
        options |= {"strategy": EmbeddingShardedDDP(plan=path, wire=fit.wire), "devices": ranks}
    folder.path.mkdir(exist_ok=True)
    checkpoints = RunCheckpoints(folder, 0)
    rule: UpdateRule = RULES[fit.rule]()
    wide_rule = None if fit.wide_rule is None else RULES[fit.wide_rule]()
    module = toy_module(NETWORKS[fit.network], rule, RULES[fit.rule](), wide_rule=wide_rule)
    plugins: list[Any] = [FolderCheckpointIO()]
    if options.pop("sync_batchnorm", False):
        plugins.append(SyncBatchNorm())
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=fit.steps,
        precision=fit.precision,
        log_every_n_steps=1 if fit.recorded else STEPS,
        limit_val_batches=0,
        callbacks=[MetricsLogger(folder, checkpoints) if fit.recorded else Losses(folder), checkpoints],
        logger=[JsonLinesLogger(folder)] if fit.recorded else False,
        plugins=plugins,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    resume = None if fit.resume_from is None else parent / fit.resume_from
    trainer.fit(module, SlicedData(fit.hot, STEPS * micro), ckpt_path=resume, weights_only=False)


def metrics(folder: Path, name: str) -> Tensor:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line[name] for line in lines if name in line], dtype=torch.float64)


# Each exchange costs time: by default, every second fit runs on three ranks, and the others on two.
CASES = [(fit, 3) for fit in PARITY[::2]] + [(fit, 2) for fit in PARITY[1::2]]
SLOW_CASES = [(fit, ranks) for ranks in (2, 3, 4) for fit in PARITY if (fit, ranks) not in CASES]


def run_all(parent: Path) -> None:
    """Every fit on its ranks, in folders 2, 3 and 4; those on 2 and 3 resume from the checkpoint of 4."""
    for ranks in (4, 3, 2):
        fits = [FIRST_STEP, *(fit for fit, of_ranks in CASES if of_ranks == ranks)]
        fits += [HALF, WIDE_HALF, BF16] if ranks == 4 else [RESUMED, WIDE_RESUMED]
        fits += OWN_DROPOUT if ranks == 2 else ()
        for_ranks = parent / str(ranks)
        for_ranks.mkdir()
        if ranks < 4:
            for half in (HALF, WIDE_HALF):
                (for_ranks / half.name).symlink_to(parent / "4" / half.name)
        on_ranks(ranks, partial(_run_fits, fits, for_ranks, ranks))


def run_slow(parent: Path) -> None:
    """Every fit on the other numbers of ranks, beside those of ``run_all``."""
    for ranks in (4, 3, 2):
        fits = [fit for fit, of_ranks in SLOW_CASES if of_ranks == ranks]
        on_ranks(ranks, partial(_run_fits, fits, parent / str(ranks), ranks))


def _run_fits(fits: list[Fit], parent: Path, ranks: int, rank: int) -> None:
    # Before Lightning would, so that plans can be written for the ranks.
    torch.distributed.init_process_group("gloo")  # noqa: TID251
    for fit in fits:
        began = time.perf_counter()
        run(fit, parent, ranks)
        if rank == 0:
            print(f"{fit.name} on {ranks} ranks: {time.perf_counter() - began:.1f} s", flush=True)


def on_ranks(ranks: int, action: Callable[[int], None]) -> None:
    """Calls ``action(rank)`` in a forked process for each rank, with the environment that torchrun gives."""
    with reserve_port() as held:
        children = {_fork(rank, ranks, held.getsockname()[1], action) for rank in range(ranks)}
        while children:
            pid, status = os.wait()
            children.discard(pid)
            if status:
                for left in children:
                    os.kill(left, signal.SIGKILL)
                sys.exit(f"a rank of {ranks} ended with {status}")


def _fork(rank: int, ranks: int, port: int, action: Callable[[int], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= environment(rank, ranks, port)
        action(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    (run_slow if sys.argv[2:] == ["slow"] else run_all)(Path(sys.argv[1]))
