"""Contract: a long fit takes no more memory, open files and threads, and many resumes leave nothing behind."""

import os
import statistics
import time
from pathlib import Path

import psutil
import pytest

from lightning_dlrm.__main__ import main
from tests.cli.test_cli import own_folders
from tests.cli.test_interrupted import FIT, assert_same_runs
from tests.forked import ForkedPython

__all__ = ["own_folders"]  # a fixture that every test uses


@pytest.mark.slow
def test_thirty_resumes_leave_nothing_behind_and_end_in_the_same_bits() -> None:
    fit = [*FIT, "--trainer.max_epochs=-1", "--trainer.val_check_interval=7", "--checkpoint.every_n_steps=2"]
    assert main([*fit, "--run_dir", "whole", "--trainer.max_steps=62"]) == 0
    for steps in range(2, 64, 2):
        assert main([*fit, "--run_dir", "run", "--resume=auto", f"--trainer.max_steps={steps}"]) == 0
    assert_same_runs(Path("run"), Path("whole"), best=False)
    names = [sorted(str(path.relative_to(run)) for path in Path(run).rglob("*")) for run in ("run", "whole")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_fit_of_twenty_minutes_takes_no_more_memory_after_five() -> None:
    check_endurance(minutes=20, settled=5)


def check_endurance(minutes: float, settled: float) -> None:
    """Train so long, with validations and saves; from minute ``settled`` on nothing may grow."""
    fit = [*FIT, "--trainer.max_epochs=-1", "--trainer.val_check_interval=30", "--checkpoint.every_n_steps=20"]
    process = ForkedPython(["-m", "lightning_dlrm", *fit, "--run_dir", "run"], os.environ, Path.cwd())
    try:
        seen = psutil.Process(process.pid)
        start, taken = time.monotonic(), list[tuple[float, int, int, int]]()
        while (minute := (time.monotonic() - start) / 60) < minutes:
            assert process.poll() is None, process.said()
            taken.append((minute, seen.memory_info().rss, seen.num_fds(), seen.num_threads()))
            time.sleep(1)
    finally:
        process.kill()
    share = (minutes - settled) / 10
    early = [sizes for minute, *sizes in taken if settled <= minute < settled + share]
    late = [sizes for minute, *sizes in taken if minute >= minutes - share]
    memory, files, threads = (
        statistics.median(after) - statistics.median(before)
        for before, after in zip(zip(*early, strict=True), zip(*late, strict=True), strict=True)
    )
    assert memory < 20e6 and files <= 0 and threads <= 0, (memory, files, threads)
    print(f"from minute {settled:g} to {minutes:g}: {memory / 1e6:+.1f} MB, {files:+g} files, {threads:+g} threads")
