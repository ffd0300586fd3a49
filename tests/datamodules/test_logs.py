"""``preprocess --schema``: a dataset is what the schema of its log says, whatever the form of the log's files, and each
mistake gets one line that names the file, the line and the remedy."""

import csv
import datetime
import gzip
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import datamodules
from datamodules.encoder import RowEncoder
from datamodules.log_schema import log_schema
from datamodules.preprocess import counting, log_reader, pipeline
from datamodules.preprocess.log_files import open_readers
from datamodules.preprocess.log_reader import LogReader
from datamodules.preprocess.pipeline import preprocess
from datamodules.preprocess.progress import Progress
from datamodules.preprocess.quotes import find_quoted, line_ends
from datamodules.preprocess.sources import find_files
from datamodules.preprocess.splits import SplitRule
from datamodules.preprocess.transforms import log_squared_bins
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import SPLITS, DatasetSchema

HEADER = ["click", "user", "price", "tags", "weights", "day", "fold"]


def make(inputs: Path | Sequence[Path], output: Path, document: dict[str, Any], **options: Any) -> DatasetSchema:
    files = [inputs] if isinstance(inputs, Path) else inputs
    return preprocess(
        None,
        None,
        files,
        output,
        schema=log_schema(document),
        workers=1,
        **{"progress": Progress(show=False), **options},
    )


def rows_of(folder: Path, schema: DatasetSchema, split: str) -> list[dict[str, Any]]:
    return [row for file in schema.splits[split].files for row in pq.read_table(folder / file.path).to_pylist()]


# --- the meaning of a schema, row by row -----------------------------------------------------------

Row = dict[str, Any]


def plain_splits(rows: Sequence[Row], split: dict[str, Any]) -> list[str | None]:
    shares = np.cumsum(split.get("ratios", (0.8, 0.1, 0.1)))
    if split["by"] == "column":
        of_value = {str(value): name for name in SPLITS for value in split.get(name, ())}
        return [of_value.get(row["fold"]) for row in rows]
    if split["by"] == "random":
        # Which rows are drawn is not of interest here, but that they lie apart.
        return [
            SPLITS[code] for code in SplitRule(ratios=split["ratios"], seed=split["seed"]).split_of(0, len(rows), None)
        ]
    if split["by"] == "time":
        days = sorted(row["day"] for row in rows)
        first, second = (days[math.ceil(share * len(days) - 1e-9) - 1] for share in shares[:2])
        return [SPLITS[0] if r["day"] <= first else SPLITS[1] if r["day"] <= second else SPLITS[2] for r in rows]
    ends = [round(share * len(rows)) for share in shares]
    return [next(name for name, end in zip(SPLITS, ends, strict=True) if i < end) for i in range(len(rows))]


class PlainTable:
    """Ids of the values of a column, by the definition."""

    def __init__(self, values: Sequence[str | None], *, min_count: int, max_rows: int | None, missing: str) -> None:
        counts = Counter(value for value in values if value is not None)
        self.first = {"own": 2, "rare": 1, "none": 1}[missing]
        often = sorted((v for v, n in counts.items() if n >= min_count), key=lambda value: (-counts[value], value))
        kept = often if max_rows is None else often[: max_rows - self.first]
        self.ids = {value: self.first + i for i, value in enumerate(kept)}
        self.rows = max(self.first + len(kept), 1)
        has_missing, has_rare = None in values, len(kept) < len(counts)
        rare_row = self.first - 1
        if missing == "rare" and has_missing:
            has_rare = True
        self.rare = rare_row if has_rare else self.rows - 1 if kept else 0
        own = has_missing if missing == "own" else has_rare and missing == "rare"
        self.missing = 0 if own else self.rare

    def __getitem__(self, value: str | None) -> int:
        return self.missing if value is None else self.ids.get(value, self.rare)


def plain_number(value: float | None, column: dict[str, Any], counted: Sequence[float | None]) -> float | None:
    fill = column.get("fill")
    numbers = [fill if number is None else number for number in counted]
    known = sorted(number for number in numbers if number is not None)
    value = fill if value is None else value
    if value is None:
        return None
    transform = column.get("transform", "none")
    if transform == "log1p":
        return math.log(max(value, 0) + 1)
    if transform == "signed_log":
        return math.copysign(math.log(abs(value) + 1), value)
    if transform == "log_squared":
        return math.floor(math.log(value) ** 2) if value > 2 else math.trunc(value)
    if transform == "standard":
        mean = sum(known) / len(known) if known else 0
        deviation = math.sqrt(sum((x - mean) ** 2 for x in known) / len(known)) if known else 1
        return (value - mean) / (deviation if len(set(known)) > 1 else 1)
    if transform == "minmax":
        low, high = (known[0], known[-1]) if known else (0, 0)
        return (value - low) / ((high - low) or 1)
    if transform == "quantile":
        edges = plain_edges(known, column.get("bins", 256))
        return sum(edge < value for edge in edges) / max(len(edges), 1)
    return value


def plain_bin(value: float, edges: Sequence[float] | None) -> int:
    """The bin of a number by edges of quantiles; without edges by its squared logarithm, as an integer of 32 bits."""
    if edges is not None:
        return sum(edge < value for edge in edges)
    return int(math.floor(math.log(value) ** 2) if value > 2 else math.trunc(value)) % 2**32


def plain_edges(known: Sequence[float], bins: int) -> list[float]:
    ranks = [math.ceil(k * len(known) / bins) for k in range(1, bins + 1)] if known else []
    return sorted({known[rank - 1] for rank in ranks})[:-1]


def plain_dataset(rows: Sequence[Row], document: dict[str, Any]) -> dict[str, list[Row]]:
    splits = plain_splits(rows, document["split"])
    counted = [r for r, s in zip(rows, splits, strict=True) if s == "train" or (s and document["counts"] == "all")]
    columns, limits = document["columns"], {name: document[name] for name in ("min_count", "max_rows", "missing")}
    own = {name: value for name, value in columns["user"].items() if name in limits}
    users = PlainTable([row["user"] for row in counted], **{**limits, **own})
    bag_of = lambda row: [tag for tag in row["tags"] if tag]  # noqa: E731
    tags = PlainTable([tag for row in counted for tag in bag_of(row)], **{**limits, "missing": "none"})
    prices = [row["price"] for row in counted]
    known = sorted(price for price in prices if price is not None)
    edges = plain_edges(known, columns["bin"]["bins"]) if columns["bin"]["transform"] == "quantile" else None
    bin_of = lambda price: None if price is None else plain_bin(price, edges)  # noqa: E731
    # Bins of equal counts are in the order of their numbers, and others by their counts.
    named = {bin_of(price): f"{bin_of(price):010d}" for price in known}
    bins = PlainTable([named.get(bin_of(price)) for price in prices], **limits)
    result: dict[str, list[Row]] = {}
    for row, split in zip(rows, splits, strict=True):
        if split is None:
            continue
        price_bin = bin_of(row["price"])
        result.setdefault(split, []).append(
            {
                "label": int(row["click"]),
                "user": users[row["user"]],
                "who": row["user"],
                "price": plain_number(row["price"], columns["price"], prices),
                "bin": bins[None if price_bin is None else named.get(price_bin, "none")],
                "tags": [tags[tag] for tag in bag_of(row)],
                "tags_weights": [w for tag, w in zip(row["tags"], row["weights"], strict=True) if tag],
                "day": datetime.datetime(2024, 1, row["day"]),
            }
        )
    return result


names = st.sampled_from(["a", "ü", "b c", "ß;", 'q"', "0", "00", "x,y"]) | st.none()
rows = st.fixed_dictionaries(
    {
        "click": st.booleans(),
        "user": names,
        "price": st.none() | st.integers(-3, 9).map(float) | st.floats(-1e6, 1e6).map(lambda x: round(x, 3)),
        "tags": st.lists(st.sampled_from(["s", "t", "ů", "v", ""]), max_size=3),
        "day": st.integers(1, 28),
        "fold": st.sampled_from(["0", "1", "2", "3"]),
    }
)
splits = st.sampled_from(
    [
        {"by": "position", "ratios": [0.5, 0.25, 0.25]},
        {"by": "time", "column": "day", "ratios": [0.6, 0.2, 0.2]},
        {"by": "column", "column": "fold", "train": ["0", "1"], "validation": ["2"], "test": [3]},
        {"by": "column", "column": "fold", "train": ["0"], "validation": ["2"], "test": [3], "leave": [1]},
        {"by": "random", "ratios": [0.5, 0.25, 0.25], "seed": 7},
        {"by": "files", "train": ["log0.csv"], "validation": ["log1*"], "test": ["*2.csv"]},
    ]
)


OWN_LIMITS: list[dict[str, Any]] = [{}, {"min_count": 2}, {"max_rows": 4}, {"missing": "rare"}, {"missing": "own"}]
BINS: list[dict[str, Any]] = [
    {"transform": "quantile", "bins": 2},
    {"transform": "quantile", "bins": 5},
    {"transform": "log_squared"},
]


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    transform = draw(st.sampled_from(["none", "log1p", "signed_log", "log_squared", "standard", "minmax", "quantile"]))
    price: dict[str, Any] = {"role": "dense", "transform": transform}
    price |= {"bins": draw(st.integers(2, 9))} if transform == "quantile" else {}
    price |= {"fill": draw(st.sampled_from([0.0, -1.5]))} if draw(st.booleans()) else {}
    return {
        "dataset": "own",
        "label": "click",
        "columns": {
            "user": {"role": "categorical", **draw(st.sampled_from(OWN_LIMITS))},
            "who": {"role": "keep", "source": "user"},
            "price": price,
            "bin": {"role": "categorical", "source": "price", **draw(st.sampled_from(BINS))},
            "tags": {"role": "multi_hot", "separator": "|", "weights": "weights"},
            "day": {"role": "keep", "time": "%Y-%m-%d"},
            "fold": {"role": "leave"},
        },
        "split": draw(splits),
        "counts": draw(st.sampled_from(["train", "all"])),
        "min_count": draw(st.integers(1, 3)),
        "max_rows": draw(st.sampled_from([None, 3, 4])),
        "missing": draw(st.sampled_from(["own", "rare"])),
    }


def as_csv(rows: Sequence[Row], separator: str = ",") -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator="\n")
    writer.writerow(HEADER)
    for row in rows:
        joined = ["|".join(map(str, row[name])) for name in ("tags", "weights")]
        day = f"2024-01-{row['day']:02d}"
        values = [int(row["click"]), row["user"] or "", row["price"], *joined, day, row["fold"]]
        writer.writerow(["" if value is None else value for value in values])
    return out.getvalue()


def test_bins_of_decimals_are_those_of_their_logarithms() -> None:
    values = [5.87, 6.0, 2.5, 2.0, 1.99, 0.15, -0.0, -0.5, -3.7, 1e9, -1e9]
    assert log_squared_bins(np.array(values)).tolist() == [plain_bin(value, None) for value in values]
    whole = np.array([-7, 0, 2, 3, 5, 2**31 - 1, -(2**31)], np.int32)
    assert log_squared_bins(whole).tolist() == [plain_bin(int(value), None) for value in whole]
    assert log_squared_bins(np.array([1e300, -1e300])).tolist() == [plain_bin(1e300, None), 2**31]


@settings(max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(rows=st.lists(rows, min_size=8, max_size=30), document=documents(), piece=st.sampled_from([60, 200, 10**6]))
def test_a_dataset_is_what_the_schema_says(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], document: dict[str, Any], piece: int
) -> None:
    for row in rows:
        # A bag of one empty text is an empty bag.
        row["tags"] = [] if row["tags"] == [""] else row["tags"]
        row["weights"] = [0.5 * (1 + i) for i in range(len(row["tags"]))]
    folder = tmp_path_factory.mktemp("log")
    ends = [0, *(round(share * len(rows)) for share in (0.8, 0.9, 1.0))]
    if document["split"]["by"] != "files":
        ends = [0, 0, 0, len(rows)]
    files = [folder / f"log{i}.csv" for i in range(3) if ends[i] < ends[i + 1]]
    for i, path in enumerate(files, 3 - len(files)):
        path.write_text(as_csv(rows[ends[i] : ends[i + 1]]))
    expected = plain_dataset(rows, document)
    if not all(len({row["label"] for row in expected.get(split, [])}) == 2 for split in SPLITS):
        with pytest.raises(UserError, match=r"no rows are left in the|every label of the .* split is"):
            make(files, folder / "data", document, block_bytes=piece)
        return
    schema = make(files, folder / "data", document, block_bytes=piece)
    for split in SPLITS:
        found = rows_of(folder / "data", schema, split)
        assert [list(row) for row in found] == [list(row) for row in expected[split]]
        for one, other in zip(found, expected[split], strict=True):
            price, wanted = one.pop("price"), other.pop("price")
            assert (price is None) == (wanted is None)
            assert price is None or price == pytest.approx(wanted, rel=1e-5, abs=1e-6)
            assert one == other
    assert DatasetSchema.load(folder / "data") == schema


# --- the form of files changes nothing -------------------------------------------------------------


def generated(count: int) -> list[Row]:
    rng = np.random.default_rng(1)
    result = []
    for i in range(count):
        tags = [f"t{tag}" for tag in rng.integers(0, 9, rng.integers(0, 4))]
        user = int(rng.zipf(1.3)) % 500
        price = None if i % 7 == 0 else round(float(rng.normal(3, 2)), 2)
        result.append(
            {
                "click": bool(rng.random() < 0.4),
                "user": None if user == 3 else f"ü{user}\n,x" if user % 50 == 0 else f"ü{user}",
                "price": price,
                "tags": tags,
                "weights": [round(float(w), 2) for w in rng.random(len(tags))],
                "day": 1 + i * 28 // count,
                "fold": str(i % 4),
            }
        )
    return result


DOCUMENT: dict[str, Any] = {
    "dataset": "own",
    "label": "click",
    "columns": {
        "user": {"role": "categorical", "min_count": 2},
        "who": {"role": "keep", "source": "user"},
        "price": {"role": "dense", "transform": "standard"},
        "bin": {"role": "categorical", "source": "price", "transform": "log_squared"},
        "tags": {"role": "multi_hot", "separator": "|", "weights": "weights"},
        "day": {"role": "keep", "time": "iso"},
        "fold": {"role": "leave"},
    },
    "split": {"by": "time", "column": "day"},
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_the_form_of_the_files_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = generated(400)
    text = as_csv(rows)
    plain = tmp_path / "log.csv"
    plain.write_text(text)
    make(plain, tmp_path / "plain", DOCUMENT)
    expected = contents(tmp_path / "plain")
    assert len(expected) == 3 + 3

    lists = {name: value for name, value in DOCUMENT["columns"]["tags"].items() if name != "separator"}
    with_lists = {**DOCUMENT, "columns": {**DOCUMENT["columns"], "tags": lists}}
    records = [{**row, "day": f"2024-01-{row['day']:02d}"} for row in rows]
    forms: dict[str, tuple[dict[str, Any], bytes]] = {
        "semicolons.csv": ({"separator": ";"}, as_csv(rows, ";").encode()),
        "tabs.tsv": ({}, as_csv(rows, "\t").encode()),
        "crlf.csv": ({}, text.replace("\n", "\r\n").replace("\r\n,x", "\n,x").encode()),
        "utf16.csv": ({"encoding": "utf-16"}, text.encode("utf-16")),
        "packed.csv.gz": ({}, gzip.compress(text.encode())),
        "lines.jsonl": (with_lists, "".join(json.dumps(one) + "\n" for one in records).encode()),
    }
    for name, (changed, content) in forms.items():
        (tmp_path / name).write_bytes(content)
        for piece in (8_000, 10**7):
            output = tmp_path / f"of_{name}_{piece}"
            make(tmp_path / name, output, {**DOCUMENT, **changed}, block_bytes=piece)
            assert contents(output) == expected, (name, piece)

    table = pa.Table.from_pylist(records)
    table = table.set_column(1, "user", table["user"].dictionary_encode())
    table = table.set_column(5, "day", pc.strptime(table["day"], "%Y-%m-%d", "ns"))
    pq.write_table(table, tmp_path / "log", row_group_size=120)
    make(tmp_path / "log", tmp_path / "of_parquet", with_lists)
    assert contents(tmp_path / "of_parquet") == expected

    parts = [tmp_path / "part1.csv", tmp_path / "part2.csv"]
    header, body = text.split("\n", 1)
    cut = body.index("\n2024-01-10") if "\n2024-01-10" in body else body.index("2024-01-10")
    cut = body.index("\n", cut) + 1
    for part, lines in zip(parts, (body[:cut], body[cut:]), strict=True):
        part.write_text(f"{header}\n{lines}")
    make(parts, tmp_path / "of_parts", DOCUMENT)
    assert contents(tmp_path / "of_parts") == expected

    monkeypatch.setattr(counting, "_VALUES_AT_ONCE", 60)
    monkeypatch.setattr(counting, "_IDS_AT_ONCE", 16)
    make(plain, tmp_path / "spilled", DOCUMENT, block_bytes=4000)
    found = contents(tmp_path / "spilled")
    assert {n: v for n, v in found.items() if "vocabulary" not in n} == {
        name: value for name, value in expected.items() if "vocabulary" not in name
    }
    for name in expected:
        if "vocabulary" in name:
            assert pq.read_table(tmp_path / "spilled" / name).equals(pq.read_table(tmp_path / "plain" / name))


def test_new_rows_are_encoded_as_those_of_the_dataset(tmp_path: Path) -> None:
    rows = generated(2000)
    (tmp_path / "log.csv").write_text(as_csv(rows))
    schema = make(tmp_path / "log.csv", tmp_path / "data", DOCUMENT)
    test = rows_of(tmp_path / "data", schema, "test")
    new = rows[-len(test) :]
    # Without labels, and with a user and a tag that the dataset does not know.
    new += [{**new[-1], "user": "new", "tags": ["new", "t1"], "weights": [1, 2]}]
    lines = as_csv(new).splitlines(keepends=True)
    columns = list(csv.reader(io.StringIO("".join(lines), newline="")))
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows(row[1:] for row in columns)
    found = preprocess(
        None,
        None,
        [tmp_path / "new.csv"],
        tmp_path / "new",
        vocabulary=tmp_path / "data",
        progress=Progress(show=False),
    )
    assert found.encoding_fingerprint == schema.encoding_fingerprint
    encoded = rows_of(tmp_path / "new", found, "test")
    assert encoded[:-1] == [{k: v for k, v in row.items() if k != "label"} for row in test]
    reserved = {column.name: column.reserved for column in schema.columns}
    assert encoded[-1]["user"] == reserved["user"]["unknown"]
    assert encoded[-1]["tags"] == [reserved["tags"]["unknown"], encoded_tag(tmp_path / "data", "t1")]
    assert found.cells["test"]["user"]["unknown"] >= 1
    with pytest.raises(UserError, match="protocol is quantile, which is an option of Criteo's protocols"):
        preprocess(None, "quantile", [tmp_path / "new.csv"], tmp_path / "x", vocabulary=tmp_path / "data")


def encoded_tag(folder: Path, tag: str) -> int:
    known = pq.read_table(folder / "vocabulary/tags.parquet").to_pylist()
    return next(entry["id"] for entry in known if entry["value"] == tag)


# --- mistakes --------------------------------------------------------------------------------------

FEW: dict[str, Any] = {
    "dataset": "own",
    "label": "click",
    "columns": {"u": {"role": "categorical"}, "p": {"role": "dense"}, "t": {"role": "leave", "time": "%Y-%m-%d"}},
    "split": {"by": "position", "ratios": [0.5, 0.25, 0.25]},
}
LINES = [f"{i % 2},u{i % 5},{i}.5,2024-01-{i % 28 + 1:02d}" for i in range(16)]
BY_TIME = {"split": {"by": "time", "column": "t"}}
BY_COLUMN = {"split": {"by": "column", "column": "u", "train": ["u0", "u1"], "validation": ["u2"], "test": ["u3"]}}


def log_of(lines: Sequence[str], header: str = "click,u,p,t") -> bytes:
    return "".join(f"{line}\n" for line in (header, *lines)).encode()


def with_line(index: int, line: str) -> bytes:
    return log_of([*LINES[:index], line, *LINES[index + 1 :]])


MISTAKES: list[tuple[bytes, dict[str, Any], str]] = [
    (log_of(LINES, "click,u,pp,t"), {}, r"has no column 'p', which the schema names \(columns: p\); .*did you mean pp"),
    (log_of(LINES, "click,u,u,t"), {}, "has two columns named 'u'; rename one of them"),
    (log_of(LINES, "0,u1,1,2024-01-01"), {}, r"has no column 'click'.*looks like values \('0', 'u1', .*names: \[...\]"),
    (log_of(LINES, "0,,,5"), {}, r"seems to have no header; its first line looks like values"),
    (log_of(LINES), {"columns": {**FEW["columns"], "t": {"role": "keep", "time": "unix"}}},
     r"t is '2024-.*expected seconds since 1970, because its time is unix; set 'time: iso' for this column"),
    (with_line(3, "1,u1,1,1700000000"), {"columns": {**FEW["columns"], "t": {"role": "keep", "time": "iso"}}},
     "line 5: t is '1700000000', expected an ISO time such as .*; correct the line; --on-bad-row skip leaves bad"),
    (with_line(3, "1,u1,1,2024-01-99"), {"columns": {**FEW["columns"], "t": {"role": "keep", "time": "iso"}}},
     "line 5: t is '2024-01-99', expected an ISO time such as 2024-05-01 12:00:00; correct the line; --on-bad-row "),
    (log_of([line.replace("2024-01-", "day ") for line in LINES]),
     {"columns": {**FEW["columns"], "t": {"role": "keep", "time": "iso"}}},
     "line 2: t is 'day 01', expected an ISO time .*; set time for this column in the schema to the format .* line$"),
    ("\n".join("\t".join(["0", *["5"] * 13, *["68fd1e64"] * 26]) for _ in range(9)).encode(), {},
     "has no header: its first line looks like 40 values between '\\\\t'; .*give --dataset and --protocol"),
    (log_of(LINES), {"separator": ";"},
     "has ',' between fields, and the schema's separator is ';': set 'separator: \",\"' in the schema"),
    (log_of(LINES).replace(b",", b";").replace(b"click;u", b"click;u,v"), {},
     "has ';' between fields, and the schema names no separator, which means ','"),
    (log_of(LINES[1:], LINES[0]), {"names": ["click", "u", "p", "t"], "separator": "\t"},
     "has ',' between fields, and the schema's separator is "),
    (with_line(5, "1,u1,5,2024-01-01,9"), {}, "line 7: 5 fields, expected 4 between ','"),
    (with_line(5, "\n\n1,u1"), {}, "line 9: 2 fields, expected 4"),
    (with_line(5, '1,"u1,5,2024-01-01'), {}, "line 7: a field begins with a quote that no .*quote: null"),
    (with_line(5, '1,"u1,5,2024-01-01') + with_line(9, '1,"u,5,2024-01-01'), {}, "line 7: a field begins with a quote"),
    (log_of(LINES, 'click,"u,p,t'), {}, "line 1: a field begins with a quote that no"),
    (log_of(LINES, 'click,u"x,p,t'), {}, """its columns are click, u"x, p, t"""),
    (log_of(LINES, "click," + "u" * 140_000), {}, "line 1: field larger than field limit.*expected a header"),
    (b"x" * (1 << 20) + log_of(LINES), {}, "line 1: no line end in the first 1,048,576 bytes; expected a header"),
    (b"\r\r\n" + log_of(LINES), {}, "has no column 'click'.*; for rows without labels use --vocabulary DIR"),
    (with_line(7, "1,u1,cheap,2024-01-01"), {}, "line 9: p is 'cheap', expected a number"),
    (with_line(7, "1,u1,inf,2024-01-01"), {}, "line 9: p is inf, expected a number of at most 3.4e38"),
    (with_line(3, '1,"u\n1",1,2024-01-01\n2,u1,1,2024-01-01'), {},
     r"line 7: the label click is '2'.*correct the line, or give a condition such as label: 'click >= 1'"),
    (with_line(7, "1,u1,-1e39,2024-01-01"), {}, r"line 9: p is -1e\+39, expected a number of at most 3.4e38"),
    (log_of(LINES).replace(b"\n", b"\r"), {}, r"carriage returns as line ends; make them line feeds: tr '\\r' '\\n'"),
    (log_of(LINES), {"label": "p >= 5", "rest": "leave"}, "columns: p is made of the label's column p, so it reveals"),
    (with_line(3, ",u1,1,2024-01-01"), {}, "line 5: the label click is missing"),
    (log_of([line.replace("0,", "no,", 1).replace("1,", "yes,", 1) for line in LINES]), {},
     r"line 2: the label click is 'no' \(beside 'yes'\), .*click == yes"),
    (with_line(3, "x,u1,1,2024-01-01"), {"label": "click >= 1"}, "line 5: the label click is 'x' .*expected a number"),
    (with_line(3, "nan,u1,1,2024-01-01"), {"label": "click != 4"}, "line 5: the label click is 'nan' .*a number, as"),
    *(
        (with_line(3, f"1,u1,{value},2024-01-01"), {"columns": {**FEW["columns"], "p": {"role": "keep", "time": form}}},
         f"{shown}, which is not in the years 1900 to 2200 as time {form}; correct the line; --on-bad-row skip")
        for value, shown, form in [
            ("1700000000000", "line 5: p is 1700000000000", "unix"),
            ("1e30", r"line 5: p is 1e\+30", "unix_ms"),
        ]
    ),
    (with_line(9, "1,u1,1,yesterday"), BY_TIME, "line 11: t is 'yesterday', expected a time as '%Y-%m-%d'"),
    (with_line(9, "1,u1,1,"), BY_TIME, "line 11: t is missing, expected a time in every row"),
    (log_of(LINES), {**BY_TIME, "columns": {"u": {"role": "categorical"}}, "rest": "leave"},
     "line 2: t is text, such as '2024-01-01', which .*: columns: t: {role: leave, time: iso}"),
    (with_line(9, "1,ü,1,2024-01-01").decode().encode("latin-1"), {}, "line 11: the byte 0xfc is not UTF-8"),
    (log_of(LINES, "click,ü,p,t").decode().encode("utf-16"), {}, "line 1: the text is not UTF-8; .*utf-16"),
    (b"", {}, "is empty"),
    (log_of([]), {}, "has a header and no rows"),
    (log_of(LINES[:2]), {}, "every label of the train split is 0 .1 in all.; expected labels 0 and 1: the label is "),
    (log_of(LINES), {"label": "click == 7"},
     r"train split is 0 .*; expected labels 0 and 1: the label is 'click == 7', and click holds 0 \(.*%\), 1 \(.*%\);"),
    (log_of(LINES), {"split": {"by": "time", "column": "t", "ratios": [0.99, 0.005, 0.005],
                               "negative_sampling_rate": 0.5}},
     "no rows are left in the validation split .rows of equal time stay in one split.; .*change split in the schema"),
    (log_of(LINES), {"label": "click == 7", "split": {"by": "position", "negative_sampling_rate": 1e-9}},
     "no rows are left in the train split; .*keep more negatives"),
    (log_of(LINES), BY_COLUMN, "line 6: u is 'u4', which belongs to no split"),
    (log_of(LINES), {"split": {"by": "files", "train": ["other*"]}}, "belongs to no split; name it"),
    (log_of(LINES), {"columns": {"u": {"role": "multi_hot"}, "p": {"role": "leave"}, "t": {"role": "leave"}}},
     "line 2: u holds single values; give the separator"),
    (b"to do\n" * 20, {"format": "jsonl"}, "line 1: not JSON"),
    (b"PK\x03\x04....", {}, "is a zip archive; expected CSV"),
]  # fmt: skip


@pytest.mark.parametrize("content, changes, message", MISTAKES, ids=[message[:40] for *_, message in MISTAKES])
def test_a_mistake_is_named_and_nothing_is_left(
    tmp_path: Path, content: bytes, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        make(tmp_path / "log.csv", tmp_path / "data", {**FEW, **changes})
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            ['{"click": 1, "u": "a", "p": 1}', '{"click": 1, "u": 5, "p": 1}'],
            r"line 2: u is 5 \(whole numbers\), where earlier",
        ),
        (['{"click": 1, "u": "a", "p": 1}', "[1]"], "line 2: not a JSON object"),
        (
            ['{"click": 1, "u": "a", "p": 1}'] * 1200 + ['{"click": 1, "u": "a", "q": 1}'],
            "line 1,201: the key q is not",
        ),
        (['{"click": 1, "u": "a", "p": 1}', '{"click": 0, "u": "a", "p": "dear"}'], r'line 2: p is "dear" \(text\)'),
        (['{"click": 1, "u": "a"}'] * 1200 + ['{"click": 1, "u": "p", "P": 1}'], "has no column 'p'"),
        (["[" * 100_000], "line 1: not JSON"),
        (['{"click": 1, "u": "a", "p": 1}', '{"click": 1, "u": "a", "u": "b"}'], "line 2: the key u occurs twice"),
        (
            ['{"click": 1, "u": 1, "p": 1}'] * 1200 + ['{"click": 1, "u": 18446744073709551615, "p": 1}'],
            r"line 1,201: u is 18446744073709551615 \(whole numbers of more than 64 bits\), where earlier lines have "
            "whole numbers; quote the numbers in every line",
        ),
        (
            ['{"click": 1, "u": 1, "p": 1}'] * 1200 + ['{"click": 1, "u": 1.5, "p": 1}'],
            r"line 1,201: u is 1.5 \(numbers with fractions\), where earlier lines have whole numbers; write one of",
        ),
        (
            ['{"click": 1, "u": 1, "p": 1}'] * 1200 + ['{"click": 1, "u": [1.5], "p": 1}'],
            r"line 1,201: u is \[1.5\] \(lists of numbers with fractions\), where earlier lines have whole numbers",
        ),
        (
            ['{"click": 1, "u": "a", "p": 1}', '{"click": 1, "u": {"x": 1}, "p": 1}'],
            "line 2: u holds an object, expected",
        ),
        (
            ['{"click": 1, "u": "a", "p": 1}', '{"click": 1, "u": [1, "b"], "p": 1}'],
            "line 2: u holds a list of objects, ",
        ),
    ],
)
def test_a_mistake_in_json_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))
    columns = {"u": {"role": "categorical"}, "p": {"role": "dense"}}
    with pytest.raises(UserError, match=message):
        make(tmp_path / "log.jsonl", tmp_path / "data", {**FEW, "columns": columns})
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_keys_that_only_later_lines_have_are_columns(tmp_path: Path) -> None:
    """The schema names them, as --infer looks further than at the first lines."""
    rows = [{"click": i % 2, "u": f"u{i % 5}"} for i in range(1600)]
    later = [{"p": None}, {"p": 0.5, "day": "2024-01-01"}]
    rows = [{**row, **(later[i % 2] if i >= 1200 else {})} for i, row in enumerate(rows)]
    for name, some in (("a.jsonl", rows[:1000]), ("b.jsonl", rows[1000:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    columns = {"u": {"role": "categorical"}, "p": {"role": "dense"}, "day": {"role": "categorical"}}
    document = {**FEW, "columns": columns, "counts": "all"}
    schema = make([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "data", document, block_bytes=9000)
    found = [row["p"] for split in SPLITS for row in rows_of(tmp_path / "data", schema, split)]
    assert found == [row.get("p") for row in rows]
    days = pq.read_table(tmp_path / "data/vocabulary/day.parquet").column("value").to_pylist()
    assert [day for day in days if day] == ["2024-01-01"], "not a time, as pyarrow would take the text"


def test_odd_values_of_json_are_read(tmp_path: Path) -> None:
    """Integers of 64 bits keep all digits, texts that look like times stay texts, and what is left may be anything."""
    rows = [
        {"click": i % 2, "u": 2**64 - 1 - i % 2, "t": f"2024-01-0{1 + i % 2}", "z": [1, {"b": 2}]} for i in range(1240)
    ]
    rows = [{**row, "t": None} if i < 1200 else row for i, row in enumerate(rows)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"u": {"role": "categorical"}, "t": {"role": "categorical"}, "z": {"role": "leave"}}
    made = {}
    for rest in ("error", "leave"):
        made[rest] = tmp_path / rest
        document = {**FEW, "columns": columns, "counts": "all", "rest": rest}
        make(tmp_path / "log.jsonl", made[rest], document, block_bytes=9000)
    for name, values in (("u", [str(2**64 - 2), str(2**64 - 1)]), ("t", ["2024-01-01", "2024-01-02"])):
        found = pq.read_table(made["leave"] / f"vocabulary/{name}.parquet").column("value").to_pylist()
        assert [value for value in found if value] == values
    assert contents(made["error"]) == contents(made["leave"])


@given(st.lists(st.sampled_from(['"', '""', ',"', '",', ",", "\n", "a"]), max_size=30).map("".join))
def test_quoted_fields_are_those_of_pyarrow(text: str) -> None:
    content = text.encode() + b"\n"
    quoted = find_quoted(content, b'"', b",")
    inside = [(int(a), int(b)) for a, b in zip(quoted.starts, quoted.stops, strict=True)]
    if not quoted.malformed:
        plain, state = [], "start"  # of a field
        for place, one in enumerate(content.decode()):
            if state == "start" and one == '"':
                state, quotes = "quoted", 0
            elif state == "quoted":
                quotes += one == '"'
                if one == '"' and content[place + 1 : place + 2] != b'"' and quotes % 2:
                    state, quotes = "plain", 0
                elif one != '"':
                    quotes = 0
            else:
                state = "start" if one in ",\n" else "plain"
            plain += [place] if one == "\n" and state != "quoted" else []
        assert line_ends(content, b'"', b",").tolist() == plain
    for place in quoted.malformed:
        assert content[place] == ord('"') and not any(a <= place <= b for a, b in inside)
    places = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n"))
    ends = set(line_ends(content, b'"', b",").tolist())
    assert ends == {int(e) for e in places if not any(a < e < b for a, b in inside)}


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_a_quote_amid_a_field_is_a_character(tmp_path: Path, name: str) -> None:
    """It neither joins rows nor pieces, and a field that is not closed takes its own line alone."""
    lines = [f'{i % 2},{i}" pipe,{i},2024-01-01' if i % 3 else f'{i % 2},"x\n{i}",1,2024-01-01' for i in range(301)]
    pack = gzip.compress if name.endswith("gz") else bytes
    (tmp_path / name).write_bytes(pack(log_of(lines)))
    (source,) = find_files([str(tmp_path / name)], of_criteo=False)
    (reader,) = open_readers([source], log_schema(FEW), 300)
    pieces = [piece for index, _ in reader.jobs(source, 300) for piece in reader.pieces(source, index, 300)]
    assert len(pieces) > 20 and max(map(len, pieces)) < 400
    schema = make(tmp_path / name, tmp_path / "data", FEW, block_bytes=300)
    assert sum(split.rows for split in schema.splits.values()) == 301
    lines[50] = lines[200] = '1,"u,1,2024-01-01'
    (tmp_path / name).write_bytes(pack(log_of(lines)))
    with pytest.raises(UserError, match="line 69: a field begins with a quote that no quote closes"):
        make(tmp_path / name, tmp_path / "other", FEW, block_bytes=300)
    schema = make(tmp_path / name, tmp_path / "skipped", FEW, block_bytes=300, on_bad_row="skip")
    assert (sum(split.rows for split in schema.splits.values()), schema.report["bad_rows"]) == (299, 2)


def test_bad_rows_are_left_out_and_listed(tmp_path: Path) -> None:
    lines = [*LINES[:5], "9,u,1,2024-01-01", '1,"u\n5",1,2024-01-01', "1,u", *LINES[5:]]
    (tmp_path / "log.csv").write_bytes(log_of(lines))
    schema = make(tmp_path / "log.csv", tmp_path / "data", FEW, on_bad_row="skip")
    assert sum(split.rows for split in schema.splits.values()) == 17 and schema.report["bad_rows"] == 2
    listed = (tmp_path / "data/bad_rows.tsv").read_text().splitlines()
    assert [line.split("\t")[1] for line in listed[1:]] == ["7", "10"]
    assert "the label click is '9'" in listed[1] and "2 fields" in listed[2]


def test_only_what_is_read_of_json_makes_a_row_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are left hold anything. An object in a key that is read is a fault of its line, found at once."""
    rows = [{"click": i % 2, "u": f"u{i % 5}", "extra": i if i % 4 < 2 else f"x{i}"} for i in range(2000)]
    lines = [json.dumps(row).replace("}", ', "z": {"a": 1, "a": 2}, "z": 1}') for row in rows]
    document = {**FEW, "columns": {"u": FEW["columns"]["u"]}, "rest": "leave"}
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    for how in ("fail", "skip"):
        schema = make(tmp_path / "log.jsonl", tmp_path / how, document, on_bad_row=how)
        assert (sum(split.rows for split in schema.splits.values()), schema.report.get("bad_rows", 0)) == (2000, 0)
    lines[40] = lines[40].replace('"click": 0', '"click": 7')
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="line 41: the label click is '7'"):
        make(tmp_path / "log.jsonl", tmp_path / "bad", document)
    lines[::4] = ['{"click": 1, "u": {"x": 1}}'] * 500
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(LogReader, "_good_halves", None)
    schema = make(tmp_path / "log.jsonl", tmp_path / "objects", document, on_bad_row="skip")
    assert schema.report["bad_rows"] == 500


def test_only_rows_with_foreign_bytes_of_parquet_are_bad(tmp_path: Path) -> None:
    """However a column holds bytes: as they are, in a dictionary, in lists, in lists with a dictionary."""
    rows = 40
    values = [b"a", b"b", None, b"\xfc"]
    of_rows = [values[3 if i == 20 else i % 3] for i in range(rows)]
    plain = pa.array(of_rows, pa.binary())
    lists = pa.array([None if value is None else [b"x", value] for value in of_rows], pa.list_(pa.binary()))
    coded = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), plain.dictionary_encode())
    fixed = lists.cast(pa.list_(pa.binary(), 2))
    for role, column in enumerate((plain, plain.dictionary_encode(), lists, coded, fixed)):
        table = pa.table({"click": [i % 2 for i in range(rows)], "v": column})
        pq.write_table(table, tmp_path / f"{role}.parquet")
        columns = {"v": {"role": "categorical" if role < 2 else "multi_hot"}}
        document = {**FEW, "columns": columns}
        with pytest.raises(UserError, match="row 21: the byte 0xfc is not UTF-8; write the column v as text"):
            make(tmp_path / f"{role}.parquet", tmp_path / f"bad{role}", document)
        schema = make(tmp_path / f"{role}.parquet", tmp_path / f"{role}", document, on_bad_row="skip")
        assert schema.report["bad_rows"] == 1
        found = pq.read_table(tmp_path / f"{role}/vocabulary/v.parquet").column("value").to_pylist()
        assert {value for value in found if value} == ({"a", "b"} if role in (0, 1, 3) else {"a", "b", "x"})


def test_good_rows_take_no_slow_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.csv").write_bytes(log_of(LINES))
    monkeypatch.setattr(LogReader, "_find_faults", None)
    schema = make(tmp_path / "log.csv", tmp_path / "data", FEW, on_bad_row="skip")
    assert sum(split.rows for split in schema.splits.values()) == 16


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.parquet"])
def test_many_bad_rows_take_as_long_as_few(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bad rows of a piece are found at once: it is parsed again for each kind of fault, not for each row."""
    wrong = {"click": 7, "p": "dear", "t": None}
    kinds = ["click", "t"] if name == "log.parquet" else list(wrong)
    rows: list[dict[str, Any]] = []
    for i in range(6000):
        row = {"click": i // 6 % 2, "u": "ü", "p": 1.5, "t": f"2024-01-{i % 28 + 1:02d}"}
        kind = kinds[i // 6 % len(kinds)]
        rows.append(row | {kind: wrong[kind]} if i % 6 < 2 else row)
    lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
    lines[0::12] = ["1,u"] * 500
    lines[1::12] = ['1,"u,1,2024-01-01'] * 500
    texts = {"log.csv": log_of(lines).replace("ü".encode(), b"\xfc", 9)}
    texts["log.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if name == "log.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(texts[name])
    staged, calls = log_reader.staged_columns, []
    monkeypatch.setattr(log_reader, "staged_columns", lambda *a, **b: calls.append(a) or staged(*a, **b))
    schema = make(tmp_path / name, tmp_path / "data", {**FEW, **BY_TIME}, on_bad_row="skip")
    listed = (tmp_path / "data/bad_rows.tsv").read_text().splitlines()[1:]
    found = {int(line.split("\t")[1]) for line in listed}
    first = 2 if name == "log.csv" else 1
    bad = {i for i in range(6000) if i % 6 < 2}
    bad |= {i for i, line in enumerate(texts["log.csv"].splitlines()[1:]) if b"\xfc" in line and name == "log.csv"}
    assert found == {i + first for i in bad} and schema.report["bad_rows"] == len(found) == len(listed)
    assert len(calls) <= 6
    with pytest.raises(
        UserError, match=r"6,000 of 6,00[01] lines from line 1 on are not rows as the schema says, such as"
    ):
        make(
            tmp_path / name,
            tmp_path / "other",
            {**FEW, **BY_TIME, "label": "t >= 1", "rest": "leave"},
            on_bad_row="skip",
        )


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
@settings(max_examples=25)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 400), st.binary(max_size=3) | st.sampled_from([b'"', b",", b"\n", b"\r\n", b"\xff"])),
        max_size=4,
    ),
    skip=st.booleans(),
)
def test_damaged_text_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, name: str, edits: list[tuple[int, bytes]], skip: bool
) -> None:
    text = log_of(LINES)
    if name == "log.jsonl":
        keys = ["click", "u", "p", "t"]
        rows = [dict(zip(keys, line.split(","), strict=True)) for line in LINES]
        text = "".join(json.dumps({**row, "p": float(row["p"])}) + "\n" for row in rows).encode()
    for place, edit in edits:
        text = text[:place] + edit + text[place + 1 :]
    folder = tmp_path_factory.mktemp("damaged")
    (folder / name).write_bytes(text)
    try:
        make(folder / name, folder / "data", FEW, on_bad_row="skip" if skip else "fail", block_bytes=100)
    except UserError as error:
        assert "\n" not in str(error)
        assert [path.name for path in folder.iterdir()] == [name]


def test_kept_values_of_several_types_are_texts(tmp_path: Path) -> None:
    """Pieces are read apart, and each has types of its own; within a piece a value of another type is bad."""
    rows: list[dict[str, Any]] = [{"click": i % 2, "u": "a", "k": None, "n": None} for i in range(1200)]
    rows += [{"click": i % 2, "u": "a", "k": i, "n": i} for i in range(8)]
    rows += [{"click": 7, "u": "a"}, {"click": 1, "u": "a", "k": "x"}]
    rows += [{"click": i % 2, "u": "a"} for i in range(400)]
    rows += [{"click": i % 2, "u": "a", "k": f"x{i}"} for i in range(4)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"u": {"role": "categorical"}, "k": {"role": "keep"}, "n": {"role": "keep"}}
    schema = make(
        tmp_path / "log.jsonl", tmp_path / "data", {**FEW, "columns": columns}, on_bad_row="skip", block_bytes=9000
    )
    assert schema.report["bad_rows"] == 2
    found = [row for split in SPLITS for row in rows_of(tmp_path / "data", schema, split)]
    found = [*found[1200:1208], *found[-4:]]
    assert [row["k"] for row in found] == [*map(str, range(8)), *(f"x{i}" for i in range(4))]
    assert [row["n"] for row in found] == [*range(8), *[None] * 4], "pieces without values have no type"


def test_an_interrupted_run_keeps_its_finished_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = generated(600)
    (tmp_path / "log.csv").write_text(as_csv(rows))
    make(tmp_path / "log.csv", tmp_path / "whole", DOCUMENT, block_bytes=4000)
    monkeypatch.setattr(pipeline, "_SMALL_BYTES", 0)  # such small input is not worth keeping otherwise
    parse, parsed = LogReader.parse, []

    def broken(reader: LogReader, piece: Any) -> list[pa.Table]:
        parsed.append(piece)
        if len(parsed) == 4:
            raise KeyboardInterrupt
        return parse(reader, piece)

    monkeypatch.setattr(LogReader, "parse", broken)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "log.csv", tmp_path / "data", DOCUMENT, block_bytes=4000, progress=Progress())
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted. The same command resumes the run")
    before = len(parsed)
    make(tmp_path / "log.csv", tmp_path / "data", DOCUMENT, block_bytes=4000)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    pieces = -(-(tmp_path / "log.csv").stat().st_size // 4000)
    assert len(parsed) - before == pieces - 3, "three pieces were staged before"
    assert {path.name for path in tmp_path.iterdir()} == {"log.csv", "whole", "data"}


def test_nulls_are_missing_in_every_format(tmp_path: Path) -> None:
    users = ["a", "", "NA", "b"] * 10
    table = pa.table({"y": [0, 1] * 20, "u": users, "p": ["1.5", "NA", "", "2"] * 10})
    lines = ["y,u,p", *(",".join(map(str, row.values())) for row in table.to_pylist())]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, table.to_pylist())))
    pq.write_table(table, tmp_path / "log.parquet")
    encoded = table.set_column(1, "u", pa.array(users).dictionary_encode())
    pq.write_table(encoded, tmp_path / "encoded.parquet")
    document = {
        "dataset": "d",
        "label": "y",
        "columns": {"u": {"role": "categorical"}, "p": {"role": "dense"}, "who": {"role": "keep", "source": "u"}},
        "nulls": ["", "NA"],
        "split": {"by": "position", "ratios": [0.5, 0.3, 0.2]},
    }
    found = {}
    for name in ("log.csv", "log.jsonl", "log.parquet", "encoded.parquet"):
        schema = make(tmp_path / name, tmp_path / f"of_{name}", document)
        assert schema.report["missing"] == {"u": 20, "p": 20}, name
        found[name] = contents(tmp_path / f"of_{name}")
    assert all(of_format == found["log.csv"] for of_format in found.values())


def test_an_equal_table_is_finished_already_and_another_is_refused(tmp_path: Path) -> None:
    table = pa.table({"y": [0, 1] * 20, "u": list("abcd") * 10})
    document = {
        "dataset": "d",
        "label": "y",
        "columns": {"u": {"role": "categorical"}},
        "split": {"by": "position", "ratios": [0.5, 0.3, 0.2]},
    }
    first = datamodules.encode(table, document, tmp_path / "data")
    assert datamodules.encode(pa.table(table.to_pydict()), document, tmp_path / "data") == first
    other = table.set_column(1, "u", [list("abce") * 10])
    with pytest.raises(
        UserError, match=r"data was made of other input .*: the table (was changed|had .* bytes).*; name"
    ):
        datamodules.encode(other, document, tmp_path / "data")


def test_the_keys_of_another_schema_are_named(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(as_csv(generated(100)))
    make(tmp_path / "log.csv", tmp_path / "data", DOCUMENT)
    columns = {**DOCUMENT["columns"], "user": {"role": "categorical", "min_count": 3}}
    with pytest.raises(UserError) as caught:
        make(tmp_path / "log.csv", tmp_path / "data", {**DOCUMENT, "columns": columns, "counts": "all"})
    assert (
        "options: schema: columns: user: min_count was 2, now it is 3, and schema: counts was not given, now it is "
        "all; name a new folder" in str(caught.value)
    )


def test_a_random_split_has_its_shares_and_does_not_depend_on_pieces() -> None:
    rule = SplitRule(ratios=(0.7, 0.2, 0.1), seed=3)
    whole = rule.split_of(0, 100_000, None)
    assert np.allclose(np.bincount(whole) / 100_000, [0.7, 0.2, 0.1], atol=0.01)
    assert (np.concatenate([rule.split_of(0, 77, None), rule.split_of(77, 99_923, None)]) == whole).all()
    assert (SplitRule(ratios=(0.7, 0.2, 0.1), seed=4).split_of(0, 100_000, None) != whole).mean() > 0.3


def test_two_workers_write_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(as_csv(generated(500)))
    for workers in (1, 2):
        preprocess(
            None,
            None,
            [tmp_path / "log.csv"],
            tmp_path / str(workers),
            schema=log_schema(DOCUMENT),
            progress=Progress(show=False),
            workers=workers,
            block_bytes=9000,
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


# --- from Python -----------------------------------------------------------------------------------


def test_tables_and_single_rows_are_encoded_as_files_are(tmp_path: Path) -> None:
    rows = generated(1500)
    document = {**DOCUMENT, "columns": {**DOCUMENT["columns"], "tags": {"role": "multi_hot", "weights": "weights"}}}
    table = pa.Table.from_pylist([{**row, "day": f"2024-01-{row['day']:02d}"} for row in rows])
    schema = datamodules.encode(table, {**document, "format": "csv"}, tmp_path / "data")
    assert "format" not in schema.settings["schema"]
    (tmp_path / "log.csv").write_text(as_csv(rows))
    make(tmp_path / "log.csv", tmp_path / "of_csv", DOCUMENT)
    assert contents(tmp_path / "data") == contents(tmp_path / "of_csv")

    test = rows_of(tmp_path / "data", schema, "test")
    new = table.slice(len(table) - len(test)).drop_columns(["click", "fold"]).append_column("fold", [["0"] * len(test)])
    found = datamodules.encode(new, None, tmp_path / "new", vocabulary=tmp_path / "data")
    assert rows_of(tmp_path / "new", found, "test") == [{k: v for k, v in r.items() if k != "label"} for r in test]

    arrays = RowEncoder(tmp_path / "data").encode(new.drop_columns(["day", "fold"]))
    for i, row in enumerate(test):
        for name in ("user", "bin"):
            assert arrays[name][i] == row[name]
        assert (
            math.isnan(arrays["price"][i]) if row["price"] is None else arrays["price"][i] == np.float32(row["price"])
        )
        for name in ("tags", "tags_weights"):
            values, offsets = arrays[name]
            assert values[offsets[i] : offsets[i + 1]].tolist() == row[name]
    with pytest.raises(UserError, match="the table has no column 'user'"):
        RowEncoder(tmp_path / "data").encode(new.drop_columns(["user"]))
    misspelt = new.rename_columns([{"user": "usr"}.get(name, name) for name in new.column_names])
    with pytest.raises(UserError, match="did you mean usr"):
        RowEncoder(tmp_path / "data").encode(misspelt)
    bad = new.set_column(new.column_names.index("price"), "price", pa.array(["dear"] * len(new)))
    with pytest.raises(UserError, match="row 0: price is 'dear', expected a number"):
        RowEncoder(tmp_path / "data").encode(bad)
    twice = new.append_column("user", new["user"])
    for rows_of_one, message in ((twice, "two columns 'user'"), (new.to_pylist(), "rows is a list; expected an Arrow")):
        with pytest.raises(UserError, match=message):
            RowEncoder(tmp_path / "data").encode(rows_of_one)  # type: ignore[arg-type]
    spans = new.append_column("span", pa.nulls(len(new), pa.month_day_nano_interval()))
    for wrong, message in (
        (twice, "has two columns named 'user'"),
        (spans, "cannot be written as Parquet"),
        ([1], "rows is a list"),
    ):
        with pytest.raises(UserError, match=message):
            datamodules.encode(wrong, None, tmp_path / "bad", vocabulary=tmp_path / "data")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the table, row 1: price is 'dear', expected a number"):
        datamodules.encode(bad, None, tmp_path / "bad", vocabulary=tmp_path / "data")

    data = datamodules.Clicks(tmp_path / "data", batch_size=64, group="who")
    data.setup("fit")
    assert data.schema == schema
    assert sum(len(batch) for batch in data.train_dataloader()) == schema.splits["train"].rows
    batch = next(iter(data.val_dataloader()))
    assert batch.group is not None and batch.ids.weights is not None


def test_data_frames_are_encoded_as_tables(tmp_path: Path) -> None:
    """Categories, strings, integers and truth values that may be missing, NaN, times with zones, lists and arrays."""
    pd = pytest.importorskip("pandas", reason="data frames need pandas, which no other part needs")
    hours = pd.date_range("2024-01-01", periods=60, freq="h", tz="Europe/Berlin")
    some = [None if i % 5 == 0 else i % 4 for i in range(60)]
    lists = [None if i % 6 == 0 else ["a", "b"][: i % 3] for i in range(60)]
    frame = pd.DataFrame(
        {
            "y": [True, False] * 30,
            "c": pd.Categorical(some),
            "s": pd.array([None if one is None else f"ü{one}" for one in some], dtype="string"),
            "i": pd.array(some, dtype="Int64"),
            "f": [math.nan if one is None else float(one) for one in some],
            "b": pd.array([None if one is None else one > 1 for one in some], dtype="boolean"),
            "t": hours,
            "l": lists,
            "w": [None if one is None else np.arange(len(one)) for one in lists],
        },
        index=range(60, 0, -1),
    )
    columns: dict[str, Any] = {name: {"role": "categorical"} for name in "csifb"}
    columns |= {"x": {"role": "dense", "source": "f"}, "when": {"role": "keep", "source": "t"}}
    columns["l"] = {"role": "multi_hot", "weights": "w"}
    document = {"dataset": "d", "label": "y", "columns": columns, "split": {"by": "time", "column": "t"}}
    schema = datamodules.encode(frame, document, tmp_path / "data")
    texts = {"s": [None if one is None else f"ü{one}" for one in some], "i": some, "f": some, "c": some}
    flags = {"y": [True, False] * 30, "b": [None if one is None else one > 1 for one in some]}
    weights = [None if one is None else [float(i) for i in range(len(one))] for one in lists]
    times = [datetime.datetime(2023, 12, 31, 23) + datetime.timedelta(hours=i) for i in range(60)]
    datamodules.encode(pa.table({**texts, **flags, "l": lists, "w": weights, "t": times}), document, tmp_path / "other")
    assert contents(tmp_path / "data") == contents(tmp_path / "other")
    arrays = RowEncoder(tmp_path / "data").encode(frame.drop(columns=["y", "t"]).head(2))
    assert arrays["i"].tolist() == [row["i"] for row in rows_of(tmp_path / "data", schema, "train")[:2]]
    with pytest.raises(UserError, match=r"the table, row 1: c holds objects \(extension<pandas.period"):
        datamodules.encode(frame.assign(c=hours.tz_localize(None).to_period("M")), document, tmp_path / "bad")


def test_empty_lists_are_counted(tmp_path: Path) -> None:
    """An empty cell of a multi-hot column is an empty list; ``missing`` of the report counts its rows."""
    tags = ["a|b", "", "a", "", "c", "b", "a", "", "a", "b"]
    lines = [f"{number % 2},{tag}" for number, tag in enumerate(tags)]
    (tmp_path / "log.csv").write_text("\n".join(["y,tags", *lines, *lines]))
    columns = {"tags": {"role": "multi_hot", "separator": "|"}}
    document = {"dataset": "log", "label": "y", "columns": columns, "split": {"by": "position"}}
    schema = make(tmp_path / "log.csv", tmp_path / "data", document)
    assert schema.report["missing"] == {"tags": 6}
    assert sum(of_split["tags"]["values"] for of_split in schema.cells.values()) == 16
    unknown = schema.cells["validation"]["tags"]["unknown"]
    assert schema.cell_shares("validation")["unknown"] == unknown / schema.cells["validation"]["tags"]["values"]
