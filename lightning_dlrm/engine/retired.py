"""Settings of earlier releases: old configuration files and commands keep working, and the log says what changed.

Every configuration file passes through ``update_document``, and every command line through ``update_options``, before
it is parsed. They apply two tables:

- ``REMOVED``: options that no longer exist. Their keys are left out.
- ``CHANGED``: options whose value has another form now. ``rewrite`` gets the old value (a class, a dictionary with
  ``class_path`` and ``init_args``, or a plain value, as in YAML) and returns the new value; it returns a value in the
  new form unchanged. ``renamed`` lists options inside the value on the command line, such as
  ``--model.dense_optimizer.learning_rate``.

To retire an option, add an entry here; no other code handles the old form.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from lightning_dlrm.optim.compatibility import RENAMED, torch_configuration

log = logging.getLogger("lightning_dlrm")


@dataclass(frozen=True, kw_only=True)
class RemovedOption:
    """An option of an earlier release that is ignored.

    Args:
        key: full key, such as ``model.record_steps``.
        replacement: what to use in its place.
    """

    key: str
    replacement: str


@dataclass(frozen=True, kw_only=True)
class ChangedOption:
    """An option whose value has another form than in an earlier release.

    Args:
        key: full key, such as ``model.dense_optimizer``.
        rewrite: old value -> new value; returns a value in the new form unchanged.
        renamed: options inside the value on the command line, old name -> new name, both relative to ``key``.
        note: what the log says when something was changed.
    """

    key: str
    rewrite: Callable[[Any], Any]
    renamed: Mapping[str, str] = field(default_factory=dict)
    note: str


REMOVED: tuple[RemovedOption, ...] = (
    RemovedOption(key="model.record_steps", replacement="model.compile"),
    RemovedOption(key="model.cuda_graphs", replacement="model.compile"),
)
CHANGED: tuple[ChangedOption, ...] = (
    ChangedOption(
        key="model.dense_optimizer",
        rewrite=torch_configuration,
        renamed=RENAMED | {f"init_args.{old}": f"init_args.{new}" for old, new in RENAMED.items()},
        note="model.dense_optimizer is now a class of torch.optim: the update rule given here is read as that class",
    ),
    ChangedOption(
        key="model.kernels",
        rewrite=lambda value: "auto" if value == "fbgemm" else value,
        note="the value fbgemm of model.kernels was removed: auto is used instead; 'bench lookup' compares its speed "
        "with FBGEMM's",
    ),
)


def update_document(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration in today's form, and the notes for the log.

    Args:
        document: content of a configuration file; it is not modified.

    Returns:
        The configuration, and a line for each kind of change; without changes an equal copy and no line.
    """
    updated = copy.deepcopy(dict(document))
    removed = [option for option in REMOVED if _pop(updated, option.key.split("."))]
    notes = _removal_notes(removed)
    for option in CHANGED:
        *path, last = option.key.split(".")
        section = _section(updated, path)
        if last not in section:
            continue
        value = option.rewrite(copy.deepcopy(section[last]))
        if value != section[last]:
            section[last] = value
            notes.append(option.note)
    return updated, notes


def update_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return command-line arguments in today's form, and the notes for the log; see ``update_document``."""
    updated: list[str] = []
    removed: dict[str, RemovedOption] = {}
    notes: list[str] = []
    by_key = {option.key: option for option in REMOVED}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            updated.append(argument)
            continue
        key, given = name.removeprefix("--"), [argument]
        if not equals and waiting and not waiting[0].startswith("--"):
            value = waiting.pop(0)
            given = [name, value]
        if key in by_key:
            removed[key] = by_key[key]
        elif (changed := _changed_option(key, value)) is not None:
            updated += changed[0]
            notes.append(changed[1])
        else:
            updated += given
    return updated, [*_removal_notes(list(removed.values())), *dict.fromkeys(notes)]


def log_updates(source: str, notes: Sequence[str]) -> None:
    """Log a line for each kind of change in ``source``, such as the name of a file."""
    for note in notes:
        log.info("%s: %s", source, note)


def _removal_notes(removed: Sequence[RemovedOption]) -> list[str]:
    keys: dict[str, list[str]] = {}
    for option in removed:
        keys.setdefault(option.replacement, []).append(option.key)
    return [
        f"{' and '.join(found)} of an earlier release {'is' if len(found) == 1 else 'are'} ignored: "
        f"use {replacement} instead"
        for replacement, found in keys.items()
    ]


def _changed_option(key: str, value: str) -> tuple[list[str], str] | None:
    """Return an option in today's form as arguments, and the note; None if it has this form already."""
    for option in CHANGED:
        inner = key.removeprefix(f"{option.key}.")
        if inner != key and inner in option.renamed:
            return [f"--{option.key}.{option.renamed[inner]}={value}"], option.note
        if key == option.key:
            old = yaml.safe_load(value)
            new = option.rewrite(copy.deepcopy(old))
            if new != old:
                return [f"--{key}={_as_argument(new)}"], option.note
    return None


def _as_argument(value: Any) -> str:
    # YAML ends a document of a single word with a line of dots.
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()


def _section(document: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a section; an empty dictionary if the document has no such section."""
    for name in path:
        inner = document.get(name)
        document = inner if isinstance(inner, dict) else {}
    return document


def _pop(document: dict[str, Any], path: Sequence[str]) -> bool:
    """Remove a key; return whether it existed."""
    section = _section(document, path[:-1])
    existed = path[-1] in section
    section.pop(path[-1], None)
    return existed
