"""Contract: ``configs/bars`` are BARS's models on Criteo_x1: as many parameters as its logs say, and they train."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightning_dlrm
from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.contracts.shipped import shipped_configs, shipped_names
from lightning_dlrm.models.network import model_size

NAMES = [name for name in shipped_names() if name.startswith("bars/")]
VALUES = [
    *(1460, 558, 413422, 248541, 305, 21, 12190, 633, 3, 54710, 5348, 409747, 3180, 27, 12498, 365809, 10, 4932),
    *(2094, 4, 397979, 18, 15, 88606, 96, 64071),
]
"""Values of C1 to C26 in the training rows: the log of FinalMLP_criteo_x1 gives two more, for padding and unknown."""
PUBLISHED = {"dlrm": 21_664_241, "dcn": 21_343_491, "dcnv2": 22_018_021, "deepfm": 23_429_477, "finalmlp": 22_478_162}
"""Parameters in BARS's logs."""


def test_parameters_are_those_of_the_logs() -> None:
    assert {Path(name).stem for name in NAMES} == set(PUBLISHED)
    for name in NAMES:
        text = (shipped_configs() / name).read_text()
        given = yaml.safe_load(text)["model"]["network"]
        options = given["init_args"] | {"tables": lightning_dlrm.TableSettings(**given["init_args"]["tables"])}
        more = 2 if "two rows" in text else 1
        features = Features(
            dense=13,
            tables={f"C{i}": values + more for i, values in enumerate(VALUES, 1)},
            dense_names=tuple(f"I{i}" for i in range(1, 14)),
        )
        kind: Any = getattr(lightning_dlrm, given["class_path"])
        with torch.device("meta"):
            found = model_size(kind(features, 1, **options)).total
        assert found == PUBLISHED[Path(name).stem], name
        assert f"{found:,}" in text.split("\n\n")[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "finalmlp" in name else pytest.mark.slow) for name in NAMES]
)
def test_it_trains_as_its_header_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On few rows of demo data, by the header's commands."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    header = (shipped_configs() / name).read_text().split("\n\n")[0]
    commands = [found.split() for found in re.findall(r"-m lightning_dlrm (.*)", header)]
    assert [words[0] for words in commands] == ["fit", "test"]
    rows = {"train_rows": 3000, "validation_rows": 500, "test_rows": 500, "max_table_rows": 100}
    small = [f"--data.demo.{key}={value}" for key, value in rows.items()]
    small += ["--data.path=demo", "--data.batch_size=500", "--trainer.max_epochs=3", "--trainer.accelerator=cpu"]
    assert main([*commands[0], *small]) == 0
    assert main(commands[1]) == 0
    summary = json.loads((tmp_path / "RUN/summary.json").read_text())
    assert summary["best"]["step"] % 6 == 0 and (tmp_path / "RUN/test.json").exists()
