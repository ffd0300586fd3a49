"""Contract: processes that a launcher starts work together or are refused in a line, and a job that SLURM stops and
starts again goes on where it was, to the bit."""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_dlrm.__main__ import main
from lightning_dlrm.cli.launchers import check_started_processes
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.strategy import EmbeddingShardedDDP
from lightning_dlrm.sharding.collectives import is_lost_rank
from tests.cli.test_cli import own_folders
from tests.cli.test_interrupted import FIT, SHARDED, assert_same_runs, lines_of, patch_call
from tests.forked import ForkedPython
from tests.ranks import environment, start_ranks

__all__ = ["own_folders"]  # a fixture that every test uses

SHORT = [*FIT, "--trainer.max_steps=6", "--trainer.val_check_interval=6"]
TASK = {"SLURM_JOB_ID": "1771", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
TASK |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The environment of a job; the file that gets the arguments of ``scontrol``."""
    called = tmp_path / "scontrol.txt"
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    (programs / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGUSR1)
    yield called
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("options", "micro", "batch", "told"),
    [
        ([], 1, 3, "resumed at step 3"),
        (["--run_dir", "run"], 2, 3, "resumed at step 2"),
        # Between a step and its validation nothing is saved.
        (["--run_dir", "run"], 2, 6, "starting a new run"),
    ],
)
def test_a_requeued_job_goes_on_where_it_was(
    options: list[str],
    micro: int,
    batch: int,
    told: str,
    slurm: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fit = [*SHORT, f"--trainer.accumulate_grad_batches={micro}"]
    assert main([*fit, "--run_dir", "whole"]) == 0
    with monkeypatch.context() as patch:
        patch_call(patch, CTRModule, "training_step", batch, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(SystemExit) as ended:
            main([*fit, *options])
    assert ended.value.code == 128 + signal.SIGUSR1 and slurm.read_text() == "requeue 1771\n"
    # A run of another configuration in the same job is not taken for this one.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main([*SHORT, "--trainer.max_steps=1", "--seed_everything=7"]) == 0
    caplog.clear()
    with caplog.at_level("INFO", "lightning_dlrm"):
        assert main([*fit, *options]) == 0
    assert told in caplog.text
    assert_same_runs(Path("run" if options else "runs/slurm-1771-dlrm-1"), Path("whole"))


def test_scontrol_that_fails_is_told(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (slurm.parent / "programs/scontrol").write_text("#!/bin/sh\necho 'Requeue not allowed' >&2; exit 1\n")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "1770")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    patch_call(monkeypatch, CTRModule, "training_step", 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(SystemExit):
        main([*SHORT, "--run_dir", "run"])
    assert "SLURM does not start job 1770_4 again (scontrol requeue: Requeue not allowed)" in caplog.text


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("to_all", [False, True])
def test_a_requeued_job_of_two_tasks_goes_on_where_it_was(to_all: bool, slurm: Path) -> None:
    fit = [*FIT, *SHARDED, "--trainer.max_epochs=-1", "--trainer.max_steps=400", "--trainer.precision=64-true"]
    tasks = [
        {**TASK, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)}
        for r in range(2)
    ]

    def start(run: str, restarts: int) -> list[ForkedPython]:
        command = ["-m", "lightning_dlrm", *fit, "--run_dir", str(Path(run).absolute())]
        count = {"SLURM_RESTART_COUNT": str(restarts)}
        return [ForkedPython(command, os.environ | task | count, Path.cwd()) for task in tasks]

    for process in (whole := start("whole", 0)):
        assert process.wait(timeout=200) == 0, [each.said() for each in whole]
    for restarts in itertools.count():
        processes = start("run", restarts)
        if restarts == 3:
            break
        logged = lines_of("run")
        while lines_of("run") <= logged + 30 and processes[0].poll() is None:
            time.sleep(0.005)
        for process in processes if to_all else processes[1:]:
            process.send_signal(signal.SIGUSR1)
        codes = [process.wait(timeout=60) for process in processes]
        assert codes == [138, 138], [process.said() for process in processes]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    assert slurm.read_text() == "requeue 1771\n" * 3
    assert_same_runs(Path("run"), Path("whole"), exact=False)


@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        (environment(0, 2, 1), "torchrun has started 2 processes, but trainer.devices 1 .* --trainer.devices 2 --tr"),
        ({**environment(0, 8, 1), "LOCAL_WORLD_SIZE": "4"}, "--trainer.devices 4 --trainer.num_nodes 2 --tr"),
        ({**TASK, "SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "3"}, "srun has started 3 .* --trainer.devices 3 --tr"),
        ({**TASK, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": ""}, "--trainer.devices 2 --tr"),
    ],
)
def test_processes_that_would_each_do_the_whole_work_are_refused(
    variables: dict[str, str], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=advice):
        check_started_processes(1, 1, 1)
    started = int(variables.get("WORLD_SIZE", variables.get("SLURM_NTASKS", "")))
    check_started_processes(started, started, 1)


def test_torchrun_with_the_shipped_devices_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    assert main(SHORT) == 2
    assert capsys.readouterr().err.startswith("error: torchrun has started 2 processes") and not Path("runs").exists()


def test_processes_that_could_not_save_are_refused() -> None:
    with pytest.raises(UserError, match="start_method is spawn; expected popen"):
        EmbeddingShardedDDP(start_method="spawn")


@pytest.mark.dist
def test_a_rank_that_does_not_come_is_waited_for_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import logging, sys; from lightning_dlrm.engine import strategy as s;"
        "logging.basicConfig(); from functools import partial;"
        "s._saying_what_it_waits_for = partial(s._saying_what_it_waits_for, seconds=0.2);"
        "import lightning_dlrm.__main__ as m; sys.exit(m.main(sys.argv[1:]))"
    )
    command = [*SHORT, *SHARDED]
    process, other = start_ranks([["-c", code, *command], ["-c", "import time; time.sleep(180)"]])
    try:
        deadline = time.monotonic() + 120
        while "rank 0 has waited" not in (said := process.said()):
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.02)
        assert "until all 2 ranks reach 127.0.0.1:" in said
    finally:
        for each in (process, other):
            each.kill()


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 60000ms for recv operation",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29031",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Application timeout caused pair closure",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:144] Read error [10.0.0.2]: Software caused connection abort",
    ],
)
def test_gloo_errors_of_a_lost_rank(text: str) -> None:
    assert is_lost_rank(RuntimeError(text))
    assert not is_lost_rank(RuntimeError(text.replace("gloo", "other")))
    assert not is_lost_rank(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length"))
