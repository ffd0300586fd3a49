"""Contract: demo data have Kaggle's shape and the documented skew and missing values; their rows are a function of
(seed, split, block) and of nothing else; labels are drawn from the planted click model, whose own scores are the
stored optimum, and logistic regression cannot come near it."""

import dataclasses
import math
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from datamodules.folder import verify
from datamodules.generate import command, demo
from datamodules.generate.demo import BLOCK_ROWS, DemoSettings, PlantedModel, demo_folder, demo_schema, generate_demo
from datamodules.generate.folder import rows_of_splits
from lightning_dlrm.cli.plain_parser import HelpParser
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE, DatasetSchema

SETTINGS = DemoSettings(train_rows=BLOCK_ROWS + 5_000, validation_rows=20_000, test_rows=3_000, seed=7)
KAGGLE_ROWS = 33_762_577


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetSchema]:
    folder = tmp_path_factory.mktemp("demo") / "data"
    return folder, generate_demo(SETTINGS, folder, progress=False)


def read(folder: Path, split: str) -> dict[str, np.ndarray]:
    table = pq.read_table(folder / split)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def plain_probability(model: PlantedModel, row: dict[str, float]) -> float:
    """The module docstring's formula for one stored row."""
    log_odds, tastes = demo.BIAS, {demo.VISITOR: [0.0] * demo.FACTORS, demo.AD: [0.0] * demo.FACTORS}
    for name, feature in model.features.items():
        value = round(math.expm1(row[name])) if name in CRITEO_DENSE else int(row[name])
        effects = model.effects[name][min(value, len(model.effects[name]) - 1)].astype(float)
        log_odds += effects[0]
        tastes[feature.side] = [sum(pair) for pair in zip(tastes[feature.side], effects[1:], strict=True)]
    product = sum(u * v for u, v in zip(tastes[demo.VISITOR], tastes[demo.AD], strict=True))
    log_odds += demo.INTERACTION_DEVIATION / math.sqrt(demo.FACTORS) * product
    return 1 / (1 + math.exp(-log_odds))


def way(label: np.ndarray, score: np.ndarray, probability: np.ndarray) -> float:
    """Share of the way from AUC 0.5 to the optimum."""
    return (roc_auc_score(label, score) - 0.5) / (roc_auc_score(label, probability) - 0.5)


def test_schema_without_data_describes_the_folder(made: tuple[Path, DatasetSchema]) -> None:
    folder, schema = made
    planned = demo_schema(SETTINGS)
    assert planned.encoding_fingerprint == schema.encoding_fingerprint
    assert planned.columns == schema.columns
    assert {n: s.rows for n, s in planned.splits.items()} == {n: s.rows for n, s in schema.splits.items()}
    assert DatasetSchema.load(folder) == schema
    assert schema.dataset == "demo" and schema.features.dense == 13
    assert len(schema.features.tables) == 26 and sum(schema.features.table_rows) == KAGGLE_ROWS
    verify(folder, schema)


def test_encoding_is_bound_to_the_planted_model_but_not_to_the_rows() -> None:
    def fingerprint(**changes: int) -> str:
        return demo_schema(dataclasses.replace(SETTINGS, **changes)).encoding_fingerprint

    assert fingerprint(train_rows=500, validation_rows=600, test_rows=700) == fingerprint()
    assert fingerprint(seed=8) != fingerprint()
    assert fingerprint(max_table_rows=100) != fingerprint()


def test_two_generations_are_equal_to_the_last_byte(made: tuple[Path, DatasetSchema], tmp_path: Path) -> None:
    folder, _ = made
    generate_demo(SETTINGS, tmp_path / "again", progress=False)
    assert contents(tmp_path / "again") == contents(folder)


def test_a_block_made_alone_equals_its_place(made: tuple[Path, DatasetSchema]) -> None:
    folder, _ = made
    block = PlantedModel.plant(SETTINGS).block("train", 1, rows=5_000)
    stored = read(folder, "train")
    for name, values in block.columns.items():
        assert np.array_equal(stored[name][BLOCK_ROWS:], values), name
        assert stored[name].dtype == values.dtype, name


def test_fewer_rows_are_the_beginning_of_more(made: tuple[Path, DatasetSchema], tmp_path: Path) -> None:
    folder, _ = made
    few = dataclasses.replace(SETTINGS, train_rows=1_000, validation_rows=300, test_rows=200)
    generate_demo(few, tmp_path / "few", progress=False)
    for split, rows in rows_of_splits(few).items():
        more = read(folder, split)
        for name, values in read(tmp_path / "few", split).items():
            assert np.array_equal(values, more[name][:rows]), (split, name)


def test_blocks_splits_and_seeds_draw_different_rows() -> None:
    model = PlantedModel.plant(SETTINGS)
    other = PlantedModel.plant(dataclasses.replace(SETTINGS, seed=8))
    ids = [
        block.columns["C3"]
        for block in (model.block("train", 0, 1_000), model.block("train", 1, 1_000), other.block("train", 0, 1_000))
    ] + [model.block("validation", 0, 1_000).columns["C3"]]
    for i, first in enumerate(ids):
        for second in ids[i + 1 :]:
            assert np.mean(first == second) < 0.1


def test_ids_stay_within_their_tables(made: tuple[Path, DatasetSchema]) -> None:
    tiny = dataclasses.replace(SETTINGS, max_table_rows=2)
    capped = PlantedModel.plant(tiny).block("train", 0).columns
    assert demo_schema(tiny).features.table_rows == (2,) * 26
    stored = read(made[0], "train")
    for name, rows in made[1].features.tables.items():
        assert stored[name].min() >= 0 and stored[name].max() < rows
        assert set(np.unique(capped[name])) == {0, 1}
        if rows < 1_000:
            assert len(np.unique(stored[name])) == rows, name


@cache
def training_blocks() -> list[demo.DemoBlock]:
    model = PlantedModel.plant(SETTINGS)
    return [model.block("train", number) for number in range(4)]


@pytest.mark.parametrize("name", ["C3", "C5", "C9", "C20", "C22", "I5", "I10"])
def test_values_follow_the_documented_law(name: str) -> None:
    """Counts of the first values against the distribution function, written out."""
    drawn = np.concatenate([block.columns[name] for block in training_blocks()])
    dense = name in CRITEO_DENSE
    if dense:
        drawn = np.round(np.expm1(drawn.astype(float))).astype(int)
        _, missing, scale, largest, _ = demo.KAGGLE_DENSE[name]
        power, size, first = 2, largest + 1, 0
    else:
        _, missing, scale, _ = demo.KAGGLE_CATEGORICAL[name]
        power, size = 8, made_size(name)
        first = 1 if missing else 0

    def below(rank: int) -> float:
        return (1 - (1 + rank / scale) ** (-1 / power)) / (1 - (1 + (size - first) / scale) ** (-1 / power))

    shown = min(size, 40)
    law = [(1 - missing) * (below(rank + 1) - below(rank)) for rank in range(shown - first)]
    expected = np.array([missing, *law] if first else [missing + law[0], *law[1:]])
    observed = np.bincount(drawn, minlength=shown)[:shown] / len(drawn)
    error = np.sqrt(expected * (1 - expected) / len(drawn))
    assert np.all(np.abs(observed - expected) < 5 * error)


def made_size(name: str) -> int:
    return demo.KAGGLE_CARDINALITIES[CRITEO_CATEGORICAL.index(name)]


def test_large_tables_have_a_heavy_head_and_a_sparse_tail(made: tuple[Path, DatasetSchema]) -> None:
    counts = np.unique(read(made[0], "train")["C3"], return_counts=True)[1]
    assert np.sort(counts)[::-1][:1_000].sum() > 0.5 * counts.sum()
    assert np.mean(counts == 1) > 0.5


def test_missing_values_are_zeros_as_documented(made: tuple[Path, DatasetSchema]) -> None:
    folder, schema = made
    stored = read(folder, "train")
    rows = len(stored["label"])
    for column in schema.by_role("categorical"):
        missing = demo.KAGGLE_CATEGORICAL[column.name][1]
        assert dict(column.reserved) == ({"missing": 0} if missing else {})
        if missing:
            share = np.mean(stored[column.name] == 0)
            assert abs(share - missing) < 5 * math.sqrt(missing * (1 - missing) / rows), column.name
    for column in schema.by_role("dense"):
        values = stored[column.name]
        assert np.all(np.isfinite(values)) and values.min() == 0
        assert np.mean(values == 0) > demo.KAGGLE_DENSE[column.name][1] - 0.01
        assert np.allclose(np.expm1(values), np.round(np.expm1(values)), rtol=1e-5)


def test_labels_are_drawn_from_the_planted_probabilities(made: tuple[Path, DatasetSchema]) -> None:
    folder, schema = made
    model = PlantedModel.plant(SETTINGS)
    stored = read(folder, "validation")
    probability = model.block("validation", 0, SETTINGS.validation_rows).probability
    for row in range(0, 20_000, 100):
        assert probability[row] == pytest.approx(
            plain_probability(model, {name: values[row] for name, values in stored.items()}), abs=1e-5
        )
    edges = np.quantile(probability, np.linspace(0, 1, 11)[1:-1])
    bins = np.digitize(probability, edges)
    for i in range(10):
        p, y = probability[bins == i], stored["label"][bins == i]
        assert abs(y.mean() - p.mean()) < 4 * math.sqrt(np.sum(p * (1 - p))) / len(p)
    assert schema.splits["validation"].positives == stored["label"].sum()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_about_a_quarter_of_the_rows_are_clicks(seed: int) -> None:
    block = PlantedModel.plant(DemoSettings(seed=seed)).block("train", 0)
    assert 0.22 < block.columns["label"].mean() < 0.28


def test_optimum_is_the_score_of_the_true_probabilities(made: tuple[Path, DatasetSchema]) -> None:
    folder, schema = made
    model = PlantedModel.plant(SETTINGS)
    for split, rows in rows_of_splits(SETTINGS).items():
        blocks = [model.block(split, i).probability for i in range(-(-rows // BLOCK_ROWS))]
        probability, label = np.concatenate(blocks)[:rows], read(folder, split)["label"]
        assert schema.optimum[split].auc == pytest.approx(roc_auc_score(label, probability), abs=1e-12)
        assert schema.optimum[split].log_loss == pytest.approx(log_loss(label, probability), abs=1e-12)
    assert 0.78 < schema.optimum["train"].auc < 0.82


def test_best_scores_count_ties_as_one_half() -> None:
    label = np.array([0, 1, 0, 1, 1, 0], dtype=np.int8)
    probability = np.array([0.2, 0.2, 0.5, 0.5, 0.9, 0.2])
    assert demo.best_scores(label, probability).auc == pytest.approx(roc_auc_score(label, probability))


@pytest.mark.parametrize("seed", [0, 1])
def test_even_the_true_linear_effects_stay_far_from_the_optimum(seed: int) -> None:
    """What logistic regression tends to with any number of rows, at full table sizes."""
    model = PlantedModel.plant(DemoSettings(seed=seed))
    block = model.block("validation", 0)
    score = np.zeros(BLOCK_ROWS)
    for name, effects in model.effects.items():
        values = block.columns[name]
        if name in CRITEO_DENSE:
            values = np.round(np.expm1(values.astype(float))).astype(int)
        score += effects[np.minimum(values, len(effects) - 1), 0]
    assert 0.5 < way(block.columns["label"], score, block.probability) < 0.65


@pytest.mark.parametrize(
    ("rows", "strengths"), [(500, (0.01,)), pytest.param(5_000, (0.01, 0.03), marks=pytest.mark.slow)], ids=str
)
def test_logistic_regression_closes_at_most_70_percent_of_the_way(rows: int, strengths: tuple[float, ...]) -> None:
    """With ``C`` of 0.003 and 0.03 it reaches less than with 0.01."""
    model = PlantedModel.plant(DemoSettings(max_table_rows=rows))
    train, validation = [model.block("train", i) for i in range(2)], model.block("validation", 0)

    def one_hot(blocks: list[demo.DemoBlock]) -> scipy.sparse.csr_matrix:
        columns = {name: np.concatenate([block.columns[name] for block in blocks]) for name in blocks[0].columns}
        parts = [scipy.sparse.csr_matrix(np.stack([columns[name] for name in CRITEO_DENSE], axis=1) / 4)]
        for name in CRITEO_CATEGORICAL:
            cells = (np.ones(len(columns[name])), (np.arange(len(columns[name])), columns[name]))
            parts.append(scipy.sparse.csr_matrix(cells, (len(columns[name]), min(made_size(name), rows))))
        return scipy.sparse.hstack(parts, format="csr")

    features, labels = one_hot(train), np.concatenate([block.columns["label"] for block in train])
    seen = one_hot([validation])
    reached = []
    for strength in strengths:
        regression = LogisticRegression(C=strength, tol=1e-3, max_iter=60).fit(features, labels)
        score = regression.decision_function(seen)
        reached.append(way(validation.columns["label"], score, validation.probability))
    assert 0.4 < max(reached) <= 0.70, reached


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_rows": 99}, "train_rows is 99; give at least 100"),
        ({"validation_rows": 0}, "validation_rows is 0"),
        ({"test_rows": -1}, "test_rows is -1"),
        ({"seed": -1}, "seed is -1; give a number from 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"max_table_rows": 1}, "max_table_rows is 1; give at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DemoSettings(**changes)


def test_cache_folder_is_keyed_by_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", str(tmp_path))
    folders = {
        demo_folder(dataclasses.replace(SETTINGS, **{field.name: 1_234})) for field in dataclasses.fields(DemoSettings)
    } | {demo_folder(SETTINGS)}
    assert len(folders) == 1 + len(dataclasses.fields(DemoSettings))
    assert {folder.parent for folder in folders} == {tmp_path}
    assert demo_folder(dataclasses.replace(SETTINGS)) == demo_folder(SETTINGS)
    monkeypatch.setattr(demo, "GENERATOR_VERSION", 0)
    assert demo_folder(SETTINGS) not in folders
    monkeypatch.delenv("LIGHTNING_DLRM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo_folder(SETTINGS).parent == tmp_path / ".cache" / "lightning_dlrm"


def test_a_finished_dataset_is_kept(made: tuple[Path, DatasetSchema]) -> None:
    folder, schema = made
    before = (folder / "dataset.json").stat()
    assert generate_demo(SETTINGS, folder, progress=False) == schema
    assert (folder / "dataset.json").stat() == before


def test_another_dataset_is_not_overwritten(made: tuple[Path, DatasetSchema]) -> None:
    folder, _ = made
    before = contents(folder)
    for other in (dataclasses.replace(SETTINGS, seed=8), dataclasses.replace(SETTINGS, test_rows=100)):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            generate_demo(other, folder, progress=False)
    assert contents(folder) == before


def test_who_finishes_second_keeps_what_is_there(
    made: tuple[Path, DatasetSchema], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, schema = made
    target = tmp_path / "data"
    score = demo.best_scores

    def overtaken(*arguments: np.ndarray) -> demo.Optimum:
        if not target.exists():
            shutil.copytree(folder, target)
        return score(*arguments)

    monkeypatch.setattr(demo, "best_scores", overtaken)
    assert generate_demo(SETTINGS, target, progress=False) == schema
    assert contents(target) == contents(folder)
    assert list(tmp_path.iterdir()) == [target]


def test_processes_generating_into_one_folder_agree(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from datamodules.generate.demo import *;"
        "generate_demo(DemoSettings(train_rows=30_000, validation_rows=100, test_rows=100), Path(sys.argv[1]))"
    )
    target = tmp_path / "cache" / "data"
    processes = [subprocess.Popen([sys.executable, "-c", program, str(target)]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    verify(target, DatasetSchema.load(target))
    assert list(target.parent.iterdir()) == [target]


def test_command_generates_and_says_how_good_a_model_can_get(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = HelpParser()
    command.add_arguments(parser)
    options = {"--rows": 2_000, "--validation-rows": 500, "--test-rows": 400, "--seed": 3, "--max-table-rows": 50}
    arguments = [str(word) for option in options.items() for word in option]
    assert command.run(parser.parse_args(["demo", "--output", str(tmp_path / "data"), *arguments])) == 0
    schema = DatasetSchema.load(tmp_path / "data")
    wanted = DemoSettings(train_rows=2_000, validation_rows=500, test_rows=400, seed=3, max_table_rows=50)
    assert schema.encoding_fingerprint == demo_schema(wanted).encoding_fingerprint
    assert {name: split.rows for name, split in schema.splits.items()} == rows_of_splits(wanted)
    assert f"AUC {schema.optimum['validation'].auc:.4f}" in capsys.readouterr().out
