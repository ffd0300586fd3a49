"""The subcommand ``preprocess``: its options and its output. Nothing here imports torch."""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args

from datamodules.log_schema import read_log_schema
from datamodules.preprocess.options import DISTRIBUTIONS, OnBadRow
from datamodules.preprocess.pipeline import preprocess
from datamodules.preprocess.progress import Progress
from datamodules.preprocess.protocols import DATASETS, PROTOCOLS
from datamodules.preprocess.report import fit_command, one_label_warnings, render_report, threshold_warnings
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.interrupts import exit_on_signals
from lightning_dlrm.contracts.terminal import command_after, command_line, wrapped

_SMALL_LOG = 1_000_000
"""Number of training rows below which the recipes for small logs are better."""

_DESCRIPTION = """\
Read raw click logs and make a dataset folder: dataset.json, vocabulary/, train/, validation/ and test/ in Parquet.

Your own log (CSV, JSON lines or Parquet) needs a --schema: a YAML file that names the label, the role of each column,
and the split. --infer writes a first schema; docs/own-data.md explains schemas; schemas of some public logs are
shipped.

Criteo's files need a --dataset and a --protocol, or a schema such as datasets/criteo_dlrm.yaml, which means the same
as --protocol dlrm, and can be copied and changed. A raw line has 40 fields separated by tabs: a label, 13
integers, and 26 hashes of 8 hexadecimal digits; an empty integer or hash is a missing value.

Text is plain, or compressed by gzip or Zstandard.

examples:
  python -m lightning_dlrm preprocess --infer log.yaml --label 'rating >= 4' --input log.csv
  python -m lightning_dlrm preprocess --schema log.yaml --input log.csv --output data/log
  python -m lightning_dlrm preprocess --vocabulary data/log --input new.csv --output data/log_new
  python -m lightning_dlrm preprocess --dataset kaggle --protocol dlrm --input train.txt --output data/kaggle
  python -m lightning_dlrm preprocess --dataset terabyte --protocol dlrm --max-rows 10000000 \\
      --input day_{0..23}.gz --output data/terabyte
  python -m lightning_dlrm preprocess --dataset terabyte --protocol mlperf --max-rows 40000000 --multi-hot mlperf \\
      --input s3://bucket/day_{0..23}.zst --output data/dlrm_v2 --scheduler tcp://10.0.0.1:8786
  python -m lightning_dlrm preprocess --vocabulary data/kaggle --input test.txt --output data/kaggle_test
then:
  python -m lightning_dlrm fit --config dlrm.yaml --config criteo_kaggle.yaml --data.path data/kaggle
"""

_SPLITS = """\
splits (a schema has its own):
  terabyte, several files   the last file given is held out: its first half is the test split and its second half the
                            validation split; under the protocol mlperf its first half is the validation split
  kaggle, or a single file  by position into seven equal days: six train, the last day is held out in the same way
  bars                      random 8:1:1: of every ten rows, one goes to test and one to validation, drawn from --seed

new rows:
  --vocabulary DIR encodes rows, with or without labels, in the same way as the rows of DIR, and makes them the test
  split, which a model trained on DIR can score. A value that is not in the vocabulary of DIR gets the id of unknown
  values. The protocols dlrm and mlperf have no such id: the value gets the id of rare values or, without that, the last
  id, which belongs to the rarest value and whose row was trained least. Bins keep the edges of DIR.

what to expect:
  The same input gives the same bytes with any number of workers. Rows keep their order. The same command resumes an
  interrupted run, also after kill -9; the files of the run are in .NAME.preprocess beside the output (with --work, in
  .NAME-MARK.preprocess, where MARK tells outputs of the same name apart). A finished dataset is not changed.
  On two cores, Kaggle's 46 million rows take some minutes and about 1 GB of memory. More rows need more disk, but no
  more memory; an estimate is shown first. An error names the file and line of wrong input; the exit code is then 2.
  DIR/report.json lists inputs, rows and table sizes, and the time, memory and disk of each stage.

URLs:
  Inputs, the output and --vocabulary may be URLs that fsspec knows (s3://, gs://, hf://, ...) if the package for them
  is installed (s3fs, gcsfs, huggingface_hub). The working folder of a remote output is made in the current folder, or
  in --work. Files in memory:// exist in one process, which then does all the work.

clusters:
  --scheduler runs all work on a Dask cluster (pip install 'lightning-dlrm[cluster]'; dask scheduler; dask
  worker ADDRESS). Its workers need this package, and must share the file system of the output (or of --work) with
  this machine.
"""


def _epilog() -> str:
    protocols = [
        textwrap.fill(protocol.summary, 119, initial_indent=f"  {name:<9}", subsequent_indent=" " * 11)
        for name, protocol in PROTOCOLS.items()
    ]
    return "\n".join(["protocols (their scores cannot be compared with each other):", *protocols, "", _SPLITS])


_INFER_OPTIONS: dict[str, dict[str, Any]] = {
    "--infer": {
        "type": Path,
        "metavar": "FILE.yaml",
        "help": "read a sample of --input and write a schema of it, with what was found as comments; makes no dataset",
    },
    "--label": {
        "metavar": "LABEL",
        "help": "what to predict: a column of 0 and 1, or a condition such as 'rating >= 4'; without "
        "it, candidates are listed",
    },
    "--columns": {"metavar": "NAME,...", "help": "names of the columns of text files without a header"},
}


_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "what to read and write": {
        "--schema": {
            "type": Path,
            "metavar": "FILE.yaml",
            "help": "schema of the log: your own file, or a shipped one such as datasets/avazu.yaml; replaces "
            "--dataset and all options that encode Criteo's rows",
        },
        "--input": {
            "required": True,
            "nargs": "+",
            "metavar": "PATH",
            "help": "raw files or URLs, in the order of days (a shell lists day_* as day_1, day_10, day_11)",
        },
        "--output": {
            "metavar": "DIR",
            "help": "folder or URL to make; it must not exist, or must be empty (required unless --infer is given)",
        },
        "--work": {
            "type": Path,
            "metavar": "DIR",
            "help": "where the working folder is made (default: beside the output)",
        },
        "--on-bad-row": {
            "choices": get_args(OnBadRow),
            "default": "fail",
            "help": "what to do with a line that does not have Criteo's format, or does not fit the schema: end the "
            "run, or skip the line and list it in "
            "DIR/bad_rows.tsv with file, line and reason (default: %(default)s)",
        },
    },
    "how to encode Criteo's rows, and new rows of any log (--vocabulary)": {
        "--dataset": {
            "choices": DATASETS,
            "help": "Criteo's dataset that the files belong to; decides how rows are split (required unless --schema "
            "or --vocabulary is given)",
        },
        # No choices: Options refuses an unknown protocol, as in Python.
        "--protocol": {
            "metavar": "NAME",
            "help": "how raw values become features (required unless --schema or --vocabulary is given): "
            f"{', '.join(PROTOCOLS)}",
        },
        "--vocabulary": {
            "metavar": "DIR",
            "help": "encode new rows in the same way as this dataset, whose settings replace --dataset and all options "
            "of this group",
        },
        "--bins": {
            "type": int,
            "metavar": "N",
            "help": "quantile: the largest number of bins of an integer column (default: 30); equal values share a bin",
        },
        "--min-count": {
            "type": int,
            "metavar": "N",
            "help": "values seen fewer than N times share one id (default: the protocol's; 1 keeps every value)",
        },
        "--max-rows": {
            "type": int,
            "metavar": "N",
            "help": "rows of the largest table: dlrm takes hashes modulo N before it counts them, mlperf takes ids "
            "modulo N (default: no limit; the published Terabyte models use 10000000 and 40000000)",
        },
        "--negative-sampling-rate": {
            "type": float,
            "default": 1.0,
            "metavar": "SHARE",
            "help": "share of the training rows with label 0 that is kept (default: all)",
        },
        "--multi-hot": {
            "choices": ("mlperf",),
            "help": "terabyte: bags of ids with the sizes of MLPerf DLRM v2, 214 ids per row; each bag begins with the "
            "row's own id",
        },
        "--multi-hot-distribution": {
            "choices": DISTRIBUTIONS,
            "default": "uniform",
            "help": "distribution of the other ids of a bag (default: %(default)s)",
        },
        "--seed": {
            "type": int,
            "default": 0,
            "help": "seed of random splits, sampling and bags (default: %(default)s)",
        },
    },
    "where to run": {
        "--workers": {"type": int, "metavar": "N", "help": "processes on this machine (default: one per core)"},
        "--scheduler": {"metavar": "ADDRESS", "help": "a Dask scheduler, such as tcp://10.0.0.1:8786"},
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the options of ``preprocess`` to a parser; ``run`` takes what it parses."""
    parser.description, parser.epilog, parser.usage = _DESCRIPTION, _epilog(), f"{parser.prog} [options]"
    group = parser.add_argument_group("how to write a schema of a log of any form")
    for name, settings in _INFER_OPTIONS.items():
        group.add_argument(name, **settings)
    for title, options in _OPTIONS.items():
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
        from datamodules.preprocess.inference import infer

        for name in ("schema", "dataset", "output", "protocol", "vocabulary"):
            require(
                getattr(args, name) is None,
                f"--infer writes a schema and makes no dataset; leave out --{name} or --infer",
            )
        names = None if args.columns is None else [name.strip() for name in args.columns.split(",")]
        print(wrapped(infer(args.infer, args.label, args.input, names).splitlines()))
        return 0
    for name in ("label", "columns"):
        require(
            getattr(args, name) is None, f"--{name} is an option of --infer; with --schema, set it in the schema file"
        )
    require(args.output is not None, "--output is missing; name the folder to make")
    progress = Progress()
    names = [name.strip("-").replace("-", "_") for options in _OPTIONS.values() for name in options]
    given = {name: getattr(args, name) for name in names if name != "input"}
    log = given["schema"] = None if args.schema is None else read_log_schema(args.schema)
    with exit_on_signals():
        try:
            schema = preprocess(inputs=args.input, progress=progress, **given)
        except (KeyboardInterrupt, SystemExit):
            if progress.folder is None:
                progress.note("interrupted; nothing was written: run the same command to start again")
            raise
    if progress.stages:
        print(render_report(schema, progress.stages))
    for warning in (*one_label_warnings(schema), *threshold_warnings(schema)):
        print(f"warning: {warning}", file=sys.stderr)
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
