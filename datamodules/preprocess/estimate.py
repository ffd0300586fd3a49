"""Estimate the time and disk of a run from the beginning of its input."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.preprocess.progress import bytes_below
from datamodules.preprocess.sources import RawFile
from lightning_dlrm.contracts.errors import require

_SAMPLE_BYTES = 4 << 20

# Bytes a row, measured on 20M generated Criteo-shaped rows of 244 bytes of text: 86 staged, 6 for the ids of
# distinct values, 45 of Parquet. The larger figures leave room for the spilled values of the columns in work,
# for vocabularies and for other protocols.
_STAGED, _IDS, _RESULT, _MULTI_HOT = 95, 20, 65, 450

_ROWS_PER_WORKER_S = 250_000  # all stages together; 310,000 were measured on a core of an AMD EPYC
_WORKERS_PER_DISK = 16  # more of them than this are not counted on: they share the disk


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimate of a run."""

    rows: float
    text_bytes: float
    """Uncompressed."""
    fields: int
    """Of the first line."""
    row_bytes: int
    """Of disk, at most."""
    result_row_bytes: int
    """Of them those that the dataset itself takes."""

    def checked(self, folder: Path, output: Path | None, workers: int) -> str:
        """Check that the disk can hold the run, and describe what it will take.

        Args:
            folder: the working folder.
            output: a folder on the disk where the dataset will lie; None if that is not known.
            workers: how many will do it.

        Raises:
            UserError: a disk is too small.
        """
        needed = self.rows * self.row_bytes
        free = shutil.disk_usage(folder).free + bytes_below(folder)
        words = f"about {self.rows:,.0f} rows: some {format_size(needed)} of disk"
        require(
            needed <= free,
            f"{words} are needed, {format_size(free)} are free at {folder.parent}; make room, or choose another "
            "place with --work and --output",
        )
        if output is not None and output.stat().st_dev != folder.stat().st_dev:
            dataset, room = self.rows * self.result_row_bytes, shutil.disk_usage(output).free
            require(
                dataset <= room,
                f"some {format_size(dataset)} of disk are needed for the dataset, {format_size(room)} are "
                f"free at {output}; make room, or choose another --output",
            )
        seconds = self.rows / (_ROWS_PER_WORKER_S * min(workers, _WORKERS_PER_DISK))
        return f"{words} ({format_size(free)} are free) and {format_duration(seconds)} with {workers} workers"


def estimate(files: Sequence[RawFile], multi_hot: bool) -> Estimate:
    """Estimate a run from the beginning of the first file of each compression; other files are assumed to be alike.

    Raises:
        UserError: one cannot be read.
    """
    rows = text_bytes = 0.0
    samples = {}
    for file in files:
        if file.compression not in samples:
            samples[file.compression] = _sample(file)
        text, lines, _ = samples[file.compression]
        rows, text_bytes = rows + file.size * lines, text_bytes + file.size * text
    result_row_bytes = _RESULT + (_MULTI_HOT if multi_hot else 0)
    return Estimate(
        rows=rows,
        text_bytes=text_bytes,
        fields=samples[files[0].compression][2],
        row_bytes=_STAGED + _IDS + result_row_bytes,
        result_row_bytes=result_row_bytes,
    )


def _sample(file: RawFile) -> tuple[float, float, int]:
    """Return bytes of text and lines for each stored byte, and the fields of the first line."""
    with file.text() as text:
        try:
            sample = text.read(_SAMPLE_BYTES)
        except ValueError:
            sample = b""  # truncated or corrupt: the first stage names the place
        stored = text.stored.tell() if sample else 1
    stored = len(sample) if file.compression == "none" else min(stored, file.size)
    fields = sample.partition(b"\n")[0].count(b"\t") + 1
    return len(sample) / max(stored, 1), sample.count(b"\n") / max(stored, 1), fields


def format_size(size: float) -> str:
    """Format a number of bytes."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def format_duration(seconds: float) -> str:
    """Format a duration."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
