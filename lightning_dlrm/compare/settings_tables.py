"""The settings of the configurations of a comparison as tables: those that differ, and those that all share."""

import inspect
import pydoc
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args

import lightning_dlrm
from lightning_dlrm.compare.runs import Arm, differing, format_value, within
from lightning_dlrm.tracking import names

_SHARED = (
    "steps", "data.init_args.batch_size", "trainer.max_epochs", "trainer.precision", "trainer.gradient_clip_val",
    "trainer.accumulate_grad_batches", "model",
)  # fmt: skip
"""Settings and sections that the table of shared settings shows, in this order."""
_RATES = ("learning_rate", "lr")
"""Arguments that are shown even if they have their defaults."""


def settings_of_runs(arm: Arm) -> dict[str, Any]:
    """Return a configuration's settings by full keys, with its steps, and the precision and schedule that a missing
    setting stands for."""
    steps = " to ".join(f"{count:,.0f}" for count in dict.fromkeys(arm.span(names.STEP)))
    missing = {"trainer.precision": "32-true"}
    if not any(within(key, ["model.schedule"]) for key in arm.settings):
        missing["model.schedule.class_path"] = "none"
    return {"steps": steps} | missing | arm.settings


def differing_rows(settings: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the settings in which configurations differ: key, then the value of each, as text.

    An argument of a class is left out if all configurations with such a class give it its default.

    Args:
        settings: name of a configuration -> full key -> value.
    """
    rows = []
    for key, values in differing(settings).items():
        owner, _, argument = key.partition(".init_args.")
        owners = {name: settings[name].get(f"{owner}.class_path") for name in values}
        having = [name for name in settings if settings[name].get(f"{owner}.class_path") in owners.values()]
        differ = len({format_value(values.get(name)) for name in having if argument}) > 1
        chosen = any(value != _default(owners[name], argument) for name, value in values.items())
        if not argument or differ or chosen or argument in _RATES:
            rows.append([short(key), *(format_value(values.get(name)) for name in settings)])
    return rows


def shared_rows(settings: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the settings that are the same in all configurations, as far as they concern training: key and value."""
    found = differing(settings)
    return [
        [short(key), format_value(value)]
        for section in _SHARED
        for key, value in next(iter(settings.values())).items()
        # What is off is left out.
        if within(key, [section]) and key not in found and value is not None and value is not False
    ]


def short(key: str) -> str:
    """Return a setting's key as tables show it.

    >>> short("model.table_optimizer.init_args.learning_rate"), short("model.network.class_path")
    ('table_optimizer.learning_rate', 'network')
    """
    return key.removeprefix("model.").replace("init_args.", "").replace(".class_path", "")


def _default(class_path: Any, argument: str) -> Any:
    """Return the default of an argument of a class, such as ``embedding_dim``, or of a key of an argument that is a
    dataclass, such as ``tables.project``; ``inspect.Parameter.empty`` if there is none."""
    # Classes of this project have their name alone.
    path = str(class_path)
    owner = pydoc.locate(path) if "." in path else getattr(lightning_dlrm, path, None)
    parameters = inspect.signature(owner).parameters if isinstance(owner, type) else {}
    first, _, key = argument.partition(".")
    default = parameters[first].default if first in parameters else inspect.Parameter.empty
    if key and first in parameters:
        annotation = parameters[first].annotation
        sections = [found for found in (annotation, *get_args(annotation)) if is_dataclass(found)]
        found = {field.name: field for section in sections for field in fields(section)}.get(key)
        default = inspect.Parameter.empty if found is None else found.default
        if found is not None and found.default_factory is not MISSING:
            default = found.default_factory()
    return list(default) if isinstance(default, tuple) else default
