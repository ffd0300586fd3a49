"""Contract: a file whose content, format or separator is not what the schema says is named with what it is and what to
set; new rows for a dataset are read in the format that they have."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.log_schema import log_schema
from datamodules.preprocess.log_files import open_readers
from datamodules.preprocess.log_reader import LogReader
from datamodules.preprocess.sniffing import read_sample
from datamodules.preprocess.sources import find_files
from lightning_dlrm.contracts.errors import UserError

ROWS = [{"click": row % 2, "user": f"u{row}", "tags": [row, 5]} for row in range(40)]
CSV = "click,user,tags\n" + "".join(f'{row["click"]},{row["user"]},"[1, 5]"\n' for row in ROWS)
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
SCHEMA = {
    "dataset": "log",
    "label": "click",
    "columns": {"user": {"role": "categorical"}, "tags": {"role": "leave"}},
    "split": {"by": "position"},
}


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out)
    return out.getvalue()


def archive(name: str, content: bytes, kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr(name, content)
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as packed:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return out.getvalue()


def reader_of(path: Path, is_new: bool = True, **changes: Any) -> LogReader:
    schema = log_schema({**SCHEMA, **changes})
    (reader,) = open_readers(find_files([str(path)], of_criteo=False), schema, 1 << 20, is_new)
    assert isinstance(reader, LogReader)
    return reader


CONTENTS = {"csv": CSV.encode(), "jsonl": JSONL.encode(), "parquet": parquet()}
WORDS = {"csv": "is text of separated fields", "jsonl": "is text of JSON objects", "parquet": "is a Parquet file"}


# Parquet is compressed inside.
FOUND = [*((form, False) for form in CONTENTS), ("csv", True), ("jsonl", True)]


@pytest.mark.parametrize("given", CONTENTS)
@pytest.mark.parametrize(("found", "packed"), FOUND)
def test_the_format_of_the_schema_is_compared_with_the_content(
    tmp_path: Path, found: str, given: str, packed: bool
) -> None:
    path = tmp_path / ("log.gz" if packed else "log")
    path.write_bytes(gzip.compress(CONTENTS[found]) if packed else CONTENTS[found])
    if found == given:
        assert reader_of(path, format=given).format == found
        return
    with pytest.raises(UserError) as caught:
        reader_of(path, format=given)
    said = f"{path} {WORDS[found]}, and the schema has 'format: {given}': set 'format: {found}'"
    assert str(caught.value) == said
    assert reader_of(path, is_new=False, format=given).format == found, "new rows may have another format"


@pytest.mark.parametrize("found", ["csv", "jsonl"])
def test_without_a_format_the_content_decides(tmp_path: Path, found: str) -> None:
    for name in ("log", "log.csv", "log.jsonl"):
        (tmp_path / name).write_bytes(CONTENTS[found])
        assert reader_of(tmp_path / name).format == found
    (tmp_path / "log.parquet").write_bytes(CONTENTS[found])
    with pytest.raises(UserError, match=f"log.parquet {WORDS[found]}, not the Parquet file that its name says: rename"):
        reader_of(tmp_path / "log.parquet")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.zip", archive("a.csv", CSV.encode(), "zip"), "is a zip archive; expected CSV .*: unpack it"),
        ("a.xlsx", archive("xl/workbook.xml", b"<a/>", "zip"), "is an Excel workbook; .*: save its sheet as CSV"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 99, "is an Excel workbook; .*: save its sheet as CSV"),
        ("a.bz2", bz2.compress(CSV.encode()), "is compressed by bzip2; .*: unpack it: bunzip2"),
        ("a.xz", lzma.compress(CSV.encode()), "is compressed by xz; .*: unpack it: unxz"),
        ("a.db", b"SQLite format 3\0" * 9, "is an SQLite database; .*: export its table as CSV"),
        ("a.tar.gz", archive("a.csv", CSV.encode(), "tar"), "holds a tar archive; expected CSV or JSON lines: unpack"),
        ("a.parquet.gz", gzip.compress(parquet()), "holds a Parquet file; .*: decompress it"),
        ("a.csv", CSV.encode("utf-16-le"), "has null bytes; .*: if it is UTF-16, write it with a byte order mark"),
        ("a.json", json.dumps(ROWS).encode(), r"line 1.* a JSON object; .*make lines of the array, .*jq -c '.\[\]'"),
        (
            "a.json",
            json.dumps(ROWS, indent=1).encode(),
            r"line 1.* not JSON .*make lines of the array, .*jq -c '.\[\]'",
        ),
        ("a.json", json.dumps(ROWS[0], indent=1).encode(), "line 1.* not JSON .*make one line of each object"),
    ],
)
def test_other_files_are_named_when_a_schema_is_inferred_and_used(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for read in (
        lambda: read_sample([str(path)]),
        lambda: reader_of(path, format="jsonl" if name == "a.json" else "csv"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_wrong_separator_is_named_with_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(CSV)
    said = f"{path}: its first line has ',' between fields, and the schema's separator is ';': "
    with pytest.raises(UserError) as caught:
        reader_of(path, separator=";")
    assert str(caught.value) == f"{said}set 'separator: \",\"' in the schema"
    assert reader_of(path, separator=",").names == ("click", "user", "tags")
    with pytest.raises(UserError) as caught:
        reader_of(path, is_new=False, separator=";")
    assert str(caught.value) == f"{said}write the file with ';'"
    # Also if the schema is that of another log, of which the file has one column or none.
    for header in ("click,shop,day", "seen,shop,day"):
        path.write_text(header + "\n1,u,2\n")
        with pytest.raises(UserError, match="has ',' between fields, and the schema's separator is ';'"):
            reader_of(path, separator=";")
    path.write_text("click;user, name;tags\n1;u;2\n")
    with pytest.raises(UserError, match="has ';' between fields, and the schema names no separator, which means ','"):
        reader_of(path)


def test_rows_without_a_header_are_compared_with_the_number_of_names(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("0|u|1\n1|v|2\n")
    with pytest.raises(UserError, match=r"first line has '\|' between fields, and the schema's separator is ';'"):
        reader_of(path, names=["click", "user", "tags"], separator=";")
    # A bad first row is not about the separator.
    path.write_text("0\n1,v,2\n")
    assert reader_of(path, names=["click", "user", "tags"]).separator == ","
