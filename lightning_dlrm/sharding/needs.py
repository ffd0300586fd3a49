"""What a batch needs of the ranks that hold table rows: arithmetic on ids, before anything travels.

Of most tables a rank asks for the distinct rows. Of pooled ones it asks for sums: one for each bag and rank that
holds some of the bag's rows, which is one vector where the bag has several. A vector asked for is a *unit*, and
what tells its rows is one *entry* for each of them.

Shape suffixes: B samples, F tables, N indices of all bags, P pieces, W ranks, C cells (a table on a rank: W * F of
them, rank after rank), U units, E entries.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.lookup import SortedLookups, Table, TablePiece
from lightning_dlrm.sharding.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Bags:
    """Where the units go, for tables of which some are pooled: as ``pool_rows`` takes it."""

    offsets: Tensor | None
    bags: Tensor | None
    factors: Tensor | None
    """1 for a sum, in which factors count already."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one rank needs of each."""

    lookups: SortedLookups
    """Which indices take part in which unit, a sum counting as one index; units by ascending rank."""
    bags: Bags | None
    """None where no table is pooled: then the indices are the batch's."""
    entries: Tensor
    """[E]: rows as their owners number them, unit after unit; those after a unit's first as -1 - row."""
    factors: Tensor | None
    """[E]: of the rows in their sums; None means 1."""
    of_cells: Tensor
    """int64 [2, C]: how many units and how many entries are of each table on each rank."""

    def of_ranks(self, ranks: int) -> Tensor:
        """int64 [W, 2]: how many units and entries are of each rank."""
        return self.of_cells.view(2, ranks, -1).sum(2).T


@dataclass(frozen=True)
class Asked:
    """Rows of a rank that make up the units that it is asked for."""

    rows: Tensor
    """[E]."""
    starts: Tensor | None
    """[U]: where the rows of each unit begin; None where each unit is a row."""
    units: Tensor | None
    """int64 [E]: the unit of each row; likewise."""
    factors: Tensor | None
    """[E]; None means 1."""

    @staticmethod
    def of(entries: Tensor, factors: Tensor | None, pooled: bool) -> "Asked":
        """Reads ``entries`` of ``Needs``, of all ranks, rank after rank."""
        if not pooled:
            return Asked(entries, None, None, None)
        begins = entries >= 0
        starts = torch.nonzero(begins).view(-1).to(entries.dtype)
        return Asked(torch.where(begins, entries, -1 - entries), starts, begins.cumsum(0) - 1, factors)


class RowMap(nn.Module):
    """Which rank holds which rows of some tables, and what a batch needs of each.

    Args:
        tables: in the order of the ids of a batch.
        plan: where the rows of these tables are, among those of others.
        device: of the buffers.
    """

    table_offsets: Tensor
    piece_starts: Tensor
    piece_keys: Tensor
    piece_rows: Tensor
    piece_pooled: Tensor
    piece_slots: Tensor
    rank_starts: Tensor
    cell_keys: Tensor
    cell_slots: Tensor

    def __init__(self, tables: Sequence[Table], plan: Plan, device: torch.device | str) -> None:
        super().__init__()
        ranks = plan.ranks
        self.pools = any(table.name in plan.pooled for table in tables)
        held: list[list[TablePiece]] = [[] for _ in range(ranks)]
        rows_held, cell_rows = [0] * ranks, [[0] * len(tables) for _ in range(ranks)]
        # Of each piece, by table: the first row among those of all tables, its cell, and where it begins there.
        pieces, table_offsets, total = [], [], 0
        for number, table in enumerate(tables):
            table_offsets.append(total)
            for piece in plan.tables[table.name]:
                rank, offset = piece.rank, rows_held[piece.rank]
                held[rank].append(
                    TablePiece(
                        name=table.name, table_rows=table.rows, start=piece.start, stop=piece.stop, offset=offset
                    )
                )
                pieces.append((total + piece.start, rank * len(tables) + number, cell_rows[rank][number], offset))
                rows_held[rank] += piece.rows
                cell_rows[rank][number] += piece.rows
            total += table.rows
        self.held = tuple(tuple(of_rank) for of_rank in held)
        """The pieces of each rank, as they lie there."""
        self.ranks, self._total = ranks, total
        # A unit is found by a key: a row's number, counted rank after rank and table after table, or a sample's where
        # the table is pooled. As many keys as samples come before those of a cell for each pooled one before it.
        pooled = [table.name in plan.pooled for table in tables] * ranks
        rows_before = [
            0,
            *itertools.accumulate(0 if p else n for p, n in zip(pooled, itertools.chain(*cell_rows), strict=True)),
        ]
        slots_before = [0, *itertools.accumulate(pooled)]
        self._slots = slots_before[-1]
        # int32 halves the time to sort rows; it reaches past any published table set.
        index = torch.int32 if total <= torch.iinfo(torch.int32).max else torch.int64
        for buffer, values, dtype in (
            ("table_offsets", table_offsets, index),
            ("piece_starts", [start for start, *_ in pieces], index),
            (
                "piece_keys",
                [rows_before[c] + (0 if pooled[c] else inside - start) for start, c, inside, _ in pieces],
                index,
            ),
            ("piece_rows", [offset - start for start, _, _, offset in pieces], index),
            ("piece_pooled", [pooled[c] for _, c, _, _ in pieces], torch.bool),
            ("piece_slots", [slots_before[c] for _, c, _, _ in pieces], index),
            ("rank_starts", [0, *itertools.accumulate(rows_held)][:-1], index),
            ("cell_keys", rows_before, torch.int64),
            ("cell_slots", slots_before, torch.int64),
        ):
            self.register_buffer(buffer, torch.tensor(values, dtype=dtype, device=device), persistent=False)

    def needs(self, ids: SparseIds) -> Needs:
        """What a batch needs; factors that come with the ids are constants where tables are pooled."""
        tables = max(ids.tables, 1)
        bag_N = ids.bag_of_each() if self.pools or ids.offsets is not None else None
        if ids.offsets is None:
            rows_N = (ids.values + self.table_offsets).view(-1)
        else:
            assert bag_N is not None
            rows_N = ids.values + self.table_offsets[bag_N % tables]
        piece_N = torch.searchsorted(self.piece_starts, rows_N, right=True, out_int32=True) - 1
        if bag_N is None or not self.pools:
            lookups = SortedLookups.of(rows_N + self.piece_keys.index_select(0, piece_N))
            units_C = torch.searchsorted(lookups.rows, self.cell_keys.to(lookups.rows.dtype)).diff()
            asks_W = units_C.view(self.ranks, -1).sum(1)
            entries_U = lookups.rows - torch.repeat_interleave(self.rank_starts, asks_W)
            of_cells = torch.stack([units_C, units_C])
            return Needs(lookups=lookups, bags=None, entries=entries_U, factors=None, of_cells=of_cells)
        samples = len(ids)
        keys_P = self.piece_keys
        if self._total + self._slots * samples > torch.iinfo(keys_P.dtype).max:
            keys_P = keys_P.long()
        keys_P = keys_P + self.piece_slots * samples
        pooled_N = self.piece_pooled.index_select(0, piece_N)
        lookups = SortedLookups.of(torch.where(pooled_N, bag_N // tables, rows_N) + keys_P.index_select(0, piece_N))
        return self._pooled_needs(ids, bag_N, lookups, pooled_N, rows_N + self.piece_rows.index_select(0, piece_N))

    def _pooled_needs(
        self, ids: SparseIds, bag_N: Tensor, lookups: SortedLookups, pooled_N: Tensor, owner_rows_N: Tensor
    ) -> Needs:
        """
        Args:
            ids, bag_N: of the batch.
            lookups: of all indices; sums are units.
            pooled_N: whether each index's table is pooled.
            owner_rows_N: the row of each index as its owner numbers it.
        """
        order_N = lookups.order
        # As datasets have them; under 64-true Lightning makes float64 of those that were not announced.
        factors_N = None if ids.weights is None else ids.weights.detach().reshape(-1).float()
        starts_U = lookups.counts.cumsum(0) - lookups.counts
        # By ascending key from here on.
        first_N = torch.zeros_like(pooled_N).index_fill_(0, starts_U, True)
        summed_N = pooled_N.index_select(0, order_N)
        told_N = first_N | summed_N
        rows_N = owner_rows_N.index_select(0, order_N)
        entries_E = torch.where(first_N, rows_N, -1 - rows_N)[told_N]
        factors_E = None
        if factors_N is not None:
            factors_E = torch.where(summed_N, factors_N.index_select(0, order_N), 1.0)[told_N]
        bounds_C = torch.searchsorted(
            lookups.rows, (self.cell_keys + self.cell_slots * len(ids)).to(lookups.rows.dtype)
        )
        index_bounds_C = torch.cat([starts_U, starts_U.new_full((1,), len(order_N))])[bounds_C]
        of_cells = torch.stack([bounds_C.diff(), _counted_before(told_N)[index_bounds_C].diff()])
        # By index again, and here a sum is one index of its bag.
        kept_N = torch.empty_like(pooled_N)
        kept_N[order_N] = first_N | ~summed_N
        places_N = _counted_before(kept_N)
        bags = Bags(
            offsets=None if ids.offsets is None else places_N[ids.offsets],
            bags=None if ids.offsets is None else bag_N[kept_N],
            factors=None if factors_N is None else torch.where(pooled_N, 1.0, factors_N)[kept_N],
        )
        counts_U = torch.where(summed_N[starts_U], 1, lookups.counts)
        here = SortedLookups(lookups.rows, counts_U, places_N[order_N[kept_N[order_N]]])
        return Needs(lookups=here, bags=bags, entries=entries_E, factors=factors_E, of_cells=of_cells)


def _counted_before(chosen_N: Tensor) -> Tensor:
    """int64 [N + 1]: how many are chosen before each place."""
    return torch.cat([chosen_N.new_zeros(1, dtype=torch.int64), chosen_N.cumsum(0)])
