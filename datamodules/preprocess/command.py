"""The subcommands ``preprocess`` and ``inspect``: their options, and what they print.

Neither needs torch or Lightning, so they start at once.
"""

import argparse
import json
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datamodules.parquet import check_sizes, part_files, verify
from datamodules.preprocess.figure import check_figure, draw
from datamodules.preprocess.inspection import render, summary
from datamodules.preprocess.leakage import equal_rows
from datamodules.preprocess.pipeline import order_warning, preprocess
from datamodules.preprocess.progress import Progress
from datamodules.preprocess.protocols import DATASETS, PROTOCOLS
from datamodules.preprocess.skew import all_skews
from lightning_dlrm.contracts.schema import DatasetSchema

_PREPROCESS_DESCRIPTION = """\
Reads raw Criteo files and makes a dataset folder: dataset.json, vocabulary/, train/, validation/ and test/ in
Parquet. A raw line has 40 fields between tabs: label, 13 integers, 26 hashes of 8 hexadecimal digits; an empty
integer or hash is a missing value. Files are plain text or gzip.

examples:
  python -m lightning_dlrm preprocess --dataset kaggle --protocol dlrm --input train.txt --output data/kaggle
  python -m lightning_dlrm preprocess --dataset terabyte --protocol dlrm --max-rows 10000000 \\
      --input day_{0..23}.gz --output data/terabyte
then:
  python -m lightning_dlrm fit --config dlrm.yaml --config criteo_kaggle.yaml --data.path data/kaggle
"""

_PREPROCESS_EPILOG = """\
protocols:
  dlrm   as facebookresearch/dlrm: dense features log(max(x, 0) + 1), missing ones as 0; every hash has a row of its
         own, missing ones count as hash 0; the vocabulary is counted over all rows. Ids go by descending frequency.

splits:
  terabyte, several files   the last file given is held out: its first half is test, its second validation
  kaggle, or a single file  by position into seven equal days: six train, the last one is held out likewise

what to expect:
  The same input gives the same bytes. The order of rows is kept. Memory stays near 1 GB plus the vocabularies of
  the largest columns. Meanwhile the disk of --output holds the staged rows too, about half the size of the
  uncompressed input. On two cores Kaggle's 46 million rows take some minutes. Wrong input is told with file and
  line, the exit code is 2, and nothing is left behind.
"""

_INSPECT_DESCRIPTION = """\
Prints a dataset's protocol, fingerprints, splits with label means, and columns: rows of each table, share of missing
values, share of the most frequent id, the number of ids that 90% of the lookups go to, reserved ids; for planted (demo)
data also the best scores any model can reach.

--leakage counts rows whose features (label apart) occur more than once, within a split and in two splits. It reads
every row, some 2 million a second, in less than 1 GB of memory and 8 bytes a row of the temporary folder (TMPDIR).

--plot draws the tables' sizes and how few of their ids most lookups go to, from the vocabulary's counts, or, where
there are none, by counting ids in the rows (8 bytes of memory for each row of the largest table).

examples:
  python -m lightning_dlrm inspect data/kaggle
  python -m lightning_dlrm inspect data/kaggle --verify --leakage
  python -m lightning_dlrm inspect data/kaggle --plot tables.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the options of ``preprocess`` to a parser; ``run`` takes what it parses."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _PREPROCESS_DESCRIPTION, _PREPROCESS_EPILOG
    parser.add_argument(
        "--dataset", required=True, choices=DATASETS, help="where the files come from; decides how rows are split"
    )
    # No choices: an unknown protocol is answered by find_protocol, as in Python.
    parser.add_argument(
        "--protocol", required=True, metavar="NAME", help=f"how raw values become features: {', '.join(PROTOCOLS)}"
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        type=Path,
        metavar="PATH",
        help="raw files, plain or gzip, in the order of days (mind that a shell lists day_* as day_1, day_10, day_11)",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder to make; must not exist, or be empty"
    )
    parser.add_argument(
        "--max-rows",
        type=int,
        metavar="N",
        help="rows of the largest table: hashes are taken modulo N before they are counted (default: no limit; the "
        "published Terabyte models use 10000000 and 40000000)",
    )


def run(args: argparse.Namespace) -> int:
    """Preprocesses as ``add_arguments`` was told, prints a report, and returns the exit code.

    Raises:
        UserError: see ``pipeline.preprocess``.
        SystemExit: with code 143, on SIGTERM.
    """
    warning = order_warning(args.dataset, args.input)
    if warning:
        print(warning, file=sys.stderr)
    progress = Progress()
    with _leaving_in_order():
        schema = preprocess(args.dataset, args.protocol, args.input, args.output, args.max_rows, progress)
    print(render(summary(args.output, schema)))
    print()
    for stage in progress.stages:
        print(stage)
    seconds = sum(stage.seconds for stage in progress.stages)
    print(f"{seconds:,.1f} s in all, {_peak_bytes() / 1e9:,.2f} GB of memory at most")
    print(
        f"train on it: python -m lightning_dlrm fit --config dlrm.yaml --config criteo_{args.dataset}.yaml "
        f"--data.path {args.output}"
    )
    return 0


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the options of ``inspect`` to a parser; ``run_inspect`` takes what it parses."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _INSPECT_DESCRIPTION
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="the dataset folder, as preprocess or generate made it"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every file and compare its checksum (about 1 GB per second)"
    )
    parser.add_argument(
        "--leakage", action="store_true", help="count rows of equal features within splits and across them"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw table sizes and skew of ids: .png, .pdf or .svg"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run_inspect(args: argparse.Namespace) -> int:
    """Inspects as ``add_inspect_arguments`` was told and returns the exit code.

    Raises:
        UserError: there is no dataset in the folder, a file is missing or has another size, ``--verify`` finds one
            altered, or see ``leakage.equal_rows`` and ``figure.draw``.
    """
    schema = DatasetSchema.load(args.folder)
    if args.plot is not None:
        check_figure(schema, args.plot)
    if args.verify:
        verify(args.folder, schema, progress=True)
    else:
        check_sizes(args.folder, (*schema.vocabulary.values(), *part_files(schema)))
    facts = {**summary(args.folder, schema), "verified": args.verify}
    if args.leakage:
        facts["leakage"] = equal_rows(args.folder, schema)
    if args.plot is not None:
        title = f"{args.folder}: {schema.dataset}, protocol {schema.protocol}, {facts['rows']:,} rows"
        draw(list(all_skews(args.folder, schema)), title, args.plot)
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(render(facts))
    if args.verify:
        print("every file has its checksum")
    if args.plot is not None:
        print(f"{args.plot} shows table sizes and skew")
    return 0


@contextmanager
def _leaving_in_order() -> Iterator[None]:
    """Lets SIGTERM, as a scheduler sends it, clean up as an error does."""

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
