"""Control of a training loop in another process: the loop makes the requested steps, then it waits.

Standard library only: the interpreter of another project imports this as well.
"""

import json
import os
import time
from collections.abc import Callable

REQUESTS, REPLIES = "BENCH_REQUESTS", "BENCH_REPLIES"
"""Environment variables with the file descriptors that the gate reads and writes.

Requests are numbers of steps, one on each line; a reply is one line after the first step, and one after all of each
request.
"""


class Gate:
    """The loop's side: the loop calls ``passed`` after each step, which waits when the requested steps are done.

    Args:
        finish: waits until the device has done the work of the steps.
    """

    def __init__(self, finish: Callable[[], object] = lambda: None) -> None:
        self._requests = os.fdopen(int(os.environ[REQUESTS]))
        self._replies = os.fdopen(int(os.environ[REPLIES]), "w", buffering=1)
        self._finish = finish
        self._left = 1
        self._start = time.perf_counter()
        self.waited = 0.0
        """Seconds that the loop has waited for data; the loop adds to it."""

    def passed(self) -> bool:
        """Count a step; return False if the loop must end."""
        self._left -= 1
        if self._left:
            return True
        self._finish()
        reply = {"seconds": time.perf_counter() - self._start, "waited": self.waited}
        self._replies.write(json.dumps(reply) + "\n")
        self._left = int(self._requests.readline() or 0)
        self.waited = 0.0
        self._start = time.perf_counter()
        return self._left > 0
