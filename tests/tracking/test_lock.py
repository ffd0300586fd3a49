"""Contract: one process at a time writes a run folder; the second one learns who does; a process that has ended, or was
silent for two minutes, does not keep others out."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tracking import lock
from lightning_dlrm.tracking.lock import LOCK, FolderLock, Holder, lock_run_of


def left_behind(folder: Path, seconds: float = 0.0, **changed: object) -> None:
    """A lock whose holder was last heard of so long ago."""
    holder = dataclasses.asdict(Holder.current()) | changed
    (folder / LOCK).write_text(json.dumps(holder))
    then = time.time() - seconds
    os.utime(folder / LOCK, (then, then))


def is_taken(folder: Path) -> bool:
    try:
        with FolderLock(folder):
            return True
    except UserError:
        return False


def test_a_second_comer_learns_who_holds_the_folder(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(UserError) as refused:
        FolderLock(tmp_path).acquire()
    assert f"{tmp_path} is in use by process {os.getpid()} on " in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir()) and is_taken(tmp_path) and not list(tmp_path.iterdir())


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError), FolderLock(tmp_path):
        raise InterruptedError
    assert not list(tmp_path.iterdir())


def test_which_locks_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    elsewhere = {"host": "another", "slurm_job": ""}
    for taken, silence, changed in [
        (False, 0, {}),
        (True, 0, {"pid": ended.pid}),
        (True, 0, {"started": 1.0}),  # its number was given to another process
        (False, 0, {"pid": ended.pid, "host": "another"}),
        (False, 0, {"pid": ended.pid, "system": "another container"}),
        (False, 110, elsewhere),
        (True, 130, elsewhere),
        (True, 130, {}),
        (True, 0, {**elsewhere, "slurm_job": "17", "slurm_restarts": 0}),
        (False, 0, {**elsewhere, "slurm_job": "17", "slurm_restarts": 1}),
        (False, 0, {**elsewhere, "slurm_job": "18", "slurm_restarts": 0}),
    ]:
        left_behind(tmp_path, silence, **changed)
        assert is_taken(tmp_path) == taken, (silence, changed)
        assert [path.name for path in tmp_path.iterdir()] == ([] if taken else [LOCK])
    (tmp_path / LOCK).write_text("{")
    with pytest.raises(UserError, match="in use by an unknown process"):
        FolderLock(tmp_path).acquire()


def test_of_many_that_take_over_one_wins(tmp_path: Path) -> None:
    for _ in range(5):
        left_behind(tmp_path, 130, host="another")
        begin = threading.Barrier(8)

        def comes(_: int, begin: threading.Barrier = begin) -> FolderLock | None:
            begin.wait()
            try:
                return FolderLock(tmp_path).acquire()
            except UserError:
                return None

        with ThreadPoolExecutor(8) as pool:
            winners = [winner for winner in pool.map(comes, range(8)) if winner is not None]
        assert len(winners) == 1
        winners[0].release()
        assert not list(tmp_path.iterdir())


def test_heartbeats_and_a_process_that_was_silent_for_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *args: received.set())
    try:
        with FolderLock(tmp_path):
            os.utime(tmp_path / LOCK, (0, 0))
            deadline = time.monotonic() + 10
            while (tmp_path / LOCK).stat().st_mtime < 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not is_taken(tmp_path) and not received.is_set()
            left_behind(tmp_path, host="another")
            assert received.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "another" in (tmp_path / LOCK).read_text(), "the lock of the other process stays"


def test_a_lock_that_cannot_be_read_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(lock.os, "kill", lambda pid, number: killed.append(number))
    with FolderLock(tmp_path) as mine:
        with monkeypatch.context() as patched:
            patched.setattr(lock, "read_json", cannot_be_read)
            os.utime(mine.path, (0, 0))
            deadline = time.monotonic() + 10
            while mine.path.stat().st_mtime < 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert mine.path.stat().st_mtime > 1, "heartbeats go on"
        assert not killed
    assert not list(tmp_path.iterdir())


def cannot_be_read(path: Path, form: type, advice: str) -> None:
    raise UserError(f"{path} cannot be read (Stale file handle)")


@pytest.mark.parametrize("argument", ["--name=\udce9", "--name=a\x1b[2Jb", "--name=a\nb"])
def test_any_command_can_hold_a_lock(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit", argument])
    with FolderLock(tmp_path) as mine:
        assert mine._ends_here(mine._chain())
        with pytest.raises(UserError, match=r"in use by process \d+ on .* \(fit '--name=[ -~]*'\)"):
            FolderLock(tmp_path).acquire()


def test_a_heartbeat_does_not_make_a_released_lock_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, releases = FolderLock(tmp_path), []
    assert mine._create(mine.path, mine._mine)

    def utime(path: Path) -> None:
        if not releases:
            releases.append(threading.Thread(target=mine.release))
            releases[0].start()
            releases[0].join(0.2)
        path.stat()

    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.0)
    monkeypatch.setattr(lock.os, "utime", utime)
    mine._renew()
    releases[0].join(10)
    assert len(releases) == 1 and not list(tmp_path.iterdir())


def test_the_clock_of_the_system_does_not_end_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = psutil.Process().create_time()
    with FolderLock(tmp_path):
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: now + 3600)
        assert not is_taken(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_the_start_of_a_process_is_in_ticks() -> None:
    seconds = lock._start_of(os.getpid()) / os.sysconf("SC_CLK_TCK")
    assert abs(psutil.boot_time() + seconds - psutil.Process().create_time()) < 2


def comes_and_goes(folder: Path, begin: Barrier, held: Path, seed: str, killed: bool) -> None:
    """Take the lock over, with a wait of random length before each operation on a file; hold it, and release it."""
    random_ = random.Random(seed)

    def delays(operation: Callable[..., Any]) -> Callable[..., Any]:
        def delayed(path: Path, *args: Any, **options: Any) -> Any:
            time.sleep(random_.choice((0, 0, 0.001, 0.01)))
            if killed and path.parent == folder and random_.random() < 0.02:
                # Between creating a file and writing it too.
                operation(path, *args, **options)
                os._exit(0)
            return operation(path, *args, **options)

        return delayed

    for name in ("open", "stat", "unlink", "touch"):
        setattr(Path, name, delays(getattr(Path, name)))
    mine = FolderLock(folder)
    begin.wait(60)
    for _ in range(3):
        try:
            mine.acquire()
        except UserError:
            continue
        start = time.monotonic()
        time.sleep(0.02)
        with held.open("a") as file:
            file.write(f"{start} {time.monotonic()}\n")
        mine.release()


def hold_in_turns(folder: Path, killed: bool, seed: str = "") -> None:
    """Let six processes come at the same time; check that they held the lock one after the other."""
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(6)
    files = [folder.with_name(f"{folder.name}-{number}") for number in range(6)]
    comers = [
        context.Process(target=comes_and_goes, args=(folder, begin, file, f"{seed} {file.name}", killed))
        for file in files
    ]
    for comer in comers:
        comer.start()
    for comer in comers:
        comer.join(60)
        assert comer.exitcode == 0
    lines = (line for file in files if file.exists() for line in file.read_text().splitlines())
    held = sorted(tuple(map(float, line.split())) for line in lines)
    assert (held or killed) and all(end < start for (_, end), (start, _) in itertools.pairwise(held))


def test_of_processes_that_take_over_at_the_same_time_one_holds_the_lock(tmp_path: Path) -> None:
    for chain in ("one", "killed while it took over", "unreadable"):
        folder = tmp_path / chain
        folder.mkdir()
        left_behind(folder, 130, host="another", token="a")
        if chain == "unreadable":
            (folder / LOCK).write_text("{")
        elif chain != "one":
            (folder / LOCK).rename(folder / f"{LOCK}.b")
            left_behind(folder, 130, host="another", token="b")
        for path in folder.iterdir():
            os.utime(path, (0, 0))
        hold_in_turns(folder, killed=False)
        assert not list(folder.iterdir()), chain


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_of_processes_that_are_killed_at_any_operation_one_holds_the_lock(seed: int, tmp_path: Path) -> None:
    (folder := tmp_path / "run").mkdir()
    left_behind(folder, 130, host="another", token="a")
    hold_in_turns(folder, killed=True, seed=str(seed))
    # What the killed ones left is taken over, at the latest when it is silent for too long.
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    with FolderLock(folder):
        assert not is_taken(folder)
    assert not list(folder.iterdir())


def test_a_process_that_was_silent_and_one_that_took_over(tmp_path: Path) -> None:
    silent = FolderLock(tmp_path).acquire()
    os.utime(tmp_path / LOCK, (0, 0))
    second = FolderLock(tmp_path).acquire()
    silent.release()
    assert not is_taken(tmp_path), "the silent process leaves the lock of the second"
    assert silent._beat() is not None and second._beat() is None
    second.release()
    assert not list(tmp_path.iterdir())
    assert second._beat() is None, "a user may have removed the lock of a healthy process"
    second.release()
    silent._last_beat -= lock.SILENCE_SECONDS + 1
    assert silent._beat() is not None and not list(tmp_path.iterdir()), "it was taken over and released"


def test_a_folder_that_is_removed_while_it_is_locked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run was removed"):
        FolderLock(tmp_path / "run").acquire()
    (tmp_path / "run").mkdir()
    with FolderLock(tmp_path / "run") as mine:
        shutil.rmtree(tmp_path / "run")
        assert mine._beat() is None
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens = Path.open

    def to_full_disk(path: Path, *args: Any, **options: Any) -> Any:
        if args == ("x",):
            opens(path, *args).close()
            return opens(Path("/dev/full"), "w")
        return opens(path, *args, **options)

    mine = FolderLock(tmp_path).acquire()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", to_full_disk)
        mine.release()
        assert not list(tmp_path.iterdir())
        with pytest.raises(OSError, match="No space left"):
            FolderLock(tmp_path).acquire()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", ["../x", "a" * 300, "", "\0"])
def test_tokens_from_files_are_names(token: str, tmp_path: Path) -> None:
    left_behind(tmp_path, 130, host="another", token=token)
    assert is_taken(tmp_path) and not list(tmp_path.iterdir())


def test_writers_of_checkpoints_lock_the_run_that_they_write_into(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").touch()
    with FolderLock(tmp_path / "run"):
        for inside in ("run/checkpoints/whole", "run/whole"):
            with pytest.raises(UserError, match="in use by"), lock_run_of(tmp_path / inside):
                pass
        with lock_run_of(tmp_path / "beside"):
            pass
    with lock_run_of(tmp_path / "run/checkpoints/whole"):
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run" / LOCK).exists()
