"""``bench preprocess``: raw TSV to the final dataset folder, against pyarrow's bare parse of the same file."""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv
from tqdm import tqdm

from datamodules.generate.log import LogSettings, generate_log
from datamodules.generate.tsv import TSV_DATASETS, TsvSettings, generate_tsv
from datamodules.preprocess.progress import bytes_below
from datamodules.preprocess.report import REPORT_FILE
from datamodules.preprocess.workers import usable_cores
from lightning_dlrm.bench.measurement import (
    DEFAULT,
    Implementation,
    Measurement,
    add_peer_python,
    add_rounds,
    check_numbers,
    check_peer,
    speed_ratio,
)
from lightning_dlrm.bench.peer import peer_command, peer_name
from lightning_dlrm.bench.processes import Footprint, run_process
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, DatasetSchema
from lightning_dlrm.contracts.terminal import binary_size

DESCRIPTION = """\
Time the command preprocess, and measure its memory and disk space.

examples:
  python -m lightning_dlrm bench preprocess
  python -m lightning_dlrm bench preprocess --dataset log
  python -m lightning_dlrm bench preprocess --rows 20000000 --rounds 1 --folder /big/disk
  python -m lightning_dlrm bench preprocess --peer ~/dlrm --peer-python ~/numpy1/bin/python
"""
DETAILS = """\
what is timed, in turns, each in a process of its own:
  ours      the whole command preprocess, its start included: text to the checksummed dataset folder
  baseline  pyarrow.csv.read_csv of the same file into memory, and nothing more; its start not included. Of Criteo's
            files types are given; of logs pyarrow finds them.
  peer      with --peer, the preprocessing of a checkout of facebookresearch/dlrm, on the first rows; its start not
            included. It fails on NumPy 2: name an interpreter that has numpy<2 with --peer-python.

datasets of --dataset that are not Criteo's:
  log       a CSV of 20 columns: label, time, 6 numbers and 12 categories, of which three have up to a million values
  avazu     a CSV of 24 columns, of which 21 are categorical

Memory, processor time and disk space come from one more run of each, which is not timed because sampling takes time.
Memory is the peak of all processes together, sampled 50 times a second, with shared pages counted once. Disk space is
the peak size of the working folder without the input. With enough rows, a prediction for the real data sets is printed
too.
"""

_LOGS = ("log", "avazu")
"""Logs that are read by a schema."""
_CATEGORIES = (1_000_000, 300_000, 100_000, 10_000, 5_000, 1_000, 300, 100, 30, 10, 4, 2)
"""Possible values of the categories of ``log``."""
_NUMBERS = 6
_BLOCK_ROWS = 65_536

_STAGES = ("stage", "count", "encode")
_PREDICT_FROM_ROWS = 500_000  # runs of fewer rows end before all workers have begun

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

_LOG_BASELINE = """
    import sys, time
    import pyarrow.csv

    start = time.perf_counter()
    pyarrow.csv.read_csv(sys.argv[1])
    print(time.perf_counter() - start)
"""

_PEER = """
    import contextlib, os, time

    os.link(sys.argv[3], sys.argv[4])
    start = time.perf_counter()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        peer.getCriteoAdData(sys.argv[4], "processed", randomize="none", criteo_kaggle=True)
    print(time.perf_counter() - start)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help=f"rows to generate {DEFAULT}")
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="uncompressed raw text of this --dataset, to read instead of generated rows",
    )
    parser.add_argument("--dataset", default="kaggle", choices=(*TSV_DATASETS, *_LOGS), help=f"what to read {DEFAULT}")
    parser.add_argument("--protocol", default="dlrm", metavar="NAME", help=f"protocol of Criteo's files {DEFAULT}")
    add_rounds(parser, 3)
    parser.add_argument(
        "--baseline-rows",
        type=int,
        default=5_000_000,
        metavar="N",
        help=f"first rows for the baseline, which needs 0.5 GiB of memory for a million {DEFAULT}",
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder for temporary files (default: the system's)")
    add_peer_python(parser)
    parser.add_argument("--peer-rows", type=int, default=60_000, metavar="N", help=f"first rows for --peer {DEFAULT}")


def run(args: argparse.Namespace) -> list[Measurement]:
    """Measure, and print what the result predicts for the real data sets.

    Raises:
        UserError: an option is out of range, a file is missing, or a contender fails.
    """
    check_numbers(args)
    if min(args.peer_rows, args.baseline_rows) < 100:
        raise UserError("bench preprocess needs --peer-rows and --baseline-rows of 100 or more")
    if args.input is not None and not args.input.is_file():
        raise UserError(f"--input {args.input} is not a file; give raw TSV, or leave it out to generate some")
    if args.input is not None and args.input.suffix in (".gz", ".zst"):
        raise UserError(f"--input {args.input} is compressed; unpack it first, because rows are counted by lines")
    is_log = args.dataset in _LOGS
    if is_log and args.peer is not None:
        raise UserError(f"--peer reads Criteo's files only; leave it out, or --dataset {args.dataset}")
    check_peer(args, "data_utils.py")
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder {args.folder} is not a folder; make it, or leave it out for the temporary folder")
    with tempfile.TemporaryDirectory(prefix="bench-preprocess-", dir=args.folder) as name:
        folder = Path(name)
        raw = args.input
        if raw is None:
            raw = folder / "train.txt"
            if args.dataset == "log":
                _write_log(raw, args.rows)
            elif is_log:
                (raw,) = generate_log(LogSettings(form=args.dataset, rows=args.rows), folder).files
            else:
                generate_tsv(TsvSettings(rows=args.rows, dataset=args.dataset), [raw])
        # First, because it fails at once with an interpreter that it does not support.
        beside = [] if args.peer is None else _measure_peer(raw, folder, args)
        ours = _Ours(raw, _encoding(args, folder), folder / "ours")
        parsed, header = raw, int(is_log)
        if _lines(raw) - header > args.baseline_rows:
            parsed = folder / "parsed.txt"
            _copy_first_lines(raw, parsed, args.baseline_rows + header)
        command = [sys.executable, "-c", textwrap.dedent(_LOG_BASELINE if is_log else _BASELINE), str(parsed)]
        baseline = _Script("pyarrow's parse", command, samples=_lines(parsed) - header)
        rows = _measure(ours, "baseline", baseline, args)
    if not is_log and rows[0].samples >= _PREDICT_FROM_ROWS:
        print(render_predictions(_cost(rows[0])))
    if beside:
        # The rate of the peer does not depend on the rows; that of ours does, as its time includes its start.
        ratio = rows[0].samples_per_s / beside[-1].samples_per_s
        rows[0] = replace(rows[0], extra={**rows[0].extra, "speed_over_peer": ratio})
    return rows + beside


def _encoding(args: argparse.Namespace, folder: Path) -> list[str]:
    """Return the options of ``preprocess`` that say how rows are encoded; the schema of ``log`` goes to the folder."""
    if args.dataset not in _LOGS:
        return ["--dataset", args.dataset, "--protocol", args.protocol]
    if args.dataset == "avazu":
        return ["--schema", "datasets/avazu.yaml"]
    columns: dict[str, dict[str, object]] = {"time": {"role": "keep", "time": "unix"}}
    columns |= {f"n{i}": {"role": "dense", "transform": "signed_log"} for i in range(_NUMBERS)}
    columns |= {f"c{i}": {"role": "categorical", "min_count": 2} for i in range(len(_CATEGORIES))}
    schema = {"dataset": "log", "label": "click", "columns": columns, "split": {"by": "time", "column": "time"}}
    (folder / "log.yaml").write_text(json.dumps(schema))
    return ["--schema", str(folder / "log.yaml")]


def _write_log(path: Path, rows: int) -> None:
    """Write ``log``: label, time, numbers of three decimals and skewed categories, as numbers or texts in turns."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, rows - start)
            columns = {"click": rng.integers(0, 2, count), "time": 1_700_000_000 + np.arange(start, start + count)}
            columns |= {f"n{i}": np.round(rng.normal(0, 100, count), 3) for i in range(_NUMBERS)}
            for i, values in enumerate(_CATEGORIES):
                ids = pa.array((values ** rng.random(count)).astype(np.int64))
                columns[f"c{i}"] = ids if i % 2 else pc.binary_join_element_wise("item", ids.cast(pa.string()), "_")
            options = csv.WriteOptions(include_header=start == 0, quoting_style="none")
            csv.write_csv(pa.table(columns), file, options)


@dataclass(frozen=True)
class _Ours:
    """The command ``preprocess``; each run writes a new folder inside ``folder``."""

    raw: Path
    encoding: Sequence[str]
    """Options of the command."""
    folder: Path

    @property
    def output(self) -> Path:
        """Output of the latest run."""
        return self.folder / "data"

    def __call__(self, footprint: Footprint | None = None) -> float:
        """Run, and return the seconds."""
        _empty(self.folder)
        command = [sys.executable, "-m", "lightning_dlrm", "preprocess", *self.encoding]
        command += ["--input", str(self.raw), "--output", str(self.output)]
        return run_process("lightning_dlrm preprocess", command, footprint)[0]

    def stage_seconds(self) -> dict[str, float]:
        """Return the seconds of each stage from the latest run's report."""
        report = json.loads((self.output / REPORT_FILE).read_text())
        return {stage["name"]: stage["seconds"] for stage in report["stages"]}


@dataclass(frozen=True)
class _Script:
    """A Python program that prints the seconds of the part that counts."""

    name: str
    command: Sequence[str]
    samples: int
    """Number of rows that the program reads."""
    folder: Path | None = None
    """Folder of its output; emptied before each run."""

    def __call__(self, footprint: Footprint | None = None) -> float:
        """Run, and return the seconds that the program prints."""
        if self.folder is not None:
            _empty(self.folder)
        return float(run_process(self.name, self.command, footprint)[1])


def _measure(ours: _Ours, name: Implementation, other: _Script, args: argparse.Namespace) -> list[Measurement]:
    """Time ours and another contender in turns, and return a row of each."""
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
        footprints = {who: Footprint(contender.folder) for who, contender in contenders.items()}
        for who, contender in contenders.items():
            contender(footprints[who])
            bar.update()
    schema = DatasetSchema.load(ours.output)
    rows = sum(split.rows for split in schema.splits.values())
    row = _row("ours", rows, seconds["ours"], footprints["ours"], args)
    row_of_other = _row(name, other.samples, seconds[name], footprints[name], args)
    extra = {
        **speed_ratio(f"speed_over_{name}", seconds["ours"], seconds[name], rows / other.samples),
        **row.extra,
        "peak_disk_bytes": float(footprints["ours"].peak_disk_bytes),
        "output_bytes": float(bytes_below(ours.output)),
        "largest_table_rows": float(max(schema.features.table_rows)),
        **{f"{stage}_s": statistics.median(of_run[stage] for of_run in stages) for stage in _STAGES},
    }
    return [replace(row, extra=extra), row_of_other]


def _row(
    name: Implementation, samples: int, seconds: Sequence[float], footprint: Footprint, args: argparse.Namespace
) -> Measurement:
    return Measurement.of_rounds(
        seconds,
        work="preprocess",
        case=f"{samples:,} rows, {args.dataset}, {'schema' if args.dataset in _LOGS else args.protocol}",
        implementation=name,
        device="cpu",
        precision="32-true",
        batch_size=0,
        samples=samples,
        extra={"peak_bytes": float(footprint.peak_bytes), "cpu_s": footprint.cpu_s},
    )


def _measure_peer(raw: Path, folder: Path, args: argparse.Namespace) -> list[Measurement]:
    """Time ours and the peer in turns on the first rows of a file."""
    few = folder / "first.txt"
    _copy_first_lines(raw, few, args.peer_rows)
    ours = _Ours(few, _encoding(args, folder), folder / "few")
    # The peer writes beside its input.
    beside = folder / "peer"
    command = peer_command(args, "data_utils", _PEER, str(few), str(beside / "train.txt"))
    peer = _Script(peer_name(args), command, samples=_lines(few), folder=beside)
    return _measure(ours, "peer", peer, args)


def _empty(folder: Path) -> None:
    """Make a folder, or empty it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 24), b""))


def _copy_first_lines(source: Path, target: Path, rows: int) -> None:
    with source.open("rb") as lines, target.open("wb") as copy:
        copy.writelines(islice(lines, rows))


# --- prediction for the real data sets, from the costs of a row -------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Costs of one row in a measured run."""

    core_s: Mapping[str, float]
    """Stage -> core seconds, if all cores were busy."""
    disk_bytes: float
    """Peak disk space beside the input."""
    output_bytes: float
    worker_bytes: float
    """Memory of a worker; it does not depend on the number of rows."""


def _cost(row: Measurement) -> Cost:
    """Return the costs of a row from a measurement of ours, which has as many workers as this machine has cores."""
    workers = usable_cores()
    return Cost(
        core_s={stage: row.extra[f"{stage}_s"] * workers / row.samples for stage in _STAGES},
        disk_bytes=row.extra["peak_disk_bytes"] / row.samples,
        output_bytes=row.extra["output_bytes"] / row.samples,
        worker_bytes=row.extra["peak_bytes"] / workers,
    )


@dataclass(frozen=True, kw_only=True)
class Target:
    name: str
    rows: int
    largest_table: float
    """Share of the largest table in the distinct values of all tables."""


TARGETS = (
    Target(name="kaggle", rows=45_840_617, largest_table=10_131_227 / 33_762_577),
    Target(name="terabyte, 24 days", rows=4_373_472_329, largest_table=292_775_614 / 882_774_559),
)
# Assumptions; they are printed with the prediction.
_NODES = (1, 10)
_NODE_CORES = 16
_EFFICIENCY = 0.7
_NODE_BYTES_PER_S = 1e9
_TEXT_BYTES = 250


def predict(cost: Cost, target: Target, nodes: int) -> dict[str, float]:
    """Return the seconds of each stage and their ``total``, ``memory`` of a node, ``disk`` and ``output`` in bytes."""
    cores = nodes * _NODE_CORES * _EFFICIENCY
    parallel = dict.fromkeys(cost.core_s, 1 / cores)
    # One core counts a column.
    parallel["count"] = max(1 / min(cores, len(CRITEO_CATEGORICAL)), target.largest_table)
    seconds = {stage: target.rows * core_s * parallel[stage] for stage, core_s in cost.core_s.items()}
    # The text is read once; intermediate files are written and read once.
    moved = target.rows * (_TEXT_BYTES + 2 * cost.disk_bytes)
    return {
        **seconds,
        "total": max(sum(seconds.values()), moved / (nodes * _NODE_BYTES_PER_S)),
        "memory": _NODE_CORES * cost.worker_bytes,
        "disk": target.rows * cost.disk_bytes,
        "output": target.rows * cost.output_bytes,
    }


def render_predictions(cost: Cost) -> str:
    """Return the predictions for the real data sets as text, with the assumptions."""
    stages = list(cost.core_s)
    lines = ["prediction, not measured, from the largest run of ours above:"]
    header = f"  {'data set':<20}{'nodes x cores':>14}" + "".join(f"{stage:>10}" for stage in stages)
    lines.append(f"{header}{'total':>10}{'memory of a node':>18}{'disk meanwhile':>16}{'result':>10}")
    for target in TARGETS:
        for nodes in _NODES:
            found = predict(cost, target, nodes)
            times = "".join(f"{_minutes(found[name]):>10}" for name in (*stages, "total"))
            sizes = (
                f"{binary_size(found['memory']):>18}{binary_size(found['disk']):>16}{binary_size(found['output']):>10}"
            )
            lines.append(f"  {target.name:<20}{f'{nodes} x {_NODE_CORES}':>14}{times}{sizes}")
    lines += [
        f"  assumed: a core at {_EFFICIENCY:.0%} of the speed of these here; plain text (of compressed days, one core "
        "reads one file);",
        "  a column is counted by one core, in a share of the stage like its share of the distinct values; costs of a "
        "row as measured",
        f"  here; disks or a shared file system of {_NODE_BYTES_PER_S / 1e9:.0f} GB/s a node, which bound the total; "
        "as many workers as cores, each with",
        "  the memory of one here, for any number of rows.",
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
