"""What a benchmark measures: rounds that alternate between the contenders, the median, a table and JSON rows."""

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
from typing import Literal

from datamodules.preprocess.inspection import aligned
from lightning_dlrm.contracts.errors import UserError

Implementation = Literal["ours", "baseline", "peer"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of a benchmark."""

    work: str
    """The subcommand, such as ``loader``."""
    case: str
    """What was timed, in a few words."""
    implementation: Implementation
    device: str
    precision: str
    batch_size: int
    """Samples of a batch; 0 where there are no batches."""
    samples: int
    """Handled in ``median_s``."""
    median_s: float
    """Seconds, the median of the rounds."""
    spread_s: float
    """Slowest round minus fastest, seconds."""
    floor_s: float | None = None
    """The least time that the machine allows, seconds, where it is known."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """More figures of this row, such as ``peak_bytes``."""
    shown: bool = True
    """Whether the row is in the table for a terminal too; where not, another table has it."""

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.median_s

    def row(self) -> dict[str, object]:
        """The row as JSON has it: one flat object."""
        fields = asdict(self)
        del fields["shown"]
        return {**fields.pop("extra"), **fields, "samples_per_s": self.samples_per_s}


def time_rounds(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round.

    Every round times all of them, so that what else the machine does meets them alike, and every
    second round goes backwards, so that none always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds):
        for name in list(contenders)[:: 1 if round_ % 2 == 0 else -1]:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """The two figures that a row keeps of its rounds."""
    return statistics.median(seconds), max(seconds) - min(seconds)


def times_as_fast(seconds: Sequence[float], other: Sequence[float]) -> float:
    """How many times the other's time this one's goes into: the median of the rounds' quotients. What a machine has
    beside a benchmark changes from minute to minute, and meets both of a round alike."""
    return statistics.median(theirs / ours for ours, theirs in zip(seconds, other, strict=True))


def peak_bytes() -> int:
    """The most resident memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def render(rows: Sequence[Measurement]) -> str:
    """The rows as a table for a terminal."""
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
    """Writes the rows as a list of flat objects.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps([row.row() for row in rows], indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --json FILE") from error


def machine() -> str:
    """The processor, its cores for this process, memory, and the versions that matter; one line."""
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
    """Three digits and a unit."""
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
