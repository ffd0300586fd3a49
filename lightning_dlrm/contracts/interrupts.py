"""Orderly termination by SIGTERM and SIGHUP."""

import signal
import threading
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


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Let SIGHUP do what SIGTERM does, and turn SIGTERM into SystemExit if no library handles it.

    A library within the context may set a handler of SIGTERM that calls the one it has found, and ends the work at a
    better moment, as Lightning does. SIGHUP stays ignored if it was, as under ``nohup``.

    Returns:
        The signals received so far.

    Raises:
        SystemExit: with code 128 + the number of the first signal.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGHUP:
            signal.raise_signal(signal.SIGTERM)
        elif signal.getsignal(signal.SIGTERM) is handle:
            # A second signal does not interrupt the cleanup.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise SystemExit(128 + received[0])

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in handled}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
