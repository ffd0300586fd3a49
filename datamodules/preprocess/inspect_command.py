"""The subcommand ``inspect``: its options and its output. Nothing here imports torch."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from datamodules.folder import Folder, check_sizes, load_schema, part_files, verify
from datamodules.preprocess.inspection import summary
from datamodules.preprocess.inspection_text import render
from datamodules.preprocess.leakage import equal_rows
from datamodules.preprocess.protocols import PROTOCOLS
from datamodules.preprocess.report import one_label_warnings
from datamodules.preprocess.skew import all_skews, check_figure, draw
from lightning_dlrm.contracts.terminal import line_width, wrapped

_DESCRIPTION = """\
Show what a dataset folder holds: the rows and the share of positive labels of each split; the role, missing and unknown
values and table rows of each column; what is suspicious; how columns are encoded. For demo data, also the best
scores that any model can reach.

examples:
  python -m lightning_dlrm inspect data/kaggle
  python -m lightning_dlrm inspect data/kaggle --verify --leakage
  python -m lightning_dlrm inspect s3://bucket/kaggle --plot tables.png
"""


_OPTIONS: dict[str, dict[str, Any]] = {
    "folder": {"metavar": "DIR", "help": "dataset folder of preprocess or generate; path or URL"},
    "--verify": {"action": "store_true", "help": "read every file and compare its checksum"},
    "--leakage": {"action": "store_true", "help": "count rows with equal features, within and between splits"},
    "--plot": {
        "type": Path,
        "metavar": "FILE",
        "help": "draw table sizes and the spread of lookups: .png, .svg or .pdf",
    },
    "--json": {"action": "store_true", "help": "print one JSON object instead of tables"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description and the options of ``inspect`` to a parser; ``run`` takes what it parses."""
    parser.description, parser.usage = _DESCRIPTION, f"{parser.prog} DIR [options]"
    for name, settings in _OPTIONS.items():
        parser.add_argument(name, **settings)


def run(args: argparse.Namespace) -> int:
    """Inspect a dataset with the parsed options and return the exit code.

    Raises:
        UserError: the folder holds no dataset, a file is missing or altered, or see ``leakage.equal_rows`` and
            ``skew.draw``.
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
        protocol = f", protocol {schema.protocol}" if schema.protocol in PROTOCOLS else ""
        title = f"Tables of dataset {schema.dataset}{protocol}, {facts['rows']:,} rows"
        draw(list(all_skews(folder, schema)), title, args.plot)
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(wrapped(render(facts, line_width(sys.stdout)).splitlines()))
    for warning in one_label_warnings(schema):
        print(wrapped([f"warning: {warning}"], sys.stderr), file=sys.stderr)
    print(
        "the checksums of all files match"
        if args.verify
        else "the sizes of all files match; --verify compares their checksums too"
    )
    if args.plot is not None:
        print(f"{args.plot} shows the table sizes, and how lookups are spread over ids")
    return 0
