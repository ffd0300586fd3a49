"""Contract: a weights column reaches the batch beside the ids of its bags, in any order of rows and on any number of
ranks, ids of columns without weights get 1, and a file whose weights do not fit its bags is named."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules import writer as writing
from datamodules.stream.loader import Loader, TrainingLoader
from datamodules.writer import DatasetWriter
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DatasetSchema, Split
from tests.toy import toy_dlrm

COLUMNS = (
    Column(name="I1", role="dense"),
    Column(name="M1", role="multi_hot", cardinality=9),
    Column(name="C1", role="categorical", cardinality=20),
    Column(name="M2_weights", role="weights"),
    Column(name="M2", role="multi_hot", cardinality=30),
)
ROWS = 300


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, DatasetSchema]:
    monkeypatch.setattr(writing, "ROW_GROUP_ROWS", 32)
    rng = np.random.default_rng(0)

    def bags(cardinality: int) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.append(0, np.cumsum(rng.integers(0, 4, ROWS)))
        return rng.integers(0, cardinality, offsets[-1]).astype(np.int32), offsets

    m1, m2 = bags(9), bags(30)
    arrays: dict[str, Any] = {
        "I1": rng.random(ROWS).astype(np.float32),
        "M1": m1,
        "C1": rng.integers(0, 20, ROWS).astype(np.int32),
        "M2_weights": (rng.normal(size=len(m2[0])).astype(np.float32), m2[1]),
        "M2": m2,
    }
    with DatasetWriter(tmp_path / "data", COLUMNS) as writer:
        writer.write("train", arrays)
        return tmp_path / "data", writer.finish(dataset="mine", protocol="own")


def plain_rows(folder: Path) -> list[list[tuple[list[int], list[float]]]]:
    """Of every row and table in schema order the ids and weights, by pyarrow alone."""
    table = pq.read_table(folder / "train").to_pydict()
    return [
        [(m1, [1.0] * len(m1)), ([c1], [1.0]), (m2, weights)]
        for m1, c1, m2, weights in zip(table["M1"], table["C1"], table["M2"], table["M2_weights"], strict=True)
    ]


@pytest.mark.parametrize(
    ("shuffle", "cache"), [("none", "none"), ("window", "none"), ("window", "memory"), ("full", "memory")]
)
@pytest.mark.parametrize(("batch_size", "world", "threads"), [(50, 1, 2), (7, 3, 1)])
def test_every_id_comes_with_its_weight(
    dataset: tuple[Path, DatasetSchema], shuffle: Any, cache: str, batch_size: int, world: int, threads: int
) -> None:
    folder, schema = dataset
    plain, seen = plain_rows(folder), []
    for rank in range(world):
        options: dict[str, Any] = {"batch_size": batch_size, "rank": rank, "world": world, "rows": True}
        options |= {"cache": cache, "threads": threads}
        for batch in TrainingLoader(folder, schema, ["train"], shuffle=shuffle, seed=2, **options):
            assert batch.rows is not None and batch.ids.offsets is not None and batch.ids.weights is not None
            assert batch.ids.weights.dtype == torch.float32 and batch.ids.weights.shape == batch.ids.values.shape
            cuts = batch.ids.offsets[1:-1]
            ids, weights = (
                [part.tolist() for part in values.tensor_split(cuts)] if len(batch) else []
                for values in (batch.ids.values, batch.ids.weights)
            )
            rows = batch.rows.tolist()
            assert list(zip(ids, weights, strict=True)) == [bag for row in rows for bag in plain[row]]
            seen += rows
    assert sorted(seen) == list(range(ROWS))


def test_a_model_sums_weighted_rows(dataset: tuple[Path, DatasetSchema]) -> None:
    folder, schema = dataset
    model = toy_dlrm(schema.features, seed=0)
    batch = next(iter(Loader(folder, schema, ["train"], batch_size=ROWS)))
    (lookup,) = model.lookups()
    vectors = lookup(batch.ids).detach().numpy()
    weight = lookup.weight.detach().numpy()
    firsts = np.cumsum([0, 9, 20])
    for b, row in enumerate(plain_rows(folder)):
        for table, (ids, factors) in enumerate(row):
            summed = sum((f * weight[firsts[table] + i] for i, f in zip(ids, factors, strict=True)), np.zeros(4))
            np.testing.assert_allclose(vectors[b, table], summed, atol=1e-6)


def test_a_file_whose_weights_do_not_fit_is_named(dataset: tuple[Path, DatasetSchema]) -> None:
    folder, schema = dataset
    path = folder / "train/part-00000.parquet"
    table = pq.read_table(path)
    weights = table["M2_weights"].to_pylist()
    weights[40] = [*weights[40], 0.5]
    position = table.schema.get_field_index("M2_weights")
    pq.write_table(
        table.set_column(position, "M2_weights", pa.array(weights, pa.list_(pa.float32()))), path, row_group_size=32
    )
    file = dataclasses.replace(schema.splits["train"].files[0], bytes=path.stat().st_size)
    altered = dataclasses.replace(schema, splits={"train": Split(rows=ROWS, files=(file,))})
    message = (
        r"train/part-00000\.parquet, row group 1, column M2_weights, rows from 32: row 8 has \d weights for \d ids"
    )
    with pytest.raises(UserError, match=message):
        list(Loader(folder, altered, ["train"], batch_size=50))
