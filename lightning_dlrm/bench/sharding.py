"""``bench sharding``: training steps with tables in pieces on several processes, against copied tables."""

import argparse
import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_dlrm.bench.contenders import kaggle
from lightning_dlrm.bench.measurement import (
    DEFAULT,
    Measurement,
    add_max_rows,
    add_rounds,
    add_steps,
    check_numbers,
    limit_name,
    speed_ratio,
)
from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD
from lightning_dlrm.sharding.balance import make_plan
from lightning_dlrm.sharding.collectives import Ranks, reserve_port
from lightning_dlrm.sharding.costs import TableLoad
from lightning_dlrm.sharding.placement import ShardedPlacement
from lightning_dlrm.tables.embeddings import TableSettings
from lightning_dlrm.tables.lookup import EmbeddingTables, placed_by

DESCRIPTION = """\
Time training steps with tables in pieces on several processes of this machine.

examples:
  python -m lightning_dlrm bench sharding
  python -m lightning_dlrm bench sharding --ranks 4 --batch-size 8192 --max-rows 1000000
  python -m lightning_dlrm bench sharding --ranks 1 --threads 2 --host
"""
DETAILS = """\
The model is the paper's DLRM at Kaggle's table sizes (540 million parameters), trained with plain SGD over gloo, with
skewed ids.

what is timed, in turns, on the same slices of batches:
  ours      tables in pieces on all ranks, dense layers under DDP, as the strategy embedding_sharded_ddp trains them
  baseline  every rank has all tables: one fused nn.EmbeddingBag(sparse=True) under DDP, which exchanges the sparse
            gradients, and torch.optim.SGD
  peer      every rank has all tables, and table gradients are not exchanged: the result is wrong, but no correct way
            with copied tables can be faster
  host      with --host: ours with rows in host memory, which are copied to the device for each batch, and back after
            the update. The device is the CPU itself, so this is the cost of the copies without a bus and without
            overlap; on a GPU they overlap with its work
"""

_BATCHES = 8
_WIDTH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help=f"number of processes {DEFAULT}")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help=f"threads of each process {DEFAULT}")
    parser.add_argument("--batch-size", type=int, default=2048, metavar="N", help=f"samples over all ranks {DEFAULT}")
    add_max_rows(parser)
    add_steps(parser)
    parser.add_argument("--host", action="store_true", help="time tables in host memory too")
    add_rounds(parser)


def run(args: argparse.Namespace) -> list[Measurement]:
    """Time the steps.

    Raises:
        UserError: an option is out of range.
    """
    check_numbers(args)
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with reserve_port() as held:
        address = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        torch.multiprocessing.spawn(_measure, (vars(args), address, results), nprocs=args.ranks)
    seconds, held = results.get()
    speeds: dict[str, float] = {}
    for name in seconds:
        if name != "ours":
            speeds |= speed_ratio(f"speed_over_{name}", seconds["ours"], seconds[name])
    return [
        Measurement.of_rounds(
            of_rounds,
            work="sharding",
            case=f"{args.ranks} ranks x {args.threads} threads, batch {args.batch_size:,}, "
            f"DLRM{limit_name(args.max_rows)}",
            implementation=name,
            device="cpu",
            precision="32-true",
            batch_size=args.batch_size,
            samples=args.batch_size * args.steps,
            extra={"table_bytes_per_rank": held[name]} | (speeds if name == "ours" else {}),
        )
        for name, of_rounds in seconds.items()
    ]


def _measure(rank: int, options: dict[str, Any], address: str, results: Any) -> None:
    torch.set_num_threads(options["threads"])
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=options["ranks"], timeout=timedelta(minutes=5)
    )
    tables = dict(kaggle(options["max_rows"]).features.tables)
    batches = [_slice(tables, options, rank, index) for index in range(_BATCHES)]
    names = ("ours", "baseline", "peer", *(["host"] if options["host"] else []))
    contenders = {name: _contender(name, tables, options) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # The first round warms up.
    for round_ in range(options["rounds"] + 1):
        for name in names[:: 1 if round_ % 2 == 0 else -1]:
            dist.barrier()
            start = time.perf_counter()
            for index in range(options["steps"]):
                contenders[name][0](batches[index % _BATCHES], batches[(index + 1) % _BATCHES][1])
            dist.barrier()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        results.put((seconds, {name: held for name, (_, held) in contenders.items()}))
    dist.destroy_process_group()


def _slice(tables: dict[str, int], options: dict[str, Any], rank: int, index: int) -> tuple[Tensor, SparseIds, Tensor]:
    """Return this rank's slice of a drawn batch: dense values, ids, labels."""
    generator = torch.Generator().manual_seed(index * options["ranks"] + rank)
    size = options["batch_size"] * (rank + 1) // options["ranks"] - options["batch_size"] * rank // options["ranks"]
    shares = torch.rand(size, len(tables), generator=generator, dtype=torch.float64) ** 3
    ids = SparseIds(values=(shares * torch.tensor(list(tables.values()))).int(), tables=len(tables))
    label = (torch.rand(size, generator=generator) < 0.25).float()
    return torch.rand(size, 13, generator=generator), ids, label


def _contender(
    name: str, tables: dict[str, int], options: dict[str, Any]
) -> tuple[Callable[[tuple[Tensor, SparseIds, Tensor], SparseIds], None], int]:
    """Return a function that trains on a slice and prefetches the next one, and the bytes of this rank's tables."""
    placement: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if options["ranks"] > 1 and name in ("ours", "host"):
        loads = [
            TableLoad(name=table, rows=rows, width=_WIDTH, bytes_per_row=4 * _WIDTH) for table, rows in tables.items()
        ]
        plan = make_plan(loads, options["ranks"], options["batch_size"])
        placement = placed_by(partial(ShardedPlacement, plan=plan, ranks=Ranks()))
    with placement:
        settings = TableSettings(on_host="all" if name == "host" else ())
        network = DLRM(Features(dense=13, tables=tables), seed=1, embedding_dim=_WIDTH, tables=settings)
    (group,) = network.embeddings.groups
    weight = group.lookup.weight
    if name == "baseline":
        group.add_module("lookup", _EmbeddingBag(group.lookup))
        optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    else:
        optimizer = CTROptimizer(
            network.dense_parameters(), network.lookups(), partial(torch.optim.SGD, lr=0.1), SGD(0.1)
        )
    # Buffers are constants, which DDP would send before every step; the baseline has no parameter ``weight`` any more.
    ignored = [key for key, _ in network.named_buffers()]
    ignored += [key for key, parameter in network.named_parameters() if parameter is weight]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, ignored)
    # The strategy EmbeddingShardedDDP sets this option; plain DDP does not.
    wrapped = DistributedDataParallel(network, gradient_as_bucket_view=name in ("ours", "host"))
    factor = options["ranks"] / options["batch_size"]

    def step(batch: tuple[Tensor, SparseIds, Tensor], upcoming: SparseIds) -> None:
        dense, ids, label = batch
        network.prefetch(upcoming)
        loss = nn.functional.binary_cross_entropy_with_logits(wrapped(dense, ids), label, reduction="sum") * factor
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, weight.numel() * weight.element_size()


class _EmbeddingBag(nn.Module):
    """All tables in one nn.EmbeddingBag with sparse gradients."""

    prefetches = False
    offsets: Tensor

    def __init__(self, tables: EmbeddingTables) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([piece.offset for piece in tables.pieces]))
        self.bag = nn.EmbeddingBag.from_pretrained(tables.weight.data, freeze=False, mode="sum", sparse=True)

    def forward(self, ids: SparseIds) -> Tensor:
        rows_BF = ids.values + self.offsets
        return self.bag(rows_BF.view(-1, 1)).view(len(ids), ids.tables, _WIDTH)
