"""The choice of the code that looks up and updates table rows: plain torch, C on CPUs, or Triton on GPUs."""

import importlib.util
import logging
import os
import platform
from functools import cache
from typing import Literal, get_args

import torch

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.kernels import compiled

Kernels = Literal["auto", "plain", "native", "triton"]
"""Which code looks up and updates table rows: plain torch, compiled C on a CPU, or Triton on a CUDA device. ``auto``
chooses C or Triton by the tables' device if the tables are float32 or bfloat16 and the kernels work there, else plain
torch."""

log = logging.getLogger("lightning_dlrm")


SLOW_BF16 = (
    "this processor has no AVX-512, without which matrix products in bfloat16 take many times as long as in float32"
)
"""What is said if ``bf16_is_slow``."""


def bf16_is_slow() -> bool:
    """Return whether this processor has no instructions for matrix products in bfloat16."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return on_x86 and "AVX512" not in torch.backends.cpu.get_cpu_capability()


@cache
def choose(asked: Kernels, device: str, dtype: torch.dtype) -> Literal["plain", "native", "triton"]:
    """Return the kernels for tables of a dtype on a kind of device, and log the choice once, but for the meta device.

    Raises:
        UserError: there are no such kernels, or they do not work on this machine.
    """
    require(asked in get_args(Kernels), f"kernels {asked!r} is not one of {', '.join(get_args(Kernels))}")
    if device == "meta":
        # Sizes are counted there, without values.
        return "plain"
    for_device = {"cpu": "native", "cuda": "triton"}.get(device, "plain")
    wanted = for_device if asked == "auto" else asked
    problem, broken = None, False
    if wanted != "plain" and dtype not in (torch.float32, torch.bfloat16):
        problem = f"the tables are {dtype}, and these kernels take float32 and bfloat16"
    elif wanted == "triton":
        problem = _triton_problem(device)
    elif wanted == "native" and device != "cpu":
        problem = f"the tables are on {device}, and the native kernels need a CPU"
    elif wanted == "native":
        try:
            compiled.library()
        except compiled.NativeError as error:
            problem, broken = str(error), error.broken
    require(problem is None or asked == "auto", f"kernels is {asked}, but {problem}: set it to auto or plain")
    level = logging.WARNING if broken else logging.INFO
    if problem is not None or wanted == "plain":
        slower = f", which is slower: {problem}" if problem else " (as requested)"
        log.log(level, "kernels on %s: plain torch%s", device, slower)
        return "plain"
    if wanted == "triton":
        log.info("kernels on %s: Triton", device)
        return "triton"
    log.info("kernels on %s: native, in C", device)
    return "native"


def _triton_problem(device: str) -> str | None:
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tables are on {device}, and the fused kernels need a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; torch for CUDA brings it"
    return None
