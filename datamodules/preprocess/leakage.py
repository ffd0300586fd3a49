"""Count rows of equal features, within a split and across splits.

Each row's features (without the label) are hashed to 64 bits. Rows of equal features always have equal hashes; the
expected number of pairs of different rows with equal hashes is n (n - 1) / 2**65 for n rows: 6e-5 for Kaggle's 46
million, and half a pair for Terabyte's 4.4 billion.

Memory stays below 1 GB for any number of rows and repetitions: hashes are sorted in runs, each hash with its count, the
runs are in a temporary file of at most 12 bytes a row (53 GB for Terabyte), and one range of hashes is compared at a
time.
"""

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.folder import Folder
from datamodules.parquet import read_part
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import SPLITS, Column, DatasetSchema, SplitName
from lightning_dlrm.contracts.terminal import binary_size, counted

_RUN_ROWS = 1 << 22  # hashes sorted at once: 32 MB
_RANGE_ROWS = 1 << 23  # hashes compared at once: 64 MB, and some copies of them

Hashes = NDArray[np.uint64]
_ENTRY = np.dtype([("hash", np.uint64), ("count", np.uint32)])


def equal_rows(folder: str | Path | Folder, schema: DatasetSchema, progress: bool = True) -> dict[str, Any]:
    """Count rows of equal features; return JSON values.

    ``within`` has for each split its ``rows``, the ``distinct`` ones, and ``repeats``: rows whose features an earlier
    row of the split has, with their ``share``. ``between`` has for each pair of ``splits`` the ``distinct`` features
    that occur in both, and for either split the ``rows`` that have them and their ``shares``.

    Args:
        progress: show a progress bar, on a terminal.

    Raises:
        UserError: there are no features, a file is missing or altered, or the temporary folder lacks the space.
    """
    columns = schema.by_role("dense", "categorical", "multi_hot")
    require(columns, f"{folder} has no features, so there are no equal rows to look for")
    rows = sum(split.rows for split in schema.splits.values())
    _check_space(rows * _ENTRY.itemsize)
    ranges = -(-rows // _RANGE_ROWS) or 1
    runs = {split: _SortedRuns(ranges) for split in SPLITS if split in schema.splits}
    with tqdm(total=rows, desc="Hashing", unit=" rows", unit_scale=True, disable=None if progress else True) as bar:
        for split, split_runs in runs.items():
            for file in schema.splits[split].files:
                for table in read_part(folder, schema, file, columns):
                    split_runs.add(content_hashes(table, columns))
                    bar.update(table.num_rows)
            split_runs.end()
    shown = tqdm(range(ranges), desc="Comparing", unit=" parts", disable=None if progress and ranges > 1 else True)
    return _compare(runs, shown)


def content_hashes(table: pa.RecordBatch, columns: Sequence[Column]) -> Hashes:
    """Return a 64-bit hash of the values of ``columns`` in each row, [rows]. Null is a value of its own; -0.0 equals
    0.0."""
    hashes = np.full(table.num_rows, 0x9E3779B97F4A7C15, np.uint64)
    for column in columns:
        values = table.column(column.name)
        if column.role == "multi_hot":
            _mix_lists(hashes, values)
        elif column.role == "dense":
            bits = (values.fill_null(0).to_numpy() + np.float32(0)).view(np.uint32).astype(np.uint64)
            if values.null_count:
                bits[values.is_null().to_numpy(zero_copy_only=False)] = 1 << 32  # the bits of no float32
            _mix(hashes, bits)
        else:
            _mix(hashes, values.to_numpy().astype(np.uint64))
    return hashes


def _mix_lists(hashes: Hashes, lists: pa.ListArray) -> None:
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    starts = lists.offsets.to_numpy()[:-1]
    ids = lists.values.to_numpy().astype(np.uint64)
    _mix(hashes, lengths.astype(np.uint64))
    for position in range(lengths.max(initial=0)):
        rows = np.flatnonzero(lengths > position)
        longer = hashes[rows]
        _mix(longer, ids[starts[rows] + position])
        hashes[rows] = longer


def _mix(hashes: Hashes, values: Hashes) -> None:
    """Mix one more value of each row into its hash, in place. This is one to one in the hash for a given value, and one
    to one in the value for a given hash, so that rows that differ in one column never have equal hashes."""
    hashes ^= values
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(29)


class _SortedRuns:
    """The hashes of a split as sorted runs in a file without a name, which vanishes with the process.

    Args:
        ranges: number of equal ranges in which the hashes are read back.
    """

    def __init__(self, ranges: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object
        self._bounds = np.array([-(-(i << 64) // ranges) for i in range(1, ranges)], np.uint64)
        self._cuts: list[NDArray[np.int64]] = []  # of each run: where each range begins, and its end, in hashes
        self._written = 0
        self._waiting: list[Hashes] = []
        self._waiting_rows = 0

    def add(self, hashes: Hashes) -> None:
        self._waiting.append(hashes)
        self._waiting_rows += len(hashes)
        if self._waiting_rows >= _RUN_ROWS:
            self.end()

    def end(self) -> None:
        """Write the pending hashes as a run."""
        if not self._waiting_rows:
            return
        run = np.rec.fromarrays(np.unique(np.concatenate(self._waiting), return_counts=True), dtype=_ENTRY)
        self._waiting, self._waiting_rows = [], 0
        inner = np.searchsorted(run["hash"], self._bounds)
        self._cuts.append(self._written + np.concatenate([[0], inner, [len(run)]]))
        try:
            self._file.write(run.tobytes())
        except OSError as error:
            raise UserError(
                f"cannot write to {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to another folder"
            ) from error
        self._written += len(run)

    def range(self, number: int) -> tuple[Hashes, NDArray[np.int64]]:
        """Return the hashes of a range in ascending order, and how often each occurs."""
        pieces = [np.empty(0, _ENTRY)]
        for cuts in self._cuts:
            start, stop = int(cuts[number]), int(cuts[number + 1])
            self._file.seek(start * _ENTRY.itemsize)
            pieces.append(np.frombuffer(self._file.read((stop - start) * _ENTRY.itemsize), _ENTRY))
        entries = np.concatenate(pieces)
        hashes = entries["hash"].copy()
        order = np.argsort(hashes)
        hashes = hashes[order]
        firsts = np.flatnonzero(np.concatenate([np.ones(min(len(hashes), 1), bool), hashes[1:] != hashes[:-1]]))
        counts = np.add.reduceat(entries["count"][order], firsts, dtype=np.int64) if len(firsts) else firsts
        return hashes[firsts], counts


def _compare(runs: Mapping[SplitName, _SortedRuns], ranges: Iterable[int]) -> dict[str, Any]:
    """Return the facts of ``equal_rows`` from the hashes of each split, range by range."""
    rows, distinct = dict.fromkeys(runs, 0), dict.fromkeys(runs, 0)
    # Of a pair of splits: distinct features in both, rows of the first, rows of the second.
    shared = {pair: np.zeros(3, np.int64) for pair in combinations(runs, 2)}
    for number in ranges:
        found = {split: split_runs.range(number) for split, split_runs in runs.items()}
        for split, (_, counts) in found.items():
            rows[split] += int(counts.sum())
            distinct[split] += len(counts)
        for pair, sums in shared.items():
            (a, counts_a), (b, counts_b) = (found[split] for split in pair)
            _, in_a, in_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
            sums += len(in_a), counts_a[in_a].sum(), counts_b[in_b].sum()
    return {
        "within": {
            split: {
                "rows": rows[split],
                "distinct": distinct[split],
                "repeats": rows[split] - distinct[split],
                "share": (rows[split] - distinct[split]) / max(rows[split], 1),
            }
            for split in runs
        },
        "between": [
            {
                "splits": list(pair),
                "distinct": int(sums[0]),
                "rows": {split: int(count) for split, count in zip(pair, sums[1:], strict=True)},
                "shares": {
                    split: int(count) / max(rows[split], 1) for split, count in zip(pair, sums[1:], strict=True)
                },
            }
            for pair, sums in shared.items()
        ],
    }


def render_equal_rows(facts: Mapping[str, Any]) -> list[str]:
    """Format the facts of ``equal_rows`` as lines of text."""
    lines = [
        f"  within {split}: {counted(within['repeats'], 'repeat')} of an earlier row ({within['share']:.3%})"
        for split, within in facts["within"].items()
        if within["repeats"]
    ]
    for pair in facts["between"]:
        first, second = pair["splits"]
        if pair["distinct"]:
            lines.append(
                f"  in both {first} and {second}: {counted(pair['rows'][second], 'row')} of {second} "
                f"({pair['shares'][second]:.3%}), {counted(pair['rows'][first], 'row')} of {first} "
                f"({pair['shares'][first]:.3%})"
            )
    title = "rows with equal features (without the label)"
    if not lines:
        return [f"{title}: none, within a split or in two splits"]
    if "train" in facts["within"]:
        lines.append(
            "  Equal rows also occur in clean data: a visitor sees an advertisement twice, or few and coarse features "
            "coincide. If all rows are drawn alike, the share of validation and test rows that are in train is about "
            f"twice the share of repeats within train (so up to {2 * facts['within']['train']['share']:.3%} here); "
            "a much larger share suggests a leak."
        )
    return [title, *lines]


def _check_space(needed: int) -> None:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    require(
        free >= needed,
        f"the leakage check needs {binary_size(needed)} in {folder}, which has {binary_size(free)} free; "
        "set TMPDIR to a folder with more",
    )
