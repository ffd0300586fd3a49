"""The lock of a run folder: one process at a time writes a run.

A lock is a file with its holder, whose time of change the holder renews. Only calls that file systems shared over a
network offer too are used: exclusive creation, rename, reading back.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from lightning_dlrm.contracts.documents import printable, read_json
from lightning_dlrm.contracts.errors import UserError

log = logging.getLogger("lightning_dlrm")

LOCK = ".run.lock"
"""Name of the lock file in a run folder."""
HEARTBEAT_SECONDS = 30.0
SILENCE_SECONDS = 120.0
"""Seconds without a heartbeat after which another process takes a lock over."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock."""

    token: str
    host: str
    system: str
    """The running system and its process numbers: the boot, and the container."""
    pid: int
    started: float
    """When the process started, by ``_start_of``."""
    locked: str
    """When the lock was taken."""
    command: str
    slurm_job: str
    slurm_restarts: int

    @classmethod
    def current(cls) -> "Holder":
        """Return this process as a new holder."""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            system=_system(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            locked=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            command=printable(" ".join(shlex.join(sys.argv).split()))[:200],
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
            slurm_restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0),
        )

    def has_ended(self, mine: "Holder") -> bool:
        """Return whether this process is known to have ended, to the process ``mine``."""
        if self.slurm_job and self.slurm_job == mine.slurm_job:
            return self.slurm_restarts < mine.slurm_restarts or self._is_dead_here(mine)
        return self._is_dead_here(mine)

    def _is_dead_here(self, mine: "Holder") -> bool:
        if (self.host, self.system) != (mine.host, mine.system):
            return False
        try:
            is_another = _start_of(self.pid) != self.started
            return is_another or psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class _State(NamedTuple):
    """What a lock file says at a moment."""

    heartbeat: int
    """Time of the last heartbeat in nanoseconds, by the clock of the file system."""
    holder: Holder | None


class FolderLock:
    """A lock on a folder, held by this process from ``acquire`` to ``release``; also a context manager.

    If another process takes the lock over, because this one was stopped for longer than ``SILENCE_SECONDS``, this
    process sends itself SIGTERM.

    Args:
        folder: the folder, for messages.
        path: the lock file; by default ``.run.lock`` in the folder.
    """

    def __init__(self, folder: Path, path: Path | None = None) -> None:
        self.folder = Path(folder)
        self.path = self.folder / LOCK if path is None else path
        self._mine = Holder.current()
        self._released = threading.Event()
        self._writing = threading.Lock()
        """Held by ``release`` and by each heartbeat, so that none comes amid the other."""

    def acquire(self) -> "FolderLock":
        """Take the lock, also from a process that has ended.

        Raises:
            UserError: another process holds it.
        """
        while not self._create():
            # It may be released in between.
            with contextlib.suppress(FileNotFoundError):
                state, silence = self._state(self.path), self._silence()
                has_ended = state.holder is not None and state.holder.has_ended(self._mine)
                if silence <= SILENCE_SECONDS and not has_ended:
                    raise self._refusal(state.holder, silence)
                if self._take_over(state):
                    break
        self._remove_probes()
        threading.Thread(target=self._renew, name="lock of the run folder", daemon=True).start()
        return self

    def release(self) -> None:
        """Give the lock back."""
        with self._writing, contextlib.suppress(OSError):
            self._released.set()
            if self._is_mine():
                self.path.unlink()

    def __enter__(self) -> "FolderLock":
        return self.acquire()

    def __exit__(self, *args: object) -> None:
        self.release()

    def _create(self) -> bool:
        """Create the lock file; return whether it did not exist."""
        try:
            with self.path.open("x") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        return True

    def _take_over(self, stale: _State) -> bool:
        """Replace the lock of a process that has ended; return whether it still was the lock.

        Raises:
            UserError: another process takes it over in the same moment.
        """
        beside, claim = self._beside(), self.path.with_name(f"{self.path.name}.claim")
        try:
            claim.open("x").close()
        except FileExistsError:
            if self._silence(claim) <= SILENCE_SECONDS:
                raise self._refusal(self._read(self.path), 0.0) from None
            # Its process was killed.
            claim.unlink()
            return False
        try:
            if self._state(self.path) != stale:
                return False
            beside.write_text(self._text())
            beside.replace(self.path)
        finally:
            claim.unlink(missing_ok=True)
        log.info("took the lock of %s over from %s, which has ended", self.folder, _describe(stale.holder))
        return True

    def _renew(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with self._writing:
                holder = None if self._released.is_set() else self._beat()
            if holder is not None:
                log.error("%s has taken %s over: this process was silent, and stops", _describe(holder), self.folder)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _beat(self) -> Holder | None:
        """Renew the lock; return the holder if it is another process.

        A lock that cannot be read is renewed too: this process may have too many open files, or the file system may
        not answer now and do so later.
        """
        holder = self._read(self.path)
        if holder is not None and holder.token != self._mine.token:
            return holder
        with contextlib.suppress(OSError):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                self._create()
        return None

    def _silence(self, path: Path | None = None) -> float:
        """Return the seconds since a file was changed, by default the lock, by the clock of the file system."""
        beside = self._beside()
        beside.touch()
        try:
            return beside.stat().st_mtime - (path or self.path).stat().st_mtime
        finally:
            beside.unlink(missing_ok=True)

    def _remove_probes(self) -> None:
        """Remove files that processes which were killed in ``acquire`` have left."""
        for left in self.path.parent.glob(f"{self.path.name}.*"):
            with contextlib.suppress(OSError):
                if self.path.stat().st_mtime - left.stat().st_mtime > SILENCE_SECONDS:
                    left.unlink()

    def _read(self, path: Path) -> Holder | None:
        """Return the holder; None without a lock, or if it cannot be read, such as one that is being written."""
        try:
            return read_json(path, Holder, "")
        except UserError:
            return None

    def _state(self, path: Path) -> _State:
        return _State(path.stat().st_mtime_ns, self._read(path))

    def _is_mine(self) -> bool:
        holder = self._read(self.path)
        return holder is not None and holder.token == self._mine.token

    def _beside(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{self._mine.token}")

    def _text(self) -> str:
        return json.dumps(dataclasses.asdict(self._mine), indent=1) + "\n"

    def _refusal(self, holder: Holder | None, silence: float) -> UserError:
        return UserError(
            f"{self.folder} is in use by {_describe(holder)}, whose last heartbeat was {max(0, silence):.0f} s ago: "
            "wait until it ends, or choose another folder (another process may take it over "
            f"{SILENCE_SECONDS:.0f} s after the last heartbeat)"
        )


@contextlib.contextmanager
def lock_run_of(path: Path) -> Iterator[None]:
    """Context in which the run folder that a path lies in is locked; without effect for other paths.

    Raises:
        UserError: another process holds the lock.
    """
    parents = list(Path(path).absolute().parents)[:2]
    run = next((folder for folder in parents if (folder / "metrics.jsonl").is_file() or (folder / LOCK).exists()), None)
    with contextlib.nullcontext() if run is None else FolderLock(run):
        yield


def _describe(holder: Holder | None) -> str:
    if holder is None:
        return "an unknown process"
    return f"process {holder.pid} on {holder.host} since {holder.locked} ({holder.command})"


def _start_of(pid: int) -> float:
    """Return when a process started: in clock ticks since the boot on Linux, elsewhere in seconds since 1970.

    psutil's time on Linux changes when the clock of the system is set.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    with contextlib.suppress(OSError):
        # Field 22 (starttime); field 2, the command in parentheses, may hold spaces.
        return float(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return psutil.Process(pid).create_time()


def _system() -> str:
    """Return what tells systems with the same host name apart; process numbers mean the same within one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
