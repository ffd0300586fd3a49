"""What has to be settled before any test imports anything, and the order of the test files."""

import atexit
import gc
import os
import signal

# Test processes share the cores: a thread that waits must not spin. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from tests.forked import shared_server

# Files are not flushed to the disk: a fit flushes some 200, which takes longer than its steps. No test cuts the power.
os.fsync = lambda descriptor: None


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        # This process starts those that run the tests.
        shared_server()
        return
    # A shell that starts the tests in the background has SIGINT ignored, and nohup has SIGHUP ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Looking for garbage among a million new objects takes a tenth of the collection.
    gc.disable()
    import torch

    if hasattr(config, "workerinput"):
        # Threads of test processes that share the cores wait for each other.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.workerinput["workercount"]))
    if not torch.cuda.is_available():
        # Triton looks at this when it is first imported, which Lightning does: its kernels then run on the CPU, for
        # tests of the fused kernels.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Before scikit-learn, after which typing gives Lightning's Optional[Union[int, float]] the order float, int, so
    # that the command line would read a limit of 1 as 1.0.
    import pytorch_lightning  # noqa: F401
    from hypothesis import settings

    # Other processes take the time of this one.
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")


LONGEST = ("tests/front_door", "tests/sharding", "tests/test_notebooks", "tests/cli")
"""Files that start many processes: with ``-n`` they begin first, so that no worker is left alone with them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()
    # Triton reports objects that are left at the end of the interpreter.
    atexit.register(gc.unfreeze)
    gc.enable()
