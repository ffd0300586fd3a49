"""``params``: count the costs of a configuration without its tables and data, and match the cost of another one."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_dlrm.cli.configs import find_config, given_configs
from lightning_dlrm.cli.parser import CommandParser, build_model_and_data, build_model_parser, refuse_options_of_runs
from lightning_dlrm.cli.plain_parser import HelpParser
from lightning_dlrm.cli.plan_report import describe_subject, subject_of
from lightning_dlrm.contracts.documents import read_yaml
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.terminal import aligned, binary_size, wrapped
from lightning_dlrm.engine.memory import DEFAULT_BATCH_SIZE, count_memory
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models.network import ModelSize, model_size


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    matched = HelpParser(prog="python -m lightning_dlrm params", add_help=False)
    _add_matching_arguments(matched)
    options, rest = matched.parse_known_args(arguments)
    refuse_options_of_runs("params", arguments)
    if options.match is not None:
        return _match(options, rest)
    for option in ("to", "by", "output"):
        require(
            getattr(options, option) is None, f"--{option} has no effect without --match: leave it out, or give --match"
        )
    built = build_model_and_data(arguments, _parser())
    batch_size = getattr(built.datamodule, "batch_size", DEFAULT_BATCH_SIZE)
    sizes = count(built.module, batch_size)
    subject = subject_of(built.settings, given_configs(arguments), built.module.schema)
    if built.settings.json:
        print(json.dumps(subject | sizes | {"batch_size": batch_size}, indent=1))
    else:
        print(wrapped([f"{describe_subject(subject)}, batch {batch_size:,}", ""]))
        for name, value in sizes.items():
            human = f"  {binary_size(value):>10s}" if value and name.startswith("bytes") else ""
            print(f"{_TITLES[name]:32s}{'unknown' if value is None else f'{value:,}':>18}{human}")
        print(
            wrapped(
                [
                    f"Gradients are those of a batch of {batch_size:,} samples: of dense parameters, of vectors looked "
                    "up, and of their rows. The vectors looked up count too, because the backward pass needs them."
                ]
            )
        )
    return 0


def _parser() -> CommandParser:
    parser = build_model_parser("params")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_matching_arguments(parser)
    return parser


def _add_matching_arguments(parser: Any) -> None:
    """Add the options that change a model's widths to match the cost of another model."""
    parser.add_argument(
        "--match",
        nargs="+",
        metavar="YAML",
        help="configuration whose hidden layers are widened or narrowed, with its overlays: params --match "
        "dcn.yaml --to dlrm.yaml --by dense --output matched.yaml (other options, such as --data.path, go to both)",
    )
    parser.add_argument(
        "--to", nargs="+", metavar="YAML", help="configuration whose cost is matched, with its overlays"
    )
    parser.add_argument(
        "--by",
        default=None,
        help="the cost: total, dense (parameters; the default), or flops (forward). The widths keep their "
        f"proportions; if none come within {100 * _NEAR:.0f} percent of it, nothing is written, and the exit code is 2",
    )
    parser.add_argument("--output", default=None, help="the new configuration's file")


def _match(options: argparse.Namespace, rest: Sequence[str]) -> int:
    for needed in ("to", "output"):
        require(
            getattr(options, needed) is not None,
            f"--match needs --{needed}: params --match A.yaml --to B.yaml --by dense --output FILE",
        )
    by = options.by or "dense"
    require(by in COSTS, f"--by {by} is not one of {', '.join(COSTS)}")
    require("--json" not in rest, "--json has no effect with --match: leave it out")
    lost = [option.partition("=")[0] for option in rest if option.startswith("--model.")]
    if lost:
        raise UserError(
            f"--match does not write {lost[0]} to the new configuration: put {lost[0]} into a YAML file and list that "
            f"file after {options.match[-1]}"
        )
    ours, theirs = (
        build_model_and_data([*(f"--config={name}" for name in names), *rest], _parser())
        for names in (options.match, options.to)
    )
    goal = theirs.module.size
    former = vars(ours.settings.model.network.init_args)
    widths, size = match(ours.module, former, goal, by)
    name, goal_name = (" + ".join(names) for names in (options.match, options.to))
    found, wanted = COSTS[by](size), COSTS[by](goal)
    if abs(found - wanted) > _NEAR * wanted:
        raise UserError(
            f"{name} cannot match {goal_name} by {by}: the nearest widths in its proportions give {found:,}, "
            f"{wanted:,} is wanted, and only differences up to {_NEAR:.0%} are a match; choose another --by, or match "
            "the other model"
        )
    lines = describe(Path(options.match[0]).stem, Path(options.to[0]).stem, size, goal, by)
    found_widths = [
        f"{key}: {values}, the nearest widths in the proportions of {list(former[key])}"
        for key, values in widths.items()
    ]
    header = [f"{name}, changed to match {goal_name} by {by}:", *found_widths, "", *lines]
    write_config(options.match, widths, Path(options.output), header)
    print("\n".join(lines))
    print(wrapped([*found_widths, f"written to {options.output}"]))
    return 0


def count(module: CTRModule, batch_size: int = DEFAULT_BATCH_SIZE) -> dict[str, int | None]:
    """Return the number of parameters, of FLOPs per sample (None if they are not known), and of bytes that a fit in one
    process takes."""
    size = module.size
    with torch.device("meta"):
        network = module.make_network(module.schema.features, module.seed)
    memory = count_memory(module, network, batch_size)
    return {
        "tables": size.tables,
        "dense": size.dense,
        "total": size.total,
        "flops_per_sample_forward": size.flops_per_sample_forward or None,
        "flops_per_sample_training": size.flops_per_sample_training or None,
        "bytes_weights": memory["tables"] + memory["dense"],
        "bytes_optimizer_tables": memory["optimizer_tables"],
        "bytes_optimizer_dense": memory["optimizer_dense"],
        "bytes_averages": memory["averages"],
        "bytes_gradients": memory["gradients"],
        "bytes_total": memory.total(),
    }


_TITLES = {
    "tables": "parameters in tables",
    "dense": "dense parameters",
    "total": "parameters in total",
    "flops_per_sample_forward": "FLOPs per sample, forward",
    "flops_per_sample_training": "FLOPs per sample, training",
    "bytes_weights": "bytes of parameters",
    "bytes_optimizer_tables": "bytes of optimizer state, tables",
    "bytes_optimizer_dense": "bytes of optimizer state, dense",
    "bytes_averages": "bytes of averages",
    "bytes_gradients": "bytes of gradients",
    "bytes_total": "bytes in total",
}
"""The result of ``count`` in words."""

COSTS: Mapping[str, Callable[[ModelSize], int]] = {
    "total": lambda size: size.total,
    "dense": lambda size: size.dense,
    "flops": lambda size: size.flops_per_sample_forward,
}
WIDEST = 1 << 16
"""Largest width of a hidden layer that is tried."""
_NEAR = 0.05
"""Largest difference of two costs that match, as a share of the wanted cost."""


def match(module: CTRModule, options: Mapping[str, Any], goal: ModelSize, by: str) -> tuple[dict[str, Any], ModelSize]:
    """Return the hidden widths, in the proportions of a model's own, at which its cost is nearest to a goal.

    The largest width becomes w, a whole number, and the others are scaled and
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
    require(hidden, f"{kind.__name__} has no hidden layers whose widths can change; match the other model")
    cost = COSTS[by]
    require(
        cost(goal) and cost(module.size),
        f"--by {by}: this cost is unknown for one of the models; choose another of {', '.join(COSTS)}",
    )

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
    rows = [("", name, goal_name, "difference", "in percent", "")]
    costs = {"tables": lambda size: size.tables, **COSTS}
    for key, cost in costs.items():
        ours, theirs = cost(found), cost(goal)
        share = f"{(ours - theirs) / theirs:+,.3%}" if theirs else ""
        if share in ("+0.000%", "-0.000%"):
            share = "0.000%" if ours == theirs else "under 0.001%"
        rows.append((key, f"{ours:,}", f"{theirs:,}", f"{ours - theirs:+,}", share, "matched" * (key == by)))
    return aligned(rows, left=(0, 5))


def write_config(sources: Sequence[str], widths: Mapping[str, Any], output: Path, header: Sequence[str]) -> None:
    """Write a configuration with other widths; all other settings are those of ``sources``, later over earlier.

    Raises:
        UserError: the file exists, or cannot be written.
    """
    document: dict[str, Any] = {}
    for source in sources:
        document = _overlaid(document, read_yaml(find_config(source)))
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
