"""Processes of an experiment's runs: the commands that a user would type, several at a time, each on a device."""

import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.interrupts import exit_on_signals
from lightning_dlrm.engine.progress import Lines
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.lock import FolderLock
from lightning_dlrm.tracking.run_folder import RunFolder

POLL_SECONDS = 0.5
STOP_SECONDS = 60.0
"""Seconds in which a process must end after SIGTERM."""
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Job:
    """The commands of a run, in their order."""

    name: str
    commands: Sequence[Sequence[str]]
    """Arguments of ``python -m lightning_dlrm``."""
    run: Path
    """Run folder."""
    log: Path
    """File for the output of the processes."""
    samples: float = 0.0
    """Samples that the fit trains on; infinity if unknown."""
    scored: float = 0.0
    """Samples that the last command scores."""


@dataclass(kw_only=True)
class _Running:
    """A job with its running process."""

    job: Job
    slot: int
    waiting: list[Sequence[str]]
    log: IO[bytes]
    lock: FolderLock
    process: subprocess.Popen[bytes] | None = None
    began: int = 0
    """Size of the log when the process began."""


def device_environments(parallel: int | None, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Return the environments of the processes that run at a time: each has a GPU, or else a share of the cores.

    Args:
        parallel: processes at a time; None for one for each GPU, or one.
        gpus: names of GPUs for CUDA_VISIBLE_DEVICES; empty if runs use none, or several each.
    """
    count = parallel or max(1, len(gpus))
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(count)]
    if count == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{}] * count
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{"OMP_NUM_THREADS": str(max(1, cores // count))}] * count


def run_jobs(jobs: Sequence[Job], environments: Sequence[Mapping[str, str]], done: Callable[[Job], None]) -> None:
    """Run all jobs; if one fails, the others continue, because they may take days.

    SIGTERM, SIGHUP and Ctrl-C are passed on to the processes, which save whole checkpoints.

    Args:
        jobs: jobs in the order in which they begin.
        environments: variables of the processes that run at a time: see ``device_environments``.
        done: called after each job that succeeds; if it raises UserError, the job has failed.

    Raises:
        UserError: jobs have failed, or another process works on one of the runs.
    """
    waiting, free, running = deque(jobs), deque(range(len(environments))), list[_Running]()
    failed: list[tuple[Job, str]] = []
    progress = _Progress(jobs)
    with exit_on_signals():
        try:
            while waiting or running:
                while waiting and free:
                    running.append(_begin(waiting.popleft(), free.popleft()))
                for each in list(running):
                    code = None if each.process is None else each.process.poll()
                    if each.process is not None and code is None:
                        continue
                    if code or not each.waiting:
                        _close(each)
                        running.remove(each)
                        free.append(each.slot)
                        if code:
                            failed.append((each.job, f"ended with code {code}: {_last_line(each.job.log)}"))
                        else:
                            try:
                                done(each.job)
                            except UserError as error:
                                failed.append((each.job, f"left no usable results: {error}"))
                        progress.done(each.job)
                    else:
                        _next_command(each, environments[each.slot])
                progress.show(running)
                time.sleep(POLL_SECONDS if running else 0)
        except (KeyboardInterrupt, SystemExit):
            progress.close()
            print("interrupted: stopping the runs; the same command continues them", file=sys.stderr, flush=True)
            raise
        finally:
            progress.close()
            _stop(running)
    if failed:
        listed = "\n".join(f"  {job.name} {why} (complete output in {job.log})" for job, why in failed)
        raise UserError(
            f"{len(failed)} of {len(jobs)} runs failed; the others are kept. The same command continues with the "
            f"failed runs; to compare without them, give the folders of the others in place of --config:\n{listed}"
        )


def _begin(job: Job, slot: int) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    # A fit locks its run folder; this lock lasts from the first command of the run to its last one.
    lock = FolderLock(job.run, job.log.with_suffix(".lock")).acquire()
    return _Running(job=job, slot=slot, waiting=list(job.commands), log=job.log.open("ab"), lock=lock)


def _next_command(each: _Running, environment: Mapping[str, str]) -> None:
    arguments = each.waiting.pop(0)
    each.began = each.job.log.stat().st_size
    each.process = subprocess.Popen(
        [sys.executable, "-m", "lightning_dlrm", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=each.log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        # Ctrl-C reaches this process only, which passes it on.
        start_new_session=True,
    )


def _close(each: _Running) -> None:
    each.log.close()
    each.lock.release()


def _stop(running: Sequence[_Running]) -> None:
    for each in running:
        if each.process is not None and each.process.poll() is None:
            each.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for each in running:
        if each.process is not None:
            try:
                each.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.process.kill()
        _close(each)


def _last_line(log: Path) -> str:
    """Return the error of a process in one line, or its last line of output."""
    said = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("error: ")]
    return (errors or said or ["no output"])[-1].removeprefix("error: ")


def _tail(path: Path, first: int = 0) -> str:
    """Return the end of a file, from byte ``first`` on."""
    try:
        with path.open("rb") as file:
            file.seek(max(first, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


class _Progress:
    """One bar over all runs: trained and scored samples, remaining time, and the active runs."""

    # Names come last, because a line that is too long for the terminal is cut at its end.
    FORMAT = "{percentage:3.0f}%|{bar:10}| {elapsed}<{remaining}{postfix}"

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._finished = 0
        self._seen = {job.name: min(trained_samples(job.run), job.samples) for job in jobs}
        total = sum(job.samples + job.scored for job in jobs)
        bar = tqdm if sys.stderr.isatty() else Lines
        self._bar = bar(
            total=int(total) if total != float("inf") else None,
            initial=int(sum(self._seen.values())),
            unit=" samples",
            unit_scale=True,
            bar_format=self.FORMAT,
            # Starts and evaluations report no samples, so the rate is the mean over the whole time.
            smoothing=0,
            dynamic_ncols=True,
            disable=not jobs,
        )

    def done(self, job: Job) -> None:
        self._finished += 1
        if job.samples != float("inf"):
            self._seen[job.name] = job.samples + job.scored

    def show(self, running: Sequence[_Running]) -> None:
        at = []
        for each in running:
            job = each.job
            seen, total = min(trained_samples(job.run), job.samples), job.samples
            self._seen[job.name] = seen
            phase, start = "", ": starting"
            if not each.waiting:
                seen, total = job.scored * scored_share(job.log, each.began), job.scored
                phase, start = ": scoring", ": starting to score"
                self._seen[job.name] += seen
            # A process that starts has no share yet.
            share = f" {100 * seen / total:.0f}%" if 0 < total < float("inf") else ""
            at.append(f"{job.name}{phase}{share}" if seen > 0 else f"{job.name}{start}")
        self._bar.set_postfix_str(", ".join([f"{self._finished}/{len(self._jobs)} runs", *at]), False)
        # The time changes even if no sample is new.
        self._bar.update(int(sum(self._seen.values())) - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def scored_share(log: Path, first: int) -> float:
    """Return the share of its batches that a running ``predict`` has logged, from byte ``first`` of its log on."""
    counts = re.findall(r"^predict .* batches (\d+)/([1-9]\d*) ", _tail(log, first), re.MULTILINE)
    return int(counts[-1][0]) / int(counts[-1][1]) if counts else 0.0


def trained_samples(run: Path) -> float:
    """Return the number of samples that a run has logged so far."""
    for line in reversed(_tail(RunFolder(run).metrics).splitlines()):
        try:
            return float(json.loads(line)[names.SAMPLES])
        except (ValueError, KeyError, TypeError):
            # An incomplete line: one that is being written, or the first line of the tail.
            continue
    return 0.0
