"""``bench loader``: batches of the stream against bare Parquet decoding of the same files."""

import argparse
import functools
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from datamodules.folder import check_sizes, load_schema, part_files
from datamodules.generate.demo import DemoSettings, demo_folder, generate_demo
from datamodules.stream.loader import TrainingLoader
from datamodules.stream.order import Shuffle
from lightning_dlrm.bench.measurement import Measurement, median_and_spread, peak_bytes, time_rounds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import DataFile

DESCRIPTION = """\
Times the training split of a dataset, whole epochs of it: ours as batches in shuffled order, and as a baseline a bare
pyarrow.parquet.ParquetFile.read_row_group of all columns of the same files, on as many threads, which makes no batches.
Both verify the pages' checksums, or, where it says "unverified", neither does. "of_baseline" is ours against the
baseline of the same rounds and threads. Beside that, the time to the first batch, and what a first epoch adds to the
process's peak memory.

examples:
  python -m lightning_dlrm bench loader
  python -m lightning_dlrm bench loader --data criteo --threads 1 --rounds 9
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="a dataset folder (default: the demo data of fit)")
    parser.add_argument(
        "--batch-sizes",
        "--batch-size",
        type=int,
        nargs="+",
        default=[2048, 128, 16_384],
        metavar="N",
        help="default: 2048 128 16384",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="the median counts (default: %(default)s)")


def run(args: argparse.Namespace) -> list[Measurement]:
    """Times the loader as ``add_arguments`` was told.

    Raises:
        UserError: an option is out of range, or the data cannot be read.
    """
    if min(args.rounds, *args.threads, *args.batch_sizes) < 1:
        raise UserError("bench loader needs --rounds, --threads and --batch-sizes of 1 or more")
    folder = args.data
    if folder is None:
        folder = demo_folder(DemoSettings())
        generate_demo(DemoSettings(), folder)
    schema = load_schema(folder)
    files = tuple(part_files(schema, ["train"]))
    if not files:
        raise UserError(f"{folder} has no training rows; give another --data DIR")
    check_sizes(folder, files)
    samples = sum(file.rows for file in files)
    first, *others = args.batch_sizes

    def loader(batch_size: int, threads: int = 1, shuffle: Shuffle = "window", **options: Any) -> TrainingLoader:
        return TrainingLoader(
            folder,
            schema,
            ["train"],
            shuffle=shuffle,
            seed=1,
            batch_size=batch_size,
            threads=threads,
            **options,
        )

    before = peak_bytes()
    _epoch(loader(first))
    peak = peak_bytes() - before
    one = args.threads[0]
    epochs = {("shuffle window", threads, first): loader(first, threads) for threads in args.threads}
    epochs |= {("shuffle window", one, size): loader(size, one) for size in others}
    epochs |= {("shuffle window, unverified", n, first): loader(first, n, verify=False) for n in args.threads}
    epochs["shuffle none", one, first] = loader(first, one, "none")
    shuffle: Shuffle
    for shuffle in ("window", "full"):
        cached = loader(first, one, shuffle, cache="memory")
        _epoch(cached)
        epochs[f"shuffle {shuffle}, cache memory", one, first] = cached
    contenders = {
        (bare, n, 0): functools.partial(_decode, folder, files, n, verify)
        for bare, verify in (("bare decoding", True), ("bare decoding, unverified", False))
        for n in args.threads
    }
    contenders |= {key: functools.partial(_epoch, value) for key, value in epochs.items()}
    rounds = time_rounds({str(key): contender for key, contender in contenders.items()}, args.rounds)
    seconds = {key: rounds[str(key)] for key in contenders}
    rows = []
    for key in contenders:
        case, threads, batch_size = key
        extra = {}
        if batch_size:
            alike = "bare decoding" + (", unverified" if "unverified" in case else "")
            bare, ours = (median_and_spread(seconds[k])[0] for k in ((alike, threads, 0), key))
            extra["of_baseline"] = bare / ours
        if key == ("shuffle window", one, first):
            extra["peak_bytes"] = peak
        rows.append(_row(case, threads, batch_size, samples, seconds[key], extra))
    for threads in args.threads:
        waits = [_first_batch(loader(first, threads)) for _ in range(args.rounds)]
        rows.append(_row("first batch", threads, first, first, waits, {}))
    return rows


def _row(
    case: str, threads: int, batch_size: int, samples: int, seconds: list[float], extra: dict[str, float]
) -> Measurement:
    median, spread = median_and_spread(seconds)
    words = [case, f"{threads} thread{'s' if threads > 1 else ''}"]
    if batch_size:
        words.append(f"batches of {batch_size:,}")
    return Measurement(
        work="loader",
        case=", ".join(words),
        implementation="ours" if batch_size else "baseline",
        device="cpu",
        precision="32-true",
        batch_size=batch_size,
        samples=samples,
        median_s=median,
        spread_s=spread,
        extra={"threads": threads, **extra},
    )


def _epoch(loader: TrainingLoader) -> None:
    for _ in loader:
        pass


def _first_batch(loader: TrainingLoader) -> float:
    start = time.perf_counter()
    next(iter(loader))
    return time.perf_counter() - start


def _decode(folder: Path, files: tuple[DataFile, ...], threads: int, verify: bool) -> None:
    """All row groups, each thread every so many of them."""

    def decode(mine: list[tuple[DataFile, int]]) -> None:
        parts = {
            file.path: pq.ParquetFile(folder / file.path, pre_buffer=False, page_checksum_verification=verify)
            for file, _ in mine
        }
        for file, group in mine:
            parts[file.path].read_row_group(group, use_threads=False)

    groups = [(file, group) for file in files for group in range(len(file.row_groups))]
    workers = [threading.Thread(target=decode, args=(groups[i::threads],)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
