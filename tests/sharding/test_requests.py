"""Contract: what a rank asks of others, as rows or as sums, makes exactly the bags' vectors, and gives each row its
gradient; it is counted by table and rank."""

import itertools
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.kernels import compiled
from lightning_dlrm.sharding import requests
from lightning_dlrm.sharding.plan import Piece, Plan
from lightning_dlrm.sharding.requests import LookupRequest, RowMap, decode_rows
from lightning_dlrm.tables.gradients import LookupGradient, RowRequest
from lightning_dlrm.tables.lookup import EmbeddingTables, look_up
from lightning_dlrm.tables.table import Table, TablePiece

RANKS, WIDTH = 3, 2
try:
    HAS_NATIVE = bool(compiled.library())
except compiled.NativeError:
    HAS_NATIVE = False


def drawn(sizes: list[int], samples: int, hot: str, seed: int) -> SparseIds:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor(sizes)
    if hot == "one":
        return SparseIds(values=(torch.rand(samples, len(sizes), generator=generator) * rows).int(), tables=len(sizes))
    lengths = torch.randint(0, 5, (samples * len(sizes),), generator=generator)
    bags = torch.repeat_interleave(lengths)
    return SparseIds(
        values=(torch.rand(len(bags), generator=generator) * rows[bags % len(sizes)]).int(),
        tables=len(sizes),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        weights=torch.rand(len(bags), generator=generator) if hot == "weighted" else None,
    )


def cut(sizes: list[int], pooled: list[int], seed: int) -> Plan:
    """Every table in up to four pieces, on any ranks, some of them on one rank though not side by side."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for table, rows in enumerate(sizes):
        cuts = sorted({0, rows, *torch.randint(0, rows + 1, (3,), generator=generator).tolist()})
        for a, b in itertools.pairwise(cuts):
            rank = int(torch.randint(0, RANKS, (), generator=generator))
            pieces.append(Piece(table=f"T{table}", start=a, stop=b, rank=rank))
    return Plan(
        ranks=RANKS, pieces=tuple(pieces), pooled=tuple(f"T{i}" for i in sorted({i % len(sizes) for i in pooled}))
    )


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    samples=st.integers(0, 5),
    hot=st.sampled_from(["one", "multi", "weighted"]),
    pooled=st.lists(st.integers(0, 3), max_size=4),
    seed=st.integers(0, 1000),
)
def test_vectors_and_gradients_are_those_of_whole_tables(
    sizes: list[int], samples: int, hot: str, pooled: list[int], seed: int
) -> None:
    plan, ids = cut(sizes, pooled, seed), drawn(sizes, samples, hot, seed)
    whole = EmbeddingTables([Table.of_column(f"T{i}", rows) for i, rows in enumerate(sizes)], WIDTH).double()
    rows = RowMap(whole.tables, whole.ranges, plan)
    request = cut_request(rows, ids)
    assert request.counts.tolist() == counted(plan, sizes, ids)
    of_ranks = rows.pieces_of_rank
    nothing = torch.zeros(0, WIDTH, dtype=torch.float64)
    shares = [torch.cat([nothing, *(of_piece(whole, piece) for piece in pieces)]) for pieces in of_ranks]
    received = received_by_each(request)
    made = [look_up(share, asked, "plain") for share, asked in zip(shares, received, strict=True)]
    vectors_UD = torch.cat([vectors for vectors, _, _ in made])
    weights = request.weights if request.pooled else ids.weights
    positions = RowRequest.of_rows(request.lookups.positions(), request.offsets, weights)
    found, positions_N, bag_N = look_up(vectors_UD, positions, "plain")
    expected = whole(ids)
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-12, atol=1e-12)

    grad = torch.rand(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sums_UD = LookupGradient(positions_N, grad.view(found.shape), bag_N, weights, request.lookups).values
    expected.backward(grad)
    gradient = whole.gradient()
    assert gradient is not None
    all_rows = torch.zeros_like(whole.weight).index_add(0, gradient.rows, gradient.values)
    of_vectors = sums_UD.split(request.counts.view(2, RANKS, -1).sum(2)[0].tolist())
    ranks = zip(shares, received, made, of_vectors, of_ranks, strict=True)
    for share, asked, (_, rows_E, bag_E), grad_VD, pieces in ranks:
        sums = LookupGradient(rows_E, grad_VD, bag_E, asked.factors)
        there = torch.zeros_like(share).index_add(0, sums.rows, sums.values)
        starts = [(first(whole, piece), piece.rows) for piece in pieces]
        here = torch.cat([nothing, *(all_rows[start : start + count] for start, count in starts)])
        torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)


def cut_request(rows: RowMap, ids: SparseIds) -> LookupRequest:
    unsized = rows.request(ids)
    if HAS_NATIVE:
        with mock.patch.object(requests.native, "sort", wraps=requests.native.sort) as sort:
            pairs = zip(unsized.tensors(), rows.request(ids, natively=True).tensors(), strict=True)
        assert sort.call_count == 1
        assert all(torch.equal(plain, found) for plain, found in pairs)
    return unsized.sized(*unsized.counts.sum(1).tolist())


def first(whole: EmbeddingTables, piece: TablePiece) -> int:
    return next(p.offset for p in whole.pieces if p.name == piece.name) + piece.start


def of_piece(whole: EmbeddingTables, piece: TablePiece) -> Tensor:
    start = first(whole, piece)
    return whole.weight.detach()[start : start + piece.rows]


def received_by_each(request: LookupRequest) -> list[RowRequest]:
    """What each rank receives if this one alone asks."""
    vectors, rows = request.counts.view(2, RANKS, -1).sum(2).tolist()
    factors = [None] * RANKS if request.factors is None else request.factors.split(rows)
    of_ranks = zip(request.rows.split(rows), factors, vectors, strict=True)
    return [decode_rows(of_rank, of_factors, request.pooled, count) for of_rank, of_factors, count in of_ranks]


def counted(plan: Plan, sizes: list[int], ids: SparseIds) -> list[list[int]]:
    """Vectors and rows of each table on each rank, counted one index at a time."""
    vectors: list[set] = [set() for _ in range(RANKS * len(sizes))]
    rows: list[set] = [set() for _ in vectors]
    for index, (row, bag) in enumerate(zip(ids.values.flatten().tolist(), ids.bag_of_each().tolist(), strict=True)):
        table = bag % len(sizes)
        (rank,) = (p.rank for p in plan.tables[f"T{table}"] if p.start <= row < p.stop)
        cell, pooled = rank * len(sizes) + table, f"T{table}" in plan.pooled
        vectors[cell].add(bag if pooled else row)
        rows[cell].add(index if pooled else row)
    return [[len(of_cell) for of_cell in kind] for kind in (vectors, rows)]


def test_keys_beyond_32_bits_are_told_apart() -> None:
    """As many keys as a table has rows, and for each rank and pooled table as many as there are samples."""
    rows = 2**31 - 10
    tables = [Table.of_column("T0", rows), Table.of_column("T1", 4)]
    pieces = (Piece(table="T0", start=0, stop=rows, rank=0), Piece(table="T1", start=0, stop=4, rank=1))
    values, offsets = torch.tensor([rows - 1, 3, 1, rows - 1, 2], dtype=torch.int32), torch.tensor([0, 1, 3, 4, 5])
    plan = Plan(ranks=2, pieces=pieces, pooled=("T1",))
    row_map = RowMap(tables, [(0, table.rows) for table in tables], plan)
    ids = SparseIds(values=values, tables=2, offsets=offsets)
    assert cut_request(row_map, ids).rows.tolist() == [rows - 1, 3, -2, 2]
    assert row_map.request(ids).counts_of_ranks(2).tolist() == [[1, 1], [2, 3]]
