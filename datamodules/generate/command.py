"""The subcommand ``generate``: its options, and what it prints. Each kind of data is a subcommand of its own."""

import argparse
import time
from pathlib import Path
from typing import Any

from datamodules.generate.demo import DemoSettings, generate_demo
from datamodules.generate.tsv import TSV_DATASETS, TsvSettings, generate_tsv
from lightning_dlrm.contracts.schema import DatasetSchema

GENERATE_HELP = "make data instead of reading any: demo data with a known best score, or raw text like Criteo's"

_DEMO_DESCRIPTION = """\
Writes a dataset folder that looks like Criteo Kaggle: its 40 columns, the sizes of its tables, skewed ids and missing
values. The labels are drawn from a planted click model, so that the best AUC and log loss any model can reach are
known; dataset.json has them under "optimum". The same options give the same rows everywhere.

examples:
  python -m lightning_dlrm generate demo --output data/demo
  python -m lightning_dlrm generate demo --output data/small --rows 300000 --max-table-rows 100000
then:
  python -m lightning_dlrm fit --config dlrm.yaml --data.path data/demo
"""

_TSV_DESCRIPTION = """\
Writes raw text as preprocess reads it, shaped like Criteo's click logs: label, 13 integers, 26 hashes, empty where a
value is missing; skewed hashes, ever more different ones with more rows, as in the real data. The labels are drawn from
a planted click model. The same options give the same rows everywhere; fewer rows are the beginning of more.

examples:
  python -m lightning_dlrm generate tsv --rows 1000000 --output train.txt
  python -m lightning_dlrm generate tsv --rows 4000000 --dataset terabyte --output day_{0..3}.gz
then:
  python -m lightning_dlrm preprocess --dataset kaggle --protocol dlrm --input train.txt --output data/mine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the kinds of data and their options to a parser; ``run`` takes what it parses."""
    parser.description = GENERATE_HELP
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    demo = kinds.add_parser(
        "demo",
        help="click logs like Criteo Kaggle's, from a planted click model",
        description=_DEMO_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder to make; must not exist, or be empty"
    )
    default = DemoSettings()
    for option, rows, split in (
        ("--rows", default.train_rows, "training"),
        ("--validation-rows", default.validation_rows, "validation"),
        ("--test-rows", default.test_rows, "test"),
    ):
        demo.add_argument(option, type=int, default=rows, metavar="N", help=f"{split} rows (default: {rows})")
    demo.add_argument(
        "--seed", type=int, default=default.seed, help="of the planted model and of the rows (default: %(default)s)"
    )
    demo.add_argument(
        "--max-table-rows", type=int, metavar="N", help="most rows a table may have (default: Kaggle's own sizes)"
    )
    demo.set_defaults(run_kind=_run_demo)
    _add_tsv(kinds)


def _add_tsv(kinds: Any) -> None:
    tsv = kinds.add_parser(
        "tsv",
        help="raw text shaped like Criteo's click logs",
        description=_TSV_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tsv.add_argument(
        "--output",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="files to make, over which the rows are spread in order; compressed if named .gz or .zst",
    )
    tsv.add_argument("--rows", required=True, type=int, metavar="N", help="rows of all files together")
    tsv.add_argument(
        "--dataset",
        default="kaggle",
        choices=TSV_DATASETS,
        help="whose shares of missing values, distinct hashes and clicks to have (default: %(default)s)",
    )
    tsv.add_argument("--seed", type=int, default=0, help="of the planted model and of the rows (default: %(default)s)")
    tsv.set_defaults(run_kind=_run_tsv)


def run(args: argparse.Namespace) -> int:
    """Generates as ``add_arguments`` was told, prints a summary, and returns the exit code.

    Raises:
        UserError: an option is out of range, or the output folder holds something else.
    """
    code: int = args.run_kind(args)
    return code


def _run_demo(args: argparse.Namespace) -> int:
    settings = DemoSettings(
        train_rows=args.rows,
        validation_rows=args.validation_rows,
        test_rows=args.test_rows,
        seed=args.seed,
        max_table_rows=args.max_table_rows,
    )
    start = time.perf_counter()
    schema = generate_demo(settings, args.output)
    print(_summary(schema))
    print(f"{args.output} is ready after {time.perf_counter() - start:.1f} s")
    print(f"train on it: python -m lightning_dlrm fit --config dlrm.yaml --data.path {args.output}")
    return 0


def _run_tsv(args: argparse.Namespace) -> int:
    settings = TsvSettings(rows=args.rows, dataset=args.dataset, seed=args.seed)
    start = time.perf_counter()
    sizes = generate_tsv(settings, args.output)
    seconds = time.perf_counter() - start
    for path, size in zip(args.output, sizes, strict=True):
        print(f"{path}: {size / 1e6:,.1f} MB")
    print(f"{settings.rows:,} rows after {seconds:.1f} s ({settings.rows / seconds:,.0f} rows/s)")
    words = " ".join(str(path) for path in args.output)
    print(
        f"preprocess them: python -m lightning_dlrm preprocess --dataset {args.dataset} --protocol dlrm "
        f"--input {words} --output DIR"
    )
    return 0


def _summary(schema: DatasetSchema) -> str:
    lines = [f"{sum(schema.features.table_rows):,} table rows; best scores any model can reach:"]
    for name, split in schema.splits.items():
        best = schema.optimum[name]
        share = (split.positives or 0) / split.rows
        lines.append(
            f"  {name:10s} {split.rows:>9,} rows, {share:.1%} clicks, AUC {best.auc:.4f}, log loss {best.log_loss:.4f}"
        )
    return "\n".join(lines)
