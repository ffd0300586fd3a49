"""A training loop in another process that makes steps on request."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import lightning_dlrm
from lightning_dlrm.contracts.errors import UserError

REQUESTS, REPLIES = "BENCH_REQUESTS", "BENCH_REPLIES"
"""Environment variables with the numbers of the gate's file descriptors."""


class Worker(AbstractContextManager["Worker"]):
    """A program whose loop calls a ``Gate``; the constructor starts it and waits for its first step.

    Args:
        command: program and arguments.
        folder: working directory of the program.
        environment: variables in addition to those of this process.

    Raises:
        UserError: the program cannot be run, or ends before its first step; the message has the last line of its error
            output.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        requests, self._to = os.pipe()
        self._from, replies = os.pipe()
        source = str(Path(lightning_dlrm.__file__).parent.parent)
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        gate = {REQUESTS: str(requests), REPLIES: str(replies), "PYTHONPATH": os.pathsep.join(paths)}
        self._command = command
        try:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **gate, **(environment or {})},
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
        self._replies = os.fdopen(self._from)
        self.waited: list[float] = []
        """Seconds that the loop waited for data in each call, if it reports them."""
        try:
            self._reply()
        except BaseException:
            self.__exit__(None, None, None)
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
            code = self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or [f"exit code {code}"]
            raise UserError(f"{' '.join(self._command[:4])} failed: {lines[-1]}")
        reply: dict[str, float] = json.loads(line)
        return reply

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the program by closing its requests; kill it if it does not end in time."""
        os.close(self._to)
        try:
            self._process.wait(timeout=20 if kind is None else 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()
        self._errors.close()
