"""Options that several benchmarks share, and what follows from them: device, precision, dataset folder."""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from datamodules.folder import load_schema
from datamodules.generate.demo import DemoSettings, demo_folder, generate_demo
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.kernels.choice import choose

PRECISIONS = ("32-true", "bf16-mixed")
DEFAULT = "default: %(default)s"


def add_rounds(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    """Add ``--rounds``."""
    parser.add_argument(
        "--rounds", type=int, default=rounds, metavar="N", help=f"rounds, of which the median counts ({DEFAULT})"
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--precision``, ``--batch-size``, ``--rounds``."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help=DEFAULT)
    parser.add_argument(
        "--precision", nargs="+", default=["32-true"], choices=PRECISIONS, help="one or more, all in the same run"
    )
    parser.add_argument("--batch-size", type=int, default=2048, metavar="N", help=DEFAULT)
    add_rounds(parser)


def add_steps(parser: argparse.ArgumentParser) -> None:
    """Add ``--steps``."""
    parser.add_argument("--steps", type=int, default=20, metavar="N", help=f"steps of a round ({DEFAULT})")


def add_max_rows(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-rows``."""
    parser.add_argument("--max-rows", type=int, metavar="N", help="cut every table to N rows (default: no limit)")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset folder (default: the demo data of fit)")


def add_peer_python(parser: argparse.ArgumentParser) -> None:
    """Add ``--peer`` and ``--peer-python``."""
    parser.add_argument(
        "--peer", type=Path, metavar="DIR", help="checkout of facebookresearch/dlrm, which is timed as well"
    )
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="FILE",
        help="interpreter of the peer; it needs numpy<2, torch, scikit-learn, tensorboard (default: this one)",
    )


def check_numbers(args: argparse.Namespace) -> None:
    """Check that every number among the options is 1 or more.

    Raises:
        UserError: a number is below 1.
    """
    for name, value in vars(args).items():
        # --bag may begin with empty bags; its own check follows.
        numbers = value if isinstance(value, list) and name != "bag" else [value]
        below = [number for number in numbers if isinstance(number, int) and number < 1 and number is not False]
        if below:
            raise UserError(f"bench {args.work}: --{name.replace('_', '-')} is {below[0]}; give 1 or more")


def check(args: argparse.Namespace) -> torch.device:
    """Check the options, print which kernels ours has, and return the device.

    Raises:
        UserError: a number is below 1, there is no such device, or no such checkout.
    """
    check_numbers(args)
    check_peer(args, "dlrm_s_pytorch.py")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and torch finds no CUDA device here: use --device cpu")
    kernels = choose(getattr(args, "kernels", "auto"), args.device, torch.float32)
    print(f"kernels of ours: {kernels}")
    return torch.device(args.device)


def check_peer(args: argparse.Namespace, file: str) -> None:
    """Check that ``--peer``, if given, is a folder with a file of the peer's.

    Raises:
        UserError: the file is missing.
    """
    peer = getattr(args, "peer", None)
    if peer is not None and not (peer / file).is_file():
        raise UserError(f"--peer {peer} is not a checkout of facebookresearch/dlrm: it has no {file}")


def open_dataset(folder: Path | None) -> tuple[Path, DatasetSchema]:
    """Return a dataset folder and its schema; without a folder, make those of the demo data."""
    if folder is None:
        folder = demo_folder(DemoSettings())
        generate_demo(DemoSettings(), folder)
    return folder, load_schema(folder)


def finisher(device: torch.device) -> Callable[[], object]:
    """Return a function that waits until the device has done its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context in which Lightning runs a forward pass under a precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
