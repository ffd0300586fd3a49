"""``bench loader``: batches of the stream against bare Parquet decoding of the same files."""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from datamodules.folder import check_sizes, part_files
from datamodules.stream.loader import TrainingLoader
from lightning_dlrm.bench.measurement import (
    Measurement,
    add_data,
    add_rounds,
    check_numbers,
    open_dataset,
    peak_bytes,
    speed_ratio,
    time_rounds,
)
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import DataFile

DESCRIPTION = """\
Time the reading of a dataset's training rows as batches.

examples:
  python -m lightning_dlrm bench loader
  python -m lightning_dlrm bench loader --data criteo --threads 1 --rounds 9
  python -m lightning_dlrm bench loader --only epochs --threads 2 --rounds 7
"""
DETAILS = """\
what is timed, in turns:
  ours      whole epochs as batches in shuffled order
  baseline  a bare pyarrow.parquet.ParquetFile.read_row_group of all columns of the same files, on as many threads,
            without batches

Both verify the checksums of pages, or, in rows named "unverified", neither does. Other rows are the time to the first
batch, and "epochs of 32": epochs of 32 large batches, one after the other as fit reads them for a GPU, four of them
after two that allocate the memory that later epochs reuse. Processor time is less disturbed by other work on the
machine than elapsed time.
"""

Key = tuple[str, int, int]
"""Case, threads, and batch size; 0 for bare decoding."""
_BARE = "bare decoding"
_EPOCH_BATCHES, _LARGE_BATCH = 32, 65_536
_WARM_UP, _EPOCHS = 2, 4
"""Epochs of a round that do not count, and those that do."""
_ON_END = f"epochs of {_EPOCH_BATCHES}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument(
        "--batch-sizes", "--batch-size", type=int, nargs="+", default=[2048, 128, 16_384], metavar="N",
        help="samples of a batch, one size or more (default: 2048 128 16384)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="one number or more (default: 1 2)"
    )
    parser.add_argument("--only", choices=("epochs",), metavar="epochs", help="time only epochs of large batches")
    add_rounds(parser)


def run(args: argparse.Namespace) -> list[Measurement]:
    """Time the loader.

    Raises:
        UserError: an option is out of range, or the data cannot be read.
    """
    check_numbers(args)
    folder, schema = open_dataset(args.data)
    files = tuple(part_files(schema, ["train"]))
    if not files:
        raise UserError(f"{folder} has no training rows; give another --data DIR")
    check_sizes(folder, files)
    loader = functools.partial(TrainingLoader, folder, schema, ["train"], seed=1)
    rows = [] if args.only else _single_epochs(args, folder, files, loader)
    return rows + _epochs_on_end(args, folder, files, loader)


def _single_epochs(
    args: argparse.Namespace, folder: Path, files: tuple[DataFile, ...], loader: Callable[..., TrainingLoader]
) -> list[Measurement]:
    """Return the rows of epochs that are read alone."""
    samples = sum(file.rows for file in files)
    first = args.batch_sizes[0]

    before = peak_bytes()
    _epoch(loader(shuffle="window", batch_size=first, threads=1))
    peak = peak_bytes() - before
    contenders: dict[Key, Callable[[], object]] = {
        (bare, n, 0): functools.partial(_decode, folder, files, n, verify)
        for bare, verify in ((_BARE, True), (f"{_BARE}, unverified", False))
        for n in args.threads
    }
    contenders |= {key: functools.partial(_epoch, value) for key, value in _loaders(args, loader).items()}
    seconds = time_rounds(contenders, args.rounds)
    rows = []
    for key, of_rounds in seconds.items():
        case, threads, batch_size = key
        extra = {}
        if batch_size:
            alike = f"{_BARE}, unverified" if "unverified" in case else _BARE
            extra = speed_ratio("of_baseline", of_rounds, seconds[alike, threads, 0])
        if key == ("shuffle window", args.threads[0], first):
            extra["peak_bytes"] = peak
        rows.append(_row(key, samples, of_rounds, extra))
    for threads in args.threads:
        waits = [_first_batch(loader(shuffle="window", batch_size=first, threads=threads)) for _ in range(args.rounds)]
        rows.append(_row(("first batch", threads, first), first, waits, {}))
    return rows


def _epochs_on_end(
    args: argparse.Namespace, folder: Path, files: tuple[DataFile, ...], loader: Callable[..., TrainingLoader]
) -> list[Measurement]:
    """Return the rows of epochs of large batches, one after the other."""
    samples = sum(file.rows for file in files)
    batch_size = min(_LARGE_BATCH, -(-samples // _EPOCH_BATCHES))
    batches = min(_EPOCH_BATCHES, -(-samples // batch_size))
    read = min(batches * batch_size, samples) * _EPOCHS
    rows = []
    for threads in args.threads:
        make = functools.partial(loader, shuffle="window", batch_size=batch_size, threads=threads)
        seams: list[float] = []
        ours, bare = _Times(), _Times()
        contenders = {
            "ours": functools.partial(_read_epochs, make, batches, ours, seams),
            "bare": functools.partial(_timed, functools.partial(_decode, folder, files, threads, True), bare),
        }
        time_rounds(contenders, args.rounds)
        key = (f"{_ON_END}, shuffle window", threads, batch_size)
        extra = {"seam_s": statistics.median(seams)}
        for name, of_ours, of_bare in (("", ours.wall, bare.wall), ("_cpu", ours.cpu, bare.cpu)):
            extra |= speed_ratio(f"of_baseline{name}", of_ours, of_bare, read / samples)
        rows.append(_row(key, read, ours.wall, extra))
    return rows


@dataclass(frozen=True)
class _Times:
    """Seconds, and processor seconds of all threads, of each call."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def _timed(function: Callable[[], object], times: _Times) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    function()
    times.wall.append(time.perf_counter() - start)
    times.cpu.append(time.process_time() - cpu)


def _read_epochs(make: Callable[[], TrainingLoader], batches: int, times: _Times, seams: list[float]) -> None:
    """Read epochs one after the other; append the seconds between the last batch of one and the first of the next.

    The epoch after them is begun, so that as much is read ahead at their end as at their start.
    """
    loader = make()
    loader.limit_epoch(batches, _WARM_UP + _EPOCHS + 1)
    for _ in range(_WARM_UP):
        _epoch(loader)

    def read() -> None:
        for _ in range(_EPOCHS):
            ended, iterator = time.perf_counter(), iter(loader)
            next(iterator)
            seams.append(time.perf_counter() - ended)
            for _ in iterator:
                pass

    _timed(read, times)
    loader.drop_next_epoch()


def _loaders(args: argparse.Namespace, loader: Callable[..., TrainingLoader]) -> dict[Key, TrainingLoader]:
    """Return the loaders to time: of every number of threads and batch size, unverified, unshuffled, and cached."""
    (first, *others), one = args.batch_sizes, args.threads[0]
    window = functools.partial(loader, shuffle="window")
    loaders: dict[Key, TrainingLoader] = {
        ("shuffle window", n, first): window(batch_size=first, threads=n) for n in args.threads
    }
    loaders |= {("shuffle window", one, size): window(batch_size=size, threads=one) for size in others}
    for n in args.threads:
        loaders["shuffle window, unverified", n, first] = window(batch_size=first, threads=n, verify=False)
    loaders["shuffle none", one, first] = loader(shuffle="none", batch_size=first, threads=one)
    for shuffle in ("window", "full"):
        cached = loader(shuffle=shuffle, batch_size=first, threads=one, cache="memory")
        _epoch(cached)
        loaders[f"shuffle {shuffle}, cache memory", one, first] = cached
    return loaders


def _row(key: Key, samples: int, seconds: Sequence[float], extra: Mapping[str, float]) -> Measurement:
    case, threads, batch_size = key
    words = [case, f"{threads} thread{'s' if threads > 1 else ''}"]
    if batch_size:
        words.append(f"batches of {batch_size:,}")
    return Measurement.of_rounds(
        seconds,
        work="loader",
        case=", ".join(words),
        implementation="ours" if batch_size else "baseline",
        device="cpu",
        precision="32-true",
        batch_size=batch_size,
        samples=samples,
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
    """Decode all row groups; thread i of n takes every n-th row group."""

    def decode(mine: list[tuple[DataFile, int]]) -> None:
        parts = {
            file.path: pq.ParquetFile(folder / file.path, pre_buffer=False, page_checksum_verification=verify)
            for file, _ in mine
        }
        for file, group in mine:
            parts[file.path].read_row_group(group, use_threads=False)

    groups = [(file, group) for file in files for group in range(len(file.row_groups))]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, [groups[i::threads] for i in range(threads)]))
