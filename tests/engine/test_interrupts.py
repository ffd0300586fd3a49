"""Contract: what cleans up after an error cleans up after SIGTERM and SIGHUP too, and nohup keeps its word."""

import os
import signal

import pytest

from lightning_dlrm.contracts.interrupts import exit_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_through_the_door_of_errors(number: signal.Signals) -> None:
    before, cleaned = signal.getsignal(number), []
    with pytest.raises(SystemExit) as left, exit_on_signals():
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(number)
    assert left.value.code == 128 + number and cleaned == [number]
    assert signal.getsignal(number) is before


def test_a_second_signal_does_not_end_the_cleaning_up() -> None:
    before, cleaned = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)], []
    with pytest.raises(SystemExit) as left, exit_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            for number in (signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
                cleaned.append(number)
    assert left.value.code == 128 + signal.SIGHUP and cleaned == [signal.SIGTERM, signal.SIGHUP]
    assert [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)] == before


def test_a_library_that_handles_sigterm_ends_the_work_on_sighup_too() -> None:
    seen: list[int] = []
    with exit_on_signals() as received:
        ours = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda number, frame: (seen.append(number), ours(number, frame)))
        os.kill(os.getpid(), signal.SIGHUP)
        assert seen == [signal.SIGTERM] and received[0] == signal.SIGHUP
        signal.signal(signal.SIGTERM, ours)
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)
        assert left.value.code == 128 + signal.SIGHUP, "the first signal counts"
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sighup_counts_where_sigterm_is_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as left, exit_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
        assert left.value.code == 128 + signal.SIGHUP
    finally:
        signal.signal(signal.SIGTERM, before)
