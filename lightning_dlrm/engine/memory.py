"""Memory that a run takes, counted before a row is allocated, and its refusal if a machine has less."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.memory import available_memory
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.dense import dense_state_bytes
from lightning_dlrm.sharding.costs import TableLoad, format_bytes
from lightning_dlrm.sharding.plan import Plan

if TYPE_CHECKING:
    from lightning_dlrm.engine.module import CTRModule

DEFAULT_BATCH_SIZE = 2048
"""Batch size for the plan if the datamodule has no ``batch_size``; it changes the balance of a plan little."""


def count_memory(
    module: "CTRModule",
    network: CTRNetwork,
    samples: float,
    training: bool = True,
    held: Callable[[TableLoad], int] = lambda load: load.rows,
    on_host: bool | None = None,
) -> Counter[str]:
    """Return the bytes that a rank takes: ``tables``, ``dense``, and in training ``optimizer_tables``,
    ``optimizer_dense``, ``averages`` and ``gradients``.

    Gradients are those of dense parameters, and the vectors of a batch with the gradients of vectors and rows.
    Activations of layers, and batches that are read ahead, are not counted.

    Args:
        module: the module; nothing is allocated.
        network: its network; it may be on the meta device.
        samples: samples of a batch on this rank.
        training: whether the run is a fit.
        held: returns how many rows of a load the rank holds.
        on_host: count only tables in host memory (true), or only the rest (false).
    """
    found: Counter[str] = Counter()
    averages = training and module.averaging is not None
    with_grad = {table.name for lookup in network.lookups() if lookup.dense_gradients for table in lookup.tables}
    element = max((lookup.weight.element_size() for lookup in network.lookups()), default=0)
    for load in table_loads(network, module):
        if on_host is not None and load.on_host != on_host:
            continue
        rows, row = held(load), load.width * element
        found["tables"] += rows * row
        found["optimizer_tables"] += training * rows * (load.bytes_per_row - row)
        # An average in float32, and the number of steps in it.
        found["averages"] += averages * rows * (4 * load.width + 4)
        found["gradients"] += training * rows * row * (load.name in with_grad)
        found["gradients"] += training * int(samples * load.width * (2 * element + 4 * load.indices_per_sample))
    if not on_host:
        dense = network.dense_parameters()
        size = sum(parameter.nbytes for parameter in dense)
        found["dense"] += size
        if training:
            # Counting steps once with zeros, for which layers that do not fit leave no room.
            fits = 4 * size <= available_memory()
            found["optimizer_dense"] += dense_state_bytes(module.dense_optimizer, dense) if fits else 0
            found["gradients"] += size
            found["averages"] += averages * 4 * sum(parameter.numel() for parameter in dense)
    return found


def require_memory(module: "CTRModule", plan: Plan | None = None) -> None:
    """Refuse a run that needs more memory than this rank's device, or this machine, has free.

    Args:
        module: module with a trainer, before its network is built.
        plan: rows of each rank; None if one process holds all rows.

    Raises:
        UserError: there is too little memory; the message says what would fit.
    """
    trainer = module.trainer
    with trainer.precision_plugin.module_init_context(), torch.device("meta"):
        network = module.make_network(module.schema.features, module.seed)
    ranks = range(trainer.node_rank * trainer.num_devices, (trainer.node_rank + 1) * trainer.num_devices)
    samples, device = batch_size_of(trainer) / trainer.world_size, trainer.strategy.root_device

    def needed(rank: int, on_host: bool | None, samples: float = samples) -> Counter[str]:
        held = {} if plan is None else {"held": partial(rows_on_rank, plan, rank)}
        return count_memory(module, network, samples, bool(trainer.training), on_host=on_host, **held)

    def refuse_more(ranks: Sequence[int], on_host: bool | None, free: float, where: str) -> None:
        everything = sum((needed(rank, on_host) for rank in ranks), start=Counter())
        if everything.total() <= free:
            return
        without_batch = sum(needed(rank, on_host, samples=0).total() for rank in ranks)
        share = (free - without_batch) / (everything.total() - without_batch or 1)
        batch_size = int(batch_size_of(trainer) * max(0.0, share))
        _refuse(everything, free, where, loads, with_grad, batch_size)

    loads = table_loads(network, module)
    with_grad = any(lookup.dense_gradients for lookup in network.lookups())
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # torch reuses the memory that it keeps of freed tensors, such as those of an earlier fit.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        refuse_more([trainer.global_rank], False, free, f"the device {device}")
    refuse_more(ranks, True if device.type == "cuda" else None, available_memory(), "this machine")


def rows_on_rank(plan: Plan, rank: int, load: TableLoad) -> int:
    """Return how many rows of a load a rank holds."""
    pieces = plan.pieces_within(load.name, load.start, load.start + load.rows)
    return sum(piece.rows for piece in pieces if piece.rank == rank)


def _refuse(
    needed: Counter[str], free: float, where: str, loads: Sequence[TableLoad], with_grad: bool, batch_size: int
) -> None:
    total = needed.total()
    remedies = _remedies(needed, free, where, loads, with_grad)
    if batch_size:
        remedies.insert(0, f"--data.batch_size {batch_size} or less")
    named = {name.replace("optimizer_", "optimizer state of "): size for name, size in needed.most_common()}
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in named.items() if size > total / 100)
    raise UserError(
        f"this run needs {format_bytes(total)} of memory ({parts}), but {where} has {format_bytes(free)} free; "
        f"what would fit: {'; '.join(remedies)}"
    )


def _remedies(needed: Counter[str], free: float, where: str, loads: Sequence[TableLoad], with_grad: bool) -> list[str]:
    """Return what would need less memory than ``free`` bytes; each entry would do alone.

    Args:
        needed: bytes by their use.
        free: free bytes.
        where: a device, or this machine.
        loads: loads of the tables.
        with_grad: whether the tables have ``dense_gradients``.
    """
    total, found = needed.total(), []
    row_wise = total - needed["optimizer_tables"] + 4 * sum(load.rows for load in loads)
    if with_grad:
        # A gradient is as large as its table.
        row_wise -= needed["tables"]
    if row_wise <= free:
        without_grad = "tables.dense_gradients false, with " if with_grad else ""
        found.append(f"{without_grad}--model.table_optimizer RowWiseAdagrad takes {format_bytes(row_wise)}")
    # Each rank has a copy of the dense layers.
    copied = 2 * needed["dense"] + needed["optimizer_dense"]
    if copied >= free:
        return ["narrower layers"]
    width = int(max((load.width for load in loads), default=0) * (free - copied) / (total - copied))
    if width >= 1:
        found.append(f"vectors of width {width} or less")
    if with_grad:
        return found or ["a machine with more memory"]
    if where != "this machine":
        found.append("tables in host memory, chosen by 'python -m lightning_dlrm plan --device-memory'")
    count, kind = math.ceil((total - copied) / (free - copied)), "machines" if where == "this machine" else "devices"
    return [*found, f"{count} such {kind} with --trainer.strategy embedding_sharded_ddp"]


def table_loads(
    network: CTRNetwork, module: "CTRModule", skew: float = 1.0, indices: Mapping[str, float] | None = None
) -> list[TableLoad]:
    """Return the loads of a network's tables, from which plans are made.

    Args:
        network: the module's network; it may be on the meta device.
        module: module with the tables' update rules.
        skew: skew of every table's ids; see TableLoad.
        indices: column -> mean number of ids in a sample's bag; by default that of the data's schema, or 1.
    """
    schema = module.data_schema()
    indices = schema.indices if indices is None else indices
    loads = []
    for lookup in network.lookups():
        row = torch.empty(1, lookup.width, dtype=lookup.weight.dtype, device="meta")
        bytes_per_row = row.nbytes
        rule = module.rule_of(lookup, network)
        if lookup.dense_gradients and lookup.weight.requires_grad:
            bytes_per_row += dense_state_bytes(module.dense_optimizer, [nn.Parameter(row)])
        elif rule is not None and lookup.weight.requires_grad:
            bytes_per_row += sum(tensor.nbytes for tensor in rule.state(row).values())
        # If a table is split between a device and its host, each lookup has a part.
        loads += [
            TableLoad(
                name=table.name,
                rows=stop - start,
                start=start,
                table_rows=table.rows,
                width=lookup.width,
                bytes_per_row=bytes_per_row,
                element_bytes=row.element_size(),
                indices_per_sample=indices.get(table.name.partition("/")[0], 1.0),
                factors=bool(schema.by_role("weights")),
                may_pool=lookup.may_pool,
                on_host=lookup.storage.on_host,
                skew=skew,
            )
            for table, (start, stop) in zip(lookup.tables, lookup.ranges, strict=True)
        ]
    return loads


def datamodule_of(module: pl.LightningModule) -> object:
    """Return the datamodule of a module's trainer; None if it has none, or no trainer yet."""
    try:
        return getattr(module.trainer, "datamodule", None)
    except RuntimeError:
        return None


def batch_size_of(trainer: pl.Trainer) -> int:
    """Return the number of samples of a global training batch."""
    return getattr(trainer.datamodule, "batch_size", DEFAULT_BATCH_SIZE)  # type: ignore[attr-defined]
