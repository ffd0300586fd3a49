"""``bench lookup``: the sparse path alone: lookup, backward, row-wise Adagrad."""

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, cycle
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from lightning_dlrm.bench import roofline
from lightning_dlrm.bench.contenders import PlainBatch, PlainTables, Workload, draw_batch, repeat
from lightning_dlrm.bench.measurement import (
    DEFAULT,
    FLOOR,
    Implementation,
    Measurement,
    add_device_arguments,
    add_steps,
    check,
    time_rounds,
)
from lightning_dlrm.bench.step import DRAWN_BATCHES, StepKey, speeds_of_ours
from lightning_dlrm.contracts.batch import Batch, SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.kernels.choice import Kernels
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import RowWiseAdagrad
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import Table

DESCRIPTION = """\
Time the embedding tables alone: lookup, backward pass and update.

examples:
  python -m lightning_dlrm bench lookup
  python -m lightning_dlrm bench lookup --bag 1 100 --tables 8 --width 64
"""
DETAILS = """\
what is timed, in turns, with log-uniform ids (low ids are frequent):
  lightning_dlrm  one fused table, row-wise Adagrad, with the kernels of --kernels
  plain PyTorch   one nn.EmbeddingBag(sparse=True) for each table, torch.optim.Adagrad
  FBGEMM          its table-batched embedding with its fused row-wise Adagrad, if it is installed (pip install
                  'lightning-dlrm[fbgemm]')

With bf16-mixed, vectors and their gradients are bfloat16, as under autocast; tables stay float32.
"""
DETAILS += FLOOR

_LEARNING_RATE = 0.01
_EPSILON = 1e-8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_arguments(parser)
    parser.add_argument("--tables", type=int, default=26, metavar="N", help=f"number of tables {DEFAULT}")
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help=f"rows of each table {DEFAULT}")
    parser.add_argument("--width", type=int, default=16, metavar="N", help=f"numbers of a row {DEFAULT}")
    parser.add_argument(
        "--bag",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="ids of a lookup, uniform (default: one each)",
    )
    add_steps(parser)
    parser.add_argument(
        "--kernels", default="auto", choices=get_args(Kernels), help=f"kernels of lightning_dlrm {DEFAULT}"
    )


def run(args: argparse.Namespace) -> list[Measurement]:
    """Time lookup, backward and update.

    Raises:
        UserError: an option is out of range, or there is no such device.
    """
    if args.bag is not None and not 0 <= args.bag[0] <= args.bag[1]:
        raise UserError(
            f"bench lookup: --bag is {args.bag[0]} {args.bag[1]}; give the fewest ids of a bag, then the most"
        )
    device = check(args)
    tables = (args.rows,) * args.tables
    workload = Workload(tables=tables, dense=1, width=args.width, bottom=(args.width,), bags=args.bag)
    batches = [draw_batch(workload, args.batch_size, seed).to(device) for seed in range(DRAWN_BATCHES)]
    contenders = _contenders(args, workload, batches, device)
    rates = roofline.measure_rates(device, args.precision)
    print(rates)
    others = "lightning_dlrm and FBGEMM" if any(name == "peer" for name, _ in contenders) else "lightning_dlrm"
    print("a step: lookup, backward pass and update of rows")
    print(f"updates: {others} by row-wise Adagrad; plain PyTorch by Adagrad, because torch has no row-wise Adagrad")
    seconds = time_rounds(contenders, args.rounds, warm_up=1, steps=args.steps)
    return [
        Measurement.of_rounds(
            of_rounds,
            work="lookup",
            case=f"{args.tables} tables of {args.rows:,} x {args.width}, batch {args.batch_size:,}, "
            f"{precision}, {device}",
            implementation=name,
            device=args.device,
            precision=precision,
            batch_size=args.batch_size,
            samples=args.batch_size,
            floor_s=_floor(workload, batches, rates, precision),
            extra=speeds_of_ours(name, precision, seconds),
        )
        for (name, precision), of_rounds in seconds.items()
    ]


def _contenders(
    args: argparse.Namespace, workload: Workload, batches: Sequence[Batch], device: torch.device
) -> dict[StepKey, Callable[[], None]]:
    plain = [PlainBatch.of(batch).ids for batch in batches]
    makers: dict[Implementation, tuple[Callable[[Tensor, Any], None], list[Any]]] = {
        "ours": (_Ours(workload, device, args.kernels), [batch.ids for batch in batches]),
        "baseline": (_Plain(workload, device), plain),
    }
    if importlib.util.find_spec("fbgemm_gpu") is not None:
        makers["peer"] = _Fbgemm(workload, device), [_table_major(of_tables) for of_tables in plain]
    else:
        print("FBGEMM is not installed, so it is not measured")
    grad = torch.randn(args.batch_size, args.tables, args.width, device=device) * 1e-3
    grads = {"32-true": grad, "bf16-mixed": grad.bfloat16()}
    return {
        (name, precision): repeat(partial(step, grads[precision]), cycle(source), args.steps, device)
        for precision in args.precision
        for name, (step, source) in makers.items()
    }


def _floor(workload: Workload, batches: list[Any], rates: roofline.MachineRates, precision: str) -> float:
    """Return the least seconds of lookup and backward, and of the update of rows and their accumulators."""
    tables = roofline.costs(workload, batches, precision)["tables"]
    distinct = sum(roofline.distinct_rows(workload, batch) for batch in batches) / len(batches)
    flops, moved = 5 * distinct * workload.width, distinct * 4 * (3 * workload.width + 2)
    return rates.floor_of("tables", tables, precision) + rates.floor_of(
        "update", roofline.Cost(flops, moved), precision
    )


class _Ours:
    def __init__(self, workload: Workload, device: torch.device, kernels: Kernels) -> None:
        tables = [Table.of_column(f"C{i}", rows) for i, rows in enumerate(workload.tables)]
        self.lookup = EmbeddingTables(tables, workload.width, seed=1).to(device)
        self.lookup.kernels = kernels
        rule = RowWiseAdagrad(_LEARNING_RATE, epsilon=_EPSILON)
        self.optimizer = CTROptimizer([], [self.lookup], torch.optim.SGD, rule)

    def __call__(self, grad_BFD: Tensor, ids: SparseIds) -> None:
        self.optimizer.zero_grad()
        self.lookup(ids).to(grad_BFD.dtype).backward(grad_BFD)
        self.optimizer.step()


class _Plain:
    def __init__(self, workload: Workload, device: torch.device) -> None:
        # torch warns that it does not check the ids of sparse gradients.
        warnings.filterwarnings("ignore", message="Sparse invariant checks")
        self.tables = PlainTables(workload.tables, workload.width).to(device)
        self.optimizer = torch.optim.Adagrad(self.tables.parameters(), lr=_LEARNING_RATE, eps=_EPSILON)

    def __call__(self, grad_BFD: Tensor, ids: list[tuple[Tensor, Tensor]]) -> None:
        self.optimizer.zero_grad()
        torch.stack(self.tables(ids), dim=1).to(grad_BFD.dtype).backward(grad_BFD)
        self.optimizer.step()


class _Fbgemm:
    def __init__(self, workload: Workload, device: torch.device) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        cuda = device.type == "cuda"
        where = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
        on = ComputeDevice.CUDA if cuda else ComputeDevice.CPU
        self.tables: nn.Module = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, workload.width, where, on) for rows in workload.tables],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=_LEARNING_RATE,
            eps=_EPSILON,
            device=device,
        )
        cast(Any, self.tables).init_embedding_weights_uniform(-1e-3, 1e-3)

    def __call__(self, grad_BFD: Tensor, ids: tuple[Tensor, Tensor]) -> None:
        values, offsets = ids
        # The vectors are [B, F * D]; the backward pass updates the rows.
        vectors = self.tables(values, offsets)
        vectors.to(grad_BFD.dtype).backward(grad_BFD.view(vectors.shape))


def _table_major(of_tables: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the ids of all tables one after the other, and the offset of each bag, as FBGEMM takes them."""
    begins = [0, *accumulate(len(values) for values, _ in of_tables)]
    values = torch.cat([values for values, _ in of_tables])
    offsets = [starts + begin for begin, (_, starts) in zip(begins, of_tables, strict=False)]
    return values, torch.cat([*offsets, torch.tensor(begins[-1:], device=values.device)])
