"""Finding configurations by name."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_dlrm.contracts.documents import YAML_FAULTS, read_yaml, yaml_fault
from lightning_dlrm.contracts.errors import UserError, listed, nearest, require
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


def replaced_classes(arguments: Sequence[str]) -> list[str]:
    """Return a sentence for each class of the network or the data that a later whole configuration replaces.

    A configuration is whole if it chooses a network. Usually it comes first, and overlays come after it.
    """
    said: list[str] = []
    chosen: dict[str, tuple[str, str]] = {}
    for name in given_configs(arguments):
        settings = flat(read_yaml(find_config(name)))
        is_whole = "model.network.class_path" in settings
        for key in ("model.network.class_path", "data.class_path"):
            found = settings.get(key)
            if found is None:
                continue
            file, before = chosen.get(key, (name, found))
            if is_whole and before.rpartition(".")[2] != found.rpartition(".")[2]:
                said.append(
                    f"{name} replaces {key} {before} of {file} by {found}, because it comes later: if that is not "
                    f"meant, give --config {name} before --config {file}"
                )
            chosen[key] = name, found
    return said


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
    options = [argument.partition("=")[0].replace(".init_args", "") for argument in arguments]
    if any(f".{option.removeprefix('--')}".endswith(f".{key}") for option in options if option.startswith("--")):
        return None
    for name in reversed(given_configs(arguments)):
        keys = (f".{found.replace('.init_args', '')}" for found in flat(read_yaml(find_config(name))))
        if any(found.endswith(f".{key}") or found.startswith(f".{key}.") for found in keys):
            return name
    return None


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their full keys, such as ``model.network.class_path``."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
