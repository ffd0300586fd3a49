"""Contract: on a GPU, a training step mixes no devices and reads nothing back, but for what the last cases show."""

import os

from tests.forked import ForkedPython
from tests.ranks import ROOT

ERRORS = {
    # Clipping sums the rows of a gradient, whose number it must read.
    "a summed gradient": "DynamicOutputShapeException: aten.unique_consecutive.default",
    # The check itself works.
    "a constant on the host": "FakeTensorDeviceMismatchError: Expected all tensors to be on the same device",
}


def test_steps_run_on_devices_that_are_not_there() -> None:
    """In a process of its own, because it registers a device."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = ForkedPython(["-m", "tests.kernels.fake_devices"], environment, ROOT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    lines = [line for line in said.splitlines() if ": " in line]
    failed = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines if not line.endswith(": ok")}
    assert failed.keys() == ERRORS.keys(), said
    assert all(failed[case].startswith(error) for case, error in ERRORS.items()), failed
    kinds = [line.partition(":")[0] for line in lines]
    assert [kinds.count(kind) for kind in ("whole step", "built there", "on cuda", "rank of two")] == [20, 3, 1, 3]
