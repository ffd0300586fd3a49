"""Contract: random data follow the law that was asked for, within each table's size; bags, weights and labels are as
asked; every block is a function of (settings, split, number) and of nothing else, on every machine; and a setting
that makes no sense is refused by name."""

import dataclasses
import hashlib
import inspect
import itertools
import math
import re
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from datamodules.clicks import Clicks, FolderData
from datamodules.criteo import Criteo
from datamodules.folder import verify
from datamodules.generate import command, draws, folder
from datamodules.generate.draws import Gaussian, Uniform, Zipf, stream, uniforms
from datamodules.generate.random import (
    BLOCK_ROWS,
    RandomRows,
    RandomSettings,
    generate_random,
    random_folder,
    random_schema,
)
from datamodules.generate.tsv import TsvSettings, generate_tsv
from datamodules.synthetic import RandomData
from lightning_dlrm.cli.plain_parser import HelpParser
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import DatasetSchema

SETTINGS = RandomSettings(
    tables=(1, 7, 50_000, 2_000),
    dense=3,
    indices=(1, 5, 20, 1),
    min_indices=(1, 0, 3, 1),
    law="zipf",
    weights=True,
    train_rows=BLOCK_ROWS + 700,
    validation_rows=500,
    test_rows=0,
    seed=11,
)
LAWS = {
    "uniform": Uniform,
    "gaussian": lambda rows: Gaussian(rows, 0.3, 0.2),
    "zipf 0.6": lambda rows: Zipf(rows, 0.6),
    "zipf 1": lambda rows: Zipf(rows, 1.0),
    "zipf 1.3": lambda rows: Zipf(rows, 1.3),
    "zipf 4": lambda rows: Zipf(rows, 4.0),
}


def chances(law: str, rows: int) -> np.ndarray:
    """The chance of every id, from the definition of its law."""
    if law == "uniform":
        return np.full(rows, 1 / rows)
    if law == "gaussian":
        below = np.array([statistics.NormalDist(0.3, 0.2).cdf(k / rows) for k in range(rows + 1)])
        return np.diff(below) / (below[-1] - below[0])
    masses = np.arange(1, rows + 1) ** -float(law.split()[1])
    return masses / math.fsum(masses)


@pytest.mark.parametrize("rows", [1, 2, 3, 50, 20_000])
@pytest.mark.parametrize("law", LAWS)
def test_ids_follow_the_law_within_the_tables_size(law: str, rows: int) -> None:
    """Chi-square over cells of at least 25 expected ids; a right generator fails one seed in 1,000."""
    drawn = 400_000
    ids = LAWS[law](rows)(uniforms(stream(0, 99, rows), drawn))
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < rows
    expected = chances(law, rows) * drawn
    # Ids in a run share a cell until it expects enough; the rest joins the last.
    cell = np.minimum(np.cumsum(expected) // 25, drawn)
    cell = np.unique(cell, return_inverse=True)[1]
    expected_cells = np.bincount(cell, expected)
    found_cells = np.bincount(cell, np.bincount(ids, minlength=rows))
    keep = expected_cells >= 10
    assert expected_cells[~keep].sum() < 50
    chi_square = float(((found_cells - expected_cells) ** 2 / expected_cells)[keep].sum())
    assert stats.chi2.sf(chi_square, max(int(keep.sum()) - 1, 1)) > 1e-3 or keep.sum() == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 1_000, 4_096, 4_097, 40_000_000, 2**31 - 1])
@pytest.mark.parametrize("law", LAWS)
def test_no_uniform_leads_out_of_a_table(law: str, rows: int) -> None:
    edges = np.array([2.0**-53, 2.0**-30, 0.25, 0.5, 0.75, 1 - 2.0**-30, 1 - 2.0**-53])
    ids = LAWS[law](rows)(edges)
    assert ids.min() >= 0 and ids.max() < rows
    assert np.all(np.diff(ids) >= 0)
    if law == "uniform":
        assert ids[0] == 0 and ids[-1] == rows - 1


@pytest.mark.parametrize("rows", [10, 1_000, 1_000_000])
def test_a_gaussian_spreads_with_its_table(rows: int) -> None:
    """The published generator draws the same ids whatever the table's size."""
    ids = RandomRows(RandomSettings(tables=[rows], dense=0, law="gaussian")).block("train", 0)["C1"]
    assert abs(ids.mean() + 0.5 - rows / 2) < 0.01 * rows
    assert abs(ids.std() - 0.15 * rows) < 0.03 * rows
    assert ids.min() < 0.1 * rows and ids.max() >= 0.9 * rows - 1


def test_a_gaussian_off_the_table_is_cut_and_not_heaped_at_the_end() -> None:
    ids = Gaussian(1_000, 0.0, 0.5)(uniforms(stream(0, 99), 200_000))
    counts = np.bincount(ids, minlength=1_000)
    assert abs(counts[0] - counts[1]) < 5 * math.sqrt(2 * counts[1])
    assert abs(counts[-1] - counts[-2]) < 5 * math.sqrt(2 * counts[-2])


def test_own_functions_are_the_real_ones() -> None:
    x = np.concatenate([np.geomspace(1e-16, 1e16, 4_001), np.linspace(0.5, 2, 4_001)])
    assert np.abs(draws.log(x) - [math.log(v) for v in x]).max() < 1e-14
    y = np.linspace(-600, 600, 4_001)
    assert np.abs(draws.exp(y) / [math.exp(v) for v in y] - 1).max() < 1e-15
    p = np.concatenate([np.geomspace(2.0**-53, 0.5, 4_001), 1 - np.geomspace(2.0**-53, 0.5, 4_001)])
    true = np.array([statistics.NormalDist().inv_cdf(v) for v in p])
    assert (np.abs(draws.normal_quantile(p) - true) / np.maximum(np.abs(true), 1)).max() < 2e-7


@pytest.mark.parametrize(
    ("law", "digest"),
    [("uniform", "c518cfd69c2653e8"), ("gaussian", "cac205403918293b"), ("zipf", "10f89ae67b550883")],
)
def test_rows_are_the_same_on_every_machine(law: Any, digest: str) -> None:
    """Digests of the first release: another digest means other data under the same settings."""
    settings = RandomSettings(
        tables=[3, 40_000_000], dense=2, indices=[1, 30], min_indices=[1, 0], law=law, weights=True, seed=2**64 - 1
    )
    assert digest_of(RandomRows(settings).block("validation", 3, 2_000)) == digest


def digest_of(block: dict[str, Any]) -> str:
    parts = [part for values in block.values() for part in (values if isinstance(values, tuple) else (values,))]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetSchema]:
    folder = tmp_path_factory.mktemp("random") / "data"
    return folder, generate_random(SETTINGS, folder, progress=False)


def read(folder: Path, split: str, start: int = 0) -> dict[str, list[Any]]:
    return pq.read_table(folder / split).slice(start).to_pydict()


def as_lists(block: dict[str, Any]) -> dict[str, list[Any]]:
    def values(column: Any) -> list[Any]:
        if not isinstance(column, tuple):
            return column.tolist()
        items, offsets = column
        return [items[a:b].tolist() for a, b in itertools.pairwise(offsets)]

    return {name: values(column) for name, column in block.items()}


def test_the_folder_holds_the_blocks_and_the_schema_was_known_before(made: tuple[Path, DatasetSchema]) -> None:
    folder, schema = made
    assert DatasetSchema.load(folder) == schema
    verify(folder, schema)
    planned = random_schema(SETTINGS)
    assert schema.indices == planned.indices and planned.indices
    assert planned.encoding_fingerprint == schema.encoding_fingerprint and planned.columns == schema.columns
    assert {n: s.rows for n, s in schema.splits.items()} == {"train": BLOCK_ROWS + 700, "validation": 500}
    assert schema.features.tables == {"C1": 1, "C2": 7, "C3": 50_000, "C4": 2_000} and schema.features.dense == 3
    assert read(folder, "train", BLOCK_ROWS) == as_lists(RandomRows(SETTINGS).block("train", 1, 700))
    assert read(folder, "validation") == as_lists(RandomRows(SETTINGS).block("validation", 0, 500))


def test_fewer_rows_are_the_beginning_of_more() -> None:
    source = RandomRows(SETTINGS)
    more, fewer = as_lists(source.block("train", 2, 1_000)), as_lists(source.block("train", 2, 300))
    assert {name: values[:300] for name, values in more.items()} == fewer


def test_another_process_writes_the_same_bytes(made: tuple[Path, DatasetSchema], tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from datamodules.generate.random import RandomSettings, generate_random;"
        f"print(generate_random({SETTINGS!r}, Path(sys.argv[1])).data_fingerprint)"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "data")]
    run = subprocess.run(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert run.stdout.strip() == made[1].data_fingerprint


def test_blocks_splits_columns_and_seeds_draw_for_themselves() -> None:
    source = RandomRows(SETTINGS)
    other = RandomRows(dataclasses.replace(SETTINGS, seed=12))
    blocks = [source.block("train", 0, 500), source.block("train", 1, 500), source.block("validation", 0, 500)]
    blocks.append(other.block("train", 0, 500))
    floats = [block[name] for block in blocks for name in ("I1", "I2", "I3")]
    for i, first in enumerate(floats):
        for second in floats[i + 1 :]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.25
    # Also seeds that no float64 tells apart.
    large = [RandomRows(dataclasses.replace(SETTINGS, seed=2**63 + i)).block("train", 0, 500)["I1"] for i in (1, 2)]
    assert not np.array_equal(*large)
    # A column is the same whatever stands beside it.
    wider = RandomRows(dataclasses.replace(SETTINGS, dense=9)).block("train", 0, 500)
    assert as_lists({"C3": wider["C3"]}) == as_lists({"C3": blocks[0]["C3"]})


def test_bags_dense_features_weights_and_labels_are_as_asked(made: tuple[Path, DatasetSchema]) -> None:
    columns = read(made[0], "train")
    for name, least, most in (("C1", 1, 1), ("C2", 0, 5), ("C3", 3, 20), ("C4", 1, 1)):
        lengths = np.array([len(bag) for bag in columns[name]])
        found = np.bincount(lengths - least, minlength=most - least + 1)
        assert len(found) == most - least + 1
        assert stats.chisquare(found).pvalue > 1e-3 if len(found) > 1 else True
        assert [len(bag) for bag in columns[f"{name}_weights"]] == lengths.tolist()
        weights = np.concatenate(columns[f"{name}_weights"])
        assert weights.min() > 0 and weights.max() <= 1 and abs(weights.mean() - 0.5) < 0.01
    assert stats.kstest(columns["I2"], "norm").pvalue > 1e-3
    rate = 0.25
    assert abs(np.mean(columns["label"]) - rate) < 5 * math.sqrt(rate * (1 - rate) / len(columns["label"]))
    assert made[1].splits["train"].positives == sum(columns["label"])
    # Labels depend on nothing: no scores are better than one for all, that of the click rate.
    best = made[1].optimum["validation"]
    assert best.auc == 0.5 and best.log_loss == pytest.approx(stats.bernoulli.entropy(rate))


def test_single_ids_are_categorical_and_bags_multi_hot() -> None:
    schema = random_schema(RandomSettings(tables=[10, 10, 10], indices=[1, 3, 1], min_indices=[1, 3, 0], dense=0))
    assert [column.role for column in schema.columns] == ["label", "categorical", "multi_hot", "multi_hot"]


def test_presets_have_the_published_shapes() -> None:
    paper = RandomSettings.of("paper")
    assert (paper.tables, paper.dense) == ((1_000_000,) * 8, 512) and set(paper.bag_sizes) == {(1, 100)}
    kaggle = RandomSettings.of("kaggle")
    assert sum(kaggle.tables) == 33_762_577 and set(kaggle.bag_sizes) == {(1, 1)} and kaggle.dense == 13
    mlperf = RandomSettings.of("mlperf", law="zipf")
    assert sum(mlperf.tables) == 204_184_588 and sum(most for _, most in mlperf.bag_sizes) == 214
    assert mlperf.law == "zipf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": [5, 0]}, "table C2 has 0 rows; give each 1 to"),
        ({"tables": [5, -3]}, "table C2 has -3 rows"),
        ({"tables": [2**31]}, "table C1 has 2147483648 rows"),
        ({"tables": [], "dense": 0}, "no tables and no dense features"),
        ({"dense": -1}, "dense is -1; give 0 or more"),
        ({"train_rows": -5}, "train_rows is -5"),
        ({"train_rows": 0, "validation_rows": 0, "test_rows": 0}, "no split has rows"),
        ({"indices": 0}, "table C1 hold 0 to 0 ids"),
        ({"indices": 2, "min_indices": 3}, "hold 3 to 2 ids; expected 0 <= min_indices <= indices"),
        ({"indices": 2, "min_indices": -1}, "hold -1 to 2 ids"),
        ({"tables": [9, 4], "indices": 5}, "table C2 hold up to 5 ids, but it has only 4 rows"),
        ({"tables": [9, 4], "indices": [1]}, "indices has 1 numbers for 2 tables"),
        ({"law": "pareto"}, "law is 'pareto'; give one of uniform, gaussian, zipf"),
        ({"law": "zipf", "exponent": 0.0}, "exponent is 0.0"),
        ({"law": "zipf", "exponent": math.nan}, "exponent is nan"),
        ({"law": "gaussian", "deviation": 0.0}, "deviation is 0.0"),
        ({"law": "gaussian", "mean": 40.0}, r"mean is 40.0; give a share of the table's rows, 0 to 1"),
        ({"law": "zipf", "mean": 0.5}, "mean is an option of law gaussian, but law is zipf"),
        ({"click_rate": 1.0}, "click_rate is 1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"preset": "huge"}, "preset 'huge' is not one of paper, kaggle, mlperf"),
    ],
)
def test_settings_without_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RandomSettings.of(**changes)


def test_the_cache_is_keyed_by_every_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", str(tmp_path))
    changes: dict[str, Any] = {
        "tables": (1, 7, 50_000, 2_001), "dense": 4, "indices": (1, 5, 21, 1), "min_indices": (1, 0, 2, 1),
        "law": "uniform", "exponent": 2.0, "mean": 0.4, "deviation": 0.3, "weights": False, "click_rate": 0.5,
        "train_rows": 8, "validation_rows": 8, "test_rows": 8, "seed": 8,
    }  # fmt: skip
    assert set(changes) == {field.name for field in dataclasses.fields(RandomSettings)}
    folders = {random_folder(dataclasses.replace(SETTINGS, **{name: value})) for name, value in changes.items()}
    assert len(folders | {random_folder(SETTINGS)}) == len(changes) + 1
    lists = dataclasses.replace(SETTINGS, tables=list(SETTINGS.tables))
    assert random_folder(lists) == random_folder(SETTINGS)


def test_a_file_that_cannot_grow_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    settings = RandomSettings(tables=(1000,), train_rows=50_000, validation_rows=0, test_rows=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*File too large; free disk space"):
            generate_random(settings, tmp_path / "data", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_command_makes_what_its_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = HelpParser()
    command.add_arguments(parser)
    options = "--rows 300 --validation-rows 40 --test-rows 0 --tables 9,5 --dense 2 --indices 3 --min-indices 0"
    arguments = ["random", "--output", str(tmp_path / "data"), *options.split(), "--law", "zipf", "--seed", "4"]
    assert command.run(parser.parse_args(arguments)) == 0
    wanted = RandomSettings(
        tables=(9, 5), dense=2, indices=3, min_indices=0, law="zipf", seed=4, train_rows=300, validation_rows=40,
        test_rows=0,
    )  # fmt: skip
    assert DatasetSchema.load(tmp_path / "data").encoding_fingerprint == random_schema(wanted).encoding_fingerprint
    assert (
        "300 train rows, 40 validation rows; 2 dense features, 2 tables with 14 rows in all" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        command.run(parser.parse_args([*arguments, "--dense", "3"]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    words = ["generate", "random", "--rows", "50000000", "--tables", "1000", "--output", str(tmp_path / "data")]
    # A shell's background jobs ignore SIGINT, and so would their children.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [sys.executable, "-m", "lightning_dlrm", *words], stderr=subprocess.PIPE, text=True, preexec_fn=heed
    ) as run:
        assert run.stderr is not None
        estimate = run.stderr.readline()  # comes with the first row group
        assert any(tmp_path.iterdir())
        run.send_signal(number)
        errors = run.stderr.read()
    assert run.returncode == 128 + number and "Traceback" not in errors
    assert "50,131,072 rows: about" in estimate and "are free" in estimate
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9})())
    written: list[int] = []
    monkeypatch.setattr(folder.tqdm, "update", lambda _, rows: written.append(rows))
    settings = RandomSettings(tables=(1000,), train_rows=40_000_000)
    with pytest.raises(
        UserError, match=r"rows: about [2-4]\.\d+ GiB of disk are needed for .*data, 95[45] MiB are free"
    ):
        generate_random(settings, tmp_path / "data")
    assert not written and list(tmp_path.iterdir()) == []
    text = TsvSettings(rows=5_000_000)
    with pytest.raises(UserError, match=r"5,000,000 rows: about 1\.1\d GiB of disk are needed for .*x\.txt"):
        generate_tsv(text, [tmp_path / "x.txt"], progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [partial(Clicks, "data"), partial(Criteo, "data"), RandomData])
def test_an_unknown_option_is_refused_and_a_datamodule_has_a_text(make: Callable[..., FolderData]) -> None:
    with pytest.raises(UserError, match=r"has no option bach_size; did you mean batch_size\? Expected .*group"):
        make(bach_size=1)
    data = make(batch_size=4)
    assert re.fullmatch(r"\w+\('.+', batch_size=4\)", str(data)) and repr(data) == str(data)
    for name in set(inspect.signature(FolderData).parameters) - {"folder"}:
        assert f"`{name}`" in str(Clicks.__doc__)
