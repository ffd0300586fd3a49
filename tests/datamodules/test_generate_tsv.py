"""Contract: ``generate tsv`` writes lines that ``preprocess`` takes, with the documented values, shares of missing
ones, growing numbers of distinct ids and labels of the planted model; a row depends on (dataset, seed, position)
alone."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datamodules.generate import command, tsv
from datamodules.generate.demo import BLOCK_ROWS, Feature
from datamodules.generate.tsv import TSV_DATASETS, TsvDataset, TsvSettings, generate_tsv, planted_model
from datamodules.preprocess.pipeline import preprocess
from datamodules.preprocess.progress import Progress
from lightning_dlrm.cli.plain_parser import HelpParser
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE

ROWS = BLOCK_ROWS + 3_000
SIGNED = {"kaggle": "I2", "terabyte": "I8"}


def text(path: Path, **settings: object) -> bytes:
    generate_tsv(TsvSettings(**settings), [path], progress=False)  # type: ignore[arg-type]
    return path.read_bytes()


@pytest.mark.parametrize("dataset", TSV_DATASETS)
def test_lines_spell_out_the_draws(dataset: TsvDataset, tmp_path: Path) -> None:
    """Every 100th line, and those around the end of a block, against the values drawn, formatted one by one."""
    lines = text(tmp_path / "raw", rows=ROWS, dataset=dataset).decode().splitlines(keepends=True)
    assert len(lines) == ROWS
    model = planted_model(TsvSettings(rows=ROWS, dataset=dataset))
    blocks = [model.draw("train", 0), model.draw("train", 1, ROWS - BLOCK_ROWS)]
    below_zero = set()
    for row in {*range(0, ROWS, 100), *range(BLOCK_ROWS - 5, BLOCK_ROWS + 5), ROWS - 1}:
        draw, i = blocks[row // BLOCK_ROWS], row % BLOCK_ROWS
        fields = [str(draw.label[i])]
        for name in (*CRITEO_DENSE, *CRITEO_CATEGORICAL):
            value = int(draw.values[name][i])
            if name == SIGNED[dataset]:
                value = {100: -2, 1_000: -3}.get(value, value - 1)
                below_zero.add(min(value, 0))
            if name in CRITEO_CATEGORICAL:
                hashed = tsv._hashes(draw.values[name][i : i + 1], CRITEO_CATEGORICAL.index(name))
                fields.append("" if draw.missing[name][i] else f"{hashed[0]:08x}")
            else:
                fields.append("" if draw.missing[name][i] else str(value))
        assert lines[row] == "\t".join(fields) + "\n"
    assert {-1, 0} <= below_zero


def test_different_ids_have_different_hashes() -> None:
    ids = np.arange(1_000_000, dtype=np.int32)
    assert len(np.unique(tsv._hashes(ids, 2))) == len(ids)
    assert not np.isin(tsv._hashes(ids[:1000], 0), tsv._hashes(ids[:1000], 1)).any()


def expected_distinct(feature: Feature, rows: int) -> float:
    """Sum over all ids of the chance to be seen at all, from the documented law; in steps of one id up to 10,000."""
    top = feature.size - feature.first
    edges = np.arange(min(top, 10_000) + 1.0)
    if top > 10_000:
        edges = np.concatenate([edges, np.geomspace(10_000, top, 5_000)[1:]])
    root = (1 + edges / feature.scale) ** (-1 / 2**feature.squarings)
    chances = -np.diff(root) / (1 - root[-1]) * (1 - feature.missing)
    ids = np.diff(edges)
    return float(np.sum(ids * -np.expm1(-rows * chances / ids)))


@pytest.mark.parametrize("dataset", TSV_DATASETS)
def test_distinct_ids_grow_to_the_real_number(dataset: TsvDataset) -> None:
    model = planted_model(TsvSettings(rows=ROWS, dataset=dataset))
    drawn = [model.draw("train", number) for number in range(3)]
    for name in CRITEO_CATEGORICAL:
        ids = np.concatenate([draw.values[name][~draw.missing[name]] for draw in drawn])
        law = expected_distinct(model.features[name], 3 * BLOCK_ROWS)
        assert len(np.unique(ids)) == pytest.approx(law, rel=0.02, abs=3), name
    all_rows = {"kaggle": 45_840_617, "terabyte": 4_373_472_329}[dataset]
    real = {"kaggle": 33_762_577, "terabyte": 882_774_559}[dataset]
    assert sum(expected_distinct(model.features[name], all_rows) for name in CRITEO_CATEGORICAL) == pytest.approx(
        real, rel=0.002
    )


@pytest.mark.parametrize(("dataset", "clicks"), [("kaggle", 0.256), ("terabyte", 0.0265)])
def test_shares_of_missing_values_and_clicks(dataset: TsvDataset, clicks: float) -> None:
    model = planted_model(TsvSettings(rows=ROWS, dataset=dataset))
    draw = model.draw("train", 0)
    assert draw.label.mean() == pytest.approx(clicks, rel=0.1)
    for name, feature in model.features.items():
        assert draw.missing[name].mean() == pytest.approx(feature.missing, abs=0.01), name
    assert draw.label.mean() == pytest.approx(draw.probability.mean(), rel=0.05)


def test_files_and_lengths_do_not_change_the_rows(tmp_path: Path) -> None:
    whole = text(tmp_path / "whole", rows=ROWS)
    assert whole.startswith(text(tmp_path / "few", rows=1_234))
    assert not whole.startswith(text(tmp_path / "other", rows=10, seed=1))
    paths = [tmp_path / name for name in ("a.gz", "b", "c.zst")]
    sizes = generate_tsv(TsvSettings(rows=ROWS), paths, progress=False)
    assert sizes == [path.stat().st_size for path in paths]
    with pa.input_stream(paths[2], compression="zstd") as stream:
        parts = [gzip.decompress(paths[0].read_bytes()), paths[1].read_bytes(), stream.read()]
    assert b"".join(parts) == whole
    assert [part.count(b"\n") for part in parts] == [ROWS // 3 + (i < ROWS % 3) for i in range(3)]


def test_other_processes_write_the_same_bytes(tmp_path: Path) -> None:
    options = ["generate", "tsv", "--rows", "5000", "--dataset", "terabyte", "--seed", "9"]
    command = [sys.executable, "-m", "lightning_dlrm", *options, "--output", str(tmp_path / "a.gz")]
    subprocess.run(command, check=True, timeout=60)
    for name in ("b.gz", "c"):
        generate_tsv(TsvSettings(rows=5000, dataset="terabyte", seed=9), [tmp_path / name], progress=False)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == (tmp_path / "c").read_bytes()


def test_preprocess_takes_the_files(tmp_path: Path) -> None:
    paths = [tmp_path / "day_0.gz", tmp_path / "day_1"]
    generate_tsv(TsvSettings(rows=2_000, dataset="terabyte"), paths, progress=False)
    schema = preprocess("terabyte", "dlrm", paths, tmp_path / "data", progress=Progress(show=False))
    assert sum(split.rows for split in schema.splits.values()) == 2_000
    assert schema.report["missing"]["C14"] == pytest.approx(2_000 * 0.467, rel=0.1)
    # Noted beside the dataset, not in it; a file of other origin in the place of a generated one is not generated.
    assert json.loads((tmp_path / "data/report.json").read_text())["generated"] is True
    one, two = (path.with_name(f".{path.name}.generated") for path in paths)
    one.unlink()
    two.write_text("1")
    again = preprocess("terabyte", "dlrm", paths, tmp_path / "again", progress=Progress(show=False))
    assert "generated" not in json.loads((tmp_path / "again/report.json").read_text())
    assert again.data_fingerprint == schema.data_fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "0"], "--rows is 0; give at least 1"),
        (["--rows", "10", "--seed", "-1"], "--seed is -1"),
        (["--rows", "1", "--output", "a", "b"], "1 row for 2 files"),
        (["--rows", "10", "--output", "a", "./a"], "given twice"),
        (["--rows", "10", "--output", "there"], "there exists"),
        (["--rows", "10", "--output", "a.bz2"], ".bz2 is not written"),
        (["--rows", "10", "--output", "there/a"], "cannot write there/a"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("mine")
    parser = HelpParser()
    command.add_arguments(parser)
    with pytest.raises(UserError, match=message):
        command.run(parser.parse_args(["tsv", "--output", "new", *options]))
    assert [path.name for path in Path().iterdir()] == ["there"] and Path("there").read_text() == "mine"
