"""Contract: the code blocks of docs/own-data.md run as they are typed, one after the other, in an empty folder.

Rows alone are cut. The commands run in this process: ``test_installed`` shows that processes of the wheel do the same.
"""

import shlex
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import pytest

from datamodules.log_settings import ColumnRole, Transform
from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.shipped import shipped_names
from tests.forked import interpreter
from tests.front_door.conftest import REPOSITORY
from tests.front_door.pages import Block, blocks_of, commands_of

PAGE = (REPOSITORY / "docs/own-data.md").read_text()
BLOCKS = blocks_of(PAGE)
ROWS = {"100000": "3000"}
"""As typed -> in this test."""
SMALL = ["--data.batch_size", "128"]


def run(block: Block) -> None:
    if block.language == "python":
        exec(compile(block.code, "docs/own-data.md", "exec"), {})
        return
    for line in commands_of(block.code):
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "lightning_dlrm"], line
        arguments = [ROWS.get(word, word) for word in words[3:]]
        assert main([*arguments, *(SMALL if arguments[0] in ("fit", "compare") else [])]) == 0, line


def test_the_page_takes_a_csv_to_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == PAGE.count("\n```") // 2 and {block.language for block in BLOCKS} == {"bash", "python"}
    assert all(number in PAGE for number in ROWS)
    # A comparison trains six runs in processes of its own: see below.
    for block in BLOCKS:
        if " compare " not in block.code:
            run(block)
    said = capsys.readouterr().out
    assert "label        clicked" in said and "{'train': 2400, 'validation': 300, 'test': 300}" in said
    assert Path("runs/first/test.json").exists()
    assert pq.read_table("runs/first/predictions.parquet").num_rows == 1000


def test_the_page_names_what_a_schema_takes() -> None:
    for names in (get_args(ColumnRole), get_args(Transform), ("min_count", "max_rows", "source", "counts", "bins")):
        assert all(name in PAGE for name in names)
    for kind in ("position", "random, seed: 1"):
        assert f"{{by: {kind}}}" in PAGE
    for shipped in shipped_names():
        assert not shipped.startswith("datasets/") or Path(shipped).stem in PAGE


@pytest.mark.slow
def test_the_page_compares_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("sys.executable", interpreter())
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:
        if any(command in block.code for command in (" compare ", "--rows 100000", "--infer", "--schema mylog")):
            run(block)
    assert Path("report/report.html").exists()
