"""Make a dataset folder of raw Criteo TSV: ``preprocess``, its checks, and the set-up of a ``job``."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.filesystems import in_process_only, is_disk_full
from datamodules.folder import Folder
from datamodules.preprocess.estimate import estimate
from datamodules.preprocess.job import VERSION, Job
from datamodules.preprocess.options import options_of
from datamodules.preprocess.progress import Progress
from datamodules.preprocess.sources import RawFile, find_files
from datamodules.preprocess.splits import Dataset
from datamodules.preprocess.staging import PIECE_BYTES
from datamodules.preprocess.target import Target
from datamodules.preprocess.workers import open_workers
from lightning_dlrm.contracts.errors import UserError, one_line, require
from lightning_dlrm.contracts.schema import DatasetSchema

# For less input, workers take longer to start than to work, and no step is worth keeping for a later run.
_SMALL_BYTES = 8 << 20


def preprocess(
    dataset: Dataset | None,
    protocol: str | None,
    inputs: Sequence[Path | str],
    output: Path | str,
    max_rows: int | None = None,
    progress: Progress | None = None,
    block_bytes: int = PIECE_BYTES,
    *,
    vocabulary: Path | str | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    work: Path | str | None = None,
    **options: Any,
) -> DatasetSchema:
    """Make a dataset folder of raw Criteo files.

    Equal input gives equal bytes, for any number of workers and interruptions: the same call resumes an interrupted
    run. A finished dataset is left as it is. The memory of a worker is bounded, whatever the number of rows.

    Args:
        dataset: ``kaggle`` or ``terabyte``; decides how rows are split. None with a vocabulary.
        protocol: how raw values become features, a name of ``protocols.PROTOCOLS``. None with a vocabulary.
        inputs: TSV files in the order of days, plain, gzip or Zstandard; paths, or URLs that fsspec knows.
        output: the folder to make, a path or a URL; it must not exist, or be empty.
        max_rows: see ``Options``, as for the other ``options``.
        progress: shows and times the stages, by default on standard error; a finished dataset has no stages.
        block_bytes: text that a worker parses at a time; without effect on the result.
        vocabulary: a dataset folder whose vocabulary, protocol and options are used; all rows, labelled or not, become
            the test split.
        workers: processes; None for one per core, or for this process alone if the input is small.
        scheduler: the address of a Dask scheduler, whose workers then do the work.
        work: the folder for the hidden working folder; None for that of ``output``.
        options: further fields of ``Options``.

    Raises:
        UserError: an argument, a path or a line of a file is wrong, the disk is too small, a worker died, or the
            output folder holds something else.
    """
    progress = progress or Progress()
    known_folder = None if vocabulary is None else Folder(vocabulary)
    chosen, known = options_of(known_folder, dataset=dataset, protocol=protocol, max_rows=max_rows, **options)
    _check_workers(workers, scheduler)
    files = find_files([str(path) for path in inputs])
    target = Target(str(output), None if work is None else Path(work))
    job = Job(
        options=chosen, known=known, vocabulary=known_folder, files=files, piece_bytes=block_bytes, progress=progress
    )
    return _run(job, target, workers, scheduler)


def _check_workers(workers: int | None, scheduler: str | None) -> None:
    require(workers is None or workers >= 1, f"workers is {workers}, expected at least 1")
    require(
        workers is None or scheduler is None,
        "both workers and a scheduler are given, but a cluster has workers of its own: leave one out",
    )


def _run(job: Job, target: Target, workers: int | None, scheduler: str | None) -> DatasetSchema:
    run = {
        "version": VERSION,
        "options": job.options.document(),
        "inputs": [{"name": file.name, "bytes": file.size, "stamp": file.stamp} for file in job.files],
    }
    if (finished := target.finished(run)) is not None:
        target.remove_leftovers()
        job.progress.note(f"{target.output} is finished already: same input, same options; nothing to do")
        return finished
    small = sum(file.size for file in job.files) < _SMALL_BYTES
    count = _worker_count(job.files, job.vocabulary, workers, scheduler, small)
    with target.working_folder(worth_keeping=not small) as folder:
        job.progress.folder = job.folder = folder
        job.estimate = estimate(job.files, multi_hot=job.options.multi_hot is not None)
        with open_workers(count, scheduler, folder, target.resume_hint) as pool:
            try:
                job.prepare(pool)
                job.progress.note(job.estimate.checked(folder, target.parent, pool.count))
                schema = job.make(pool, run)
                target.deliver(job.encode_folder / "result")
            except OSError as error:
                if is_disk_full(error):
                    raise UserError(f"the disk is full ({one_line(error)}); make room. {target.resume_hint}") from error
                raise
    return schema


def _worker_count(
    files: Sequence[RawFile], vocabulary: Folder | None, workers: int | None, scheduler: str | None, small: bool
) -> int:
    """Return the number of processes; files in the memory of this process leave only this one.

    Raises:
        UserError: other processes are asked for, but cannot read a file.
    """
    unshared = [place for place in (*(file.path for file in files), str(vocabulary)) if in_process_only(place)]
    if unshared and (scheduler is not None or (workers or 1) > 1):
        raise UserError(
            f"{unshared[0]} is in the memory of this process, where others cannot read it; leave --workers and "
            "--scheduler out"
        )
    return workers or (1 if small or unshared else os.cpu_count() or 1)


def order_warning(dataset: Dataset | None, inputs: Sequence[Path | str]) -> str | None:
    """Return a warning if Terabyte's days seem to be out of order, else None.

    A shell expands ``day_*`` to day_1, day_10, day_11, ..., day_2, and the last file given is held out.
    """
    names = [str(path).rpartition("/")[2] for path in inputs]
    numbers = [[int(number) for number in re.findall(r"\d+", name)] for name in names]
    in_order = [name for _, name in sorted(zip(numbers, names, strict=True), key=lambda pair: pair[0])]
    if dataset != "terabyte" or not all(numbers) or names == in_order:
        return None
    return (
        f"warning: {names[-1]} is given last, so it is held out for test and validation; in the order of days "
        f"it would be {in_order[-1]} (a shell lists day_10 before day_2; write day_{{0..23}})"
    )
