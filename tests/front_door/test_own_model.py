"""Contract: docs/own-model.md, followed in an empty folder, gives a model that trains; its errors are one line."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from lightning_dlrm.__main__ import main
from tests.forked import interpreter
from tests.front_door.conftest import REPOSITORY
from tests.front_door.pages import blocks_of, commands_of

PAGE = (REPOSITORY / "docs/own-model.md").read_text()
CODE = {block.language: block.code for block in reversed(blocks_of(PAGE)) if block.language != "bash"}
"""The first block of each language: own.py and own.yaml."""
EXPERIMENT = next(block.code for block in blocks_of(PAGE) if block.code.startswith("arms:"))
COMMANDS = [line for block in blocks_of(PAGE) if block.language == "bash" for line in commands_of(block.code)]
SMALLER = {
    "train_rows: 204_800": "train_rows: 4096", "validation_rows: 32_768": "validation_rows: 512",
    "test_rows: 16_384": "test_rows: 512", "max_table_rows: 100_000": "max_table_rows: 100",
}  # fmt: skip


def write_files(folder: Path) -> None:
    """Write the page's own.py and own.yaml; sizes of the data alone are cut."""
    configuration = CODE["yaml"]
    for size, smaller in SMALLER.items():
        assert size in configuration
        configuration = configuration.replace(size, smaller)
    (folder / "own.py").write_text(CODE["python"])
    (folder / "own.yaml").write_text(configuration)
    (folder / "own_or_dlrm.yaml").write_text(EXPERIMENT)


def line_of(text: str) -> int:
    """Return the line of the page's own.py in which a text begins."""
    code = CODE["python"]
    return code[: code.index(text)].count("\n") + 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, from which ``own`` is imported anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "commands",
    [[*COMMANDS[:-2], f"{COMMANDS[-1]} --dry-run"], pytest.param(COMMANDS, marks=pytest.mark.slow)],
    ids=["without comparisons", "all"],
)
def test_the_page(
    commands: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(folder)
    if commands == COMMANDS:
        # For the processes of the comparisons.
        monkeypatch.setattr("sys.executable", interpreter())
    assert [shlex.split(line)[3] for line in COMMANDS[1:]] == ["params", "fit", "fit", "test", "compare", "compare"]
    for line in commands:
        python, option, *rest = shlex.split(line)
        assert python == "python"
        if option == "-c":
            exec(rest[0], {})
            assert capsys.readouterr().out == ""
        else:
            assert main(rest[1:]) == 0, line
    assert Path("own/test.json").exists() and Path("versus").exists() == (commands == COMMANDS)


BROKEN = {
    "score": ("        return self.deep(joined).squeeze(1)", "        return self.deep(dense).squeeze(1)"),
    "__init__": ("        width = embedding_dim", "        width = self.nothing * embedding_dim"),
    "value": (
        "        width = embedding_dim",
        "        raise ValueError('no such\\nwidth')\n        width = embedding_dim",
    ),
}


@pytest.mark.parametrize(
    ("fault", "options", "said"),
    [
        ("score", [], r"in score: RuntimeError: mat1 and mat2 shapes cannot be multiplied \(2048x13 and 429x64\)"),
        ("__init__", [], r"in __init__: AttributeError: 'Own' object has no attribute 'nothing'"),
        ("value", [], "in __init__: ValueError: no such width"),
        (
            "score", ["--model.compile=true"],
            r"in score: RuntimeError: a and b must have same reduction dim, but got \[2048, 13\] X \[429, 64\]; ",
        ),
    ],
)  # fmt: skip
def test_an_error_of_the_network_is_one_line(
    fault: str,
    options: list[str],
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_files(folder)
    old, new = BROKEN[fault]
    code = CODE["python"]
    assert old in code
    (folder / "own.py").write_text(code.replace(old, new))
    line = line_of(old)
    assert fault != "score" or f"error: own.py, line {line}, in score: RuntimeError: " in PAGE
    command = ["fit", "--config", "own.yaml", "--run_dir", "run", *options]
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(rf"^error: own.py, line {line}, {said}", error), error
    assert error.endswith("--debug shows the whole traceback") and not Path("run").exists()
    monkeypatch.delitem(sys.modules, "own", raising=False)
    with pytest.raises(Exception, match=r"mat1|nothing|no such|reduction dim"):
        main(["--debug", *command] if fault == "value" else [*command, "--debug"])


@pytest.mark.parametrize(
    ("result", "options", "returned"),
    [
        ("self.deep(joined)", [], "shape (2048, 1)"),
        ("{'logits': self.deep(joined).squeeze(1)}", [], "a dict"),
        # Compiling takes 15 s.
        pytest.param(
            "{'logits': self.deep(joined).squeeze(1)}", ["--model.compile=true"], "a dict", marks=pytest.mark.slow
        ),
    ],
)
def test_a_wrong_result_of_score_is_named(
    result: str, options: list[str], returned: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(folder)
    (folder / "own.py").write_text(CODE["python"].replace("self.deep(joined).squeeze(1)", result))
    assert main(["fit", "--config", "own.yaml", "--run_dir", "run", *options]) == 2
    wrong = f"error: Own.score (own.py, line {line_of('    def score')}) returns "
    assert wrong in PAGE
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"{wrong}{returned}; expected one logit for each sample")
