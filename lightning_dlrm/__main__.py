"""``python -m lightning_dlrm COMMAND``: one entry for every command.

Commands that need no Trainer start without loading Lightning.
"""

import argparse
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from lightning_dlrm.cli import plain
from lightning_dlrm.cli.configs import nearest
from lightning_dlrm.contracts.errors import UserError, one_line

COMMANDS = {
    "fit": "train a model; ends with a validation",
    "validate": "score a checkpoint on the validation split",
    "test": "score a checkpoint on the test split",
    "predict": "write a checkpoint's click probabilities for a split, or for all",
    "params": "count parameters, FLOPs and bytes of a configuration",
    "plan": "show which rank would hold which table rows, and what the ranks would send",
    "compare": "train configurations with several seeds, or take finished runs, and show which is better",
    "checkpoint": "show what a checkpoint holds, write it in other pieces, or import one of facebookresearch/dlrm",
    "preprocess": "turn raw Criteo TSV files into a dataset folder",
    "inspect": "show what a dataset folder holds; --verify compares every checksum",
    "generate": "write generated data: a dataset folder, or raw TSV",
    "dashboard": "save a W&B workspace and report of a project's or group's runs",
    "bench": "measure the speed of a part of this project on this machine",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, or 2 after a user error.

    Args:
        arguments: arguments of the command line; None for those of this process.
    """
    if arguments is None:
        search_current_folder_last()
        plain.begin(sys.argv[1:])
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    command, *rest = arguments
    try:
        return _run(command, rest)
    except BrokenPipeError:
        # The reader of a pipe, such as ``head``, has seen enough; nothing is left to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        mistake = _user_error_in(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def search_current_folder_last() -> None:
    """Move the current folder to the end of ``sys.path``, or add it there.

    Custom classes in the current folder are then found, and a folder with the name of a package, such as
    ``datamodules`` in the user's project, does not replace that package.
    """
    here = Path.cwd()
    # A checkout that is not installed has the packages in the current folder.
    if here == Path(__file__).resolve().parents[1] or sys.flags.safe_path:
        return
    sys.path[:] = [*(folder for folder in sys.path if Path(folder).resolve() != here), str(here)]


def _user_error_in(error: BaseException | None) -> UserError | None:
    """Return the user's mistake behind an error; None if the error is not one.

    Parsing libraries wrap the errors of constructors. Refusals of Lightning count as mistakes of the user's.
    """
    while error is not None and not isinstance(error, UserError):
        if _is_refusal_of_lightning(error):
            return UserError(f"Lightning: {one_line(error)}")
        error = error.__cause__
    return error


def _is_refusal_of_lightning(error: BaseException) -> bool:
    """Whether Lightning's own code raised the error because of a setting or a missing package."""
    *_, (frame, _) = [(None, 0), *traceback.walk_tb(error.__traceback__)]
    package = "" if frame is None else frame.f_globals.get("__name__", "").partition(".")[0]
    kinds = ("MisconfigurationException", "ValueError", "ModuleNotFoundError")
    return package in ("pytorch_lightning", "lightning_fabric") and type(error).__name__ in kinds


def _run(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        raise UserError(f"no command {command}{nearest(command, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    if command == "checkpoint" and arguments[:1] == ["import"]:
        from lightning_dlrm.cli import importing

        return importing.run(arguments[1:])
    if command in ("preprocess", "inspect", "generate", "checkpoint", "dashboard", "bench"):
        return _run_plain_command(command, arguments)
    if command == "compare":
        from lightning_dlrm.compare import command as comparing

        return comparing.run(arguments)
    if command in ("params", "plan"):
        module = importlib.import_module(f"lightning_dlrm.cli.{command}")
        code: int = module.run(arguments, COMMANDS[command])
        return code
    # Importing torch and Lightning makes a million permanent objects: garbage collection takes a tenth of the start.
    gc.disable()
    from lightning_dlrm.cli import run

    gc.enable()
    return run.run(command, arguments, COMMANDS[command])


def _run_plain_command(command: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m lightning_dlrm {command}",
        description=COMMANDS[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run = plain.add_arguments(command, parser)
    return run(parser.parse_args(arguments))


def _help() -> str:
    listed = "\n".join(f"  {name:12s}{text}" for name, text in COMMANDS.items())
    return f"""usage: python -m lightning_dlrm COMMAND [options]

Click-through-rate models on Criteo with PyTorch Lightning.

commands:
{listed}

Start here, no data needed:
  python -m lightning_dlrm fit --config dlrm.yaml

Every command explains its options with --help."""


if __name__ == "__main__":
    sys.exit(main())
