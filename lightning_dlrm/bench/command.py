"""The command ``bench``: each benchmark is a subcommand with a module of its own, which imports torch. The list of
benchmarks is shown without them."""

import argparse
import contextlib
import importlib
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dlrm.contracts.errors import UserError, cause_of
from lightning_dlrm.contracts.terminal import command_line, wrapped

if TYPE_CHECKING:
    from lightning_dlrm.bench.measurement import Measurement

DESCRIPTION = """\
Measure the speed of a part of this project on this machine.

examples:
  python -m lightning_dlrm bench step
  python -m lightning_dlrm bench paper --batches 100 --plot paper.png
"""

WORKS: dict[str, str] = {
    "lookup": "the embedding tables alone",
    "step": "a training step on batches in memory",
    "fit": "a whole fit from a dataset folder, against bare loops",
    "paper": "the benchmark of the DLRM paper, section 5.2",
    "gpu": "a list of measurements for one GPU, in one call",
    "auc": "the exact AUC, against scikit-learn",
    "sharding": "training steps with tables in pieces on several processes",
    "trace": "the profiles of accesses to tables, and the accesses generated from them",
    "loader": "the reading of a dataset, against bare Parquet decoding",
    "preprocess": "raw text to a dataset folder: speed, memory and disk",
}
"""Subcommand -> what it measures. Module ``lightning_dlrm.bench.<subcommand>`` has ``DESCRIPTION``, ``DETAILS``,
``add_arguments(parser)`` and ``run(args)``, which returns the rows, or yields each when it is measured."""

_IMMEDIATE = ("gpu",)
"""Benchmarks that print while they measure."""
_ON_CPUS = ("loader", "preprocess")
"""Benchmarks that read data, without a device or a precision."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks to a parser, a ``PlainParser``; ``run`` takes the parsed options."""
    parser.description, parser.epilog = DESCRIPTION, "bench COMMAND --help lists the options of a command."
    works = parser.add_subparsers(dest="work", required=True, metavar="COMMAND")
    for name, text in WORKS.items():
        works.add_parser(name, summary=text, add_options=partial(_add_options, name))


def _add_options(work: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark to its parser."""
    from lightning_dlrm.bench.measurement import RATIOS

    module = importlib.import_module(f"lightning_dlrm.bench.{work}")
    parser.description = module.DESCRIPTION
    parser.epilog = module.DETAILS if work in _IMMEDIATE else module.DETAILS + RATIOS
    module.add_arguments(parser)
    if work in _ON_CPUS:
        # Scripts may call every benchmark with the same options.
        parser.add_argument("--device", default="cpu", choices=("cpu",), help=argparse.SUPPRESS)
        parser.add_argument("--precision", default="32-true", choices=("32-true",), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file, as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print the result, a table of all rows and details, and return the exit code.

    Raises:
        UserError: an option is out of range, or a file cannot be read or written.
    """
    from lightning_dlrm.bench.measurement import machine
    from lightning_dlrm.bench.rendering import headline, render

    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}; make it first")
    if args.json is not None and args.json.is_dir():
        raise UserError(f"--json {args.json} is a folder; give a file, such as {args.json / 'results.json'}")
    rows: list[Measurement] = []
    details = io.StringIO()
    # Rows of a GPU are shown when they are done; otherwise details come below the result.
    beside = contextlib.nullcontext() if args.work in _IMMEDIATE else contextlib.redirect_stdout(details)
    try:
        with beside:
            for row in importlib.import_module(f"lightning_dlrm.bench.{args.work}").run(args):
                rows.append(row)
                if args.json is not None:
                    _write(args.json, [row.row() for row in rows])
    except BaseException as error:
        # A wrong option is found before anything is measured or printed.
        if not rows and (details.getvalue() or not isinstance(error, UserError)):
            _report_failure(args, error, details.getvalue())
        raise
    finally:
        # What was measured before an error counts.
        if rows:
            parts = [headline(rows), render(rows).splitlines(), details.getvalue().strip().splitlines()]
            print("\n\n".join(wrapped(part) for part in parts if part))
            print(wrapped([machine()]))
    return 0


def _report_failure(args: argparse.Namespace, error: BaseException, details: str) -> None:
    """Print what is known of a benchmark that failed before its first result; the JSON file has it too."""
    from lightning_dlrm.bench.measurement import machine

    known = {"work": args.work, "command": _command_of(args), "machine": machine(), "error": cause_of(error)}
    print(
        wrapped(
            [
                f"bench {args.work} failed before its first result",
                *details.strip().splitlines(),
                f"machine: {known['machine']}",
                f"command: {known['command']}",
            ]
        )
    )
    if args.json is not None:
        _write(args.json, [known])


def _command_of(args: argparse.Namespace) -> str:
    """Return the command with the values of all its options, defaults too."""
    typed = []
    for name, value in vars(args).items():
        if name != "work" and value is not None and value is not False:
            values = value if isinstance(value, list) else [value] * (value is not True)
            typed += [f"--{name.replace('_', '-')}", *map(str, values)]
    return command_line("bench", args.work, *typed)


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    try:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --json FILE") from error
