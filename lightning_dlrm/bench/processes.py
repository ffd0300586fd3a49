"""Programs in processes of their own: a training loop that makes steps on request, and a run whose memory, CPU time
and disk space are sampled."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep
from typing import IO

import psutil

import lightning_dlrm
from datamodules.preprocess.progress import bytes_below
from lightning_dlrm.bench.gate import REPLIES, REQUESTS
from lightning_dlrm.contracts.errors import UserError

_SAMPLE_S = 0.02
_DISK_SAMPLES = 25  # samples of memory for each sample of disk space


class Worker(AbstractContextManager["Worker"]):
    """A program whose loop calls a ``Gate``; the constructor starts it and waits for its first step.

    Args:
        name: name of the program, for errors.
        command: program and arguments.
        folder: working directory of the program.

    Raises:
        UserError: the program cannot be run, or ends before its first step; the message has the last line of its error
            output.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        requests, self._to = os.pipe()
        answers, replies = os.pipe()
        source = str(Path(lightning_dlrm.__file__).parent.parent)
        paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, REQUESTS: str(requests), REPLIES: str(replies), "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(requests, replies),
            )
        except OSError as error:
            raise UserError(f"cannot run {command[0]} ({error.strerror})") from error
        finally:
            os.close(requests)
            os.close(replies)
        self._replies = os.fdopen(answers)
        self.waited: list[float] = []
        """Seconds that the loop waited for data in each call, if it reports them."""
        try:
            self._reply()
        except BaseException:
            self.__exit__(True)
            raise

    def __call__(self, steps: int) -> None:
        """Make some steps, and return when they are done.

        Raises:
            UserError: the program has ended.
        """
        os.write(self._to, f"{steps}\n".encode())
        self.waited.append(self._reply()["waited"])

    def _reply(self) -> dict[str, float]:
        line = self._replies.readline()
        if not line:
            raise _failure(self._name, self._process.wait(), self._errors)
        reply: dict[str, float] = json.loads(line)
        return reply

    def __exit__(self, kind: object, *details: object) -> None:
        """End the program by closing its requests; kill it if it does not end in time."""
        os.close(self._to)
        try:
            self._process.wait(timeout=20 if kind is None else 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()
        self._errors.close()


@dataclass
class Footprint:
    """Memory, CPU time and disk space of a process and its descendants, from samples."""

    folder: Path | None
    """Folder whose size is sampled; None for no folder."""
    peak_bytes: int = 0
    peak_disk_bytes: int = 0
    cpu_of: dict[int, float] = field(default_factory=dict)
    """Process id -> CPU seconds."""
    samples: int = 0

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all processes."""
        return sum(self.cpu_of.values())

    def sample(self, process: psutil.Process) -> None:
        """Take a sample of a process, which has not been waited for, and its descendants."""
        memory = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                found, cpu = member.memory_full_info(), member.cpu_times()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it has just ended
            # PSS, if known, counts an n-th of a page that n processes share.
            memory += getattr(found, "pss", found.rss)
            self.cpu_of[member.pid] = cpu.user + cpu.system
        self.peak_bytes = max(self.peak_bytes, memory)
        if self.folder is not None and self.samples % _DISK_SAMPLES == 0:
            self.peak_disk_bytes = max(self.peak_disk_bytes, bytes_below(self.folder))
        self.samples += 1


def run_process(name: str, command: Sequence[str], footprint: Footprint | None) -> tuple[float, str]:
    """Run a program to its end, and return its seconds and its standard output.

    Args:
        name: name of the program, for errors.
        command: program and arguments.
        footprint: collects samples while the program runs; None for a run without sampling.

    Raises:
        UserError: the program cannot be run, or fails; the message has the last line of its error output.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = perf_counter()
        try:
            process = psutil.Popen(command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise UserError(f"cannot run {command[0]} ({error.strerror})") from error
        try:
            while footprint is not None and process.poll() is None:
                footprint.sample(process)
                sleep(_SAMPLE_S)
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        seconds = perf_counter() - start
        if code:
            raise _failure(name, code, errors)
        output.seek(0)
        return seconds, output.read()


def _failure(name: str, code: int, errors: IO[str]) -> UserError:
    """Return the error of a program that has failed, with the last line of its error output."""
    errors.seek(0)
    lines = errors.read().strip().splitlines() or [f"exit code {code}"]
    return UserError(f"{name} failed: {lines[-1].removeprefix('error: ')}")
