"""The subcommands ``preprocess`` and ``inspect``: their options, and what they print.

Neither needs torch or Lightning, so they start at once.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

from datamodules.parquet import Folder, check_sizes, load_schema, part_files, verify
from datamodules.preprocess.figure import check_figure, draw
from datamodules.preprocess.inspection import render, summary
from datamodules.preprocess.leakage import equal_rows
from datamodules.preprocess.multi_hot import DISTRIBUTIONS
from datamodules.preprocess.pipeline import order_warning, preprocess
from datamodules.preprocess.progress import Progress
from datamodules.preprocess.protocols import PROTOCOLS
from datamodules.preprocess.report import render_report
from datamodules.preprocess.skew import all_skews
from datamodules.preprocess.splits import DATASETS
from lightning_dlrm.contracts.interrupts import leaving_in_order

_PREPROCESS_DESCRIPTION = """\
Reads raw Criteo files and makes a dataset folder: dataset.json, vocabulary/, train/, validation/ and test/ in
Parquet. A raw line has 40 fields between tabs: label, 13 integers, 26 hashes of 8 hexadecimal digits; an empty
integer or hash is a missing value. Files are plain text, gzip or Zstandard.

examples:
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
splits:
  terabyte, several files   the last file given is held out and halved: dlrm, nvidia and modern test on the first half
                            and validate on the second, mlperf the other way round
  kaggle, or a single file  by position into seven equal days: six train, the last one is held out likewise
  bars                      random 8:1:1: one of every ten rows tests and another validates, drawn from --seed

new rows:
  --vocabulary DIR encodes rows, with labels or without, as DIR's were, and makes them the test split; a model trained
  on DIR scores them. Values that DIR does not know get the id of unknown ones; in dlrm and mlperf, which have none,
  that of rare ones, or else the last id: of the rarest value, whose row was trained least.

what to expect:
  The same input gives the same bytes, whatever the workers. The order of rows is kept. A run that was broken off, even
  by kill -9, goes on where it was with the same command; its files wait in .NAME.preprocess beside the output (below
  --work, in .NAME-MARK.preprocess, where the mark tells outputs of one name apart). A finished dataset stays as it is.
  On two cores Kaggle's 46 million rows take some minutes, in about 1 GB of memory; memory does not grow with rows, only
  the disk does (an estimate is shown first). Wrong input is told with file and line, and the exit code is 2.
  DIR/report.json says what was read, what came out, and what it took.

addresses:
  Inputs, the output and --vocabulary may be s3://, gs://, hf:// and all else that fsspec knows, with the package that
  it names installed (s3fs, gcsfs, huggingface_hub). For an output behind an address the working folder is made in the
  current folder, or in --work. What is in memory:// is of one process, which then does all the work.

clusters:
  --scheduler hands all work to a running Dask cluster (pip install 'lightning-dlrm[cluster]'; dask scheduler; dask
  worker ADDRESS). Its workers must share the file system of the output, or of --work, with this machine, and have
  this package.
"""


def _epilog() -> str:
    protocols = [
        textwrap.fill(protocol.summary, 119, initial_indent=f"  {name:<8}", subsequent_indent=" " * 10)
        for name, protocol in PROTOCOLS.items()
    ]
    return "\n".join(["protocols (their scores cannot be compared with each other):", *protocols, "", _SPLITS])


_INSPECT_DESCRIPTION = """\
Prints a dataset's protocol, fingerprints, splits with label means, and columns: rows of each table, share of missing
values, share of the most frequent id, the number of ids that 90% of the lookups go to, reserved ids; for planted (demo)
data also the best scores any model can reach.

--leakage counts rows whose features (label apart) occur more than once, within a split and in two splits. It reads
every row, some 2 million a second, in less than 1 GB of memory and 12 bytes a row of the temporary folder (TMPDIR).

--plot draws the tables' sizes and how few of their ids most lookups go to, from the vocabulary's counts, or, where
there are none, by counting ids in the rows (8 bytes of memory for each row of the largest table).

examples:
  python -m lightning_dlrm inspect data/kaggle
  python -m lightning_dlrm inspect data/kaggle --verify --leakage
  python -m lightning_dlrm inspect s3://bucket/kaggle --plot tables.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the options of ``preprocess`` to a parser; ``run`` takes what it parses."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _PREPROCESS_DESCRIPTION, _epilog()
    source = parser.add_argument_group("what to read and write")
    source.add_argument(
        "--dataset",
        choices=DATASETS,
        help="where the files come from; decides how rows are split (needed unless --vocabulary is given)",
    )
    source.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="raw files or addresses, in the order of days (mind that a shell lists day_* as day_1, day_10, day_11)",
    )
    source.add_argument(
        "--output", required=True, metavar="DIR", help="folder or address to make; must not exist, or be empty"
    )
    source.add_argument(
        "--work", type=Path, metavar="DIR", help="where the working folder is made (default: beside the output)"
    )
    source.add_argument(
        "--on-bad-row",
        choices=("fail", "skip"),
        default="fail",
        help="what a line that is not Criteo's does: end the run, or be left out and listed in DIR/bad_rows.tsv with "
        "file, line and reason (default: %(default)s)",
    )
    encoding = parser.add_argument_group("how to encode it")
    # No choices: an unknown protocol is answered by find_protocol, as in Python.
    encoding.add_argument(
        "--protocol",
        metavar="NAME",
        help=f"how raw values become features, needed unless --vocabulary is given: {', '.join(PROTOCOLS)}",
    )
    encoding.add_argument(
        "--vocabulary",
        metavar="DIR",
        help="encode new rows as this dataset's; it decides about --dataset and all of these options",
    )
    encoding.add_argument(
        "--min-count",
        type=int,
        metavar="N",
        help="values seen fewer than N times share one id (default: the protocol's; 1 keeps every value)",
    )
    encoding.add_argument(
        "--max-rows",
        type=int,
        metavar="N",
        help="rows of the largest table: in dlrm, hashes are taken modulo N before they are counted, in mlperf ids are "
        "after it (default: no limit; the published Terabyte models use 10000000 and 40000000)",
    )
    encoding.add_argument(
        "--negative-sampling-rate",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the training rows with label 0 that is kept (default: all)",
    )
    encoding.add_argument(
        "--multi-hot",
        choices=("mlperf",),
        help="terabyte: bags of the sizes of MLPerf DLRM v2, 214 ids a row, of which the first is the row's own",
    )
    encoding.add_argument(
        "--multi-hot-distribution",
        choices=DISTRIBUTIONS,
        default="uniform",
        help="of the other ids of a bag (default: %(default)s)",
    )
    encoding.add_argument(
        "--seed", type=int, default=0, help="of random splits, sampling and bags (default: %(default)s)"
    )
    where = parser.add_argument_group("who does it")
    where.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: one per core)")
    where.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler, such as tcp://10.0.0.1:8786")


def run(args: argparse.Namespace) -> int:
    """Preprocesses as ``add_arguments`` was told, prints a report, and returns the exit code.

    Raises:
        UserError: see ``pipeline.preprocess``.
        SystemExit: on SIGTERM and SIGHUP.
    """
    warning = order_warning(args.dataset, args.input)
    if warning:
        print(warning, file=sys.stderr)
    progress = Progress()
    with leaving_in_order():
        schema = preprocess(
            args.dataset,
            args.protocol,
            args.input,
            args.output,
            args.max_rows,
            progress,
            min_count=args.min_count,
            negative_sampling_rate=args.negative_sampling_rate,
            multi_hot=args.multi_hot,
            multi_hot_distribution=args.multi_hot_distribution,
            vocabulary=args.vocabulary,
            seed=args.seed,
            on_bad_row=args.on_bad_row,
            workers=args.workers,
            scheduler=args.scheduler,
            work=args.work,
        )
    if progress.stages:
        print(render_report(schema, progress.stages))
    known = args.vocabulary is None
    command = (
        f"fit --config dlrm.yaml --config criteo_{schema.dataset}.yaml --data.path {args.output}"
        if known
        else f"predict --config RUN/config.yaml --ckpt_path RUN/checkpoints/best --data.path {args.output}"
    )
    print(f"{'train on it' if known else 'score it'}: python -m lightning_dlrm {command}")
    return 0


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the options of ``inspect`` to a parser; ``run_inspect`` takes what it parses."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _INSPECT_DESCRIPTION
    parser.add_argument(
        "folder", metavar="DIR", help="the dataset folder, as preprocess or generate made it; a path or an address"
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
    folder = Folder(args.folder)
    schema = load_schema(folder)
    if args.plot is not None:
        check_figure(schema, args.plot)
    if args.verify:
        verify(folder, schema, progress=True)
    else:
        check_sizes(folder, (*schema.vocabulary.values(), *part_files(schema)))
    facts = {**summary(folder, schema), "verified": args.verify}
    if args.leakage:
        facts["leakage"] = equal_rows(folder, schema)
    if args.plot is not None:
        title = f"{folder}: {schema.dataset}, protocol {schema.protocol}, {facts['rows']:,} rows"
        draw(list(all_skews(folder, schema)), title, args.plot)
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(render(facts))
    print(
        "every file has its checksum"
        if args.verify
        else "every file has its size; checksums were not compared (--verify reads all bytes and does)"
    )
    if args.plot is not None:
        print(f"{args.plot} shows table sizes and skew")
    return 0
