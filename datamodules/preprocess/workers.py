"""Workers: this process, processes of this machine, or a Dask cluster.

All three are a ``concurrent.futures.Executor``, and jobs write their results to files, so that only names and small
numbers are sent between processes. Processes rather than threads: parsing and Parquet release the interpreter lock, but
much of the time is spent in thousands of short numpy calls between them, and the same code serves a cluster.

The cluster is Dask's distributed because its client provides such an executor and it runs under Slurm, Kubernetes, SSH
and on one machine. Ray and Spark would each bring a runtime, and no executor of the standard library's kind.
"""

import gc
import multiprocessing
import os
import secrets
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from datamodules.folder import is_disk_full
from datamodules.preprocess.journal import LOCKED
from lightning_dlrm.contracts.errors import UserError, one_line, require

T = TypeVar("T")
R = TypeVar("R")

_CONNECT_TIMEOUT_S = 30


class InProcess(Executor):
    """An executor that runs each job when it is submitted, in the same process."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True, kw_only=True)
class Workers:
    """An executor, and how to use it."""

    executor: Executor
    count: int
    """Number of jobs that run at the same time."""
    resume_hint: str
    """Tells users how to resume an interrupted run; the end of error messages."""

    def map(self, function: Callable[[T], R], jobs: Iterable[T]) -> Iterator[R]:
        """Yield results in the order of the jobs, of which some are submitted in advance.

        ``Executor.map`` would submit all jobs at once; Terabyte has tens of thousands.

        Raises:
            UserError: a worker died, or its disk is full.
        """
        ahead = 1 if isinstance(self.executor, InProcess) else 2 * self.count + 2
        waiting: deque[Future[R]] = deque()
        try:
            for job in jobs:
                waiting.append(self.executor.submit(function, job))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except Exception as error:
            explained = self._explained(error)
            if explained is None:
                raise
            raise explained from error

    def _explained(self, error: Exception) -> UserError | None:
        """Return an error message with a remedy; None if the error's own message is clear, or the error is
        unexpected."""
        if is_disk_full(error):
            return UserError(f"the disk is full ({one_line(error)}); make room. {self.resume_hint}")
        if isinstance(error, BrokenProcessPool):
            return UserError(
                "a worker process died: it was killed, perhaps for lack of memory (in your own script, put the call "
                f"under 'if __name__ == \"__main__\":'). {self.resume_hint}"
            )
        if isinstance(error, CancelledError) or type(error).__module__.startswith("distributed"):
            return UserError(
                f"the cluster lost a worker or its scheduler ({type(error).__name__}: {one_line(error)[:200]}). "
                f"{self.resume_hint}"
            )
        return None


@contextmanager
def open_workers(workers: int, scheduler: str | None, folder: Path, resume_hint: str) -> Iterator[Workers]:
    """Open workers for the duration of the context; jobs that have not begun by then are cancelled.

    Args:
        workers: how many processes; one works in this process.
        scheduler: the address of a Dask scheduler, which then does the work.
        folder: the working folder, which all workers must be able to open.
        resume_hint: tells users how to resume an interrupted run.

    Raises:
        UserError: the scheduler does not answer, it has no workers, or they cannot open the folder.
    """
    if scheduler is not None:
        with _dask(scheduler, folder) as (executor, count):
            yield Workers(executor=executor, count=count, resume_hint=resume_hint)
    elif workers == 1:
        yield Workers(executor=InProcess(), count=1, resume_hint=resume_hint)
    else:
        with _processes(workers) as executor:
            yield Workers(executor=executor, count=workers, resume_hint=resume_hint)


def usable_cores() -> int:
    """Return the number of cores that this process may use: a scheduler or a container may give it some of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such control group, or no quota ("max")
        return cores


@contextmanager
def _processes(workers: int) -> Iterator[Executor]:
    # Only this process holds the pipe's writing end, so it closes when this process ends for any reason, and no worker
    # outlives it.
    forks = multiprocessing.get_start_method(allow_none=True) == "fork" and threading.active_count() == 1
    context = multiprocessing.get_context("fork" if forks else "spawn")
    reader, writer = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(
        workers, context, initializer=_live_as_long_as, initargs=(reader, writer if forks else None)
    )
    if forks:
        executor.submit(int)  # forks all workers now, before this process has threads or reads with pyarrow
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        writer.close()
        reader.close()


def fork_workers() -> None:
    """Start worker processes as copies of this process, which has already loaded the libraries. Only programs may call
    this, because they know their threads: a lock that is held at the time of the fork stays locked in the copy."""
    if sys.platform == "linux":
        multiprocessing.set_start_method("fork")


def _live_as_long_as(reader: Connection, writer: Connection | None) -> None:
    import pyarrow as pa

    if writer is not None:
        # The copies of this process, which would outlive a process that is killed.
        writer.close()
        for file in LOCKED:
            file.close()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
    # Loaded modules stay; scanning them for garbage takes time.
    gc.freeze()
    # Ctrl-C reaches every process of the terminal; the process that started the workers handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # There is a process for each core; further threads would compete with them.
    pa.set_cpu_count(1)

    def wait() -> None:
        try:
            reader.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _dask(scheduler: str, folder: Path) -> Iterator[tuple[Executor, int]]:
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError(
            "--scheduler needs Dask, which is not installed: pip install 'lightning-dlrm[cluster]'"
        ) from error
    try:
        client = Client(scheduler, timeout=_CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Dask scheduler at {scheduler} ({one_line(error)}); start one with 'dask scheduler', and workers "
            "with 'dask worker ADDRESS'"
        ) from error
    with client:
        threads = sum(client.nthreads().values())
        require(threads, f"the Dask scheduler at {scheduler} has no workers; start some: dask worker {scheduler}")
        token = folder / f"token-{secrets.token_hex(8)}"
        token.touch()
        try:
            seen = client.run(Path.exists, token)
        except Exception as error:
            raise UserError(
                f"the workers of {scheduler} cannot run the job ({type(error).__name__}: {one_line(error)}); install "
                "this package on each"
            ) from error
        finally:
            token.unlink()
        for address, found in seen.items():
            require(
                found,
                f"the worker {address} cannot open {folder}: all workers must share the file system of the output "
                "(or of --work)",
            )
        # Failed jobs are not retried. (Dask retries a job whose worker dies, as often as the scheduler allows.)
        executor = client.get_executor(pure=False, retries=0)
        try:
            yield executor, threads
        finally:
            executor.shutdown(wait=False)
