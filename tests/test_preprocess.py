"""Contract: ``preprocess`` turns raw Criteo TSV into exactly the dataset that its protocol defines.

``plain_dlrm`` below is protocol ``dlrm`` in plain Python (split, dicts, math.log). Whatever the
input's form (gzip, line ends, files, block size), ids equal its ids and dense values its values;
equal input gives equal bytes; wrong input gives one line with file, line and remedy, and leaves
nothing behind.
"""

import argparse
import gzip
import io
import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.parquet import verify
from datamodules.preprocess import command, progress, stages
from datamodules.preprocess.criteo_tsv import BLOCK_BYTES, Block, parse
from datamodules.preprocess.pipeline import order_warning, preprocess
from datamodules.preprocess.progress import Progress, Stage
from datamodules.preprocess.protocols import Dataset
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE, SPLITS, DatasetSchema

SAMPLE = Path(__file__).parents[2] / "shared/criteo_terabyte_sample/day_0"
QUIET = Progress(show=False)

Line = list[str]


def generated_lines(rows: int, seed: int = 0) -> list[Line]:
    """Rows with missing values, negatives, extremes, hash 0, values seen once and values only in the last rows."""
    rng = random.Random(seed)
    lines = []
    for row in range(rows):
        integers = [rng.choice(["", "-1", "-3", "0", "1", "2147483647", "-2147483648", str(rng.randrange(10**6))])]
        integers += [rng.choice(["", str(rng.randrange(100))]) for _ in range(12)]
        hashes = [f"{hash_of(rng, row, column):08x}" for column in range(26)]
        hashes = [text if rng.random() > 0.1 else rng.choice(["", "00000000", text.upper()]) for text in hashes]
        lines.append([rng.choice("01"), *integers, *hashes])
    return lines


def hash_of(rng: random.Random, row: int, column: int) -> int:
    if column == 0:
        return row * 2654435761 % 2**32  # each seen once
    if column == 1:
        return 0xFFFFFFFF if row % 2 else 7  # ties
    if column == 2 and row > 90:
        return 0xABCDEF01  # first seen late
    return int(rng.random() ** 3 * 50) * 0x9E3779B1 % 2**32


def plain_dlrm(
    files: list[list[Line]], dataset: str, max_rows: int | None = None
) -> tuple[dict[str, list[dict[str, float]]], dict[str, list[tuple[int, int]]]]:
    """Rows of every split, and (hash, count) of every categorical column in the order of ids."""
    rows = [line for file in files for line in file]
    hashes = [[int(text or "0", 16) % (max_rows or 2**32) for text in line[14:]] for line in rows]
    vocabulary = {}
    for position, name in enumerate(CRITEO_CATEGORICAL):
        counts = Counter(row[position] for row in hashes)
        vocabulary[name] = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ids = {name: {item[0]: i for i, item in enumerate(items)} for name, items in vocabulary.items()}
    encoded = []
    for line, row in zip(rows, hashes, strict=True):
        values: dict[str, float] = {"label": int(line[0])}
        for name, text in zip(CRITEO_DENSE, line[1:14], strict=True):
            values[name] = math.log(max(int(text or "0"), 0) + 1)
        for name, value in zip(CRITEO_CATEGORICAL, row, strict=True):
            values[name] = ids[name][value]
        encoded.append(values)
    if dataset == "terabyte" and len(files) > 1:
        held_out = len(files[-1])
    else:
        days = [len(rows) // 7 + (day < len(rows) % 7) for day in range(7)]
        held_out = days[-1]
    train, last = encoded[: len(rows) - held_out], encoded[len(rows) - held_out :]
    half = (held_out + 1) // 2
    return {"train": train, "test": last[:half], "validation": last[half:]}, vocabulary


def written(path: Path, lines: list[Line], end: str = "\n", last_end: bool = True) -> Path:
    text = end.join("\t".join(line) for line in lines) + (end if last_end else "")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(text.encode())
    return path


def assert_equals_plain(folder: Path, files: list[list[Line]], dataset: str, max_rows: int | None = None) -> None:
    splits, vocabulary = plain_dlrm(files, dataset, max_rows)
    schema = DatasetSchema.load(folder)
    verify(folder, schema)
    assert (schema.dataset, schema.protocol) == (dataset, "dlrm")
    assert dict(schema.features.tables) == {name: len(items) for name, items in vocabulary.items()}
    for split in SPLITS:
        table = pq.read_table(folder / split)
        expected = splits[split]
        assert table.num_rows == schema.splits[split].rows == len(expected)
        assert schema.splits[split].positives == sum(row["label"] for row in expected)
        for column in ("label", *CRITEO_CATEGORICAL):
            assert table.column(column).to_pylist() == [row[column] for row in expected], (split, column)
        for column in CRITEO_DENSE:
            np.testing.assert_array_equal(
                table.column(column).to_numpy(), np.array([row[column] for row in expected], np.float32)
            )
    for name, items in vocabulary.items():
        stored = pq.read_table(folder / f"vocabulary/{name}.parquet").to_pylist()
        assert [(entry["hash"], entry["count"]) for entry in stored] == items
    lines = [line for file in files for line in file]
    assert schema.report["missing"] == {
        name: sum(not line[position] for line in lines)
        for position, name in enumerate((*CRITEO_DENSE, *CRITEO_CATEGORICAL), 1)
    }


@pytest.mark.parametrize(("rows", "max_rows"), [(14, None), (100, 1), (2003, None), (2003, 10), (2003, 2**40)])
def test_single_file_equals_plain_protocol(tmp_path: Path, rows: int, max_rows: int | None) -> None:
    lines = generated_lines(rows)
    raw = written(tmp_path / "train.txt", lines)
    schema = preprocess("kaggle", "dlrm", [raw], tmp_path / "out", max_rows, QUIET)
    assert_equals_plain(tmp_path / "out", [lines], "kaggle", max_rows)
    assert dict(schema.settings) == ({} if max_rows is None else {"max_rows": max_rows})


@pytest.mark.parametrize("dataset", ["kaggle", "terabyte"])
def test_several_files_equal_plain_protocol(tmp_path: Path, dataset: Dataset) -> None:
    files = [generated_lines(50, 1), generated_lines(1, 2), generated_lines(75, 3), generated_lines(31, 4)]
    paths = [written(tmp_path / f"day_{day}{'.gz' * (day % 2)}", lines) for day, lines in enumerate(files)]
    schema = preprocess(dataset, "dlrm", paths, tmp_path / "out", progress=QUIET)
    assert_equals_plain(tmp_path / "out", files, dataset)
    assert schema.report["rows_per_file"] == [["day_0", 50], ["day_1.gz", 1], ["day_2", 75], ["day_3.gz", 31]]


def test_chunk_and_vocabulary_boundaries_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "CHUNK_ROWS", 5)
    monkeypatch.setattr(stages, "_VOCABULARY_SLACK", 3)
    files = [generated_lines(83, 1), generated_lines(31, 2)]
    paths = [written(tmp_path / f"day_{day}", lines) for day, lines in enumerate(files)]
    preprocess("terabyte", "dlrm", paths, tmp_path / "out", progress=QUIET, block_bytes=300)
    assert_equals_plain(tmp_path / "out", files, "terabyte")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_form_of_the_input_does_not_change_a_byte(tmp_path: Path) -> None:
    lines = generated_lines(200)
    forms: dict[str, Callable[[Path], Path]] = {
        "plain": lambda folder: written(folder / "train", lines),
        "again": lambda folder: written(folder / "train", lines),
        "gzip without suffix": lambda folder: written(folder / "train.gz", lines).rename(folder / "train"),
        "crlf": lambda folder: written(folder / "train", lines, end="\r\n"),
        "no final line end": lambda folder: written(folder / "train", lines, last_end=False),
        "crlf, no final line end": lambda folder: written(folder / "train", lines, end="\r\n", last_end=False),
    }
    results = {}
    for name, make in forms.items():
        folder = tmp_path / name
        folder.mkdir()
        block_bytes = BLOCK_BYTES if name == "plain" else 37
        preprocess("kaggle", "dlrm", [make(folder)], folder / "out", progress=QUIET, block_bytes=block_bytes)
        results[name] = folder_bytes(folder / "out")
    first = results.pop("plain")
    assert len(first) == 26 + 3 + 1
    for name, files in results.items():
        assert files == first, name


def test_gzip_of_several_members(tmp_path: Path) -> None:
    lines = generated_lines(60)
    parts = [written(tmp_path / f"{i}.gz", lines[i::2]).read_bytes() for i in range(2)]
    (tmp_path / "day.gz").write_bytes(b"".join(parts))
    preprocess("kaggle", "dlrm", [tmp_path / "day.gz"], tmp_path / "out", progress=QUIET)
    assert_equals_plain(tmp_path / "out", [lines[0::2] + lines[1::2]], "kaggle")


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"the real sample is not at {SAMPLE}")
def test_real_sample(tmp_path: Path) -> None:
    lines = [line.split("\t") for line in SAMPLE.read_text().removesuffix("\n").split("\n")]
    preprocess("terabyte", "dlrm", [SAMPLE], tmp_path / "out", progress=QUIET)
    assert_equals_plain(tmp_path / "out", [lines], "terabyte")


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
    "an empty line": (shortened(70, 0), 71, "1 fields, expected 40"),
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


@pytest.fixture(params=["plain", "gzip"])
def raw_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / ("train.txt" if request.param == "plain" else "train.txt.gz")


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named(raw_path: Path, case: str) -> None:
    change, number, message = BAD_LINES[case]
    block_bytes = 100 if raw_path.suffix == ".gz" else BLOCK_BYTES
    lines = generated_lines(100)
    change(lines)
    written(raw_path, lines, last_end=case != "label missing")
    with pytest.raises(UserError) as error:
        preprocess("kaggle", "dlrm", [raw_path], raw_path.parent / "out", progress=QUIET, block_bytes=block_bytes)
    text = str(error.value)
    assert text.startswith(f"{raw_path}, line {number}: ") and message in text and "\n" not in text
    assert text.endswith("download the file again")
    assert names_in(raw_path.parent) == {raw_path.name}


def test_first_of_several_bad_lines_is_named(raw_path: Path) -> None:
    lines = generated_lines(300)
    for row in (120, 200, 250):
        lines[row][14] = "?"
    written(raw_path, lines)
    with pytest.raises(UserError, match=r"line 121: C1 is '\?'"):
        preprocess("kaggle", "dlrm", [raw_path], raw_path.parent / "out", progress=QUIET, block_bytes=500)


def test_bad_line_in_a_later_file_is_named(tmp_path: Path) -> None:
    good, lines = generated_lines(40), generated_lines(40)
    lines[17][0] = "x"
    paths = [written(tmp_path / "day_0", good), written(tmp_path / "day_1", lines)]
    with pytest.raises(UserError, match=r"day_1, line 18: label is 'x'"):
        preprocess("terabyte", "dlrm", paths, tmp_path / "out", progress=QUIET)
    assert names_in(tmp_path) == {"day_0", "day_1"}


@settings(max_examples=300, deadline=None)
@given(
    column=st.integers(0, 39),
    text=st.text("0123456789abfgxX-+. \t\r\n\"'\0é", max_size=10) | st.integers(-(2**33), 2**33).map(str),
)
def test_fast_and_exact_check_agree(column: int, text: str) -> None:
    """Whatever stands in one field: a line is parsed to just what it says, or refused."""
    line = generated_lines(1)[0]
    line[column] = text
    data = "\t".join(line).encode() + b"\n"
    try:
        table = parse(Block(path=Path("raw"), first_line=1, lines=data.count(b"\n"), data=data))
    except UserError as error:
        assert "not Criteo lines" not in str(error), "the exact check found nothing wrong"
        return
    text = text.removesuffix("\r") if column == 39 else text
    base = 10 if column < 14 else 16
    assert table.column(column).to_pylist() == [int(text, base) if text else None]


def gzip_bytes(rows: int = 3000) -> bytes:
    return gzip.compress("".join("\t".join(line) + "\n" for line in generated_lines(rows)).encode())


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("day", b"", "day is empty"),
    "empty gzip": ("day.gz", gzip.compress(b""), "day.gz is empty"),
    "empty and named gzip": ("day.gz", b"", "day.gz is empty"),
    "truncated gzip": ("day.gz", gzip_bytes()[:-2000], "truncated gzip"),
    "gzip without its end": ("day.gz", gzip_bytes()[:-4], "truncated gzip"),
    "corrupt gzip": ("day.gz", gzip_bytes()[:50_000] + bytes(50) + gzip_bytes()[50_050:], "download the file again"),
    "wrong gzip checksum": ("day.gz", gzip_bytes()[:-8] + b"\0" * 8, "corrupt gzip"),
    "garbage after gzip": ("day.gz", gzip_bytes() + b"garbage", "corrupt gzip"),
    "plain named gzip": ("day.gz", b"1\t2\n", "not gzip"),
    "no line ends": ("day", b"1\t" * (1 << 20), "fields, expected 40"),
    "carriage returns only": ("day", b"\r".join(b"1" + b"\t" * 39 for _ in range(50)), "fields, expected 40"),
    "too few rows": ("day", (b"1" + b"\t" * 39 + b"\n") * 13, "too few rows: 13"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_named(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        preprocess("kaggle", "dlrm", [tmp_path / name], tmp_path / "new/out", progress=QUIET, block_bytes=10_000)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert names_in(tmp_path) == {name}


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
        ("unknown protocol 'dlmr'; known: dlrm", lambda: preprocess("kaggle", "dlmr", [raw], out)),
        ("unknown dataset", lambda: preprocess("avazu", "dlrm", [raw], out)),  # type: ignore[arg-type]
        ("max_rows is 0", lambda: preprocess("kaggle", "dlrm", [raw], out, 0)),
        ("no input files", lambda: preprocess("kaggle", "dlrm", [], out)),
        ("missing does not exist", lambda: preprocess("kaggle", "dlrm", [tmp_path / "missing"], out)),
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_not_writable(tmp_path: Path) -> None:
    raw = written(tmp_path / "day", generated_lines(20))
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot write to .*locked"):
        preprocess("kaggle", "dlrm", [raw], tmp_path / "locked/out", progress=QUIET)


def test_leftovers_of_a_killed_run_are_replaced_and_a_run_in_progress_is_not(tmp_path: Path) -> None:
    lines = generated_lines(20)
    raw = written(tmp_path / "day", lines)
    leftover = tmp_path / ".out.preprocess/stages/raw"
    leftover.mkdir(parents=True)
    (leftover / "00000.parquet").write_bytes(b"half")

    class Meddling(Progress):
        def stage(self, name: str, total_rows: int | None = None):  # type: ignore[no-untyped-def]
            with pytest.raises(UserError, match="another run is making"):
                preprocess("kaggle", "dlrm", [raw], tmp_path / "out", progress=QUIET)
            return super().stage(name, total_rows)

    preprocess("kaggle", "dlrm", [raw], tmp_path / "out", progress=Meddling(show=False))
    assert_equals_plain(tmp_path / "out", [lines], "kaggle")
    assert names_in(tmp_path) == {"day", "out"}


def test_days_out_of_order_are_noticed() -> None:
    days = [Path(f"day_{day}.gz") for day in range(12)]
    shell = sorted(days, key=str)
    assert order_warning("terabyte", days) is None
    assert order_warning("kaggle", shell) is None
    assert order_warning("terabyte", [Path("a"), Path("b")]) is None
    warning = order_warning("terabyte", shell)
    assert warning and "day_9.gz is given last" in warning and "would be day_11.gz" in warning


def run_command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_command_prints_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, folder = written(tmp_path / "train.txt", generated_lines(100)), tmp_path / "out"
    assert run_command("--dataset", "kaggle", "--protocol", "dlrm", "--input", raw, "--output", folder) == 0
    out, err = capsys.readouterr()
    schema = DatasetSchema.load(folder)
    assert f"{sum(schema.features.table_rows):,}" in out
    assert "train.txt (100 rows)" in out
    assert [line.split()[:2] for line in err.splitlines()] == [
        ["stage", "100"],
        ["count", "100"],
        ["encode", "100"],
    ], "one line a stage, no bars"


@pytest.mark.parametrize("stage", ["stage", "count", "encode"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, stage: str
) -> None:
    class Interrupted(Progress):
        @contextmanager
        def stage(self, name: str, total_rows: int | None = None) -> Iterator[Stage]:
            with super().stage(name, total_rows) as running:
                yield running
                if name == stage:
                    os.kill(os.getpid(), number)

    monkeypatch.setattr(command, "Progress", Interrupted)
    raw = written(tmp_path / "train.txt", generated_lines(100))
    with pytest.raises((SystemExit, KeyboardInterrupt)) as left:
        run_command("--dataset", "kaggle", "--protocol", "dlrm", "--input", raw, "--output", tmp_path / "out")
    assert left.type is KeyboardInterrupt if number == signal.SIGINT else left.value.args == (143,)
    # After the last stage the dataset has its name already, and is whole.
    assert names_in(tmp_path) == ({"train.txt", "out"} if stage == "encode" else {"train.txt"})


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_progress_without_a_terminal_is_no_flood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with Progress().stage("encode", 7_200_000) as stage:
        for _ in range(7200):
            clock.now += 1
            stage.advance(1000)
    *lines, last = capsys.readouterr().err.splitlines()
    assert 3 < len(lines) < 40
    assert lines[0].split() == ["encode", "0.1%", "10,000", "rows,", "1,000", "rows/s,", "7,190", "s", "left"]
    assert last.split() == ["encode", "7,200,000", "rows", "7,200.0", "s", "1,000", "rows/s"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress().stage("stage") as stage:
        for tenth in range(1, 11):
            stage.advance(1234, tenth / 10)
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("stage  100%|") and ", 12,340 rows, " in last and last.count("\n") == 1


def test_starts_without_torch() -> None:
    code = "import sys, datamodules.preprocess.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
