"""Plans: the assignment of rows of the embedding tables to ranks.

A plan cuts every table into pieces, which are ranges of rows, and gives each piece to a rank; a whole table is one
piece. ``sharding.balance`` makes plans, ``sharding.costs`` counts the costs of each rank.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_dlrm.contracts.documents import read_yaml
from lightning_dlrm.contracts.errors import UserError, require

MADE_BY_PLAN = "a plan that 'python -m lightning_dlrm plan --output FILE' wrote"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows ``start`` to ``stop`` - 1 of a table, and the rank that holds them."""

    table: str
    start: int
    stop: int
    rank: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Assignment of every row of every table to a rank.

    Raises:
        UserError: a rank is out of range, pieces of a table leave a gap or overlap, or a pooled table has no pieces.
    """

    ranks: int
    pieces: tuple[Piece, ...]
    """Table by table, each by ascending rows."""
    pooled: tuple[str, ...] = ()
    """Tables whose ranks send the sum of a bag's rows instead of the rows."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.pooled if name not in self.tables]:
            raise UserError(f"plan: pooled names {unknown[0]}, which has no pieces; give names of the plan's tables")
        for name, pieces in self.tables.items():
            expected = 0
            for piece in pieces:
                require(
                    0 <= piece.rank < self.ranks,
                    f"plan: table {name} has a piece on rank {piece.rank}, but ranks are {self.ranks}",
                )
                require(
                    piece.start == expected and piece.stop > piece.start,
                    f"plan: table {name} has a piece of rows {piece.start} to {piece.stop}; expected a piece "
                    f"from row {expected} on, since pieces follow each other without a gap",
                )
                expected = piece.stop

    @cached_property
    def tables(self) -> Mapping[str, tuple[Piece, ...]]:
        """Table name -> its pieces, by ascending rows."""
        found: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            found.setdefault(piece.table, []).append(piece)
        return {name: tuple(pieces) for name, pieces in found.items()}

    def pieces_within(self, table: str, start: int, stop: int) -> list[Piece]:
        """Return the parts of a table's pieces within a range of its rows; their rows count from ``start``."""
        return [
            Piece(table=table, start=max(p.start, start) - start, stop=min(p.stop, stop) - start, rank=p.rank)
            for p in self.tables[table]
            if max(p.start, start) < min(p.stop, stop)
        ]

    def check(self, table_rows: Mapping[str, int], ranks: int, unpoolable: Iterable[str] = ()) -> None:
        """Check that a plan read from a file fits a model and a number of ranks.

        Args:
            table_rows: table name of the model -> its rows.
            ranks: world size of this run.
            unpoolable: names of tables that cannot be pooled: see EmbeddingTables.may_pool.

        Raises:
            UserError: the plan is for other tables, other sizes, or another world size.
        """
        if wrong := sorted(set(self.pooled) & set(unpoolable)):
            raise UserError(
                f"the plan pools table {wrong[0]}, but the model has pooling weights "
                "(tables.pooling_weights): make a plan with this model, or remove the table from pooled"
            )
        require(
            ranks == self.ranks, f"the plan is for {self.ranks} ranks, this run has {ranks}: make a plan for {ranks}"
        )
        planned = {name: pieces[-1].stop for name, pieces in self.tables.items()}
        for name in sorted(planned.keys() | table_rows.keys()):
            require(
                planned.get(name) == table_rows.get(name),
                f"the plan has {planned.get(name, 'no')} rows for table {name}, the model has "
                f"{table_rows.get(name, 'no such table')}: make a plan with this model and dataset",
            )

    def document(self) -> dict[str, Any]:
        """Return the plan as YAML and JSON values: for each table a list of [first row, row after the last, rank]."""
        return {
            "ranks": self.ranks,
            "pooled": list(self.pooled),
            "tables": {name: [[p.start, p.stop, p.rank] for p in pieces] for name, pieces in self.tables.items()},
        }

    @staticmethod
    def of_document(document: Any) -> "Plan":
        """Return the plan of a value that ``document`` returned.

        Raises:
            UserError: the value has another form.
        """
        try:
            pieces = [
                Piece(table=str(name), start=int(start), stop=int(stop), rank=int(rank))
                for name, rows in document["tables"].items()
                for start, stop, rank in rows
            ]
            ranks = int(document["ranks"])
            pooled = tuple(str(name) for name in document.get("pooled", ()))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(
                f"the plan is not of the form 'ranks: 2, tables: {{C1: [[0, 100, 1]]}}'; expected {MADE_BY_PLAN}"
            ) from error
        return Plan(ranks=ranks, pieces=tuple(pieces), pooled=pooled)


def read_plan(path: Path) -> Plan:
    """Read a plan from a YAML file.

    Raises:
        UserError: the file cannot be read, or holds no plan.
    """
    reason = "it is a folder" if path.is_dir() else "no such file"
    require(path.is_file(), f"cannot read the plan {path}: {reason}; make one with 'python -m lightning_dlrm plan'")
    return Plan.of_document(read_yaml(path, f"expected {MADE_BY_PLAN}"))
