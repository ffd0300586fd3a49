"""Contract: the code blocks of docs/own-data.md run as they are typed, one after the other, in an empty folder.

Rows alone are cut. The commands run in this process: ``test_installed`` shows that processes of the wheel do the same.
"""

import shlex
from pathlib import Path

import pytest

from lightning_dlrm.__main__ import main
from tests.front_door.conftest import REPOSITORY
from tests.front_door.test_readme import Block, blocks_of, commands_of

PAGE = (REPOSITORY / "docs/own-data.md").read_text()
BLOCKS = blocks_of(PAGE)
ROWS = {"100000": "3000"}
"""As typed -> in this test."""
SMALL = ["--data.batch_size", "128"]


def run(block: Block) -> None:
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
    assert len(BLOCKS) == PAGE.count("\n```") // 2 and {block.language for block in BLOCKS} == {"bash"}
    assert all(number in PAGE for number in ROWS)
    # A comparison trains six runs in processes of its own: see below.
    for block in BLOCKS[:-1]:
        run(block)
    said = capsys.readouterr().out
    assert "label        clicked" in said and Path("runs/first/test.json").exists()
    # Every option that the page names in its text exists.
    for role in ("dense", "categorical", "multi_hot", "leave", "keep"):
        assert f"role: {role}" in PAGE


@pytest.mark.slow
def test_the_page_compares_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:
        if " compare " in block.code or "generate" in block.code or "preprocess" in block.code:
            run(block)
    assert Path("report/report.html").exists()
