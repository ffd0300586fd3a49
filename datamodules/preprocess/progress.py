"""Progress of a long job: a bar for each stage on a terminal, otherwise a line at growing intervals."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import psutil
from tqdm import tqdm

_FIRST_LINE_AFTER_S = 10.0  # without a terminal; each further line waits twice as long, up to
_LINE_EVERY_S = 300.0
_MEMORY_EVERY_S = 0.25
_DISK_EVERY_S = 2.0
_BAR = "{desc:<7}{percentage:3.0f}%|{bar:20}| [{elapsed}<{remaining}{postfix}]"


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
        rate = self.rows / self.seconds if self.seconds else 0.0
        return (
            f"{self.name:<7}{self.rows:>15,} rows {self.seconds:>9,.1f} s {rate:>11,.0f} rows/s "
            f"{self.peak_bytes / 1e9:>6,.2f} GB memory {self.disk_bytes / 1e9:>8,.2f} GB disk"
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
        self._bar: tqdm | None = None
        if stream is not None and stream.isatty():
            self._bar = tqdm(total=1.0, desc=name, bar_format=_BAR, file=stream, leave=True)

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
        counted = (
            f"{self.rows:,.0f} rows, {self.rows / seconds:,.0f} rows/s, "
            f"{self.memory / 1e9:,.2f} GB memory, {self.disk / 1e9:,.2f} GB disk"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(counted, refresh=False)
            self._bar.update(fraction - self._bar.n)
        elif self._stream is not None and now >= self._line_at:
            left = f"{seconds * (1 - fraction) / fraction:,.0f}" if fraction else "?"
            print(f"{self.name:<7}{fraction:6.1%}  {counted}, {left} s left", file=self._stream, flush=True)
            self._line_after = min(2 * self._line_after, _LINE_EVERY_S)
            self._line_at = now + self._line_after


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
            print(text, file=self._stream, flush=True)

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
        if self._stream is not None and not self._stream.isatty():
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
