"""Common code of all benchmarks: options, timing in rounds that alternate between the contenders, and rows of
results."""

import argparse
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tqdm import tqdm

from datamodules.folder import load_schema
from datamodules.generate.demo import DemoSettings, demo_folder, generate_demo
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.contracts.terminal import counted
from lightning_dlrm.kernels.choice import SLOW_BF16, bf16_is_slow, choose

PRECISIONS = ("32-true", "bf16-mixed")
DEFAULT = "(default: %(default)s)"
RATIOS = """
Every round times all contenders; a ratio is the median of the rounds' ratios, with the lowest and the highest. A time
is called uncertain if the times of its rounds differ by more than 25% of their median, and a ratio likewise.
"""
"""Help of benchmarks that compare contenders."""
FLOOR = """
The floor is the sum, over the parts of the model, of the least time that their operations or their memory traffic take
at the rates of this machine. They are measured in the same run: other work at that time makes the floor too large, and
other work during the rounds makes the times too long.
"""
"""Help of benchmarks with a floor."""


def add_rounds(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    """Add ``--rounds``."""
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        metavar="N",
        help=f"timings of each contender; the median counts {DEFAULT}",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--precision``, ``--batch-size``, ``--rounds``."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help=f"where to compute {DEFAULT}")
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["32-true"],
        choices=PRECISIONS,
        metavar="NAME",
        help=f"{' or '.join(PRECISIONS)}, or both in the same run (default: 32-true)",
    )
    parser.add_argument("--batch-size", type=int, default=2048, metavar="N", help=f"samples of a batch {DEFAULT}")
    add_rounds(parser)


def add_steps(parser: argparse.ArgumentParser) -> None:
    """Add ``--steps``."""
    parser.add_argument("--steps", type=int, default=20, metavar="N", help=f"steps of a round {DEFAULT}")


def add_max_rows(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-rows``."""
    parser.add_argument("--max-rows", type=int, metavar="N", help="cut every table to N rows (default: no limit)")


def limit_name(max_rows: int | None) -> str:
    """Return what ``--max-rows`` adds to the case of a row."""
    return "" if max_rows is None else f", tables of at most {max_rows:,} rows"


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset folder (default: the demo data of fit)")


def data_name(folder: Path | None) -> str:
    """Return the name of a dataset folder for the case of a row; None for the demo data."""
    return "demo data" if folder is None else folder.absolute().name


def add_peer_python(parser: argparse.ArgumentParser) -> None:
    """Add ``--peer`` and ``--peer-python``."""
    parser.add_argument("--peer", type=Path, metavar="DIR", help="checkout of facebookresearch/dlrm, to time it too")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="FILE",
        help="Python for --peer, with numpy<2, torch, scikit-learn and tensorboard (default: this Python)",
    )


def check_numbers(args: argparse.Namespace) -> None:
    """Check that every number among the options is 1 or more.

    Raises:
        UserError: a number is below 1.
    """
    for name, value in vars(args).items():
        # --bag may begin with empty bags; its own check follows.
        numbers = value if isinstance(value, list) and name != "bag" else [value]
        below = [number for number in numbers if isinstance(number, int) and number < 1 and number is not False]
        if below:
            raise UserError(f"bench {args.work}: --{name.replace('_', '-')} is {below[0]}; give 1 or more")


def check(args: argparse.Namespace) -> torch.device:
    """Check the options, print which kernels ours has, and return the device.

    Raises:
        UserError: a number is below 1, there is no such device, or no such checkout.
    """
    check_numbers(args)
    check_peer(args, "dlrm_s_pytorch.py")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no CUDA device here: use --device cpu")
    if args.device == "cpu" and "bf16-mixed" in getattr(args, "precision", ()) and bf16_is_slow():
        print(f"warning: {SLOW_BF16}", file=sys.stderr)
    print(f"kernels of lightning_dlrm: {choose(getattr(args, 'kernels', 'auto'), args.device, torch.float32)}")
    return torch.device(args.device)


def check_peer(args: argparse.Namespace, file: str) -> None:
    """Check that ``--peer``, if given, is a folder with a file of the peer's.

    Raises:
        UserError: the file is missing.
    """
    peer = getattr(args, "peer", None)
    if peer is not None and not (peer / file).is_file():
        raise UserError(f"--peer {peer} is not a checkout of facebookresearch/dlrm: it has no {file}")


def open_dataset(folder: Path | None) -> tuple[Path, DatasetSchema]:
    """Return a dataset folder and its schema; without a folder, make those of the demo data."""
    if folder is None:
        folder = demo_folder(DemoSettings())
        generate_demo(DemoSettings(), folder)
    return folder, load_schema(folder)


def finisher(device: torch.device) -> Callable[[], object]:
    """Return a function that waits until the device has done its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


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
    """Slowest round minus fastest, seconds; 0 with a single round."""
    fastest_s: float = 0.0
    """Fastest round, seconds; 0 if unknown."""
    floor_s: float | None = None
    """Least time that the machine allows, seconds; None if unknown."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further numbers of this row, such as ``peak_bytes``."""
    shown: bool = True
    """Whether the table for a terminal has the row; rows that another table prints are not shown."""
    error: str = ""
    """Why nothing was measured; the numbers are then 0. Empty if something was."""

    @classmethod
    def of_rounds(cls, seconds: Sequence[float], **fields: Any) -> "Measurement":
        """Return a row with the median and the spread of the seconds of each round, and other fields."""
        fastest = min(seconds)
        spread = max(seconds) - fastest
        return cls(median_s=statistics.median(seconds), spread_s=spread, fastest_s=fastest, **fields)

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.median_s if self.median_s else 0.0

    def row(self) -> dict[str, object]:
        """Return the row as one flat JSON object; one without a measurement has its case, device and error only."""
        if self.error:
            return {name: vars(self)[name] for name in ("work", "case", "implementation", "device", "error")}
        fields = {name: value for name, value in vars(self).items() if name not in ("extra", "shown", "error")}
        return {**self.extra, **fields, "samples_per_s": self.samples_per_s}


Key = TypeVar("Key")


def time_rounds(
    contenders: Mapping[Key, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 0,
    steps: int = 1,
    repeated: bool = False,
) -> dict[Key, list[float]]:
    """Time contenders in rounds.

    Every round times all contenders, so that other work on the machine slows all of them down, and every second round
    goes backwards, so that no contender always follows the same one.

    Args:
        contenders: name -> what is timed.
        rounds: number of rounds that count.
        warm_up: number of rounds before them that do not count.
        steps: number of equal steps that a contender makes in a round.
        repeated: call each contender twice in a round and time the second call, because the first finds the data of
            other contenders in the processor's caches.

    Returns:
        Name -> seconds of one step in each round.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in contenders}
    progress = "Measuring" + f" (with {counted(warm_up, 'warm-up round')})" * bool(warm_up)
    for round_ in tqdm(range(warm_up + rounds), desc=progress, unit="round", leave=False, disable=None):
        for name in list(contenders)[:: 1 if round_ % 2 == 0 else -1]:
            if repeated:
                contenders[name]()
            start = time.perf_counter()
            contenders[name]()
            if round_ >= warm_up:
                seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def speed_ratio(name: str, seconds: Sequence[float], other: Sequence[float], samples: float = 1.0) -> dict[str, float]:
    """Return the ratio of two contenders' speeds for a row: the median of the rounds' ratios, the lowest and the
    highest.

    What else a machine does changes from minute to minute, and slows both times of a round down alike.

    Args:
        name: name of the ratio in the row.
        seconds: times of the first contender in each round; it is faster if the ratio is above 1.
        other: times of the other contender in the same rounds.
        samples: samples of the first contender in a round, divided by those of the other.
    """
    ratios = [samples * theirs / ours for ours, theirs in zip(seconds, other, strict=True)]
    return {name: statistics.median(ratios), f"{name}_low": min(ratios), f"{name}_high": max(ratios)}


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> str:
    """Return one line with the processor, the cores of this process, the memory, and versions of packages."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "pytorch-lightning", "pyarrow", "numpy"))
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB; Python {platform.python_version()}, {packages}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def duration(seconds: float) -> str:
    """Return a time with at least three digits, and a unit.

    >>> [duration(seconds) for seconds in (1234.0, 3.8, 0.9996, 0.0038, 0.00078)]
    ['1,234 s', '3.80 s', '1,000 ms', '3.80 ms', '780 us']
    """
    size, unit = next(((size, unit) for size, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= size), (1e-6, "us"))
    return f"{three_digits(seconds / size)} {unit}"


def three_digits(number: float) -> str:
    """Format a number with three digits, and all digits before the decimal point.

    >>> [three_digits(number) for number in (1.1, 99.96, 999.6, 46_123.0, 0.0, 1e-7, float("inf"))]
    ['1.10', '100', '1,000', '46,123', '0.00', '0.000000100', 'inf']
    """
    if not isfinite(number):
        return str(number)
    decimals = 2 - floor(log10(float(f"{abs(number):.2e}"))) if number else 2
    return f"{number:,.{max(decimals, 0)}f}"
