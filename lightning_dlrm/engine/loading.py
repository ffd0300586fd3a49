"""Loading a module from a checkpoint folder: ``CTRModule.load_from_checkpoint``.

A checkpoint holds the options of its module as plain values (``describe_module``). Loading imports only classes of this
package and of ``torch.optim``; a custom network is passed as an argument.
"""

import functools
import inspect
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, set_parsing_settings

from lightning_dlrm.contracts.documents import read_yaml
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import DatasetSchema, Features
from lightning_dlrm.engine.checkpoint_state import check_encoding, take_state
from lightning_dlrm.engine.retired import update_document
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.sharding.checkpoint import CheckpointReader

if TYPE_CHECKING:
    from lightning_dlrm.engine.module import CTRModule

KEY = "module"
"""Key of the options in a checkpoint."""

BUILT = ("lightning_dlrm.", "torch.optim.")
"""Packages of the classes that a checkpoint may name."""


def describe_module(module: "CTRModule") -> dict[str, Any]:
    """Return the options of a module as plain values, for ``load_module``.

    Options without such a form, such as a network made by a lambda, are left out.
    """
    options = plain_options(module)[0]
    return {"options": options, "schema": module.data_schema().to_json(), "seed": module.seed}


def plain_options(module: "CTRModule") -> tuple[dict[str, Any], list[str]]:
    """Return the options of a module as plain values, and the names of those without such a form."""
    options, left_out = module.configuration, []
    if options is None:
        averaging = module.averaging
        given = {
            "network": module.make_network,
            "table_optimizer": module.table_rule,
            "dense_optimizer": module.dense_optimizer,
            "wide_optimizer": module.wide_rule,
            "schedule": module.schedule,
            "loss": module.loss,
            "regularization": module.regularization,
            "initialization": module.initialization,
            "averaging": None if averaging is None else averaging.settings,
            "kernels": module.kernels,
        }
        options = {}
        for name, value in given.items():
            try:
                options[name] = _describe(value)
            except (AttributeError, TypeError):
                left_out.append(name)
    return options, left_out


def load_module(
    kind: "type[CTRModule]",
    reader: CheckpointReader,
    network: Callable[[Features, int], CTRNetwork] | None,
    schema: DatasetSchema | None,
) -> "CTRModule":
    """Return a module with the parameters of a checkpoint; see ``CTRModule.load_from_checkpoint``."""
    rest = reader.rest()
    described = rest.get(KEY) or _describe_old(reader)
    if schema is None:
        require(
            described["schema"] is not None,
            f"checkpoint {reader.folder} of an earlier release has no schema of its data: give it, such as "
            "load_from_checkpoint(folder, schema=data.schema)",
        )
        schema = DatasetSchema.from_json(described["schema"], str(reader.folder))
    check_encoding(schema, reader)
    options = dict(described["options"])
    if network is not None:
        options["network"] = network
    module = kind(**_build(kind, options, reader.folder), schema=schema, seed=described["seed"])
    module.configure_model()
    load_parameters(module, reader)
    return module


def load_parameters(module: "CTRModule", reader: CheckpointReader) -> None:
    """Replace the parameters of a module by those of a checkpoint; random generators do not change."""
    checkpoint = {key: value for key, value in reader.rest().items() if key != "random_state"} | {"tables": reader}
    take_state(module, checkpoint, training=False)
    module.load_state_dict(checkpoint["state_dict"])


def _describe_old(reader: CheckpointReader) -> dict[str, Any]:
    """Return the options of a checkpoint without ``KEY`` from the run folder's configuration."""
    path = reader.folder.resolve().parent.parent / "config.yaml"
    document: Any = read_yaml(path) if path.is_file() else None
    require(
        isinstance(document, dict) and isinstance(document.get("model"), dict),
        f"checkpoint {reader.folder} does not describe its model, and {path} is not a configuration: make "
        "the module yourself and give the folder to trainer.validate, test or predict as ckpt_path",
    )
    return {"options": update_document(document)[0]["model"], "schema": None, "seed": 0}


def _build(kind: "type[CTRModule]", options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the arguments of a module.

    Raises:
        UserError: an option is missing or wrong, or names a class outside ``BUILT``.
    """
    network = options.get("network")
    require(network is not None, f"checkpoint {folder} does not name its network: give it with network=")
    for name in ("table_optimizer", "dense_optimizer"):
        require(
            name in options,
            f"checkpoint {folder} does not describe its {name}, which was not a class or a functools.partial of one: "
            "make the module yourself and give the folder to trainer.validate, test or predict as ckpt_path",
        )
    for path in _class_paths({name: value for name, value in options.items() if not callable(value)}):
        require(
            path.startswith(BUILT),
            f"checkpoint {folder} names {path}, which is not a class of this package and is not imported from a "
            "checkpoint: pass a custom network as load_from_checkpoint(folder, network=...)",
        )
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    parser = ArgumentParser(exit_on_error=False)
    skip = {"schema", "seed", *(["network"] if callable(network) else [])}
    parser.add_class_arguments(kind, "options", skip=skip, instantiate=False)
    plain = {name: value for name, value in options.items() if name not in skip}
    try:
        built = parser.instantiate(parser.parse_object({"options": plain})).options.as_dict()
    except ArgumentError as error:
        raise UserError(f"checkpoint {folder}: {' '.join(str(error).split())}") from error
    return {**built, "network": network} if callable(network) else built


def _class_paths(value: Any) -> Iterator[str]:
    """Yield each text that the parser could import; no option of a module takes another text with dots."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _class_paths(item)
    elif isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)+", value):
        yield value


def _describe(value: Any) -> Any:
    """Return plain values, with ``class_path`` and ``init_args`` for classes, their instances and their partials.

    Raises:
        TypeError, AttributeError: the value cannot be described.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {name: _describe(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if isinstance(value, functools.partial):
        if value.args:
            raise TypeError("a partial with positional arguments")
        return {**_describe(value.func), "init_args": _describe(value.keywords)}
    if inspect.isclass(value):
        if "<locals>" in value.__qualname__:
            raise TypeError(f"{value.__qualname__} is local to a function")
        return {"class_path": f"{value.__module__}.{value.__qualname__}"}
    if inspect.isroutine(value):
        raise TypeError(f"{value!r} is a function")
    arguments = list(inspect.signature(type(value)).parameters)
    return {**_describe(type(value)), "init_args": {name: _describe(getattr(value, name)) for name in arguments}}
