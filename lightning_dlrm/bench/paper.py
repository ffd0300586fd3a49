"""``bench paper``: the single-socket benchmark of Naumov et al. 2019, section 5.2, by operator and as a roofline."""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from lightning_dlrm.bench import roofline, step
from lightning_dlrm.bench.breakdown import Times, by_part, mark, marked_parts, profile_steps
from lightning_dlrm.bench.contenders import draw_batch, paper
from lightning_dlrm.bench.measurement import (
    DEFAULT,
    Measurement,
    add_device_arguments,
    add_max_rows,
    add_peer_python,
    check,
    duration,
)
from lightning_dlrm.bench.rendering import LARGE_SPREAD, is_uncertain
from lightning_dlrm.bench.roofline import Part
from lightning_dlrm.bench.step import StepKey
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.figures import check_figure_file
from lightning_dlrm.contracts.terminal import aligned

DESCRIPTION = """\
Time the benchmark of the DLRM paper, and show where the time goes.

examples:
  python -m lightning_dlrm bench paper --batches 100 --precision 32-true bf16-mixed --plot paper.png
  python -m lightning_dlrm bench paper --peer ~/dlrm --peer-python ~/numpy1/bin/python
  python -m lightning_dlrm bench paper --device cuda --precision bf16-mixed
"""
DETAILS = """\
what is printed:
  result    time of 1,000 batches for this project, for plain PyTorch (the baseline), and with --peer for
            facebookresearch/dlrm; projected if --batches is less
  operators time of each operator in a step, measured separately with PyTorch's profiler (on a CUDA device, the time of
            kernels)
  roofline  for each part of the model its operations, its memory traffic, what bounds it on this machine, and its share
            of that bound

The benchmark is that of section 5.2 of Naumov et al. 2019: 8 tables of 1M x 64 with 1 to 100 ids each, 512 dense
features, bottom MLP 512-512-64, top MLP 1024-1024-1024-1, 1,000 batches of 2,048, and plain SGD. Published times: 256 s
on two Xeon 6138, 62 s on a V100. With --max-rows or another batch size it is another benchmark, and no time of 1,000
batches is given.
"""

OPERATORS: Mapping[str, tuple[str, ...]] = {
    "data": ("data",),
    "embedding forward": ("tables forward",),
    "embedding backward": ("tables backward",),
    "MLP": ("bottom MLP forward", "bottom MLP backward", "top MLP forward", "top MLP backward"),
    "interaction": ("interaction forward", "interaction backward"),
    "loss": ("loss",),
    "optimizer": ("update",),
}
"""Operator -> the parts of a step that it consists of: see ``breakdown.marked_parts``."""

_SHOWN = {"ours": "lightning_dlrm", "baseline": "plain PyTorch"}
"""Contender -> its name in tables and figures."""
_MOST_APART = 2
"""Factor between a step with and without the profiler from which on the times of operators are uncertain."""
_PROFILER_DOUBT = "The profiler changes the time of a step much, so these numbers are uncertain."
_PUBLISHED_BATCHES, _PUBLISHED_BATCH_SIZE = 1000, 2048

Profile = Mapping[str, Sequence[float]]
"""Part of a step -> its seconds in each step."""
PartTimes = Mapping[Part, tuple[roofline.Cost, float]]
"""Part of the model -> its cost, and the seconds of its forward and backward pass."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_arguments(parser)
    parser.add_argument(
        "--batches",
        type=int,
        default=_PUBLISHED_BATCHES,
        metavar="N",
        help=f"batches of all rounds together {DEFAULT}",
    )
    add_max_rows(parser)
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the operators in this .png, .pdf or .svg file; the roofline goes to a file beside it, with "
        "-roofline in its name",
    )
    add_peer_python(parser)


def run(args: argparse.Namespace) -> list[Measurement]:
    """Time the benchmark.

    Raises:
        UserError: an option is out of range, there is no such device, or the peer fails.
    """
    if args.batches < args.rounds:
        raise UserError(f"--batches is {args.batches} and --rounds {args.rounds}: give at least as many batches")
    if args.plot is not None:
        check_figure_file(args.plot)
    device = check(args)
    workload = paper(args.max_rows)
    is_published = workload == paper() and args.batch_size == _PUBLISHED_BATCH_SIZE
    title = "DLRM paper, section 5.2"
    if not is_published:
        # Not by the section's name, whose published time is of other sizes.
        title = f"DLRM with {len(workload.tables)} tables of {max(workload.tables):,} rows"
    batches = [draw_batch(workload, args.batch_size, seed) for seed in range(step.DRAWN_BATCHES)]
    if device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    steps = step.make_steps(args, workload, batches, device)
    rates = roofline.measure_rates(device, args.precision)
    totals = step.time_steps(args, title, workload, batches, steps, args.batches // args.rounds, rates)
    if not is_published:
        print("This is not the benchmark of section 5.2 of the DLRM paper: sizes differ.")
    else:
        name = "seconds_for_1000" if args.batches >= _PUBLISHED_BATCHES else "projected_seconds_for_1000"
        totals = [replace(row, extra={name: row.median_s * _PUBLISHED_BATCHES, **row.extra}) for row in totals]
    profiles: dict[StepKey, Profile] = {}
    for key, (contender, given) in steps.items():
        some = list(islice(cycle(given), args.rounds + 1))

        def make(number: int, contender: Any = contender, some: Sequence[Any] = some) -> None:
            contender(some[number], mark)

        with marked_parts(contender.network):
            # The first step warms up.
            profiles[key] = _profile(profile_steps(make, len(some), device)[1:])
    unprofiled = {(row.implementation, row.precision): row.median_s for row in totals}
    typical = {key: _typical(profile) for key, profile in profiles.items()}
    parts = {p: _parts(typical["ours", p], roofline.costs(workload, batches, p)) for p in args.precision}
    doubts = [f"The times of the rounds differ by over {LARGE_SPREAD:.0%}, so these numbers are uncertain."] * any(
        map(is_uncertain, totals)
    )
    for precision, of_parts in parts.items():
        named = {_SHOWN[key[0]]: key for key in typical if key[1] == precision}
        operators = {name: _operators(typical[key]) for name, key in named.items()}
        timed = {name: unprofiled[key] for name, key in named.items()}
        print(render_operators(precision, operators, timed, doubts))
        print(render_roofline(precision, of_parts, rates, timed[_SHOWN["ours"]], doubts))
    if args.plot is not None:
        bars = {
            f"{_SHOWN[key[0]]}\n{key[1]}": (_operators(step_parts), unprofiled[key])
            for key, step_parts in typical.items()
        }
        _draw(args, f"{title}, batch {args.batch_size:,}", doubts, bars, parts, rates)
    return totals + _operator_rows(args, profiles)


def _draw(
    args: argparse.Namespace,
    title: str,
    doubts: Sequence[str],
    bars: Mapping[str, tuple[Mapping[str, float], float]],
    parts: Mapping[str, PartTimes],
    rates: roofline.MachineRates,
) -> None:
    """Draw the operators of each contender and the roofline.

    Args:
        args: the command's options.
        title: of both figures.
        doubts: sentences about the times.
        bars: label -> seconds of each operator, and of a step without the profiler.
        parts: see ``draw_roofline``.
        rates: rates of the device.
    """
    # Matplotlib takes long to import.
    from lightning_dlrm.bench.figures import DEVICES, draw_breakdown, draw_roofline

    operators = {label: of_step for label, (of_step, _) in bars.items()}
    unprofiled = {label: seconds for label, (_, seconds) in bars.items()}
    one_line = {label: label.replace("\n", " in ") for label in bars}
    warnings = _profiler_warnings(
        {one_line[label]: sum(of_step.values()) for label, of_step in operators.items()},
        {one_line[label]: seconds for label, seconds in unprofiled.items()},
        bool(doubts),
    )
    draw_breakdown(operators, unprofiled, f"{title}, {DEVICES[args.device]}", [*doubts, *warnings], args.plot)
    of_ours = {precision: unprofiled[f"{_SHOWN['ours']}\n{precision}"] for precision in parts}
    far = _changed_by_profiler({precision: _step_of(of_parts) for precision, of_parts in parts.items()}, of_ours)
    roofline_file = args.plot.with_stem(args.plot.stem + "-roofline")
    draw_roofline(parts, rates, args.device, title, [*doubts, *[_PROFILER_DOUBT] * bool(far)], roofline_file)
    print(f"figures: {args.plot}, {roofline_file}")


def _profile(steps: Sequence[Times]) -> Profile:
    parts = [by_part(times) for times in steps]
    return {part: [of_step.get(part, 0.0) for of_step in parts] for part in parts[0]}


def _typical(profile: Profile) -> dict[str, float]:
    """Return the seconds of each part in the step whose time is the median, so that the parts add up to a step."""
    steps = [dict(zip(profile, values, strict=True)) for values in zip(*profile.values(), strict=True)]
    return sorted(steps, key=lambda step: sum(step.values()))[(len(steps) - 1) // 2]


def _operators(parts: Mapping[str, float]) -> dict[str, float]:
    """Return operator -> seconds."""
    return {operator: sum(parts[part] for part in of) for operator, of in OPERATORS.items()}


def _summed(profile: Profile, parts: Sequence[str]) -> list[float]:
    return [sum(values) for values in zip(*(profile[part] for part in parts), strict=True)]


def _parts(seconds: Mapping[str, float], costs: Mapping[Part, roofline.Cost]) -> PartTimes:
    passes = {part: (f"{part} forward", f"{part} backward") for part in costs} | {"update": ("update",)}
    return {part: (cost, sum(seconds[name] for name in passes[part])) for part, cost in costs.items()}


def _operator_rows(args: argparse.Namespace, profiles: Mapping[StepKey, Profile]) -> list[Measurement]:
    rows = []
    for (implementation, precision), profile in profiles.items():
        for operator, parts in OPERATORS.items():
            row = Measurement.of_rounds(
                _summed(profile, parts),
                work="paper",
                case=f"{operator}, {precision}, {args.device}",
                implementation=implementation,
                device=args.device,
                precision=precision,
                batch_size=args.batch_size,
                samples=args.batch_size,
                shown=False,
            )
            # An operator that takes no time would have an infinite rate.
            rows.append(replace(row, median_s=max(row.median_s, 1e-9)))
    return rows


def render_operators(
    precision: str,
    columns: Mapping[str, Mapping[str, float]],
    unprofiled: Mapping[str, float],
    doubts: Sequence[str] = (),
) -> str:
    """Return a table of the time of a step by operator, with a column for each contender.

    A contender whose step the profiler changes too much has no shares; if there are doubts, none has.
    """
    steps = {name: sum(column.values()) for name, column in columns.items()}
    changed = _changed_by_profiler(steps, unprofiled)

    def cell(name: str, seconds: float) -> str:
        share = "" if doubts or name in changed else f"{seconds / steps[name]:.0%}"
        return f"{duration(max(seconds, 1e-9))} {share:>4}"

    cells = [(f"operator, {precision}", *columns)]
    cells += [(operator, *(cell(name, column[operator]) for name, column in columns.items())) for operator in OPERATORS]
    cells.append(("step", *(cell(name, seconds) for name, seconds in steps.items())))
    cells.append(("without the profiler", *(f"{duration(unprofiled[name])}     " for name in columns)))
    notes = [
        "Times of one step under the profiler, except those of the last row: the step that takes the median time; less "
        "is better. Both update by SGD. lightning_dlrm makes the gradients of table rows in the optimizer, "
        "plain PyTorch in embedding backward.",
        *doubts,
        *_profiler_warnings(steps, unprofiled, bool(doubts)),
    ]
    return "\n".join(["", *aligned(cells, left=(0,)), *_filled(notes), ""])


def _step_of(parts: PartTimes) -> float:
    """Return the seconds of the parts together."""
    return sum(seconds for _, seconds in parts.values())


def _filled(sentences: Sequence[str]) -> list[str]:
    """Return lines of text as wide as the tables may be, each sentence from a line of its own on."""
    return [line for sentence in sentences for line in textwrap.wrap(sentence, 79)]


def _changed_by_profiler(steps: Mapping[str, float], unprofiled: Mapping[str, float]) -> dict[str, float]:
    """Return the contenders whose step takes much more or much less time under the profiler, with the factor.

    Args:
        steps: contender -> seconds of a step under the profiler.
        unprofiled: contender -> seconds of a step without it.
    """
    factors = {name: steps[name] / unprofiled[name] for name in steps}
    return {name: factor for name, factor in factors.items() if not 1 / _MOST_APART < factor < _MOST_APART}


def _profiler_warnings(
    steps: Mapping[str, float], unprofiled: Mapping[str, float], is_doubtful: bool = False
) -> list[str]:
    """Return sentences that say why the times of operators are uncertain; none if they are not.

    If the times without the profiler are uncertain, it is not known which contender is faster.
    """
    warnings = [
        f"warning: under the profiler, a step of {name} takes {factor:.2g} times the time that it takes without it. So "
        "the times of its operators are uncertain: stop other work on this machine."
        for name, factor in _changed_by_profiler(steps, unprofiled).items()
    ]
    profiled, timed = (min(times, key=lambda name: times[name]) for times in (steps, unprofiled))
    if profiled != timed and not is_doubtful:
        warnings.append(
            f"warning: {profiled} is faster under the profiler, {timed} without it. The time without the profiler "
            "counts."
        )
    return warnings


def render_roofline(
    precision: str, parts: PartTimes, rates: roofline.MachineRates, unprofiled: float, doubts: Sequence[str] = ()
) -> str:
    """Return a table of what bounds each part of ours, and the share of that bound that it reaches.

    Args:
        precision: precision of the step.
        parts: costs and times under the profiler.
        rates: rates of the machine.
        unprofiled: seconds of a step without the profiler.
        doubts: lines about the times, below the table.
    """
    cells = [(precision, "MFLOP", "MB", "FLOP/byte", "bound by", "floor", "takes", "reaches")]
    for part, (cost, seconds) in parts.items():
        floor = rates.floor_of(part, cost, precision)
        cells.append(
            (
                part,
                f"{cost.flops / 1e6:,.{0 if cost.flops >= 1e7 else 1}f}",
                f"{cost.bytes / 1e6:,.1f}",
                f"{cost.intensity:.3g}",
                rates.bound_of(part, cost, precision),
                duration(floor),
                duration(seconds),
                f"{floor / seconds:.{0 if floor / seconds >= 0.01 else 1}%}",
            )
        )
    notes = [
        "The parts of the same step of lightning_dlrm, each with forward and backward pass together; update is the "
        "optimizer above. MFLOP and MB are those of one step.",
        "A part reaches floor / takes; 100% is the limit of this machine. The profiler lengthens takes, and so lowers "
        "reaches.",
        *doubts,
    ]
    if any(rates.floor_of(part, cost, precision) > seconds for part, (cost, seconds) in parts.items()):
        notes.append("Above 100%: data were in caches, or a limit was measured too low.")
    if _changed_by_profiler({"": _step_of(parts)}, {"": unprofiled}):
        notes.append(_PROFILER_DOUBT)
    return "\n".join([*aligned(cells, left=(0, 4)), *_filled(notes), ""])
