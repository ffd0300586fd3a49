"""Make a dataset folder of raw Criteo TSV or of a click log: ``preprocess``, its checks, the set-up of a ``job``, and
the place of the dataset (a path or a URL) with the working folder in which it is made."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from datamodules.folder import Folder, failures_as_user_errors, file_system, is_disk_full, is_remote, load_schema
from datamodules.log_schema import LogSchema
from datamodules.log_settings import LogSplit
from datamodules.preprocess.job import VERSION, Job
from datamodules.preprocess.journal import find_records, fingerprint, locked
from datamodules.preprocess.options import Options
from datamodules.preprocess.progress import Progress
from datamodules.preprocess.protocols import DATASETS, PROTOCOLS, Dataset
from datamodules.preprocess.recipe import Recipe, known_recipe
from datamodules.preprocess.report import REPORT_FILE
from datamodules.preprocess.sources import RawFile, find_files
from datamodules.preprocess.staging import PIECE_BYTES
from datamodules.preprocess.table_encoding import Fitted
from datamodules.preprocess.workers import open_workers, usable_cores
from lightning_dlrm.contracts.disk import flush
from lightning_dlrm.contracts.documents import parse_json
from lightning_dlrm.contracts.errors import UserError, one_line, require
from lightning_dlrm.contracts.schema import SCHEMA_FILE, DatasetSchema
from lightning_dlrm.contracts.terminal import counted

_FLUSHED_AT_ONCE = 16  # each flush waits for the disk
_CHANGES_SHOWN = 3

# With less input, workers take longer to start than to work, and finished steps are not worth keeping.
_SMALL_BYTES = 8 << 20


class Target:
    """The place of the dataset, and its working folder.

    Args:
        output: a path, or a URL that fsspec knows.
        work: the parent of the working folder; None for the parent of ``output``, or the current folder if ``output``
            is a URL.

    Raises:
        UserError: fsspec does not know the URL.
    """

    def __init__(self, output: str, work: Path | None):
        self.output = output
        self.remote = is_remote(output)
        if self.remote:
            self._system, self._path = file_system(output.rstrip("/"))
            name, parent = self._path.rpartition("/")[2], Path.cwd()
        else:
            self._folder = Path(output).absolute()
            name, parent = self._folder.name, self._folder.parent
        self._beside = work is None and not self.remote
        # In another parent, outputs of the same name need different working folders.
        mark = "" if self._beside else f"-{fingerprint(self._path if self.remote else str(self._folder))[:8]}"
        self.work = (parent if work is None else work.absolute()) / f".{name}{mark}.preprocess"
        self.resume_hint = f"The same command resumes the run; its finished steps are in {self.work}"

    def finished(self, run: "Run") -> DatasetSchema | None:
        """Return the schema of the dataset if this run has made it already, else None.

        Args:
            run: everything that its bytes depend on, as ``REPORT_FILE`` keeps it under ``run``.

        Raises:
            UserError: the place holds something else.
        """
        names = self._names()
        if not names or (SCHEMA_FILE not in names and (self.work / "uploading").exists()):
            return None
        found = None
        if SCHEMA_FILE in names and REPORT_FILE in names:
            with suppress(UserError):
                found = parse_json(self._read(REPORT_FILE), _Report, REPORT_FILE, "").run
        if found is None:
            raise UserError(
                f"{self.output} exists and is not an empty folder; name a new folder, or remove it if it is not needed"
            )
        difference = _difference(found, run)
        require(
            not difference,
            f"{self.output} was made of other input or with other options: {difference}; name a new folder, or "
            "remove this one to make it again",
        )
        require(
            found == run,
            f"{self.output} was made by another release of this package, and can be used as it is; to make it again, "
            "name a new folder, or remove this one",
        )
        return DatasetSchema.from_json(self._read(SCHEMA_FILE), f"{self.output}/{SCHEMA_FILE}")

    @property
    def parent(self) -> Path | None:
        """The nearest existing parent of the dataset; None for a URL."""
        return None if self.remote else next(parent for parent in self._folder.parents if parent.exists())

    def remove_leftovers(self) -> None:
        """Remove the working folder of a finished dataset, left by a run that was killed while removing it."""
        if self._beside and self.work.exists():
            with suppress(UserError), locked(self.work, self.output):
                shutil.rmtree(self.work, ignore_errors=True)

    @contextmanager
    def working_folder(self, worth_keeping: bool) -> Iterator[Path]:
        """Lock the working folder for this run.

        It is removed afterwards if the dataset is delivered, or nothing in it is worth keeping. (Killed runs always
        leave it.)

        Args:
            worth_keeping: whether to keep finished steps if the run is interrupted.

        Raises:
            UserError: the folder cannot be made, another run makes the same dataset, or the dataset's place is not
                writable.
        """
        require(
            self.parent is None or (self.parent.is_dir() and os.access(self.parent, os.W_OK)),
            f"cannot write to {self.parent}; choose another --output",
        )
        new_parents = [parent for parent in self.work.parents if not parent.exists()]
        with locked(self.work, self.output):
            try:
                yield self.work
            finally:
                if (self.work / "delivered").exists() or not worth_keeping or not find_records(self.work):
                    shutil.rmtree(self.work, ignore_errors=True)
                    for parent in new_parents:
                        with suppress(OSError):  # not empty: the dataset lies in it
                            parent.rmdir()

    def deliver(self, result: Path) -> None:
        """Move the finished dataset to its place: by renaming, or, if it has to be copied, with dataset.json last.

        Raises:
            UserError: the place was taken in the meantime, or is not writable.
            OSError: its disk is full.
        """
        with self._reached(f". {self.resume_hint}"):
            self._deliver(result)
        (self.work / "delivered").touch()

    def _deliver(self, result: Path) -> None:
        if self.remote:
            (self.work / "uploading").touch()
            files = [path for path in sorted(result.rglob("*")) if path.is_file() and path.name != SCHEMA_FILE]
            for file in (*files, result / SCHEMA_FILE):
                place = f"{self._path}/{file.relative_to(result).as_posix()}"
                self._system.makedirs(place.rpartition("/")[0], exist_ok=True)
                self._system.put_file(str(file), place)
        else:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            if result.stat().st_dev != self._folder.parent.stat().st_dev:
                copy = self._folder.with_name(f".{self._folder.name}.copy")
                shutil.rmtree(copy, ignore_errors=True)
                result = Path(shutil.copytree(result, copy))
            with ThreadPoolExecutor(_FLUSHED_AT_ONCE) as pool:
                list(pool.map(flush, (*result.rglob("*"), result)))
            try:
                result.rename(self._folder)
            except OSError as error:
                raise UserError(
                    f"{self.output} was created in the meantime ({error.strerror}); move it away"
                ) from error
            flush(self._folder.parent)

    def _reached(self, then: str = "") -> AbstractContextManager[None]:
        """Turn failures of the place into UserErrors; full disks pass.

        Args:
            then: end of the message.
        """
        return failures_as_user_errors(self.output, "cannot be reached", f"check the place and your access to it{then}")

    def _names(self) -> set[str]:
        """Return the names in the target; its own name if it is a file."""
        with self._reached():
            if not self.remote:
                if self._folder.is_dir():
                    return {path.name for path in self._folder.iterdir()}
                return {self._folder.name} if self._folder.exists() else set()
            if not self._system.exists(self._path):
                return set()
            return {str(name).rstrip("/").rpartition("/")[2] for name in self._system.ls(self._path, detail=False)}

    def _read(self, name: str) -> bytes:
        with self._reached():
            if self.remote:
                return self._system.cat_file(f"{self._path}/{name}")
            return (self._folder / name).read_bytes()


@dataclass(frozen=True, kw_only=True)
class Input:
    """An input file in a certain state."""

    name: str
    bytes: int
    stamp: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the bytes of a dataset depend on."""

    version: int
    options: Mapping[str, Any]
    inputs: tuple[Input, ...]


@dataclass(frozen=True, kw_only=True)
class _Report:
    """The part of ``REPORT_FILE`` that a later run reads."""

    run: Run


def _difference(found: Run, wanted: Run) -> str | None:
    """Describe the differences between two runs, apart from the release: those of their options, else the first one of
    their inputs."""
    if changes := list(_changes(found.options, wanted.options)):
        others = len(changes) - _CHANGES_SHOWN
        more = [counted(others, "more difference")] if others > 0 else []
        return ", and ".join([*changes[:_CHANGES_SHOWN], *more])
    before, after = found.inputs, wanted.inputs
    if [file.name for file in before] != [file.name for file in after]:
        names = [", ".join(file.name for file in files) for files in (before, after)]
        return f"the input was {_short(names[0])}, now it is {_short(names[1])}"
    for old, new in zip(before, after, strict=True):
        if old.bytes != new.bytes:
            return f"{new.name} had {old.bytes:,} bytes, now it has {new.bytes:,}"
        if old.stamp != new.stamp:
            return f"{new.name} was changed since then"
    return None


def _changes(old: object, new: object, place: str = "") -> Iterator[str]:
    """Describe where two values differ: the keys alone that differ if both are mappings."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**new, **old}:
            yield from _changes(old.get(key), new.get(key), f"{place}: {key}" if place else str(key))
    elif old != new:
        yield f"{_short(place)} was {_short(old)}, now it is {_short(new)}"


def _check_workers(workers: int | None, scheduler: str | None) -> None:
    require(
        workers is None or workers >= 1, f"workers is {workers}, expected at least 1; leave it out for one per core"
    )
    require(
        workers is None or scheduler is None,
        "both workers and a scheduler are given, but a cluster has workers of its own: leave one out",
    )


def _short(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


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
    schema: LogSchema | None = None,
    is_table: bool = False,
    **options: Any,
) -> DatasetSchema:
    """Make a dataset folder of raw Criteo files, or of a click log by its schema.

    Equal input gives equal bytes, for any number of workers and interruptions. The same call resumes an interrupted
    run, and leaves a finished dataset as it is. The memory of a worker does not grow with the rows.

    Args:
        dataset: ``kaggle`` or ``terabyte``; decides how rows are split. None with a vocabulary or a schema.
        protocol: how raw values become features, a name of ``protocols.PROTOCOLS``. None with a vocabulary or a schema.
        inputs: Criteo's TSV files in the order of days, or a log's files; paths, or URLs of fsspec; see ``RawFile``.
        output: the folder to make, a path or a URL; it must not exist, or must be empty.
        progress: shows and times the stages, by default on standard error; a finished dataset has no stages.
        block_bytes: text that a worker parses at a time; without effect on the result.
        vocabulary: a dataset folder whose encoding is used; all rows, labelled or not, become the test split.
        workers: processes; None for one per core, or for this process alone if the input is small.
        scheduler: the address of a Dask scheduler, whose workers then do the work.
        work: the folder for the hidden working folder; None for that of ``output``.
        schema: of the log; it takes the place of ``dataset``, ``protocol`` and ``max_rows``.
        is_table: whether the input is a Parquet file of a table in memory; then Criteo's rows may be Parquet too.
        max_rows, options: fields of ``Options``; with a schema only ``on_bad_row``.

    Raises:
        UserError: an argument, a path or a line of a file is wrong, the disk is too small, a worker died, or the
            output folder holds something else.
        TypeError: there is no such option.
    """
    known_folder = None if vocabulary is None else Folder(vocabulary)
    known = None if known_folder is None else load_schema(known_folder)
    progress, given = progress or Progress(), dict(dataset=dataset, protocol=protocol, max_rows=max_rows, **options)
    recipe, fitted = _chosen(schema, known, known_folder, given)
    if known is None:
        _note_doubts(recipe, inputs, progress)
    _check_workers(workers, scheduler)
    files = find_files([str(path) for path in inputs], recipe.of_criteo and not is_table)
    job = Job(
        recipe=recipe,
        known=known,
        vocabulary=known_folder,
        files=files,
        piece_bytes=block_bytes,
        progress=progress,
        fitted=fitted,
    )
    return _run(job, Target(str(output), None if work is None else Path(work)), workers, scheduler)


def _note_doubts(recipe: Recipe, inputs: Sequence[Path | str], progress: Progress) -> None:
    """Say if the protocol is superseded, or days seem to be out of order."""
    if recipe.options and (superseded_by := PROTOCOLS[recipe.protocol].superseded_by):
        progress.note(superseded_by)
    if warning := order_warning(recipe.schema.split, inputs):
        progress.note(warning)


def _chosen(
    schema: LogSchema | None, known: DatasetSchema | None, vocabulary: Folder | None, given: dict[str, Any]
) -> tuple[Recipe, Fitted]:
    """Return the recipe, and what the dataset whose vocabulary is used was fitted to.

    Args:
        schema: of the log, if it is given.
        known, vocabulary: schema and folder of the dataset whose vocabulary is used, if any.
        given: fields of ``Options``, and ``on_bad_row``.

    Raises:
        UserError: an option is out of range or missing, or some cannot be given together.
        TypeError: there is no option of this name.
    """
    require(schema is None or known is None, "both a schema and a vocabulary are given; leave one out")
    on_bad_row = given.pop("on_bad_row", "fail")
    defaults = {one.name: one.default for one in fields(Options)}
    for name in given:
        if name not in defaults:
            raise TypeError(f"preprocess has no option {name!r}; its options are on_bad_row, {', '.join(defaults)}")
    if schema is not None:
        recipe, fitted = Recipe(schema=schema, on_bad_row=on_bad_row), Fitted()
    elif known is not None and vocabulary is not None:
        recipe, fitted = known_recipe(known, vocabulary, on_bad_row)
    else:
        for name, choices in (("dataset", DATASETS), ("protocol", PROTOCOLS)):
            require(
                given[name] is not None,
                f"no {name} is given; give --{name}, one of {', '.join(choices)}, or, for your own log, --schema",
            )
        options = Options(**given)
        return Recipe(schema=options.schema(), options=options, on_bad_row=on_bad_row), Fitted()
    in_force = {} if recipe.options is None else recipe.options.document()
    why = "which is an option of Criteo's protocols; with the schema of a log leave it out"
    for name, value in given.items():
        was = in_force.get(name)
        if in_force:
            made = "without it" if was is None else f"with {was}"
            why = f"but the vocabulary of {vocabulary} was made {made}; leave the option out"
        require(value is None or value in (defaults[name], was), f"{name} is {value}, {why}")
    return recipe, fitted


def _run(job: Job, target: Target, workers: int | None, scheduler: str | None) -> DatasetSchema:
    run = Run(
        version=VERSION,
        options=job.recipe.document(),
        inputs=tuple(Input(name=file.name, bytes=file.size, stamp=file.stamp) for file in job.files),
    )
    if (finished := target.finished(run)) is not None:
        target.remove_leftovers()
        job.progress.note(f"{target.output} is complete: same input, same options; nothing to do")
        return finished
    small = sum(file.size for file in job.files) < _SMALL_BYTES
    count = _worker_count(job.files, job.vocabulary, workers, scheduler, small)
    with target.working_folder(worth_keeping=not small) as folder:
        job.progress.folder = job.folder = folder
        try:
            with open_workers(count, scheduler, folder, target.resume_hint) as pool:
                job.prepare(pool)
                job.progress.note(job.estimate.checked(folder, target.parent, pool.count))
                schema = job.make(pool, asdict(run))
                target.deliver(job.encode_folder / "result")
        except (KeyboardInterrupt, SystemExit):
            kept = not small and find_records(folder)
            then = target.resume_hint if kept else "Nothing is kept: the same command starts from the beginning"
            job.progress.note(f"interrupted. {then}")
            raise
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
    places = (*(file.path for file in files), str(vocabulary))
    unshared = [place for place in places if place.startswith("memory://")]
    if unshared and (scheduler is not None or (workers or 1) > 1):
        raise UserError(
            f"{unshared[0]} is in the memory of this process, where other processes cannot read it; leave out "
            "--workers and --scheduler"
        )
    return workers or (1 if small or unshared else usable_cores())


def order_warning(split: LogSplit, inputs: Sequence[Path | str]) -> str | None:
    """Return a warning if each file is a day and the days seem to be out of order, else None.

    A shell expands ``day_*`` to day_1, day_10, day_11, ..., day_2, and the last file given is held out.
    """
    if (split.by, split.days) != ("days", "files"):
        return None
    names = [str(path).rpartition("/")[2] for path in inputs]
    numbers = [[int(number) for number in re.findall(r"\d+", name)] for name in names]
    in_order = [name for _, name in sorted(zip(numbers, names, strict=True), key=lambda pair: pair[0])]
    if not all(numbers) or names == in_order:
        return None
    return (
        f"warning: {names[-1]} is given last, so it is held out for test and validation; in the order of days "
        f"it would be {in_order[-1]} (a shell lists day_10 before day_2; write day_{{0..23}})"
    )
