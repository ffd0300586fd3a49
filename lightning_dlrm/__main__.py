"""``python -m lightning_dlrm COMMAND``: one entry for every command.

Commands that need no Trainer start without loading Lightning.
"""

import atexit
import errno
import gc
import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_dlrm.cli.configs import expand_home, with_option_as_typed
from lightning_dlrm.cli.plain_parser import PlainParser, join_negative_values
from lightning_dlrm.cli.short_help import SHORT_HELP
from lightning_dlrm.contracts.documents import printable
from lightning_dlrm.contracts.errors import UserError, nearest_first, one_line, require
from lightning_dlrm.contracts.interrupts import exit_on_signals
from lightning_dlrm.contracts.own_code import fault_in_own_code
from lightning_dlrm.contracts.terminal import RED, emphasized, wrapped

DEBUG = "--debug"
"""Option of every command: raise errors, so that Python shows their tracebacks."""
COMMANDS = {
    "fit": "train a model; ends with a validation",
    "validate": "score a checkpoint on the validation split",
    "test": "score a checkpoint on the test split",
    "predict": "write a checkpoint's click probabilities for one split or all",
    "params": "count parameters, FLOPs and bytes of a configuration",
    "plan": "show the rows that each rank would hold, and what it would send",
    "compare": "train configurations over several seeds and show which is better",
    "checkpoint": "show, rewrite or import a checkpoint",
    "preprocess": "turn raw click logs into a dataset folder, or infer a schema",
    "inspect": "show the contents of a dataset folder; --verify checks every file",
    "generate": "write generated data: a dataset folder, or raw logs",
    "dashboard": "save a W&B workspace and report of a project's or group's runs",
    "bench": "measure the speed of a part of this project on this machine",
}

# Commands on argparse: the module, the function that adds the options, and the function that takes what they parse to.
_PLAIN = {
    "preprocess": ("datamodules.preprocess.command", "add_arguments", "run"),
    "inspect": ("datamodules.preprocess.inspect_command", "add_arguments", "run"),
    "generate": ("datamodules.generate.command", "add_arguments", "run"),
    "checkpoint": ("lightning_dlrm.cli.checkpoint", "add_arguments", "run"),
    "dashboard": ("lightning_dlrm.cli.dashboard", "add_arguments", "run"),
    "bench": ("lightning_dlrm.bench.command", "add_arguments", "run"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, or 2 after a user error.

    Args:
        arguments: arguments of the command line; None for those of this process.
    """
    own_process = arguments is None
    if own_process:
        _prepare_streams()
        search_current_folder_last()
    given = sys.argv[1:] if arguments is None else arguments
    shows_tracebacks = DEBUG in given
    # Shells replace ~ at the start of a word only.
    arguments = join_negative_values([expand_home(argument) for argument in given if argument != DEBUG])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(_version())
        return 0
    command, *rest = arguments
    try:
        if own_process and command == "preprocess":
            _imported("datamodules.preprocess.workers").fork_workers()
        return _run(command, rest)
    except BrokenPipeError:
        # The reader of a pipe, such as ``head``, has closed it; there is nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        mistake = _user_error_in(error) or _mistake_in_own_code(error)
        if mistake is None or shows_tracebacks:
            raise
        if _is_printed_here(mistake):
            message = _with_paths_as_typed(with_option_as_typed(str(mistake), arguments), arguments)
            lines = wrapped([f"error: {printable(message)}"], sys.stderr)
            print(lines.replace("error:", emphasized("error:", sys.stderr, RED), 1), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _with_paths_as_typed(message: str, arguments: Sequence[str]) -> str:
    """Return a message with the relative paths among the arguments in place of their absolute forms."""
    for argument in arguments:
        path = Path(argument.rpartition("=")[2])
        if path != Path() and not path.is_absolute():
            message = message.replace(str(path.absolute()), str(path))
    return message


def _is_printed_here(mistake: UserError) -> bool:
    """Whether this rank prints an error, which other ranks may have too."""
    if mistake.on_all_ranks:
        return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    collectives = sys.modules.get("lightning_dlrm.sharding.collectives")
    return collectives is None or collectives.is_first_to_report(str(mistake))


def _prepare_streams() -> None:
    """Replace closed standard streams, whose numbers the next open files would get, by the null device; escape
    characters that an encoding lacks."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 (open as long as the process lives)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        encoding = sys.stderr.encoding
        sys.stderr = _StandardError(
            sys.stderr.detach(), encoding=encoding, errors="backslashreplace", line_buffering=True
        )


class _StandardError(io.TextIOWrapper):
    """Standard error whose reader may go away, as a pipe or a terminal: the work goes on without it."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


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
    """Return the user's mistake behind an error; None if the error is not a mistake of the user.

    Parsing libraries wrap the errors of constructors. Errors of the system about a file and refusals of Lightning count
    as mistakes of the user.
    """
    seen = set()
    # A library may raise an error from itself.
    while error is not None and not isinstance(error, UserError) and id(error) not in seen:
        seen.add(id(error))
        if _is_lack_of_memory(error):
            return UserError(f"not enough memory: {one_line(error)}; free memory, or give smaller sizes")
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            return UserError(f"{error.filename}: {error.strerror}; check the path, its permissions and free space")
        if isinstance(error, SyntaxError) and error.filename:
            return UserError(f"{error.filename}, line {error.lineno}: {error.msg}; correct this file")
        if isinstance(error, UnicodeEncodeError):
            return UserError(f"a name cannot be written in {error.encoding}: set PYTHONUTF8=1, or use ASCII names")
        if _is_refusal_of_lightning(error):
            if long := re.match(r"`val_check_interval` \((\d+)\) must be .*batches \((\d+)\)", one_line(error)):
                return UserError(
                    f"trainer.val_check_interval is {long[1]}, but an epoch has {int(long[2]):,} batches; "
                    "give at most this number, or set trainer.check_val_every_n_epoch to null to count across epochs"
                )
            place, cause = fault_in_own_code(error)
            return UserError(f"Lightning: {one_line(error)}" if place is None else f"{place}: {cause}")
        if invalid := re.match(r"An invalid dataloader was returned from `([\w.]+)\(\)`", str(error)):
            return UserError(
                f"{invalid[1]} returns no dataloader; expected a DataLoader, or another iterable of batches "
                "that is no list: correct this method"
            )
        error = error.__cause__
    return error if isinstance(error, UserError) else None


def _mistake_in_own_code(error: BaseException) -> UserError | None:
    """Return where the user's own code, such as a network, raised an error, and which; None if it did not.

    Parsing libraries wrap the errors of constructors.
    """
    root = error
    while root.__cause__ is not None and root.__cause__ is not root:
        root = root.__cause__
    place, cause = (None, "") if isinstance(root, (UserError, SyntaxError)) else fault_in_own_code(root)
    return None if place is None else UserError(f"{place}: {cause}; {DEBUG} shows the whole traceback")


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated; torch has a class of errors for GPUs only."""
    cpu = type(error) is RuntimeError and "can't allocate memory" in str(error)
    system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return cpu or system or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _is_refusal_of_lightning(error: BaseException) -> bool:
    """Whether Lightning's own code raised the error because of a setting or a missing package."""
    *_, (frame, _) = [(None, 0), *traceback.walk_tb(error.__traceback__)]
    package = "" if frame is None else frame.f_globals.get("__name__", "").partition(".")[0]
    kinds = ("MisconfigurationException", "ValueError", "ModuleNotFoundError")
    return package in ("pytorch_lightning", "lightning_fabric") and type(error).__name__ in kinds


def _run(command: str, arguments: list[str]) -> int:
    require(not command.startswith("-"), f"{command} comes before the command; write the command first, such as fit")
    require(command in COMMANDS, f"no command {command}{nearest_first(command, COMMANDS, 'the commands are')}")
    imports = command == "checkpoint" and arguments[:1] == ["import"]
    if command in _PLAIN and not imports:
        return _run_plain_command(command, arguments)
    if command == "compare" and not {"-h", "--help"}.isdisjoint(arguments):
        _imported("lightning_dlrm.compare.options").make_parser().parse_args(["--help"])
    # Other commands read configurations.
    if command in SHORT_HELP and not {"-h", "--help"}.isdisjoint(arguments):
        print(f"usage: python -m lightning_dlrm {command} [options]\n\n{SHORT_HELP[command]}")
        return 0
    arguments = ["--help" if argument == "--help.all" else argument for argument in arguments]
    arguments = _imported("lightning_dlrm.cli.trust").take_trust(arguments)
    if imports:
        return _imported("lightning_dlrm.cli.importing").run(arguments[1:])
    if command == "compare":
        return _imported("lightning_dlrm.compare.command").run(arguments)
    if command in ("params", "plan"):
        return _imported(f"lightning_dlrm.cli.{command}").run(arguments)
    return _imported("lightning_dlrm.cli.run").run(command, arguments)


def _imported(module: str) -> Any:
    """Import the module of a command, so that each command loads only what it needs."""
    if module not in sys.modules:
        # Importing torch and Lightning makes a million permanent objects. Looking through them for garbage, while they
        # are made and at the first collections after that, takes a tenth of the start.
        gc.disable()
        try:
            with exit_on_signals():
                importlib.import_module(module)
        except (KeyboardInterrupt, SystemExit):
            print("interrupted while the command was starting; nothing was written", file=sys.stderr)
            raise
        finally:
            gc.freeze()
            # Triton reports objects that are left at the end of the interpreter.
            atexit.register(gc.unfreeze)
            gc.enable()
    return sys.modules[module]


def _run_plain_command(command: str, arguments: list[str]) -> int:
    parser = PlainParser(prog=f"python -m lightning_dlrm {command}", description=COMMANDS[command])
    name, add_arguments, run = _PLAIN[command]
    module = _imported(name)
    getattr(module, add_arguments)(parser)
    return getattr(module, run)(parser.parse_args(arguments))


def _version() -> str:
    """Return the release and, in a checkout, the commit."""
    from lightning_dlrm.cli.version import code_version

    code = code_version()
    return " ".join(filter(None, ["lightning-dlrm", code["version"], code["git_commit"]]))


def _help() -> str:
    listed = "\n".join(f"  {name:12s}{text}" for name, text in COMMANDS.items())
    return f"""usage: python -m lightning_dlrm COMMAND [options]

Click-through-rate models with PyTorch Lightning, on Criteo's data or on
your own click log.

commands:
{listed}

Start here, no data needed:
  python -m lightning_dlrm fit --config dlrm.yaml

With your own click log:
  python -m lightning_dlrm preprocess --infer log.yaml --label COLUMN \\
      --input FILE

Every command explains its options with --help; fit and others like it list all
of them with --help.all. --version prints the release. With {DEBUG}, an error
also shows where in the code it was raised."""


if __name__ == "__main__":
    sys.exit(main())
