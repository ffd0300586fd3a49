"""Contract: ``preprocess --infer`` reads a sample of a log of any form and writes a schema that ``read_log_schema``
takes, with the form of the files, a role for each column and a split; what it cannot tell is one line that says what to
give."""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.log_schema import LogSchema, read_log_schema
from datamodules.preprocess import sniffing
from datamodules.preprocess.inference import infer, render
from datamodules.preprocess.sniffing import Form, read_sample
from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.errors import UserError

LOGS = Path(__file__).parents[3] / "shared" / "small_logs"


def inferred(folder: Path, text: str | bytes, label: str = "y", name: str = "log.csv", **options: Any) -> LogSchema:
    """Write a log, infer its schema, and read it."""
    log, schema = folder / name, folder / "schema.yaml"
    log.write_bytes(text if isinstance(text, bytes) else text.encode())
    schema.unlink(missing_ok=True)
    infer(schema, label, [str(log)], **options)
    return read_log_schema(schema)


def settings(schema: LogSchema) -> dict[str, dict[str, Any]]:
    return schema.document()["columns"]


def rows(header: str, *cells: Sequence[object], separator: str = ",") -> str:
    """Return CSV of columns of equally many cells."""
    return "\n".join([header, *(separator.join(map(str, row)) for row in zip(*cells, strict=True))]) + "\n"


N = 200
LABELS = [int(row % 7 == 0) for row in range(N)]
FEW = [f"v{row * row % 11}" for row in range(N)]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("y,a\n1,x\n0,z\n", Form(format="csv")),
        ("y\ta\n1\tx\n0\tz\n", Form(format="csv", separator="\t")),
        ("y;a\r\n1;1,5\r\n0;\r\n", Form(format="csv", separator=";", decimal=",")),
        ("y;a\n1;6,64\n0;22,25\n1;NA\n", Form(format="csv", separator=";", decimal=",", nulls=("", "NA"))),
        ("y::a\n1::x\n0::z\n", Form(format="csv", separator="::")),
        ('y,a\n1,"x,""1""\nnew line"\n0,z\n', Form(format="csv")),
        ('y\ta\n1\t"x\n0\tz\n', Form(format="csv", separator="\t", quote=None)),
        ("y,a\n1,NA\n0,unknown\n1,7\n", Form(format="csv", nulls=("", "NA", "unknown"))),
        ("y,a,b\n1,NA,x\n0,unknown,unknown\n1,7,z\n", Form(format="csv", nulls=("", "NA"))),
        ("y|a\n1|NULL\n0|7\n1|?\n", Form(format="csv", separator="|", nulls=("", "?", "NULL"))),
        ("y,a\n1,NA\n0,de\n", Form(format="csv")),
        ("0,1\n1,4\n0,5\n", Form(format="csv")),
        ("y,a\n1,München\n0,z\n".encode("cp1252"), Form(format="csv", encoding="cp1252")),
        ("y,a\n1,日本\n0,z\n".encode(), Form(format="csv")),
        ('{"y": 1}\n{"y": 0, "a": [1]}\n', Form(format="jsonl")),
        ('{"y": 1}\n{"y": 0, "a": "é"}\n'.encode("cp1252"), Form(format="jsonl", encoding="cp1252")),
    ],
)
def test_forms(text: str | bytes, form: Form, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    sample = read_sample([str(path)])
    assert sample.form == form
    assert sample.whole and sample.rows == sample.estimated_rows == sum(map(len, sample.columns.values())) / len(
        sample.columns
    )


def test_roles_and_transforms(tmp_path: Path) -> None:
    header = "row_id,y,user_id,age,ratio,spend,delta,C7,genres,hour,ip_hash,comment,constant,empty,dwell"
    text = rows(
        header,
        [10_000 + 7 * row for row in range(N)],
        LABELS,
        [row * row % 53 for row in range(N)],
        [20 + row % 50 for row in range(N)],
        [row % 90 / 100 for row in range(N)],
        [1.5 + 3 ** (row % 12) for row in range(N)],
        [(-1) ** row * (row % 9 + 0.5) for row in range(N)],
        [row % 120 for row in range(N)],
        ["Drama|Sci-Fi" if row % 3 else f"Western|Crime|{'Drama' if row % 2 else 'War'}" for row in range(N)],
        [f"141021{row // 9:02d}" for row in range(N)],
        [f"{row * 2654435761 % 2**32:08x}" for row in range(N)],
        [f"it was {'very ' * (20 + row % 5)} good" for row in range(N)],
        ["k"] * N,
        [""] * N,
        [row if label else "" for row, label in enumerate(LABELS)],
    )
    schema = inferred(tmp_path, text)
    assert settings(schema) == {
        "row_id": {"role": "leave"},
        "user_id": {"role": "categorical", "min_count": 2},
        "age": {"role": "dense", "transform": "standard"},
        "ratio": {"role": "dense"},
        "spend": {"role": "dense", "transform": "log1p"},
        "delta": {"role": "dense", "transform": "standard"},
        "C7": {"role": "categorical", "min_count": 2},
        "genres": {"role": "multi_hot", "separator": "|"},
        "hour": {"role": "keep", "time": "%y%m%d%H"},
        "ip_hash": {"role": "leave"},
        "comment": {"role": "leave"},
        "constant": {"role": "leave"},
        "empty": {"role": "leave"},
        "dwell": {"role": "leave"},
    }
    assert schema.label == "y" and schema.split.by == "time" and schema.split.column == "hour"
    comments = (tmp_path / "schema.yaml").read_text()
    for seen in ("none missing, 20 to 69", "reveals the label", "200 rows (all rows)", "True in 14.5%", "Drama ("):
        assert seen in comments, comments


@pytest.mark.parametrize(
    ("values", "name", "time"),
    [
        (["2024-03-01 10:00:00", "2024-03-02T11:30"], "at", "iso"),
        (["01.02.2024", "15.02.2024"], "wann", "%d.%m.%Y"),
        (["13/02/2024 10:00", "14/02/2024 11:00"], "x", "%d/%m/%Y %H:%M"),
        ([978300000, 978300613], "timestamp", "unix"),
        ([1700000000000, 1700000060000], "time_ms", "unix_ms"),
        ([20220421, 20220508], "date", "%Y%m%d"),
        ([2014102100, 2014102123], "hour", "%Y%m%d%H"),
        (["2024-02-30", "2024-01-01"], "date", None),
        ([400, 2300], "hourmin", None),
        ([978300613, 978300000], "user_id", None),
    ],
)
def test_times(values: Sequence[object], name: str, time: str | None, tmp_path: Path) -> None:
    schema = inferred(tmp_path, rows(f"y,a,{name}", [1, 0, 1, 0], ["p", "q", "q", "q"], [*values, *values]))
    assert settings(schema)[name].get("time") == time


def test_a_time_that_cannot_split_the_rows_does_not(tmp_path: Path) -> None:
    for times, by in (
        ([f"2024-01-{1 + row // 10:02d}" for row in range(N)], "time"),
        ([f"{1 + row // 9:02d}.{1 + row % 9:02d}.2024" for row in range(N)], "time"),
        (["2024-01-01"] * (N - 1) + ["2024-01-02"], "random"),
        ([""] + ["2024-01-02 10:00:00"] * (N - 1), "random"),
        # The last clicks are in the middle of the time.
        ([f"2024-01-01 10:00:{0 if label else 59}" for label in LABELS], "random"),
    ):
        assert inferred(tmp_path, rows("y,a,at", LABELS, FEW, times)).split.by == by


def test_splits_of_files_and_columns(tmp_path: Path) -> None:
    paths = []
    for name in ("train.csv", "valid.csv", "test.csv"):
        (tmp_path / name).write_text("y,a\n1,p\n0,q\n")
        paths.append(str(tmp_path / name))
    infer(tmp_path / "files.yaml", "y", paths)
    split = read_log_schema(tmp_path / "files.yaml").split
    assert split.values == {"train": ("train.csv",), "validation": ("valid.csv",), "test": ("test.csv",)}
    text = rows("y,a,fold", LABELS, FEW, [("train", "val")[row % 5 == 0] for row in range(N)])
    schema = inferred(tmp_path, text)
    assert schema.split.values == {"train": ("train",), "validation": ("val",)}
    assert schema.columns["fold"].role == "leave"


def test_numbers_that_are_written_as_text_are_told(tmp_path: Path) -> None:
    price, share, size = ([form.format(row) for row in range(N)] for form in ("${}.50", "{}%", "1 {:03}"))
    columns = settings(inferred(tmp_path, rows("y,price,share,size,few", LABELS, price, share, size, FEW)))
    assert [columns[name]["role"] for name in ("price", "share", "size", "few")] == ["leave"] * 3 + ["categorical"]
    said = render(infer(tmp_path / "again.yaml", "y", [str(tmp_path / "log.csv")]))
    assert (
        "  text         price ('$0.50'), share ('0%'), size ('1 000'): to use them as numbers, write plain ones" in said
    )
    mostly = ["n/a" if row % 9 == 0 else row / 7 for row in range(N)]
    assert settings(inferred(tmp_path, rows("y,n", LABELS, mostly)))["n"] == {"role": "dense", "transform": "standard"}
    huge = [10**20 + row % 50 for row in range(N)]
    assert settings(inferred(tmp_path, rows("y,price", LABELS, huge)))["price"]["role"] == "categorical", "not exact"


def test_guesses_and_missing_labels_are_reported(tmp_path: Path) -> None:
    text = rows("y;n", LABELS, [f"{row + 1},{row:03}" for row in range(N)], separator=";")
    for values, said in (
        (text, "  decimal      a comma, as a guess: 1,000 is read as 1.000; if it separates thousands, remove it"),
        (
            text.replace("1;2,001", ";2,001").replace("0;2,001", ";2,001"),
            "  no label     1 row: remove them from the fil",
        ),
    ):
        (tmp_path / "log.csv").write_text(values)
        (tmp_path / "s.yaml").unlink(missing_ok=True)
        assert said in render(infer(tmp_path / "s.yaml", "y", [str(tmp_path / "log.csv")]))
    (tmp_path / "log.csv").write_text(text.replace(",", ",1"))
    (tmp_path / "s.yaml").unlink()
    assert "  decimal " not in render(infer(tmp_path / "s.yaml", "y", [str(tmp_path / "log.csv")]))


def test_parquet_without_rows_or_with_equal_names_and_other_line_ends(tmp_path: Path) -> None:
    pq.write_table(
        pa.table([pa.array([0, 1]), pa.array([1, 2]), pa.array([3, 4])], names=["y", "a", "a"]), tmp_path / "a"
    )
    pq.write_table(pa.table({"y": pa.array([], pa.int64())}), tmp_path / "b")
    (tmp_path / "c").write_text("y,a\r1,x\r0,z\r")
    for name, fault in (
        ("a", "two columns are named 'a'; rename one of them"),
        ("b", "has no rows; give files with rows"),
        ("c", "has carriage returns as line ends; make them line feeds"),
    ):
        with pytest.raises(UserError, match=fault):
            read_sample([str(tmp_path / name)])


def test_json_lists_weights_and_names_that_need_care(tmp_path: Path) -> None:
    lines = [
        {
            "y": row % 2 == 0,
            "tags": [row % 5, 7],
            "tags_share": [0.25, 0.5],
            "a/b": "xyz"[row % 3],
            "no": {"k": 1},
            "mix": [row, "x"],
        }
        | ({"age": 3.5 + row % 5} if row % 3 else {})
        for row in range(N)
    ]
    schema = inferred(tmp_path, "\n".join(map(json.dumps, lines)), name="log.jsonl")
    assert settings(schema) == {
        "tags": {"role": "multi_hot", "weights": "tags_share"},
        "a_b_": {"role": "categorical", "source": "a/b"},
        "no": {"role": "leave"},
        "mix": {"role": "leave"},
        "age": {"role": "dense", "transform": "standard"},
    }
    schema.check_columns(list(lines[1]), "log")


def test_parquet_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "y": pa.array([True, False] * N),
            "when": pa.array(range(2 * N), pa.timestamp("ns")),
            "item": pa.array([row % 30 for row in range(2 * N)], pa.uint32()),
            "userId": pa.array([None if row % 9 == 0 else row % 30 + 0.0 for row in range(2 * N)]),
            "price": pa.array([None if row % 9 == 0 else row % 70 + 0.25 for row in range(2 * N)]),
            "nan": pa.array([float("nan")] * (2 * N)),
            "where": pa.array(["DE", "日本"] * N).dictionary_encode(),
        }
    )
    path = tmp_path / "log.parquet"
    pq.write_table(table, path, row_group_size=16)
    infer(tmp_path / "s.yaml", "y == true", [str(path)])
    assert settings(read_log_schema(tmp_path / "s.yaml")) == {
        "when": {"role": "keep"},
        "item": {"role": "categorical", "min_count": 2},
        "userId": {"role": "categorical", "min_count": 2},
        "price": {"role": "dense", "transform": "standard"},
        "nan": {"role": "leave"},
        # It alternates like the label.
        "where": {"role": "leave"},
    }


def test_samples_of_large_files_reach_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sniffing, "_SAMPLE_BYTES", 4_000)
    text = rows("y,time,title", LABELS * 20, range(1_700_000_000, 1_700_000_000 + 20 * N), FEW * 20)
    path, packed = tmp_path / "log.csv", tmp_path / "log.csv.gz"
    path.write_text(text)
    packed.write_bytes(gzip.compress(text.encode(), mtime=0))
    sample = read_sample([str(path)])
    assert not sample.whole and 100 < sample.rows < 400 and abs(sample.estimated_rows - 20 * N) < 2 * N
    assert (
        int(sample.columns["time"][0]) == 1_700_000_000
        and int(sample.columns["time"][-1]) == 1_700_000_000 + 20 * N - 1
    )
    assert len(read_sample([str(packed)]).columns["time"]) < 400
    infer(tmp_path / "s.yaml", "y", [str(packed)])
    assert "a sample of about" in (tmp_path / "s.yaml").read_text()
    lines = [
        json.dumps({"y": label, "a": few, **({"rare": 1} if row == N // 2 else {})})
        for row, (label, few) in enumerate(zip(LABELS, FEW, strict=True))
    ]
    assert inferred(tmp_path, "\n".join(lines), name="log.jsonl").rest == "leave"


def test_words_that_recur_get_a_hint(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["red", "blue", "green", "new", "sale", "hot", "top"]
    tags = [" ".join(draw.sample(words, draw.choice([1, 2, 3]))) for _ in range(500)]
    inferred(tmp_path, rows("y,tags", [draw.randint(0, 1) for _ in tags], tags))
    assert "{role: multi_hot, separator: ' '}" in " ".join((tmp_path / "schema.yaml").read_text().split("\n  #   "))


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"log.parquet is not a Parquet file, which begins and ends with PAR1"):
        inferred(tmp_path, b"\0\1" * 500, name="log.parquet")


def test_decimal_commas_are_no_bags(tmp_path: Path) -> None:
    price = [f"{row * 7 % 30},{row % 4}5" if row % 9 else "NA" for row in range(N)]
    separators = inferred(tmp_path, rows("y;a;price", LABELS, FEW, price, separator=";"))
    assert settings(separators)["price"] == {"role": "dense", "transform": "standard"}
    # Numbers in a column that also holds words cannot be dense.
    mixed = inferred(tmp_path, rows("y;a;price", LABELS, FEW, [*price[:-2], "free", "free"], separator=";"))
    assert settings(mixed)["price"]["role"] == "categorical"


MISTAKES: list[tuple[str | bytes, str | None, str]] = [
    ("y,a\n1,x\n0,z\n", None, r"--label is missing.* give --label y \(y: 1 \(50.0%\), 0 \(50.0%\)\)"),
    ("stars,a\n1,x\n5,z\n3,z\n", None, r"give --label 'stars >= 4'"),
    ("bought,a\nyes,x\nno,z\n", None, r"give --label 'bought == yes'"),
    ("a,b\nx,1\nz,7\n", None, r"no column looks like a label.*columns are a, b"),
    ("y,a\n1,x\n0,z\n", "yy", r"no column 'yy'; did you mean y\? The columns are y, a"),
    ("y,a\nja,x\nnein,z\n", "y", r"holds ja \(50.0%\), nein .*such as --label 'y == ja'"),
    ("y,a\nja,x\nnein,z\n", "y >= 3", r"'(ja|nein)' is not a number, so compare it by == or !="),
    ("y,a\n" + "0,x\n" * 700 + "".join(f"{n},z\n" for n in range(1, 301)), "y", r" such as --label 'y >= 1'"),
    ("y,a\n" + "".join(f"{n},z\n" for n in range(100)), "y", r" such as --label 'y >= 50'"),
    ("y,a\n1,x\n-1,z\n", "y", r"expected 0 and 1, .* such as --label 'y == 1'"),
    ("y,a\n" + "1,x\n0,z\n" * N + "2,x\n", "y", r"correct the rows with 2, or give a .* such as --label 'y >= 1'"),
    ("y,a\n1,x\n0,z\n", "y = 1", r"label 'y = 1': a condition needs ==, .* or <: write 'y == 1'"),
    ("y,a\n1,x\n0,z\n", "y => 1", r"write 'y >= 1'"),
    ("y,a\n1,x\n0,z\n", "y >= abc", r"label 'y >= abc': 'abc' is not a number, which >= needs"),
    (
        "y,a\n" + "".join(f"{i}.5,x\n" for i in range(N)),
        "y",
        r"column y holds values such as 0.5, 1.5, 2.5; expected.*--label 'y >= 100.5'",
    ),
    ("y,a\n1,x\n3,z\n", "y > 5", r"every row has the same label"),
    ("y,a\n1,x\n0,y,z\n1,x\n1,x\n", "y", r"log.csv: line 3 has 3 fields and the first line 2"),
    ("y,a,a\n1,x,z\n0,z,z\n", "y", r"two columns are named 'a'"),
    (
        "1,4,x\n0,5,z\n",
        "y",
        r"has no header: its first line is '1,4,x'; name its 3 columns, such as --columns c1,c2,c3",
    ),
    (
        "\t".join(["1"] * 40) + "\n",
        "y",
        r"40 fields in its first line, as Criteo's own files have, which need no schema",
    ),
    ("alone\n1\n0\n", "alone", r"no separator found"),
    ("", "y", r"is empty"),
    ("y,a\n1,x\n0,z\n".encode("utf-16-be"), "y", r"has null bytes; expected text, or a Parquet file: if it is UTF-16"),
    ("y,a\x1b[31m\n1,x\n0,z\n", "y", r"the column 'a\\x1b\[31m' has control characters"),
    ('{"y": 1, "a": ' + "[" * 9_000 + "]" * 9_000 + "}\n", "y", r"line 1 is not JSON \(maximum recursion"),
    ("y,a\n", "y", r"has no rows"),
    ('{"y": 1}\n{"y": \n', "y", r"line 2 is not JSON"),
    ("[1]\n", "y", r"line 1 is not a JSON object"),
    ("y,a\n" + "1,k\n0,k\n" * N, "y", r"no column of .* can be a feature: a: the same value in every row"),
]


@pytest.mark.parametrize(("text", "label", "message"), MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(
    text: str | bytes, label: str | None, message: str, tmp_path: Path
) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        infer(tmp_path / "schema.yaml", label, [str(log)])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_files_of_different_forms_are_named(tmp_path: Path) -> None:
    for name, content in (("a.csv", "y,a\n1,x\n0,z\n"), ("b.csv", "y,b\n1,x\n0,z\n"), ("c.csv", "y,a,b\n1,x,z\n")):
        (tmp_path / name).write_text(content)
    for name, columns in (("a.parquet", ("y", "a")), ("b.parquet", ("y", "b"))):
        pq.write_table(pa.table({column: [1, 0] for column in columns}), tmp_path / name)
    for names, message in (
        (("a.csv", "b.csv"), r"b.csv begins with 'y,b', and .*a.csv with 'y,a'; give files with the same header"),
        (("a.csv", "c.csv"), r"c.csv: its first line, 'y,a,b', has other columns than that of .*a.csv, 'y,a'; give"),
        (("a.parquet", "b.parquet"), r"b.parquet has the columns y, b, and .*a.parquet y, a"),
        (("a.parquet", "a.csv"), r"a.csv cannot be read"),
        (("a.csv", "a.csv"), r"is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            infer(tmp_path / "schema.yaml", "y", [str(tmp_path / name) for name in names])


def test_damaged_logs_are_read_or_refused(tmp_path: Path) -> None:
    """200 logs with up to four changes each: a schema that can be read back, or one line."""
    draw = random.Random(1)
    logs = [
        b'y,a,b\n1,x,3\n0,"z,""",4.5\n0,q,\n',
        b'{"y":1,"a":[1,2],"b":"2024-01-01"}\n{"y":0,"a":[],"b":null}\n',
        "y;ü\r\n1;7,5\r\n0;\r\n".encode(),
    ]
    outcomes = set()
    for _ in range(200):
        log = bytearray(draw.choice(logs) * draw.randint(1, 3))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(log))
            log[at : at + draw.randrange(3)] = bytes(
                draw.choices(b',;"\n{}[]:0 1e-.\\x\0\xc3\xff', k=draw.randrange(3))
            )
        try:
            inferred(tmp_path, bytes(log))
            outcomes.add("read")
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_what_a_threshold_leaves_and_what_is_needed_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "y;a\n" + "".join(f"{label};{('é, è', '', 'b')[row % 3]}\n" for row, label in enumerate(LABELS))
    Path("log.csv").write_bytes(text.encode("cp1252"))
    assert main(["preprocess", "--infer", "s.yaml", "--label", "y", "--input", "log.csv"]) == 0
    assert "encoding     cp1252 (a guess, because the text is not UTF-8: check letters" in capsys.readouterr().out
    schema = Path("s.yaml").read_text()
    assert "'é, è' (50.4%), b (49.6%)" in schema and "# A guess, because the text is not UTF-8: check letters" in schema
    Path("s.yaml").write_text(schema.replace("role: categorical", "role: categorical, min_count: 100000"))
    assert main(["preprocess", "--schema", "s.yaml", "--input", "log.csv", "--output", "o", "--workers", "1"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == (
        "warning: all 2 values of a are rarer than min_count, so they share one row of the table: lower min_count, or "
        "leave the column out (role: leave)"
    )
    assert said[0].startswith("about 200 rows: needs about 3.91 KiB of disk (") and said[0].endswith("and 1 s")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log").write_text("".join(f"{row % 9}::{row % 4}::{1 + row % 5}::{978300000 + row}\n" for row in range(N)))
    command = ["preprocess", "--infer", "s.yaml", "--columns", "user,item,rating,time", "--input", "log", "--label"]
    assert main([*command, "rating >= 4"]) == 0
    said = capsys.readouterr().out
    assert "label        rating >= 4 (true in 40.0%" in said and "preprocess --schema s.yaml --input log" in said
    kept = Path("s.yaml").read_text()
    assert f"# Inferred from 200 rows (all rows) by: python -m lightning_dlrm {' '.join(command[:3])}" in kept
    assert "# Needs:  the files after --input" in kept and "# Run:    python -m lightning_dlrm preprocess" in kept
    assert "# Expect: a dataset of 2 categorical columns, 1 kept column, split by time. Roles are guesses" in kept
    assert "look at s.yaml first: roles are guesses" in said and "categorical  user, item (ids or names" in said
    assert "names: [user, item, rating, time]" in kept
    for more, message in (
        (["rating >= 4"], "s.yaml exists; edit it, or name a new file"),
        (["rating >= 4", "--infer", "none/s.yaml"], "there is no folder"),
        (["rating >= 4", "--infer", "t.yaml", "--output", "o"], "leave out --output"),
        (["rating >= 4", "--infer", "t.yaml", "--columns", "a,b"], "--columns names 2 columns"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["preprocess", "--input", "log", "--output", "o", "--label", "y"]) == 2
    assert "--label is an option of --infer" in capsys.readouterr().err
    assert Path("s.yaml").read_text() == kept and sorted(path.name for path in Path().iterdir()) == ["log", "s.yaml"]
