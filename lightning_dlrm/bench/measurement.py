"""Timing in rounds that alternate between the contenders, and its results as a table and as JSON rows."""

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

from datamodules.preprocess.inspection import aligned
from lightning_dlrm.contracts.errors import UserError

Implementation = Literal["ours", "baseline", "peer"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of a benchmark."""

    work: str
    """The subcommand, such as ``loader``."""
    case: str
    """Description of what was timed."""
    implementation: Implementation
    device: str
    precision: str
    batch_size: int
    """Samples of a batch; 0 if there are no batches."""
    samples: int
    """Number of samples that take ``median_s``."""
    median_s: float
    """Median of the rounds, seconds."""
    spread_s: float
    """Slowest round minus fastest, seconds."""
    floor_s: float | None = None
    """Least time that the machine allows, seconds; None if unknown."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further numbers of this row, such as ``peak_bytes``."""
    shown: bool = True
    """Whether the table for a terminal has the row; rows that another table prints are not shown."""

    @classmethod
    def of_rounds(cls, seconds: Sequence[float], **fields: Any) -> "Measurement":
        """Return a row with the median and the spread of the seconds of each round, and other fields."""
        return cls(median_s=statistics.median(seconds), spread_s=max(seconds) - min(seconds), **fields)

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.median_s

    def row(self) -> dict[str, object]:
        """Return the row as one flat JSON object."""
        fields = asdict(self)
        del fields["shown"]
        return {**fields.pop("extra"), **fields, "samples_per_s": self.samples_per_s}


Key = TypeVar("Key")


def time_rounds(
    contenders: Mapping[Key, Callable[[], object]], rounds: int, *, warm_up: int = 0, steps: int = 1
) -> dict[Key, list[float]]:
    """Time contenders in rounds.

    Every round times all contenders, so that other work on the machine slows all of them down, and every second round
    goes backwards, so that no contender always follows the same one.

    Args:
        contenders: name -> what is timed.
        rounds: number of rounds that count.
        warm_up: number of rounds before them that do not count.
        steps: number of equal steps that a contender makes in a round.

    Returns:
        Name -> seconds of one step in each round.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in contenders}
    for round_ in range(warm_up + rounds):
        for name in list(contenders)[:: 1 if round_ % 2 == 0 else -1]:
            start = time.perf_counter()
            contenders[name]()
            if round_ >= warm_up:
                seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def times_as_fast(seconds: Sequence[float], other: Sequence[float]) -> float:
    """Return how many times the first contender's time fits into the other's: the median of the rounds' quotients.

    What else a machine does changes from minute to minute, and slows both times of a round down alike.
    """
    return statistics.median(theirs / ours for ours, theirs in zip(seconds, other, strict=True))


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def render(rows: Sequence[Measurement]) -> str:
    """Return the rows as a table for a terminal."""
    cells = [("case", "implementation", "median", "spread", "samples/s", "floor", "x floor", "")]
    for row in (row for row in rows if row.shown):
        floor, ratio = "", ""
        if row.floor_s is not None:
            floor, ratio = duration(row.floor_s), f"{row.median_s / row.floor_s:.2f}"
        cells.append(
            (
                row.case,
                row.implementation,
                duration(row.median_s),
                duration(row.spread_s),
                f"{row.samples_per_s:,.0f}",
                floor,
                ratio,
                ", ".join(f"{name} {value:,.4g}" for name, value in row.extra.items()),
            )
        )
    return "\n".join(aligned(cells, left=(0, 1, 7)))


def write_json(rows: Sequence[Measurement], path: Path) -> None:
    """Write the rows as a list of flat objects.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps([row.row() for row in rows], indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --json FILE") from error


def machine() -> str:
    """Return one line with the processor, the cores of this process, the memory, and versions of packages."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "pytorch-lightning", "pyarrow", "numpy"))
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB; Python {platform.python_version()}, {packages}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def duration(seconds: float) -> str:
    """Return a time with three digits and a unit."""
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
