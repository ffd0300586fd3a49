"""Contract: a dataset folder, run folders and checkpoints that an earlier version wrote open in every later one.

``frozen/first_round.tar.gz`` holds them as the first round left them, made by its own commands: demo data of 4,096
rows and tables of at most 60 rows, and two finished runs of 16 steps, each with the checkpoint of step 8 (``midway``):
a DLRM with linear terms (row-wise Adagrad, Adagrad, SGD) and a DCN (Adam, L2, averaged weights, cosine schedule).
``frozen/log_of_version_4.tar.gz`` holds a log of 300 rows, its schema, and the dataset that ``preprocess`` made of it
when its ``VERSION`` was 4.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from datamodules.log_schema import read_log_schema
from datamodules.preprocess.pipeline import preprocess
from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.errors import UserError

ARCHIVE = Path(__file__).parents[1] / "frozen/first_round.tar.gz"
RUNS = ["dlrm", "dcn"]
TOLERANCE = 1e-4
"""Other machines and releases of torch sum in another order."""


@pytest.fixture(autouse=True)
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


def metrics_of(run: str) -> dict[int, dict[str, Any]]:
    """Everything that was logged, by step."""
    found: dict[int, dict[str, Any]] = {}
    for line in Path(run, "metrics.jsonl").read_text().splitlines():
        logged = json.loads(line)
        found.setdefault(logged["step"], {}).update(logged)
    return found


def only(metrics: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(prefixes)}


def test_dataset_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "dataset", "--verify"]) == 0


def test_dataset_of_a_log(tmp_path: Path) -> None:
    """It opens, trains and has a vocabulary for new rows; it is not made again in its place."""
    with tarfile.open(ARCHIVE.with_name("log_of_version_4.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    assert main(["inspect", "data", "--verify"]) == 0
    configs = ["--config", "dlrm.yaml", "--config", "own_data.yaml"]
    assert main(["fit", *configs, "--data.path", "data", "--run_dir", "run", "--trainer.max_steps", "1"]) == 0
    assert main(["preprocess", "--vocabulary", "data", "--input", "log.csv", "--output", "new"]) == 0
    with pytest.raises(
        UserError, match=r"data was made by another release .* as it is; .* name a new folder, or remove"
    ):
        preprocess(None, None, [Path("log.csv")], "data", schema=read_log_schema("schema.yaml"))


@pytest.mark.parametrize("run", RUNS)
def test_configuration_and_last_checkpoint_validate_as_they_did(run: str) -> None:
    folder = f"runs/{run}"
    assert main(["validate", "--config", f"{folder}/config.yaml", "--ckpt_path", f"{folder}/checkpoints/last"]) == 0
    found = json.loads(Path(folder, "validate.json").read_text())
    final = json.loads(Path(folder, "summary.json").read_text())["final"]
    assert found == pytest.approx({name: final[name] for name in found}, rel=TOLERANCE)


@pytest.mark.parametrize("run", RUNS)
def test_checkpoint_amid_a_fit_goes_on_as_it_did(run: str) -> None:
    folder = f"runs/{run}"
    checkpoint = f"{folder}/checkpoints/midway"
    assert main(["fit", "--config", f"{folder}/config.yaml", "--ckpt_path", checkpoint, "--run_dir", "again"]) == 0
    found, expected = metrics_of("again"), metrics_of(folder)
    assert min(found) == 9 and max(found) == 16
    shown = ("train/", "validation/", "learning_rate/")
    for step in range(9, 17):
        assert only(found[step], shown) == pytest.approx(only(expected[step], shown), rel=TOLERANCE)
    new, old = (yaml.safe_load(Path(name, "config.yaml").read_text()) for name in ("again", folder))
    # Options that were added since have no value.
    given = {name: value for name, value in new["data"]["init_args"].items() if value is not None}
    assert new["data"] | {"init_args": given} == old["data"]


def test_finished_run_stays_as_it_is() -> None:
    before = Path("runs/dlrm/summary.json").read_text()
    arguments = ["--config", "runs/dlrm/config.yaml", "--run_dir", "runs/dlrm", "--resume", "auto"]
    assert main(["fit", *arguments]) == 0
    assert Path("runs/dlrm/summary.json").read_text() == before
