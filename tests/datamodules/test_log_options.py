"""Contract: what Criteo's protocols need is an option of the schema of any log: hashes, transforms, rows of missing and
unknown values, moduli, splits by days and tenths, and negative sampling. Each is compared with a plain version."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.encoder import RowEncoder
from datamodules.log_schema import log_schema
from datamodules.preprocess.pipeline import preprocess
from datamodules.preprocess.progress import Progress
from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import SPLITS, DatasetSchema
from tests.raw_criteo import mixed

QUIET = Progress(show=False)
ROWS = 417
Row = dict[str, str]


def log_rows(rows: int = ROWS, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    return [
        {
            "y": rng.choice("01"),
            "h": rng.choice(["", "00000000", "0a0B0c0D", f"{int(rng.random() ** 3 * 60):08X}"]),
            "n": rng.choice(["", "-4.5", "-2", "0", "3", f"{rng.random() * 1e4:.3f}"]),
            "t": rng.choice(["", "0", "a", f"t{int(rng.random() ** 3 * 60)}"]),
            "s": rng.choice(["train", "train", "validation", "test"]),
        }
        for _ in range(rows)
    ]


def written(path: Path, rows: list[Row]) -> Path:
    path.write_text("\n".join(",".join(values) for values in (rows[0], *(row.values() for row in rows))) + "\n")
    return path


def made(folder: Path, columns: dict[str, Any], paths: list[Path], **keys: Any) -> DatasetSchema:
    document = {
        "dataset": "log",
        "label": "y",
        "columns": columns,
        "rest": "leave",
        "split": {"by": "position"},
        **keys,
    }
    return preprocess(None, None, paths, folder, progress=QUIET, schema=log_schema(document))


def stored(folder: Path, name: str, splits: tuple[str, ...] = SPLITS) -> list[Any]:
    return [value for split in splits for value in pq.read_table(folder / split, columns=[name]).column(0).to_pylist()]


@pytest.mark.parametrize("fill", [None, 0.0, -1.5])
def test_transforms_of_dense_columns(tmp_path: Path, fill: float | None) -> None:
    rows = log_rows()
    columns = {
        "above": {"role": "dense", "source": "n", "transform": "log_above_minimum", "fill": fill},
        "three": {"role": "dense", "source": "n", "transform": "log_plus_three"},
    }
    schema = made(tmp_path / "data", columns, [written(tmp_path / "log.csv", rows)])
    filled = [float(row["n"]) if row["n"] else fill for row in rows]
    low = min(value for value in filled if value is not None)
    above = [math.nan if value is None else math.log(value - low + 2) for value in filled]
    three = [math.log(float(row["n"]) + 3) if row["n"] and float(row["n"]) >= -2 else 0.0 for row in rows]
    found = [np.array(stored(tmp_path / "data", name), float) for name in columns]
    np.testing.assert_allclose(found[0], above, rtol=1e-6)
    np.testing.assert_allclose(found[1], three, rtol=1e-6)
    assert schema.settings["minimum"] == {"above": low}
    new = RowEncoder(tmp_path / "data").encode(pa.table({"n": [-100.0, low, None]}))
    expected = [math.log(2), math.log(2), math.nan if fill is None else math.log(fill - low + 2)]
    np.testing.assert_allclose(new["above"], expected, rtol=1e-6)


def test_columns_of_large_numbers_or_without_values_draw_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column is large if the root mean square of what is stored is above 5, whatever a few values are."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"y": row["y"], "wide": row["n"], "year": str(2000 + number % 20), "few": str(number % 5), "gap": ""}
        for number, row in enumerate(log_rows())
    ]
    written(Path("log.csv"), [rows[0] | {"few": "60"}, *rows])
    columns: dict[str, Any] = {name: {"role": "dense", "transform": "none"} for name in rows[0] if name != "y"}
    columns["scaled"] = {"role": "dense", "transform": "standard", "source": "wide"}
    document = {"dataset": "log", "label": "y", "columns": columns, "split": {"by": "position"}}
    Path("s.yaml").write_text(json.dumps(document))
    command = ["preprocess", "--input", "log.csv", "--workers", "1", "--output"]
    assert main([*command, "data", "--schema", "s.yaml"]) == 0
    said = capsys.readouterr().err.splitlines()
    largest = max(float(row["wide"] or 0) for row in rows)
    assert "warning: no row has a value of gap: check the files, or leave the column out (role: leave)" in said
    large = f"wide (up to {largest:,.6g}), year (up to 2,019)"
    assert said[-1] == (
        f"warning: large numbers in {large}: models such as DCN train badly on them; set transform: standard in the "
        "schema, or log1p for an amount"
    )
    assert DatasetSchema.load(Path("data")).large_numbers == large
    assert main([*command, "new", "--vocabulary", "data"]) == 0
    assert "large numbers" not in capsys.readouterr().err, "the model is trained already"
    damaged = replace(DatasetSchema.load(Path("data")), report={"large_numbers": {"wide": "many"}})
    assert damaged.large_numbers == replace(damaged, report={"large_numbers": 3}).large_numbers == ""


def test_whole_numbers_that_float32_rounds_draw_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^24 is exact; ids of 17 digits are not; large amounts with fractions are rounded anyway."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"y": row["y"], "id": str(10**16 + number), "exact": str(2**24), "amount": f"{10**8 + number}.5"}
        for number, row in enumerate(log_rows())
    ]
    written(Path("log.csv"), rows)
    columns = {name: {"role": "dense", "transform": "standard"} for name in ("id", "exact", "amount")}
    Path("s.yaml").write_text(
        json.dumps({"dataset": "log", "label": "y", "columns": columns, "split": {"by": "position"}})
    )
    command = ["preprocess", "--input", "log.csv", "--workers", "1", "--output", "data", "--schema", "s.yaml"]
    assert main(command) == 0
    assert capsys.readouterr().err.splitlines()[-1] == (
        "warning: whole numbers above 16,777,216 in id: dense columns keep about 7 digits (float32); if they are ids, "
        "set role: categorical; if they are times, role: keep; amounts may stay dense"
    )


UNKNOWN = {
    # unknown, missing, min_count -> ids of missing, of rare and of unknown values, of the first value, and their words
    ("rare", "own", 3): (0, 1, 1, 2, "; unknown as rare"),
    ("rare", "rare", 3): (0, 0, 0, 1, "; unknown as rare"),
    ("rare", "zero", 3): (None, 0, 0, 1, ", missing as 0; unknown as rare"),
    ("reserved", "own", 3): (0, 1, 1, 2, "; rare and unknown values share one row"),
    ("reserved", "rare", 1): (0, None, 0, 1, "; missing, rare and unknown values share one row"),
    ("own", "own", 3): (0, 1, 2, 3, "; unknown values have a row of their own"),
    ("own", "rare", 3): (0, 0, 1, 2, "; missing and rare values share one row; unknown values have a row of their own"),
    ("own", "zero", 3): (None, 0, 1, 2, ", missing as 0; unknown values have a row of their own"),
    ("none", "own", 3): (0, 1, 1, 2, "; rare and unknown values share one row"),
    ("none", "own", 1): (0, None, -1, 1, "; unknown values get the last row"),
    ("none", "zero", 3): (None, 0, 0, 1, ", missing as 0; rare and unknown values share one row"),
    ("none", "zero", 1): (None, None, -1, 0, ", missing as 0; unknown values get the last row"),
}


@pytest.mark.parametrize(("unknown", "missing", "min_count"), UNKNOWN)
def test_rows_of_missing_rare_and_unknown_values(tmp_path: Path, unknown: str, missing: str, min_count: int) -> None:
    rows = log_rows()
    columns = {"h": {"role": "categorical", "type": "hash"}, "t": {"role": "categorical"}}
    keys = {"unknown": unknown, "missing": missing, "min_count": min_count, "list_rare": unknown != "none"}
    schema = made(tmp_path / "data", columns, [written(tmp_path / "log.csv", rows)], counts="all", **keys)
    of_missing, of_rare, of_unknown, first, words = UNKNOWN[unknown, missing, min_count]
    words = f"id by descending count over all rows{words}{'; rare is below 3' if min_count == 3 else ''}"
    assert [column.transform for column in schema.columns if column.role == "categorical"] == [
        words.replace("missing as 0", "missing as hash 0"),
        words,
    ]
    new, expected = [dict(rows[0]) for _ in range(4)], {}
    for name, zero, unseen in (("h", "00000000", "fffffffe"), ("t", "0", "unseen")):
        values = [row[name].lower() or (zero if missing == "zero" else "") for row in rows]
        counts = Counter(value for value in values if value)
        kept = sorted((value for value in counts if counts[value] >= min_count), key=lambda v: (-counts[v], v))
        ids = {"": of_missing, **dict.fromkeys(counts, of_rare), **{value: first + i for i, value in enumerate(kept)}}
        assert stored(tmp_path / "data", name) == [ids[value] for value in values]
        assert schema.features.tables[name] == first + len(kept)
        rare = next((value for value in counts if counts[value] < min_count), unseen)
        for row, value in zip(new, (unseen, "", kept[0], rare), strict=True):
            row[name] = value
        last = of_unknown % schema.features.tables[name]
        expected[name] = [last, ids[zero] if missing == "zero" else of_missing, first, ids.get(rare, last)]
    path = written(tmp_path / "n.csv", new)
    known = preprocess(None, None, [path], tmp_path / "new", progress=QUIET, vocabulary=tmp_path / "data")
    encoded = RowEncoder(tmp_path / "data").encode(pa.Table.from_pylist(new))
    for name, ids_of_new in expected.items():
        assert stored(tmp_path / "new", name, ("test",)) == encoded[name].tolist() == ids_of_new
        told = known.cells["test"][name]
        assert told["unknown"] + told["rare"] == 2
        assert told["rare"] == (min_count > 1 and unknown != "none"), "only listed rare values are known as such"


def test_a_missing_number_counts_as_0(tmp_path: Path) -> None:
    """In the bin of 0, which is not the lowest one of quantiles; also in new rows, and rows in memory."""
    rows = log_rows()
    columns = {
        name: {"role": "categorical", "source": "n", "transform": name, "missing": "zero"}
        for name in ("quantile", "log_squared")
    }
    keys: dict[str, Any] = {"unknown": "reserved", "counts": "all", "min_count": 2}
    schema = made(tmp_path / "data", columns, [written(tmp_path / "log.csv", rows)], **keys)
    path = written(tmp_path / "new.csv", [{**rows[0], "n": number} for number in ("", "0", "-4.5")])
    preprocess(None, None, [path], tmp_path / "new", progress=QUIET, vocabulary=tmp_path / "data")
    encoded = RowEncoder(tmp_path / "data").encode(pa.table({"n": [None, 0.0, -4.5]}))
    for column in schema.columns[1:]:
        ids = stored(tmp_path / "data", column.name)
        (of_zero,) = {id for id, row in zip(ids, rows, strict=True) if row["n"] == "0"}
        (of_lowest,) = {id for id, row in zip(ids, rows, strict=True) if row["n"] == "-4.5"}
        assert {id for id, row in zip(ids, rows, strict=True) if not row["n"]} == {of_zero}
        assert stored(tmp_path / "new", column.name, ("test",)) == [of_zero, of_zero, of_lowest]
        assert encoded[column.name].tolist() == [of_zero, of_zero, of_lowest] and of_zero != of_lowest
        assert column.transform.startswith("missing as 0, ")


def test_moduli(tmp_path: Path) -> None:
    rows = log_rows()
    path = written(tmp_path / "log.csv", rows)
    columns = {"h": {"role": "categorical", "type": "hash"}, "n": {"role": "categorical", "transform": "log_squared"}}
    columns = {name: {**column, "missing": "zero"} for name, column in columns.items()}
    columns |= {"dense": {"role": "dense", "source": "n"}, "t": {"role": "leave"}}
    keys = {"unknown": "none", "counts": "all"}
    hashed = made(tmp_path / "hashed", columns, [path], hash_modulo=11, **keys)
    values = [int(row["h"] or "0", 16) % 11 for row in rows]
    order = sorted(set(values), key=lambda value: (-values.count(value), value))
    assert stored(tmp_path / "hashed", "h") == [order.index(value) for value in values]
    whole = made(tmp_path / "whole", columns, [path], **keys)
    folded = made(tmp_path / "folded", columns, [path], id_modulo=7, **keys)
    for name in ("h", "n"):
        assert stored(tmp_path / "folded", name) == [value % 7 for value in stored(tmp_path / "whole", name)]
        assert folded.features.tables[name] == 7 < whole.features.tables[name]
    assert hashed.features.tables == {"h": len(order), "n": whole.features.tables["n"]}


@pytest.mark.parametrize(
    "split",
    [
        {"by": "days"},
        {"by": "days", "held_out": ["validation", "test"]},
        {"by": "days", "days": "files"},
        {"by": "tenths", "seed": 5},
        {"by": "position"},
        {"by": "random", "seed": 3},
        {"by": "column", "column": "s", **{name: [name] for name in SPLITS}},
    ],
    ids=str,
)
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_splits_and_negative_sampling(tmp_path: Path, split: dict[str, Any], rate: float) -> None:
    files = [log_rows(150, 1), log_rows(206, 2), log_rows(61, 3)]
    rows = [{**row, "row": f"r{number}"} for number, row in enumerate(row for file in files for row in file)]
    paths = [written(tmp_path / f"{start}.csv", rows[start:stop]) for start, stop in ((0, 150), (150, 356), (356, 417))]
    sampling = {} if rate == 1 else {"negative_sampling_rate": rate, "seed": split.get("seed", 9)}
    columns = {"t": {"role": "categorical"}, "name": {"role": "keep", "source": "row"}}
    made(tmp_path / "data", columns, paths, split={**split, **sampling})
    seed = split.get("seed", 9)
    expected: dict[str, list[str]] = {name: [] for name in SPLITS}
    last = 61 if split.get("days") == "files" else ROWS // 7
    first, second = split.get("held_out", ("test", "validation"))
    for number, row in enumerate(rows):
        if split["by"] == "days":
            middle = ROWS - last // 2
            of_row = "train" if number < ROWS - last else first if number < middle else second
        elif split["by"] == "tenths":
            drawn = mixed(seed, 1, number // 10)
            test = drawn % 10
            validation = (test + 1 + (drawn >> 32) % 9) % 10
            of_row = {test: "test", validation: "validation"}.get(number % 10, "train")
        elif split["by"] == "random":
            share = (mixed(seed, 1, number) >> 11) / 2**53
            of_row = SPLITS[(share >= 0.8) + (share >= 0.8 + 0.1)]
        elif split["by"] == "position":
            of_row = SPLITS[(number >= round(0.8 * ROWS)) + (number >= round((0.8 + 0.1) * ROWS))]
        else:
            of_row = row["s"]
        if of_row == "train" and row["y"] == "0" and not (mixed(seed, 2, number) >> 11) / 2**53 < rate:
            continue
        expected[of_row].append(row["row"])
    assert {name: stored(tmp_path / "data", "name", (name,)) for name in SPLITS} == expected


def test_a_hash_is_8_hexadecimal_digits(tmp_path: Path) -> None:
    rows = log_rows(30)
    rows[17]["h"] = "0x12ab"
    with pytest.raises(UserError, match=r"log.csv, line 19: h is '0x12ab', expected 8 hexadecimal digits; correct the"):
        made(tmp_path / "data", {"h": {"role": "categorical", "type": "hash"}}, [written(tmp_path / "log.csv", rows)])
    with pytest.raises(UserError, match="too few rows: 9 in all; a split 8:1:1 needs at least 10"):
        path = written(tmp_path / "few.csv", rows[:9])
        made(tmp_path / "data", {"t": {"role": "categorical"}}, [path], split={"by": "tenths"})
