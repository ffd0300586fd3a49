"""Several real processes, for tests of what spans ranks.

Each is forked from one server that has imported what they all need, which takes longer than most tests.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lightning_dlrm.cli.run", "datamodules.criteo", "tests.toy"])


class RankProcess:
    """``python ARGUMENTS`` in a process of its own; used as a subprocess.Popen is."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        descriptor, path = tempfile.mkstemp(prefix="rank-")
        os.close(descriptor)
        self._output = Path(path)
        self._process = _FORKS.Process(target=_run, args=(list(arguments), dict(environment), path))
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> str:
        """What it has printed so far."""
        return self._output.read_text()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """What it printed, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout, self._output.read_bytes())
        said = self._output.read_text()
        self._output.unlink()
        return said, None


def _run(arguments: list[str], environment: dict[str, str], output: str) -> None:
    with Path(output).open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ |= environment
    os.chdir(ROOT)
    import torch

    # The server has read the environment before.
    torch.set_num_threads(1)
    kind, what, *rest = arguments
    sys.argv = [what, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert kind == "-c"
        module: dict[str, Any] = {"__name__": "__main__"}
        exec(what, module)


def run_ranks(arguments: Sequence[str], ranks: int, timeout: float = 120) -> list[str]:
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


def start_ranks(arguments: Sequence[Sequence[str]]) -> list[RankProcess]:
    """Starts ``python ARGUMENTS`` for each rank, with the environment that torchrun gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        RankProcess(of_rank, os.environ | environment(rank, len(arguments), port))
        for rank, of_rank in enumerate(arguments)
    ]


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
