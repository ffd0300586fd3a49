"""Raw Criteo TSV -> dataset folder: the stages in order, and what surrounds them.

A stage is a function of one job, which any worker may do:

1. ``staging`` parses a piece of a raw file, or a whole compressed one, into segments.
2. ``counting`` takes one categorical column: counts its values, orders them into a vocabulary, and
   notes the id of every segment's distinct values; or notes those by the vocabulary of another dataset.
3. ``parts`` writes one part file of one split.

A worker holds one piece, or a bounded share of one column's distinct values, or some row groups.

Working folder::

    stage/<file>/000000.arrow ...       segments; <file> tells the state of an input
    encode/<options>/segments           lists them
    encode/<options>/ids/C1.ids, .ends  for every segment the ids of its distinct values, and where they end
    encode/<options>/parts/             records of part files
    encode/<options>/result/            the dataset folder to be

Each finished file has a record beside it, see ``journal``.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from datamodules.filesystems import in_process_only, is_disk_full
from datamodules.parquet import Folder
from datamodules.preprocess.counting import ColumnJob, count_column, look_up_column
from datamodules.preprocess.criteo_tsv import COLUMNS
from datamodules.preprocess.encoding import Encoding
from datamodules.preprocess.estimate import Estimate, estimate
from datamodules.preprocess.journal import (
    discard_damaged,
    find_records,
    fingerprint,
    recorded,
    remove_partial_files,
    written_aside,
)
from datamodules.preprocess.multi_hot import Distribution
from datamodules.preprocess.options import OnBadRow, Options, options_of
from datamodules.preprocess.parts import RowsJob, encode_part, part_jobs, rows_per_split
from datamodules.preprocess.progress import Progress
from datamodules.preprocess.report import write_report
from datamodules.preprocess.segments import Segment, save_segments
from datamodules.preprocess.sources import RawFile, find_files
from datamodules.preprocess.splits import Dataset, Span, SplitRule
from datamodules.preprocess.staging import PIECE_BYTES, StageJob, segment_path, stage_piece, stage_text
from datamodules.preprocess.target import REPORT_FILE, Target
from datamodules.preprocess.workers import Workers, open_workers
from lightning_dlrm.contracts.errors import UserError, one_line
from lightning_dlrm.contracts.schema import (
    CRITEO_CATEGORICAL,
    CRITEO_DENSE,
    CRITEO_LABEL,
    SPLITS,
    Column,
    DataFile,
    DatasetSchema,
    Split,
    SplitName,
    file_sha256,
)

BAD_ROWS_FILE = "bad_rows.tsv"

_VERSION = 2
"""Counts up whenever the same input would give other bytes, so that no run goes on with files of another release."""

# Below this much input the workers would take longer to start than to work, and nothing is worth keeping.
_SMALL_BYTES = 8 << 20
_SEGMENTS_A_JOB = 64
_BAD_ROWS_BORNE = 1000
"""More in one piece of a file, and more than there are good ones, and it is the wrong file."""


def preprocess(
    dataset: Dataset | None,
    protocol: str | None,
    inputs: Sequence[Path | str],
    output: Path | str,
    max_rows: int | None = None,
    progress: Progress | None = None,
    block_bytes: int = PIECE_BYTES,
    *,
    min_count: int | None = None,
    negative_sampling_rate: float = 1.0,
    multi_hot: Literal["mlperf"] | None = None,
    multi_hot_distribution: Distribution = "uniform",
    vocabulary: Path | str | None = None,
    seed: int = 0,
    on_bad_row: OnBadRow = "fail",
    workers: int | None = None,
    scheduler: str | None = None,
    work: Path | str | None = None,
) -> DatasetSchema:
    """Makes a dataset folder of raw Criteo files.

    The same input gives the same bytes, whatever the workers, and however often the run was broken
    off: the same call goes on where it was. A finished dataset is left as it is. The memory of a
    worker is bounded, whatever the number of rows.

    Args:
        dataset: ``kaggle`` or ``terabyte``; decides how rows are split.
        protocol: how raw values become features, a name of ``protocols.PROTOCOLS``.
        inputs: TSV files in the order of days, plain, gzip or Zstandard; paths, or addresses that fsspec knows.
        output: the folder to make; must not exist, or be empty. A path, or an address.
        max_rows: the largest table, of protocols ``dlrm`` (hashes modulo this before they are counted) and
            ``mlperf`` (ids modulo this); None keeps every value.
        progress: where to show and time the stages; by default standard error. A run that had nothing to
            do has no stages.
        block_bytes: text that a worker parses at a time; does not change the result.
        min_count: values seen more rarely share one id; None for the protocol's own threshold.
        negative_sampling_rate: the share of training rows with label 0 that is kept.
        multi_hot: ``mlperf`` for the bags of MLPerf DLRM v2.
        multi_hot_distribution: of their ids, ``uniform`` or ``pareto``.
        vocabulary: a dataset folder whose vocabulary, protocol and options are used; all rows, with labels or
            without, become the test split. ``dataset`` and ``protocol`` may then be None.
        seed: of random splits, of sampling and of bags.
        on_bad_row: ``skip`` to leave lines out that are not Criteo's, and list them in ``bad_rows.tsv``.
        workers: processes; None for one per core, or none beside this one if the input is small.
        scheduler: the address of a Dask scheduler, whose workers then do the work.
        work: the folder for the hidden working folder; None for that of ``output``.

    Raises:
        UserError: an argument, a path or a line of a file is wrong, the disk is too small, a worker died, or the
            folder holds something else.
    """
    progress = progress or Progress()
    known_folder = None if vocabulary is None else Folder(vocabulary)
    options, known = options_of(
        known_folder,
        dataset=dataset,
        protocol=protocol,
        max_rows=max_rows,
        min_count=min_count,
        negative_sampling_rate=negative_sampling_rate,
        multi_hot=multi_hot,
        multi_hot_distribution=multi_hot_distribution,
        seed=seed,
        on_bad_row=on_bad_row,
    )
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}, expected at least 1")
    if workers is not None and scheduler is not None:
        raise UserError("both workers and a scheduler are given, but a cluster has workers of its own: leave one out")
    files = find_files([str(path) for path in inputs])
    target = Target(str(output), None if work is None else Path(work))
    run = {
        "version": _VERSION,
        "options": options.document(),
        "inputs": [{"name": file.name, "bytes": file.size, "stamp": file.stamp} for file in files],
    }
    finished = target.finished(run)
    if finished is not None:
        target.remove_leftovers()
        progress.note(f"{output} is finished already: same input, same options; nothing to do")
        return finished
    small = sum(file.size for file in files) < _SMALL_BYTES
    of_this_process = [place for place in (*(file.path for file in files), str(vocabulary)) if in_process_only(place)]
    if of_this_process:
        if scheduler is not None or (workers or 1) > 1:
            raise UserError(
                f"{of_this_process[0]} is in the memory of this process, where others cannot read it; leave --workers "
                "and --scheduler out"
            )
        workers = 1
    elif workers is None:
        workers = 1 if small else os.cpu_count() or 1
    with target.working_folder(worth_keeping=not small) as folder:
        progress.folder = folder
        facts = estimate(files, multi_hot=options.multi_hot is not None)
        job = _Job(
            options=options,
            known=known,
            vocabulary=known_folder,
            files=files,
            folder=folder,
            piece_bytes=block_bytes,
            estimate=facts,
            progress=progress,
        )
        with open_workers(workers or 1, scheduler, folder, target.goes_on) as pool:
            try:
                job.prepare(pool)
                progress.note(facts.checked(folder, target.parent, pool.count))
                schema = job.make(pool, run)
                target.deliver(job.encode_folder / "result")
            except OSError as error:
                if is_disk_full(error):
                    raise UserError(f"the disk is full ({one_line(error)}); make room. {target.goes_on}") from error
                raise
    return schema


def order_warning(dataset: Dataset | None, inputs: Sequence[Path | str]) -> str | None:
    """A line of warning if Terabyte's days seem to be given out of order, as ``day_*`` of a shell
    does (day_1, day_10, day_11, ..., day_2): the last file given is held out."""
    names = [str(path).rpartition("/")[2] for path in inputs]
    numbers = [re.findall(r"\d+", name) for name in names]
    in_order = sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    if dataset != "terabyte" or not all(numbers) or names == in_order:
        return None
    return (
        f"warning: {names[-1]} is given last, so it is held out for test and validation; in the order of days "
        f"it would be {in_order[-1]} (a shell lists day_10 before day_2; write day_{{0..23}})"
    )


@dataclass(frozen=True, kw_only=True)
class _Staged:
    """What the first stage found."""

    segments: list[Segment]
    facts: list[dict[str, Any]]
    """Of each segment."""
    file_rows: list[int]
    bad_rows: list[tuple[str, int, str]]
    """File, line (from 1) and what is wrong with it."""

    def total(self, fact: str, column: str) -> int:
        return sum(facts[fact][column] for facts in self.facts)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A run in its working folder."""

    options: Options
    known: DatasetSchema | None
    """Of the dataset whose vocabulary is used."""
    vocabulary: Folder | None
    files: list[RawFile]
    folder: Path
    piece_bytes: int
    estimate: Estimate
    progress: Progress

    @cached_property
    def labelled(self) -> bool:
        """Rows may lack labels only where a vocabulary is given."""
        return self.known is None or self.estimate.fields != len(COLUMNS) - 1

    def stage_folder(self, file: RawFile) -> Path:
        how = [_VERSION, file.key, self.piece_bytes, self.labelled, self.options.on_bad_row]
        return self.folder / "stage" / fingerprint(how)[:16]

    @cached_property
    def encode_folder(self) -> Path:
        how = [_VERSION, pa.__version__, self.options.document(), [self.stage_folder(file).name for file in self.files]]
        return self.folder / "encode" / fingerprint(how)[:16]

    def prepare(self, pool: Workers) -> None:
        """Keeps of an earlier run what is finished and of use, and removes the rest."""
        stage = [self.stage_folder(file) for file in self.files]
        for kind, wanted in (("stage", stage), ("encode", [self.encode_folder])):
            (self.folder / kind).mkdir(exist_ok=True)
            for found in (self.folder / kind).iterdir():
                if found not in wanted:
                    self.progress.note(f"removing {found}: made of other input or with other options")
                    shutil.rmtree(found)
        shutil.rmtree(self.encode_folder / "scratch", ignore_errors=True)
        remove_partial_files(self.folder)
        steps = (*stage, self.encode_folder / "ids", self.encode_folder / "parts")
        for folder in (*steps, self.encode_folder / "result"):
            folder.mkdir(parents=True, exist_ok=True)
        records = [record for folder in steps for record in find_records(folder)]
        if records:
            damaged = sum(pool.map(discard_damaged, records))
            again = f"; {damaged} were damaged and are made again" if damaged else ""
            self.progress.note(f"going on: {len(records) - damaged} steps of an earlier run are finished{again}")

    def make(self, pool: Workers, run: dict[str, Any]) -> DatasetSchema:
        """The dataset, in ``encode_folder / "result"``."""
        staged = self._stage(pool)
        rows = sum(staged.file_rows)
        encoding = Encoding(
            protocol_name=self.options.protocol,
            segments=self.encode_folder / "segments",
            rule=self._rule(staged),
            folder=self.encode_folder,
            min_count=self.options.threshold,
            max_rows=self.options.max_rows,
            minimum=self._minimum(staged),
            multi_hot=self.options.bags,
        )
        save_segments(encoding.segments, staged.segments)
        counted = self._count(pool, encoding, staged, rows)
        columns = self._columns(encoding, counted)
        splits = self._encode(pool, encoding, columns, staged)
        result = encoding.result
        if self.options.on_bad_row == "skip":
            _write_bad_rows(result / BAD_ROWS_FILE, staged.bad_rows)
        schema = DatasetSchema(
            dataset=self.options.dataset,
            protocol=self.options.protocol,
            columns=columns,
            splits=splits,
            settings=self._settings(encoding),
            vocabulary={table.name: _vocabulary_file(result, table.name) for table in self.options.rules.tables()},
            indices={c.name: self.options.bags.size(c.name) for c in columns if c.role == "multi_hot"}
            if self.options.bags
            else {},
            report=self._report(staged, counted),
        )
        write_report(result / REPORT_FILE, schema, run, self.progress.stages)
        schema.save(result)
        return schema

    def _stage(self, pool: Workers) -> _Staged:
        folders = [self.stage_folder(file) for file in self.files]
        jobs = [
            StageJob(
                source=file,
                index=index,
                folder=folder,
                piece_bytes=self.piece_bytes,
                labelled=self.labelled,
                skip_bad_rows=self.options.on_bad_row == "skip",
            )
            for file, folder in zip(self.files, folders, strict=True)
            for index in (range(-(-file.size // self.piece_bytes)) if file.compression == "none" else (None,))
        ]
        with self.progress.stage("stage", poll=_staged_so_far(folders, self.estimate.text_bytes)) as stage:
            segments: list[Segment] = []
            facts: list[dict[str, Any]] = []
            bad_rows: list[tuple[str, int, str]] = []
            file_rows = dict.fromkeys((file.path for file in self.files), 0)
            lines = dict(file_rows)
            start = 0
            for job, of_job in zip(jobs, pool.map(_stage_job, jobs), strict=True):
                path = job.source.path
                for index, found in enumerate(of_job, job.index or 0):
                    if "bad_line" in found:
                        line, fault = found["bad_line"]
                        raise UserError(f"{path}, line {lines[path] + line + 1:,}: {fault}")
                    if len(found["bad"]) > max(_BAD_ROWS_BORNE, found["rows"]):
                        line, fault = found["bad"][0]
                        raise UserError(
                            f"{path}: {len(found['bad']):,} of {found['lines']:,} lines from line {lines[path] + 1:,} "
                            f"on are not Criteo's, such as line {lines[path] + line + 1:,}: {fault}; give another file"
                        )
                    bad_rows += [(job.source.name, lines[path] + line + 1, fault) for line, fault in found["bad"]]
                    lines[path] += found["lines"]
                    file_rows[path] += found["rows"]
                    if found["rows"]:
                        place = segment_path(job.folder, index).with_suffix(".arrow")
                        segments.append(
                            Segment(path=place, start=start, rows=found["rows"], distinct=found["distinct"])
                        )
                        facts.append(found)
                        start += found["rows"]
            for path, count in lines.items():
                if not count:
                    raise UserError(
                        f"{path} is empty; expected Criteo lines of {len(COLUMNS)} fields: download it again"
                    )
            stage.reached(start, 1.0)
        return _Staged(segments=segments, facts=facts, file_rows=list(file_rows.values()), bad_rows=bad_rows)

    def _rule(self, staged: _Staged) -> SplitRule:
        if self.known is not None:
            rows = sum(staged.file_rows)
            if not rows:
                raise UserError("the input has no rows to encode")
            return SplitRule(spans=(Span(split="test", start=0, stop=rows),))
        return SplitRule(
            spans=self.options.rules.split(self.options.dataset, staged.file_rows),
            seed=self.options.seed,
            negative_sampling_rate=self.options.negative_sampling_rate,
        )

    def _minimum(self, staged: _Staged) -> dict[str, int]:
        """The least value of each integer column over all input, where the protocol asks for it."""
        if not self.options.rules.dense_needs_minimum:
            return {}
        if self.known is not None:
            minimum: dict[str, int] = dict(self.known.settings["minimum"])
            return minimum
        return {name: min(facts["minimum"][name] for facts in staged.facts) for name in CRITEO_DENSE}

    def _settings(self, encoding: Encoding) -> dict[str, Any]:
        if self.known is not None:
            return dict(self.known.settings)
        return self.options.settings() | ({"minimum": dict(encoding.minimum)} if encoding.minimum else {})

    def _count(self, pool: Workers, encoding: Encoding, staged: _Staged, rows: int) -> dict[str, dict[str, Any]]:
        """What ``count_column`` or ``look_up_column`` says of every categorical column."""
        tables = self.options.rules.tables()
        weights = {table.name: 1 + sum(s.distinct.get(table.source, 0) for s in staged.segments) for table in tables}
        # The longest first, so that no worker is left alone with one at the end.
        tables = tuple(sorted(tables, key=lambda table: -weights[table.name]))
        if self.known is None:
            jobs = [ColumnJob(encoding=encoding, table=table) for table in tables]
        else:
            assert self.vocabulary is not None
            columns = {column.name: column for column in self.known.columns}
            jobs = [
                ColumnJob(
                    encoding=encoding,
                    table=table,
                    vocabulary=self.vocabulary.absolute,
                    file=self.known.vocabulary[table.name].path,
                    column=columns[table.name],
                )
                for table in tables
            ]
        counted = {}
        with self.progress.stage("count", rows) as stage:
            for job, facts in zip(jobs, pool.map(_count_job, jobs), strict=True):
                counted[job.table.name] = facts
                stage.advance(rows * weights[job.table.name] / sum(weights.values()))
        return counted

    def _columns(self, encoding: Encoding, counted: dict[str, dict[str, Any]]) -> tuple[Column, ...]:
        label = (Column(name=CRITEO_LABEL, role="label"),) if self.labelled else ()
        if self.known is not None:
            return (*label, *(column for column in self.known.columns if column.role != "label"))
        rules, bags = self.options.rules, self.options.bags
        dense = (
            Column(name=name, role="dense", transform=rules.dense_words.format(minimum=encoding.minimum.get(name, "")))
            for name in (CRITEO_DENSE if rules.dense else ())
        )
        tables = (
            Column(
                name=table.name,
                role="multi_hot" if bags and bags.size(table.name) > 1 else "categorical",
                cardinality=counted[table.name]["cardinality"],
                transform=self._words(table.source),
                reserved=rules.reserved_of(table, self.options.threshold),
            )
            for table in rules.tables()
        )
        return (*label, *dense, *tables)

    def _words(self, source: str) -> str:
        """What is done to a categorical column, for people."""
        options, words = self.options, self.options.rules.category_words
        if options.threshold > 1:
            words += f"; rare is below {options.threshold}"
        if source not in CRITEO_CATEGORICAL:
            missing = "missing as 0, " if options.rules.missing_bin_as_value else ""
            return f"{missing}floor(log(x)^2) where x > 2, {words}"
        if options.max_rows is not None:
            words = f"hash % {options.max_rows}, {words}" if options.rules.modulo == "hash" else words
            words = f"{words}, id % {options.max_rows}" if options.rules.modulo == "id" else words
        if options.bags and options.bags.size(source) > 1:
            words += f"; a bag of {options.bags.size(source)}: the id and {options.multi_hot_distribution} ones"
        return words

    def _encode(
        self, pool: Workers, encoding: Encoding, columns: tuple[Column, ...], staged: _Staged
    ) -> dict[str, Split]:
        count = len(staged.segments)
        starts = range(0, count, _SEGMENTS_A_JOB)
        jobs = [RowsJob(encoding=encoding, start=i, stop=min(i + _SEGMENTS_A_JOB, count)) for i in starts]
        rows = np.concatenate(list(pool.map(rows_per_split, jobs)))
        files: dict[SplitName, list[DataFile]] = {}
        positives = dict.fromkeys(SPLITS, 0)
        with self.progress.stage("encode", int(rows.sum())) as stage:
            parts = list(part_jobs(encoding, columns, rows))
            for job, (file, of_part) in zip(parts, pool.map(encode_part, parts), strict=True):
                files.setdefault(job.split, []).append(file)
                positives[job.split] += of_part or 0
                stage.advance(file.rows)
        for split in SPLITS:
            if split not in files and self.known is None:
                raise UserError(f"no rows are left in the {split} split; give more input, or keep more negatives")
        return {
            split: Split(
                rows=sum(file.rows for file in files[split]),
                positives=positives[split] if self.labelled else None,
                files=tuple(files[split]),
            )
            for split in SPLITS
            if split in files
        }

    def _report(self, staged: _Staged, counted: dict[str, dict[str, Any]]) -> dict[str, Any]:
        tables = [table.name for table in self.options.rules.tables()]
        report: dict[str, Any] = {
            "rows_per_file": [[file.name, rows] for file, rows in zip(self.files, staged.file_rows, strict=True)],
            "missing": {name: staged.total("missing", name) for name in (*CRITEO_DENSE, *CRITEO_CATEGORICAL)},
        }
        if self.known is None:
            report["distinct"] = {name: counted[name]["distinct"] for name in tables}
            report["kept"] = {name: counted[name]["kept"] for name in tables}
        else:
            report["unknown"] = {name: counted[name]["unknown_rows"] for name in tables}
        if self.options.on_bad_row == "skip":
            report["bad_rows"] = len(staged.bad_rows)
        return report


def _stage_job(job: StageJob) -> list[dict[str, Any]]:
    return stage_text(job) if job.index is None else stage_piece(job)


def _count_job(job: ColumnJob) -> dict[str, Any]:
    return count_column(job) if job.vocabulary is None else look_up_column(job)


def _staged_so_far(folders: Sequence[Path], text_bytes: float) -> Callable[[], tuple[int, float]]:
    """Says how many rows are staged, and which share of the text they are, from the records found."""
    seen: dict[Path, dict[str, Any]] = {}

    def look() -> tuple[int, float]:
        for folder in folders:
            for path in find_records(folder):
                if path not in seen:
                    seen[path] = recorded(path) or {}
        rows = sum(facts.get("rows", 0) for facts in seen.values())
        return rows, sum(facts.get("text_bytes", 0) for facts in seen.values()) / max(text_bytes, 1.0)

    return look


def _vocabulary_file(result: Path, column: str) -> DataFile:
    path = f"vocabulary/{column}.parquet"
    return DataFile(path=path, sha256=file_sha256(result / path), bytes=(result / path).stat().st_size)


def _write_bad_rows(path: Path, bad_rows: Sequence[tuple[str, int, str]]) -> None:
    with written_aside(path) as partial, partial.open("w") as file:
        file.write("file\tline\treason\n")
        for name, line, reason in bad_rows:
            file.write(f"{name}\t{line}\t{reason}\n")
