"""Contract: what ``preprocess --infer`` writes of a log, and each shipped schema, goes through ``preprocess`` and
``fit`` without an edit."""

import gzip
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from datamodules.generate.log import FORMS, LogSettings, generate_log
from datamodules.log_schema import read_log_schema
from datamodules.preprocess.report import fit_command
from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.contracts.shipped import shipped_names

LOGS = Path(__file__).parents[3] / "shared" / "small_logs"
"""Logs in the forms that users bring, of the checkout's neighbour; they are not in the repository."""

SMALL_LOGS = {
    "avazu.csv": ["click"],
    "criteo_x1.csv": ["label"],
    "events.jsonl": ["click"],
    "events.parquet": ["clicked"],
    "ratings.dat": ["rating >= 4", "--columns", "user,item,rating,time"],
    "werbung.csv": ["geklickt == ja"],
}
SCHEMAS = [name for name in shipped_names() if name.startswith("datasets/") and Path(name).stem in FORMS]
ROWS = 3_000


def preprocessed(folder: Path, schema: str, paths: list[str]) -> DatasetSchema:
    command = ["preprocess", "--schema", schema, "--input", *paths, "--output", str(folder / "data"), "--workers", "1"]
    assert main(command) == 0
    return DatasetSchema.load(folder / "data")


def fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    schema = DatasetSchema.load(folder / "data")
    command = shlex.split(fit_command(str(folder / "data"), schema.features.dense > 0))[3:]
    assert main([*command, "--run_dir", str(folder / "run"), "--trainer.enable_progress_bar", "false"]) == 0
    return json.loads((folder / "run/summary.json").read_text())["final"]


@pytest.mark.skipif(not LOGS.is_dir(), reason="the logs are beside the checkout")
@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SMALL_LOGS)
def test_an_inferred_schema_trains_without_an_edit(
    name: str, trains: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = str(tmp_path / "schema.yaml")
    label, *more = SMALL_LOGS[name]
    assert main(["preprocess", "--infer", schema, "--label", label, *more, "--input", str(LOGS / name)]) == 0
    made = preprocessed(tmp_path, schema, [str(LOGS / name)])
    assert sum(split.rows for split in made.splits.values()) == ROWS and len(made.splits) == 3
    # A log of lists, times and missing numbers, and one without numbers, are trained on in the default run.
    if trains or name in ("events.parquet", "ratings.dat"):
        # Of 300 rows, a quarter of them clicks.
        assert fit(tmp_path, monkeypatch)["validation/log_loss"] < 0.69


def zstd(text: str) -> bytes:
    return bytes(pa.compress(text.encode(), "zstd", asbytes=True))


@pytest.mark.parametrize(
    ("label", "header", "line", "encode"),
    [
        ("preis >= 5", "preis;stadt;z\r\n", '{ten},5;Köln{few};{nulls}\r\n', lambda text: text.encode("cp1252")),
        ("preis >= 5", "preis;stadt;z\r\n", '{ten},5;Köln{few};{nulls}\r\n', lambda text: text.encode("utf-16")),
        ("y", "y\tx\n", "{half}.0\t\ufeff{few}\n", lambda text: gzip.compress(text.encode("utf-8-sig"))),
        ("y", ",y,x\n", '{row},{half},"a ""{few}"",\nb"\n', zstd),
        ("y", "y\tx\n", '{half}\t"{few}\n', str.encode),
        ("y != no", "y|x\n", "{yes}|{few}\n\n", str.encode),
        ("y", "", '{{"y": {half}, "x": [{few}, 7], "no": {{"k": 1}}, "at": "2024-01-{few:02d}"}}\n', str.encode),
    ],
)  # fmt: skip
def test_rows_are_read_as_the_sample_was(
    label: str, header: str, line: str, encode: Callable[[str], bytes], tmp_path: Path
) -> None:
    """Encodings, compressions, quotes, line ends, decimal commas, nulls, labels: of 200 rows 100 are positive."""
    text = header + "".join(
        line.format(
            row=row,
            ten=row % 10,
            half=row % 2,
            few=1 + row * row % 7,
            nulls=row % 3 or "NA",
            yes=("yes", "no")[row % 2],
        )
        for row in range(200)
    )
    log, schema = tmp_path / "log", str(tmp_path / "schema.yaml")
    log.write_bytes(encode(text))
    assert main(["preprocess", "--infer", schema, "--label", label, "--input", str(log)]) == 0
    made = preprocessed(tmp_path, schema, [str(log)])
    assert sum(split.rows for split in made.splits.values()) == 200
    assert sum(split.positives or 0 for split in made.splits.values()) == 100


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "kuairand" in name else pytest.mark.slow) for name in SCHEMAS], ids=str
)
def test_a_shipped_schema_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Path(name).stem
    made = generate_log(LogSettings(form=form, rows=20_000), tmp_path)
    schema = preprocessed(tmp_path, name, [str(path) for path in made.files])
    shares = [split.rows / 20_000 for split in schema.splits.values()]
    expected = list(FORMS[form].files.values()) if read_log_schema(name).split.by == "files" else [0.8, 0.1, 0.1]
    assert shares == pytest.approx(expected, abs=0.02)
    assert 0.55 < fit(tmp_path, monkeypatch)["validation/auc"] < made.best.auc + 0.02
