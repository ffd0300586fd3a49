"""Batches: the rows of a source as the slices of global batches that a rank serves."""

import itertools
from collections.abc import Generator, Sequence

import numpy as np
import torch

from datamodules.stream.order import Order
from datamodules.stream.rows import WEIGHTED_IDS, Rows
from datamodules.stream.sources import Source
from lightning_dlrm.contracts.batch import Batch, SparseIds

# Bounds are computed for this many batches at once: a quarter of the cost for each alone.
_BOUNDS_AT_ONCE = 256
# Small batches are cut from a block of several: gathering has a cost per call.
_BLOCK_ROWS = 16_384


def batches_at_once(order: Order, world: int) -> int:
    """Return how many batches are fetched together."""
    # In file order, one at a time: the error of a damaged file comes in place of its first batch.
    return 1 if order.shuffle == "none" else max(1, _BLOCK_ROWS * world // order.batch_size)


def read_batches(
    source: Source, order: Order, *, first: int = 0, rank: int = 0, world: int = 1, rows: bool = False
) -> Generator[list[Batch], None, None]:
    """Yield a rank's slices of the global batches of an order; those that are fetched together, in one list.

    Args:
        source: of the rows of ``order``.
        order: of one epoch.
        first: the first global batch to read.
        rank, world: the rank whose slices are served, and the world size.
        rows: fill ``Batch.rows``.

    Raises:
        UserError: a file is missing, altered or cannot be decoded.
    """
    at_once = batches_at_once(order, world)
    for block in range(first, order.batches, _BOUNDS_AT_ONCE):
        bounds = order.bounds(block, min(block + _BOUNDS_AT_ONCE, order.batches), rank, world)
        for start in range(0, len(bounds), at_once):
            several = bounds[start : start + at_once]
            sizes = (several[:, :, 1] - several[:, :, 0]).sum(axis=1).tolist()
            index = range(block + start, block + start + len(sizes))
            batches = _to_batches(source.fetch(several), sizes, [order.global_size(i) for i in index])
            if rows:
                for i, batch in zip(index, batches, strict=True):
                    batch.rows = torch.from_numpy(order.batch_rows(i, rank, world))
            yield batches


def _to_batches(rows: Rows, sizes: Sequence[int], global_sizes: Sequence[int]) -> list[Batch]:
    """Split rows into consecutive batches of the given sizes, as views."""
    # torch.split takes a fraction of the time of NumPy slices and a conversion of each.
    labels = [None] * len(sizes) if rows.label is None else torch.from_numpy(rows.label).split(sizes)
    dense = torch.from_numpy(rows.dense).split(sizes)
    return [
        Batch(label=label, dense=dense_BI, ids=ids, global_size=global_size)
        for label, dense_BI, ids, global_size in zip(labels, dense, _split_ids(rows, sizes), global_sizes, strict=True)
    ]


def _split_ids(rows: Rows, sizes: Sequence[int]) -> list[SparseIds]:
    tables = rows.ids.shape[1]
    if rows.values is None:
        return [SparseIds(values=values, tables=tables) for values in torch.from_numpy(rows.ids).split(sizes)]
    parts = [rows.slice(begin, stop) for begin, stop in itertools.pairwise([0, *itertools.accumulate(sizes)])]
    return [_bags_as_ids(part.ids, part.values) for part in parts if part.values is not None]


def _bags_as_ids(lengths_nF: np.ndarray, values: np.ndarray) -> SparseIds:
    weights = None
    if values.dtype == WEIGHTED_IDS:
        values, weights = (np.ascontiguousarray(values[name]) for name in ("id", "weight"))
    return SparseIds(
        values=torch.from_numpy(values),
        tables=lengths_nF.shape[1],
        offsets=torch.from_numpy(np.append(0, np.cumsum(lengths_nF, dtype=np.int64))),
        weights=None if weights is None else torch.from_numpy(weights),
    )
