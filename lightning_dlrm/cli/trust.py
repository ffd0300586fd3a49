"""Which classes a configuration may name: decided here, before anything is imported.

A class path may come from ``PACKAGES``, from a ``*.py`` at the top of the current folder if the user's own YAML or
option names it, or from a module that the user trusts with ``--trust``. The YAML of a run or checkpoint folder may be a
stranger's: its custom classes always need ``--trust``.

``admit_arguments`` decides on the plain text of options and YAML files. jsonargparse gets the decision as its list of
import paths, so that it resolves no other name, wherever it finds it. ``check_values`` checks the objects that the
names resolve to: of ``PACKAGES`` only classes of ``KINDS`` are built, and no function is called.
"""

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any

import pytorch_lightning as pl
import pytorch_lightning.cli  # It lets configurations be read from fsspec addresses, which ends below.
import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning_fabric.plugins import CheckpointIO, ClusterEnvironment
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import LayerSync, Precision
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_dlrm.cli.configs import expand_home, find_config
from lightning_dlrm.contracts.documents import CONFIGURATION, YAML_FAULTS, parse_yaml, read_yaml
from lightning_dlrm.contracts.errors import KIND_WORDS, UserError, in_yaml, require
from lightning_dlrm.contracts.terminal import command_line
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.objectives.losses import Loss
from lightning_dlrm.optim.rules import UpdateRule
from lightning_dlrm.sharding.checkpoint import MANIFEST, REST
from lightning_dlrm.tracking.run_folder import CONFIG, METRICS, SUMMARY

PACKAGES = ("lightning_dlrm", "datamodules", "pytorch_lightning", "lightning_fabric", "torch", "torchmetrics")
"""Packages whose classes every configuration may name; those of ``lightning.pytorch`` have other base classes."""

KINDS = (
    CTRNetwork, Loss, UpdateRule, Optimizer, LRScheduler, pl.LightningDataModule, pl.Callback, Logger, Profiler,
    Strategy, Accelerator, Precision, ClusterEnvironment, CheckpointIO, LayerSync,
)  # fmt: skip
"""Base classes of what options take; of ``PACKAGES`` only these and dataclasses are built."""

_LISTED = ", ".join(PACKAGES)
_CLASS_KEYS = (
    "class_path", "network", "loss", "schedule", "table_optimizer", "dense_optimizer", "wide_optimizer", "data",
    "callbacks", "logger", "profiler", "strategy", "accelerator", "plugins",
)  # fmt: skip
"""Keys at which a dotted name is a class, or the file of a section."""
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_trusted: set[str] = set()
"""Modules beside ``PACKAGES`` that configurations may name in this process."""
_given: set[str] = set()
"""Those of them that the command line names with ``--trust``."""

set_parsing_settings(
    import_path_denylist=["*"],
    import_path_allowlist=list(PACKAGES),
    # A value whose type is not declared stays data.
    instantiate_subclass_spec_in_any=False,
    config_read_mode_fsspec_enabled=False,
)

_load_plain = get_loader("yaml")


def _load(text: str) -> Any:
    """Return the value of a YAML text as jsonargparse reads it, in files that options and files name too."""
    try:
        value = _load_plain(text)
    except YAML_FAULTS as error:
        raise yaml.YAMLError(repr(error)) from error
    if isinstance(value, (dict, list)):
        parse_yaml(text)
    return value


set_loader("yaml", _load, (yaml.YAMLError,))


# --- what is trusted -------------------------------------------------------------------------------


def take_trust(arguments: Sequence[str]) -> list[str]:
    """Trust the modules that a command line names with ``--trust``, and no others; return the other arguments.

    Raises:
        UserError: the option has no name of a module.
    """
    rest, modules = [], []
    waiting = iter(arguments)
    for argument in waiting:
        option, equals, module = argument.partition("=")
        if option != "--trust":
            rest.append(argument)
            continue
        module = module if equals else next(waiting, "")
        # A configuration that names jsonargparse could change what is trusted.
        is_name = all(part.isidentifier() for part in module.split(".")) and module.partition(".")[0] != "jsonargparse"
        require(
            is_name and not module.endswith(".py"),
            f"--trust {module}: expected the name of a module, such as --trust my_models",
        )
        require(
            _exists(module), f"--trust {module}: there is no such module, neither installed nor in the current folder"
        )
        modules.append(module)
    set_parsing_settings(import_path_denylist=sorted(_trusted))
    _trusted.clear()
    _given.clear()
    _given.update(modules)
    _trust(modules)
    return rest


def trust_options() -> list[str]:
    """Return ``--trust MODULE`` for each module that this process was told to trust or has imported."""
    modules = _given | (_trusted & sys.modules.keys())
    return [part for module in sorted(modules) for part in ("--trust", module)]


def trusting_command(command: str, *arguments: str) -> str:
    """Return a command to copy that reads a configuration or a run folder, with ``trust_options`` at its end."""
    return command_line(command, *arguments, *trust_options())


def refusal(path: str) -> str:
    """Return the message about a class path that is not trusted."""
    module = path.partition(".")[0]
    if not _exists(module):
        return f"there is no module {module} for {path}, neither installed nor in the current folder"
    return (
        f"{path} is not imported: classes come from {_LISTED}, or from a *.py in the current folder that your own "
        "YAML or option names (a YAML in a run or checkpoint folder is not your own); if you trust the module, add "
        f"--trust {module}"
    )


def _trust(modules: Iterable[str]) -> None:
    _trusted.update(modules)
    set_parsing_settings(import_path_allowlist=[*PACKAGES, *sorted(_trusted)])


def _is_trusted(path: str) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in (*PACKAGES, *_trusted))


# --- text, before anything is imported -------------------------------------------------------------


def admit_arguments(arguments: Sequence[str]) -> None:
    """Check the class paths in options and in the configurations that they name, and trust the user's own modules.

    Raises:
        UserError: a class path is not trusted, a configuration cannot be read, or a key occurs twice.
    """
    option = ""
    for argument in arguments:
        value = argument
        if argument.startswith("-"):
            option, equals, value = argument.partition("=")
            if not equals:
                continue
        if option in ("-c", "--config"):
            admit_file(find_config(value))
            option = ""
            continue
        require(not value.startswith("!!"), f"{option}: {value} has a tag of YAML; give the value without it")
        try:
            admit({option: parse_yaml(value)}, typed=True)
        except UserError as error:
            raise UserError(f"{option}: {error}") from error
        except (yaml.YAMLError, RecursionError):
            # The parser reports the fault if the option takes no text.
            continue


def admit_file(path: Path, expected: str = CONFIGURATION) -> None:
    """Check the class paths in a YAML file; see ``admit_arguments``, and ``read_yaml`` for ``expected``."""
    document = read_yaml(path, expected)
    for option in ("trust", "config"):
        require(option not in document, f"{path}: {option} is an option of the command line (--{option}), not of files")
    try:
        admit(document, typed=not _in_run_folder(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def admit(value: Any, typed: bool) -> None:
    """Check the class paths in plain values.

    Args:
        value: content of a YAML.
        typed: whether modules of the current folder are trusted if the value names them.

    Raises:
        UserError: a class path is not trusted.
    """
    for path, is_class in _dotted_names(value):
        if path.endswith(".py"):
            name = path.removesuffix(".py").strip("./").replace("/", ".")
            require(not is_class, f"{path} is a Python file; expected a class in it: give {name}.CLASS")
            continue
        if _is_trusted(path):
            continue
        module = path.partition(".")[0]
        if typed and _is_here(module):
            _trust([module])
        else:
            require(not is_class, refusal(path))


def _dotted_names(value: Any, key: Any = "", class_keys: Sequence[str] = _CLASS_KEYS) -> Iterator[tuple[str, bool]]:
    """Yield each text that may be an import path, and whether its key takes a class.

    Arguments of a class may have any names, such as ``data`` for a file; which of them take classes the parser knows.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _dotted_names(inner, name, ("class_path",) if name == "init_args" else class_keys)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _dotted_names(inner, key, class_keys)
    elif isinstance(value, str) and (_DOTTED.fullmatch(value) or value.endswith(".py")):
        takes_class = str(key).rpartition(".")[2].rstrip("+") in class_keys
        yield value, takes_class and not value.endswith((".yaml", ".yml", ".json"))
    elif isinstance(value, str) and "class_path" in value:
        # jsonargparse reads text as YAML.
        try:
            inner = parse_yaml(value)
        except (yaml.YAMLError, RecursionError):
            return
        if not isinstance(inner, str):
            yield from _dotted_names(inner, key, class_keys)


def _exists(module: str) -> bool:
    """Whether the first part of a module's name is installed or in the current folder; nothing is imported."""
    try:
        return find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _is_here(module: str) -> bool:
    """Whether a module is a ``*.py`` at the top of the current folder, and not another one of its name."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return False
    return (
        spec is not None and spec.origin is not None and Path(spec.origin).resolve() == Path(f"{module}.py").resolve()
    )


def _in_run_folder(path: Path) -> bool:
    """Whether a file lies in a run folder or a checkpoint, at any depth."""
    results = (METRICS, SUMMARY, "checkpoints/last", "checkpoints/best")
    return any(
        ((folder / CONFIG).exists() and any((folder / name).exists() for name in results))
        or ((folder / MANIFEST).exists() and (folder / REST).exists())
        for folder in (*path.absolute().parents, *path.resolve().parents)
    )


# --- values, before anything is built --------------------------------------------------------------


def check_values(settings: Namespace) -> None:
    """Check the values of parsed settings, and replace ``~/`` at the start of texts by the user's folder.

    Raises:
        UserError: a class of ``PACKAGES`` is of no kind that options take, a function of theirs is named, or an option
            is null that takes no None.
    """
    for name, value in vars(settings).items():
        settings[name] = _checked(value, name)


def _checked(value: Any, key: str, defaults: Sequence[Any] = ()) -> Any:
    """Return a value with its home folder; see ``check_values``.

    Args:
        value: a parsed value.
        key: its full key.
        defaults: defaults of the class that it is an argument of.
    """
    if isinstance(value, str):
        return expand_home(value)
    if type(value) in (list, tuple):
        return type(value)(_checked(item, key, defaults) for item in value)
    if isinstance(value, (Namespace, dict)):
        given = vars(value) if isinstance(value, Namespace) else value
        made = _resolved(given.get("class_path"))
        if made is not None:
            defaults = _check_class(made, given, key)
        for name, item in given.items():
            value[name] = _checked(item, f"{key}.{name}", defaults)
    elif callable(value) and not inspect.isclass(value):
        require(
            any(value is default for default in defaults) or not _is_of_packages(value),
            f"{key} names a function of {_LISTED}, of which only classes may be named: name a function in your own "
            "module that calls it",
        )
    return value


def _check_class(made: Any, given: Mapping[str, Any], key: str) -> list[Any]:
    """Check what a class path names, and that no argument is null that takes no None; return the defaults."""
    is_kind = inspect.isclass(made) and (issubclass(made, KINDS) or dataclasses.is_dataclass(made))
    is_base = any(made is kind for kind in KINDS)
    require(
        not is_base and (is_kind or not _is_of_packages(made)),
        f"{key}: {given['class_path']} is not a class that an option accepts; expected a dataclass or a class that "
        f"derives from one of {', '.join(kind.__name__ for kind in KINDS)}",
    )
    known, kinds = _arguments_of(made)
    options = given.get("init_args")
    for name, value in vars(options).items() if isinstance(options, Namespace) else ():
        kind, option = kinds.get(name, Any), f"{key}.init_args.{name}"
        if value is None and known.get(name) is not None:
            expected = KIND_WORDS.get(getattr(kind, "__name__", ""), "keys with values or a class")
            require(_takes_none(kind), f"{option} is null; expected {expected}")
        if inspect.isclass(kind) and dataclasses.is_dataclass(kind) and value is not None:
            require(isinstance(value, (Namespace, kind)), f"{option} is {in_yaml(value)}; expected keys with values")
    return list(known.values())


def _arguments_of(made: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the defaults and the types of the arguments of a function, or of a class and its base classes."""
    defaults: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for base in reversed(inspect.getmro(made)) if inspect.isclass(made) else [made]:
        function: Any = vars(base).get("__init__") if inspect.isclass(base) else base
        try:
            parameters, hints = inspect.signature(function).parameters, typing.get_type_hints(function)
        except (TypeError, ValueError, NameError, AttributeError):
            # No function of its own, one in C without a signature, or types that only type checkers import.
            continue
        defaults |= {name: parameter.default for name, parameter in parameters.items()}
        kinds |= hints
    return defaults, kinds


def _resolved(path: Any) -> Any:
    """Return what an import path names if it has been imported; else None, and it is not built."""
    if not isinstance(path, str):
        return None
    module, _, name = path.rpartition(".")
    outer, _, inner = module.rpartition(".")
    nested = getattr(sys.modules.get(outer), inner, None)
    return getattr(sys.modules.get(module, nested), name, None)


def _is_of_packages(made: Any) -> bool:
    """Whether a class or a function is defined in one of ``PACKAGES``."""
    defined = made.__module__ if inspect.isclass(made) or inspect.isroutine(made) else type(made).__module__
    return str(defined).partition(".")[0] in PACKAGES


def _takes_none(kind: Any) -> bool:
    """Whether a type includes None."""
    if typing.get_origin(kind) in (typing.Union, UnionType):
        return any(_takes_none(member) for member in typing.get_args(kind))
    return kind in (None, type(None), Any, object)
