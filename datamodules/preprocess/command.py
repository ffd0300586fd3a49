"""The subcommand ``preprocess``: its options and its output. Nothing here imports torch."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from datamodules.log_schema import read_log_schema
from datamodules.preprocess.options import DISTRIBUTIONS, OnBadRow
from datamodules.preprocess.pipeline import preprocess
from datamodules.preprocess.progress import Progress
from datamodules.preprocess.protocols import DATASETS, PROTOCOLS
from datamodules.preprocess.report import (
    empty_feature_warnings,
    fit_command,
    large_number_warnings,
    one_label_warnings,
    render_report,
    rounded_number_warnings,
    threshold_warnings,
)
from lightning_dlrm.contracts.errors import require, settings_as_options
from lightning_dlrm.contracts.interrupts import exit_on_signals
from lightning_dlrm.contracts.terminal import command_after, command_line, line_width, wrapped

_SMALL_LOG = 1_000_000
"""Number of training rows below which the recipes for small logs are better."""

_DESCRIPTION = """\
Turn raw click logs into a dataset folder, which fit, inspect and plan take.

Your own log (CSV, JSON lines or Parquet); edit the schema between the two:
  python -m lightning_dlrm preprocess --infer log.yaml --label clicked --input log.csv
  python -m lightning_dlrm preprocess --schema log.yaml --input log.csv --output data/log
Criteo's files, by a protocol that is known by name:
  python -m lightning_dlrm preprocess --dataset kaggle --protocol dlrm --input train.txt --output data/kaggle
New rows, for a model that was trained on data/log:
  python -m lightning_dlrm preprocess --vocabulary data/log --input new.csv --output data/new
"""

_MORE = """
The same command resumes an interrupted run. Wrong input is one line with its
file and line number, and exit code 2. docs/preprocess.md has the details:
splits, new rows, URLs, clusters, disk and memory.
"""


def _epilog() -> str:
    lines = [f"  {name:<9} {protocol.summary}" for name, protocol in PROTOCOLS.items()]
    return "\n".join(["protocols (scores under different protocols are not comparable):", *lines, _MORE])


_INFER_OPTIONS: dict[str, dict[str, Any]] = {
    "--infer": {
        "type": Path,
        "metavar": "FILE.yaml",
        "help": "the schema to write, from a sample of --input",
    },
    "--label": {
        "metavar": "LABEL",
        "help": "a column of 0 and 1, or a condition: 'rating >= 4'",
    },
    "--columns": {"metavar": "NAME,...", "help": "names of the columns, if the files have no header"},
}


_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "files of every run, with or without --infer": {
        "--input": {
            "required": True,
            "nargs": "+",
            # Given twice, it names all files.
            "action": "extend",
            "metavar": "PATH",
            "help": "raw files or URLs, in the order of days",
        },
    },
    "make a dataset": {
        "--output": {"metavar": "DIR", "help": "dataset folder to make: new or empty; or a URL"},
        "--schema": {
            "type": Path,
            "metavar": "FILE.yaml",
            "help": "schema of the log: your own, or shipped (datasets/avazu.yaml)",
        },
        "--dataset": {"choices": DATASETS, "help": "Criteo's dataset that the files belong to"},
        # No choices: Options refuses an unknown protocol, as in Python.
        "--protocol": {"metavar": "NAME", "help": "how Criteo's values become features: see below"},
        "--vocabulary": {"metavar": "DIR", "help": "encode new rows in the same way as this dataset"},
    },
    "change a protocol of Criteo (of a log, change the schema)": {
        "--min-count": {
            "type": int,
            "metavar": "N",
            "help": "rarer values share a row (default: the protocol's)",
        },
        "--max-rows": {
            "type": int,
            "metavar": "N",
            "help": "most rows of a table, for the protocols dlrm and mlperf (default: no limit)",
        },
        "--bins": {
            "type": int,
            "metavar": "N",
            "help": "most bins of an integer column, for the protocol quantile (default: 30)",
        },
        "--negative-sampling-rate": {
            "type": float,
            "default": 1.0,
            "metavar": "SHARE",
            "help": "share of the training rows of label 0 that is kept (default: all)",
        },
        "--multi-hot": {
            "choices": ("mlperf",),
            "metavar": "mlperf",
            "help": "turn each id into a bag of ids, as MLPerf DLRM v2 does; with --dataset terabyte only",
        },
        "--multi-hot-distribution": {
            "choices": DISTRIBUTIONS,
            "default": "uniform",
            "help": "how --multi-hot draws ids (default: %(default)s)",
        },
        "--seed": {
            "type": int,
            "default": 0,
            "metavar": "N",
            "help": "of random splits, sampling and bags (default: %(default)s)",
        },
    },
    "how to run": {
        "--on-bad-row": {
            "choices": get_args(OnBadRow),
            "default": "fail",
            "help": "end at a bad line, or skip and list it (default: fail)",
        },
        "--workers": {"type": int, "metavar": "N", "help": "processes on this machine (default: one per core)"},
        "--scheduler": {"metavar": "ADDRESS", "help": "work on a Dask cluster, such as tcp://10.0.0.1:8786"},
        "--work": {"type": Path, "metavar": "DIR", "help": "for temporary files (default: beside --output)"},
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the options of ``preprocess`` to a parser; ``run`` takes what it parses."""
    parser.description, parser.epilog, parser.usage = _DESCRIPTION, _epilog(), f"{parser.prog} [options]"
    files, *others = _OPTIONS.items()
    for title, options in (files, ("write a schema of your own log; makes no dataset", _INFER_OPTIONS), *others):
        group = parser.add_argument_group(title)
        for name, settings in options.items():
            group.add_argument(name, **settings)


def run(args: argparse.Namespace) -> int:
    """Preprocess with the parsed options, print a report, and return the exit code.

    Raises:
        UserError: see ``pipeline.preprocess`` and ``inference.infer``.
        SystemExit: on SIGTERM and SIGHUP.
    """
    if args.infer is not None:
        # Other runs start sooner without it.
        from datamodules.preprocess.inference import infer, render

        for name in ("schema", "dataset", "output", "protocol", "vocabulary"):
            require(
                getattr(args, name) is None,
                f"--infer writes a schema and makes no dataset; leave out --{name} or --infer",
            )
        names = None if args.columns is None else [name.strip() for name in args.columns.split(",")]
        print(render(infer(args.infer, args.label, args.input, names), line_width(sys.stdout)))
        return 0
    for name in ("label", "columns"):
        require(
            getattr(args, name) is None, f"--{name} is an option of --infer; with --schema, set it in the schema file"
        )
    require(args.output, f"--output is {'missing' if args.output is None else 'empty'}; name the folder to make")
    progress = Progress()
    names = [name.strip("-").replace("-", "_") for options in _OPTIONS.values() for name in options]
    given = {name: getattr(args, name) for name in names if name != "input"}
    log = given["schema"] = None if args.schema is None else read_log_schema(args.schema)
    with exit_on_signals(), settings_as_options({name: f"--{name.replace('_', '-')}" for name in names}, given):
        try:
            schema = preprocess(inputs=args.input, progress=progress, **given)
        except (KeyboardInterrupt, SystemExit):
            if progress.folder is None:
                progress.note("interrupted; nothing was written: run the same command to start again")
            raise
    if progress.stages:
        print(render_report(schema, progress.stages, line_width(sys.stdout), args.output))
    kinds = (
        one_label_warnings,
        threshold_warnings,
        empty_feature_warnings,
        large_number_warnings,
        rounded_number_warnings,
    )
    for warning in (warning for kind in kinds for warning in kind(schema)):
        print(wrapped([f"warning: {warning}"], sys.stderr), file=sys.stderr)
    if args.vocabulary is None:
        is_small = schema.splits["train"].rows < _SMALL_LOG
        of_criteo = log is None or (log.format == "criteo" and log.dataset in DATASETS)
        if is_small and (args.dataset, args.protocol) == ("kaggle", "quantile"):
            files = ["recipes/dlrm_small.yaml"]
        else:
            files = ["dlrm.yaml", f"criteo_{schema.dataset}.yaml" if of_criteo else "own_data.yaml"]
        print(command_after("train on it:", fit_command(args.output, schema.features.dense > 0, files)))
    else:
        run = ("--config", "RUN/config.yaml", "--ckpt_path", "RUN/checkpoints/best")
        print(command_after("score it:", command_line("predict", *run, "--data.path", args.output)))
    return 0
