"""``bench preprocess``: raw TSV to the final dataset folder, against pyarrow's bare parse of the same file."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from time import perf_counter, sleep

import psutil
from tqdm import tqdm

from datamodules.generate.tsv import TSV_DATASETS, TsvSettings, generate_tsv
from datamodules.preprocess.progress import bytes_below
from datamodules.preprocess.target import REPORT_FILE
from lightning_dlrm.bench.measurement import Implementation, Measurement, median_and_spread
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, DatasetSchema

DESCRIPTION = """\
Times, in turns and each in a process of its own, so that memory is measured too:
  ours      the whole command preprocess, its start included: TSV to the checksummed dataset folder
  baseline  pyarrow.csv.read_csv of the same file into memory, and nothing more; its start not included
  peer      with --peer, the preprocessing of a checkout of facebookresearch/dlrm, on the first rows; its start not
            included. It fails on NumPy 2: name an interpreter that has numpy<2 with --peer-python.

Memory, CPU time and disk come from one more run of each, which is not timed, as looking costs time: the peak memory of
all processes together, sampled 50 times a second, pages that they share counted once; what the working folder held at
most, the input apart. Prints a prediction for the real data sets, too, if there are enough rows.

examples:
  python -m lightning_dlrm bench preprocess
  python -m lightning_dlrm bench preprocess --rows 20000000 --rounds 1 --folder /big/disk
  python -m lightning_dlrm bench preprocess --peer ~/dlrm --peer-python ~/numpy1/bin/python
"""

_STAGES = ("stage", "count", "encode")
_PREDICT_FROM_ROWS = 500_000  # fewer are over before all workers have begun
_SAMPLE_S = 0.02
_DISK_SAMPLES = 25  # of memory for one of disk

_BASELINE = """
    import sys, time
    import pyarrow as pa, pyarrow.csv

    names = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    start = time.perf_counter()
    pyarrow.csv.read_csv(
        sys.argv[1],
        read_options=pyarrow.csv.ReadOptions(column_names=names),
        parse_options=pyarrow.csv.ParseOptions(delimiter="\\t"),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() if name[0] == "C" else pa.int32() for name in names}
        ),
    )
    print(time.perf_counter() - start)
"""

_PEER = """
    import contextlib, os, sys, time

    sys.path.insert(0, sys.argv[1])
    import numpy

    if int(numpy.__version__.split(".")[0]) >= 2:
        sys.exit(f"NumPy {numpy.__version__} found, which it fails on; name one with numpy<2 with --peer-python")
    import data_utils

    os.link(sys.argv[2], sys.argv[3])
    start = time.perf_counter()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        data_utils.getCriteoAdData(sys.argv[3], "processed", randomize="none", criteo_kaggle=True)
    print(time.perf_counter() - start)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=int, default=1_000_000, metavar="N", help="rows to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="raw text of this --dataset, not compressed, to read instead of generated rows",
    )
    parser.add_argument("--dataset", default="kaggle", choices=TSV_DATASETS, help="default: %(default)s")
    parser.add_argument("--protocol", default="dlrm", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="the median counts (default: %(default)s)")
    parser.add_argument(
        "--baseline-rows",
        type=int,
        default=5_000_000,
        metavar="N",
        help="first rows for the bare parse, at most: it holds them all, 0.5 GB a million (default: %(default)s)",
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to write, and remove again (default: the temporary folder)"
    )
    parser.add_argument("--peer", type=Path, metavar="DIR", help="a checkout of facebookresearch/dlrm")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="FILE", help="the interpreter to run it with (default: this)"
    )
    parser.add_argument(
        "--peer-rows", type=int, default=60_000, metavar="N", help="first rows for the peer (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> list[Measurement]:
    """Measures as ``add_arguments`` was told, and prints what the figures mean for the real data sets.

    Raises:
        UserError: an option is out of range, a file is missing, or a contender fails.
    """
    if args.rounds < 1 or min(args.peer_rows, args.baseline_rows) < 100:
        raise UserError("bench preprocess needs --rounds of 1 or more, --peer-rows and --baseline-rows of 100 or more")
    if args.input is not None and not args.input.is_file():
        raise UserError(f"--input {args.input} is no file; give raw TSV, or leave it out to generate some")
    if args.input is not None and args.input.suffix in (".gz", ".zst"):
        raise UserError(
            f"--input {args.input} is compressed; unpack it first, as rows are counted and cut off by lines"
        )
    if args.peer is not None and not (args.peer / "data_utils.py").is_file():
        raise UserError(f"--peer {args.peer} is no checkout of facebookresearch/dlrm: it has no data_utils.py")
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder {args.folder} is no folder; make it, or leave it out for the temporary folder")
    with tempfile.TemporaryDirectory(prefix="bench-preprocess-", dir=args.folder) as name:
        folder = Path(name)
        raw = args.input
        if raw is None:
            raw = folder / "train.txt"
            generate_tsv(TsvSettings(rows=args.rows, dataset=args.dataset), [raw])
        ours = _Ours(raw, args.dataset, args.protocol, folder / "ours")
        parsed = raw
        if _lines(raw) > args.baseline_rows:
            parsed = folder / "parsed.txt"
            _copy_first_lines(raw, parsed, args.baseline_rows)
        baseline = _Script(_BASELINE, sys.executable, (str(parsed),), samples=_lines(parsed))
        rows = _measure(ours, "baseline", baseline, args)
        if rows[0].samples >= _PREDICT_FROM_ROWS:
            print(render_predictions(_cost(rows[0])))
        if args.peer is not None:
            few = folder / "first.txt"
            _copy_first_lines(raw, few, args.peer_rows)
            ours_of_few = _Ours(few, args.dataset, args.protocol, folder / "few")
            beside = folder / "peer"  # it writes beside its input
            arguments = (str(args.peer), str(few), str(beside / "train.txt"))
            peer = _Script(_PEER, args.peer_python, arguments, samples=_lines(few), folder=beside)
            rows += _measure(ours_of_few, "peer", peer, args)
            # The peer is as fast on many rows; ours, whose start is in its time, is not yet so on few.
            ratio = rows[0].samples_per_s / rows[-1].samples_per_s
            rows[0] = replace(rows[0], extra={**rows[0].extra, "speed_over_peer": ratio})
    return rows


@dataclass
class _Footprint:
    """What a process and all below it take, as far as it was seen."""

    folder: Path | None
    """Whose size is watched."""
    peak_bytes: int = 0
    peak_disk_bytes: int = 0
    cpu_of: dict[int, float] = field(default_factory=dict)
    """Process -> its CPU time in seconds."""
    looks: int = 0

    @property
    def cpu_s(self) -> float:
        """Of all processes together."""
        return sum(self.cpu_of.values())

    def look(self, process: psutil.Process) -> None:
        memory = 0
        for member in _family(process):
            try:
                found, cpu = member.memory_full_info(), member.cpu_times()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it has just ended
            # Of a page that n of them share, an nth each, where it is known.
            memory += getattr(found, "pss", found.rss)
            self.cpu_of[member.pid] = cpu.user + cpu.system
        self.peak_bytes = max(self.peak_bytes, memory)
        if self.folder is not None and self.looks % _DISK_SAMPLES == 0:
            self.peak_disk_bytes = max(self.peak_disk_bytes, bytes_below(self.folder))
        self.looks += 1


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@dataclass
class _Ours:
    """The command ``preprocess``, each time into a new folder inside ``folder``."""

    raw: Path
    dataset: str
    protocol: str
    folder: Path
    output: Path | None = None
    """Of the latest run."""

    def __call__(self, footprint: _Footprint | None = None) -> float:
        """Seconds of a run."""
        if self.output is not None:
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        self.output = self.folder / "data"
        command = [sys.executable, "-m", "lightning_dlrm", "preprocess"]
        command += ["--dataset", self.dataset, "--protocol", self.protocol]
        command += ["--input", str(self.raw), "--output", str(self.output)]
        return _run_process(command, footprint)[0]

    def schema(self) -> DatasetSchema:
        """Of the dataset that the latest run made."""
        assert self.output is not None
        return DatasetSchema.load(self.output)

    def output_bytes(self) -> int:
        assert self.output is not None
        return bytes_below(self.output)

    def stage_seconds(self) -> dict[str, float]:
        """Of the latest run, as its report tells."""
        assert self.output is not None
        report = json.loads((self.output / REPORT_FILE).read_text())
        return {stage["name"]: stage["seconds"] for stage in report["stages"]}


@dataclass(frozen=True)
class _Script:
    """A Python program that prints how many seconds the part of it that counts took."""

    program: str
    python: str
    arguments: tuple[str, ...]
    samples: int
    """Rows that it handles."""
    folder: Path | None = None
    """Where it writes; emptied before each run."""

    def __call__(self, footprint: _Footprint | None = None) -> float:
        """Seconds, as a run tells."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        command = [self.python, "-c", textwrap.dedent(self.program), *self.arguments]
        return float(_run_process(command, footprint)[1])


def _measure(ours: _Ours, name: Implementation, other: _Script, args: argparse.Namespace) -> list[Measurement]:
    """Rows of ours and of another, timed in turns."""
    contenders: dict[Implementation, _Ours | _Script] = {"ours": ours, name: other}
    seconds: dict[Implementation, list[float]] = {who: [] for who in contenders}
    stages = []
    turns = [who for round_ in range(args.rounds) for who in list(contenders)[:: 1 if round_ % 2 == 0 else -1]]
    with tqdm(total=len(turns) + len(contenders), desc="Measuring", unit=" runs", disable=None) as bar:
        for who in turns:
            seconds[who].append(contenders[who]())
            if who == "ours":
                stages.append(ours.stage_seconds())
            bar.update()
        footprints = {who: _Footprint(contender.folder) for who, contender in contenders.items()}
        for who, contender in contenders.items():
            contender(footprints[who])
            bar.update()
    schema = ours.schema()
    rows = sum(split.rows for split in schema.splits.values())
    row = _row("ours", rows, seconds["ours"], footprints["ours"], args)
    row_of_other = _row(name, other.samples, seconds[name], footprints[name], args)
    extra = {
        f"speed_over_{name}": row.samples_per_s / row_of_other.samples_per_s,
        **row.extra,
        "peak_disk_bytes": float(footprints["ours"].peak_disk_bytes),
        "output_bytes": float(ours.output_bytes()),
        "largest_table_rows": float(max(schema.features.table_rows)),
        **{f"{stage}_s": statistics.median(of_run[stage] for of_run in stages) for stage in _STAGES},
    }
    return [replace(row, extra=extra), row_of_other]


def _row(
    name: Implementation, samples: int, seconds: Sequence[float], footprint: _Footprint, args: argparse.Namespace
) -> Measurement:
    median, spread = median_and_spread(seconds)
    return Measurement(
        work="preprocess",
        case=f"{samples:,} rows, {args.dataset}, {args.protocol}",
        implementation=name,
        device="cpu",
        precision="32-true",
        batch_size=0,
        samples=samples,
        median_s=median,
        spread_s=spread,
        extra={"peak_bytes": float(footprint.peak_bytes), "cpu_s": footprint.cpu_s},
    )


def _run_process(command: Sequence[str], footprint: _Footprint | None) -> tuple[float, str]:
    """Runs a program to its end: the seconds that it took, and what it printed.

    Args:
        footprint: to be taken; None leaves the program alone.

    Raises:
        UserError: it cannot be run, or fails; tells the last line of its error output.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = perf_counter()
        try:
            process = psutil.Popen(command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise UserError(f"cannot run {command[0]} ({error.strerror})") from error
        try:
            while footprint is not None and process.poll() is None:
                footprint.look(process)
                sleep(_SAMPLE_S)
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        seconds = perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if code:
            lines = errors.read().strip().splitlines() or [f"exit code {code}"]
            raise UserError(f"{' '.join(command[:4])} failed: {lines[-1]}")
        return seconds, output.read()


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 24), b""))


def _copy_first_lines(source: Path, target: Path, rows: int) -> None:
    with source.open("rb") as lines, target.open("wb") as copy:
        copy.writelines(islice(lines, rows))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a measured run took for each of its rows."""

    core_s: Mapping[str, float]
    """Stage -> seconds of one core, were all cores busy."""
    disk_bytes: float
    """Beside the input, at most."""
    output_bytes: float
    worker_bytes: float
    """Memory of a worker, not for a row: it does not grow with them."""


def _cost(row: Measurement) -> Cost:
    """From a row of ours, made by as many workers as this machine has cores."""
    workers = os.cpu_count() or 1
    return Cost(
        core_s={stage: row.extra[f"{stage}_s"] * workers / row.samples for stage in _STAGES},
        disk_bytes=row.extra["peak_disk_bytes"] / row.samples,
        output_bytes=row.extra["output_bytes"] / row.samples,
        worker_bytes=row.extra["peak_bytes"] / workers,
    )


@dataclass(frozen=True, kw_only=True)
class _Target:
    name: str
    rows: int
    largest_table: float
    """Its share of the distinct values of all tables."""


_TARGETS = (
    _Target(name="kaggle", rows=45_840_617, largest_table=10_131_227 / 33_762_577),
    _Target(name="terabyte, 24 days", rows=4_373_472_329, largest_table=292_775_614 / 882_774_559),
)
# Assumptions, told with the figures.
_NODES = (1, 10)
_NODE_CORES = 16
_EFFICIENCY = 0.7
_NODE_BYTES_PER_S = 1e9
_TEXT_BYTES = 250


def predict(cost: Cost, target: _Target, nodes: int) -> dict[str, float]:
    """Seconds of each stage and of all, ``memory`` of a node, ``disk`` and ``output``, in bytes."""
    cores = nodes * _NODE_CORES * _EFFICIENCY
    parallel = dict.fromkeys(cost.core_s, 1 / cores)
    # A column is counted by one core at a time.
    parallel["count"] = max(1 / min(cores, len(CRITEO_CATEGORICAL)), target.largest_table)
    seconds = {stage: target.rows * core_s * parallel[stage] for stage, core_s in cost.core_s.items()}
    # The text is read once; what lies on the disk meanwhile is written and read once.
    moved = target.rows * (_TEXT_BYTES + 2 * cost.disk_bytes)
    return {
        **seconds,
        "total": max(sum(seconds.values()), moved / (nodes * _NODE_BYTES_PER_S)),
        "memory": _NODE_CORES * cost.worker_bytes,
        "disk": target.rows * cost.disk_bytes,
        "output": target.rows * cost.output_bytes,
    }


def render_predictions(cost: Cost) -> str:
    """What ``predict`` says of the real data sets, as text with its assumptions."""
    stages = list(cost.core_s)
    lines = ["prediction, not measured, from the largest run of ours above:"]
    header = f"  {'data set':<20}{'nodes x cores':>14}" + "".join(f"{stage:>10}" for stage in stages)
    lines.append(f"{header}{'total':>10}{'memory of a node':>18}{'disk meanwhile':>16}{'result':>10}")
    for target in _TARGETS:
        for nodes in _NODES:
            found = predict(cost, target, nodes)
            times = "".join(f"{_minutes(found[name]):>10}" for name in (*stages, "total"))
            sizes = (
                f"{found['memory'] / 1e9:>15,.1f} GB{found['disk'] / 1e9:>13,.0f} GB{found['output'] / 1e9:>7,.0f} GB"
            )
            lines.append(f"  {target.name:<20}{f'{nodes} x {_NODE_CORES}':>14}{times}{sizes}")
    lines += [
        f"  assumed: a core at {_EFFICIENCY:.0%} of the speed of these here; plain text (of compressed days, one core "
        "reads one file);",
        "  a column is counted by one core, in a share of the stage like its share of the distinct values; costs of a "
        "row as measured",
        f"  here; disks or a shared file system of {_NODE_BYTES_PER_S / 1e9:.0f} GB/s a node, which bound the total; "
        "as many workers as cores, each with",
        "  the memory of one here, whatever the rows.",
    ]
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.1f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
