"""Contract: what ``preprocess --infer`` writes of a log, and each shipped schema, goes through ``preprocess`` and
``fit`` without an edit."""

import json
import shlex
from pathlib import Path

import pytest

from datamodules.generate.log import FORMS, LogSettings, generate_log
from datamodules.log_schema import read_log_schema
from datamodules.preprocess.inference import fit_command
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
SCHEMAS = [name for name in shipped_names() if name.startswith("datasets/")]
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
@pytest.mark.parametrize("name", SMALL_LOGS)
def test_an_inferred_schema_trains_without_an_edit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = str(tmp_path / "schema.yaml")
    label, *more = SMALL_LOGS[name]
    assert main(["preprocess", "--infer", schema, "--label", label, *more, "--input", str(LOGS / name)]) == 0
    made = preprocessed(tmp_path, schema, [str(LOGS / name)])
    assert sum(split.rows for split in made.splits.values()) == ROWS and len(made.splits) == 3
    # Of 300 rows, a quarter of them clicks.
    assert fit(tmp_path, monkeypatch)["validation/log_loss"] < 0.69


def test_a_label_is_judged_alike_by_the_sample_and_by_the_rows(tmp_path: Path) -> None:
    """Numbers with decimal commas, nulls of several kinds, labels as numbers with a point."""
    logs = {
        "betrag >= 5": "betrag;x;z\n" + "".join(f"{row % 10},5;a{row % 4};{row % 3 or 'NA'}\n" for row in range(200)),
        "y": "y,x\n" + "".join(f"{row % 2}.0,a{row % 4 + row % 3}\n" for row in range(200)),
        "y != no": "y,x\n" + "".join(f'"{("yes", "no")[row % 2]}",a{row % 4 + row % 3}\n' for row in range(200)),
    }
    for label, text in logs.items():
        folder = tmp_path / label[:3].strip() / str(len(text))
        folder.mkdir(parents=True)
        (folder / "log.csv").write_text(text)
        paths, schema = [str(folder / "log.csv")], str(folder / "schema.yaml")
        assert main(["preprocess", "--infer", schema, "--label", label, "--input", *paths]) == 0
        made = preprocessed(folder, schema, paths)
        assert sum(split.positives or 0 for split in made.splits.values()) == 100, label


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "avazu_x1" in name else pytest.mark.slow) for name in SCHEMAS], ids=str
)
def test_a_shipped_schema_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Path(name).stem
    made = generate_log(LogSettings(form=form, rows=20_000), tmp_path)
    schema = preprocessed(tmp_path, name, [str(path) for path in made.files])
    shares = [split.rows / 20_000 for split in schema.splits.values()]
    expected = list(FORMS[form].files.values()) if read_log_schema(name).split.by == "files" else [0.8, 0.1, 0.1]
    assert shares == pytest.approx(expected, abs=0.02)
    assert 0.55 < fit(tmp_path, monkeypatch)["validation/auc"] < made.best.auc + 0.02
