"""``python ARGUMENTS`` in processes that are forked from a server, which has imported torch and Lightning.

Importing them takes longer than most tests, so all processes of a test run share a server. The server imports packages
of others alone: each process imports ours from its own path. At its end a forked process waits for its
threads and calls what is registered to be called then. Only with ``FORKED_WHOLE_END`` in its environment does it also
free its objects as an interpreter does, which takes 1 s.
"""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = "pytorch_lightning.cli", "pyarrow.compute", "pyarrow.parquet", "requests", "scipy.stats", "wandb.sdk.launch"

INTERPRETER = "FORKED_INTERPRETER"
"""Environment variable: the ``sys.executable`` of a forked process, such as ``interpreter()``."""

FOLDER = "FORKED_FOLDER"
"""Environment variable: the folder of the server that the processes of a test run share; see ``shared_server``."""

WHOLE_END = "FORKED_WHOLE_END"
"""Environment variable: if set, a forked process frees its objects at its end."""

NETWORK = "FORKED_NETWORK"
"""Environment variable: the network namespace, by its name for ``ip``, that a forked process enters."""


class ForkedPython:
    """A process that runs ``python ARGUMENTS``; its methods are those of subprocess.Popen.

    Args:
        arguments: ``-m MODULE``, ``-c CODE`` or a script, and its arguments.
        environment: all environment variables of the process. Those that torch reads when it is imported have the
            values of the tests' own process; ``MPLBACKEND`` and ``OMP_NUM_THREADS`` have effect.
        cwd: its current folder.
        terminal: the file descriptor of its stdin, stdout and stderr; without one, stdin is empty, and a file takes
            the rest.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, terminal: int | None = None
    ) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 open as long as the process is of interest
        with Path(os.devnull).open() as nothing:
            output = self._output.fileno()
            stdio = [nothing.fileno(), output, output] if terminal is None else [terminal] * 3
            self._connection = _request(_server(), arguments, environment, cwd, stdio)
        self.pid = _receive(self._connection)
        self.returncode: int | None = None
        self.holds: object = None
        """What is kept open as long as the process is of interest."""

    def said(self) -> str:
        """What it has printed so far."""
        return os.pread(self._output.fileno(), 1 << 30, 0).decode(errors="replace")

    def communicate(self, timeout: float) -> tuple[str, None]:
        """What it printed, once it has ended."""
        self.wait(timeout)
        return self.said(), None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("python", timeout or 0)
            self.returncode = _receive(self._connection)
            # The number of the process is free from here on, and not before: a signal never reaches another process.
            self._connection.shutdown(socket.SHUT_WR)
            self._connection.recv(1)
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _request(
    address: str, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, stdio: Sequence[int]
) -> socket.socket:
    """Ask a server for a process; the connection then gives its number, and how it ends."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = {"arguments": list(arguments), "environment": dict(environment), "cwd": str(cwd)}
    data = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("i", len(data))], stdio)
    connection.sendall(data)
    return connection


def _receive(connection: socket.socket) -> int:
    number: int = struct.unpack("i", connection.recv(4, socket.MSG_WAITALL))[0]
    return number


def interpreter() -> str:
    """Return an executable for ``sys.executable`` that lets the server fork a process in place of a new Python."""
    path = Path(_server()).with_name("python")
    if not path.exists():
        # Programs of one line, such as W&B's, import nothing that takes long.
        real = f'if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\n'
        # torchrun's workers do not buffer what they print.
        real += 'if [ "$1" = -u ]; then shift; fi\n'
        # Renamed when it is complete, because other test processes look for it too.
        unfinished = path.with_name(f"python-{os.getpid()}")
        unfinished.write_text(f'#!/bin/sh\n{real}exec {sys.executable} -IS {__file__} {_server()} "$@"\n')
        unfinished.chmod(0o755)
        unfinished.rename(path)
    return str(path)


def ask(address: str, arguments: Sequence[str]) -> int:
    """Run ``python ARGUMENTS`` in a forked process with this process's streams, environment and signals."""
    connection = _request(address, arguments, os.environ, Path.cwd(), [0, 1, 2])
    pid = _receive(connection)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    code = _receive(connection)
    return code if code >= 0 else 128 - code


def shared_server() -> None:
    """Make the folder of a server for this process and all that it starts; the first that needs the server starts it.

    The server and its folder end with this process.
    """
    folder = Path(tempfile.mkdtemp(prefix="fork-"))
    os.environ[FOLDER] = str(folder)
    os.mkfifo(folder / "alive")
    # A reader sees its end when this process has ended. Opened for reading too, it waits for no reader.
    os.open(folder / "alive", os.O_RDWR)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


@cache
def _server() -> str:
    """Start the server if no process of this test run has; return the address that it listens at."""
    if FOLDER not in os.environ:
        shared_server()
    folder = Path(os.environ[FOLDER])
    address = folder / "server"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            with (folder / "alive").open() as alive:
                command = [sys.executable, __file__, str(address)]
                subprocess.run(command, stdin=alive, start_new_session=True, check=True)
            deadline = time.monotonic() + 120
            while not address.exists():
                assert time.monotonic() < deadline, "the server of forked processes does not start"
                time.sleep(0.05)
    return str(address)


def serve(address: Path) -> None:
    """Fork a process for each connection; return in each such process, with its arguments in place."""
    # Not a child of the tests' process, whose memory and time some tests measure.
    if os.fork():
        os._exit(0)
    # No folder of tests hides a package.
    del sys.path[0]
    for package in PACKAGES:
        __import__(package)
    from wandb.sdk.data_types._private import MEDIA_TMP

    # Not the first process that ends removes W&B's temporary folder, but the server.
    atexit.unregister(MEDIA_TMP.cleanup)
    MEDIA_TMP._finalizer.detach()
    # Looking through them for garbage would copy them.
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    unfinished = address.with_suffix(".new")
    listener.bind(str(unfinished))
    listener.listen()
    unfinished.rename(address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            shutil.rmtree(MEDIA_TMP.name)
            shutil.rmtree(address.parent, ignore_errors=True)
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request, stdio = _receive_request(connection)
            # This process reports how its child ends.
            pid = os.fork()
            if pid == 0:
                connection.close()
                return _become(request, stdio)
            connection.sendall(struct.pack("i", pid))
            for descriptor in stdio:
                os.close(descriptor)
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            with contextlib.suppress(OSError):
                connection.sendall(struct.pack("i", code))
                connection.recv(1)
            os.waitpid(pid, 0)
            os._exit(0)
        connection.close()


def _receive_request(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, stdio, _, _ = socket.recv_fds(connection, 4, 3)
    data = connection.recv(struct.unpack("i", size)[0], socket.MSG_WAITALL)
    return json.loads(data), stdio


def _become(request: dict[str, Any], stdio: list[int]) -> None:
    """Take over what a new process has of its own."""
    os.setsid()
    for target, descriptor in enumerate(stdio):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Files are not flushed to the disk: no test cuts the power.
    os.fsync = lambda descriptor: None
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    if NETWORK in os.environ:
        with Path("/run/netns", os.environ[NETWORK]).open() as namespace:
            entered = ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0)
            assert entered == 0, os.strerror(ctypes.get_errno())
    sys.argv = request["arguments"]
    sys.executable = os.environ.get(INTERPRETER, sys.executable)
    start = (
        "" if sys.argv[0] == "-c" else str(Path.cwd() if sys.argv[0] == "-m" else Path(sys.argv[0]).resolve().parent)
    )
    sys.path[:0] = [start, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    import matplotlib
    import torch

    if "MPLBACKEND" in os.environ:
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))


def end() -> None:
    """Run what ``sys.argv`` says and end, without freeing a million objects, whose memory would be copied for it."""
    code: object = None
    try:
        run()
    except SystemExit as error:
        code = error.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if code is None else code & 0xFF if isinstance(code, int) else 1)


def run() -> None:
    """Run what ``python`` runs with the arguments in ``sys.argv``."""
    kind, *others = sys.argv
    if kind == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, *words = others
        sys.argv = ["-c", *words]
        exec(code, {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    serve(Path(sys.argv[1]))
    (run if os.environ.get(WHOLE_END) else end)()
