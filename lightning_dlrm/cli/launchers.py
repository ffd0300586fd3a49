"""Processes that a launcher (torchrun, srun) has started, and jobs that SLURM stops and starts again."""

import logging
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tracking.run_folder import CONFIG, RUNS

log = logging.getLogger("lightning_dlrm")


def started_processes() -> tuple[str, int] | None:
    """Return the launcher that has started this process and how many processes it started; None without one."""
    if TorchElasticEnvironment.detect():
        return "torchrun", int(os.environ["WORLD_SIZE"])
    if SLURMEnvironment.detect():
        return "srun", int(os.environ["SLURM_NTASKS"])
    return None


def check_started_processes(world_size: int, devices: int, num_nodes: int) -> None:
    """Refuse processes that would each do the whole work.

    Args:
        world_size: processes that work together by the Trainer's settings.
        devices: of them, those on each machine.
        num_nodes: machines.

    Raises:
        UserError: a launcher has started another number of processes.
    """
    launcher, started = started_processes() or ("", world_size)
    if started == devices * num_nodes:
        return
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", str(started)))
    on_each = int(local) if local.isdecimal() and int(local) > 0 and started % int(local) == 0 else started
    nodes = started // on_each
    error = UserError(
        f"{launcher} has started {started} processes, but trainer.devices {devices} on trainer.num_nodes {num_nodes} "
        f"makes {devices * num_nodes}: give --trainer.devices {on_each}"
        f"{f' --trainer.num_nodes {nodes}' if nodes > 1 or num_nodes > 1 else ''} "
        "--trainer.strategy embedding_sharded_ddp, or start another number of processes"
    )
    error.on_all_ranks = True
    raise error


def slurm_plugins(given: Sequence[Any]) -> list[ClusterEnvironment]:
    """Return Lightning's plugin for a SLURM job, without its own saving and requeueing.

    On SIGUSR1 Lightning would save a checkpoint within the signal's handler, at any moment of a step and in a form that
    ``--resume auto`` does not read. ``StopOnSignal`` and ``requeue`` take its place.

    Args:
        given: the user's plugins; an environment among them counts.

    Raises:
        UserError: SLURM's variables contradict each other.
    """
    has_own = any(isinstance(plugin, ClusterEnvironment) for plugin in given)
    if has_own or TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    try:
        return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:
        raise UserError(f"SLURM: {' '.join(str(error).split())}") from error


def slurm_job() -> str | None:
    """Return the name by which SLURM knows this job, such as ``17`` or ``17_3`` in an array; None outside of a job and
    in interactive ones."""
    if SLURMEnvironment.job_id() is None:
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def is_requeued() -> bool:
    """Return whether SLURM has started this job before."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return slurm_job() is not None and count.isdecimal() and int(count) > 0


def run_of_requeued_job(model: str, configuration: str) -> Path | None:
    """Return the run folder that an earlier start of this job has made for a configuration; None if there is none.

    Args:
        model: name of the model in the folder's name.
        configuration: text of the ``config.yaml``.
    """
    for folder in sorted(RUNS.glob(f"slurm-{slurm_job()}-{model}-*")):
        config = folder / CONFIG
        if config.is_file() and config.read_text(encoding="utf-8") == configuration:
            return folder
    return None


def requeue() -> None:
    """Ask SLURM to start this job again."""
    job = slurm_job()
    if job is None:
        return
    try:
        # SLURM then ends this process.
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        said = " ".join(done.stderr.split()) if done.returncode else None
    except OSError as error:
        said = str(error)
    if said is None:
        log.info("asked SLURM to start job %s again", job)
    else:
        log.warning("SLURM does not start job %s again (scontrol requeue: %s)", job, said)
