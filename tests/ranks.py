"""Several real processes, for tests of what spans ranks."""

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_dlrm.sharding.collectives import reserve_port
from tests.forked import ForkedPython

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(arguments: Sequence[str], ranks: int, timeout: float = 300) -> list[str]:
    """Runs ``python ARGUMENTS`` once for each rank, with the environment that torchrun gives.

    Returns:
        What each rank printed; with an exit code other than 0 of any, fails with all of it.
    """
    processes = start_ranks([arguments] * ranks)
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return outputs


def start_ranks(arguments: Sequence[Sequence[str]]) -> list[ForkedPython]:
    """Starts ``python ARGUMENTS`` for each rank, with the environment that torchrun gives."""
    held = reserve_port()
    processes = [
        ForkedPython(of_rank, os.environ | environment(rank, len(arguments), held.getsockname()[1]), ROOT)
        for rank, of_rank in enumerate(arguments)
    ]
    processes[0].holds = held
    return processes


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun gives a rank, of several on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
