"""Classes of the user in a configuration: their required arguments, and the schema of their data."""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from jsonargparse import Namespace

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.own_code import with_place
from lightning_dlrm.contracts.schema import DatasetSchema


def require_arguments(settings: Namespace) -> None:
    """Refuse settings that lack a required argument of a class.

    jsonargparse itself refuses those with a type annotation, and passes None for one without.

    Raises:
        UserError: an argument without a type annotation and without a default is None.
    """
    for key, chosen in _chosen_classes(settings):
        module, _, name = chosen.class_path.rpartition(".")
        made_by = getattr(sys.modules.get(module), name, None)
        given = chosen.get("init_args") or Namespace()
        if not inspect.isclass(made_by):
            continue
        for argument in inspect.signature(made_by).parameters.values():
            is_required = argument.default is argument.annotation is inspect.Parameter.empty
            require(
                not is_required or given.get(argument.name, ...) is not None,
                f"{key}: {argument.name} of {with_place(made_by)} is missing; it has no default: give --{key}."
                f"{argument.name}, or {argument.name} among the init_args of this class",
            )


def schema_of(data: Any) -> DatasetSchema:
    """Return the schema of a datamodule.

    Raises:
        UserError: it has none.
    """
    schema = getattr(data, "schema", None)
    if not isinstance(schema, DatasetSchema):
        raise UserError(
            f"data: {with_place(type(data))} has no schema; expected a DatasetSchema: set self.schema in its __init__, "
            "or derive the class from one of this project, such as Clicks"
        )
    return schema


def _chosen_classes(value: Any, key: str = "") -> Iterator[tuple[str, Namespace]]:
    """Yield key and settings of each class among settings."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _chosen_classes(item, key)
    elif isinstance(value, Namespace):
        if isinstance(value.get("class_path"), str):
            yield key, value
        for name, item in vars(value).items():
            inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            yield from _chosen_classes(item, inner)
