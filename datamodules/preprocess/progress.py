"""Estimate and progress of a long job: an estimate from the beginning of its input, then for each stage a bar on a
terminal, or else a line at growing intervals, and a line at its end."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from datamodules.preprocess.sources import RawFile
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.terminal import binary_size, columns, has_colors, wrapped

if TYPE_CHECKING:
    from tqdm import tqdm

_FIRST_LINE_AFTER_S = 10.0  # without a terminal; each further line waits twice as long, up to
_LINE_EVERY_S = 300.0
_MEMORY_EVERY_S = 0.25
_DISK_EVERY_S = 2.0
_SHORT_S = 0.1  # below which the time of a stage is in milliseconds, and its rate means nothing
_BAR = "{desc:<7}{percentage:3.0f}%|{bar:8}| {elapsed}<{remaining}{postfix}"

_SAMPLE_BYTES = 4 << 20

# Bytes a row of Criteo, measured on 20M generated Criteo-shaped rows of 244 bytes of text: 86 staged, 6 for the ids of
# distinct values, 45 of Parquet. The larger figures leave room for the spilled values of the columns in work,
# for vocabularies and for other protocols.
CRITEO_ROW_BYTES = ((115, 65), (115, 515))
"""Of disk, for staged rows and ids, and for the dataset; then the same with MLPerf's bags."""

_ROWS_PER_WORKER_S = 250_000  # all stages together; 310,000 were measured on a core of an AMD EPYC
_WORKERS_PER_DISK = 16  # the estimate counts no more workers than this, because they share the disk


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Time, memory and disk that a stage took."""

    name: str
    rows: int
    seconds: float
    peak_bytes: int = 0
    """Maximum of the resident memory of this process and its workers on this machine together."""
    disk_bytes: int = 0
    """Size of the working folder at the end of the stage."""

    def __str__(self) -> str:
        """Return one line.

        >>> print(StageTime(name="encode", rows=1_478_027, seconds=1.0, peak_bytes=4 * 10**8, disk_bytes=10**11))
        encode   1,478,027 rows    1.0 s 1,500,000 rows/s  381 MiB memory 93.1 GiB disk
        >>> print(StageTime(name="encode", rows=800, seconds=0.004, peak_bytes=4 * 10**8, disk_bytes=10**6))
        encode         800 rows     4 ms                   381 MiB memory 977 KiB disk
        """
        is_short = self.seconds < _SHORT_S
        time = f"{1000 * self.seconds:>5.0f} ms" if is_short else f"{self.seconds:>6,.1f} s"
        rate = "" if is_short else f"{format_rate(self.rows / self.seconds)} rows/s"
        return (
            f"{_title(self.name):<7}{self.rows:>11,} rows {time} {rate:>16} "
            f"{binary_size(self.peak_bytes):>8} memory {binary_size(self.disk_bytes)} disk"
        )


class Stage:
    """The display of a stage; its methods may be called from any thread."""

    def __init__(self, name: str, total_rows: int | None, stream: TextIO | None):
        self.name = name
        self.rows = self._fraction = 0.0
        self.memory = self.peak = self.disk = 0
        """Bytes: now, at most, and in the working folder."""
        self._total_rows, self._stream = total_rows, stream
        self._start, self._line_after = time.monotonic(), _FIRST_LINE_AFTER_S
        self._line_at = self._start + self._line_after
        self._lock = threading.Lock()
        self._bar = _bar(_title(name), stream) if stream is not None and stream.isatty() else None

    def advance(self, rows: float) -> None:
        """Count more rows as done; a fraction of a row if the stage takes several steps a row."""
        with self._lock:
            self.rows += rows
            self._fraction = self.rows / self._total_rows if self._total_rows else 0.0
            self._show()

    def reached(self, rows: int, fraction: float) -> None:
        """Set how many rows are done and which share of the stage that is, if its rows are not known before."""
        with self._lock:
            self.rows, self._fraction = rows, fraction
            self._show()

    def measured(self, memory: int, disk: int) -> None:
        """Set the bytes in use now."""
        with self._lock:
            self.memory, self.disk = memory, disk
            self.peak = max(self.peak, memory)
            self._show()

    def time_taken(self) -> StageTime:
        return StageTime(
            name=self.name,
            rows=round(self.rows),
            seconds=time.monotonic() - self._start,
            peak_bytes=self.peak,
            disk_bytes=self.disk,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        fraction = min(self._fraction, 1.0)
        parts = [
            f"{self.rows:,.0f} rows, {format_rate(self.rows / seconds)} rows/s",
            f"{binary_size(self.memory)} memory",
            f"{binary_size(self.disk)} disk",
        ]
        if self._bar is not None:
            room = columns(sys.stderr) - len("encode 100%|12345678| 00:00:00<00:00:00, ")
            while len(parts) > 1 and len(", ".join(parts)) > room:
                parts.pop()
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(fraction - self._bar.n)
        elif self._stream is not None and now >= self._line_at:
            left = f"{seconds * (1 - fraction) / fraction:,.0f}" if fraction else "?"
            counted = ", ".join([*parts, f"{left} s left"])
            print(f"{_title(self.name):<7}{fraction:6.1%}  {counted}", file=self._stream, flush=True)
            self._line_after = min(2 * self._line_after, _LINE_EVERY_S)
            self._line_at = now + self._line_after


def format_rate(rate: float) -> str:
    """Return a rate with two digits."""
    return f"{float(f'{rate:.2g}'):,.0f}"


def _title(stage: str) -> str:
    """Return the word for a stage on the screen."""
    return {"stage": "read", "bins": "scale"}.get(stage, stage)


def _bar(name: str, stream: TextIO) -> "tqdm":
    from tqdm import tqdm  # runs without a terminal start sooner without it

    colour = "blue" if has_colors(stream) else None
    # In the line of the cursor, even if the process has other bars open, such as one in a notebook.
    return tqdm(total=1.0, desc=name, bar_format=_BAR, file=stream, leave=False, colour=colour, position=0)


class Progress:
    """The stages of a job, shown as they run and timed.

    Args:
        show: show the stages on standard error; otherwise only time them.
    """

    def __init__(self, show: bool = True):
        self._stream = sys.stderr if show else None
        self.stages: list[StageTime] = []
        self.folder: Path | None = None
        """The working folder, whose size is shown."""

    def note(self, text: str) -> None:
        """Show a line."""
        if self._stream is not None:
            print(wrapped(text.splitlines(), self._stream), file=self._stream, flush=True)

    @contextmanager
    def stage(
        self, name: str, total_rows: int | None = None, poll: Callable[[], tuple[int, float]] | None = None
    ) -> Iterator[Stage]:
        """Show and time a stage.

        Args:
            total_rows: the rows that ``Stage.advance`` will reach; None if they are not known.
            poll: called at intervals for the rows done and their share of the stage.
        """
        stage = Stage(name, total_rows, self._stream)
        stop = threading.Event()
        meter = threading.Thread(target=self._measure, args=(stage, poll, stop), daemon=True)
        meter.start()
        try:
            yield stage
        finally:
            stop.set()
            meter.join()
            stage.close()
        self.stages.append(stage.time_taken())
        if self._stream is not None:
            print(self.stages[-1], file=self._stream, flush=True)

    def _measure(self, stage: Stage, poll: Callable[[], tuple[int, float]] | None, stop: threading.Event) -> None:
        disk, disk_at = 0, -_DISK_EVERY_S
        while True:
            last = stop.wait(_MEMORY_EVERY_S)
            if last or time.monotonic() - disk_at >= _DISK_EVERY_S:
                disk, disk_at = 0 if self.folder is None else bytes_below(self.folder), time.monotonic()
                if poll is not None:
                    stage.reached(*poll())
            stage.measured(resident_bytes(), disk)
            if last:
                return


def resident_bytes() -> int:
    """Return the resident memory of this process and its descendants; shared memory counts for each."""
    import psutil  # while the workers work already

    total = 0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # ended meanwhile
            continue
    return total


def bytes_below(folder: Path) -> int:
    """Return the size of all files in a folder, also while files come and go."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(root) / name).st_size
            except FileNotFoundError:
                continue
    return total


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimate of a run."""

    rows: float
    text_bytes: float
    """Uncompressed."""
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
        words = f"about {self.rows:,.0f} rows: needs about {binary_size(needed)} of disk"
        require(
            needed <= free,
            f"{words}, {binary_size(free)} are free at {folder.parent}; make room, or choose another "
            "place with --work and --output",
        )
        if output is not None and output.stat().st_dev != folder.stat().st_dev:
            dataset, room = self.rows * self.result_row_bytes, shutil.disk_usage(output).free
            require(
                dataset <= room,
                f"the dataset needs about {binary_size(dataset)} of disk, {binary_size(room)} are free at {output}; "
                "make room, or choose another --output",
            )
        seconds = self.rows / (_ROWS_PER_WORKER_S * min(workers, _WORKERS_PER_DISK))
        of_workers = f" with {workers} workers" if workers > 1 else ""
        return f"{words} ({binary_size(free)} are free) and {format_duration(seconds)}{of_workers}"


def estimate(
    files: Sequence[RawFile],
    row_bytes: tuple[int, int],
    known_rows: Mapping[str, int | None] | None = None,
    header_lines: int = 0,
) -> Estimate:
    """Estimate a run from the beginning of the first file of each compression; other files are assumed to be alike.

    Args:
        files: the inputs.
        row_bytes: of disk, for staged rows and ids, and for the dataset.
        known_rows: rows of some files, by their paths.
        header_lines: of all files together.

    Raises:
        UserError: one cannot be read.
    """
    rows = text_bytes = 0.0
    samples = {}
    for file in files:
        if (exact := (known_rows or {}).get(file.path)) is not None:
            rows, text_bytes = rows + exact, text_bytes + file.size
            continue
        if file.compression not in samples:
            samples[file.compression] = _sample(file)
        text, lines = samples[file.compression]
        rows, text_bytes = rows + file.size * lines, text_bytes + file.size * text
    rows = max(rows - header_lines, 0.0)
    return Estimate(rows=rows, text_bytes=text_bytes, row_bytes=sum(row_bytes), result_row_bytes=row_bytes[1])


def fields_of(file: RawFile) -> int:
    """Return the fields of the first line of a Criteo file; 1 if it cannot be decompressed."""
    return _beginning(file)[0].partition(b"\n")[0].count(b"\t") + 1


def _beginning(file: RawFile) -> tuple[bytes, int]:
    """Return the beginning of a file's text, and the stored bytes that it takes."""
    with file.text() as text:
        try:
            sample = text.read(_SAMPLE_BYTES)
        except ValueError:
            sample = b""  # truncated or corrupt: the first stage names the place
        stored = text.stored.tell() if sample else 1
    return sample, len(sample) if file.compression == "none" else min(stored, file.size)


def _sample(file: RawFile) -> tuple[float, float]:
    """Return bytes of text and lines for each stored byte."""
    sample, stored = _beginning(file)
    return len(sample) / max(stored, 1), sample.count(b"\n") / max(stored, 1)


def format_duration(seconds: float) -> str:
    """Format a duration."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
