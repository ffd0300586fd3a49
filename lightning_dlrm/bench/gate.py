"""How a benchmark steers a training loop in a process of its own: so many steps, then wait.

Standard library only: the interpreter of another project imports this as well.
"""

import json
import os
import time
from collections.abc import Callable


class Gate:
    """The loop's side: it calls ``passed`` after each step, and waits inside when its steps are done.

    Args:
        requests: file descriptor to read from: how many steps to make, a number a line.
        replies: file descriptor to write to: one line after the first step, and one after all of each request.
        finish: waits until the steps' work is done, where a device does it later.
    """

    def __init__(self, requests: int, replies: int, finish: Callable[[], object] = lambda: None) -> None:
        self._requests = os.fdopen(requests)
        self._replies = os.fdopen(replies, "w", buffering=1)
        self._finish = finish
        self._left = 1
        self._start = time.perf_counter()
        self.waited = 0.0
        """Seconds that the loop says it has waited for data; it adds to this itself."""

    def passed(self) -> bool:
        """Called after each step; False when the loop is to end."""
        self._left -= 1
        if self._left:
            return True
        self._finish()
        reply = {"seconds": time.perf_counter() - self._start, "waited": self.waited}
        self._replies.write(json.dumps(reply) + "\n")
        request = self._requests.readline()
        self._left = int(request or 0)
        self.waited = 0.0
        self._start = time.perf_counter()
        return self._left > 0
