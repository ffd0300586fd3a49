"""Contract: what is printed fits the terminal, with whole words, numbers and commands; colours only where they show."""

import fcntl
import io
import os
import re
import shlex
import shutil
import struct
import termios
from pathlib import Path

import pytest
from tqdm import tqdm

from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.terminal import RED, columns, emphasized, filled, wrapped
from lightning_dlrm.engine.metrics_logger import MetricsLogger
from lightning_dlrm.engine.progress import FIT_FORMAT, format_metrics, format_validation, metrics_width
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import RunFolder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def columns_80(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((80, 24)))


def test_lines_fit_the_terminal_and_commands_can_be_copied(columns_80: None) -> None:
    command = (
        "  python -m lightning_dlrm predict --config 'a run/config.yaml' --ckpt_path run/checkpoints/best --data.path x"
    )
    lines = ["short", f"  {'word ' * 40}".rstrip(), command]
    shown = wrapped(lines, Terminal()).splitlines()
    assert max(map(len, shown)) < 80 and shown[1].startswith("  word") and shown[2].startswith("    word")
    start = next(number for number, line in enumerate(shown) if "python" in line)
    assert all(line.endswith(" \\") for line in shown[start:-1]) and "'a run/config.yaml'" in shown[start]
    assert " ".join(line.rstrip("\\").strip() for line in shown[start:]) == command.strip()
    value = f"speed              {'word ' * 20}".rstrip()
    assert [line[:20] for line in wrapped([value], Terminal()).splitlines()] == ["speed              w", " " * 19 + "w"]
    assert wrapped(lines, io.StringIO()) == "\n".join(lines), "a file or a pipe gets the lines as they are"


def test_commands_begin_a_line_and_keep_their_words(columns_80: None) -> None:
    quoted = shlex.join(["--run_dir", "it's here/run", "--x", 'a "b" c'])
    for words, command in (
        ("interrupted at step 1,200; continue with:", f"python -m lightning_dlrm fit --config a/config.yaml {quoted}"),
        ("W&B: offline (no API key); send it with:", f"wandb sync {'a/long/path/' * 4}wandb/offline-run-*"),
        ("", f"python -m lightning_dlrm fit --run_dir it's {'x' * 60}"),
    ):
        shown = wrapped([f"{words} {command}".strip()], Terminal()).splitlines()
        begin = next(i for i, line in enumerate(shown) if line.lstrip().startswith(("python -m", "wandb sync")))
        assert " ".join(line.removesuffix("\\").strip() for line in shown[begin:]) == command
        assert all(line.endswith(" \\") for line in shown[begin:-1])
    # A command in quotes stays in its sentence.
    sentence = "error: no folder at x: make one with 'python -m lightning_dlrm preprocess', or with 'python -m x demo'"
    shown = wrapped([sentence], Terminal()).splitlines()
    assert len(shown) == 2 and " ".join(line.strip() for line in shown) == sentence
    # A number is not separated from its unit.
    shown = wrapped([f"{'word ' * length}takes 64.2 ms, 3.28 GiB or 17 bytes" for length in range(8, 16)], Terminal())
    assert not re.search(r"\d\n", shown) and shown.count("\n") > 8
    # Words that are quoted stay words.
    shown = wrapped([f"python -m x {quoted} {'--option value ' * 8}"], Terminal())
    assert shlex.split(shown)[2:7] == ["x", "--run_dir", "it's here/run", "--x", 'a "b" c']


def test_help_is_filled_to_the_terminal(columns_80: None) -> None:
    command = f"python -m lightning_dlrm fit --config dlrm.yaml {'--data.path data ' * 5}".strip()
    text = f"""\
A paragraph whose lines are
{"long " * 30}
and end here.

Entries:
  name      {"words " * 20}
  other one {"of " * 30}
            which go on
examples:
  {command[:60]} \\
      {command[60:]}
"""
    shown = filled(text).splitlines()
    assert max(map(len, shown)) <= 78
    assert shown[0].startswith("A paragraph whose lines are long long") and "and end here." in shown[2]
    assert (
        shown[4] == "Entries:" and shown[5].startswith("  name      words") and shown[6].startswith(f"{'': <12}words")
    )
    assert any(line.startswith(f"{'': <12}of") and line.endswith("which go on") for line in shown)
    begin = shown.index("examples:") + 1
    assert all(line.endswith(" \\") for line in shown[begin:-1])
    assert " ".join(line.removesuffix("\\").strip() for line in shown[begin:]) == " ".join(command.split())
    assert all(line.startswith("  python") or line.startswith("    --") for line in shown[begin:])
    assert filled(filled(text)) == filled(text)


@pytest.mark.parametrize("command", ["preprocess", "inspect", "compare", "generate tsv", "bench gpu", "dashboard"])
def test_help_has_at_most_98_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 98


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("preprocess --input x --max-rows x", "--max-rows is x; expected a whole number"),
        ("preprocess --input x --negative-sampling-rate x", "--negative-sampling-rate is x; expected a number"),
        ("preprocess --input x --output", "--output needs a value"),
        ("preprocess --schema datasets/avazu.yaml --input x --output", "--output needs a value"),
        (
            "preprocess --dataset kaggle --protocol dlrm --input x --output o --max-rows 0",
            "--max-rows is 0, expected at",
        ),
        ("preprocess --dataset kaggle --protocol dlrm --input x --output o --workers 0", "--workers is 0, expected at"),
        ("preprocess --schema datasets --input x --output o", "datasets is a folder, not a schema; schemas here and"),
        ("preprocess --schema datasets/avazuu.yaml --input x --output o", "did you mean datasets/avazu.yaml? 'pre"),
        ("generate demo --rows 0 --output d", "--rows is 0; give at least 100, so that both labels occur"),
        ("generate demo --validation-rows -1 --output d", "--validation-rows is -1; give at least 100"),
        ("generate log --form shop --rows 0 --output d", "--rows is 0; give at least 10"),
        ("generate log --form shop --rows 10 --output file", "file is a file; name a folder for the files of the log"),
        (
            "generate log --form shop --rows 100 --output rows",
            "error: rows is a file; name a folder for the files of the log",
        ),
        ("inspect file", "file is a file; give the dataset folder that holds dataset.json"),
    ],
)
def test_errors_name_the_option_as_it_was_typed(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("rows").touch()
    Path("datasets").mkdir()
    assert main(words.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error, error
    assert sorted(path.name for path in Path().iterdir()) == ["datasets", "file", "rows"]


def test_empty_names_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--input", "x", "--output", ""], "--output is empty; name the folder to make"),
        (["--input", "", "--output", str(tmp_path / "o")], "an input is an empty text; name a file"),
    ):
        assert main(["preprocess", "--schema", "datasets/avazu.yaml", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "most_lines"),
    [
        ("preprocess", 70),
        ("inspect", 25),
        ("generate", 20),
        ("generate demo", 30),
        ("generate random", 54),
        ("generate trace", 45),
        ("generate tsv", 26),
        ("generate log", 38),
    ],
)
def test_help_of_data_commands_is_short_at_80_columns(
    command: str, most_lines: int, columns_80: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 80 and len(lines) <= most_lines, len(lines)


def test_the_width_is_that_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 61, 0, 0))
    with os.fdopen(theirs, "w") as stream:
        assert columns(stream) == 61
    os.close(ours)
    monkeypatch.setenv("COLUMNS", "133")
    assert columns(io.StringIO()) == 133


def test_colours_show_on_terminals_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert emphasized("error:", Terminal(), RED) == "\x1b[1;31merror:\x1b[0m"
    assert emphasized("error:", io.StringIO(), RED) == "error:"
    monkeypatch.setenv("NO_COLOR", "1")
    assert emphasized("error:", Terminal(), RED) == "error:"


def test_the_bar_of_a_fit_fits_80_columns_with_the_loss_whole(columns_80: None, tmp_path: Path) -> None:
    metrics = MetricsLogger(RunFolder(tmp_path), None)
    metrics.latest = {names.TRAIN_LOSS: 0.54461, names.SAMPLES_PER_SECOND: 75936.2, names.DATA_WAIT_SHARE: 0.016}
    for steps, shown in ((100, "loss 0.5446, 75,936 samples/s now"), (1_000_000, "loss 0.5446")):
        terminal = Terminal()
        bar = tqdm(desc="fit", total=steps, bar_format=FIT_FORMAT, file=terminal, ncols=80)
        bar.set_postfix_str(format_metrics(metrics, metrics_width(bar)), False)
        bar.update(steps // 2)
        line = str(bar)
        assert len(line) <= 80 and f"| steps {steps // 2}/{steps} " in line and line.endswith(f", {shown}"), line
        assert line.rindex("|") - line.index("|") > 8
        bar.close()
    metrics.gradient_norm = 1.25
    assert format_metrics(metrics, 200).startswith(
        "loss 0.5446, 75,936 samples/s now, gradient norm 1.25, data wait 2%, "
    )
    results = {"validation/auc": 0.66284, "validation/log_loss": 0.52296, "validation/accuracy": 0.7}
    assert format_validation(results, 1200, True) == (
        "validation at step 1,200: AUC 0.6628, log loss 0.5230 (highest AUC so far)"
    )


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["generate", "demo", "--outp", "x"], "--output"),
        (["inspect", "folder", "--verif"], "--verify"),
        (["checkpoint", "info", "folder", "--jsn"], "--json"),
        (["dashboard", "--projct", "p"], "--project"),
        (["bench", "auc", "--round", "3"], "--rounds"),
    ],
)
def test_no_command_takes_an_abbreviation(
    arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and (f"did you mean {option}?" in error or f"{option} is missing" in error), (
        error
    )
    assert "--help lists the options" in error
