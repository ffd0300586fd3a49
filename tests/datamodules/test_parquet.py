"""Contract: a dataset folder is written whole or not at all, byte for byte the same for equal rows,
and whatever is missing, truncated, altered or out of range in it is named with its file."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules import writer as writing
from datamodules.folder import Folder, check_sizes, consistent, load_schema, part_files, verify
from datamodules.parquet import open_part, read_part
from datamodules.stream.rows import Decoder
from datamodules.writer import DatasetWriter
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DataFile, DatasetSchema

COLUMNS = (
    Column(name="label", role="label"),
    Column(name="I1", role="dense"),
    Column(name="C1", role="categorical", cardinality=40),
    Column(name="M1", role="multi_hot", cardinality=9),
)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "ROW_GROUP_ROWS", 16)
    monkeypatch.setattr(writing, "ROWS_PER_FILE", 48)


def make_rows(count: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    dense = rng.random(count).astype(np.float32)
    dense[rng.random(count) < 0.2] = np.nan
    bags = [rng.integers(0, 9, size).astype(np.int32) for size in rng.integers(0, 4, count)]
    return {
        "label": rng.integers(0, 2, count).astype(np.int8),
        "I1": dense,
        "C1": rng.integers(0, 40, count).astype(np.int32),
        "M1": bags,
    }


def piece(rows: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    bags = rows["M1"][start:stop]
    offsets = np.cumsum([0, *map(len, bags)]).astype(np.int32)
    return {
        "label": rows["label"][start:stop],
        "I1": rows["I1"][start:stop],
        "C1": rows["C1"][start:stop],
        "M1": (np.concatenate([np.empty(0, np.int32), *bags]), offsets),
    }


def write(folder: Path, rows: Mapping[str, Any], step: int = 1000) -> DatasetSchema:
    with DatasetWriter(folder, COLUMNS) as writer:
        count = len(rows["label"])
        for start in range(0, count, step):
            writer.write("train", piece(rows, start, min(start + step, count)))
        writer.write("test", piece(rows, 0, 5))
        writer.write_vocabulary("C1", pa.table({"value": np.arange(40)}))
        return writer.finish(dataset="mine", protocol="own")


def test_what_is_written_is_read_and_the_schema_describes_it(tmp_path: Path) -> None:
    rows = make_rows(110)
    schema = write(tmp_path / "data", rows)
    assert DatasetSchema.load(tmp_path / "data") == schema
    train = schema.splits["train"]
    assert [file.path for file in train.files] == [f"train/part-{i:05d}.parquet" for i in range(3)]
    assert [file.row_groups for file in train.files] == [(16, 16, 16), (16, 16, 16), (14,)]
    assert train.rows == 110 and train.positives == rows["label"].sum()
    assert schema.vocabulary["C1"].path == "vocabulary/C1.parquet"

    table = pa.concat_tables(open_part(tmp_path / "data", schema, file).read() for file in train.files)
    assert table.schema.types == [pa.int8(), pa.float32(), pa.int32(), pa.list_(pa.field("element", pa.int32()))]
    np.testing.assert_array_equal(table["label"].to_numpy(), rows["label"])
    np.testing.assert_array_equal(table["C1"].to_numpy(), rows["C1"])
    assert table["I1"].null_count == np.isnan(rows["I1"]).sum() > 0
    np.testing.assert_array_equal(table["I1"].to_numpy(), rows["I1"])
    assert table["M1"].to_pylist() == [bag.tolist() for bag in rows["M1"]]
    verify(tmp_path / "data", schema)


@pytest.mark.parametrize("step", [1, 7, 16, 50])
def test_the_bytes_do_not_depend_on_how_rows_arrive(tmp_path: Path, step: int) -> None:
    rows = make_rows(110)
    assert write(tmp_path / "a", rows) == write(tmp_path / "b", rows, step)


def test_arrays_may_be_reused_after_writing(tmp_path: Path) -> None:
    rows = make_rows(10)
    with DatasetWriter(tmp_path / "data", COLUMNS) as writer:
        given = piece(rows, 0, 10)
        expected = given["C1"].copy()
        writer.write("train", given)
        given["C1"][:] = 0
        schema = writer.finish(dataset="mine", protocol="own")
    table = open_part(tmp_path / "data", schema, schema.splits["train"].files[0]).read()
    np.testing.assert_array_equal(table["C1"].to_numpy(), expected)


def test_without_labels_positives_are_unknown(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", COLUMNS[1:2]) as writer:
        writer.write("test", {"I1": np.ones(3, np.float32)})
        assert writer.finish(dataset="mine", protocol="own").splits["test"].positives is None


@pytest.mark.parametrize("how", ["error", "no finish"])
def test_what_is_not_finished_leaves_nothing(tmp_path: Path, how: str) -> None:
    def interrupted() -> None:
        with DatasetWriter(tmp_path / "data", COLUMNS) as writer:
            writer.write("train", piece(make_rows(40), 0, 40))
            assert not (tmp_path / "data").exists()
            if how == "error":
                raise RuntimeError("stopped")

    if how == "error":
        with pytest.raises(RuntimeError, match="stopped"):
            interrupted()
    else:
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writers_leftovers_are_removed(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", COLUMNS) as writer:
        mine = writer._partial.name
        leftover = tmp_path / mine.replace(mine.rpartition("-")[2], str(2**22 + 1))  # above any process id
    leftover.mkdir()
    write(tmp_path / "data", make_rows(3))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_occupied_target_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", make_rows(3))  # an empty folder is fine
    with pytest.raises(UserError, match="data exists and is not an empty folder"):
        DatasetWriter(tmp_path / "data", COLUMNS)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="file exists"):
        DatasetWriter(tmp_path / "file", COLUMNS)
    with DatasetWriter(tmp_path / "late", COLUMNS) as writer:
        writer.write("train", piece(make_rows(3), 0, 3))
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "other").touch()
        with pytest.raises(UserError, match="late exists"):
            writer.finish(dataset="mine", protocol="own")
    assert (tmp_path / "late" / "other").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    schema = write(folder, make_rows(110))
    file = schema.splits["train"].files[1]
    path = folder / file.path
    whole = path.read_bytes()

    path.write_bytes(whole[:-7])
    with pytest.raises(UserError, match=r"train/part-00001\.parquet is truncated: it has .* restore"):
        check_sizes(folder, list(part_files(schema)))
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match=r"part-00001\.parquet is altered"):
        check_sizes(folder, list(part_files(schema)))
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    check_sizes(folder, list(part_files(schema)))
    with pytest.raises(UserError, match=r"part-00001\.parquet is altered: its sha256"):
        verify(folder, schema)
    path.write_bytes(b"\0" * len(whole))
    with pytest.raises(UserError, match=r"part-00001\.parquet is altered: it is not a readable Parquet"):
        open_part(folder, schema, file)
    path.unlink()
    with pytest.raises(UserError, match=r"part-00001\.parquet is missing"):
        open_part(folder, schema, file)


def test_a_dataset_that_another_one_has_replaced_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    schema = write(folder, make_rows(50))
    shutil.rmtree(folder)
    write(folder, make_rows(50, seed=1))
    with pytest.raises(UserError, match=r"data now holds another dataset \(fingerprint .*restore the first dataset"):
        open_part(folder, schema, schema.splits["train"].files[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"C1": pa.array([1, 2, 3], pa.int64())}, "column C1 has type int64, expected int32"),
        ({"C1": None}, "column C1 is missing, expected int32"),
        ({}, "has 3 rows in 1 row groups, its dataset.json says 5 in 1"),
    ],
)
def test_parts_that_do_not_fit_the_schema_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "data"
    schema = write(folder, make_rows(5))
    columns = {
        "label": pa.array([0, 1, 0], pa.int8()),
        "I1": pa.array([0, 1, None], pa.float32()),
        "C1": pa.array([0, 1, 39], pa.int32()),
        "M1": pa.array([[1], [], [8]], pa.list_(pa.int32())),
        **change,
    }
    path = folder / "train/part-00000.parquet"
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path)
    groups = (3,) if change else (5,)
    file = DataFile(path="train/part-00000.parquet", sha256="", bytes=path.stat().st_size, row_groups=groups)
    with pytest.raises(UserError, match=message) as error:
        open_part(folder, schema, file)
    assert "train/part-00000.parquet" in str(error.value)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("label", pa.array([0, None, 0], pa.int8()), r"label has nulls \(1\); give every row the label"),
        ("M1", pa.array([[1, None], [], [8]], pa.list_(pa.int32())), r"M1 has nulls \(1\); leave missing ids out"),
        (
            "label",
            pa.array([1, -1, 1], pa.int8()),
            r"label has the labels -1, 1 \(row 1 of the file has -1\); expected 0 \(no cl",
        ),
        (
            "label",
            pa.array([0, 2, 1], pa.int8()),
            r"label has the labels 0, 1, 2 \(row 1 of the file has 2\); expected 0",
        ),
        ("C1", pa.array([1, None, 3], pa.int32()), r"C1 has nulls \(1\); give missing values an id"),
        ("I1", pa.array([None, 1, np.inf], pa.float32()), "I1 has inf in row 2 of the file; expected finite"),
        ("I1", pa.array([-np.inf, np.nan, 1], pa.float32()), "I1 has -inf in row 0 of the file"),
        ("C1", pa.array([0, 40, 1], pa.int32()), "C1 has the id 40 in row 1 of the file, its table has rows 0 to 39"),
        ("C1", pa.array([0, 1, -7], pa.int32()), "C1 has the id -7 in row 2 of the file"),
        ("M1", pa.array([[], None, [1, 9]], pa.list_(pa.int32())), "M1 has the id 9 in row 2 of the file"),
    ],
)
def test_values_that_cannot_be_are_refused_with_their_place(
    tmp_path: Path, name: str, values: pa.Array, message: str
) -> None:
    # Without statistics, which would tell of the ids before a row is read.
    folder, schema, file = hand_made(tmp_path, {name: values}, write_statistics=False)
    message = rf"part-00000\.parquet, row group 0, column {message}"
    with pytest.raises(UserError, match=message):
        list(read_part(folder, schema, file, schema.columns))
    with pytest.raises(UserError, match=message):
        Decoder(Folder(folder), schema, [file])(0)


def test_lists_of_other_writers_are_checked_too(tmp_path: Path) -> None:
    """Some name the items of lists "item"; some write no statistics."""
    old: dict[str, Any] = {"use_compliant_nested_type": False}
    table = {"M1": pa.array([[1], None, [8]], pa.list_(pa.field("item", pa.int32())))}
    folder, schema, file = hand_made(tmp_path, table, **old)
    assert pq.ParquetFile(folder / file.path).schema.column(3).path == "M1.list.item"
    (found,) = read_part(folder, schema, file, schema.columns)
    rows = Decoder(Folder(folder), schema, [file])(0)
    assert rows.values is not None and rows.ends is not None
    assert (rows.values.tolist(), rows.ends.tolist()) == ([0, 1, 1, 39, 8], [0, 2, 3, 5])
    assert found.column("M1").to_pylist() == [[1], None, [8]]
    beyond = {"M1": pa.array([[1], [], [9]], pa.list_(pa.int32()))}
    folder, schema, file = hand_made(tmp_path / "beyond", beyond, write_statistics=["label", "C1"])
    with pytest.raises(UserError, match="M1 has the id 9 in row 2"):
        list(read_part(folder, schema, file, schema.columns))
    folder, schema, file = hand_made(tmp_path / "empty", {"M1": pa.array([[], [], []], pa.list_(pa.int32()))})
    open_part(folder, schema, file)


def hand_made(tmp_path: Path, change: Mapping[str, pa.Array], **options: Any) -> tuple[Path, DatasetSchema, DataFile]:
    """A folder whose only training file was not written by the DatasetWriter."""
    folder = tmp_path / "data"
    schema = write(folder, make_rows(5))
    columns = {
        "label": pa.array([0, 1, 0], pa.int8()),
        "I1": pa.array([0, 1, None], pa.float32()),
        "C1": pa.array([0, 1, 39], pa.int32()),
        "M1": pa.array([[1], [], [8]], pa.list_(pa.int32())),
        **change,
    }
    path = folder / "train/part-00000.parquet"
    pq.write_table(pa.table(columns), path, **options)
    size = path.stat().st_size
    return folder, schema, DataFile(path=str(path.relative_to(folder)), sha256="", bytes=size, row_groups=(3,))


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_what_may_not_be_read_is_one_line(tmp_path: Path, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the system's answer is put in its place."""
    folder = tmp_path / "data"
    schema = write(folder, make_rows(20))
    file = schema.splits["train"].files[0]

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    actions: list[tuple[str, Callable[[], Any], str]] = [
        ("stat", lambda: check_sizes(folder, [file]), "part-00000.parquet"),
        ("stat", lambda: load_schema(folder), "dataset.json"),
        ("open", lambda: load_schema(folder), "dataset.json"),
        ("open", lambda: verify(folder, schema), "C1.parquet"),
    ]
    for operation, action, name in actions:
        with monkeypatch.context() as patch, pytest.raises(UserError) as told:
            patch.setattr(Path, operation, fails)
            patch.setattr(Folder, "size", lambda *_: None) if operation == "open" else None
            action()
        assert name in str(told.value) and error.strerror in str(told.value) and "permissions" in str(told.value)
        assert "\n" not in str(told.value)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"part-00000.parquet .*{error.strerror}"):
        patch.setattr(pq, "ParquetFile", fails)
        open_part(folder, schema, file)


def test_a_file_in_place_of_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match=r"file is a file; give the dataset folder that holds dataset.json"):
        load_schema(tmp_path / "file")
    with pytest.raises(UserError, match=r"file/a cannot be read \(NotADirectoryError: Not a directory\)"):
        Folder(tmp_path / "file").size("a")


# --- weights beside bags ----------------------------------------------------------------------------------

WEIGHTED = (*COLUMNS, Column(name="M1_weights", role="weights"))


def write_weighted(folder: Path, weights: Any, rows: Mapping[str, Any]) -> DatasetSchema:
    with DatasetWriter(folder, WEIGHTED) as writer:
        writer.write("train", {**piece(rows, 0, len(rows["label"])), "M1_weights": weights})
        return writer.finish(dataset="mine", protocol="own")


def test_weights_are_stored_beside_their_bags(tmp_path: Path) -> None:
    rows = make_rows(110)
    ids, offsets = piece(rows, 0, 110)["M1"]
    weights = np.linspace(-1, 2, len(ids), dtype=np.float32)
    schema = write_weighted(tmp_path / "data", (weights, offsets), rows)
    assert DatasetSchema.load(tmp_path / "data") == schema
    assert schema.features.tables == {"C1": 40, "M1": 9}
    table = pa.concat_tables(open_part(tmp_path / "data", schema, file).read() for file in schema.splits["train"].files)
    stored = table["M1_weights"].combine_chunks()
    assert stored.type.value_type == pa.float32()
    assert stored.value_lengths().to_pylist() == [len(bag) for bag in rows["M1"]]
    np.testing.assert_array_equal(stored.flatten().to_numpy(), weights)
    # As an Arrow array, they are the same.
    bags = pa.ListArray.from_arrays(pa.array(offsets), pa.array(weights), type=pa.list_(pa.float32()))
    assert write_weighted(tmp_path / "arrow", bags, rows).data_fingerprint == schema.data_fingerprint


def test_weights_of_empty_bags_are_allowed(tmp_path: Path) -> None:
    rows = {**make_rows(3), "M1": [np.empty(0, np.int32)] * 3}
    schema = write_weighted(tmp_path / "data", pa.array([[]] * 3, pa.list_(pa.float32())), rows)
    (found,) = read_part(tmp_path / "data", schema, schema.splits["train"].files[0], schema.columns)
    assert found.column("M1_weights").to_pylist() == [[], [], []]


def test_data_without_weights_keep_their_fingerprint(tmp_path: Path) -> None:
    """As it was before there was such a role: models and runs stay bound to their data."""
    schema = write(tmp_path / "data", make_rows(110))
    assert schema.encoding_fingerprint == "15ba7eb6b7b150d9b28d53c2825c4c904551d42d1d393d62bb75ee36a13d8ecf"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1], [1, 2], []], "M1_weights: row 1 has 2 weights for 1 ids; give each id one weight"),
        ([[1], [1], [1]], "row 2 has 1 weights for 0 ids"),
        ([[1], [1], None], "row 2 has 0 weights for 0 ids"),
        ([[1], [None], []], "a weight is null, NaN or infinite; give each id a number"),
        ([[float("inf")], [1], []], "a weight is null, NaN or infinite"),
        ([[float("nan")], [1], []], "a weight is null, NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit_their_bags_are_refused(tmp_path: Path, weights: Any, message: str) -> None:
    rows = {**make_rows(3), "M1": [np.array([4], np.int32), np.array([5], np.int32), np.empty(0, np.int32)]}
    with pytest.raises(UserError, match=message):
        write_weighted(tmp_path / "data", pa.array(weights, pa.list_(pa.float32())), rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["C1_weights", "M1weights", "M2_weights", "_weights"])
def test_weights_belong_to_a_multi_hot_column(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"column {name} \(weights\) does not belong to a multi-hot .*; .*'M1_weights'"
    ):
        DatasetSchema(dataset="mine", protocol="own", columns=(*COLUMNS, Column(name=name, role="weights")), splits={})


@pytest.mark.parametrize(("groups", "rows"), [([62_894_509_554], 8), ([5, 2], 8), ([9, -1], 8)])
def test_a_footer_that_contradicts_itself_is_refused_before_a_row_is_read(groups: list[int], rows: int) -> None:
    metadata = SimpleNamespace(num_rows=rows, row_group=lambda group: SimpleNamespace(num_rows=groups[group]))
    file: Any = SimpleNamespace(metadata=metadata, num_row_groups=len(groups))
    with pytest.raises(
        UserError, match=r"a\.parquet is altered: its footer counts 8 rows, and .* in row groups; again"
    ):
        consistent(file, "a.parquet", "again")
