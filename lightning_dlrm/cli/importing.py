"""``checkpoint import``: convert parameters of facebookresearch/dlrm to a checkpoint folder."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_dlrm.cli.parser import build_model_and_data, refuse_options_of_runs
from lightning_dlrm.cli.plain_parser import HelpParser
from lightning_dlrm.cli.short_help import TRUST_HELP
from lightning_dlrm.contracts.disk import require_writable
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.engine.checkpointing import FolderCheckpointIO
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models.dlrm import DLRM, reference_state_dict
from lightning_dlrm.tracking.lock import lock_run_of

DESCRIPTION = """Make a checkpoint folder from a .pt file that facebookresearch/dlrm saved (--save-model).

The configuration must be that of the model in the file: the same widths, and data with the same tables in the
same order. Tables N and layers N of the file become column N and layer N here. Keys of a configuration are options
too, as in fit.

  python -m lightning_dlrm checkpoint import model.pt --config dlrm.yaml --data.path DIR --output imported
  python -m lightning_dlrm predict --config dlrm.yaml --data.path DIR --ckpt_path imported"""


def make_parser() -> HelpParser:
    """Return the parser of the options of this command alone."""
    parser = HelpParser(
        prog="python -m lightning_dlrm checkpoint import",
        usage="python -m lightning_dlrm checkpoint import FILE --config YAML --output DIR",
        description=DESCRIPTION,
    )
    parser.add_argument("--output", metavar="DIR", help="the new checkpoint folder")
    # Only for the list in --help: ``take_trust`` has taken it.
    parser.add_argument("--trust", metavar="MODULE", help=TRUST_HELP)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    parser = make_parser()
    if not arguments:
        parser.print_help()
        return 2
    if "--help" in arguments or "-h" in arguments:
        parser.parse_args(["--help"])
    require(
        not arguments[0].startswith("-"),
        "checkpoint import: the .pt file comes first: checkpoint import FILE --config YAML --output DIR",
    )
    source = Path(arguments[0])
    options, rest = parser.parse_known_args(arguments[1:])
    require(options.output is not None, "checkpoint import: give the new checkpoint folder with --output")
    output = Path(options.output)
    require(not output.exists(), f"{output} exists; choose another --output")
    require_writable(output, "another --output")
    refuse_options_of_runs("checkpoint import", rest)
    weights = read_published(source)
    module = build_model_and_data(rest).module
    module.configure_model()
    take_weights(module, weights, source)
    checkpoint = {
        "state_dict": module.state_dict(),
        "global_step": 0,
        "epoch": 0,
        "pytorch-lightning_version": pl.__version__,
    }
    module.on_save_checkpoint(checkpoint)
    with lock_run_of(output):
        FolderCheckpointIO().save_checkpoint(checkpoint, output)
    print(f"{module.size.total:,} parameters of {source} are in {output}: use it with --ckpt_path {output}")
    return 0


def read_published(path: Path) -> dict[str, Tensor]:
    """Return the parameters in a file of facebookresearch/dlrm by name; code in the file is not run.

    Raises:
        UserError: the file is missing, or is not of this form.
    """
    found = f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
    require(path.is_file(), f"{found}; expected what facebookresearch/dlrm wrote with --save-model")
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not a file of tensors and plain values; expected what facebookresearch/dlrm wrote with "
            "--save-model: give that file"
        ) from error
    weights: Any = content.get("state_dict") if isinstance(content, Mapping) else None
    require(
        isinstance(weights, Mapping) and all(isinstance(weight, Tensor) for weight in weights.values()),
        f"{path} has no state_dict of tensors; expected what facebookresearch/dlrm wrote",
    )
    return dict(weights)


@torch.no_grad()
def take_weights(module: CTRModule, weights: Mapping[str, Tensor], source: Path) -> None:
    """Copy published parameters into a module's DLRM.

    Raises:
        UserError: the module has another network, or the parameters have other names or shapes.
    """
    network: Any = module.network
    require(
        isinstance(network, DLRM),
        f"{source} holds a DLRM, but the configuration makes a {type(network).__name__}: use a configuration like "
        "dlrm.yaml",
    )
    ours = {name: weight for name, weight in reference_state_dict(network).items() if weight.requires_grad}
    for name in sorted(ours.keys() | weights.keys()):
        found, expected = (tuple(of[name].shape) if name in of else "missing" for of in (weights, ours))
        require(
            found == expected,
            f"{name} is {found} in {source} and {expected} in this configuration: give the widths, table settings "
            "and dataset that the file was trained with",
        )
    for name, weight in ours.items():
        weight.copy_(weights[name])


def _numpy_scalars() -> list[Any]:
    """Return the types that the published code saves beside tensors: NumPy scalars, by their names in NumPy 1 and 2."""
    scalar = np.float32(0).__reduce__()[0]
    types = [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)]
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *types]
