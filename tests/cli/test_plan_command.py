"""Contract: ``plan`` says what it is for, takes its ranks from the Trainer, and refuses wrong options in one line."""

import json
import re
from pathlib import Path

import pytest

from lightning_dlrm.__main__ import main

ZIPF = "assumed: the k-th row of a table is looked up 1/k"
SMALL = ["plan", "--config", "dlrm.yaml", "--data.demo.max_table_rows", "20"]


@pytest.mark.parametrize(
    ("options", "setup"),
    [
        ("", f"1 rank; {ZIPF} times as often as its first row"),
        (
            "--trainer.devices 2 --trainer.num_nodes 3 --skew 1.05",
            f"6 ranks; {ZIPF}^1.05 times",
        ),
        ("--trainer.devices 2 --ranks 3 --skew 0", "3 ranks; assumed: rows of a table are looked up equally often"),
        ("--trainer.devices [0,1]", "2 ranks; assumed: the k-th row"),
        ("--trainer.devices 0,1,2", "3 ranks; assumed: the k-th row"),
        ("--trainer.devices auto", "1 rank; assumed: the k-th row"),
        (
            "--trainer.devices -1 --skew 1.5",
            f"1 rank; {ZIPF}^1.5 times as often as its first row",
        ),
        ("--device-memory 1GiB", "1 device with 1 GiB; assumed: the k-th row"),
        ("--device-memory 1GiB --trainer.devices 2", "2 devices with 1 GiB each; assumed: the k-th row"),
    ],
)
def test_the_first_line_says_what_the_plan_is_for(options: str, setup: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--config", "small.yaml", *options.split()]) == 0
    line = " ".join(capsys.readouterr().out.partition("\n\n")[0].split())
    assert line.startswith(f"DLRM of dlrm.yaml + small.yaml on demo data, global batch 2,048, {setup}"), line
    assert main([*SMALL, *options.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["network"], found["configurations"], found["data"]) == ("DLRM", ["dlrm.yaml"], "demo data")
    assert found["ranks"] == int(setup[0]) and found["batch_size"] == 2048 and isinstance(found["skew"], float)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--ranks 0", "--ranks is 0; expected a number of ranks from 1 to 4,096"),
        ("--ranks -3", "--ranks is -3; expected a number of ranks from 1 to 4,096"),
        ("--device-memory 1GiB --ranks 0", "--ranks is 0; expected a number of ranks from 1 to 4,096"),
        ("--ranks many", "--ranks is many; expected a whole number"),
        ("--trainer.devices 5000", "trainer.devices times trainer.num_nodes is 5000; expected a number of ranks from"),
        (
            "--memory-per-rank lots",
            "--memory-per-rank is lots; expected a number with a unit (KiB, MiB, GiB, TiB, KB, MB, GB or TB), such as "
            "80GiB, or such an amount for each rank: 24GiB,80GiB",
        ),
        ("--device-memory -1GiB", "--device-memory is -1GiB; expected a number with a unit (KiB, MiB, "),
        ("--ranks 2 --skew -4", "--skew is -4; expected a number of 0 or more"),
        ("--ranks 2 --indices -1,2", "--indices is -1,2; expected numbers of 0 or more"),
        (
            "--device-memory 1Gib2",
            "--device-memory is 1Gib2; expected a number with a unit (KiB, MiB, GiB, TiB, KB, MB, GB",
        ),
        (
            "--device-memory 1GiB --plot a.png --counted",
            "--device-memory chooses tables for host memory, but --plot is for a plan: give one of them",
        ),
        ("--plot a.jpgx", "a.jpgx does not have the suffix of a figure; give it one of .png, .svg, .pdf"),
        ("--resume auto", "--resume has no effect on plan, which trains nothing: leave it out"),
        ("--run_dir=x", "--run_dir has no effect on plan, which trains nothing: leave it out"),
        ("--checkpoint.every_n_steps 3", "--checkpoint.every_n_steps has no effect on plan, which trains nothing"),
        ("--ckpt_path x", "plan opens no checkpoint: leave --ckpt_path out"),
    ],
)
def test_wrong_options_of_the_command(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *options.split()]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {said}"), error


def test_options_of_runs_are_read_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "config.yaml"
    run.write_text("run_dir: x\nresume: auto\nstop_at_auc: 0.7\nlog_norms: true\ncheckpoint: {every_n_steps: 3}\n")
    for command in ("plan", "params"):
        assert main([command, *SMALL[1:], "--config", str(run)]) == 0
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([command, "--help.all"])
        said = capsys.readouterr().out
        assert "--data " in said and not re.search(r"--(run_dir|resume|stop_at_auc|log_norms|checkpoint)", said)
