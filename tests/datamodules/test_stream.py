"""Contract: the order of samples is arithmetic on (schema, seed, epoch), the same on any number of
ranks, each row once an epoch; loaders give exactly the rows it says, from any position on, and their
thread never outlives them."""

import dataclasses
import functools
import gc
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import parquet
from datamodules import writer as writing
from datamodules.criteo import Criteo
from datamodules.folder import Folder
from datamodules.mixing import GOLDEN, mix
from datamodules.stream import loader as loader_module
from datamodules.stream import rows as decoded
from datamodules.stream import sources
from datamodules.stream.loader import BackgroundIterator, Loader, TrainingLoader
from datamodules.stream.order import Order, _shares, bijection, permutation
from datamodules.writer import DatasetWriter, data_file
from lightning_dlrm.contracts import memory
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DatasetSchema, Split
from tests.ranks import run_ranks

WIDE = (
    Column(name="label", role="label"),
    Column(name="I1", role="dense"),
    Column(name="I2", role="dense"),
    Column(name="C1", role="categorical", cardinality=50),
    Column(name="C2", role="categorical", cardinality=7),
    Column(name="C3", role="categorical", cardinality=1000),
)
BAGS = (*WIDE[:4], Column(name="M1", role="multi_hot", cardinality=9), WIDE[4])
GROUP_ROWS, FILE_ROWS = 16, 64


def make_arrays(columns: tuple[Column, ...], count: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for column in columns:
        if column.role == "label":
            arrays[column.name] = rng.integers(0, 2, count).astype(np.int8)
        elif column.role == "dense":
            values = rng.random(count).astype(np.float32)
            values[rng.random(count) < 0.2] = np.nan
            arrays[column.name] = values
        elif column.role == "categorical":
            arrays[column.name] = rng.integers(0, column.cardinality, count).astype(np.int32)
        else:
            offsets = np.append(0, np.cumsum(rng.integers(0, 4, count))).astype(np.int32)
            arrays[column.name] = (rng.integers(0, column.cardinality, offsets[-1]).astype(np.int32), offsets)
    return arrays


def make_dataset(folder: Path, columns: tuple[Column, ...], rows: int, seed: int = 0) -> DatasetSchema:
    with pytest.MonkeyPatch.context() as patch, DatasetWriter(folder, columns) as writer:
        patch.setattr(writing, "ROW_GROUP_ROWS", GROUP_ROWS)
        patch.setattr(writing, "ROWS_PER_FILE", FILE_ROWS)
        writer.write("train", make_arrays(columns, rows, seed))
        writer.write("test", make_arrays(columns, rows // 3, seed + 1))
        return writer.finish(dataset="mine", protocol="own")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetSchema]:
    folder = tmp_path_factory.mktemp("wide") / "data"
    return folder, make_dataset(folder, WIDE, 1005)


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetSchema]:
    folder = tmp_path_factory.mktemp("bags") / "data"
    return folder, make_dataset(folder, BAGS, 605)


# The order


@st.composite
def splits(draw: st.DrawFn) -> list[list[int]]:
    """Rows per row group of every file, as the writer cuts them: only the last group is short."""
    rows = draw(st.integers(1, 700))
    size = draw(st.integers(1, 9))
    groups = [size] * (rows // size) + ([rows % size] if rows % size else [])
    per_file = draw(st.integers(1, 12))
    return [groups[i : i + per_file] for i in range(0, len(groups), per_file)]


@settings(max_examples=20)
@given(
    splits(),
    st.integers(1, 150),
    st.sampled_from(["none", "window", "full"]),
    st.integers(0, 2**40),
    st.integers(1, 60),
)
def test_each_row_once_and_every_world_size_serves_the_same_batches(
    files: list[list[int]], batch_size: int, shuffle: Any, seed: int, lanes: int
) -> None:
    order = Order(files, batch_size=batch_size, shuffle=shuffle, seed=seed, epoch=seed % 5, lanes=lanes)
    whole = [order.batch_rows(k) for k in range(order.batches)]
    assert np.array_equal(np.sort(np.concatenate(whole)), np.arange(order.rows))
    assert [len(rows) for rows in whole] == [order.global_size(k) for k in range(order.batches)]
    assert all(len(rows) == batch_size for rows in whole[:-1])
    if shuffle == "none" and lanes == 1:
        assert np.array_equal(np.concatenate(whole), np.arange(order.rows))
    for world in (2, 3, 8, 61):
        last = order.batches - 1
        for k in (0, order.batches // 2, last) if world < 61 else (last,):
            slices = [order.batch_rows(k, rank, world) for rank in range(world)]
            starts = [int(order.slice_starts(k, k + 1, rank, world)[0]) for rank in range(world)]
            assert starts == [sum(map(len, slices[:rank])) for rank in range(world)]
            assert np.array_equal(np.concatenate(slices), whole[k])


@settings(max_examples=40)
@given(splits(), st.integers(1, 150), st.integers(1, 9))
def test_in_evaluation_each_rank_serves_a_range_of_its_own_in_equally_many_batches(
    files: list[list[int]], batch_size: int, world: int
) -> None:
    order = Order(files, batch_size=batch_size, shuffle="none", lanes=world)
    for rank in range(world):
        mine = [order.batch_rows(k, rank, world) for k in range(order.batches)]
        expected = np.arange(rank * order.rows // world, (rank + 1) * order.rows // world)
        assert np.array_equal(np.concatenate(mine), expected)
        assert max(map(len, mine)) <= -(-batch_size // world) + 1


@settings(max_examples=40)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=50).filter(sum))
def test_lanes_are_served_by_their_keys(sizes: list[int]) -> None:
    """Against the plain version: sort all rows by (key, lane) and count."""
    keys = sorted(((2 * i + 1) / n, lane) for lane, n in enumerate(sizes) for i in range(n))
    plain = np.zeros((len(keys) + 1, len(sizes)), dtype=np.int64)
    for position, (_, lane) in enumerate(keys):
        plain[position + 1] = plain[position]
        plain[position + 1, lane] += 1
    assert np.array_equal(_shares(np.array(sizes), np.arange(len(keys) + 1)), plain)


def test_shares_of_very_many_rows_are_exact_and_even() -> None:
    sizes = np.full(48, 91_114_002, dtype=np.int64)
    sizes[5] -= 16_384
    totals = np.array([0, 1, 2**31, int(sizes.sum()) - 1, int(sizes.sum())])
    counts = _shares(sizes, totals)
    assert np.array_equal(counts.sum(axis=1), totals)
    assert np.array_equal(counts[-1], sizes)
    np.testing.assert_allclose(counts, totals[:, None] * (sizes / sizes.sum()), atol=1.5)


def test_no_lane_strays_from_its_window() -> None:
    """A lane finishes a row group before it starts the next, and a file before it opens the next."""
    files = [[10] * 8] * 20
    order = Order(files, batch_size=7, shuffle="window", seed=3)
    lanes = [order.sequence[edge // 10 : stop // 10] for edge, stop in itertools.pairwise(order.edges)]
    for lane, groups in enumerate(lanes):
        counts = order.bounds(0, order.batches, 0, 1)[:, lane] - order.edges[lane]
        assert np.array_equal(counts[1:, 0], counts[:-1, 1]) and counts[-1, 1] == 10 * len(groups)
        visited = [int(group) // 8 for group in groups]
        assert len(list(dict.fromkeys(visited))) == 1 + np.count_nonzero(np.diff(visited))
    assert sorted(np.concatenate(lanes)) == list(range(160))
    served = [order.batch_rows(k) // 10 for k in range(order.batches)]
    in_lane = np.array([[group in set(groups) for group in range(160)] for groups in lanes])
    for lane, groups in enumerate(lanes):
        mine = [group for batch in served for group in batch if in_lane[lane, group]]
        assert mine == np.repeat(groups, 10).tolist()


def test_orders_differ_by_seed_and_epoch_and_are_what_they_always_were() -> None:
    files = [[8] * 4] * 3
    orders = {
        (seed, epoch): tuple(Order(files, batch_size=96, shuffle="window", seed=seed, epoch=epoch).batch_rows(0))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    # Literal: a run must resume in the same order with any later release.
    assert permutation(8, 1).tolist() == [5, 6, 2, 0, 7, 4, 3, 1]
    assert orders[0, 0][:8] == (77, 72, 75, 73, 74, 78, 79, 76)


def test_a_permutation_puts_every_row_everywhere_equally_often() -> None:
    counts = np.zeros((6, 6))
    for key in range(6000):
        counts[np.arange(6), permutation(6, key * 7919)] += 1
    # Standard deviation of each count is 29.
    assert abs(counts - 1000).max() < 150


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_bijection_takes_each_number_once_wherever_it_starts(n: int, key: int) -> None:
    whole = bijection(np.arange(n), n, key)
    assert np.array_equal(np.sort(whole), np.arange(n))
    some = np.array([n - 1, n // 2, 0])
    assert np.array_equal(bijection(some, n, key), whole[some])


def test_a_bijection_puts_every_row_everywhere_equally_often() -> None:
    counts = np.zeros((50, 50))
    for key in range(2000):
        counts[np.arange(50), bijection(np.arange(50), 50, key * 7919)] += 1
    # Standard deviation of each count is 6.3.
    assert abs(counts - 40).max() < 35 and counts.std() < 7
    # Literal: a run must resume in the same order with any later release.
    assert bijection(np.arange(10), 10, 1).tolist() == [6, 4, 9, 3, 0, 1, 7, 8, 5, 2]


# Loaders


@functools.lru_cache(maxsize=2)
def whole_split(folder: Path, paths: tuple[str, ...]) -> dict[str, np.ndarray | list[Any]]:
    """The columns of a split: numbers in an array, ids in a list."""
    table = pa.concat_tables(pq.read_table(folder / path) for path in paths)
    numbers = {column.name for column in WIDE if column.role in ("label", "dense")}
    return {name: table[name].to_numpy() if name in numbers else table[name].to_pylist() for name in table.column_names}


def plain_batch(folder: Path, schema: DatasetSchema, split: str, rows: np.ndarray) -> dict[str, Any]:
    """The rows by their positions, from the whole split read by pyarrow alone."""
    table = whole_split(folder, tuple(file.path for file in schema.splits[split].files))
    tables = [table[column.name] for column in schema.by_role("categorical", "multi_hot")]
    bags = [
        [value] if isinstance(value, int) else value
        for row in rows.tolist()
        for value in (column[row] for column in tables)
    ]
    return {
        "label": table["label"][rows] if "label" in table else None,
        "dense": np.stack([table[c.name][rows] for c in schema.by_role("dense")], axis=1)
        if schema.by_role("dense")
        else np.empty((len(rows), 0), np.float32),
        "bags": bags,
    }


def check_batch(batch: Batch, plain: dict[str, Any], tables: int) -> None:
    if plain["label"] is None:
        assert batch.label is None
    else:
        assert batch.label is not None and batch.label.dtype == torch.int8
        np.testing.assert_array_equal(batch.label, plain["label"])
    assert batch.dense.dtype == torch.float32 and batch.dense.is_contiguous()
    np.testing.assert_array_equal(batch.dense, plain["dense"])
    ids = batch.ids
    assert ids.values.dtype == torch.int32 and ids.tables == tables and len(ids) == len(batch)
    if ids.offsets is None:
        bags = ids.values.reshape(-1, 1).tolist()
    else:
        assert ids.offsets.dtype == torch.int64
        bags = [part.tolist() for part in ids.values.tensor_split(ids.offsets[1:-1])] if len(batch) else []
    assert bags == plain["bags"]


COLUMN_SETS = {
    "wide": WIDE,
    "bags": BAGS,
    "only bags": (BAGS[4],),
    "no label": WIDE[1:],
    "no dense": (WIDE[0], WIDE[3]),
    "no tables": WIDE[:3],
}


@pytest.fixture(scope="module")
def of_columns(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, DatasetSchema]]:
    """Makes the dataset of a column set once."""

    @functools.cache
    def make(columns: str) -> tuple[Path, DatasetSchema]:
        folder = tmp_path_factory.mktemp("columns") / "data"
        return folder, make_dataset(folder, COLUMN_SETS[columns], 141)

    return make


READS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("window", {"threads": 3}),
    ("full", {"cache": "memory"}),
    ("window", {}),
    ("none", {"cache": "memory", "threads": 2}),
    ("window", {"cache": "memory"}),
]
"""How rows can be read: the first three from each kind of columns."""


@pytest.mark.parametrize(
    ("columns", "shuffle", "options", "batch_size", "world"),
    [
        *((columns, *read, *sizes) for columns in ("wide", "bags") for read in READS
          for sizes in ((7, 3), (100, 1), (5000, 2))),
        *((columns, *read, 7, 3) for columns in list(COLUMN_SETS)[2:] for read in READS[:3]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_loaders_give_the_rows_of_the_order(
    of_columns: Callable[[str], tuple[Path, DatasetSchema]],
    columns: str,
    shuffle: Any,
    options: dict[str, Any],
    batch_size: int,
    world: int,
) -> None:
    folder, schema = of_columns(columns)
    order = Order([f.row_groups for f in schema.splits["train"].files], batch_size=batch_size, shuffle=shuffle, seed=4)
    for rank in range(world):
        loader = TrainingLoader(
            folder,
            schema,
            ["train"],
            shuffle=shuffle,
            seed=4,
            batch_size=batch_size,
            rank=rank,
            world=world,
            rows=True,
            **options,
        )
        batches = list(loader)
        assert len(batches) == len(loader) == order.batches
        for k, batch in enumerate(batches):
            rows = order.batch_rows(k, rank, world)
            assert batch.rows is not None and batch.global_size == order.global_size(k)
            assert batch.start == order.slice_starts(k, k + 1, rank, world)[0]
            assert batch.checked_table_rows == schema.features.table_rows
            np.testing.assert_array_equal(batch.rows, rows)
            check_batch(batch, plain_batch(folder, schema, "train", rows), len(schema.features.tables))


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_gives_each_rank_its_range_of_the_rows_of_several_splits(
    bags: tuple[Path, DatasetSchema], cache: Any, world: int
) -> None:
    folder, schema = bags
    given, sizes = [], []
    for rank in range(world):
        loader = Loader(
            folder, schema, ["train", "test"], batch_size=300, rows=True, rank=rank, world=world, cache=cache
        )
        for _ in range(2):  # every iteration starts anew
            batches = list(loader)
        rows = torch.cat([batch.rows for batch in batches if batch.rows is not None]).numpy()
        assert len(batches) == len(loader) == 3
        for batch, part in zip(batches, np.split(rows, np.cumsum([len(batch) for batch in batches])[:-1]), strict=True):
            for split, first, count in (("train", 0, 605), ("test", 605, 201)):
                inside = part[(part >= first) & (part < first + count)] - first
                if len(inside) == len(part) > 0:
                    check_batch(batch, plain_batch(folder, schema, split, inside), 3)
        given.append(rows)
        sizes.append([batch.global_size for batch in batches])
    np.testing.assert_array_equal(np.concatenate(given), np.arange(806))
    assert sizes == [[300, 300, 206]] * world


@pytest.mark.parametrize("shuffle", ["window", None], ids=["training", "evaluation"])
@pytest.mark.parametrize("rows", [2, 33])
def test_a_slice_without_rows_has_the_form_of_any_other(tmp_path: Path, rows: int, shuffle: Any) -> None:
    """Ranks whose rows are used up before the last batch, or that have none at all, take part in every batch."""
    schema = make_dataset(tmp_path / "data", BAGS, rows)
    given = []
    for rank in range(4):
        place: dict[str, Any] = {"batch_size": 4, "rows": True, "rank": rank, "world": 4}
        folder = tmp_path / "data"
        loader = (
            TrainingLoader(folder, schema, ["train"], shuffle=shuffle, seed=1, **place)
            if shuffle
            else Loader(folder, schema, ["train"], **place)
        )
        batches = list(loader)
        assert len(batches) == -(-rows // 4)
        for batch in batches:
            assert batch.rows is not None and batch.ids.offsets is not None
            assert len(batch.ids.offsets) == 3 * len(batch) + 1
            check_batch(batch, plain_batch(folder, schema, "train", batch.rows.numpy()), 3)
            given += batch.rows.tolist()
    assert sorted(given) == list(range(rows))


def training_loader(dataset: tuple[Path, DatasetSchema], **changes: Any) -> TrainingLoader:
    options = {"shuffle": "window", "seed": 1, "batch_size": 50, "rows": True, **changes}
    return TrainingLoader(*dataset, ["train"], **options)


def served(batches: Iterator[Batch], count: int | None = None) -> list[list[int]]:
    found = []
    for batch in batches:
        assert batch.rows is not None
        found.append(batch.rows.tolist())
        if len(found) == count:
            break
    return found


_EPOCHS: dict[str, list[list[list[int]]]] = {}


def undisturbed_epochs(wide: tuple[Path, DatasetSchema], options: dict[str, Any]) -> list[list[list[int]]]:
    """Four epochs of a loader that is not stopped, served once for all stops."""
    if str(options) not in _EPOCHS:
        undisturbed = training_loader(wide, **options)
        _EPOCHS[str(options)] = [served(iter(undisturbed)) for _ in range(4)]
    return _EPOCHS[str(options)]


@pytest.mark.parametrize(
    ("options", "stop"),
    [
        *(({}, stop) for stop in (0, 9, 20, 21, 22)),
        *(pytest.param({}, stop, marks=pytest.mark.slow) for stop in (1, 41, 42)),
        ({"cache": "memory"}, 21),
        ({"cache": "memory", "shuffle": "full"}, 9),
        ({"threads": 2}, 9),
        pytest.param({"threads": 2}, 21, marks=pytest.mark.slow),
    ],
)
def test_resume_goes_on_with_the_batch_that_would_have_come(
    wide: tuple[Path, DatasetSchema], stop: int, options: dict[str, Any]
) -> None:
    epochs = undisturbed_epochs(wide, options)
    assert len(epochs[0]) == 21 and epochs[0] != epochs[1]
    flat = [rows for epoch in epochs for rows in epoch]

    stopped = training_loader(wide, **options)
    for epoch in range(3):
        if (left := stop - 21 * epoch) > 0:
            served(iter(stopped), left)
    resumed = training_loader(wide, **options)
    resumed.load_state_dict(stopped.state_dict())
    iter(resumed)  # Lightning may ask for an iterator and drop it
    following = served(iter(resumed)) + served(iter(resumed))
    assert following == flat[stop : stop + len(following)] and len(following) >= 21


@pytest.mark.parametrize(
    "options", [{"shuffle": "window"}, {"shuffle": "none"}, {"shuffle": "full", "cache": "memory"}]
)
def test_a_position_holds_for_another_number_of_ranks(
    wide: tuple[Path, DatasetSchema], options: dict[str, Any]
) -> None:
    one = training_loader(wide, **options)
    served(iter(one), 5)
    state = one.state_dict()
    slices = []
    for rank in range(3):
        loader = training_loader(wide, rank=rank, world=3, **options)
        loader.load_state_dict(state)
        slices.append(served(iter(loader)))
    assert [a + b + c for a, b, c in zip(*slices, strict=True)] == served(iter(one))


SERVE = """
import json, os, sys
from datamodules.stream import rows as decoded
from datamodules.stream.loader import Loader, TrainingLoader
from lightning_dlrm.contracts.schema import DatasetSchema

folder, state, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
schema, read = DatasetSchema.load(folder), []
whole_read = decoded.Decoder.slices
decoded.Decoder.slices = lambda self, group: read.append(group) or whole_read(self, group)

def served(loader):
    read.clear()
    batches = []
    for batch in loader:
        bags = batch.ids.values.tensor_split(batch.ids.offsets[1:-1]) if len(batch) else []
        batches.append([batch.label.tolist(), batch.dense.numpy().tobytes().hex(), [bag.tolist() for bag in bags]])
    return {"batches": batches, "groups": list(read)}

options = {"batch_size": 50, "rank": rank, "world": world}
training = TrainingLoader(folder, schema, ["train"], shuffle="window", seed=1, **options)
training.load_state_dict(training.state_dict() | state)
result = {"resumed": served(training), "next epoch": served(training)}
result["evaluation"] = served(Loader(folder, schema, ["train"], **options))
with open(f"{out}-{rank}", "w") as file:
    json.dump(result, file)
"""


@pytest.fixture(scope="module")
def one_process(bags: tuple[Path, DatasetSchema], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return serve(bags[0], tmp_path_factory.mktemp("one"), 1)[0]


def serve(folder: Path, out: Path, world: int) -> list[dict[str, Any]]:
    """What each of several real processes serves from batch 4 of epoch 1 on."""
    run_ranks(["-c", SERVE, str(folder), json.dumps({"epoch": 1, "batch": 4}), str(out / "served")], world)
    return [json.loads((out / f"served-{rank}").read_text()) for rank in range(world)]


def joined(slices: Sequence[Any]) -> Any:
    """A batch from its slices, in the order of the ranks."""
    labels, dense, bags = zip(*slices, strict=True)
    return [list(itertools.chain(*labels)), "".join(dense), list(itertools.chain(*bags))]


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_serve_what_one_serves_and_read_the_data_once(
    bags: tuple[Path, DatasetSchema], one_process: dict[str, Any], tmp_path: Path, world: int
) -> None:
    ranks = serve(bags[0], tmp_path, world)
    groups = sum(len(file.row_groups) for file in bags[1].splits["train"].files)
    for stage, batches in (("resumed", 9), ("next epoch", 13)):
        together = [joined(slices) for slices in zip(*(rank[stage]["batches"] for rank in ranks), strict=True)]
        assert together == one_process[stage]["batches"] and len(together) == batches
    decoded = [group for rank in ranks for group in rank["next epoch"]["groups"]]
    assert sorted(decoded) == list(range(groups))
    # In evaluation, the rows in the order of the ranks; a row group that two ranks share is read by both.
    whole, parts = joined(one_process["evaluation"]["batches"]), [joined(r["evaluation"]["batches"]) for r in ranks]
    assert joined(parts) == whole
    decoded = [group for rank in ranks for group in rank["evaluation"]["groups"]]
    assert set(decoded) == set(range(groups)) and len(decoded) <= groups + world - 1


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("shuffle", ["window", "none"])
def test_the_next_epoch_is_read_before_it_is_asked_for(
    wide: tuple[Path, DatasetSchema], limit: int | None, shuffle: Any
) -> None:
    folder, schema = wide

    def loader(epochs: float) -> TrainingLoader:
        made = TrainingLoader(folder, schema, ["train"], shuffle=shuffle, seed=3, batch_size=97)
        made.limit_epoch(len(made) if limit is None else limit, epochs)
        return made

    def content(batch: Batch) -> list[list[float]]:
        assert batch.label is not None
        return [part.nan_to_num(-9).tolist() for part in (batch.label, batch.dense, batch.ids.values)]

    plain, ahead = loader(0), loader(3)
    for _ in range(3):
        assert [content(batch) for batch in ahead] == [content(batch) for batch in plain]
    assert plain.state_dict() == ahead.state_dict() and ahead._next_epoch is None

    begun, ahead = list[tuple[int, int]](), loader(2)
    begin = ahead._begin
    ahead._begin = lambda *where: (begun.append(where), begin(*where))[1]  # type: ignore[method-assign]
    batches = iter(ahead)
    for _ in range(ahead._epoch_batches):
        next(batches)
    assert begun == [(0, 0), (1, 0)], "before it is asked for"
    list(batches)
    list(ahead)
    assert begun == [(0, 0), (1, 0)]
    # A position in another epoch does not take batches that were read ahead.
    other, ahead = loader(0), loader(9)
    list(ahead)
    for moved in (other, ahead):
        moved.load_state_dict(plain.state_dict() | {"epoch": 7, "batch": 2})
    assert content(next(iter(ahead))) == content(next(iter(other)))


def test_epochs_that_a_trainer_cuts_short_resume_alike(wide: tuple[Path, DatasetSchema]) -> None:
    undisturbed = training_loader(wide)
    undisturbed.limit_epoch(4)
    epochs = [served(iter(undisturbed)) for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [4, 4]
    assert epochs[1] == served(iter(training_loader_at(wide, epoch=1)), 4)
    stopped, resumed = training_loader(wide), training_loader(wide)
    stopped.limit_epoch(4)
    resumed.limit_epoch(4)
    served(iter(stopped))
    resumed.load_state_dict(stopped.state_dict())
    assert served(iter(resumed)) == epochs[1]


def training_loader_at(dataset: tuple[Path, DatasetSchema], epoch: int) -> TrainingLoader:
    loader = training_loader(dataset)
    loader.load_state_dict({**loader.state_dict(), "epoch": epoch})
    return loader


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "with seed 1, this run has 2"),
        ({"shuffle": "none"}, "with shuffle window, this run has none"),
        ({"batch_size": 100}, "with batch size 50, this run has 100"),
    ],
)
def test_a_position_in_another_order_is_refused(
    wide: tuple[Path, DatasetSchema], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        training_loader(wide, **change).load_state_dict(training_loader(wide).state_dict())


def test_a_position_in_other_data_is_refused(tmp_path: Path, wide: tuple[Path, DatasetSchema]) -> None:
    other = make_dataset(tmp_path / "other", WIDE, 1005, seed=9)
    with pytest.raises(UserError, match="data fingerprint"):
        training_loader((tmp_path / "other", other)).load_state_dict(training_loader(wide).state_dict())


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_bounded_by_two_row_groups_a_lane(
    wide: tuple[Path, DatasetSchema], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """And by the rows that are fetched at once. Rows that were overwritten too early would be other rows."""
    windows: list[sources.Window] = []

    class Watched(sources.Window):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            windows.append(self)

    monkeypatch.setattr(loader_module, "Window", Watched)
    monkeypatch.setattr(sources, "_BLOCK_ROWS", 100)
    folder, schema = wide
    loader = training_loader(wide, batch_size=20, threads=threads)
    for batch in loader:
        assert batch.rows is not None
        check_batch(batch, plain_batch(folder, schema, "train", batch.rows.numpy()), 3)
    assert max(windows[0]._capacity_L) <= 2 * GROUP_ROWS + 100 // 48 + 4
    assert windows[0]._rings.nbytes <= 48 * (2 * GROUP_ROWS + 6) * windows[0]._rings.nbytes / len(windows[0]._rings)


@pytest.mark.parametrize("columns", ["wide", "bags"])
@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": "none"},
        {"shuffle": "none", "threads": 3},
        {"shuffle": "window"},
        {"shuffle": "window", "threads": 2},
        {"shuffle": "window", "cache": "memory"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_large_row_groups_are_read_in_parts_in_the_same_order(
    of_columns: Callable[[str], tuple[Path, DatasetSchema]],
    columns: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = of_columns(columns)

    def rows() -> list[Any]:
        loaders = [training_loader(dataset, batch_size=33, rank=rank, world=2, **options) for rank in range(2)]
        for loader in loaders:
            loader.load_state_dict(loader.state_dict() | {"batch": 2})
        tensors = [(b.label, b.dense, b.ids.values, b.ids.offsets) for loader in loaders for b in loader]
        return [None if tensor is None else tensor.numpy().tobytes() for batch in tensors for tensor in batch]

    whole = rows()
    monkeypatch.setattr(sources, "LARGE", 5)
    monkeypatch.setattr(sources, "_PARTS_BYTES", 0)
    monkeypatch.setattr(parquet, "SLICE_ROWS", 3)
    assert rows() == whole


@pytest.mark.parametrize(
    ("shuffle", "threads", "most"), [("window", 1, 0), ("window", 2, 0), ("none", 1, 1), ("none", 3, 3)]
)
def test_an_epoch_of_parts_keeps_few_readers_of_a_row_group(
    tmp_path: Path, shuffle: Any, threads: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "GROUP_ROWS", 500)
    monkeypatch.setattr(sys.modules[__name__], "FILE_ROWS", 1_000)
    schema = make_dataset(tmp_path, WIDE, 1_000)
    path = str(tmp_path / schema.splits["train"].files[0].path)
    begun, kept, opened = [], [0], [0]

    class Watched(decoded.Decoder):
        def __call__(self, group: int, positions: np.ndarray | None = None) -> decoded.Rows:
            rows = super().__call__(group, positions)
            kept.append(len(self._cursors))
            opened.append(sum(file.path == path for file in psutil.Process().open_files()))
            return rows

        def slices(self, group: int) -> Iterator[decoded.Rows]:
            begun.append(group)
            return super().slices(group)

    monkeypatch.setattr(loader_module, "Decoder", Watched)

    def read() -> list[bytes]:
        batches = list(training_loader((tmp_path, schema), shuffle=shuffle, threads=threads))
        return [tensor.numpy().tobytes() for b in batches for tensor in (b.rows, b.label, b.dense, b.ids.values)]

    whole = read()
    begun.clear()
    monkeypatch.setattr(sources, "LARGE", 20)
    monkeypatch.setattr(sources, "_PARTS_BYTES", 0)
    monkeypatch.setattr(parquet, "SLICE_ROWS", 10)
    assert read() == whole
    assert len(kept) == 1 + 2 + 2 * 25, "each row group is read in 25 parts"
    assert max(kept) <= most and 0 < max(opened) <= 2 + 2 * threads
    if threads == 1:
        assert len(begun) == (2 if shuffle == "none" else 50)


@pytest.mark.parametrize("n", [10, 70_000, 1_100_000])
def test_a_part_of_a_permutation_is_that_of_the_whole(n: int) -> None:
    whole = permutation(n, 7)
    assert np.array_equal(np.sort(whole), np.arange(n))
    bits = mix(np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(7))
    sorted_bits = bits.astype(np.uint16 if n <= 1 << 16 else np.uint32)
    np.testing.assert_array_equal(whole, np.argsort(sorted_bits, kind="stable"))
    for start, stop in ((0, n), (0, 1), (n // 3, n // 2), (n - 1, n)):
        np.testing.assert_array_equal(permutation(n, 7, start, stop), whole[start:stop])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows_of_a_row_group(tmp_path: Path) -> None:
    """A file of some 100 KB whose row groups have 20 million rows each."""
    columns, count, piece = WIDE[2:4], 20_000_000, 1_000_000
    with DatasetWriter(tmp_path / "data", columns) as writer:
        writer.write("train", make_arrays(columns, 1, 0))
        schema = writer.finish(dataset="mine", protocol="own")
    path = tmp_path / "data" / schema.splits["train"].files[0].path
    rows = pa.table({"I2": np.zeros(piece, np.float32), "C1": np.zeros(piece, np.int32)})
    pq.write_table(pa.concat_tables([rows] * (count // piece)), path, row_group_size=count)
    file = data_file(tmp_path / "data", schema.splits["train"].files[0].path, (count,))
    dataclasses.replace(schema, splits={"train": Split(rows=count, files=(file,))}).save(tmp_path / "data")
    for shuffle, most in (("none", 100e6), ("window", 600e6)):
        read = [sys.executable, "-c", FIRST_BATCH, str(tmp_path / "data"), shuffle]
        assert int(subprocess.run(read, check=True, capture_output=True, text=True).stdout) < most


FIRST_BATCH = """
import resource, sys
from datamodules.folder import load_schema
from datamodules.stream.loader import TrainingLoader
folder, shuffle = sys.argv[1:]
loader = TrainingLoader(folder, load_schema(folder), ["train"], shuffle=shuffle, seed=0, batch_size=2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
next(iter(loader))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_cached_rows_are_decoded_once_and_the_log_says_how_much(
    wide: tuple[Path, DatasetSchema], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    groups: list[int] = []
    read = decoded.Decoder.slices

    def watched(self: decoded.Decoder, group: int) -> Any:
        groups.append(group)
        return read(self, group)

    monkeypatch.setattr(decoded.Decoder, "slices", watched)
    loader = training_loader(wide, cache="memory", shuffle="full")
    with caplog.at_level("INFO", logger="lightning_dlrm"):
        epochs = [served(iter(loader)) for _ in range(3)]
    assert sorted(groups) == list(range(-(-1005 // GROUP_ROWS)))
    # A label of 1 byte, and 2 floats and 3 ids of 4 bytes each.
    assert re.fullmatch(r"train: 1,005 rows kept in memory, 0\.0 MB, decoded in \d+\.\d s", caplog.messages[0])
    assert loader._cached_rows is not None and loader._cached_rows.nbytes == 1005 * 21
    assert len(caplog.messages) == 1 and epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("dataset", ["wide", "bags"])
def test_rows_that_do_not_fit_into_memory_are_refused(
    dataset: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, schema = request.getfixturevalue(dataset)
    need = hold_all(folder, schema).nbytes
    options: dict[str, Any] = {"batch_size": 10, "cache": "memory"}
    for ranks in (1, 3):
        monkeypatch.setattr(loader_module, "available_memory", lambda ranks=ranks: ranks * need * 2)
        Loader(folder, schema, ["train"], copies=ranks, **options)
        monkeypatch.setattr(loader_module, "available_memory", lambda ranks=ranks: ranks * need // 2)
        with pytest.raises(UserError, match=r"rows of the train split take .* GiB are free: set data.cache to none"):
            Loader(folder, schema, ["train"], copies=ranks, **options)


def hold_all(folder: Path, schema: DatasetSchema) -> sources.Rows:
    files = schema.splits["train"].files
    order = Order([file.row_groups for file in files], batch_size=1, shuffle="none")
    return sources.cache_rows(decoded.Decoder(Folder(folder), schema, files), order, 0, order.rows, 1)


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/job", "job", {"max": "9000", "current": "5000", "stat": "anon 3\ninactive_file 1000\n"}),
        ("0::/job/step", "job", {"max": "9000", "current": "5000", "stat": "anon 3\ninactive_file 1000\n"}),
        ("0::/gone", "", {"max": "9000", "current": "5000", "stat": "inactive_file 1000\n"}),
        ("4:memory:/job/step", "memory/job",
         {"limit_in_bytes": "9000", "usage_in_bytes": "5000", "stat": "total_inactive_file 1000\n"}),
    ],
)  # fmt: skip
def test_available_memory_heeds_the_limits_of_containers_and_jobs(
    line: str, folder: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    free = memory.available_memory()
    assert 2**24 < free < 2**50
    (tmp_path / "own").write_text(f"1:cpu:/\n{line}\n")
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (tmp_path / folder / f"memory.{name}").write_text(content)
    assert memory.available_memory() == 5000
    limit = next(iter(files))
    (tmp_path / folder / f"memory.{limit}").write_text("max\n")
    assert memory.available_memory() == pytest.approx(free, rel=0.5)


def test_batches_for_a_gpu_are_pinned_in_the_readers_thread(
    bags: tuple[Path, DatasetSchema], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[tuple[str, torch.Tensor]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append((threading.current_thread().name, tensor.clone()))
        return pinned[-1][1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batches = list(training_loader(bags, pin=True))
    assert {name for name, _ in pinned} == {"batch reader"}
    mine = {id(tensor) for _, tensor in pinned}
    for batch in batches:
        tensors = (batch.label, batch.dense, batch.rows, batch.ids.values, batch.ids.offsets)
        assert all(id(tensor) in mine for tensor in tensors)
        assert batch.nbytes == sum(tensor.nbytes for tensor in tensors if tensor is not None)
    assert served(iter(training_loader(bags, pin=True))) == served(iter(training_loader(bags)))


# Faults and threads


def test_a_damaged_part_is_named_where_its_rows_would_come(tmp_path: Path) -> None:
    schema = make_dataset(tmp_path / "data", WIDE, 305)
    path = tmp_path / "data" / schema.splits["train"].files[3].path
    content = path.read_bytes()
    path.write_bytes(b"PAR1" + b"\xff" * 700 + content[704:])
    loader = Loader(tmp_path / "data", schema, ["train"], batch_size=FILE_ROWS)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    with pytest.raises(UserError, match=r"part-00003\.parquet is altered: row group 0 cannot be decoded"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    path.unlink()
    with pytest.raises(UserError, match=r"part-00003\.parquet is missing"):
        list(loader)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_flipped_bit_that_still_decodes_is_told(tmp_path: Path, threads: int) -> None:
    schema = make_dataset(tmp_path / "data", WIDE, 505)
    path = tmp_path / "data" / schema.splits["train"].files[5].path
    content = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(2).column(1)  # I1, whose last byte is a position in its dictionary
    at = column.dictionary_page_offset + column.total_compressed_size
    path.write_bytes(content[: at - 1] + bytes([content[at - 1] ^ 1]) + content[at:])
    with pytest.raises(UserError, match=r"part-00005\.parquet is altered: row group 2 cannot be decoded .* restore"):
        list(training_loader((tmp_path / "data", schema), threads=threads))
    # It is the checksum that tells: such a bit may change a value and no more.
    assert sum(map(len, training_loader((tmp_path / "data", schema), threads=threads, verify=False))) == 505


@pytest.fixture
def url(bags: tuple[Path, DatasetSchema]) -> Iterator[str]:
    """The dataset behind a URL."""
    files = fsspec.filesystem("memory")
    files.put(str(bags[0]), "/bucket/data", recursive=True)
    yield "memory://bucket/data"
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("options", [{}, {"threads": 2}, {"shuffle": "full", "cache": "memory"}])
def test_a_dataset_behind_a_url_gives_the_same_batches(
    bags: tuple[Path, DatasetSchema], url: str, options: dict[str, Any]
) -> None:
    data = Criteo(url, batch_size=100, seed=1, **options)
    assert data.schema == bags[1]
    data.setup("test")
    local = Criteo(str(bags[0]), batch_size=100, seed=1, **options)
    for mine, theirs in zip(data.train_dataloader(), local.train_dataloader(), strict=True):
        assert mine.label is not None and theirs.label is not None and torch.equal(mine.label, theirs.label)
        assert torch.equal(mine.ids.values, theirs.ids.values) and torch.equal(mine.ids.offsets, theirs.ids.offsets)
        np.testing.assert_array_equal(mine.dense, theirs.dense)


def test_what_is_wrong_behind_a_url_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("absent", "no_such_module.Files", errtxt="Install absentfs", clobber=True)
    for wrong, message in (
        (
            "memory://bucket/nowhere",
            r"no dataset folder at memory://bucket/nowhere: .*nowhere/dataset.json does not exist",
        ),
        ("nosuch://x/y", r"nosuch://x/y: fsspec does not know the protocol nosuch://"),
        ("absent://x/y", r"absent://x/y needs a package that is not installed: Install absentfs"),
    ):
        with pytest.raises(UserError, match=message):
            _ = Criteo(wrong).schema
    files = fsspec.filesystem("memory")
    data = Criteo(url)
    part = "/bucket/data/test/part-00001.parquet"
    content = files.cat_file(part)
    files.pipe_file(part, content[:-1])
    with pytest.raises(UserError, match=r"memory://.*/test/part-00001.parquet is truncated: it has .* restore"):
        data.setup("test")
    files.pipe_file(part, content[:300] + b"\xff" * 300 + content[600:])
    with pytest.raises(UserError, match=r"part-00001.parquet is altered: row group 0 cannot be decoded"):
        list(Loader(url, data.schema, ["test"], batch_size=100))
    files.rm(part)
    with pytest.raises(UserError, match=r"memory://bucket/data/test/part-00001.parquet is missing; restore"):
        data.setup("test")

    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError("access denied\nrequest 7")

    monkeypatch.setattr(type(files), "info", refused)
    with pytest.raises(UserError, match=r"cannot be read \(PermissionError: access denied request 7\); check the URL"):
        data.setup("test")


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batch reader"]


def test_the_thread_ends_with_its_iterator(wide: tuple[Path, DatasetSchema]) -> None:
    gc.collect()
    assert not reader_threads()
    for loader in (Loader(*wide, ["train"], batch_size=10), training_loader(wide, batch_size=10)):
        batches = iter(loader)
        next(batches)
        assert len(reader_threads()) == 1
        del batches
        gc.collect()
        assert not reader_threads()
        list(loader)
        assert not reader_threads()


@pytest.mark.parametrize(("ahead", "bytes_ahead"), [(3, 1000), (9, 30), (9, 25)])
def test_a_background_iterator_runs_a_bounded_number_of_items_and_bytes_ahead(ahead: int, bytes_ahead: int) -> None:
    made = 0

    def source() -> Generator[list[SimpleNamespace], None, None]:
        nonlocal made
        while True:
            made += 1
            yield [SimpleNamespace(nbytes=10)]

    items = BackgroundIterator(source, ahead, bytes_ahead)
    assert next(items).nbytes == 10
    deadline = time.monotonic() + 30
    while made < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # in which it makes no more
    assert made == 4
    items.close()
    with pytest.raises(StopIteration):
        next(items)


@pytest.mark.parametrize("threads", [3])
def test_the_interpreter_ends_amid_an_iteration(wide: tuple[Path, DatasetSchema], threads: int) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from datamodules.stream.loader import Loader\n"
        "from lightning_dlrm.contracts.schema import DatasetSchema\n"
        "folder = Path(sys.argv[1])\n"
        f"loader = Loader(folder, DatasetSchema.load(folder), ['train'], batch_size=10, threads={threads})\n"
        "batches = iter(loader)\n"
        "next(batches); print('amid')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(wide[0])], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "amid\n", "")
