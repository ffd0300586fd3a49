"""Orderly termination by SIGTERM and SIGHUP."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Turn SIGTERM (sent by schedulers) and SIGHUP (sent by closed terminals) into SystemExit.

    A signal that the process ignored at its start, such as SIGHUP under ``nohup``, stays ignored. After the first
    signal, both are ignored, so that a second one does not interrupt the cleanup.

    Raises:
        SystemExit: with code 128 + the signal's number, such as 143 on SIGTERM.
    """

    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]

    def exit_once(number: int, frame: object) -> None:
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, exit_once) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
