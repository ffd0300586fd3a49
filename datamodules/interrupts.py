"""Leaving in order when the system says so."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """Lets SIGTERM, as a scheduler sends it, clean up as an error does.

    Raises:
        SystemExit: with code 143, on SIGTERM.
    """

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
