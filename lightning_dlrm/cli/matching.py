"""``params --match A --to B``: the hidden widths at which model A has the cost of model B."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_dlrm.cli.configs import find_config
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models.network import ModelSize, model_size

COSTS: Mapping[str, Callable[[ModelSize], int]] = {
    "total": lambda size: size.total,
    "dense": lambda size: size.dense,
    "flops": lambda size: size.flops_per_sample_forward,
}
WIDEST = 1 << 16
"""Largest width of a hidden layer that is tried."""


def match(module: CTRModule, options: Mapping[str, Any], goal: ModelSize, by: str) -> tuple[dict[str, Any], ModelSize]:
    """Return the hidden widths at which the cost of a model is nearest to a goal.

    All hidden widths keep their proportions: the largest width becomes w, a whole number, and the others are scaled and
    rounded. Costs grow with w, so bisection finds the best w. Nothing is allocated.

    Args:
        module: module of the model.
        options: arguments of its network as configured, with defaults.
        goal: size of the other model.
        by: a key of COSTS.

    Returns:
        The arguments that are widths, with their new values, and the size of the model with these widths.

    Raises:
        UserError: the model has no hidden layers, or a cost is not known.
    """
    with torch.device("meta"):
        kind = type(module.make_network(module.schema.features, module.seed))
    original = {name: list(options[name]) for name in kind.HIDDEN_WIDTHS}
    hidden = [width for name, part in kind.HIDDEN_WIDTHS.items() for width in original[name][part]]
    if not hidden:
        raise UserError(f"{kind.__name__} has no hidden layers whose widths can change; match the other model")
    cost = COSTS[by]
    if not (cost(goal) and cost(module.size)):
        raise UserError(f"--by {by}: it is not known of both models; choose another of {', '.join(COSTS)}")

    def widths(widest: int) -> dict[str, Any]:
        changed = {name: list(values) for name, values in original.items()}
        for name, part in kind.HIDDEN_WIDTHS.items():
            changed[name][part] = [max(1, round(w * widest / max(hidden))) for w in changed[name][part]]
        return changed

    def size(widest: int) -> ModelSize:
        make: Callable[..., Any] = module.make_network
        with torch.device("meta"):
            return model_size(make(module.schema.features, module.seed, **widths(widest)), module.schema.features)

    low, high = 1, WIDEST
    while low < high:
        middle = (low + high) // 2
        if cost(size(middle)) < cost(goal):
            low = middle + 1
        else:
            high = middle
    best = min((max(1, low - 1), low), key=lambda widest: abs(cost(size(widest)) - cost(goal)))
    return widths(best), size(best)


def describe(name: str, goal_name: str, found: ModelSize, goal: ModelSize, by: str) -> list[str]:
    """Return lines that compare the costs of both models; the matched cost is marked."""
    lines = [f"{'':10s}{name:>22s}{goal_name:>22s}{'difference':>18s}"]
    costs = {"tables": lambda size: size.tables, **COSTS}
    for key, cost in costs.items():
        ours, theirs = cost(found), cost(goal)
        share = f"{100 * (ours - theirs) / theirs:+9.3f}%" if theirs else ""
        mark = "  matched" if key == by else ""
        lines.append(f"{key:10s}{ours:>22,}{theirs:>22,}{ours - theirs:>+18,}{share}{mark}")
    return lines


def write_config(sources: Sequence[str], widths: Mapping[str, Any], output: Path, header: Sequence[str]) -> None:
    """Write a configuration with other widths; all other settings are those of ``sources``, later over earlier.

    Raises:
        UserError: the file exists, or cannot be written.
    """
    document: dict[str, Any] = {}
    for source in sources:
        document = _overlaid(document, yaml.safe_load(find_config(source).read_text(encoding="utf-8")))
    document["model"]["network"].setdefault("init_args", {}).update(widths)
    text = "".join(f"# {line}".rstrip() + "\n" for line in header) + "\n" + yaml.safe_dump(document, sort_keys=False)
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{output} exists; choose another --output") from error
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; choose another --output") from error


def _overlaid(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings overlaid key by key; if the class changes, the arguments of the old class are dropped."""
    result = dict(below)
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        result = {}
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _overlaid(result[key], value) if nested else value
    return result
