"""Contract: what a rank asks of others, as rows or as sums, makes exactly the bags' vectors, and gives each row its
gradient; it is counted by table and rank."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.lookup import RowGradient, Table, TablePiece
from lightning_dlrm.sharding.lookup import sum_units
from lightning_dlrm.sharding.needs import Asked, Needs, RowMap
from lightning_dlrm.sharding.plan import Piece, Plan
from lightning_dlrm.tables.pooling import pool_rows
from lightning_dlrm.tables.tables import EmbeddingTables

RANKS, WIDTH = 3, 2


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


@settings(max_examples=60, deadline=None)
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
    rows = RowMap(whole.tables, plan, "cpu")
    needs = rows.needs(ids)
    assert needs.of_cells.tolist() == counted(plan, sizes, ids)
    shares = [torch.cat([of_piece(whole, p) for p in of_rank] or [torch.zeros(0, WIDTH)]) for of_rank in rows.held]
    asked = asked_of_each(needs)
    vectors_UD = torch.cat([sum_units(w.double(), a.rows, a) for w, a in zip(shares, asked, strict=True)])
    gradients: list[Tensor] = []
    bags, offsets, bag_N, factors = needs.bags, ids.offsets, None, ids.weights
    if bags is not None:
        offsets, bag_N, factors = bags.offsets, bags.bags, bags.factors
    elif offsets is not None:
        bag_N = ids.bag_of_each()
    anchor = torch.empty(0, requires_grad=True)
    found = pool_rows(anchor, vectors_UD, needs.lookups, offsets, bag_N, factors, gradients.append)
    expected = whole(ids)
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-12, atol=1e-12)

    grad = torch.rand(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found.backward(grad.view(found.shape))
    expected.backward(grad)
    gradient = whole.gradient()
    assert gradient is not None
    all_rows = torch.zeros_like(whole.weight).index_add(0, gradient.rows, gradient.values)
    of_ranks = gradients[0].split(needs.of_ranks(RANKS)[:, 0].tolist())
    for rank, (share, part, grad_VD) in enumerate(zip(shares, asked, of_ranks, strict=True)):
        sums = RowGradient.from_lookups(part.rows, grad_VD, part.units, part.factors)
        there = torch.zeros(share.shape, dtype=torch.float64).index_add(0, sums.rows, sums.values)
        pieces = [all_rows[start : start + p.stop - p.start] for p in rows.held[rank] for start in [first(whole, p)]]
        torch.testing.assert_close(there, torch.cat(pieces) if pieces else there, rtol=1e-12, atol=1e-12)


def first(whole: EmbeddingTables, piece: TablePiece) -> int:
    return next(p.offset for p in whole.pieces if p.name == piece.name) + piece.start


def of_piece(whole: EmbeddingTables, piece: TablePiece) -> Tensor:
    start = first(whole, piece)
    return whole.weight.detach()[start : start + piece.stop - piece.start]


def asked_of_each(needs: Needs) -> list[Asked]:
    """What arrives at each rank, where this one alone asks."""
    entries = needs.of_ranks(RANKS)[:, 1].tolist()
    factors = [None] * RANKS if needs.factors is None else needs.factors.split(entries)
    of_ranks = zip(needs.entries.split(entries), factors, strict=True)
    return [Asked.of(of_rank, of_factors, needs.bags is not None) for of_rank, of_factors in of_ranks]


def counted(plan: Plan, sizes: list[int], ids: SparseIds) -> list[list[int]]:
    """Units and entries of each table on each rank, counted one index at a time."""
    units: list[set] = [set() for _ in range(RANKS * len(sizes))]
    entries: list[set] = [set() for _ in units]
    for index, (row, bag) in enumerate(zip(ids.values.flatten().tolist(), ids.bag_of_each().tolist(), strict=True)):
        table = bag % len(sizes)
        (rank,) = (p.rank for p in plan.tables[f"T{table}"] if p.start <= row < p.stop)
        cell, pooled = rank * len(sizes) + table, f"T{table}" in plan.pooled
        units[cell].add(bag if pooled else row)
        entries[cell].add(index if pooled else row)
    return [[len(of_cell) for of_cell in kind] for kind in (units, entries)]


def test_keys_beyond_32_bits_are_told_apart() -> None:
    """As many keys as a table has rows, and for each rank and pooled table as many as there are samples."""
    rows = 2**31 - 10
    tables = [Table.of_column("T0", rows), Table.of_column("T1", 4)]
    pieces = (Piece(table="T0", start=0, stop=rows, rank=0), Piece(table="T1", start=0, stop=4, rank=1))
    values, offsets = torch.tensor([rows - 1, 3, 1, rows - 1, 2], dtype=torch.int32), torch.tensor([0, 1, 3, 4, 5])
    plan = Plan(ranks=2, pieces=pieces, pooled=("T1",))
    needs = RowMap(tables, plan, "cpu").needs(SparseIds(values=values, tables=2, offsets=offsets))
    assert needs.entries.tolist() == [rows - 1, 3, -2, 2]
    assert needs.of_ranks(2).tolist() == [[1, 1], [2, 3]]
