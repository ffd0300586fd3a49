"""Contract: ``generate log`` writes files of exactly the form that each shipped schema describes, with clicks that can
be learnt, the same for the same options; and ``preprocess --infer`` finds the form of each again."""

import hashlib
from pathlib import Path

import pytest

from datamodules.generate.log import FORMS, LogSettings, generate_log
from datamodules.log_schema import LogSchema, read_log_schema
from datamodules.preprocess.inference import infer
from datamodules.preprocess.sniffing import read_sample
from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.configs import find_config
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.shipped import shipped_configs, shipped_names
from lightning_dlrm.contracts.terminal import binary_size

SCHEMAS = [name for name in shipped_names() if name.startswith("datasets/") and Path(name).stem in FORMS]
ROWS = 2_000


def stem(name: str) -> str:
    return Path(name).stem


def roles(schema: LogSchema) -> dict[str, str]:
    return {name: column.role for name, column in schema.columns.items()}


@pytest.mark.parametrize("name", SCHEMAS, ids=stem)
def test_each_shipped_schema_has_a_form_of_its_files(name: str, tmp_path: Path) -> None:
    made = generate_log(LogSettings(form=stem(name), rows=ROWS), tmp_path)
    schema, form = read_log_schema(name), FORMS[stem(name)]
    assert schema.dataset == stem(name)
    paths = [str(path) for path in made.files]
    names = None if form.header else list(schema.names)
    sample = read_sample(paths, names)
    assert sample.whole and sample.rows == ROWS and sample.form.header == form.header
    assert sample.form.separator == form.separator == (schema.separator or ",")
    schema.check_columns(list(sample.columns), name)
    # In the order of the file, without the label.
    label = schema.label_in(list(sample.columns)).column
    assert list(schema.columns) == [column for column in sample.columns if column != label]
    if schema.split.by == "files":
        assert [file for of_split in schema.split.values.values() for file in of_split] == list(form.files)
    assert 0.65 < made.best.auc < 0.9
    infer(tmp_path / "inferred.yaml", schema.label, paths, names)
    found = read_log_schema(tmp_path / "inferred.yaml")
    assert found.split.by == schema.split.by
    # What decides: ids of rows and times are no features, and a feature of numbers is no id.
    for column, role in roles(schema).items():
        if role in ("keep", "dense"):
            assert found.columns[column].role == role, column
    assert found.columns.get("id") == schema.columns.get("id")


def test_rows_follow_from_the_options(tmp_path: Path) -> None:
    def digest(folder: str, seed: int) -> list[str]:
        made = generate_log(LogSettings(form="shop", rows=70_000, seed=seed), tmp_path / folder)
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in made.files]

    assert digest("a", 0) == digest("b", 0) != digest("c", 1)
    lines = (tmp_path / "a/clicks.csv").read_text().splitlines()
    assert lines[0] == "time,user,item,price,clicked" and len(lines) == 70_001
    assert lines[1:] == sorted(lines[1:], key=lambda line: line.split(",")[0])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "log", "--form", "criteo_x1", "--rows", "100", "--output", str(tmp_path)]
    assert main(command) == 0
    size = (tmp_path / "train.csv").stat().st_size
    out = capsys.readouterr().out
    assert "100 rows; best scores that any model can reach" in out and f"train.csv: {binary_size(size)}" in out
    assert [len((tmp_path / f"{split}.csv").read_text().splitlines()) for split in ("train", "valid", "test")] == [
        73,
        19,
        11,
    ]
    assert main(command) == 2
    assert "train.csv exists" in capsys.readouterr().err
    with pytest.raises(UserError, match="rows is 3; give at least 30"):
        LogSettings(form="criteo_x1", rows=3)


def test_shipped_schemas_are_found_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"no schema datasets/avazo.yaml here; did you mean datasets/avazu.yaml\?"):
        read_log_schema("datasets/avazo.yaml")
    (tmp_path / "mine.yaml").write_text((shipped_configs() / "datasets/avazu.yaml").read_text())
    for read in (read_log_schema, find_config):
        with pytest.raises(UserError, match=rf"no \w+ {tmp_path}/mine.yml here; did you mean {tmp_path}/mine.yaml\?"):
            read(f"{tmp_path}/mine.yml")
    assert main(["params", "--config", "datasets/avazu.yaml"]) == 2
    assert "is the schema of a raw log: python -m lightning_dlrm preprocess --schema" in capsys.readouterr().err
