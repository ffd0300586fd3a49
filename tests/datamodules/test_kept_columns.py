"""Kept columns stand beside the features: they are stored, numbered for AUC by group, and handed to predictions."""

import datetime
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.folder import Folder
from datamodules.parquet import read_beside
from datamodules.stream.loader import Loader
from datamodules.writer import DatasetWriter
from lightning_dlrm.cli.predictions import SCHEMA, SplitPredictions, merge_by_row
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DatasetSchema

ROWS = 40_000  # three row groups
RNG = np.random.default_rng(0)
USERS = [None if user == 7 else f"ü{user}" for user in RNG.integers(0, 500, ROWS).tolist()]
SESSIONS = RNG.integers(0, 2**62, ROWS) // 2**50
COLUMNS = (
    Column(name="label", role="label"),
    Column(name="user", role="keep", transform="text"),
    Column(name="I1", role="dense"),
    Column(name="session", role="keep", transform="int64"),
    Column(name="when", role="keep", transform="timestamp"),
    Column(name="C1", role="categorical", cardinality=3),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetSchema]:
    folder = tmp_path_factory.mktemp("kept") / "data"
    arrays = {
        "label": (np.arange(ROWS) % 2).astype(np.int8),
        "user": pa.array(USERS),
        "I1": np.arange(ROWS, dtype=np.float32),
        "session": pa.array(SESSIONS),
        "when": pa.array([datetime.datetime(2024, 1, 1)] * ROWS),
        "C1": (np.arange(ROWS) % 3).astype(np.int32),
    }
    with DatasetWriter(folder, COLUMNS) as writer:
        writer.write("test", arrays)
        return folder, writer.finish(dataset="own", protocol="own")


def test_kept_columns_are_no_features(dataset: tuple[Path, DatasetSchema]) -> None:
    folder, schema = dataset
    assert DatasetSchema.load(folder) == schema
    assert (schema.features.dense, list(schema.features.tables)) == (1, ["C1"])
    without = replace(schema, columns=tuple(column for column in COLUMNS if column.role != "keep"))
    assert without.encoding_fingerprint == schema.encoding_fingerprint
    with pytest.raises(UserError, match="transform 'date' is not one of"):
        replace(schema, columns=(*COLUMNS, Column(name="x", role="keep", transform="date")))
    with pytest.raises(UserError, match="predictions have a column of this name"):
        replace(schema, columns=(*COLUMNS, Column(name="row", role="keep", transform="text")))


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("name, values", [("user", USERS), ("session", SESSIONS.tolist())])
def test_batches_number_equal_values_equally_on_any_ranks(dataset, cache, name, values) -> None:
    folder, schema = dataset
    found: dict[object, set[int]] = {}
    for rank in range(3):
        loader = Loader(
            folder, schema, ["test"], batch_size=999, rank=rank, world=3, rows=True, cache=cache, group=name
        )
        for batch in loader:
            copy = batch.to("cpu")
            assert copy.rows is not None and copy.group is not None and len(copy.group) == len(copy)
            for row, number in zip(copy.rows.tolist(), copy.group.tolist(), strict=True):
                found.setdefault(values[row], set()).add(number)
    assert all(len(numbers) == 1 for numbers in found.values())
    assert len(set.union(*found.values())) == len(set(values))
    if name == "user":
        assert found[None] == {np.iinfo(np.int64).min}


def test_a_group_that_is_not_kept_is_refused(dataset) -> None:
    with pytest.raises(UserError, match=r"no kept column 'C1' to group by; it has user, session, when"):
        Loader(*dataset, ["test"], batch_size=9, group="C1")
    batch = next(iter(Loader(*dataset, ["test"], batch_size=9)))
    assert batch.group is None


def test_predictions_have_what_stands_beside_their_rows(dataset, tmp_path) -> None:
    folder, schema = dataset
    # As two ranks of which each scored the beginning of its share.
    shares = [np.arange(0, 17_000), np.arange(20_000, 39_000)]
    parts = [tmp_path / "0", tmp_path / "1"]
    for rows, part in zip(shares, parts, strict=True):
        pq.write_table(pa.table([rows, rows.astype(np.float32)], schema=SCHEMA), part)
    target = tmp_path / "all.parquet"
    written = merge_by_row(parts, target, read_beside(Folder(folder), schema, ["test"]))
    assert written.splits == {
        "test": SplitPredictions(rows=36_000, probabilities=float(sum(map(sum, shares))), labels=36_000, clicks=18_000)
    }
    found = pq.read_table(target)
    assert found.column_names == written.columns == ["split", "row", "label", "probability", "user", "session", "when"]
    rows = np.concatenate(shares)
    assert found["row"].to_pylist() == found["probability"].to_pylist() == rows.tolist()
    assert found["label"].to_pylist() == (rows % 2).tolist()
    assert found["user"].to_pylist() == [USERS[row] for row in rows]
    assert found["session"].to_pylist() == SESSIONS[rows].tolist()
    assert set(found["split"].to_pylist()) == {"test"}


def test_data_without_labels_and_kept_columns_still_name_their_split(tmp_path) -> None:
    with DatasetWriter(tmp_path / "data", COLUMNS[2:3]) as writer:
        writer.write("test", {"I1": np.zeros(5, np.float32)})
        schema = writer.finish(dataset="own", protocol="own")
    (beside,) = read_beside(Folder(tmp_path / "data"), schema, ["test"])
    assert beside.to_pydict() == {"split": ["test"] * 5}
