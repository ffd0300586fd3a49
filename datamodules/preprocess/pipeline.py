"""Raw Criteo TSV -> dataset folder: the stages in order, and what surrounds them."""

import dataclasses
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from datamodules.parquet import DatasetWriter
from datamodules.preprocess.criteo_tsv import BLOCK_BYTES
from datamodules.preprocess.progress import Progress
from datamodules.preprocess.protocols import DATASETS, Dataset, Protocol, find_protocol
from datamodules.preprocess.stages import (
    Work,
    encode_column,
    stage_file,
    staged_missing,
    staged_rows,
    write_dataset,
)
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, Column, DatasetSchema, criteo_columns

# Threads do all the work in libraries that let go of the interpreter. More than these would wait for
# the one that writes, and each may hold the vocabulary of a column.
MAX_THREADS = 8


def preprocess(
    dataset: Dataset,
    protocol: str,
    inputs: Sequence[Path],
    output: Path,
    max_rows: int | None = None,
    progress: Progress | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> DatasetSchema:
    """Makes a dataset folder of raw Criteo files.

    The same input gives the same bytes. Memory is bounded by the vocabularies of the columns in
    work (some 45 bytes per distinct value), not by the rows; the disk beside ``output``
    holds the staged rows meanwhile, about half the size of the uncompressed input.

    Args:
        dataset: ``kaggle`` or ``terabyte``; decides how rows are split.
        protocol: how raw values become features, a name of ``protocols.PROTOCOLS``.
        inputs: TSV files, plain or gzip, in the order of days.
        output: the folder to make; must not exist, or be empty.
        max_rows: the largest table: hashes are taken modulo this before they are counted; None
            keeps every value.
        progress: where to show and time the stages; by default standard error.
        block_bytes: text that one thread parses at a time; does not change the result.

    Raises:
        UserError: an argument, a path or a line of a file is wrong. Nothing is left behind.
    """
    rules = find_protocol(protocol)
    inputs, output = [Path(path) for path in inputs], Path(output)
    if dataset not in DATASETS:
        raise UserError(f"unknown dataset {dataset!r}; known: {', '.join(DATASETS)}")
    if max_rows is not None and max_rows < 1:
        raise UserError(f"max_rows is {max_rows}, expected at least 1; leave it out to keep every value")
    _check_inputs(inputs)
    DatasetWriter(output, ())  # refuses a target that is in use before hours of work
    progress = progress or Progress()
    threads = min(os.cpu_count() or 1, MAX_THREADS)

    with _working_folder(output) as work, _thread_pool(threads) as executor:
        staged = [work.raw(position) for position in range(len(inputs))]
        stored_bytes = sum(path.stat().st_size for path in inputs)
        with progress.stage("stage") as stage:
            bytes_done = 0

            def parsed(rows: int, stored: int) -> None:
                nonlocal bytes_done
                bytes_done += stored
                stage.advance(rows, bytes_done / stored_bytes)

            for source, target in zip(inputs, staged, strict=True):
                stage_file(source, target, executor, 2 * threads, parsed, block_bytes)

        file_rows = staged_rows(staged)
        spans = rules.split(dataset, file_rows)
        rows = sum(file_rows)
        with progress.stage("count", rows) as stage:
            steps = 2 * len(CRITEO_CATEGORICAL)
            cardinalities = executor.map(
                lambda name: encode_column(
                    name, staged, work, rules, max_rows, lambda rows: stage.advance(rows / steps)
                ),
                CRITEO_CATEGORICAL,
            )
            columns = _columns(rules, tuple(cardinalities), max_rows)

        with progress.stage("encode", rows) as stage, DatasetWriter(output, columns) as writer:
            write_dataset(writer, staged, work, rules, spans, executor, stage.advance)
            return writer.finish(
                dataset=dataset,
                protocol=protocol,
                settings={} if max_rows is None else {"max_rows": max_rows},
                report={
                    "rows_per_file": [[path.name, count] for path, count in zip(inputs, file_rows, strict=True)],
                    "missing": staged_missing(staged),
                },
            )


def order_warning(dataset: Dataset, inputs: Sequence[Path]) -> str | None:
    """A line of warning if Terabyte's days seem to be given out of order, as ``day_*`` of a shell
    does (day_1, day_10, day_11, ..., day_2): the last file given is held out."""
    names = [path.name for path in inputs]
    numbers = [re.findall(r"\d+", name) for name in names]
    in_order = sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    if dataset != "terabyte" or not all(numbers) or names == in_order:
        return None
    return (
        f"warning: {names[-1]} is given last, so it is held out for test and validation; in the order of days "
        f"it would be {in_order[-1]} (a shell lists day_10 before day_2; write day_{{0..23}})"
    )


def _columns(protocol: Protocol, cardinalities: tuple[int, ...], max_rows: int | None) -> tuple[Column, ...]:
    words = protocol.category_words if max_rows is None else f"hash % {max_rows}, {protocol.category_words}"
    return tuple(
        dataclasses.replace(column, transform=words) if column.role == "categorical" else column
        for column in criteo_columns(cardinalities, protocol.dense_words)
    )


def _check_inputs(inputs: Sequence[Path]) -> None:
    if not inputs:
        raise UserError("no input files; give at least one Criteo TSV file")
    seen: dict[Path, Path] = {}
    for path in inputs:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name the files in it")
        if not path.exists():
            raise UserError(f"{path} does not exist; check the path, or download the file")
        if not path.is_file() or not os.access(path, os.R_OK):
            raise UserError(f"{path} cannot be read; expected a readable file: check its type and permissions")
        if path.resolve() in seen:
            raise UserError(f"{path} is given twice (as {seen[path.resolve()]}); name each file once")
        seen[path.resolve()] = path


@contextmanager
def _thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that gives up what is not begun when its user fails, rather than finish it first."""
    with ThreadPoolExecutor(threads) as executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _working_folder(output: Path) -> Iterator[Work]:
    """A hidden folder beside ``output``, gone afterwards, with the folders that were made for it.

    The lock goes with its process, so what a killed run left behind is told from a run in progress.

    Raises:
        UserError: the folder cannot be written, or another run makes the same dataset.
    """
    output = output.absolute()
    folder = output.with_name(f".{output.name}.preprocess")
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {output.parent} ({error.strerror}); choose another --output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is making {output}; wait for it, or choose another --output") from None
        try:
            work = Work(folder=folder / "stages")
            shutil.rmtree(work.folder, ignore_errors=True)
            work.create()
            yield work
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):  # not empty: the dataset lies in it
                    parent.rmdir()
