"""Contract: a training step waits for the device only where it must: nowhere on one rank with kernels, and with tables
in pieces once for each lookup, for the sizes of its exchanges."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import lightning_dlrm
from lightning_dlrm.__main__ import main
from lightning_dlrm.bench.contenders import Workload, draw_batch
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.contracts.shipped import shipped_configs
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models import baselines
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.objectives.losses import LogLoss
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule
from lightning_dlrm.sharding.collectives import AsyncCollective
from lightning_dlrm.sharding.placement import ShardedPlacement
from lightning_dlrm.sharding.plan import Piece, Plan
from lightning_dlrm.tables.embeddings import TableSettings
from lightning_dlrm.tables.lookup import placed_by
from tests.caches import new_cache
from tests.host_reads import HostReads

WORKLOAD = Workload(tables=(30, 3, 60), dense=4, width=16)
BAGS = Workload(tables=(30, 3, 60), dense=4, width=16, bags=(0, 4))
MODELS = "autoint dcn deepfm dlrm factorization_machine finalmlp logistic_regression masknet matrix_factorization mlp"
CONFIGS = [*MODELS.split(), "wide_and_deep", "xdeepfm", "mlperf_v2"]
RULES: tuple[UpdateRule, ...] = (SGD(0.1), Adagrad(0.1), RowWiseAdagrad(0.1), Adam(0.1))

SORTED = "unique_consecutive in tables/gradients.py:of"
"""Allowed where plain torch updates rows, and where clipping reads a summed gradient: the number of unique rows shapes
both. The kernels for a device need no sums, and no count."""
BAGS_OF_SOME_TABLES = "repeat_interleave in contracts/batch.py:of_tables"
"""Allowed with bags and several lookups: how many of a batch's ids each lookup takes depends on the data."""
SIZES = "tolist in sharding/placement.py:send_rows"
"""Allowed once for each lookup of tables in pieces: how many rows the ranks request of each other."""


def shipped(config: str, features: Features = WORKLOAD.features) -> CTRNetwork:
    """The network of a shipped configuration, with its small layers."""
    settings = yaml.safe_load((shipped_configs() / f"{config}.yaml").read_text())["model"]["network"]
    options = settings.get("init_args", {})
    if "tables" in options:
        options["tables"] = TableSettings(**options["tables"])
    if "bottom_mlp" in options:
        options["bottom_mlp"] = [16, options["embedding_dim"]]
    if options.get("cross_rank"):
        options["cross_rank"] = 8
    made = baselines.MLP if config == "mlp" else getattr(lightning_dlrm, settings["class_path"])
    network: CTRNetwork = made(features, 1, **options)
    return network


def training_step(
    network: CTRNetwork, rule: UpdateRule, kernels: str, clips: bool = False
) -> Callable[[Batch], Tensor]:
    for lookup in network.lookups():
        lookup.kernels = kernels
    optimizer = CTROptimizer(
        network.dense_parameters(), network.lookups(), partial(torch.optim.SGD, lr=0.1), rule, wide_rule=None
    )

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = LogLoss().summed(network(batch.dense, batch.ids), batch.label) / len(batch)
        loss.backward()
        if clips:
            optimizer.clip_gradient_norm(1.0)
        optimizer.step()
        return loss.detach()

    return step


def reads_of(step: Callable[[Batch], Tensor], batch: Batch) -> Counter[str]:
    step(batch)
    with HostReads() as reads:
        step(batch)
    return reads


@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_of_a_shipped_model_reads_nothing_back(config: str) -> None:
    batch = draw_batch(WORKLOAD, 6, 0)
    for rule in RULES if config == "dlrm" else RULES[:1]:
        assert not reads_of(training_step(shipped(config), rule, "native"), batch)
    assert set(reads_of(training_step(shipped(config), RULES[0], "plain"), batch)) == {SORTED}


def test_what_reads_back_is_known() -> None:
    batch = draw_batch(BAGS, 6, 0)
    assert not reads_of(training_step(shipped("mlperf_v2"), RULES[2], "native"), batch)
    widths = Workload(tables=WORKLOAD.tables, dense=4, width=16, bottom=(16,), top=(8,)).network(
        TableSettings(dims={"C1": 4}, project=True)
    )
    assert not reads_of(training_step(widths, RULES[0], "native"), draw_batch(WORKLOAD, 6, 0))
    assert reads_of(training_step(widths, RULES[0], "native"), batch) == {BAGS_OF_SOME_TABLES: 2}
    clipped = reads_of(training_step(shipped("dlrm"), RULES[0], "native", clips=True), draw_batch(WORKLOAD, 6, 0))
    assert clipped == {SORTED: 1}


def test_the_detector_sees_every_kind_of_read() -> None:
    values = torch.tensor([3, 1, 3])
    with HostReads() as reads:
        for read in (
            values[0].item, values.tolist, values.numpy, values.nonzero, values.unique, values.cpu,
            lambda: bool(values.sum() > 1), lambda: values[values > 1], lambda: values.masked_select(values > 1),
            lambda: torch.repeat_interleave(values), lambda: values.unique_consecutive(), values.bincount,
        ):  # fmt: skip
            before = reads.total()
            read()
            assert reads.total() > before, read
        before = reads.total()
        torch.repeat_interleave(values, output_size=7)
        torch.nonzero_static(values, size=3)
        values[values - 1].sort()
        assert reads.total() == before


class ThreadRanks:
    """Ranks that are threads of this process, with the exchanges of ``Ranks``."""

    def __init__(self, rank: int, ranks: int, shared: dict[tuple[int, int], Sequence[Tensor]], barrier: Any) -> None:
        self.rank, self.ranks = rank, ranks
        self._shared, self._barrier, self._calls = shared, barrier, 0

    def all_to_all(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> AsyncCollective:
        call, self._calls = self._calls, self._calls + 1
        self._shared[call, self.rank] = values.split(list(sent))
        self._barrier.wait(20)
        arrived = torch.cat([self._shared[call, rank][self.rank] for rank in range(self.ranks)])
        assert len(arrived) == sum(received)
        return AsyncCollective(values, arrived, None)


def on_threads(plan: Plan, run: Callable[[ThreadRanks], Any]) -> list[Any]:
    """What a function returns for each rank, within a context where tables are placed by the plan."""
    shared: dict[tuple[int, int], Sequence[Tensor]] = {}
    barrier, results = threading.Barrier(plan.ranks), [None] * plan.ranks

    def run_rank(rank: int) -> None:
        try:
            ranks = ThreadRanks(rank, plan.ranks, shared, barrier)
            with placed_by(partial(ShardedPlacement, plan=plan, ranks=ranks)):
                results[rank] = run(ranks)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(plan.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert None not in results
    return results


def halves(workload: Workload, pooled: Sequence[str] = ()) -> Plan:
    """The first rows of each table on rank 0, the others on rank 1."""
    pieces = [
        Piece(table=name, start=start, stop=stop, rank=rank)
        for name, rows in workload.features.tables.items()
        for rank, (start, stop) in enumerate([(0, rows // 2), (rows // 2, rows)])
    ]
    return Plan(ranks=2, pieces=tuple(pieces), pooled=tuple(pooled))


@pytest.mark.parametrize("kernels", ["native", "plain"])
@pytest.mark.parametrize(
    ("workload", "pooled"), [(WORKLOAD, ()), (BAGS, ()), (BAGS, ("C1", "C3"))], ids=["one-hot", "bags", "pooled"]
)
def test_two_ranks_read_the_sizes_of_a_batch_once(workload: Workload, pooled: Sequence[str], kernels: str) -> None:
    """Also for the batch that is prefetched meanwhile; nothing else is read, on either rank."""

    def run(ranks: ThreadRanks) -> list[Counter[str]]:
        network = shipped("dlrm")
        step = training_step(network, RULES[2], kernels)
        batches = [draw_batch(workload, 5 + ranks.rank, seed) for seed in range(4)]
        found = []
        for batch, upcoming in itertools.pairwise(batches):
            with HostReads() as reads:
                network.prefetch(upcoming.ids)
                step(batch)
            found.append(reads)
        return found

    allowed = {SIZES: 1} | ({SORTED: 1} if kernels == "plain" else {})
    for first, *later in on_threads(halves(workload, pooled), run):
        assert later == [allowed, allowed]
        # The first batch is not prefetched.
        assert first == allowed | {SIZES: 2}


def test_a_fit_reads_back_at_logged_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's loop and all callbacks of the command included."""
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", new_cache(tmp_path / "cache"))
    context, of_steps = HostReads(), [Counter[str]()]
    begin, end = CTRModule.on_train_start, CTRModule.on_train_end

    def on_train_start(module: CTRModule) -> None:
        begin(module)
        context.__enter__()

    def on_train_batch_end(module: CTRModule, *results: Any) -> None:
        of_steps.append(context.found - sum(of_steps, Counter()))

    def on_train_end(module: CTRModule) -> None:
        context.__exit__(None, None, None)
        end(module)

    for hook in (on_train_start, on_train_batch_end, on_train_end):
        monkeypatch.setattr(CTRModule, hook.__name__, hook)
    fit = "fit --config dlrm.yaml --config small.yaml --data.demo.train_rows=3000 --data.demo.validation_rows=100"
    fit += " --data.demo.test_rows=100 --data.demo.max_table_rows=300 --data.batch_size=250 --trainer.max_steps=9"
    fit += " --trainer.log_every_n_steps=4 --wandb.mode=disabled --trainer.accelerator=cpu"
    fit += " --trainer.num_sanity_val_steps=0 --checkpoint.every_n_steps=0 --trainer.enable_progress_bar=false"
    assert main([*fit.split(), "--run_dir", str(tmp_path / "run")]) == 0
    # The first step and the last one are logged too.
    assert [step for step, reads in enumerate(of_steps) if reads] == [1, 4, 8, 9]
