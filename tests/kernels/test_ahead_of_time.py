"""Contract: the Triton kernels compile for the GPUs in use without a GPU at hand, and spill no registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

pytest.importorskip(
    "triton.backends.nvidia", reason="needs the compiler of Triton for NVIDIA: kernels are not compiled"
)

WIDTHS = "1,16,64,128"
"""Of linear terms, and of the shipped configurations."""


@pytest.mark.parametrize(
    ("capabilities", "widths"), [("90", "128"), pytest.param("80,90,100", WIDTHS, marks=pytest.mark.slow)]
)
def test_no_kernel_spills_registers(capabilities: str, widths: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.ahead_of_time", capabilities, widths],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= 5
    spilling = [line for line in lines if not line.endswith(" 0")]
    assert not spilling, "\n".join(spilling)
