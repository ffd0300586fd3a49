"""Finding configurations by name."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_dlrm.contracts.documents import YAML_FAULTS, read_yaml, yaml_fault
from lightning_dlrm.contracts.errors import UserError, joined, listed, nearest, require, shown_path
from lightning_dlrm.contracts.shipped import SCHEMAS, shipped_configs, shipped_names, yaml_files_beside
from lightning_dlrm.engine.retired import log_updates, update_document, update_options


def expand_home(text: str) -> str:
    """Return a path, or an option with a path such as ``--run_dir=~/runs``, with the home folder in place of ``~``."""
    option, equals, path = text.partition("=") if text.startswith("--") else ("", "", text)
    return f"{option}{equals}{Path.home()}{path[1:]}" if path.startswith("~/") else text


def find_config(name: str) -> Path:
    """Return the path of a configuration: the file of this name, else a shipped one.

    Raises:
        UserError: there is none.
    """
    require(
        name and not name.startswith("-"),
        "--config needs a value: a YAML file, or the name of a shipped one such as dlrm.yaml",
    )
    for candidate in (Path(expand_home(name)), shipped_configs() / name):
        if candidate.is_file():
            return candidate
    if (folder := Path(expand_home(name))).is_dir():
        of_run = folder / "config.yaml"
        raise UserError(
            f"{name} is a folder; expected a YAML file{f', such as {shown_path(of_run)}' * of_run.is_file()}"
        )
    known = [*yaml_files_beside(name), *(one for one in shipped_names() if not one.startswith(SCHEMAS))]
    # The common ending must not count as similarity.
    wanted = name.removesuffix(".yaml") + ".yaml"
    suggestion = nearest(wanted, known, cutoff=0.8)
    if not suggestion and "/" in name:
        raise UserError(f"no configuration {name} here; give a YAML file, or a shipped name such as dlrm.yaml")
    models = [one for one in shipped_names() if "/" not in one]
    raise UserError(f"no configuration {name} here{suggestion or f'; the shipped ones are {listed(models, most=40)}'}")


def resolve_config_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the configurations after ``--config`` found, and everything in today's form.

    A name becomes a path. A file with settings of an earlier release becomes the text of an updated document.

    Raises:
        UserError: there is no configuration of this name, or it is for another command.
    """
    for argument in arguments:
        # argparse would read -config as -c with the value onfig.
        if re.fullmatch(r"-[A-Za-z][\w-]+", argument):
            raise UserError(f"unknown option {argument}; options begin with two dashes: -{argument}")
    try:
        resolved, notes = update_options(arguments)
    except UserError:
        raise
    except (*YAML_FAULTS, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"an option is not YAML: {yaml_fault(error)}") from error
    log_updates("command line", notes)
    for i, argument in enumerate(resolved):
        if argument in ("--config", "-c") and i + 1 < len(resolved):
            resolved[i + 1] = _resolve_run_config(resolved[i + 1])
        elif argument.startswith("--config="):
            resolved[i] = f"--config={_resolve_run_config(argument.removeprefix('--config='))}"
    return resolved


def _resolve_run_config(name: str) -> str:
    path = find_config(name)
    content = read_yaml(path)
    require(
        "arms" not in content,
        f"{name} is an experiment of several runs: python -m lightning_dlrm compare --config {name} --output DIR",
    )
    require(
        not {"label", "columns"} <= set(content),
        f"{name} is the schema of a raw log: python -m lightning_dlrm preprocess --schema {name} --input FILES "
        "--output DIR",
    )
    for key, value in flat(content).items():
        require(
            not key.endswith("class_path") or value is None or isinstance(value, str),
            f"{name}: {key} is {value}; expected the name of a class, such as DLRM",
        )
    document, notes = update_document(content)
    log_updates(name, notes)
    return yaml.safe_dump(document, sort_keys=False) if notes else str(path)


_NETWORK = "model.network.class_path"
_CLASSES = (_NETWORK, "data.class_path")


def replaced_settings(arguments: Sequence[str]) -> list[str]:
    """Return a sentence for each configuration of which a later whole configuration replaces settings.

    A configuration is whole if it chooses a network. Usually it comes first, and overlays come after it. Of an earlier
    whole configuration only the classes of the network and the data count.

    Raises:
        UserError: all settings of an overlay are replaced.
    """
    said: list[str] = []
    names = given_configs(arguments)
    files = [(name, flat(read_yaml(find_config(name)))) for name in names]
    for i, (name, settings) in enumerate(files):
        for later, whole in files[i + 1 :]:
            if _NETWORK not in whole or name in names[i + 1 :]:
                continue
            replaced = [key for key in _replaced(settings, whole) if _NETWORK not in settings or key in _CLASSES]
            if not replaced:
                continue
            remedy = f"give --config {later} before --config {name}"
            has_effect = any(key not in whole and key not in replaced for key in settings)
            require(
                has_effect or _NETWORK in settings,
                f"{later} replaces all settings of {name}, because it comes later: {remedy}",
            )
            words = joined([f"{key} {settings[key]}" for key in replaced[:3]], "and")
            more = f" and {len(replaced) - 3} more settings" if len(replaced) > 3 else ""
            said.append(
                f"{later} replaces {words}{more} of {name}, because it comes later: if that is not meant, {remedy}"
            )
    return said


def _replaced(settings: Mapping[str, Any], later: Mapping[str, Any]) -> list[str]:
    """Return the keys of settings that have other values later, or belong to a class that is replaced; classes of
    the network and the data first."""
    changed = [key for key, value in settings.items() if key in later and later[key] != value]
    of_class = tuple(f"{key.removesuffix('class_path')}init_args." for key in changed if key.endswith(".class_path"))
    found = [key for key in settings if key in changed or key.startswith(of_class)]
    return sorted(found, key=lambda key: key not in _CLASSES)


def given_configs(arguments: Sequence[str]) -> list[str]:
    """Return the configurations among the arguments of a command line, as they are typed."""
    names = []
    for option, value in itertools.pairwise([*arguments, ""]):
        if option in ("--config", "-c"):
            names.append(value)
        elif option.startswith("--config="):
            names.append(option.removeprefix("--config="))
    return names


def file_with_key(arguments: Sequence[str], key: str) -> str | None:
    """Return the last configuration among the arguments that has a key; None if an option has it, or no file.

    Args:
        arguments: of a command line.
        key: a full key, or its last parts.
    """
    if option_with_key(arguments, key) is not None:
        return None
    key = key.replace(".init_args", "")
    for name in reversed(given_configs(arguments)):
        keys = (f".{found.replace('.init_args', '')}" for found in flat(read_yaml(find_config(name))))
        if any(found.endswith(f".{key}") or found.startswith(f".{key}.") for found in keys):
            return name
    return None


def option_with_key(arguments: Sequence[str], key: str) -> str | None:
    """Return the last option among the arguments that sets a key or shows its help, as it is typed; None if there is
    none.

    Args:
        arguments: of a command line.
        key: a full key, or its last parts.
    """
    key = key.replace(".init_args", "")
    for option in reversed([argument.partition("=")[0] for argument in arguments if argument.startswith("--")]):
        name = f".{option.removeprefix('--').removesuffix('+').replace('.init_args', '')}"
        if name.endswith((f".{key}", f".{key}.help")):
            return option.removesuffix("+")
    return None


def with_option_as_typed(message: str, arguments: Sequence[str]) -> str:
    """Return a message about a key as one about the option that sets it, if an option does.

    >>> with_option_as_typed("ranks is zero; expected a whole number", ["--ranks", "zero"])
    '--ranks is zero; expected a whole number'
    """
    found = re.match(r"([\w.]+)(?= is | takes |: )", message)
    # A file or folder may have the name of an option.
    option = None if found is None or found[1] in arguments else option_with_key(arguments, found[1])
    return message if found is None or option is None else f"{option}{message[found.end() :]}"


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their full keys, such as ``model.network.class_path``."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
