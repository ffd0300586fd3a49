"""How far a long job is: a bar per stage on a terminal, else a plain line now and then."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

_FIRST_LINE_AFTER_S = 10.0  # without a terminal; each further line waits twice as long, up to
_LINE_EVERY_S = 300.0
_BAR = "{desc:<7}{percentage:3.0f}%|{bar:25}| [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True, kw_only=True)
class StageTime:
    name: str
    rows: int
    seconds: float

    def __str__(self) -> str:
        rate = self.rows / self.seconds if self.seconds else 0.0
        return f"{self.name:<7}{self.rows:>15,} rows {self.seconds:>9,.1f} s {rate:>11,.0f} rows/s"


class Stage:
    """One stage's display; ``advance`` may be called from any thread."""

    def __init__(self, name: str, total_rows: int | None, stream: TextIO | None):
        self.name = name
        self.rows = 0.0
        self._total_rows = total_rows
        self._stream = stream
        self._start = time.monotonic()
        self._line_after = _FIRST_LINE_AFTER_S
        self._line_at = self._start + self._line_after
        self._lock = threading.Lock()
        self._bar: tqdm | None = None
        if stream is not None and stream.isatty():
            self._bar = tqdm(total=1.0, desc=name, bar_format=_BAR, file=stream, leave=True)

    def advance(self, rows: float, fraction: float | None = None) -> None:
        """Counts more rows as done.

        Args:
            rows: newly done; a part of a row where the stage takes several steps a row.
            fraction: of the whole stage that is done by now, where its rows are not known before.
        """
        with self._lock:
            self.rows += rows
            if fraction is None:
                fraction = self.rows / self._total_rows if self._total_rows else 0.0
            self._show(min(fraction, 1.0))

    def time_taken(self) -> StageTime:
        return StageTime(name=self.name, rows=round(self.rows), seconds=time.monotonic() - self._start)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self, fraction: float) -> None:
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        counted = f"{self.rows:,.0f} rows, {self.rows / seconds:,.0f} rows/s"
        if self._bar is not None:
            self._bar.set_postfix_str(counted, refresh=False)
            self._bar.update(fraction - self._bar.n)
        elif self._stream is not None and now >= self._line_at:
            left = seconds * (1 - fraction) / fraction if fraction else float("nan")
            print(f"{self.name:<7}{fraction:6.1%}  {counted}, {left:,.0f} s left", file=self._stream, flush=True)
            self._line_after = min(2 * self._line_after, _LINE_EVERY_S)
            self._line_at = now + self._line_after


class Progress:
    """The stages of a job, shown as they run and timed.

    Args:
        show: on standard error; or only time them.
    """

    def __init__(self, show: bool = True):
        self._stream = sys.stderr if show else None
        self.stages: list[StageTime] = []

    @contextmanager
    def stage(self, name: str, total_rows: int | None = None) -> Iterator[Stage]:
        stage = Stage(name, total_rows, self._stream)
        try:
            yield stage
        finally:
            stage.close()
        self.stages.append(stage.time_taken())
        if self._stream is not None and not self._stream.isatty():
            print(self.stages[-1], file=self._stream, flush=True)
