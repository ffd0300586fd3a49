"""Leaving in order when the system says so."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """Lets SIGTERM, as a scheduler sends it, and SIGHUP, as a closed terminal does, clean up as an error does.

    A signal that this process was started to ignore, as ``nohup`` does with SIGHUP, stays ignored. Where both
    come, as they may when a machine shuts down, the second does not end the cleaning up.

    Raises:
        SystemExit: with code 128 + the signal's number, such as 143 on SIGTERM.
    """

    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]

    def leave(number: int, frame: object) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
