"""``checkpoint``: show the content of a checkpoint, or write it again in other pieces."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dlrm.contracts.disk import require_writable
from lightning_dlrm.contracts.errors import shown_path
from lightning_dlrm.contracts.terminal import aligned, binary_size, counted

if TYPE_CHECKING:
    # Imported when they are needed: help starts without torch.
    from lightning_dlrm.sharding.checkpoint import CheckpointReader
    from lightning_dlrm.sharding.costs import TableLoad
    from lightning_dlrm.sharding.manifest import TableEntry

_BALANCED_FOR = 2048  # samples of a global batch, which a checkpoint does not hold

_WORKS = {
    "info": "show a checkpoint's model, step, tables and pieces",
    "merge": "write a checkpoint again with every table whole",
    "reshard": "write a checkpoint again in pieces for another number of ranks",
}

_EXAMPLES = {
    "info": """\
examples:
  python -m lightning_dlrm checkpoint info runs/first/checkpoints/best
  python -m lightning_dlrm checkpoint info runs/first/checkpoints/best --verify --json""",
    "merge": """\
A run on any number of ranks opens any checkpoint without changes. In a merged checkpoint each table is one safetensors
file with the tensor "weight", which other tools can read. Each thread holds one table in memory at a time.

examples:
  python -m lightning_dlrm checkpoint merge runs/first/checkpoints/best --output best-whole""",
    "reshard": """\
A run on any number of ranks opens any checkpoint without changes. A checkpoint in the pieces of the run's plan is read
faster, because each rank reads only the files of its own pieces.

examples:
  python -m lightning_dlrm checkpoint reshard runs/first/checkpoints/last --ranks 8 --output last-8
  python -m lightning_dlrm checkpoint reshard runs/first/checkpoints/last --plan plan.yaml --output last-8""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options to a parser; ``run`` takes what it parses."""
    parser.description = """\
Show, rewrite or import a checkpoint.

examples:
  python -m lightning_dlrm checkpoint info runs/first/checkpoints/last
  python -m lightning_dlrm checkpoint reshard runs/first/checkpoints/last --ranks 8 --output last-8"""
    parser.epilog = "checkpoint COMMAND --help lists the options of a command."
    works = parser.add_subparsers(dest="work", required=True, metavar="COMMAND")
    # Only for the list in --help: ``import`` takes the options of fit and has a parser of its own.
    works.add_parser("import", summary="make a checkpoint of parameters that facebookresearch/dlrm saved")
    for name, text in _WORKS.items():
        description = f"{text[0].upper()}{text[1:]}.\n\n{_EXAMPLES[name]}"
        work = works.add_parser(name, summary=text, description=description)
        work.add_argument("checkpoint", type=Path, metavar="PATH", help="checkpoint folder")
        if name == "info":
            work.add_argument(
                "--verify",
                action="store_true",
                help="compare every file's checksum, and look for NaN and infinite values",
            )
            work.add_argument("--json", action="store_true", help="print JSON")
        else:
            work.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the new checkpoint")
        if name == "reshard":
            target = work.add_mutually_exclusive_group(required=True)
            target.add_argument("--ranks", type=int, metavar="N", help="make a plan for this number of ranks")
            target.add_argument("--plan", type=Path, metavar="FILE", help="plan made by the command plan")


def run(args: argparse.Namespace) -> int:
    """Run a subcommand; return the exit code.

    Raises:
        UserError: the checkpoint is not whole, or the new one cannot be written.
    """
    from lightning_dlrm.sharding.checkpoint import CheckpointReader, resolve_checkpoint
    from lightning_dlrm.sharding.rewriting import rewrite_checkpoint
    from lightning_dlrm.tracking.lock import lock_run_of

    source = resolve_checkpoint(args.checkpoint)
    if args.work == "info":
        reader = CheckpointReader(source)
        if args.verify:
            reader.verify()
        found = info(reader)
        if args.json:
            print(json.dumps(found, indent=1))
            return 0
        print(_describe(found))
        print(
            "every file's checksum is right and every value is finite"
            if args.verify
            else "checksums were not compared: --verify compares them"
        )
        return 0
    bounds = None if args.work == "merge" else _bounds(CheckpointReader(source), args)
    require_writable(args.output, "another --output")
    with lock_run_of(args.output):
        rewrite_checkpoint(source, args.output, bounds)
    manifest = CheckpointReader(args.output).manifest
    tables, pieces = len(manifest.tables), sum(len(entry.pieces) for entry in manifest.tables.values())
    print(
        f"written: {args.output}, {counted(tables, 'table')} in {counted(pieces, 'piece')}, "
        f"{binary_size(manifest.bytes)}"
    )
    return 0


def info(reader: "CheckpointReader") -> dict[str, Any]:
    """Return what the manifest of a checkpoint says, without opening its files."""
    tables = reader.manifest.tables
    return {
        "path": shown_path(reader.folder),
        "header": dict(reader.header),
        "bytes": reader.manifest.bytes,
        "dense_bytes": reader.manifest.rest.bytes,
        "files": 1 + sum(len(entry.pieces) for entry in tables.values()),
        "tables": {
            name: {
                "shapes": {slot: list(shape) for slot, shape in entry.shapes.items()},
                "pieces": [[part.start, part.stop] for part in entry.pieces],
                "bytes": sum(part.bytes for part in entry.pieces),
            }
            for name, entry in tables.items()
        },
    }


_STATE_WORDS = {
    "sum": "sum of the squared gradients (Adagrad)",
    "mean": "moving average of the gradients (Adam)",
    "square": "moving average of the squared gradients (Adam)",
}
"""Name of optimizer state -> what it is."""


def _describe(found: dict[str, Any]) -> str:
    header = dict(found["header"])
    if "epoch" in header:
        # The file counts epochs from 0, and one that is complete still has its own number.
        header["epoch"] = f"{header['epoch'] + 1} (counted from 1)"
    # The first digits of a fingerprint, as inspect shows them.
    facts = {
        name: str(value)[:16] if name.endswith("fingerprint") else f"{value:,}" if type(value) is int else value
        for name, value in sorted(header.items(), key=lambda fact: fact[0].endswith("fingerprint"))
    }
    facts["rest.pt"] = f"{binary_size(found['dense_bytes'])}: dense layers, optimizer state, callbacks"
    facts["size"] = f"{binary_size(found['bytes'])} in {counted(found['files'], 'file')} and manifest.json"
    lines = [found["path"], *(f"{name.replace('_', ' '):22s}{value}" for name, value in facts.items()), ""]
    rows = [("table", "rows", "width", "pieces", "size", "optimizer state")]
    for name, table in found["tables"].items():
        shape = table["shapes"]["weight"]
        # The accumulators of row-wise Adagrad are one number a row, [rows].
        numbers = {slot: math.prod(found[1:]) for slot, found in table["shapes"].items() if slot != "weight"}
        slots = [f"{slot}: {count:,} a row" for slot, count in numbers.items()]
        size, pieces = binary_size(table["bytes"]), f"{len(table['pieces']):,}"
        rows.append((name, f"{shape[0]:,}", str(shape[1]), pieces, size, ", ".join(slots) or "none"))
    tables = found["tables"].values()
    total_rows = sum(table["shapes"]["weight"][0] for table in tables)
    total_pieces = sum(len(table["pieces"]) for table in tables)
    total = binary_size(sum(table["bytes"] for table in tables))
    rows.append(("all", f"{total_rows:,}", "", f"{total_pieces:,}", total, ""))
    notes = ["pieces: files of a table, one for each rank that holds some of its rows"]
    used = {slot for table in tables for slot in table["shapes"]}
    notes += [f"{slot}: {words}" for slot, words in _STATE_WORDS.items() if slot in used]
    if any(name.endswith("/linear") for name in found["tables"]):
        notes.append("NAME/linear: the first-order weights of column NAME")
    return "\n".join([*lines, *aligned(rows, left=(0, 5)), *notes, ""])


def _bounds(reader: "CheckpointReader", args: argparse.Namespace) -> dict[str, list[int]]:
    from lightning_dlrm.sharding.balance import check_ranks, make_plan
    from lightning_dlrm.sharding.plan import read_plan

    tables = reader.manifest.tables
    if args.plan is None:
        check_ranks(args.ranks, "--ranks")
        plan = make_plan([_load(reader, name, entry) for name, entry in tables.items()], args.ranks, _BALANCED_FOR)
    else:
        plan = read_plan(args.plan)
        plan.check({name: entry.shapes["weight"][0] for name, entry in tables.items()}, plan.ranks)
    return {name: [0, *(piece.stop for piece in pieces)] for name, pieces in plan.tables.items()}


def _load(reader: "CheckpointReader", name: str, entry: "TableEntry") -> "TableLoad":
    from lightning_dlrm.sharding.costs import TableLoad

    rows, width = entry.shapes["weight"]
    row_bytes = sum(math.prod(shape[1:]) * reader.dtype(name, slot).itemsize for slot, shape in entry.shapes.items())
    return TableLoad(name=name, rows=rows, width=width, bytes_per_row=row_bytes)
