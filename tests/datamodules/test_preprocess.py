"""Contract: ``preprocess`` turns raw Criteo TSV into exactly the dataset that its protocol defines.

``raw_criteo.Plain`` is every protocol in plain Python (split, dicts, math.log). Whatever the input's
form (compression, line ends, files, piece size), ids equal its ids and dense values its values;
equal input gives equal bytes; wrong input gives one line with file, line and remedy, and leaves
nothing behind.
"""

import argparse
import gzip
import io
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from datamodules import writer as writing
from datamodules.encoder import RowEncoder
from datamodules.folder import Folder
from datamodules.log_schema import log_schema, read_log_schema
from datamodules.log_settings import LogSplit, MlperfBags
from datamodules.preprocess import command, counting, encoding, progress
from datamodules.preprocess.criteo_tsv import COLUMNS, BadLineError, parse
from datamodules.preprocess.multi_hot import MLPERF_SIZES
from datamodules.preprocess.options import Options
from datamodules.preprocess.pipeline import order_warning, preprocess
from datamodules.preprocess.progress import Progress
from datamodules.preprocess.protocols import PROTOCOLS, Dataset
from datamodules.preprocess.report import render_report
from datamodules.preprocess.sources import find_files
from datamodules.preprocess.staging import PIECE_BYTES
from datamodules.preprocess.tables import encode
from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE, SPLITS, DatasetSchema
from lightning_dlrm.contracts.shipped import shipped_names
from tests.raw_criteo import (
    SAMPLE,
    Line,
    Plain,
    assert_equals_plain,
    assert_rows,
    folder_bytes,
    generated_lines,
    mixed,
    schema_of_some,
    written,
)

QUIET = Progress(show=False)

# Several files, below, are read without options.
EVERY_PROTOCOL = [
    ("dlrm", {"max_rows": 1}),
    ("dlrm", {"max_rows": 10, "negative_sampling_rate": 0.25, "seed": 7}),
    ("dlrm", {"max_rows": 2**40, "min_count": 60}),
    ("mlperf", {"max_rows": 7}),
    ("mlperf", {"max_rows": 2**40}),
    ("mlperf", {"max_rows": 30, "min_count": 5}),
    ("nvidia", {"min_count": 3}),
    ("bars", {"min_count": 2, "seed": 2018, "negative_sampling_rate": 0.5}),
    ("quantile", {"bins": 2, "min_count": 1}),
    ("quantile", {"bins": 256, "min_count": 20, "negative_sampling_rate": 0.9}),
    ("modern", {"min_count": 1}),
    ("modern", {"min_count": 20, "negative_sampling_rate": 0.9}),
]


@pytest.mark.parametrize(("protocol", "options"), EVERY_PROTOCOL, ids=str)
def test_single_file_equals_plain_protocol(tmp_path: Path, protocol: str, options: dict[str, Any]) -> None:
    lines = generated_lines(403)
    raw = written(tmp_path / "train.txt", lines)
    preprocess("kaggle", protocol, [raw], tmp_path / "out", progress=QUIET, **options)
    schema = assert_equals_plain(tmp_path / "out", Plain(protocol, [lines], "kaggle", **options))
    assert schema.dataset == "kaggle"
    assert options.items() <= schema.settings.items()
    assert schema.report["missing"] == {
        name: sum(not line[position] for line in lines)
        for position, name in enumerate((*CRITEO_DENSE, *CRITEO_CATEGORICAL), 1)
    }


@pytest.mark.parametrize(
    ("dataset", "protocol"),
    # mlperf: test_bad_rows_are_left_out_and_listed. dlrm of several days: with spilled counts.
    [
        *(("terabyte", name) for name in PROTOCOLS if name not in ("mlperf", "dlrm")),
        ("kaggle", "dlrm"),
        ("kaggle", "bars"),
    ],
)
def test_several_files_equal_plain_protocol(tmp_path: Path, dataset: Dataset, protocol: str) -> None:
    files = [generated_lines(50, 1), generated_lines(1, 2), generated_lines(75, 3), generated_lines(31, 4)]
    paths = [
        written(tmp_path / f"day_{day}{suffix}", lines)
        for day, (lines, suffix) in enumerate(zip(files, ("", ".gz", ".zst", ""), strict=True))
    ]
    preprocess(dataset, protocol, paths, tmp_path / "out", progress=QUIET, block_bytes=9000)
    schema = assert_equals_plain(tmp_path / "out", Plain(protocol, files, dataset))
    assert schema.report["rows_per_file"] == [["day_0", 50], ["day_1.gz", 1], ["day_2.zst", 75], ["day_3", 31]]


def test_dlrm_without_options_has_no_settings(tmp_path: Path) -> None:
    """A dataset of the first release and one of this are one to a model: the same encoding fingerprint."""
    raw = written(tmp_path / "train.txt", generated_lines(20))
    assert dict(preprocess("kaggle", "dlrm", [raw], tmp_path / "out", progress=QUIET).settings) == {}


@pytest.mark.parametrize("protocol", ["dlrm", "quantile"])
def test_spilled_counts_equal_plain_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    monkeypatch.setattr(counting, "_VALUES_AT_ONCE", 60)
    monkeypatch.setattr(counting, "_IDS_AT_ONCE", 16)
    files = [generated_lines(123, 1), generated_lines(71, 2)]
    paths = [written(tmp_path / f"day_{day}", lines) for day, lines in enumerate(files)]
    preprocess("terabyte", protocol, paths, tmp_path / "out", progress=QUIET, block_bytes=9000)
    assert_equals_plain(tmp_path / "out", Plain(protocol, files, "terabyte"))


def test_spilling_needs_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terabyte's large columns take hundreds of ranges, on Dask in many threads of one process."""
    monkeypatch.setattr(counting, "_VALUES_AT_ONCE", 2)
    # One column of many values is enough; the others are empty.
    lines = [[*line[:15], *[""] * 25] for line in generated_lines(120)]
    raw = written(tmp_path / "train.txt", lines)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 40, limits[1]))
    try:
        schema = preprocess("kaggle", "dlrm", [raw], tmp_path / "out", progress=QUIET, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert max(schema.report["distinct"].values()) > 100, "more than 50 ranges"
    assert_equals_plain(tmp_path / "out", Plain("dlrm", [lines], "kaggle"))


@pytest.mark.parametrize("protocol", ["dlrm", "bars"])
def test_part_files_are_cut_where_the_writer_cuts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr(writing, "ROW_GROUP_ROWS", 16)
    for module in (writing, encoding):
        monkeypatch.setattr(module, "ROWS_PER_FILE", 64)
    lines = generated_lines(250)
    schema = preprocess(
        "kaggle", protocol, [written(tmp_path / "raw", lines)], tmp_path / "out", progress=QUIET, block_bytes=20_000
    )
    assert_equals_plain(tmp_path / "out", Plain(protocol, [lines], "kaggle"))
    for split in schema.splits.values():
        groups = [rows for file in split.files for rows in file.row_groups]
        assert all(rows == 16 for rows in groups[:-1])
        assert all(file.rows == 64 for file in split.files[:-1])


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_form_of_the_input_does_not_change_a_byte(tmp_path: Path) -> None:
    lines = generated_lines(15)
    split = {"by": "position", "ratios": [0.4, 0.3, 0.3]}
    schema = schema_of_some("dlrm", ["I1", "I13", "C1", "C13", "C26"], split=split)
    forms: dict[str, Callable[[Path], Path]] = {
        "plain": lambda folder: written(folder / "train", lines),
        "gzip without suffix": lambda folder: written(folder / "train.gz", lines).rename(folder / "train"),
        "zstd without suffix": lambda folder: written(folder / "train.zst", lines).rename(folder / "train"),
        "crlf": lambda folder: written(folder / "train", lines, end="\r\n"),
        "no final line end": lambda folder: written(folder / "train", lines, last_end=False),
        "crlf, no final line end": lambda folder: written(folder / "train", lines, end="\r\n", last_end=False),
        "gzip, no final line end": lambda folder: written(folder / "t.gz", lines, last_end=False).rename(
            folder / "train"
        ),
    }
    results = {}
    for name, make in forms.items():
        # 101 bytes are less than a line.
        sizes = {"plain": (PIECE_BYTES,), "crlf": (101,), "gzip, no final line end": (101, 4096)}
        for piece_bytes in sizes.get(name, (1000,)):
            folder = tmp_path / name / str(piece_bytes)
            folder.mkdir(parents=True)
            options: dict[str, Any] = {"schema": schema, "progress": QUIET, "block_bytes": piece_bytes}
            preprocess(None, None, [make(folder)], folder / "out", **options)
            results[name, piece_bytes] = folder_bytes(folder / "out")
    first = results.pop(("plain", PIECE_BYTES))
    assert len(first) == 3 + 3 + 1
    for form, files in results.items():
        assert files == first, form


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_file_of_several_members(tmp_path: Path, suffix: str) -> None:
    lines = generated_lines(60)
    parts = [written(tmp_path / f"{i}{suffix}", lines[i::2]).read_bytes() for i in range(2)]
    (tmp_path / f"day{suffix}").write_bytes(b"".join(parts))
    preprocess("kaggle", "dlrm", [tmp_path / f"day{suffix}"], tmp_path / "out", progress=QUIET)
    assert_equals_plain(tmp_path / "out", Plain("dlrm", [lines[0::2] + lines[1::2]], "kaggle"))


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"the real sample is not at {SAMPLE}")
@pytest.mark.parametrize(
    ("protocol", "rows"),
    [
        *((protocol, 500) for protocol in ("dlrm", "bars", "quantile")),
        *(pytest.param(protocol, 10_000, marks=pytest.mark.slow) for protocol in PROTOCOLS),
    ],
)
def test_real_sample(tmp_path: Path, protocol: str, rows: int) -> None:
    text = SAMPLE.read_text().splitlines(keepends=True)[:rows]
    assert len(text) == rows
    lines = [line.removesuffix("\n").split("\t") for line in text]
    (tmp_path / "day_0").write_text("".join(text))
    preprocess("terabyte", protocol, [tmp_path / "day_0"], tmp_path / "out", progress=QUIET, block_bytes=50 * rows)
    assert_equals_plain(tmp_path / "out", Plain(protocol, [lines], "terabyte"))


def test_the_shipped_schema_of_a_protocol_makes_its_rows_and_vocabularies(tmp_path: Path) -> None:
    """``--schema criteo_dlrm.yaml`` is ``--protocol dlrm``, also for new rows and rows in memory."""
    lines, new_lines = generated_lines(203), generated_lines(40, 5)
    new_lines[3][16], new_lines[4][15] = "12345678", "9abcdef0"
    raw, new = written(tmp_path / "train.txt", lines), written(tmp_path / "new.txt", [row[1:] for row in new_lines])
    of_new = pa.table(dict(zip(COLUMNS, zip(*new_lines, strict=True), strict=True)))
    shipped = {name for name in shipped_names() if name.startswith("datasets/criteo_") and "_x" not in name}
    assert shipped == {f"datasets/criteo_{protocol}.yaml" for protocol in PROTOCOLS}
    for protocol in PROTOCOLS:
        made = {}
        # Options make the schemas that are shipped, as the next test shows: one protocol of each kind is made twice.
        for way in ("short", "schema") if protocol in ("dlrm", "quantile") else ("schema",):
            out = tmp_path / protocol / way
            schema = None if way == "short" else read_log_schema(f"datasets/criteo_{protocol}.yaml")
            names = ("kaggle", protocol) if schema is None else (None, None)
            known = preprocess(*names, [raw], out / "known", progress=QUIET, schema=schema)  # type: ignore[arg-type]
            files = {name: data for name, data in folder_bytes(out).items() if name.endswith(".parquet")}
            columns = [replace(column, transform="") for column in known.columns]
            made[way] = files, columns, known.splits, known.report
        of_vocabulary = preprocess(None, None, [new], out / "new", progress=QUIET, vocabulary=out / "known")
        assert of_vocabulary.encoding_fingerprint == known.encoding_fingerprint
        assert of_vocabulary.report["unknown"]["C1"] > 0
        plain = Plain(protocol, [lines], "kaggle")
        assert_rows(pq.read_table(out / "new/test"), [plain.encoded(line[1:]) for line in new_lines])
        rows, stored = RowEncoder(out / "known").encode(of_new), pq.read_table(out / "new/test")
        for name in stored.column_names:
            np.testing.assert_array_equal(rows[name], stored.column(name).to_numpy())
        if protocol in ("dlrm", "bars", "quantile"):  # without bins, with bins as integers, and with those of quantiles
            encode(of_new.drop_columns(["label"]), None, out / "of_table", vocabulary=out / "known")
            assert pq.read_table(out / "of_table/test").equals(stored)
        assert made.get("short", made["schema"]) == made["schema"], protocol
    bags = replace(read_log_schema("datasets/criteo_mlperf.yaml"), mlperf_bags=MlperfBags())
    preprocess(None, None, [raw], tmp_path / "bags", progress=QUIET, schema=bags)
    of_known = pa.table(dict(zip(COLUMNS, zip(*lines, strict=True), strict=True)))
    schema = encode(of_known, bags, tmp_path / "bags_of_table")
    assert schema.settings["schema"]["format"] == "criteo"
    for split in SPLITS:
        assert pq.read_table(tmp_path / "bags" / split).equals(pq.read_table(tmp_path / "bags_of_table" / split))


def test_options_say_in_short_what_a_changed_schema_says() -> None:
    for protocol in PROTOCOLS:
        shipped = read_log_schema(f"datasets/criteo_{protocol}.yaml")
        assert Options(dataset="kaggle", protocol=protocol).schema() == shipped
    short = Options(dataset="terabyte", protocol="mlperf", max_rows=40_000_000, multi_hot="mlperf")
    split = {"by": "days", "days": "files", "held_out": ["validation", "test"]}
    keys = {"dataset": "terabyte", "split": split, "id_modulo": 40_000_000, "mlperf_bags": {}}
    assert log_schema({**read_log_schema("datasets/criteo_mlperf.yaml").document(), **keys}) == short.schema()


def test_a_protocol_can_be_changed_in_its_schema(tmp_path: Path) -> None:
    lines = generated_lines(300)
    raw = written(tmp_path / "train.txt", lines)
    document = read_log_schema("datasets/criteo_quantile.yaml").document()
    columns = {**document["columns"], "C2": {"role": "leave"}, "C3": {"role": "categorical", "type": "hash"}}
    columns |= {"C3": {**columns["C3"], "min_count": 40}, "again": {**columns["C3"], "source": "C4"}}
    changed_schema = {**document, "columns": columns, "split": {"by": "position", "ratios": [0.5, 0.2, 0.3]}}
    schema = preprocess(None, None, [raw], tmp_path / "out", progress=QUIET, schema=log_schema(changed_schema))
    assert [split.rows for split in schema.splits.values()] == [150, 60, 90]
    plain = Plain("quantile", [lines[:150], []], "terabyte")
    train = pq.read_table(tmp_path / "out/train")
    counts = Counter(line[16].lower() for line in lines[:150] if line[16])
    assert schema.features.tables["C3"] == 2 + sum(count >= 40 for count in counts.values())
    assert train.column("again").equals(train.column("C4")) and "C2" not in train.column_names
    assert train.column("C5").to_pylist() == [plain.id_of("C5", line[18]) for line in lines[:150]]
    table = pa.table(dict(zip(COLUMNS, zip(*lines, strict=True), strict=True)))
    encode(table, log_schema(changed_schema), tmp_path / "in_memory")
    assert pq.read_table(tmp_path / "in_memory/train").equals(train)
    del changed_schema["columns"]["C2"]
    with pytest.raises(
        UserError, match="format criteo has columns that the schema does not name: C2; name them in col"
    ):
        preprocess(None, None, [raw], tmp_path / "bad", progress=QUIET, schema=log_schema(changed_schema))


@pytest.mark.parametrize("distribution", ["uniform", "pareto"])
def test_multi_hot_bags(tmp_path: Path, distribution: Any) -> None:
    lines = generated_lines(300)
    raw = written(tmp_path / "day", lines)
    options = {"multi_hot": "mlperf", "multi_hot_distribution": distribution, "seed": 3}
    schema = preprocess("terabyte", "mlperf", [raw], tmp_path / "out", 40, QUIET, **options)  # type: ignore[arg-type]
    plain = Plain("mlperf", [lines], "terabyte", 40)
    table = pq.read_table(tmp_path / "out/train")
    for position, column in enumerate(schema.columns[14:]):
        size, rows = MLPERF_SIZES[column.name], plain.rows[column.name]
        ids = [int(row[column.name] or 0) for row in plain.splits["train"]]
        assert (column.role, column.cardinality) == ("categorical" if size == 1 else "multi_hot", rows)
        if size == 1:
            assert table.column(column.name).to_pylist() == ids
            continue
        expected = []
        for row in ids:
            bag = [row]
            for place in range(1, size):
                drawn = mixed(3, 16 + position, row * size + place) >> 32
                if distribution == "uniform":
                    bag.append(drawn * rows >> 32)
                else:
                    bag.append(int(int((1 - drawn / 2**32) ** -4.0 - 1) % rows) if drawn else 0)
            expected.append(bag)
        found = table.column(column.name).to_pylist()
        if distribution == "uniform":
            assert found == expected
        else:  # the plain power is rounded otherwise in the last digits, which matters for the largest draws alone
            assert [bag[0] for bag in found] == ids
            same = np.mean([a == b for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)])
            assert same > 0.95
            assert all(0 <= value < rows for bag in found for value in bag)


def changed(row: int, column: int, text: str) -> Callable[[list[Line]], None]:
    def change(lines: list[Line]) -> None:
        lines[row][column] = text

    return change


def shortened(row: int, fields: int) -> Callable[[list[Line]], None]:
    def change(lines: list[Line]) -> None:
        lines[row] = (lines[row] * 2)[:fields]

    return change


BAD_LINES = {
    "a field too few": (shortened(70, 39), 71, "39 fields, expected 40"),
    "a field too many": (shortened(3, 41), 4, "41 fields, expected 40"),
    "an empty line": (shortened(70, 0), 71, "1 field, expected 40"),
    "label 2": (changed(70, 0, "2"), 71, "label is '2', expected the label 0 or 1"),
    "negative label": (changed(70, 0, "-1"), 71, "label is '-1'"),
    "label missing": (changed(99, 0, ""), 100, "label is ''"),
    "label a word": (changed(0, 0, "label"), 1, "label is 'label'"),
    "fraction": (changed(70, 5, "1.5"), 71, "I5 is '1.5', expected an integer of 32 bits"),
    "integer a word": (changed(70, 1, "nan"), 71, "I1 is 'nan'"),
    "hexadecimal integer": (changed(70, 13, "0x1F"), 71, "I13 is '0x1F'"),
    "space": (changed(70, 13, " 1"), 71, "I13 is ' 1'"),
    "integer too large": (changed(70, 2, "2147483648"), 71, "I2 is '2147483648', expected an integer of 32 bits"),
    "integer too small": (changed(70, 2, "-2147483649"), 71, "I2 is '-2147483649'"),
    "huge integer": (changed(70, 2, "9" * 5000), 71, "(5,000 bytes), expected an integer"),
    "hash not hexadecimal": (changed(70, 14, "0123456g"), 71, "C1 is '0123456g', expected 8 hexadecimal digits"),
    "hash with a sign": (changed(70, 39, "-1234567"), 71, "C26 is '-1234567'"),
    "hash too short": (changed(70, 39, "1234567"), 71, "C26 is '1234567'"),
    "hash too long": (changed(70, 20, "123456789"), 71, "C7 is '123456789'"),
    "hash not ASCII": (changed(70, 20, "é123456"), 71, "C7 is 'é123456'"),
    "carriage return inside": (changed(70, 20, "\r"), 71, r"C7 is '\r'"),
    "binary": (changed(70, 20, "\0"), 71, "binary data"),
}


ALSO_IN_GZIP = ("a field too few", "label missing", "hash with a sign", "binary")


@pytest.mark.parametrize(
    ("case", "name"), [*((case, "train.txt") for case in BAD_LINES), *((case, "train.txt.gz") for case in ALSO_IN_GZIP)]
)
def test_bad_line_is_named(tmp_path: Path, case: str, name: str) -> None:
    change, number, message = BAD_LINES[case]
    raw_path = tmp_path / name
    block_bytes = 1000 if raw_path.suffix == ".gz" else PIECE_BYTES
    lines = generated_lines(100)
    change(lines)
    written(raw_path, lines, last_end=case != "label missing")
    with pytest.raises(UserError) as error:
        preprocess("kaggle", "dlrm", [raw_path], raw_path.parent / "out", progress=QUIET, block_bytes=block_bytes)
    text = str(error.value)
    assert text.startswith(f"{raw_path}, line {number}: ") and message in text and "\n" not in text
    assert text.endswith("download the file again")
    assert names_in(raw_path.parent) == {raw_path.name}


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
def test_first_of_several_bad_lines_is_named(tmp_path: Path, name: str) -> None:
    raw_path = tmp_path / name
    lines = generated_lines(300)
    for row in (120, 200, 250):
        lines[row][14] = "?"
    written(raw_path, lines)
    with pytest.raises(UserError, match=r"line 121: C1 is '\?'"):
        preprocess("kaggle", "dlrm", [raw_path], raw_path.parent / "out", progress=QUIET, block_bytes=2000)


def test_bad_line_in_a_later_file_is_named(tmp_path: Path) -> None:
    good, lines = generated_lines(40), generated_lines(40)
    lines[17][0] = "x"
    paths = [written(tmp_path / "day_0", good), written(tmp_path / "day_1", lines)]
    with pytest.raises(UserError, match=r"day_1, line 18: label is 'x'"):
        preprocess("terabyte", "dlrm", paths, tmp_path / "out", progress=QUIET)
    assert names_in(tmp_path) == {"day_0", "day_1"}


@settings(max_examples=300)
@given(
    column=st.integers(0, 39),
    text=st.text("0123456789abfgxX-+. \t\r\n\"'\0é", max_size=10) | st.integers(-(2**33), 2**33).map(str),
)
def test_fast_and_exact_check_agree(column: int, text: str) -> None:
    """Whatever stands in one field: a line is parsed to just what it says, or refused."""
    line = generated_lines(1)[0]
    line[column] = text
    try:
        table = parse("\t".join(line).encode() + b"\n")
    except BadLineError as error:
        assert "not a Criteo line" not in str(error), "the exact check found nothing wrong"
        return
    text = text.removesuffix("\r") if column == 39 else text
    base = 10 if column < 14 else 16
    assert table.column(column).to_pylist() == [int(text, base) if text else None]


@pytest.mark.parametrize(("piece_bytes", "suffix"), [(3000, ""), (9000, ".gz"), (PIECE_BYTES, "")])
def test_bad_rows_are_left_out_and_listed(tmp_path: Path, piece_bytes: int, suffix: str) -> None:
    files = [generated_lines(80, 1), generated_lines(60, 2)]
    bad = {0: {0: "label", 7: "gone", 8: "hash", 79: "hash"}, 1: {35: "gone", 59: "label"}}
    good = [[line for row, line in enumerate(lines) if row not in bad[file]] for file, lines in enumerate(files)]
    expected = []
    for file, rows in bad.items():
        for row, kind in rows.items():
            line = files[file][row] = list(files[file][row])
            if kind == "gone":
                del line[5:]
                reason = "5 fields, expected 40"
            else:
                line[0 if kind == "label" else 39] = "?"
                reason = f"{'label' if kind == 'label' else 'C26'} is '?', expected"
            expected.append((f"day_{file}{suffix}", row + 1, reason))
    paths = [written(tmp_path / f"day_{i}{suffix}", lines) for i, lines in enumerate(files)]
    schema = preprocess(
        "terabyte", "mlperf", paths, tmp_path / "out", progress=QUIET, on_bad_row="skip", block_bytes=piece_bytes
    )
    assert_equals_plain(tmp_path / "out", Plain("mlperf", good, "terabyte"))
    header, *listed = (tmp_path / "out/bad_rows.tsv").read_text().splitlines()
    assert header == "file\tline\treason" and len(listed) == len(expected) == schema.report["bad_rows"]
    for found, (name, number, reason) in zip(listed, expected, strict=True):
        assert found.startswith(f"{name}\t{number}\t{reason}")


def test_a_split_of_one_label_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [["0", *rest] if row % 3 else ["click", *rest] for row, (_, *rest) in enumerate(generated_lines(300))]
    options = ["--dataset", "kaggle", "--protocol", "dlrm", "--on-bad-row", "skip", "--workers", "1"]
    paths = ["--input", str(written(tmp_path / "train.txt", lines)), "--output", str(tmp_path / "out")]
    assert main(["preprocess", *options, *paths]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    splits = ("train", "validation", "test")
    assert [line.partition("have the label")[2][:3] for line in told] == [" 0,"] * 6
    assert all(f"the {split} split" in line for split, line in zip(splits * 2, told, strict=True))


def test_a_wrong_file_is_not_skipped_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("to do\n" * 1001)
    with pytest.raises(
        UserError,
        match=r"notes\.txt: 1,001 of 1,001 lines from line 1 on are not Criteo lines of 40 fields, such as line 1",
    ):
        preprocess("kaggle", "dlrm", [path], tmp_path / "out", progress=QUIET, on_bad_row="skip")


@cache
def gzip_bytes(rows: int = 1500) -> bytes:
    return gzip.compress("".join("\t".join(line) + "\n" for line in generated_lines(rows)).encode())


def zstd_bytes() -> bytes:
    content: bytes = pa.compress(gzip.decompress(gzip_bytes()), "zstd", asbytes=True)
    return content


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("day", b"", "day is empty"),
    "empty gzip": ("day.gz", gzip.compress(b""), "day.gz is empty"),
    "empty and named gzip": ("day.gz", b"", "day.gz is empty"),
    "truncated gzip": ("day.gz", gzip_bytes()[:-2000], "truncated gzip"),
    "gzip without its end": ("day.gz", gzip_bytes()[:-4], "truncated gzip"),
    "corrupt gzip": ("day.gz", gzip_bytes()[:50_000] + bytes(50) + gzip_bytes()[50_050:], "download the file again"),
    "wrong gzip checksum": ("day.gz", gzip_bytes()[:-8] + b"\0" * 8, "corrupt gzip"),
    "garbage after gzip": ("day.gz", gzip_bytes() + b"garbage", "corrupt gzip"),
    "empty zstd": ("day.zst", pa.compress(b"", "zstd", asbytes=True), "day.zst is empty"),
    "truncated zstd": ("day.zst", zstd_bytes()[:-2000], "truncated Zstandard"),
    "corrupt zstd": ("day.zst", zstd_bytes()[:50_000] + bytes(50) + zstd_bytes()[50_050:], "corrupt Zstandard"),
    "plain named zstd": ("day.zst", b"1\t2\n", "not Zstandard"),
    "plain named gzip": ("day.gz", b"1\t2\n", "not gzip"),
    "no line ends": ("day", b"1\t" * (1 << 20), "fields, expected 40"),
    "carriage returns only": ("day", b"\r".join(b"1" + b"\t" * 39 for _ in range(50)), "fields, expected 40"),
    "commas and a header": (
        "day.csv",
        (",".join(COLUMNS) + "\n").encode(),
        "40 fields between commas, expected 40 betw",
    ),
    "a header": ("day", ("\t".join(COLUMNS) + "\n").encode(), "label is 'label', expected the label 0 or 1 (Criteo's"),
    "Parquet": (
        "day",
        b"PAR1\x15\x04",
        "text, plain, gzip or Zstandard: convert it to text, or use a schema without 'format: c",
    ),
    "zip": ("day", b"PK\x03\x04\x14", "day is a zip archive"),
    "byte order mark": ("day", b"\xef\xbb\xbf1\t", "day is text with a byte order mark"),
    "too few rows": ("day", (b"1" + b"\t" * 39 + b"\n") * 13, "too few rows: 13"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_named(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        preprocess("kaggle", "dlrm", [tmp_path / name], tmp_path / "new/out", progress=QUIET, block_bytes=60_000)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert names_in(tmp_path) == {name}


def test_every_line_bad_is_named_although_bad_lines_are_skipped(tmp_path: Path) -> None:
    good = written(tmp_path / "day_0", generated_lines(30))
    (tmp_path / "day_1").write_text("1\t2\n" * 7)
    for paths in ([tmp_path / "day_1"], [good, tmp_path / "day_1"]):
        with pytest.raises(UserError, match=r"day_1: all 7 lines are bad, such as line 1: 2 fields, expected 40"):
            preprocess("terabyte", "dlrm", paths, tmp_path / "out", progress=QUIET, on_bad_row="skip")


def test_a_place_where_no_folder_can_be_made_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot write to /proc .*choose another --output"):
        preprocess("kaggle", "dlrm", [Path(__file__)], Path("/proc/x"), progress=QUIET)


def test_last_day_too_small(tmp_path: Path) -> None:
    paths = [written(tmp_path / "day_0", generated_lines(30)), written(tmp_path / "day_1", generated_lines(1))]
    with pytest.raises(UserError, match="too few rows: 1 in the last file"):
        preprocess("terabyte", "dlrm", paths, tmp_path / "out", progress=QUIET)


def test_bad_arguments(tmp_path: Path) -> None:
    raw = written(tmp_path / "day", generated_lines(20))
    (tmp_path / "link").symlink_to(raw)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    out = tmp_path / "out"
    cases: list[tuple[str, Callable[[], object]]] = [
        (
            "unknown protocol 'dlmr'; did you mean dlrm\\? Known: dlrm, mlperf",
            lambda: preprocess("kaggle", "dlmr", [raw], out),
        ),
        ("no protocol is given", lambda: preprocess("kaggle", None, [raw], out)),
        ("no dataset is given", lambda: preprocess(None, "dlrm", [raw], out)),
        ("nvidia has no max_rows, unlike dlrm and mlperf", lambda: preprocess("kaggle", "nvidia", [raw], out, 9)),
        ("dlrm has no quantile bins", lambda: preprocess("kaggle", "dlrm", [raw], out, bins=9)),
        ("bins is 1, expected 2 to 256", lambda: preprocess("kaggle", "quantile", [raw], out, bins=1)),
        ("bins is 257", lambda: preprocess("kaggle", "quantile", [raw], out, bins=257)),
        ("min_count is 0", lambda: preprocess("kaggle", "dlrm", [raw], out, min_count=0)),
        ("rate is 0", lambda: preprocess("kaggle", "dlrm", [raw], out, negative_sampling_rate=0)),
        ("rate is 1.5", lambda: preprocess("kaggle", "dlrm", [raw], out, negative_sampling_rate=1.5)),
        ("seed is -1", lambda: preprocess("kaggle", "bars", [raw], out, seed=-1)),
        ("only of Terabyte's rows", lambda: preprocess("kaggle", "mlperf", [raw], out, multi_hot="mlperf")),
        (
            "without multi_hot",
            lambda: preprocess("terabyte", "mlperf", [raw], out, multi_hot_distribution="pareto"),
        ),
        ("workers is 0", lambda: preprocess("kaggle", "dlrm", [raw], out, workers=0)),
        ("leave one out", lambda: preprocess("kaggle", "dlrm", [raw], out, workers=2, scheduler="tcp://x:1")),
        ("no dataset folder at", lambda: preprocess(None, None, [raw], out, vocabulary=tmp_path / "none")),
        ("does not know the protocol", lambda: preprocess("kaggle", "dlrm", ["nosuch://x/y"], out)),
        ("does not know the protocol", lambda: preprocess("kaggle", "dlrm", [raw], "nosuch://x/y")),
        ("unknown dataset", lambda: preprocess("avazu", "dlrm", [raw], out)),  # type: ignore[arg-type]
        ("max_rows is 0", lambda: preprocess("kaggle", "dlrm", [raw], out, 0)),
        ("no input files", lambda: preprocess("kaggle", "dlrm", [], out)),
        ("missing does not exist", lambda: preprocess("kaggle", "dlrm", [tmp_path / "missing"], out)),
        (r"x cannot be read \(OSError: .*File name too long", lambda: preprocess("kaggle", "dlrm", ["x" * 300], out)),
        ("is a folder", lambda: preprocess("kaggle", "dlrm", [tmp_path], out)),
        ("given twice", lambda: preprocess("kaggle", "dlrm", [raw, tmp_path / "link"], out)),
        ("not an empty folder", lambda: preprocess("kaggle", "dlrm", [raw], tmp_path / "full")),
        ("not an empty folder", lambda: preprocess("kaggle", "dlrm", [raw], raw)),
        ("cannot write to", lambda: preprocess("kaggle", "dlrm", [raw], raw / "out")),
    ]
    for message, call in cases:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert names_in(tmp_path) == {"day", "link", "full"}


def test_output_not_writable(tmp_path: Path) -> None:
    raw = written(tmp_path / "day", generated_lines(20))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:
        # Modes do not bind root; no kernel lets it make a folder there.
        locked = Path("/sys")
    with pytest.raises(UserError, match=f"cannot write to .*{locked.name}"):
        preprocess("kaggle", "dlrm", [raw], locked / "out", progress=QUIET)


def test_days_out_of_order_are_noticed() -> None:
    days = [Path(f"day_{day}.gz") for day in range(12)]
    shell = sorted(days, key=str)
    by_files = LogSplit(by="days", days="files")
    assert order_warning(by_files, days) is None
    assert order_warning(LogSplit(by="days"), shell) is None
    assert order_warning(LogSplit(by="files", train=("x",)), shell) is None
    assert order_warning(by_files, [Path("a"), Path("b")]) is None
    warning = order_warning(by_files, shell)
    assert warning and "day_9.gz is given last" in warning and "would be day_11.gz" in warning


def run_command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_input_given_twice_names_all_files(tmp_path: Path) -> None:
    days = [written(tmp_path / f"day_{day}", generated_lines(20)) for day in range(2)]
    words = ("--dataset", "terabyte", "--protocol", "dlrm", "--input", days[0], "--input", days[1])
    assert run_command(*words, "--output", tmp_path / "out") == 0
    found = DatasetSchema.load(tmp_path / "out").report["rows_per_file"]
    assert [name for name, _ in found] == ["day_0", "day_1"]


def test_report_fits_80_columns_and_says_what_it_counts(tmp_path: Path) -> None:
    raw = written(tmp_path / "train.txt", generated_lines(100))
    progress = Progress(show=False)
    schema = preprocess("kaggle", "quantile", [raw], tmp_path / "out", progress=progress)
    lines = render_report(schema, progress.stages, 79).splitlines()
    assert max(map(len, lines)) <= 79
    text = " ".join(" ".join(lines).split())
    for words in (
        "positive: share of the rows with label 1",
        "missing: share of the rows without a value; of multi-hot columns, with an empty list values: different values "
        "in the rows over which the vocabulary was counted kept: values with a row of",
        "table rows: rows of the embedding table, with reserved rows, such as those of missing and rare values 100 "
        "rows read",
        "100 rows read, 100 rows written in",
        "iB of memory (all processes together)",
    ):
        assert words in text


def test_command_prints_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, folder = written(tmp_path / "train.txt", generated_lines(100)), tmp_path / "out"
    assert run_command("--dataset", "kaggle", "--protocol", "dlrm", "--input", raw, "--output", folder) == 0
    out, err = capsys.readouterr()
    schema = DatasetSchema.load(folder)
    assert f"{sum(schema.features.table_rows):,}" in out
    assert f"100 rows read, 100 rows written to {folder} in" in out
    assert "split  by position: the rows are cut into 7" in out
    # Values, kept values and rows are equal in number: they stand there once.
    assert ["column", "missing", "table", "rows"] in [line.split() for line in out.splitlines()]
    first, *lines = err.splitlines()
    assert "of disk" in first and "are free" in first
    assert [line.split()[:2] for line in lines] == [
        ["read", "100"],
        ["count", "100"],
        ["encode", "100"],
    ], "one line a stage, no bars"
    report = json.loads((folder / "report.json").read_text())
    assert report["rows"] == {"train": 86, "test": 7, "validation": 7}
    assert report["label_mean"]["test"] == schema.splits["test"].positives / 7  # type: ignore[operator]
    assert [stage["name"] for stage in report["stages"]] == ["stage", "count", "encode"]
    assert all(10e6 < stage["peak_bytes"] < 10e9 and stage["disk_bytes"] > 0 for stage in report["stages"])
    days = [written(tmp_path / f"day_{day}", generated_lines(60, day)) for day in (10, 2)]
    log = {**read_log_schema("datasets/criteo_bars.yaml").document(), "split": {"by": "days", "days": "files"}}
    (tmp_path / "bars.yaml").write_text(json.dumps(log))
    assert run_command("--schema", tmp_path / "bars.yaml", "--input", *days, "--output", tmp_path / "bars") == 0
    out, err = capsys.readouterr()
    assert "day_2 is given last, so it is held out" in " ".join(err.split())
    advice = " ".join(out.replace("\\", "").split())
    assert f"--config criteo_kaggle.yaml --data.path {tmp_path}/bars --model.network.bottom_mlp '[]'" in advice
    one_label = written(tmp_path / "one", [["1", *line[1:]] for line in generated_lines(60)])
    with pytest.raises(
        UserError, match=r"every label of the train split is 1 .52 in all.; .*input, or change split in"
    ):
        run_command("--schema", "datasets/criteo_dlrm.yaml", "--input", one_label, "--output", tmp_path / "one_label")


# Without options: test_the_shipped_schema_of_a_protocol_makes_its_rows_and_vocabularies.
NEW_ROWS_OF: list[tuple[str, dict[str, Any]]] = [
    ("dlrm", {"max_rows": 7}),
    ("mlperf", {"max_rows": 30, "min_count": 5}),
    ("nvidia", {"min_count": 3}),
    ("quantile", {"bins": 7}),
]


def test_new_rows_are_encoded_as_a_dataset_was(tmp_path: Path) -> None:
    """Labelled or not; unknown values get the protocol's id for them; and a model knows the encoding as its own."""
    lines, new = generated_lines(120, 1), generated_lines(50, 9)
    new[3][16], new[4][15] = "12345678", "9abcdef0"
    written(tmp_path / "train.txt", lines)
    written(tmp_path / "new", new)
    written(tmp_path / "test.txt", [line[1:] for line in new])
    for protocol, options in NEW_ROWS_OF:
        place = tmp_path / f"{protocol}-{options}"
        known = preprocess("kaggle", protocol, [tmp_path / "train.txt"], place / "known", progress=QUIET, **options)
        plain = Plain(protocol, [lines], "kaggle", **options)
        unlabelled = [("test.txt", [line[1:] for line in new])] if protocol == "mlperf" else []
        for name, rows in [("new", new), *unlabelled]:
            schema = preprocess(
                None,
                None,
                [tmp_path / name],
                place / name,
                progress=QUIET,
                vocabulary=place / "known",
                block_bytes=5000,
            )
            assert schema == DatasetSchema.load(place / name)
            assert schema.encoding_fingerprint == known.encoding_fingerprint
            assert list(schema.splits) == ["test"]
            assert (schema.splits["test"].positives is None) == (name == "test.txt")
            assert_rows(pq.read_table(place / name / "test"), [plain.encoded(line) for line in rows])
            assert schema.report["unknown"]["C1"] > 0 or options.get("max_rows")


def test_options_at_odds_with_the_vocabulary(tmp_path: Path) -> None:
    raw = written(tmp_path / "train.txt", generated_lines(50))
    preprocess("kaggle", "dlrm", [raw], tmp_path / "known", 100, progress=QUIET)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"protocol": "bars"}, "protocol is bars, but the vocabulary of .* was made with dlrm"),
        ({"protocol": None, "max_rows": 50}, "max_rows is 50, but .* with 100"),
        ({"protocol": None, "negative_sampling_rate": 0.5}, "negative_sampling_rate is 0.5, but .* with 1.0"),
        ({"protocol": None, "min_count": 2}, "min_count is 2, but .* with 1; leave"),
        ({"protocol": None, "multi_hot": "mlperf"}, "multi_hot is mlperf, but .* made without it; leave"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            preprocess(None, inputs=[raw], output=tmp_path / "out", vocabulary=tmp_path / "known", **options)
    with pytest.raises(TypeError, match=r"no option 'mincount'; its options are on_bad_row, dataset, .*min_count"):
        preprocess(None, None, [raw], tmp_path / "out", vocabulary=tmp_path / "known", mincount=3)
    assert names_in(tmp_path) == {"train.txt", "known"}
    in_force = {"protocol": "dlrm", "max_rows": 100, "min_count": 1}
    preprocess("kaggle", inputs=[raw], output=tmp_path / "new", vocabulary=tmp_path / "known", **in_force)


def test_estimate_looks_at_each_compression(tmp_path: Path) -> None:
    lines = generated_lines(400)
    names = ["a", "b.gz", "c.zst", "d", "e.gz"]
    files = find_files([str(written(tmp_path / name, lines)) for name in names])
    found = progress.estimate(files, (115, 65))
    size = (tmp_path / "a").stat().st_size
    assert found.rows == pytest.approx(2000, rel=0.01) and found.text_bytes == pytest.approx(5 * size, rel=0.01)
    assert progress.fields_of(files[0]) == 40


def test_known_values_are_looked_up_as_by_a_dict(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    hashes = np.unique(np.append(generator.integers(0, 2**32, 5000), [0, 2**32 - 1])).astype(np.uint32)
    ids = generator.permutation(len(hashes)).astype(np.int32) + 2
    ids[-1] = 2**31 - 1
    table = pa.table({"hash": pa.concat_arrays([pa.nulls(2, pa.uint32()), pa.array(hashes)]), "id": [0, 1, *ids]})
    table = table.cast(pa.schema([("hash", pa.uint32()), ("id", pa.int32())]))
    pq.write_table(table.take(generator.permutation(len(table))), tmp_path / "C1.parquet", row_group_size=700)
    known = counting._known_values(Folder(tmp_path), "C1.parquet")
    wanted = np.concatenate([hashes, generator.integers(0, 2**32, 5000).astype(np.uint32), hashes[:9]])
    of = dict(zip(hashes.tolist(), ids.tolist(), strict=True))
    found = counting._look_up(known, wanted, unknown=-3)
    assert found.dtype == np.int32 and found.tolist() == [of.get(value, -3) for value in wanted.tolist()]
    assert (counting._look_up(known[:0], wanted, unknown=-3) == -3).all()
    with pytest.raises(UserError, match=r"C2.parquet is missing"):
        counting._known_values(Folder(tmp_path), "C2.parquet")
    (tmp_path / "C2.parquet").write_bytes((tmp_path / "C1.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"C2.parquet is altered"):
        counting._known_values(Folder(tmp_path), "C2.parquet")


def test_disk_too_small_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = written(tmp_path / "train.txt", generated_lines(100))
    monkeypatch.setattr(progress.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 9000})())
    with pytest.raises(UserError, match=r"needs about .* of disk, 8\.79 KiB are free"):
        preprocess("kaggle", "dlrm", [raw], tmp_path / "out", progress=QUIET)
    assert names_in(tmp_path) == {"train.txt"}


def test_disk_of_the_output_too_small_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Path("/proc")  # a device of its own
    monkeypatch.setattr(
        progress.shutil, "disk_usage", lambda path: argparse.Namespace(free=10 if path == elsewhere else 10**9)
    )
    raw = written(tmp_path / "train.txt", generated_lines(100))
    found = progress.estimate(find_files([str(raw)]), (115, 65))
    assert "about 100 rows" in found.checked(tmp_path, tmp_path, 2)
    with pytest.raises(UserError, match=r"the dataset needs about .* of disk, 10 bytes are free at /proc; .*--output"):
        found.checked(tmp_path, elsewhere, 2)


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_progress_without_a_terminal_is_no_flood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "resident_bytes", lambda: 1_230_000_000)
    monkeypatch.setattr(progress, "_MEMORY_EVERY_S", 60.0)
    with Progress().stage("encode", 7_200_000) as stage:
        stage.measured(2_340_000_000, 5_600_000_000)
        for _ in range(7200):
            clock.now += 1
            stage.advance(1000)
    *lines, last = capsys.readouterr().err.splitlines()
    assert 3 < len(lines) < 40
    assert lines[0] == "encode   0.1%  10,000 rows, 1,000 rows/s, 2.18 GiB memory, 5.22 GiB disk, 7,190 s left"
    assert last.split()[:9] == ["encode", "7,200,000", "rows", "7,200.0", "s", "1,000", "rows/s", "2.18", "GiB"]
    assert len(last) < 80


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(file=io.StringIO()), Progress().stage("stage") as stage:  # another bar that is open changes nothing
        for tenth in range(1, 11):
            stage.reached(1234 * tenth, tenth / 10)
    *bars, last = terminal.getvalue().split("\r")
    assert any(bar.startswith("read     0%|") for bar in bars) and "\n" not in "".join(bars)
    # It takes the place of the bar.
    assert last.startswith("read        12,340 rows ") and last.count("\n") == 1


def test_starts_without_torch() -> None:
    code = "import sys, datamodules.preprocess.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("protocol", "options", "dense", "tables"),
    [("bars", {}, 0, 39), ("quantile", {}, 13, 39), ("mlperf", {"multi_hot": "mlperf"}, 13, 26)],
)
def test_every_kind_of_dataset_can_be_streamed(
    tmp_path: Path, protocol: str, options: dict[str, Any], dense: int, tables: int
) -> None:
    from datamodules.criteo import Criteo

    raw = written(tmp_path / "day", generated_lines(300))
    schema = preprocess("terabyte", protocol, [raw], tmp_path / "out", None, QUIET, **options)
    data = Criteo(str(tmp_path / "out"), batch_size=100, shuffle="none")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.dense.shape == (100, dense) and batch.ids.tables == tables == len(schema.features.tables)
    assert batch.dense.isnan().any().item() == (protocol == "quantile")
    first = pq.read_table(tmp_path / "out/train").slice(0, 100)
    bags = [first.column(column.name).to_pylist() for column in schema.by_role("categorical", "multi_hot")]
    in_order = [bag if isinstance(bag, list) else [bag] for row in zip(*bags, strict=True) for bag in row]
    assert batch.ids.values.reshape(-1).tolist() == [value for bag in in_order for value in bag]
