"""The lock of a run folder: one process at a time writes a run.

A lock is a file with its holder, whose time of change the holder renews. Only calls that file systems shared over a
network offer too are used: exclusive creation, reading, removal.
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
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from lightning_dlrm.contracts.documents import is_name, printable, read_json
from lightning_dlrm.contracts.errors import UserError, require

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

    def __post_init__(self) -> None:
        require(is_name(self.token), "its token is not a name")

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
        """Return whether the process ``mine`` can tell that this holder has ended."""
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


class _Link(NamedTuple):
    """A lock file at a moment."""

    path: Path
    changed: int
    """Time of its last heartbeat in nanoseconds, by the clock of the file system."""
    holder: Holder | None
    """None if it cannot be read, such as a file that is being written."""


class FolderLock:
    """A lock on a folder, held by this process from ``acquire`` to ``release``; also a context manager.

    Lock files form a chain: the first has a fixed name, and that of each next one is given by the holder whose lock it
    takes over. The last one holds the lock. No process replaces or removes the lock of another one, so of processes
    that come at the same time one creates the next file, whatever is killed or delayed at any moment. A release removes
    the chain.

    If another process takes the lock over, because this one was stopped for longer than ``SILENCE_SECONDS``, this
    process sends itself SIGTERM.

    Args:
        folder: the folder, for messages.
        path: the first lock file; by default ``.run.lock`` in the folder.
    """

    def __init__(self, folder: Path, path: Path | None = None) -> None:
        self.folder = Path(folder)
        self.path = self.folder / LOCK if path is None else path
        self._mine = Holder.current()
        self._file = self.path
        """The file of this process in the chain."""
        self._last_beat = 0.0
        self._released = threading.Event()
        self._writing = threading.Lock()
        """Held by ``release`` and by each heartbeat, so that none comes amid the other."""

    def acquire(self) -> "FolderLock":
        """Take the lock, also from a process that has ended.

        Raises:
            UserError: another process holds it, or the folder has been removed.
        """
        while not self._create(self.path, self._mine):
            chain = self._chain()
            # The lock may be released in between.
            with contextlib.suppress(FileNotFoundError, IndexError):
                last, silence = chain[-1], self._silence(chain[-1].path)
                has_ended = last.holder is not None and last.holder.has_ended(self._mine)
                if silence <= SILENCE_SECONDS and not has_ended:
                    raise self._refusal(last.holder, silence)
                if self._create(successor := self._successor(last), self._mine):
                    if self._ends_here(self._chain()):
                        log.info(
                            "took the lock of %s over from %s, which has ended", self.folder, _describe(last.holder)
                        )
                        break
                    # The chain was released meanwhile, or could not be read whole.
                    successor.unlink()
        self._last_beat = time.time()
        self._remove_leftovers()
        threading.Thread(target=self._renew, name="lock of the run folder", daemon=True).start()
        return self

    def release(self) -> None:
        """Give the lock back."""
        with self._writing, contextlib.suppress(OSError, UserError):
            self._released.set()
            chain = self._chain()
            if not self._ends_here(chain):
                return
            # First take it over from itself, which fails if another process has done so.
            end = self._successor(chain[-1])
            # On a full disk no process can.
            with contextlib.suppress(OSError):
                if not self._create(end, dataclasses.replace(self._mine, token=uuid.uuid4().hex)):
                    return
            for path in (*(link.path for link in chain), end):
                path.unlink(missing_ok=True)

    def __enter__(self) -> "FolderLock":
        return self.acquire()

    def __exit__(self, *args: object) -> None:
        self.release()

    def _create(self, path: Path, holder: Holder) -> bool:
        """Create a lock file; return whether it did not exist.

        Raises:
            UserError: its folder does not exist.
        """
        try:
            file = path.open("x")
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise UserError(f"{path.parent} was removed while it was being locked: start the command again") from error
        try:
            with file:
                file.write(json.dumps(dataclasses.asdict(holder), indent=1) + "\n")
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self._file = path
        return True

    def _chain(self) -> list[_Link]:
        """Return the lock files, the last of which holds the lock; empty without a lock."""
        found: dict[Path, _Link] = {}
        path = self.path
        # Of damaged files, one may follow itself.
        with contextlib.suppress(FileNotFoundError):
            while path not in found:
                found[path] = _Link(path, path.stat().st_mtime_ns, self._read(path))
                path = self._successor(found[path])
        return list(found.values())

    def _successor(self, link: _Link) -> Path:
        """Return the file of the process that takes a lock over; only one process can create it."""
        name = f"unreadable-{link.changed}" if link.holder is None else link.holder.token
        return self.path.with_name(f"{self.path.name}.{name}")

    def _renew(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with self._writing:
                other = None if self._released.is_set() else self._beat()
            if other is not None:
                log.error(
                    "%s has taken over %s, because this process did not renew its lock in time; this process stops",
                    other,
                    self.folder,
                )
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _beat(self) -> str | None:
        """Renew the lock; return who holds it if it is another process.

        A lock that cannot be read is renewed too: this process may have too many open files, or the file system may
        not answer now and do so later.
        """
        with contextlib.suppress(OSError, UserError):
            chain = self._chain()
            if chain and chain[-1].holder is not None and not self._ends_here(chain):
                return _describe(chain[-1].holder)
            if not chain and time.time() - self._last_beat > SILENCE_SECONDS:
                # It may have been taken over and released.
                return _describe(None)
            if chain:
                os.utime(self._file)
            else:
                self._create(self.path, self._mine)
            self._last_beat = time.time()
        return None

    def _silence(self, path: Path) -> float:
        """Return the seconds since a file was changed, by the clock of the file system."""
        beside = self.path.with_name(f"{self.path.name}.probe-{self._mine.token}")
        beside.touch()
        try:
            return beside.stat().st_mtime - path.stat().st_mtime
        finally:
            beside.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Remove files that processes which were killed in ``acquire`` and ``release`` have left."""
        with contextlib.suppress(OSError):
            in_use, now = {link.path for link in self._chain()}, self._file.stat().st_mtime
            for left in self.path.parent.glob(f"{self.path.name}.*"):
                if left not in in_use and now - left.stat().st_mtime > SILENCE_SECONDS:
                    left.unlink()

    def _read(self, path: Path) -> Holder | None:
        """Return the holder; None if the file cannot be read, for example while it is being written."""
        try:
            return read_json(path, Holder, "")
        except UserError:
            return None

    def _ends_here(self, chain: Sequence[_Link]) -> bool:
        """Whether this process holds the lock."""
        holder = chain[-1].holder if chain else None
        return holder is not None and holder.token == self._mine.token

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
