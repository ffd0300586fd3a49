"""Common code of all generated data: checked settings, and folders that are made once, whole or not at all, also by
several processes at the same time."""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datamodules.preprocess.progress import format_duration
from datamodules.writer import DatasetWriter, Values
from lightning_dlrm.contracts.cache import cache_root
from lightning_dlrm.contracts.disk import write_fault
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import SCHEMA_FILE, SPLITS, Column, DatasetSchema, SplitName
from lightning_dlrm.contracts.terminal import binary_size

SEED_RANGE = "a number from 0 to 2**64 - 1"

Write = Callable[[DatasetWriter, "tqdm[Any]"], dict[str, Any]]
"""Writes all rows and updates the progress bar; returns further fields of the schema, such as ``optimum``."""


def rows_of_splits(settings: object) -> dict[SplitName, int]:
    """Return the rows of each split that has any, from settings such as ``train_rows``.

    A function, because a configuration names the class of settings that inherit from another class.
    """
    return {split: rows for split in SPLITS if (rows := getattr(settings, f"{split}_rows"))}


def check_settings(kind: str, settings: object, checks: Mapping[str, tuple[bool, str]]) -> None:
    """Check settings one by one.

    Args:
        kind: of data, the beginning of the message.
        settings: has an attribute for each check.
        checks: for each setting whether it is valid, and what is expected. (A comparison with NaN is False: write
            checks so that they hold for valid values.)

    Raises:
        UserError: a setting is not valid.
    """
    for name, (valid, expected) in checks.items():
        require(valid, f"{kind}: {name} is {getattr(settings, name)!r}; give {expected}")


def cache_folder(kind: str, key: Any) -> Path:
    """Return the folder of generated data in the cache, whether it exists or not.

    Args:
        kind: of data, the beginning of the folder's name.
        key: JSON values of everything that the data depend on.
    """
    return cache_root() / f"{kind}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"


def make_once(planned: DatasetSchema, folder: Path, write: Write, progress: bool = True) -> DatasetSchema:
    """Write a dataset, or find it written already.

    Args:
        planned: its schema without files, positives and optimum; its settings must hold everything that the rows
            depend on, apart from their number.
        folder: the dataset folder to make. If it holds the dataset of this schema already, or another process finishes
            it first, that dataset is kept.
        write: writes the rows.
        progress: show a progress bar, on a terminal.

    After the first row group, the estimated time and size of the dataset are shown.

    Raises:
        UserError: the folder holds something else, or its disk is too small.
    """
    if (existing := _existing(planned, folder)) is not None:
        return existing
    rows = sum(split.rows for split in planned.splits.values())
    try:
        with (
            _EstimatingWriter(folder, planned.columns, rows, progress) as writer,
            tqdm(
                total=rows,
                desc=f"Generating {planned.dataset} data",
                unit=" rows",
                unit_scale=True,
                # None: only on a terminal.
                disable=None if progress else True,
            ) as bar,
        ):
            return writer.finish(
                dataset=planned.dataset,
                protocol=planned.protocol,
                settings=planned.settings,
                indices=planned.indices,
                **write(writer, bar),
            )
    except (UserError, OSError) as error:
        # Another process may have finished the same folder first; its rows are these rows.
        if (existing := _existing(planned, folder)) is not None:
            return existing
        if isinstance(error, OSError):
            raise UserError(write_fault(folder, error, "another folder")) from error
        raise


class _EstimatingWriter(DatasetWriter):
    """Estimates from its first row group what all rows will take, and fails if the disk cannot hold them.

    Args:
        folder, columns: as of the DatasetWriter.
        rows: of all splits.
        show: print the estimate on standard error.

    Raises:
        UserError: from ``write``, if the disk is too small.
    """

    def __init__(self, folder: Path, columns: Sequence[Column], rows: int, show: bool) -> None:
        super().__init__(folder, columns)
        self._rows, self._show = rows, show
        self._start = time.monotonic()
        self._estimated = False

    def write(self, split: str, arrays: Mapping[str, Values]) -> None:
        super().write(split, arrays)
        if self._estimated or not self.rows_on_disk:
            return
        self._estimated = True
        times, seconds = self._rows / self.rows_on_disk, time.monotonic() - self._start
        words = checked_estimate(
            self.folder, self._rows, self.bytes_on_disk * times, seconds * times, self.bytes_on_disk
        )
        if self._show:
            tqdm.write(words, file=sys.stderr)


def checked_estimate(place: Path, rows: int, size: float, seconds: float, written: int = 0) -> str:
    """Describe what rows will take, and check that the disk can hold them.

    Args:
        place: the file or folder to make.
        rows: number of all rows.
        size: estimated bytes of all rows.
        seconds: estimated time for all rows.
        written: bytes that are on the disk already.

    Raises:
        UserError: the disk is too small.
    """
    parent = next(parent for parent in place.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free + written
    words = f"{rows:,} rows: about {binary_size(size)} of disk"
    require(
        size <= free,
        f"{words} are needed for {place}, {binary_size(free)} are free; make room, choose another place, or fewer rows",
    )
    return f"{words} ({binary_size(free)} are free) and {format_duration(seconds)}"


def _existing(planned: DatasetSchema, folder: Path) -> DatasetSchema | None:
    """Return the schema in ``folder`` if it is the planned one, else None."""
    if not (Path(folder) / SCHEMA_FILE).is_file():
        return None
    found = DatasetSchema.load(folder)
    same = found.encoding_fingerprint == planned.encoding_fingerprint and all(
        name in found.splits and found.splits[name].rows == split.rows for name, split in planned.splits.items()
    )
    return found if same else None
