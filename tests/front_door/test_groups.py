"""Contract: evaluations of rows that are grouped by a kept column report the mean AUC over the groups, from the command
line to the report of a comparison."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.writer import DatasetWriter
from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.schema import Column
from tests.front_door.conftest import TINY
from tests.objectives.test_metrics import plain_group_auc

COLUMNS = (
    Column(name="label", role="label"),
    Column(name="I1", role="dense"),
    Column(name="user", role="keep", transform="text"),
    Column(name="session", role="keep", transform="int64"),
    Column(name="C1", role="categorical", cardinality=30),
)


@pytest.fixture(autouse=True)
def dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A dataset folder ``data`` with users, some of whom are unknown or have one label."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Path("tiny.yaml").write_text(TINY)
    random = np.random.default_rng(0)
    with DatasetWriter(Path("data"), COLUMNS) as writer:
        for split, rows in (("train", 1024), ("validation", 400), ("test", 400)):
            users = random.integers(0, 100, rows)
            items = random.integers(0, 30, rows).astype(np.int32)
            labels = random.random(rows) < np.where(users < 90, 0.1 + items / 40, 1.0)
            writer.write(
                split,
                {
                    "label": labels.astype(np.int8),
                    "I1": random.normal(size=rows).astype(np.float32),
                    "user": pa.array([None if user < 5 else f"ü{user}" for user in users]),
                    "session": pa.array(np.zeros(rows, np.int64)),
                    "C1": items,
                },
            )
        writer.finish(dataset="own", protocol="own")


def fit(run: str, *options: str) -> list[str]:
    common = ["--config", "dlrm.yaml", "--config", "tiny.yaml", "--data.path", "data", "--run_dir", run]
    return ["fit", *common, "--model.table_optimizer.learning_rate=5", "--model.schedule=Constant", *options]


def test_from_a_fit_to_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(fit("a", "--data.group", "user")) == 0
    assert re.search(r"^AUC by group +0\.\d{6}", capsys.readouterr().out, re.MULTILINE)
    final = json.loads(Path("a/summary.json").read_text())["final"]
    checkpoint = ["--config", "a/config.yaml", "--ckpt_path", "a/checkpoints/last"]
    assert main(["predict", *checkpoint, "--data.predict_split", "validation"]) == 0
    table = pq.read_table("a/predictions.parquet")
    numbers = table["user"].combine_chunks().dictionary_encode().indices
    in_group = table.filter(pa.compute.is_valid(numbers))
    expected = plain_group_auc(
        in_group["probability"].to_numpy(), in_group["label"].to_numpy(), numbers.drop_null().to_numpy()
    )
    assert {name: final[f"validation/{name}"] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert expected["groups"] > 50 and expected["groups_left_out"] >= 5

    capsys.readouterr()
    assert main(["test", *checkpoint]) == 0
    by_user = json.loads(Path("a/test.json").read_text())
    said = capsys.readouterr().out
    assert re.search(
        rf"\ngroups +{by_user['test/groups']}\ngroups left out +{by_user['test/groups_left_out']}\n\nkept in", said
    )
    (score, groups) = (re.search(rf"(?m)^{name} +\S+", said) for name in ("AUC", "groups"))
    assert score is not None and groups is not None and len(score[0]) == len(groups[0])
    assert main(["test", *checkpoint, "--data.group", "session"]) == 0
    by_session = json.loads(Path("a/test.json").read_text())
    assert by_session["test/group_auc"] == by_session["test/auc"] and by_session["test/groups"] == 1
    assert main(["test", *checkpoint, "--data.group", "null"]) == 0
    assert "test/group_auc" not in json.loads(Path("a/test.json").read_text())


def test_a_fit_can_stop_by_the_auc_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    stop = "--trainer.callbacks={class_path: EarlyStopping, init_args: {monitor: validation/group_auc, mode: max}}"
    more = ["--trainer.callbacks.stopping_threshold=0.01", "--trainer.max_epochs=9"]
    assert main(fit("a", "--data.group", "user", stop, *more)) == 0
    assert "validation/group_auc has reached the threshold 0.01" in capsys.readouterr().out


def test_a_column_that_is_not_kept_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", "dlrm.yaml", "--config", "tiny.yaml", "--data.path", "data", "--data.group", "C1"]
    for command in (fit("a", "--data.group", "C1"), ["params", *options]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            "error: data has no kept column 'C1' to group by; it has user, session: name one of them"
        )
    assert not Path("a").exists()
