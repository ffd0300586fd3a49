"""Running a program and sampling its memory, CPU time and disk space."""

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep

import psutil

from datamodules.preprocess.progress import bytes_below
from lightning_dlrm.contracts.errors import UserError

_SAMPLE_S = 0.02
_DISK_SAMPLES = 25  # samples of memory for each sample of disk space


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
        """Take a sample of a process and its descendants."""
        memory = 0
        for member in _family(process):
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


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def run_process(command: Sequence[str], footprint: Footprint | None) -> tuple[float, str]:
    """Run a program to its end, and return its seconds and its standard output.

    Args:
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
        output.seek(0)
        errors.seek(0)
        if code:
            lines = errors.read().strip().splitlines() or [f"exit code {code}"]
            raise UserError(f"{' '.join(command[:4])} failed: {lines[-1]}")
        return seconds, output.read()
