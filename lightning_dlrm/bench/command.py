"""The command ``bench``: each benchmark is a subcommand with a module of its own, which imports torch. The list of
benchmarks is shown without them."""

import argparse
import importlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.terminal import wrapped

if TYPE_CHECKING:
    from lightning_dlrm.bench.measurement import Measurement

WORKS: dict[str, str] = {
    "lookup": "the tables alone: lookup, backward, update",
    "step": "a training step on batches in memory",
    "fit": "a whole fit from a dataset folder, against bare loops",
    "paper": "the benchmark of the DLRM paper's section 5.2, by operator and as a roofline",
    "gpu": "all targets for one GPU, checked and timed in one call",
    "auc": "the exact AUC at the size of Terabyte's held-out day",
    "sharding": "training steps with tables in pieces on several processes, against copied tables",
    "trace": "profiling a column's accesses, and generating accesses from the profile",
    "loader": "batches of the stream, against bare Parquet decoding of the same files",
    "preprocess": "raw TSV to the final dataset folder: speed, memory, disk",
}
"""Subcommand -> what it measures. Module ``lightning_dlrm.bench.<subcommand>`` has ``DESCRIPTION``,
``add_arguments(parser)`` and ``run(args)``, which returns the rows, or yields each when it is measured."""

_ON_CPUS = ("loader", "preprocess")
"""Benchmarks that read data, without a device or a precision."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks to a parser, a ``PlainParser``; ``run`` takes the parsed options."""
    works = parser.add_subparsers(dest="work", required=True, metavar="WORK")
    for name, text in WORKS.items():
        works.add_parser(name, help=text, add_options=partial(_add_options, name))


def _add_options(work: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark to its parser."""
    module = importlib.import_module(f"lightning_dlrm.bench.{work}")
    parser.description = module.DESCRIPTION
    module.add_arguments(parser)
    if work in _ON_CPUS:
        # Scripts may call every benchmark with the same options.
        parser.add_argument("--device", default="cpu", choices=("cpu",), help="cpu only")
        parser.add_argument("--precision", default="32-true", choices=("32-true",), help="32-true only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to a file, as a list of objects")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and return the exit code.

    Raises:
        UserError: an option is out of range, or a file cannot be read or written.
    """
    from lightning_dlrm.bench.measurement import machine, render

    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}; make it first")
    print(wrapped([machine()]))
    rows: list[Measurement] = []
    try:
        for row in importlib.import_module(f"lightning_dlrm.bench.{args.work}").run(args):
            rows.append(row)
            if args.json is not None:
                _write(args.json, rows)
    finally:
        # What was measured before an error counts.
        if rows:
            print(wrapped(render(rows).splitlines()))
    return 0


def _write(path: Path, rows: "list[Measurement]") -> None:
    try:
        path.write_text(json.dumps([row.row() for row in rows], indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --json FILE") from error
