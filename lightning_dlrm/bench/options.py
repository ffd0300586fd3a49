"""What several benchmarks have in common: their options, and the device that they run on."""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.kernels.choice import choose

PRECISIONS = ("32-true", "bf16-mixed")


def add_device_arguments(parser: argparse.ArgumentParser, batch_size: int = 2048) -> None:
    """``--device``, ``--precision``, ``--batch-size``, ``--rounds``."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument(
        "--precision", nargs="+", default=["32-true"], choices=PRECISIONS, help="one or more, all in the same run"
    )
    parser.add_argument("--batch-size", type=int, default=batch_size, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="the median counts (default: %(default)s)")


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    """``--peer`` and ``--peer-python``."""
    parser.add_argument(
        "--peer", type=Path, metavar="PATH", help="a checkout of facebookresearch/dlrm, to time as well"
    )
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="FILE",
        help="the interpreter to run it with; it needs numpy<2, torch, scikit-learn, tensorboard (default: this)",
    )


def check(args: argparse.Namespace) -> torch.device:
    """Checks the options of both functions above, says which kernels ours has, and gives the device.

    Raises:
        UserError: a number is below 1, there is no such device, or no such checkout.
    """
    for name in ("batch_size", "rounds", "steps", "batches", "max_rows", "rows", "tables", "width"):
        if getattr(args, name, 1) < 1:
            raise UserError(f"bench: --{name.replace('_', '-')} is {getattr(args, name)}; give 1 or more")
    peer = getattr(args, "peer", None)
    if peer is not None and not (peer / "dlrm_s_pytorch.py").is_file():
        raise UserError(f"--peer {peer} is no checkout of facebookresearch/dlrm: it has no dlrm_s_pytorch.py")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device here: use --device cpu")
    kernels = choose(getattr(args, "kernels", "auto"), args.device, torch.float32)
    print(f"table rows of ours: {kernels} kernels")
    return torch.device(args.device)


def finisher(device: torch.device) -> Callable[[], object]:
    """What waits until the device has done its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """What Lightning wraps a forward pass in under a precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
