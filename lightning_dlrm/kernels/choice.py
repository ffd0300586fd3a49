"""Which code looks up and updates table rows: plain torch, the reference, or the fused kernels for GPUs."""

import importlib.util
import logging
import os
from functools import cache
from typing import Literal, get_args

import torch

from lightning_dlrm.contracts.errors import UserError

log = logging.getLogger("lightning_dlrm")

Kernels = Literal["auto", "plain", "triton"]
"""``auto``: triton on a CUDA device with float32 or bfloat16 tables, else plain."""


@cache
def choose(asked: Kernels, device: str, dtype: torch.dtype) -> Literal["plain", "triton"]:
    """The kernels for tables of a type on a kind of device; says in the log which they are, once.

    Raises:
        UserError: there is no such choice, or it does not work here.
    """
    if asked not in get_args(Kernels):
        raise UserError(f"kernels {asked!r} is none of {', '.join(get_args(Kernels))}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    mistake = None
    if dtype not in (torch.float32, torch.bfloat16):
        mistake = f"the tables are {dtype}, and the fused kernels take float32 and bfloat16"
    elif device != "cuda" and not interpreted:
        mistake = f"the tables are on {device}, and the fused kernels need a CUDA device"
    elif importlib.util.find_spec("triton") is None:
        mistake = "triton is not installed; torch for CUDA brings it"
    if asked == "triton" and mistake is not None:
        raise UserError(f"kernels is triton, but {mistake}: set it to auto or plain")
    if asked == "plain" or mistake is not None or (asked == "auto" and device != "cuda"):
        if device == "cuda":
            log.info("table rows on cuda: plain kernels (%s)", "as asked" if mistake is None else mistake)
        return "plain"
    log.info("table rows on %s: fused Triton kernels", device)
    return "triton"
