"""``bench paper``: the single-socket benchmark of Naumov et al. 2019, section 5.2, by operator and as a roofline."""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from datamodules.preprocess.inspection import aligned
from lightning_dlrm.bench import floors, peer, roofline, step
from lightning_dlrm.bench.contenders import OurStep, PlainBatch, PlainStep, Workload, draw_batch, paper, plain_network
from lightning_dlrm.bench.figures import check_figure, draw_breakdown, draw_roofline
from lightning_dlrm.bench.measurement import Implementation, Measurement, duration, median_and_spread
from lightning_dlrm.bench.options import add_device_arguments, add_peer_arguments, check
from lightning_dlrm.bench.roofline import Part
from lightning_dlrm.bench.timeline import Timeline
from lightning_dlrm.contracts.errors import UserError

DESCRIPTION = """\
Times the benchmark of the DLRM paper's section 5.2: 8 tables of 1M x 64 with 1 to 100 ids each, 512 dense features,
bottom MLP 512-512-64, top MLP 1024-1024-1024-1, 1,000 batches of 2,048, plain SGD. Published: 256 s on two Xeon 6138,
62 s on a V100. Prints

  - the total time of ours, a plain baseline and, with --peer, facebookresearch/dlrm, in turns;
  - a step by operator, measured apart with marks between them (on a CUDA device, of the eager step);
  - for each part of the model its operations, memory traffic, what bounds it here, and how near it comes to that.

examples:
  python -m lightning_dlrm bench paper --batches 100 --precision 32-true bf16-mixed --plot paper.png
  python -m lightning_dlrm bench paper --peer ~/dlrm --peer-python ~/numpy1/bin/python
  python -m lightning_dlrm bench paper --device cuda --precision bf16-mixed
"""

OPERATORS: Mapping[str, tuple[str, ...]] = {
    "data": ("data",),
    "embedding forward": ("tables forward",),
    "embedding backward": ("tables backward",),
    "MLP": ("bottom MLP forward", "bottom MLP backward", "top MLP forward", "top MLP backward"),
    "interaction": ("interaction forward", "interaction backward"),
    "loss": ("loss",),
    "optimiser": ("update",),
}
"""Operator -> the labels of a timeline that it is made of."""

_PUBLISHED_BATCHES = 1000
_BATCHES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_arguments(parser)
    parser.add_argument(
        "--batches", type=int, default=_PUBLISHED_BATCHES, metavar="N", help="in all rounds (default: %(default)s)"
    )
    parser.add_argument("--max-rows", type=int, default=2**31 - 1, metavar="N", help="cap of a table's rows")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the operators there, and the roofline beside it, its name with -roofline; .png, .pdf or .svg",
    )
    add_peer_arguments(parser)


def run(args: argparse.Namespace) -> list[Measurement]:
    """Times the benchmark as ``add_arguments`` was told.

    Raises:
        UserError: an option is out of range, there is no such device, or the peer fails.
    """
    device = check(args)
    if args.batches < args.rounds:
        raise UserError(f"--batches is {args.batches} and --rounds {args.rounds}: give as many batches at least")
    if args.plot is not None:
        check_figure(args.plot)
    workload = paper(args.max_rows)
    batches = [draw_batch(workload, args.batch_size, seed) for seed in range(_BATCHES)]
    if device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    args.model, args.steps = "paper", args.batches // args.rounds
    with contextlib.ExitStack() as stack:
        makers = _makers(args, workload, device)
        contenders: dict[tuple[Implementation, str], Callable[[], object]] = {
            (name, precision): step.repeat(args, make, list(map(prepare, batches)), device)
            for (name, precision), (make, prepare) in makers.items()
        }
        if args.peer is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-paper-")))
            contenders["peer", "32-true"] = partial(
                stack.enter_context(peer.step_worker(args, workload, batches, folder)), args.steps
            )
        rates = floors.measure(device, args.precision)
        totals = step.measure(args, workload, batches, contenders, device, rates)
    totals = [
        replace(
            row,
            work="paper",
            case=f"a batch of {args.batch_size:,}, {row.precision}, {args.device}",
            extra={f"seconds_for_{_PUBLISHED_BATCHES}": row.median_s * _PUBLISHED_BATCHES, **row.extra},
        )
        for row in totals
    ]
    profiles = {
        key: _profile(make, list(map(prepare, batches)), device, args.rounds) for key, (make, prepare) in makers.items()
    }
    costs = {precision: roofline.costs(workload, batches, precision) for precision in args.precision}
    print(render_operators(profiles))
    print(render_roofline(profiles, costs, rates))
    if args.plot is not None:
        operators = {key: _by_operator(profile) for key, profile in profiles.items()}
        draw_breakdown(
            {f"{name}, {precision}": o for (name, precision), o in operators.items()}, args.device, args.plot
        )
        second = args.plot.with_stem(args.plot.stem + "-roofline")
        draw_roofline({p: _parts(profiles["ours", p], costs[p]) for p in args.precision}, rates, second)
        print(f"figures: {args.plot}, {second}")
    return totals + [
        _operator_row(args, key, operator, seconds)
        for key, profile in profiles.items()
        for operator, seconds in _by_operator(profile, every=True).items()
    ]


Profile = Mapping[str, Sequence[float]]
"""Label of a timeline -> its seconds in each step."""


def _makers(
    args: argparse.Namespace, workload: Workload, device: torch.device
) -> dict[tuple[Implementation, str], tuple[Any, Callable[[Any], Any]]]:
    """The steps, and what makes of a batch what they take."""
    network, plain = workload.network().to(device), plain_network(workload).to(device)
    makers: dict[tuple[Implementation, str], tuple[Any, Callable[[Any], Any]]] = {}
    for precision in args.precision:
        makers["ours", precision] = (
            OurStep(network, precision, device),
            lambda batch: batch,
        )
        makers["baseline", precision] = PlainStep(plain, precision, device), PlainBatch.of
    return makers


def _profile(make: Any, batches: Sequence[Any], device: torch.device, rounds: int) -> Profile:
    """Each label's seconds in each of some steps, after a first one that does not count."""
    timeline = Timeline(make.network, device)
    steps: list[dict[str, float]] = []
    for batch, _ in zip(cycle(batches), range(rounds + 1), strict=False):
        make(batch, timeline.mark)
        steps.append(timeline.take())
    timeline.close()
    return {label: [of_step.get(label, 0.0) for of_step in steps[1:]] for label in steps[1]}


def _by_operator(profile: Profile, every: bool = False) -> dict[str, Any]:
    """Operator -> median seconds of a step, or the seconds of every step."""
    sums = {
        operator: [sum(values) for values in zip(*(profile[label] for label in labels), strict=True)]
        for operator, labels in OPERATORS.items()
    }
    return sums if every else {operator: statistics.median(values) for operator, values in sums.items()}


def _parts(profile: Profile, costs: Mapping[Part, roofline.Cost]) -> dict[Part, tuple[roofline.Cost, float]]:
    """Each part's cost and the median seconds that it took."""
    labels = {part: (f"{part} forward", f"{part} backward") for part in costs} | {"update": ("update",)}
    return {
        part: (
            cost,
            statistics.median(sum(values) for values in zip(*(profile[name] for name in labels[part]), strict=True)),
        )
        for part, cost in costs.items()
    }


def _operator_row(
    args: argparse.Namespace, key: tuple[Implementation, str], operator: str, seconds: list[float]
) -> Measurement:
    median, spread = median_and_spread(seconds)
    return Measurement(
        work="paper",
        case=f"{operator}, {key[1]}, {args.device}",
        implementation=key[0],
        device=args.device,
        precision=key[1],
        batch_size=args.batch_size,
        samples=args.batch_size,
        median_s=max(median, 1e-9),
        spread_s=spread,
        shown=False,
    )


def render_operators(profiles: Mapping[tuple[Implementation, str], Profile]) -> str:
    """Milliseconds of a step by operator, a column for each contender."""
    columns = {key: _by_operator(profile) for key, profile in profiles.items()}
    cells = [("operator", *(f"{name} {precision}" for name, precision in columns))]
    for operator in OPERATORS:
        sums = {key: sum(column.values()) for key, column in columns.items()}
        cells.append(
            (
                operator,
                *(f"{duration(max(c[operator], 1e-9))} {c[operator] / sums[key]:4.0%}" for key, c in columns.items()),
            )
        )
    cells.append(("step", *(f"{duration(sum(column.values()))} {1:4.0%}" for column in columns.values())))
    return "\n".join(["", *aligned(cells, left=(0,)), ""])


def render_roofline(
    profiles: Mapping[tuple[Implementation, str], Profile],
    costs: Mapping[str, Mapping[Part, roofline.Cost]],
    rates: floors.MachineRates,
) -> str:
    """What bounds each part of ours, and the share that it reaches of what the bound allows."""
    cells = [("part of ours", "precision", "MFLOP", "MB", "FLOP/byte", "bound by", "floor", "takes", "reaches")]
    for precision, of_parts in costs.items():
        for part, (cost, seconds) in _parts(profiles["ours", precision], of_parts).items():
            floor = rates.floor(cost.flops, cost.bytes, precision)
            memory = cost.intensity < rates.flops[precision] / rates.bytes
            cells.append(
                (
                    part,
                    precision,
                    f"{cost.flops / 1e6:,.0f}",
                    f"{cost.bytes / 1e6:,.1f}",
                    f"{cost.intensity:.3g}",
                    "memory" if memory else "processor",
                    duration(floor),
                    duration(seconds),
                    f"{floor / seconds:.0%}",
                )
            )
    return "\n".join([*aligned(cells, left=(0, 1, 5)), ""])
