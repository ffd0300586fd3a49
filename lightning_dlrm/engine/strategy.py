"""Tables in pieces on all ranks, dense layers copied: a DDPStrategy for any CTR network."""

import logging
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.terminal import binary_size, counted
from lightning_dlrm.engine.memory import batch_size_of, require_memory, table_loads
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.sharding.balance import make_plan
from lightning_dlrm.sharding.collectives import Ranks, set_timeout
from lightning_dlrm.sharding.costs import TableLoad, imbalance, parse_memory, rank_costs, rows_of_tables
from lightning_dlrm.sharding.placement import ShardedPlacement
from lightning_dlrm.sharding.plan import Plan, read_plan
from lightning_dlrm.tables.lookup import placed_by
from lightning_dlrm.tracking import names

log = logging.getLogger("lightning_dlrm")

NAME = "embedding_sharded_ddp"


class EmbeddingShardedDDP(DDPStrategy):
    """Embedding tables in pieces over all ranks (model parallel), dense layers copied (data parallel).

    The network is the same as on one device. While it is built, each rank allocates its pieces of the tables and no
    more. Gradients of tables and dense layers equal those of one process on the global batch.

    Args:
        plan: YAML file written by the command plan; by default the plan that it prints if the k-th row of a table is
            looked up 1/k times as often as its first row. If a run logs a parallel/work_imbalance far above 1, use the
            plan of ``plan --counted``.
        memory_per_rank: most memory of tables and their optimizer state, such as 80GiB, or one amount for each rank,
            separated by commas; None for no limit. Tables in host memory (tables.on_host) do not count. A plan from a
            file ignores it.
        wire: type of vectors and gradients in exchanges: full for that of the parameters, or bf16.
        timeout_seconds: seconds after which a rank that does not answer ends the run. Saving a checkpoint may take
            longer.
        options: options of DDPStrategy. ``gradient_as_bucket_view`` is true unless it is given: the dense gradients are
            then reduced where they are, without a copy.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        plan: str | None = None,
        memory_per_rank: str | None = None,
        wire: Literal["full", "bf16"] = "full",
        timeout_seconds: float = 60.0,
        **options: Any,
    ) -> None:
        require(timeout_seconds > 0, f"strategy: timeout_seconds is {timeout_seconds}; expected more than 0")
        require(wire in ("full", "bf16"), f"strategy: wire {wire!r} is not one of full, bf16")
        start_method = options.get("start_method", "popen")
        require(
            start_method == "popen",
            f"strategy: start_method is {start_method}; expected popen, because copies of this process could not save "
            "the run: leave start_method out",
        )
        super().__init__(**{"gradient_as_bucket_view": True} | options)
        self._plan_file = plan
        self._memory = None if memory_per_rank is None else parse_memory(memory_per_rank, "strategy: memory_per_rank")
        self._wire = torch.bfloat16 if wire == "bf16" else None
        self._timeout_seconds = timeout_seconds
        self.facts: dict[str, Any] = {}
        """Values that must be equal on all ranks, name -> JSON value; compared before the network is built."""
        self.plan: Plan | None = None

    def setup_environment(self) -> None:
        # Processes may start minutes apart, so the timeout holds from here on.
        with _saying_what_it_waits_for(self):
            super().setup_environment()
        # DDP warns about a gradient [1, n], whose first stride has no effect.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        set_timeout(self._timeout_seconds)
        # The group with the long timeout is made here, while every rank runs: later, ranks could wait for hours for a
        # rank that has ended.
        Ranks(long_timeout=True)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Context in which Lightning builds the network, with its tables in pieces."""
        module = self.lightning_module
        assert isinstance(module, CTRModule)
        ranks = Ranks()
        data = {"the data's fingerprint": module.data_schema().data_fingerprint}
        compare_ranks(self.facts | data, ranks)
        if self.plan is None:
            self.plan = plan = self._agreed_plan(module, ranks)
            # All ranks look at the free memory before one of them allocates.
            ranks.run_on_all_ranks(lambda: require_memory(module, plan))
        with placed_by(partial(ShardedPlacement, plan=self.plan, ranks=ranks, wire=self._wire)):
            yield
        sharded = {id(lookup.weight) for lookup in module.network.lookups()}
        ignored = [name for name, parameter in module.named_parameters() if id(parameter) in sharded]
        # Buffers that are not saved are constants, such as offsets; DDP would broadcast them before every step.
        ignored += {name for name, _ in module.named_buffers()} - module.state_dict().keys()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        # Every rank writes its pieces.
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        # Together, because a rank may read a damaged piece that the others do not need.
        load = super().load_optimizer_state_dict
        Ranks().run_on_all_ranks(lambda: load(checkpoint))

    def held(self, loads: Sequence[TableLoad]) -> dict[str, float]:
        """Return the largest number of rows and of bytes, with optimizer state, on a rank: of all tables and of each.

        Args:
            loads: loads of the network's tables.
        """
        assert self.plan is not None
        costs = rank_costs(self.plan, loads, batch_size=1)
        figures: dict[str, float] = {
            names.ROWS_PER_RANK: max(cost.rows for cost in costs),
            names.BYTES_PER_RANK: max(cost.bytes for cost in costs),
        }
        if any(load.on_host for load in loads):
            figures[names.HOST_BYTES] = max(cost.host_bytes for cost in costs)
        for load in loads:
            most = max(cost.bytes_of_table.get(load.name, 0) for cost in costs)
            figures |= {
                f"{names.TABLES}/{load.name}/rows_per_rank": most // load.bytes_per_row,
                f"{names.TABLES}/{load.name}/bytes_per_rank": most,
            }
        return figures

    def measure_exchanges(self, steps: int) -> dict[str, float]:
        """Return measurements of the exchanges since the last call; all ranks call it together.

        Returns:
            Of a step, the longest wait of a rank, the most bytes that a rank sends, and for each table the requested
            unique rows and the bytes sent, over all ranks. Also the requested rows of the busiest rank as a multiple
            of the mean, for all tables and for each.
        """
        assert isinstance(self.lightning_module, CTRModule)
        ranks = Ranks()
        lookups = self.lightning_module.network.lookups()
        placed = [(lookup, lookup.placement) for lookup in lookups if isinstance(lookup.placement, ShardedPlacement)]
        traffic = [placement.measure(lookup) for lookup, placement in placed]
        seconds = ranks.all_gather(np.array([sum(of_lookup.seconds for of_lookup in traffic)]))
        sent, asked = np.zeros(ranks.ranks), np.zeros(ranks.ranks)
        for of_lookup in traffic:
            sent += of_lookup.sent_bytes
            asked += sum(table.rows for table in of_lookup.tables.values())
        tables = {name: table for of_lookup in traffic for name, table in of_lookup.tables.items()}
        figures = {
            names.EXCHANGE_MS: 1000 * float(max(seconds)[0]) / steps,
            names.SENT_BYTES: float(sent.max()) / steps,
            names.SENT_MIB: float(sent.max()) / steps / 2**20,
            names.WORK_IMBALANCE: imbalance(asked.tolist()),
        }
        for name, table in tables.items():
            figures |= {
                f"{names.TABLES}/{name}/{names.ASKED_ROWS}": float(table.rows.sum()) / steps,
                f"{names.TABLES}/{name}/{names.MOVED_BYTES}": table.bytes / steps,
                f"{names.TABLES}/{name}/{names.IMBALANCE}": imbalance(table.rows.tolist()),
            }
        return figures

    def _agreed_plan(self, module: CTRModule, ranks: Ranks) -> Plan:
        """Return rank 0's plan on all ranks: another machine may round differently and make another plan."""

        def make() -> dict[str, Any]:
            network = getattr(module, "network", None)
            if network is None:
                # Only sizes and types are needed.
                with self.precision_plugin.module_init_context(), torch.device("meta"):
                    network = module.make_network(module.schema.features, module.seed)
            loads = table_loads(network, module)
            if self._plan_file is not None:
                plan = read_plan(Path(self._plan_file))
                unpoolable = [load.name for load in loads if not load.may_pool]
                plan.check(rows_of_tables(loads), ranks.ranks, unpoolable)
            else:
                value_bytes = (self._wire or network.lookups()[0].weight.dtype).itemsize
                plan = make_plan(loads, ranks.ranks, batch_size_of(module.trainer), self._memory, value_bytes)
            if ranks.ranks > 1:
                held = [cost.bytes for cost in rank_costs(plan, loads, batch_size=1)]
                log.info(
                    "tables: %s on %d ranks; the fullest rank holds %s with optimizer state, %.2f times the mean%s",
                    counted(len(plan.pieces), "piece"),
                    ranks.ranks,
                    binary_size(max(held)),
                    imbalance(held),
                    f"; bags summed by the ranks of their rows: {', '.join(plan.pooled)}" if plan.pooled else "",
                )
            return plan.document()

        return Plan.of_document(ranks.run_on_rank_zero(make))


@contextmanager
def _saying_what_it_waits_for(strategy: DDPStrategy, seconds: float = 15.0) -> Iterator[None]:
    """Log every ``seconds`` that this rank waits for others to start."""
    over, start = threading.Event(), time.monotonic()

    def say() -> None:
        while not over.wait(seconds):
            environment = strategy.cluster_environment
            assert environment is not None
            log.warning(
                "rank %s has waited %.0f s until all %s ranks reach %s:%s: check whether they have started",
                *(environment.global_rank(), time.monotonic() - start, environment.world_size()),
                *(environment.main_address, environment.main_port),
            )

    threading.Thread(target=say, name="waiting for ranks", daemon=True).start()
    try:
        yield
    finally:
        over.set()


StrategyRegistry.register(NAME, EmbeddingShardedDDP, description="DDP with embedding tables in pieces over all ranks")


def compare_ranks(facts: Mapping[str, Any], ranks: Ranks) -> None:
    """
    Raises:
        UserError: on all ranks, if a rank has another value of a fact.
    """
    all_facts = ranks.all_gather_json(dict(facts))
    for rank, theirs in enumerate(all_facts):
        for name in sorted(all_facts[0].keys() | theirs.keys()):
            ours, other = all_facts[0].get(name), theirs.get(name)
            require(
                ours == other,
                f"rank {rank} has {name} = {_short(other)}, rank 0 has {_short(ours)}: "
                "start every rank with the same command and the same data",
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
