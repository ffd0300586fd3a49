"""The stages that turn raw files into a dataset, in order, and the working folder in which they leave their results.

A stage is a function of one job, which any worker may do:

1. ``staging`` parses a piece of a raw file, or a whole compressed file, into segments.
2. ``counting`` takes one categorical column: it counts the values, orders them into a vocabulary, and writes the id of
   every segment's distinct values. With the vocabulary of another dataset, it looks them up. Before that, it fits the
   transforms of columns of numbers that need it.
3. ``encoding`` writes one part file of one split.

A worker holds one piece, or a bounded share of one column's distinct values, or some row groups.

Working folder::

    stage/<file>/000000.arrow ...       segments; <file> names the state of an input
    encode/<options>/segments           lists them
    encode/<options>/ids/I1.fit         numbers fitted for its transform, such as edges of quantile bins
    encode/<options>/ids/C1.ids, .ends  the ids of every segment's distinct values, and where they end
    encode/<options>/parts/             records of part files
    encode/<options>/result/            the dataset folder in the making

Each finished file has a record beside it, see ``journal``.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datamodules.folder import Folder
from datamodules.preprocess.counting import count_column, fit_column, look_up_column
from datamodules.preprocess.description import bag_sizes, cells_of, columns_of_dataset, kept_types, report_of
from datamodules.preprocess.encoding import Encoding, Part, encode_part, part_jobs, rows_per_split
from datamodules.preprocess.journal import (
    discard_damaged,
    find_records,
    fingerprint,
    recorded,
    remove_partial_files,
    written_aside,
)
from datamodules.preprocess.log_files import open_readers
from datamodules.preprocess.progress import Estimate, Progress, estimate
from datamodules.preprocess.recipe import Recipe
from datamodules.preprocess.report import REPORT_FILE, mark_of, write_report
from datamodules.preprocess.sources import RawFile
from datamodules.preprocess.splits import Span, SplitRule
from datamodules.preprocess.staging import (
    OpenSegment,
    Reader,
    Segment,
    StageJob,
    load_segments,
    save_segments,
    segment_path,
    stage,
)
from datamodules.preprocess.table_encoding import Fitted, Table
from datamodules.preprocess.workers import Workers
from datamodules.writer import data_file
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import (
    SPLITS,
    Column,
    DatasetSchema,
    Split,
    SplitName,
)

BAD_ROWS_FILE = "bad_rows.tsv"

VERSION = 7
"""Incremented if the same input would give other bytes, so that no run resumes with files of another release."""

_SEGMENTS_A_JOB = 64
_TOLERATED_BAD_ROWS = 1000
"""A piece with more bad rows, and more bad than good ones, belongs to a wrong file."""


@dataclass(kw_only=True)
class _Staged:
    """Results of the first stage."""

    rows: dict[str, int]
    """Good rows of each file."""
    lines: dict[str, int]
    """Lines of each file."""
    segments: list[Segment] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    """Of each segment."""
    bad_rows: list[tuple[str, int, str]] = field(default_factory=list)
    """File, line (from 1) and fault of each bad row."""

    @property
    def all_rows(self) -> int:
        return sum(self.rows.values())

    def add(self, job: StageJob, index: int, facts: dict[str, Any]) -> None:
        """Add the next segment of a file.

        Raises:
            UserError: a line is bad and is not to be skipped, or too many lines are.
        """
        path = job.source.path
        if "bad_line" in facts:
            line, fault = facts["bad_line"]
            raise UserError(f"{path}, {job.reader.unit} {self.lines[path] + line + 1:,}: {fault}")
        bad = [(job.source.name, self.lines[path] + line + 1, fault) for line, fault in facts["bad"]]
        if len(bad) > max(_TOLERATED_BAD_ROWS, facts["rows"]):
            raise UserError(
                f"{path}: {len(bad):,} of {facts['lines']:,} lines from line {self.lines[path] + 1:,} on are not "
                f"{job.reader.expected}, such as line {bad[0][1]:,}: {bad[0][2]}; give another file"
            )
        if facts["rows"]:
            arrow = segment_path(job.folder, index).with_suffix(".arrow")
            self.segments.append(
                Segment(path=arrow, start=self.all_rows, rows=facts["rows"], distinct=facts["distinct"])
            )
            self.facts.append(facts)
        self.bad_rows += bad
        self.lines[path] += facts["lines"]
        self.rows[path] += facts["rows"]


@dataclass(kw_only=True)
class Job:
    """One run of ``preprocess``, in its working folder."""

    recipe: Recipe
    known: DatasetSchema | None
    """Schema of the dataset whose vocabulary is used."""
    vocabulary: Folder | None
    """Folder of that dataset."""
    files: list[RawFile]
    piece_bytes: int
    progress: Progress
    fitted: Fitted
    """The numbers that were fitted to the dataset whose vocabulary is used."""
    folder: Path = field(init=False)

    @cached_property
    def readers(self) -> Sequence[Reader]:
        """The reader of each file. Rows without labels need a vocabulary.

        Raises:
            UserError: a file has other columns than the schema, or some files have labels and others have not.
        """
        return open_readers(self.files, self.recipe.schema, self.piece_bytes, self.known is None)

    @property
    def labelled(self) -> bool:
        return self.readers[0].labelled

    @cached_property
    def estimate(self) -> Estimate:
        """Time, memory and disk that the run needs."""
        known_rows = {file.path: reader.rows for file, reader in zip(self.files, self.readers, strict=True)}
        header_lines = sum(reader.header_lines for reader in self.readers)
        return estimate(self.files, self.recipe.row_bytes, known_rows, header_lines)

    def stage_folder(self, file: RawFile) -> Path:
        piece_bytes, reader = file.piece_bytes(self.piece_bytes), self.readers[0]
        how = [VERSION, file.key, piece_bytes, reader.labelled, self.recipe.on_bad_row, *reader.key]
        return self.folder / "stage" / fingerprint(how)[:16]

    @cached_property
    def encode_folder(self) -> Path:
        how = [VERSION, pa.__version__, self.recipe.document(), [self.stage_folder(file).name for file in self.files]]
        return self.folder / "encode" / fingerprint(how)[:16]

    def prepare(self, pool: Workers) -> None:
        """Keep the finished steps of an earlier run that this run needs, and remove the rest."""
        stage_folders = [self.stage_folder(file) for file in self.files]
        for kind, wanted in (("stage", stage_folders), ("encode", [self.encode_folder])):
            (self.folder / kind).mkdir(exist_ok=True)
            for found in (self.folder / kind).iterdir():
                if found not in wanted:
                    self.progress.note(f"removing {found}: it was made from other input or with other options")
                    shutil.rmtree(found)
        shutil.rmtree(self.encode_folder / "scratch", ignore_errors=True)
        remove_partial_files(self.folder)
        steps = (*stage_folders, self.encode_folder / "ids", self.encode_folder / "parts")
        for folder in (*steps, self.encode_folder / "result"):
            folder.mkdir(parents=True, exist_ok=True)
        if records := [record for folder in steps for record in find_records(folder)]:
            damaged = sum(pool.map(discard_damaged, records))
            again = f"; damaged steps, which are repeated: {damaged}" if damaged else ""
            self.progress.note(f"resuming: {len(records) - damaged} steps of an earlier run are finished{again}")

    def make(self, pool: Workers, run: dict[str, Any]) -> DatasetSchema:
        """Make the dataset in ``encode_folder / "result"`` and return its schema."""
        recipe = self.recipe
        staged = self._stage(pool)
        segments = self.encode_folder / "segments"
        save_segments(segments, staged.segments)
        encoding = Encoding(
            recipe=recipe,
            segments=segments,
            rule=self._rule(staged, segments),
            folder=self.encode_folder,
            fitted=self.fitted,
        )
        if self.known is None:
            encoding = replace(encoding, fitted=self._fit(pool, encoding, staged))
        counted = self._count(pool, encoding, staged)
        columns = columns_of_dataset(encoding, self.known, self.labelled, counted, kept_types(staged.facts))
        splits, parts = self._encode(pool, encoding, columns, staged)
        cells = cells_of(parts)
        result = encoding.result
        if recipe.on_bad_row == "skip":
            _write_bad_rows(result / BAD_ROWS_FILE, staged.bad_rows)
        schema = DatasetSchema(
            dataset=recipe.schema.dataset,
            protocol=recipe.protocol,
            columns=columns,
            splits=splits,
            settings=(dict(self.known.settings) if self.known else recipe.settings(encoding.fitted)),
            vocabulary={table.name: data_file(result, f"vocabulary/{table.name}.parquet") for table in encoding.tables},
            indices=bag_sizes(encoding.tables, staged.facts),
            cells=cells,
            report=report_of(
                recipe,
                [[file.name, staged.rows[file.path]] for file in self.files],
                staged.facts,
                counted,
                cells,
                len(staged.bad_rows),
                [part.sizes for _, part in parts],
            ),
        )
        generated = any(_is_generated(file) for file in self.files)
        write_report(result / REPORT_FILE, schema, run, self.progress.stages, generated)
        schema.save(result)
        return schema

    def _stage(self, pool: Workers) -> _Staged:
        folders = [self.stage_folder(file) for file in self.files]
        jobs = [
            StageJob(
                source=file,
                reader=reader,
                index=index,
                segments=segments,
                folder=folder,
                piece_bytes=file.piece_bytes(self.piece_bytes),
                skip_bad_rows=self.recipe.on_bad_row == "skip",
            )
            for file, folder, reader in zip(self.files, folders, self.readers, strict=True)
            for index, segments in reader.jobs(file, file.piece_bytes(self.piece_bytes))
        ]
        staged = _Staged(rows={file.path: 0 for file in self.files}, lines={file.path: 0 for file in self.files})
        with self.progress.stage("stage", poll=_staged_so_far(folders, self.estimate.text_bytes)) as shown:
            for job, of_job in zip(jobs, pool.map(stage, jobs), strict=True):
                for index, facts in enumerate(of_job, job.segments.start if job.segments else 0):
                    staged.add(job, index, facts)
            for file in self.files:
                self._require_rows(file, staged)
            shown.reached(staged.all_rows, 1.0)
        return staged

    def _require_rows(self, file: RawFile, staged: _Staged) -> None:
        path = file.path
        lines = staged.lines[path]
        require(lines, f"{path} is empty; expected {self.readers[0].expected}: download it again")
        if not staged.rows[path]:
            has_bad = any(name == file.name for name, _, _ in staged.bad_rows)
            require(has_bad, f"{path} has a header and no rows; give files with rows")
            _, line, fault = next(bad for bad in staged.bad_rows if bad[0] == file.name)
            raise UserError(f"{path}: all {lines:,} lines are bad, such as line {line:,}: {fault}")

    def _rule(self, staged: _Staged, segments: Path) -> SplitRule:
        if self.known is not None:
            require(staged.all_rows, "the input has no rows to encode; give a file with rows")
            return SplitRule(spans=(Span(split="test", start=0, stop=staged.all_rows),))
        return self.recipe.rule(self.files, list(staged.rows.values()), partial(_split_keys, segments))

    def _fit(self, pool: Workers, encoding: Encoding, staged: _Staged) -> Fitted:
        """Fit the transforms of numbers to the rows."""
        fits = self.recipe.fitted_columns
        found: dict[str, dict[str, Any]] = {"minimum": self.recipe.minimum(staged.facts)}
        if fits:
            with self.progress.stage("bins", staged.all_rows) as shown:
                for name, facts in zip(fits, pool.map(partial(fit_column, encoding), fits), strict=True):
                    for kind, values in facts.items():
                        found.setdefault(kind, {})[name] = values
                    shown.advance(staged.all_rows / len(fits))
        return Fitted(**found)

    def _check_splits(self, made: Mapping[str, Split]) -> None:
        """Check that each split has rows, and, if the user gave a schema, rows of both labels.

        Raises:
            UserError: a split has no rows, or only rows of one label.
        """
        if self.known is not None:
            return
        schema = self.recipe.schema
        for split in self.recipe.wanted_splits():
            sampled = split == "train" and schema.split.negative_sampling_rate < 1
            remedy = "keep more negatives" if sampled else "change split in the schema"
            # A split of few different times.
            why = " (rows of equal time stay in one split)" if schema.split.by == "time" else ""
            require(split in made, f"no rows are left in the {split} split{why}; give more input, or {remedy}")
            rows, positives = made[split].rows, made[split].positives
            # --dataset and --protocol made datasets of one label in earlier releases; preprocess warns of them.
            if self.recipe.options is None and positives in (0, rows):
                from datamodules.preprocess.labels import describe_label  # for this message alone

                why = describe_label(schema, [file.path for file in self.files])
                changed = "split" if self.recipe.of_criteo else "label or split"
                raise UserError(
                    f"every label of the {split} split is {int(positives == rows)} ({rows:,} in all); expected "
                    f"labels 0 and 1: {why}; "
                    f"give more input, or change {changed} in the schema"
                )

    def _count(self, pool: Workers, encoding: Encoding, staged: _Staged) -> dict[str, dict[str, Any]]:
        """Return the results of ``count_column`` or ``look_up_column`` by column."""
        tables = encoding.tables
        weights = {table.name: 1 + sum(s.distinct.get(table.source, 0) for s in staged.segments) for table in tables}
        # The largest columns first, so that no worker is left with one at the end.
        tables = tuple(sorted(tables, key=lambda table: -weights[table.name]))
        if self.known is None or self.vocabulary is None:
            count: Callable[[Table], dict[str, Any]] = partial(count_column, encoding)
        else:
            count = partial(look_up_column, encoding, self.vocabulary.absolute, self.known)
        counted = {}
        with self.progress.stage("count", staged.all_rows) as shown:
            for table, facts in zip(tables, pool.map(count, tables), strict=True):
                counted[table.name] = facts
                shown.advance(staged.all_rows * weights[table.name] / sum(weights.values()))
        return counted

    def _encode(
        self, pool: Workers, encoding: Encoding, columns: tuple[Column, ...], staged: _Staged
    ) -> tuple[dict[str, Split], list[tuple[SplitName, Part]]]:
        """Return the splits, and the part files with their splits."""
        count = len(staged.segments)
        some = [range(start, min(start + _SEGMENTS_A_JOB, count)) for start in range(0, count, _SEGMENTS_A_JOB)]
        rows = np.concatenate(list(pool.map(partial(rows_per_split, encoding), some)))
        parts: list[tuple[SplitName, Part]] = []
        with self.progress.stage("encode", int(rows.sum())) as shown:
            jobs = list(part_jobs(encoding, columns, rows))
            for job, part in zip(jobs, pool.map(encode_part, jobs), strict=True):
                parts.append((job.split, part))
                shown.advance(part.file.rows)
        of_splits = {split: [part for of_part, part in parts if of_part == split] for split in SPLITS}
        made: dict[str, Split] = {
            split: Split(
                rows=sum(part.file.rows for part in of_split),
                positives=sum(part.positives or 0 for part in of_split) if self.labelled else None,
                files=tuple(part.file for part in of_split),
            )
            for split, of_split in of_splits.items()
            if of_split
        }
        self._check_splits(made)
        return made, parts


def _split_keys(segments: Path) -> Iterator[np.ndarray]:
    """Yield what each segment is split by."""
    for segment in load_segments(segments):
        with OpenSegment(segment) as opened:
            assert opened.split_keys is not None
            yield opened.split_keys


def _staged_so_far(folders: Sequence[Path], text_bytes: float) -> Callable[[], tuple[int, float]]:
    """Return a function that finds, from the records, how many rows are staged and which share of the text they are."""
    seen: dict[Path, dict[str, Any]] = {}

    def look() -> tuple[int, float]:
        for path in (path for folder in folders for path in find_records(folder)):
            if path not in seen:
                seen[path] = recorded(path) or {}
        rows = sum(facts.get("rows", 0) for facts in seen.values())
        return rows, sum(facts.get("text_bytes", 0) for facts in seen.values()) / max(text_bytes, 1.0)

    return look


def _is_generated(file: RawFile) -> bool:
    """Whether ``generate`` has left its mark beside a file of this size."""
    mark = mark_of(Path(file.path))
    return mark.is_file() and mark.read_text() == str(file.size)


def _write_bad_rows(path: Path, bad_rows: Sequence[tuple[str, int, str]]) -> None:
    with written_aside(path) as partial, partial.open("w") as file:
        file.write("file\tline\treason\n")
        for name, line, reason in bad_rows:
            file.write(f"{name}\t{line}\t{reason}\n")
