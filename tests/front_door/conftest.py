"""Commands as a user types them: real processes, in an empty folder, of a wheel that is built and unpacked here."""

import fcntl
import os
import struct
import subprocess
import sys
import termios
import threading
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.caches import new_cache
from tests.forked import ForkedPython

REPOSITORY = Path(__file__).parents[2]

SMALL_DATA = """\
# Demo data on which a step takes milliseconds; the network is as it ships.
data:
  init_args:
    batch_size: 64
    demo: {train_rows: 2048, validation_rows: 512, test_rows: 256, max_table_rows: 100}
checkpoint: {every_n_steps: 5}
trainer: {val_check_interval: 20, log_every_n_steps: 4}
"""
TINY = f"""\
model:
  network:
    init_args: {{embedding_dim: 4, bottom_mlp: [8, 4], top_mlp: [8]}}
{SMALL_DATA}"""
"""A small network on these data, which trains within a second."""


@dataclass
class Finished:
    """What a process left: its exit code, and stdout and stderr together."""

    code: int
    output: str


@dataclass(frozen=True)
class Shell:
    """Starts commands in a folder with the installed wheel."""

    folder: Path
    environment: dict[str, str]

    def run(self, arguments: list[str], terminal: bool = False, timeout: float = 300) -> Finished:
        """Run a command to its end; its input and output are a pseudo-terminal, or nothing and a pipe."""
        if not terminal:
            done = subprocess.run(
                arguments,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
            return Finished(done.returncode, done.stdout.decode(errors="replace"))
        return self.on_terminal(
            lambda terminal: subprocess.Popen(
                arguments, cwd=self.folder, env=self.environment, stdin=terminal, stdout=terminal, stderr=terminal
            ),
            timeout,
        )

    def on_terminal(self, start: Callable[[int], subprocess.Popen[bytes] | ForkedPython], timeout: float) -> Finished:
        """Run what ``start`` starts on a pseudo-terminal, whose file descriptor it gets."""
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        process = start(theirs)
        os.close(theirs)
        chunks: list[bytes] = []
        reader = threading.Thread(target=_read_all, args=(ours, chunks))
        reader.start()
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
            reader.join(10)
            os.close(ours)
        return Finished(code, b"".join(chunks).decode(errors="replace"))

    def python(self, *arguments: str, terminal: bool = False) -> Finished:
        """Run this interpreter."""
        return self.run([sys.executable, *arguments], terminal)

    def cli(self, *arguments: str, terminal: bool = False, timeout: float = 300) -> Finished:
        """Run ``python -m lightning_dlrm`` in a process that has torch and Lightning imported already."""
        command = ["-m", "lightning_dlrm", *arguments]
        if terminal:
            return self.on_terminal(lambda end: ForkedPython(command, self.environment, self.folder, end), timeout)
        return self.forked(command, self.environment, timeout)

    def forked(self, arguments: list[str], environment: Mapping[str, str], timeout: float) -> Finished:
        """Run ``python ARGUMENTS`` in a process that has torch and Lightning imported already."""
        process = ForkedPython(arguments, environment, self.folder)
        try:
            return Finished(process.wait(timeout), process.said())
        finally:
            process.kill()


def _read_all(descriptor: int, chunks: list[bytes]) -> None:
    while True:
        try:
            chunk = os.read(descriptor, 65_536)
        except OSError:  # Linux: the last process that has the terminal open has ended
            return
        if not chunk:
            return
        chunks.append(chunk)


def asked_for(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """Return the values of a parameter that this session runs a module's tests with."""
    items: list[Any] = request.session.items
    calls = [item.callspec.params for item in items if item.fspath == request.fspath and hasattr(item, "callspec")]
    return [call[name] for call in calls if name in call]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel of this checkout is installed into."""
    built, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site-packages")
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    made = subprocess.run([sys.executable, "-c", build, built], cwd=REPOSITORY, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope="session")
def shell_environment(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user who has nothing but the wheel and its dependencies."""
    home = tmp_path_factory.mktemp("home")
    unset = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "COLUMNS", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return kept | {
        "PYTHONPATH": str(installed),
        "LIGHTNING_DLRM_CACHE": new_cache(tmp_path_factory.getbasetemp() / "cache"),
        "NETRC": str(home / "netrc"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def shell(shell_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A shell in an empty folder, shared by the tests of a module."""
    return Shell(tmp_path_factory.mktemp("work"), shell_environment)
