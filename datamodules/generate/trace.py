"""Traces: accesses to a table's rows that LRU caches of any size serve as they would a real column's.

The profile of a column is the histogram of its stack distances (see ``datamodules.generate.lru``), and of the first
accesses of rows among them, phase by phase: phases end after 64, 76, 90, 107, 128, ... accesses, four in each octave,
so that the profile tells how the distances and the number of distinct rows grow. A generated trace takes in each
phase just as many new rows, at random places, and draws its other distances from the phase's histogram; an LRU stack
turns them into rows. So it has the original's LRU hit rate at any cache size, and its distinct rows, after any number
of accesses. Both ideas, but for phases, are those of the trace generator of Naumov et al. 2019, whose new rows come
at one rate from beginning to end.

What a profile does not hold: which rows are popular for long (given distances alone, every row comes up equally often
in the end), what the columns of a sample have to do with each other, and labels. Rows are numbered as they first
appear.

A trace shorter than the original is like the original's beginning. A longer one goes on with the distances of the
last octave, and with new rows by the power law (Heaps' law) that the last octave followed, until it has seen the whole
table. From then on it draws distances alone; where the original never came back to a row, it goes round and round.

Memory is that of LRU stacks (see ``lru``): to profile, of one column at a time; to generate, of all of them together;
and a block of accesses. It does not grow with the number of accesses.

Traces depend on the profile and the seed alone, down to the last bit; a shorter trace is the beginning of a longer one.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.filesystems import failures_told
from datamodules.generate.draws import exp, log, stream
from datamodules.generate.folder import cache_folder, make_once
from datamodules.generate.random import chance, dense_block, label_block
from datamodules.parquet import DatasetWriter, Folder, load_schema, read_groups
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DatasetSchema, Split, SplitName

if TYPE_CHECKING:
    from datamodules.generate.lru import LruStack

GENERATOR_VERSION = 1
"""Counts up whenever the same profile and seed would give other rows."""

PROFILE_VERSION = 1
LEAST_ACCESSES = 1_000
"""A profile of fewer says little."""

BLOCK_ACCESSES = 65_536
"""Accesses that share a random stream."""

_ACCESSES = 7  # the purpose of random streams
_NEVER = 2**31 - 1

# Classes of distances: 0 for a first access, then each distance alone, from 64 on 32 classes to an octave.
CLASS_LOW: NDArray[np.int64] = np.concatenate(
    [np.arange(64), *((32 + np.arange(32)) << (octave - 5) for octave in range(6, 31))]
)
"""int64 [classes]: the smallest distance of each class."""
_CLASS_WIDTH = np.diff(CLASS_LOW, append=2**31)


def phase_end(phase: int) -> int:
    """Accesses up to the end of a phase."""
    return (64, 76, 90, 107)[phase % 4] << (phase // 4)


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
        """The exponent by which distinct rows grew with accesses in the last octave: 0 for not at all, 1 for with
        every access."""
        first = self._last_octave()
        start, seen = self.counts[:first].sum(), self.counts[:first, 0].sum()
        slope = log(np.array([self.distinct / seen])) / log(np.array([self.accesses / start]))
        return float(slope[0])

    def beginning(self, accesses: int) -> NDArray[np.float64]:
        """[classes]: how many of the first accesses are of each class; within a phase, in proportion."""
        sizes = self.counts.sum(axis=1)
        share = np.clip((accesses - (np.cumsum(sizes) - sizes)) / np.maximum(sizes, 1), 0, 1)
        return share @ self.counts

    def phases(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Length of each phase and its counts by class, without end; see the module on what follows the recorded."""
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
        """The first phase that ends in the second half of the accesses."""
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
    def from_json(cls, document: Mapping[str, Any]) -> "Profile":
        counts = np.zeros((len(document["phases"]), len(CLASS_LOW)), dtype=np.int64)
        for row, phase in zip(counts, document["phases"], strict=True):
            low = np.array(phase["distances_from"], dtype=np.int64)
            classes = np.searchsorted(CLASS_LOW, low)
            if not np.array_equal(CLASS_LOW[classes], low):
                raise ValueError("no such classes of distances")
            row[classes] = phase["counts"]
        profile = cls(str(document["column"]), int(document["table_rows"]), counts)
        ends = np.cumsum(counts.sum(axis=1))
        whole = all(end == phase_end(phase) for phase, end in enumerate(ends[:-1].tolist()))
        whole = whole and ends[-1] <= phase_end(len(ends) - 1)
        if not whole or counts.min() < 0 or (profile.accesses, profile.distinct) != (
            document["accesses"], document["distinct_rows"]
        ):  # fmt: skip
            raise ValueError("its counts do not add up")
        if profile.accesses < LEAST_ACCESSES or not counts[0, 0] or profile.distinct > profile.rows:
            raise ValueError("no column has such counts")
        return profile


class Profiler:
    """Makes the profile of a column's accesses, given piece by piece.

    Args:
        column: its name.
        rows: of its table.

    Raises:
        UserError: numba is not installed.
    """

    def __init__(self, column: str, rows: int) -> None:
        self.column, self.rows, self.accesses = column, rows, 0
        self._stack = _lru_stack(rows)
        self._counts = [np.zeros(len(CLASS_LOW), dtype=np.int64)]

    def add(self, ids: NDArray[np.int32]) -> None:
        """Takes the next accesses.

        Raises:
            UserError: an id is none of the table's.
        """
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.rows:
            raise UserError(
                f"column {self.column} has ids from {ids.min()} to {ids.max()}, its table has rows 0 to "
                f"{self.rows - 1}; make the dataset again"
            )
        classes = np.searchsorted(CLASS_LOW, self._stack.distances(ids), side="right") - 1
        while len(classes):
            left = phase_end(len(self._counts) - 1) - self.accesses
            if not left:
                self._counts.append(np.zeros(len(CLASS_LOW), dtype=np.int64))
                continue
            now, classes = classes[:left], classes[left:]
            self._counts[-1] += np.bincount(now, minlength=len(CLASS_LOW))
            self.accesses += len(now)

    def profile(self) -> Profile:
        """Of all accesses so far."""
        return Profile(self.column, self.rows, np.stack(self._counts))


class TraceGenerator:
    """Generates the trace of a profile, block by block.

    Args:
        profile: whose trace.
        seed: 0 to 2**64 - 1.
        number: tells the columns of a dataset apart, so that equal profiles give different traces.

    Raises:
        UserError: numba is not installed.
    """

    def __init__(self, profile: Profile, seed: int, number: int = 0) -> None:
        self._stack = _lru_stack()
        self._seed, self._number, self._block = seed, number, 0
        self._phases = profile.phases()
        self._left = self._new = 0
        """Accesses of the present phase that are to come, and how many of them find new rows."""

    @property
    def distinct(self) -> int:
        """Rows accessed so far."""
        return self._stack.depth

    def next_block(self) -> NDArray[np.int32]:
        """The rows of the next BLOCK_ACCESSES accesses, int32 [BLOCK_ACCESSES]."""
        words = stream(self._seed, _ACCESSES, self._number, 0, self._block).random_raw(2 * BLOCK_ACCESSES)
        chance, half = words[:BLOCK_ACCESSES] >> np.uint64(12), words[BLOCK_ACCESSES:]
        place, choice = half >> np.uint64(32), half & np.uint64(2**32 - 1)
        if not self._block:
            choice[0] = 0  # The first access of all is to a new row.
        self._block += 1
        distances, done = np.empty(BLOCK_ACCESSES, dtype=np.int32), 0
        while done < BLOCK_ACCESSES:
            if not self._left:
                self._begin_phase()
            now = slice(done, done + min(self._left, BLOCK_ACCESSES - done))
            distances[now] = self._draw(chance[now], place[now])
            new = self._stack.choose(choice[now], self._left, self._new)
            distances[now][new] = 0
            self._left -= len(new)
            self._new -= int(new.sum())
            done = now.stop
        return self._stack.accesses(distances)

    def _begin_phase(self) -> None:
        self._left, counts = next(self._phases)
        self._new = int(counts[0])
        self._cumulative = np.cumsum(counts[1:])

    def _draw(self, chance: NDArray[np.uint64], place: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Distances of the present phase from 52 and 32 random bits each; see ``lru`` on those beyond the depth."""
        total = int(self._cumulative[-1])
        if not total:
            return np.full(len(chance), _NEVER, dtype=np.int64)
        count = np.minimum(chance * (total * 2.0**-52), total - 1).astype(np.int64)
        classes = np.searchsorted(self._cumulative, count, side="right") + 1
        within = (place * _CLASS_WIDTH[classes].astype(np.uint64)) >> np.uint64(32)
        return CLASS_LOW[classes] + within.astype(np.int64)


def _lru_stack(rows: int | None = None) -> "LruStack":
    try:
        from datamodules.generate.lru import LruStack
    except ModuleNotFoundError as error:
        raise UserError(
            f"traces need {error.name}, which is not installed; install it with: pip install 'lightning-dlrm[trace]'"
        ) from error
    return LruStack(rows)


# --- where profiles come from ---------------------------------------------------------------------------


class TraceSource:
    """Columns to profile in a dataset, or profiles that were saved.

    Args:
        path: a dataset folder (also an address that fsspec knows), or a file of profiles.
        columns: which ones; None for all that have a table.
        split: of the dataset; a file's profiles are of the split that they were made of.

    Raises:
        UserError: there is neither at ``path``, or it lacks a column or the split.
    """

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None, split: SplitName = "train") -> None:
        self.path, self.split = Folder(path), split
        self._saved: list[Profile] | None = None
        file, text = self.path.local, None
        with failures_told(str(path)):
            if file is not None and not file.exists():
                raise UserError(f"there is nothing at {path}; give a dataset folder, or a file of trace profiles")
            if file is not None and file.is_file():
                text = file.read_bytes()
        if file is not None and text is not None:
            self._saved = _read_profiles(file, text)
            self.identity = f"profile {hashlib.sha256(text).hexdigest()}"
            tables = {profile.column: profile.rows for profile in self._saved}
        else:
            self.schema = load_schema(self.path)
            if not self.schema.splits.get(split) or not self.schema.splits[split].rows:
                has = ", ".join(self.schema.splits) or "none"
                raise UserError(f"{self.path} has no rows in its {split} split; it has {has}: choose another split")
            self.identity = f"data {self.schema.data_fingerprint} {split}"
            tables = dict(self.schema.features.tables)
        if not tables:
            raise UserError(f"{self.path} has no categorical or multi-hot columns, so there are no accesses to profile")
        for name in columns or ():
            if name not in tables:
                raise UserError(
                    f"{self.path} has no categorical or multi-hot column {name}; it has {', '.join(tables)}"
                )
        self.tables = {name: tables[name] for name in (dict.fromkeys(columns) if columns else tables)}
        """Rows of each chosen column's table."""
        self.length = self._length()
        """Rows of the split, or accesses of the first chosen profile."""

    def profiles(self, progress: bool = True) -> list[Profile]:
        """The profile of each chosen column, in order.

        Args:
            progress: show a progress bar, on a terminal.

        Raises:
            UserError: a column has too few accesses, or its files are missing or altered, or numba is not installed.
        """
        if self._saved is not None:
            by_name = {profile.column: profile for profile in self._saved}
            return [by_name[name] for name in self.tables]
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
                profiler = Profiler(name, table_rows)
                for ids, count in self._accesses(name):
                    profiler.add(ids)
                    bar.update(count)
                if profiler.accesses < LEAST_ACCESSES:
                    raise UserError(
                        f"column {name} of {self.path} has {profiler.accesses:,} accesses in its {self.split} split; "
                        f"a profile needs at least {LEAST_ACCESSES:,}: choose other columns or more data"
                    )
                profiles.append(profiler.profile())
        return profiles

    def _length(self) -> int:
        if self._saved is None:
            return self.schema.splits[self.split].rows
        first = next(iter(self.tables))
        return next(profile.accesses for profile in self._saved if profile.column == first)

    def _accesses(self, name: str) -> Iterator[tuple[NDArray[np.int32], int]]:
        """Ids of a column, row group by row group, and of how many rows they are."""
        chosen = [column for column in self.schema.columns if column.name == name]
        for file in self.schema.splits[self.split].files:
            for table in read_groups(self.path, self.schema, file, chosen):
                column = table.column(name)
                ids = pc.list_flatten(column) if pa.types.is_list(column.type) else column
                yield ids.to_numpy(), len(column)


def save_profiles(profiles: Sequence[Profile], path: Path) -> None:
    """Writes profiles to a JSON file, whole or not at all."""
    document = {"trace_profiles": PROFILE_VERSION, "columns": [profile.as_json() for profile in profiles]}
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(document) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a file that you may write") from error


def _read_profiles(path: Path, text: bytes) -> list[Profile]:
    try:
        document = json.loads(text)
        if document["trace_profiles"] != PROFILE_VERSION:
            raise ValueError(f"it is of version {document['trace_profiles']}, this release reads {PROFILE_VERSION}")
        return [Profile.from_json(entry) for entry in document["columns"]]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} is no file of trace profiles ({type(error).__name__}: {error}); "
            "make one with 'python -m lightning_dlrm generate trace --from DIR --profile FILE'"
        ) from error


# --- traces as datasets ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """What rows to make around the traces: each has one id from every trace."""

    train_rows: int
    """Rows of the training split: as many accesses of every column."""
    validation_rows: int = 65_536
    """Rows of the validation split, whose accesses follow those of the training split; 0 for none."""
    test_rows: int = 65_536
    """Rows of the test split, whose accesses follow; 0 for none."""
    dense: int = 13
    """Dense features, I1 and on, standard normal."""
    click_rate: float = 0.25
    """Chance of label 1."""
    seed: int = 0
    """Of the rows, 0 to 2**64 - 1."""

    def __post_init__(self) -> None:
        for name in ("train_rows", "validation_rows", "test_rows", "dense"):
            if getattr(self, name) < 0:
                raise UserError(f"trace data: {name} is {getattr(self, name)}; give 0 or more")
        if not self.split_rows:
            raise UserError("trace data: no split has rows; give train_rows, validation_rows or test_rows")
        if not 0 < self.click_rate < 1:
            raise UserError(f"trace data: click_rate is {self.click_rate}; give a chance between 0 and 1")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"trace data: seed is {self.seed}; give a number from 0 to 2**64 - 1")

    @property
    def split_rows(self) -> dict[SplitName, int]:
        """Rows of each split that has any."""
        rows: dict[SplitName, int] = {
            "train": self.train_rows,
            "validation": self.validation_rows,
            "test": self.test_rows,
        }
        return {name: count for name, count in rows.items() if count}


def trace_schema(source: TraceSource, settings: TraceSettings) -> DatasetSchema:
    """What ``generate_trace`` will return, without files and positives: nothing is profiled or generated."""
    return DatasetSchema(
        dataset="trace",
        protocol="trace",
        columns=(
            Column(name="label", role="label"),
            *(
                Column(name=f"I{i + 1}", role="dense", transform="standard normal")
                for i in range(settings.dense)
            ),
            *(Column(name=name, role="categorical", cardinality=rows) for name, rows in source.tables.items()),
        ),
        splits={name: Split(rows=rows) for name, rows in settings.split_rows.items()},
        settings={
            "generator_version": GENERATOR_VERSION,
            "source": source.identity,
            "click_rate": settings.click_rate,
            "seed": settings.seed,
        },
    )  # fmt: skip


def trace_folder(source: TraceSource, settings: TraceSettings) -> Path:
    """Where the cache keeps this dataset, there or not."""
    planned = trace_schema(source, settings)
    return cache_folder("trace", [planned.encoding_fingerprint, settings.split_rows])


def generate_trace(
    source: TraceSource,
    settings: TraceSettings,
    folder: Path,
    progress: bool = True,
    profiles: Sequence[Profile] | None = None,
) -> DatasetSchema:
    """Writes a dataset of traces, whole or not at all, or finds it written already; see ``make_once``.

    Args:
        source: whose profiles.
        settings: how many rows, and what else is in them.
        folder: the dataset folder to make.
        progress: show progress bars, on a terminal.
        profiles: those of the source, where they are known already.
    """

    def write(writer: DatasetWriter, bar: Any) -> dict[str, Any]:
        traces = {
            profile.column: TraceGenerator(profile, settings.seed, number)
            for number, profile in enumerate(profiles or source.profiles(progress))
        }
        ends = np.cumsum(list(settings.split_rows.values())).tolist()
        for start in range(0, ends[-1], BLOCK_ACCESSES):
            number, size = start // BLOCK_ACCESSES, min(BLOCK_ACCESSES, ends[-1] - start)
            # The splits are one sequence.
            block: dict[str, Any] = {"label": label_block(settings.click_rate, settings.seed, 0, number, size)}
            for i in range(settings.dense):
                block[f"I{i + 1}"] = dense_block(settings.seed, i, 0, number, size)
            block |= {name: trace.next_block()[:size] for name, trace in traces.items()}
            for (split, rows), end in zip(settings.split_rows.items(), ends, strict=True):
                first, last = max(end - rows - start, 0), min(end - start, size)
                if first < last:
                    writer.write(split, {name: values[first:last] for name, values in block.items()})
            bar.update(size)
        return {"optimum": dict.fromkeys(settings.split_rows, chance(settings.click_rate))}

    return make_once(trace_schema(source, settings), folder, write, progress)
