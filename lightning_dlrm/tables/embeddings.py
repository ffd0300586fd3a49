"""Embedding vectors of every column: tables, tables of several widths, and pooling.

Shape suffixes: B samples, F columns, G tables of one lookup, D width, N indices of all bags.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.tables.host import HostStorage
from lightning_dlrm.tables.lookup import DeviceStorage, EmbeddingTables
from lightning_dlrm.tables.pooling import pooling_tables
from lightning_dlrm.tables.table import Table


@dataclass(frozen=True, kw_only=True)
class QuotientRemainder:
    """Two small tables in place of a large one (Shi et al. 2020, arXiv:1909.02107, section 2).

    Id i reads row i // collisions of the quotient table and row i % collisions of the remainder table. The initial rows
    of both are from U(-1/sqrt(n), 1/sqrt(n)); n is the number of rows of the table that they replace.

    Args:
        collisions: rows of the remainder table.
        operation: combines the two vectors: mult, add, or concat (each half as wide).
        threshold: tables with more rows than this are replaced.
    """

    collisions: int
    operation: Literal["mult", "add", "concat"] = "mult"
    threshold: int = 200

    def __post_init__(self) -> None:
        require(
            self.operation in ("mult", "add", "concat"),
            f"quotient_remainder.operation {self.operation!r} is not one of mult, add, concat",
        )
        for name, least in (("collisions", 1), ("threshold", 0)):
            value = getattr(self, name)
            require(value >= least, f"quotient_remainder.{name} is {value}; expected {least} or more")

    def combine(self, quotient_BD: Tensor, remainder_BD: Tensor) -> Tensor:
        if self.operation == "mult":
            return quotient_BD * remainder_BD
        if self.operation == "add":
            return quotient_BD + remainder_BD
        return torch.cat([quotient_BD, remainder_BD], dim=1)


@dataclass(frozen=True, kw_only=True)
class MixedDimensions:
    """Wider vectors for tables with fewer rows (Ginart et al. 2019, arXiv:1909.11810, the power rule).

    A table of n rows gets D (n_min / n)^temperature, at least 1.

    Args:
        temperature: 0 for equal widths; the published experiments use 0.2 to 0.6.
        powers_of_two: round to the nearest power of two.
    """

    temperature: float
    powers_of_two: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.temperature <= 1, f"mixed_dimensions.temperature is {self.temperature}; expected 0 to 1")

    def widths(self, tables: Mapping[str, int], widest: int) -> dict[str, int]:
        """Return the width of each table; widths are rounded as in facebookresearch/dlrm, first to a whole number."""
        fewest = min(tables.values(), default=1)
        exact = {name: max(1.0, widest * (fewest / rows) ** self.temperature) for name, rows in tables.items()}
        whole = {name: round(width) for name, width in exact.items()}
        if not self.powers_of_two:
            return whole
        return {name: 2 ** round(math.log2(width)) for name, width in whole.items()}


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """Settings of embedding tables: widths, pooling, placement, initial values.

    Args:
        dims: widths of single tables by name; other tables have embedding_dim.
        mixed_dimensions: widths by the tables' rows, none above embedding_dim.
        project: project narrower vectors to embedding_dim, with a matrix for each table.
        quotient_remainder: two small tables in place of each large one.
        pooling: reduces several ids of one column: sum, or mean (the sum divided by the number of ids); no ids
            give zeros.
        pooling_weights: a factor for each row, beside the per-sample weights. learned: trained, starting at 1. Or the
            path of a file, made by torch.save of a dictionary table name -> float [rows], with fixed factors.
        on_host: columns whose tables stay in host memory with their optimizer state, or all: for tables that do not
            fit on the device. The command plan with --device-memory chooses them. Or column -> row, such as
            {C3: 1000000}: rows before it, which should be the more frequent ones, are on the device, and the other
            rows in host memory.
        initial_bound: b: initial rows are drawn from U(-b, b); by default from U(-1/sqrt(rows), 1/sqrt(rows)).
        initial_std: s: initial rows, including those of linear terms, are drawn from N(0, s^2).
        padding_row: row of every table that means "no value", such as 0: it starts at zero and stays zero, and its ids
            add nothing to a vector. None if every row stands for a value.
        dense_gradients: keep tables as ordinary parameters, each with a ``.grad`` as large as the table. The model's
            dense_optimizer updates every row at every step, and regularization covers whole tables. On one rank only.
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    mixed_dimensions: MixedDimensions | None = None
    project: bool = False
    quotient_remainder: QuotientRemainder | None = None
    pooling: Literal["sum", "mean"] = "sum"
    pooling_weights: str | None = None
    on_host: Mapping[str, int] | Sequence[str] | str = ()
    initial_bound: float | None = None
    initial_std: float | None = None
    padding_row: int | None = None
    dense_gradients: bool = False

    def __post_init__(self) -> None:
        require(
            self.initial_bound is None or 0 <= self.initial_bound < math.inf,
            f"tables.initial_bound is {self.initial_bound}; expected a number of 0 or more",
        )
        require(
            self.initial_std is None or (0 <= self.initial_std < math.inf and self.initial_bound is None),
            f"tables.initial_std is {self.initial_std} and initial_bound {self.initial_bound}; expected a number of 0 "
            "or more for one of them, and null for the other",
        )
        require(
            self.padding_row is None or self.padding_row >= 0,
            f"tables.padding_row is {self.padding_row}; expected the number of a row, such as 0",
        )
        require(
            not (self.dense_gradients and self.on_host),
            "tables.dense_gradients and tables.on_host exclude each other: leave one of them out",
        )
        require(self.pooling in ("sum", "mean"), f"tables.pooling {self.pooling!r} is not one of sum, mean")
        require(
            not self.dims or self.mixed_dimensions is None,
            "tables.dims and tables.mixed_dimensions both give widths: keep one of them",
        )
        require(
            not isinstance(self.on_host, str) or self.on_host == "all",
            f"tables.on_host is {self.on_host!r}; expected all, or a list of columns such as [C3, C12]",
        )

    def table(self, name: str, rows: int, bound: float | None = None) -> Table:
        """Return a table whose initial rows are as these settings say.

        Args:
            name: the table's name.
            rows: number of its rows.
            bound: bound of the initial rows, if the settings give no ``initial_std``; by default that of the settings.
        """
        if bound is None:
            bound = Table.of_column(name, rows).bound if self.initial_bound is None else self.initial_bound
        return Table(name=name, rows=rows, bound=bound, deviation=self.initial_std, zero_row=self.padding_row)

    def without_padding(self, ids: SparseIds) -> SparseIds:
        """Return the ids with weight 0 for those of the padding row."""
        return ids if self.padding_row is None else ids.without(self.padding_row)

    def host_rows(self, columns: Mapping[str, int]) -> dict[str, int]:
        """Return the first row of each column's table that stays in host memory with all rows after it.

        Raises:
            UserError: ``on_host`` names an unknown column, or a row that its table does not have.
        """
        if self.on_host == "all":
            return dict.fromkeys(columns, 0)
        unknown = [name for name in self.on_host if name not in columns]
        if unknown:
            raise UserError(f"tables.on_host names {unknown[0]}, which is not a table; tables: {', '.join(columns)}")
        if not isinstance(self.on_host, Mapping):
            return dict.fromkeys(self.on_host, 0)
        for name, row in self.on_host.items():
            require(
                0 <= row < columns[name],
                f"tables.on_host keeps the rows of {name} from {row} on in host memory; expected 0 to "
                f"{columns[name] - 1}, since the table has {columns[name]} rows",
            )
            replacement = self.quotient_remainder
            require(
                not row or replacement is None or columns[name] <= replacement.threshold,
                f"tables.on_host splits the table of {name}, which quotient_remainder replaces by two: "
                "give 0, which keeps both in host memory",
            )
        return dict(self.on_host)

    def widths(self, tables: Mapping[str, int], embedding_dim: int) -> dict[str, int]:
        """Return the width of each table before projection.

        Raises:
            UserError: a width is given for an unknown table, or is above embedding_dim and cannot be projected.
        """
        if self.mixed_dimensions is not None:
            widths = self.mixed_dimensions.widths(tables, embedding_dim)
        else:
            unknown = [name for name in self.dims if name not in tables]
            if unknown:
                raise UserError(f"tables.dims names {unknown[0]}, which is not a table; tables: {', '.join(tables)}")
            widths = {name: self.dims.get(name, embedding_dim) for name in tables}
        wide = {name: width for name, width in widths.items() if width > embedding_dim}
        if wide and (self.project or self.mixed_dimensions is not None):
            name, width = next(iter(wide.items()))
            raise UserError(
                f"table {name} has the width {width}, more than embedding_dim, which is {embedding_dim}; raise "
                f"embedding_dim to {max(wide.values())}"
            )
        return widths


@dataclass(frozen=True)
class _Member:
    """A table of a lookup, which reads rows (id // divisor) % rows of a column's ids."""

    column: int
    table: Table
    divisor: int = 1
    start: int = 0
    """The first row of the table that the lookup holds."""
    stop: int | None = None
    """The row after the last row that the lookup holds; None for the end of the table."""

    @property
    def range(self) -> tuple[int, int]:
        return self.start, self.table.rows if self.stop is None else self.stop


class Embeddings(nn.Module):
    """A vector for every column of every sample.

    Tables of one width and one storage share a lookup. If there is only one lookup of all columns, its output is the
    result.

    Args:
        columns: name -> rows, in the order of a batch's ids.
        embedding_dim: D, the width of every vector unless the settings give other widths.
        seed: seed of the initial rows.
        settings: see TableSettings.

    Raises:
        UserError: the settings do not fit the tables.
    """

    def __init__(
        self, columns: Mapping[str, int], embedding_dim: int, seed: int, settings: TableSettings | None = None
    ) -> None:
        super().__init__()
        self.settings = settings or TableSettings()
        self.embedding_dim = embedding_dim
        self.names = tuple(columns)
        narrow = self.settings.widths(columns, embedding_dim)
        on_host = self.settings.host_rows(columns)
        groups: dict[tuple[int, bool], list[_Member]] = {} if columns else {(embedding_dim, False): []}
        for column, (name, rows) in enumerate(columns.items()):
            for width, member in self._members(column, name, rows, narrow[name]):
                first = on_host.get(name, rows)
                if first > 0:
                    here = member if name not in on_host else dataclasses.replace(member, stop=first)
                    groups.setdefault((width, False), []).append(here)
                if name in on_host:
                    groups.setdefault((width, True), []).append(dataclasses.replace(member, start=first))
        dense = self.settings.dense_gradients
        groups_list = nn.ModuleList(
            WidthGroup(members, width, seed, len(columns), HostStorage() if host else DeviceStorage(), dense)
            for (width, host), members in groups.items()
        )
        self.groups = cast(Sequence[WidthGroup], groups_list)
        self.projections = nn.ModuleList(
            nn.Linear(width, embedding_dim, bias=False)
            if self.settings.project and width < embedding_dim
            else nn.Identity()
            for width in narrow.values()
        )
        self.widths = tuple(embedding_dim if self.settings.project else width for width in narrow.values())
        self._split_columns = {column for column, name in enumerate(self.names) if on_host.get(name)}
        """Columns whose table is split between two lookups."""
        self.pooling_weights = pooling_tables(self.settings.pooling_weights, columns, seed, dense)
        if self.pooling_weights is not None:
            # ``forward`` multiplies the learned factors with the per-sample weights, so no rank may sum rows before.
            for lookup in (self.pooling_weights, *(group.lookup for group in self.groups)):
                lookup.may_pool = False
        # Whether the one lookup holds one table of every column, in the order of the columns.
        self._is_plain = [len(group.members) for group in self.groups] == [len(columns)] and not self.multiply_adds()

    def _members(self, column: int, name: str, rows: int, width: int) -> list[tuple[int, _Member]]:
        """Return the tables of a column, each with its width."""
        replacement = self.settings.quotient_remainder
        if replacement is None or rows <= replacement.threshold:
            return [(width, _Member(column, self.settings.table(name, rows)))]
        if replacement.operation == "concat":
            require(
                width % 2 == 0,
                f"quotient_remainder.operation concat halves the width of table {name}, which is {width}: "
                "choose an even width",
            )
            width //= 2
        # Ids of the padding row have weight 0, and other ids share its rows here.
        settings = dataclasses.replace(self.settings, padding_row=None)
        bound = settings.table(name, rows).bound
        quotient = settings.table(f"{name}/quotient", -(-rows // replacement.collisions), bound)
        remainder = settings.table(f"{name}/remainder", replacement.collisions, bound)
        return [(width, _Member(column, quotient, replacement.collisions)), (width, _Member(column, remainder))]

    def prefetch(self, ids: SparseIds) -> None:
        """Start the transfers of a later ``forward`` of these ids: see EmbeddingTables.prefetch."""
        if self.pooling_weights is not None and self.pooling_weights.prefetches:
            self.pooling_weights.prefetch(ids)
        for group in self.groups:
            if group.lookup.prefetches:
                group.lookup.prefetch(group.ids_of(ids)[0])

    def forward(self, ids: SparseIds) -> Tensor:
        """Return the columns' vectors side by side: [B, sum of the widths]."""
        ids = self.settings.without_padding(ids)
        if self.pooling_weights is not None:
            factors = self.pooling_weights.look_up_each(ids).view(ids.values.shape)
            key = ids.key
            ids = dataclasses.replace(ids, weights=factors if ids.weights is None else factors * ids.weights)
            ids.key = key
        vectors = [group(ids) for group in self.groups]
        if self.settings.pooling == "mean" and ids.offsets is not None:
            lengths_BF = ids.lengths().clamp(min=1)
            vectors = [
                vectors_BGD / lengths_BF.index_select(1, group.constants[0])[..., None]
                for vectors_BGD, group in zip(vectors, self.groups, strict=True)
            ]
        if self._is_plain:
            return vectors[0].flatten(1)
        parts: list[list[Tensor]] = [[] for _ in self.names]
        for vectors_BGD, group in zip(vectors, self.groups, strict=True):
            for vector_BD, member in zip(vectors_BGD.unbind(1), group.members, strict=True):
                parts[member.column].append(vector_BD)
        return torch.cat(
            [
                project(self._combined(column, part))
                for column, (part, project) in enumerate(zip(parts, self.projections, strict=True))
            ],
            dim=1,
        )

    def _combined(self, column: int, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        if column in self._split_columns:
            return parts[0] + parts[1]
        assert self.settings.quotient_remainder is not None
        return self.settings.quotient_remainder.combine(*parts)

    def require_one_width(self, user: str, other_way: str = "") -> None:
        """Check that every vector is embedding_dim wide.

        Args:
            user: name of the model or option that needs it, for the message.
            other_way: another remedy, for the message.

        Raises:
            UserError: the width of a vector differs.
        """
        for name, width in zip(self.names, self.widths, strict=True):
            require(
                width == self.embedding_dim,
                f"{user} needs vectors of one width, but table {name} has the width {width} and embedding_dim is "
                f"{self.embedding_dim}: make them equal, or set tables.project to true{other_way}",
            )

    def multiply_adds(self) -> int:
        """Return the multiply-adds of one sample's projections; lookups have none."""
        return sum(p.in_features * p.out_features for p in self.projections if isinstance(p, nn.Linear))


class WidthGroup(nn.Module):
    """A lookup of tables of one width.

    Args:
        members: the tables.
        width: width of all tables.
        seed: seed of the initial rows.
        columns: number of columns of a batch's ids.
        storage: the memory of the rows.
        dense: ``dense_gradients`` of EmbeddingTables.
    """

    constants: Tensor
    """int64 [5, G]: of each table its column, divisor and rows, and the first row and the row after the last that the
    lookup holds."""

    def __init__(
        self, members: Sequence[_Member], width: int, seed: int, columns: int, storage: DeviceStorage, dense: bool
    ) -> None:
        super().__init__()
        self.members = tuple(members)
        ranges = [member.range for member in members]
        tables = [member.table for member in members]
        self.lookup = EmbeddingTables(tables, width, seed, ranges=ranges, storage=storage, dense_gradients=dense)
        self.cuts = any(
            start or stop < member.table.rows for member, (start, stop) in zip(members, ranges, strict=True)
        )
        self.read = self.asked = 0
        """Lookups of training: those that read rows of this group, and all lookups of its columns."""
        self.takes_all = [member.column for member in members] == list(range(columns))
        # Only a quotient table and a remainder table read the same column.
        self.splits_ids = len({member.column for member in members}) < len(members)
        # Ids are prefetched while they are still in host memory.
        self._host_constants = (
            torch.tensor(
                [
                    (member.column, member.divisor, member.table.rows, start, stop)
                    for member, (start, stop) in zip(members, ranges, strict=True)
                ],
                dtype=torch.int64,
                device="cpu",
            )
            .view(-1, 5)
            .T.contiguous()
        )
        constants = self._host_constants.to(torch.get_default_device())
        self.register_buffer("constants", constants, persistent=False)

    def forward(self, ids: SparseIds) -> Tensor:
        """Return the tables' vectors: [B, G, D]."""
        own, asked = self.ids_of(ids)
        if self.training:
            self.asked += asked
            self.read += own.values.numel()
        return self.lookup(own)

    def ids_of(self, ids: SparseIds) -> tuple[SparseIds, int]:
        """Return the ids of the rows that the lookup holds, with the key of the given ids, and the number of all ids of
        its columns; the ids are in host memory or on the device, as given."""
        constants = self._host_constants if ids.values.device.type == "cpu" else self.constants
        columns, divisors, rows, starts, stops = constants
        own = ids
        if not self.takes_all:
            own = own.of_tables(columns)
        if self.splits_ids:
            table = own.bag_of_each().view(own.values.shape) % len(self.members)
            values = torch.div(own.values, divisors[table], rounding_mode="floor") % rows[table]
            own = dataclasses.replace(own, values=values.to(own.values.dtype))
        asked = own.values.numel()
        if self.cuts:
            own = own.within(starts, stops)
        own.key = ids.key
        return own, asked
