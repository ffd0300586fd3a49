"""Orderly termination by SIGTERM and SIGHUP, and restoration of the handler of SIGINT."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_on_signals() -> Iterator[list[int]]:
    """Turn SIGTERM (sent by schedulers) and SIGHUP (sent by closed terminals) into SystemExit.

    SIGHUP does what SIGTERM does: a library within the context may set a handler of SIGTERM that calls the one it has
    found, and ends the work at a better moment, as Lightning does. A signal that the process ignored at its start, such
    as SIGHUP under ``nohup``, stays ignored. The handler of SIGINT, which the work may replace, is restored too. In
    other threads than the main one this has no effect.

    Returns:
        The signals received so far.

    Raises:
        SystemExit: with code 128 + the number of the first signal, such as 143 on SIGTERM.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGHUP and signal.SIGTERM in handled:
            signal.raise_signal(signal.SIGTERM)
        elif signal.getsignal(number) is handle:
            # A second signal does not interrupt the cleanup.
            signal.signal(number, signal.SIG_IGN)
            raise SystemExit(128 + received[0])

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {signal.SIGINT: signal.getsignal(signal.SIGINT)}
    previous |= {number: signal.signal(number, handle) for number in handled}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            # A handler that was not set from Python is unknown.
            if handler is not None:
                signal.signal(number, handler)
