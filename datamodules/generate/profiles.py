"""Profiles of traces: the stack distances of a column's accesses, measured in a dataset or read from a file.

The profile of a column is the histogram of its stack distances (see ``datamodules.generate.lru``), and of the first
accesses of rows among them, phase by phase. Phases end after 64, 76, 90, 107, 128, ... accesses, four in each octave,
so that the profile shows how the distances and the number of distinct rows grow.

A profile does not hold which rows stay popular (from distances alone, every row is accessed equally often in the long
run), how the columns of a sample depend on each other, and labels. Rows are numbered by first access.

To measure a profile takes the memory of one LRU stack (see ``lru``) and of 65,536 rows, for any number of accesses.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.folder import Folder, failures_as_user_errors, load_schema
from datamodules.generate.draws import exp, log
from datamodules.parquet import read_part
from datamodules.preprocess.journal import written_aside
from lightning_dlrm.contracts.documents import is_name, parse_json, read_bounded
from lightning_dlrm.contracts.errors import UserError, one_line, require
from lightning_dlrm.contracts.schema import SplitName

if TYPE_CHECKING:
    from datamodules.generate.lru import LruStack

PROFILE_VERSION = 1
LEAST_ACCESSES = 1_000
"""A profile of fewer accesses is not significant."""

# Classes of distances: 0 for a first access, then each distance alone, from 64 on 32 classes to an octave.
CLASS_LOW: NDArray[np.int64] = np.concatenate(
    [np.arange(64), *((32 + np.arange(32)) << (octave - 5) for octave in range(6, 31))]
)
"""int64 [classes]: the smallest distance of each class."""


_MOST_PHASES = 4 * 40
"""Enough for 2^46 accesses."""


def phase_end(phase: int) -> int:
    """Return the number of accesses up to the end of a phase."""
    return (64, 76, 90, 107)[phase % 4] << (phase // 4)


@dataclass(frozen=True, kw_only=True)
class _Phase:
    distances_from: list[int]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class _Column:
    column: str
    table_rows: int
    accesses: int
    distinct_rows: int
    phases: list[_Phase]


@dataclass(frozen=True, kw_only=True)
class _Version:
    trace_profiles: int


@dataclass(frozen=True, kw_only=True)
class _Profiles:
    """A file of profiles."""

    columns: list[_Column]


@dataclass(frozen=True, eq=False)
class Profile:
    """The stack distances of a column's accesses."""

    column: str
    rows: int
    """Of the column's table."""
    counts: NDArray[np.int64]
    """[phases, classes]: accesses of each phase by class of distance; the last phase may be unfinished."""

    @property
    def accesses(self) -> int:
        return int(self.counts.sum())

    @property
    def distinct(self) -> int:
        """Rows that were accessed."""
        return int(self.counts[:, 0].sum())

    @property
    def growth(self) -> float:
        """The exponent of the growth of distinct rows with accesses in the last octave: 0 for none, 1 for a new row
        with every access."""
        first = self._last_octave()
        start, seen = self.counts[:first].sum(), self.counts[:first, 0].sum()
        return float((log(np.array([self.distinct / seen])) / log(np.array([self.accesses / start])))[0])

    def beginning(self, accesses: int) -> NDArray[np.float64]:
        """Return how many of the first accesses are of each class, [classes]; within a phase, in proportion."""
        sizes = self.counts.sum(axis=1)
        share = np.clip((accesses - (np.cumsum(sizes) - sizes)) / np.maximum(sizes, 1), 0, 1)
        return share @ self.counts

    def phases(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield length and counts by class of each phase, without end; see ``trace`` on what follows the recorded
        phases."""
        yield from ((int(counts.sum()), counts) for counts in self.counts)
        last_octave = self.counts[self._last_octave() :].sum(axis=0)
        end, seen, quarter = self.accesses, self.distinct, 0
        while True:
            quarter += 1
            length = (self.accesses * phase_end(quarter) >> 6) - end
            end += length
            grown = exp(self.growth * log(np.array([end / self.accesses])))
            new = min(round(self.distinct * float(grown[0])), self.rows, seen + length) - seen
            seen += new
            counts = last_octave.copy()
            counts[0] = new
            yield length, counts

    def _last_octave(self) -> int:
        """Return the first phase that ends in the second half of the accesses."""
        return int(np.searchsorted(np.cumsum(self.counts.sum(axis=1)), self.accesses // 2, side="right"))

    def as_json(self) -> dict[str, Any]:
        kept = [np.flatnonzero(counts) for counts in self.counts]
        return {
            "column": self.column,
            "table_rows": self.rows,
            "accesses": self.accesses,
            "distinct_rows": self.distinct,
            "phases": [
                {"distances_from": CLASS_LOW[classes].tolist(), "counts": counts[classes].tolist()}
                for classes, counts in zip(kept, self.counts, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, document: "_Column") -> "Profile":
        counts = np.zeros((len(document.phases), len(CLASS_LOW)), dtype=np.int64)
        for row, phase in zip(counts, document.phases, strict=True):
            low = np.array(phase.distances_from, dtype=np.int64)
            classes = np.searchsorted(CLASS_LOW[:-1], low)
            if not np.array_equal(CLASS_LOW[classes], low):
                raise ValueError("its classes of distances are unknown")
            row[classes] = phase.counts
        profile = cls(document.column, document.table_rows, counts)
        ends = np.cumsum(counts.sum(axis=1))
        if not (is_name(document.column) and 0 < document.table_rows < 2**31 and len(counts) > 0):
            raise ValueError("no column can have its name, rows or phases")
        whole = all(end == phase_end(phase) for phase, end in enumerate(ends[:-1].tolist()))
        whole = whole and ends[-1] <= phase_end(len(ends) - 1)
        if not whole or not 0 <= counts.min() <= counts.max() < 2**40 or (profile.accesses, profile.distinct) != (
            document.accesses, document.distinct_rows
        ):  # fmt: skip
            raise ValueError("its counts do not add up")
        if profile.accesses < LEAST_ACCESSES or not counts[0, 0] or profile.distinct > profile.rows:
            raise ValueError("no column can have its counts")
        return profile


class Profiler:
    """Builds the profile of a column's accesses, given piece by piece.

    Args:
        column: its name.
        rows: of its table.
        cut: a phase also ends after this number of accesses, so that ``Profile.beginning`` is exact there; 0 for none.

    Raises:
        UserError: numba is not installed.
    """

    def __init__(self, column: str, rows: int, cut: int = 0) -> None:
        self.column, self.rows, self.accesses = column, rows, 0
        self._stack = lru_stack(rows)
        self._counts = [np.zeros(len(CLASS_LOW), dtype=np.int64)]
        self._ends = sorted({*map(phase_end, range(_MOST_PHASES)), *([cut] if cut else [])})

    def add(self, ids: NDArray[np.int32]) -> None:
        """Add the next accesses.

        Raises:
            UserError: an id is not a row of the table.
        """
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.rows:
            raise UserError(
                f"column {self.column} has ids from {ids.min()} to {ids.max()}, its table has rows 0 to "
                f"{self.rows - 1}; make the dataset again"
            )
        classes = np.searchsorted(CLASS_LOW, self._stack.distances(ids), side="right") - 1
        while len(classes):
            left = self._ends[len(self._counts) - 1] - self.accesses
            if not left:
                self._counts.append(np.zeros(len(CLASS_LOW), dtype=np.int64))
                continue
            now, classes = classes[:left], classes[left:]
            self._counts[-1] += np.bincount(now, minlength=len(CLASS_LOW))
            self.accesses += len(now)

    def profile(self) -> Profile:
        """Return the profile of all accesses so far."""
        return Profile(self.column, self.rows, np.stack(self._counts))


def lru_stack(rows: int | None = None) -> "LruStack":
    try:
        from datamodules.generate.lru import LruStack
    except ModuleNotFoundError as error:
        raise UserError(
            f"traces need {error.name}, which is not installed; install it with: pip install 'lightning-dlrm[trace]'"
        ) from error
    return LruStack(rows)


class TraceSource:
    """Columns to profile in a dataset, or profiles that were saved.

    Args:
        path: a dataset folder (a path or a URL), or a file of profiles.
        columns: names of the columns; None for all that have a table.
        split: of the dataset; without effect on a file of profiles.

    Raises:
        UserError: ``path`` is neither, or lacks a column or the split.
    """

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None, split: SplitName = "train") -> None:
        self.path, self.split = Folder(path), split
        self._saved: dict[str, Profile] | None = None
        file, text = self.path.local, None
        with failures_as_user_errors(str(path)):
            require(
                file is None or file.exists(),
                f"{path} does not exist; give a dataset folder, or a file of trace profiles",
            )
            if file is not None and file.is_file():
                text = read_bounded(file, "give a file of trace profiles")
        if file is not None and text is not None:
            self._saved = _read_profiles(file, text)
            self.identity = f"profile {hashlib.sha256(text).hexdigest()}"
            tables = {name: profile.rows for name, profile in self._saved.items()}
        else:
            self.schema = load_schema(self.path)
            require(
                split in self.schema.splits and self.schema.splits[split].rows,
                f"{self.path} has no rows in its {split} split; it has {', '.join(self.schema.splits) or 'none'}: "
                "choose another split",
            )
            self.identity = f"data {self.schema.data_fingerprint} {split}"
            tables = dict(self.schema.features.tables)
        require(tables, f"{self.path} has no categorical or multi-hot columns, so there are no accesses to profile")
        for name in columns or ():
            require(
                name in tables,
                f"{self.path} has no categorical or multi-hot column {name}; it has {', '.join(tables)}",
            )
        self.tables = {name: tables[name] for name in (dict.fromkeys(columns) if columns else tables)}
        """Rows of each chosen column's table."""
        self.length = (
            self.schema.splits[split].rows if self._saved is None else self._saved[next(iter(self.tables))].accesses
        )
        """Rows of the split, or accesses of the first chosen profile."""

    def profiles(self, progress: bool = True, cuts: Mapping[str, int] = MappingProxyType({})) -> list[Profile]:
        """Return the profile of each chosen column, in order.

        Args:
            progress: show a progress bar, on a terminal.
            cuts: of columns of a dataset; see ``Profiler``.

        Raises:
            UserError: a column has too few accesses, or its files are missing or altered, or numba is not installed.
        """
        if self._saved is not None:
            return [self._saved[name] for name in self.tables]
        rows = self.schema.splits[self.split].rows
        with tqdm(
            total=rows * len(self.tables),
            desc="Profiling",
            unit=" rows",
            unit_scale=True,
            disable=None if progress else True,
        ) as bar:
            profiles = []
            for name, table_rows in self.tables.items():
                profiler = Profiler(name, table_rows, cuts.get(name, 0))
                for ids, count in self._accesses(name):
                    profiler.add(ids)
                    bar.update(count)
                require(
                    profiler.accesses >= LEAST_ACCESSES,
                    f"column {name} of {self.path} has {profiler.accesses:,} accesses in its {self.split} split; "
                    f"a profile needs at least {LEAST_ACCESSES:,}: choose other columns or more data",
                )
                profiles.append(profiler.profile())
        return profiles

    def _accesses(self, name: str) -> Iterator[tuple[NDArray[np.int32], int]]:
        """Yield the ids of a column, slice by slice, and the number of rows they belong to."""
        chosen = [column for column in self.schema.columns if column.name == name]
        for file in self.schema.splits[self.split].files:
            for table in read_part(self.path, self.schema, file, chosen):
                column = table.column(name)
                yield (pc.list_flatten(column) if pa.types.is_list(column.type) else column).to_numpy(), len(column)


def save_profiles(profiles: Sequence[Profile], path: Path) -> None:
    """Write profiles to a JSON file, whole or not at all."""
    document = {"trace_profiles": PROFILE_VERSION, "columns": [profile.as_json() for profile in profiles]}
    try:
        with written_aside(path) as partial:
            partial.write_text(json.dumps(document) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a file that you may write") from error


def _read_profiles(path: Path, text: bytes) -> dict[str, Profile]:
    where = f"{path} is not a file of trace profiles: it"
    advice = "make one with 'python -m lightning_dlrm generate trace --from DIR --profile FILE'"
    version = parse_json(text, _Version, where, advice).trace_profiles
    require(
        version == PROFILE_VERSION, f"{where} is of version {version}, this release reads {PROFILE_VERSION}; {advice}"
    )
    columns = parse_json(text, _Profiles, where, advice).columns
    try:
        return {column.column: Profile.from_json(column) for column in columns}
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where} holds other numbers ({one_line(error)}); {advice}") from error
