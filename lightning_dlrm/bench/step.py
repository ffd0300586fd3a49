"""``bench step``: one training step on batches in memory: forward, loss, backward, update."""

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from lightning_dlrm.bench import peer, roofline
from lightning_dlrm.bench.contenders import (
    OurStep,
    PlainBatch,
    PlainStep,
    Workload,
    draw_batch,
    kaggle,
    paper,
    plain_network,
    repeat,
)
from lightning_dlrm.bench.measurement import (
    DEFAULT,
    FLOOR,
    Implementation,
    Measurement,
    add_device_arguments,
    add_max_rows,
    add_peer_python,
    add_steps,
    check,
    limit_name,
    speed_ratio,
    time_rounds,
)
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError

DESCRIPTION = """\
Time whole training steps on batches that are in memory already.

examples:
  python -m lightning_dlrm bench step --precision 32-true bf16-mixed
  python -m lightning_dlrm bench step --model paper --peer ~/dlrm --peer-python ~/numpy1/bin/python
  python -m lightning_dlrm bench step --device cuda --batch-size 65536 --precision bf16-mixed --model dcn_v2
"""
DETAILS = """\
what is timed, in turns, on the same batches, with plain SGD:
  lightning_dlrm         the step of fit, without Lightning
  plain PyTorch          one nn.EmbeddingBag(sparse=True) for each table, torch.optim.SGD, an eager loop
  facebookresearch/dlrm  with --peer, the network and loss of a checkout, in float32
"""
DETAILS += FLOOR

MODELS: Mapping[str, Callable[[int | None], Workload]] = {
    "dlrm": kaggle,
    "dcn": partial(kaggle, model="dcn"),
    "dcn_v2": partial(kaggle, model="dcn_v2"),
    "paper": paper,
}
DRAWN_BATCHES = 8

StepKey = tuple[Implementation, str]
"""Implementation and precision of a contender."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_arguments(parser)
    parser.add_argument(
        "--model",
        default="dlrm",
        choices=MODELS,
        metavar="NAME",
        help="dlrm, dcn or dcn_v2, with Kaggle's table sizes and log-uniform ids, or paper, section 5.2 of Naumov et "
        f"al. 2019 {DEFAULT}",
    )
    add_max_rows(parser)
    add_steps(parser)
    add_peer_python(parser)


def run(args: argparse.Namespace) -> list[Measurement]:
    """Time the steps.

    Raises:
        UserError: an option is out of range, there is no such device, or the peer fails.
    """
    device = check(args)
    workload = MODELS[args.model](args.max_rows)
    if args.peer is not None and workload.model != "dlrm":
        raise UserError(f"--peer has DLRM only; leave it out for --model {args.model}")
    batches = [draw_batch(workload, args.batch_size, seed).to(device) for seed in range(DRAWN_BATCHES)]
    steps = make_steps(args, workload, batches, device)
    rates = roofline.measure_rates(device, args.precision)
    return time_steps(args, f"{args.model}{limit_name(args.max_rows)}", workload, batches, steps, args.steps, rates)


def make_steps(
    args: argparse.Namespace, workload: Workload, batches: Sequence[Batch], device: torch.device
) -> dict[StepKey, tuple[Any, list[Any]]]:
    """Return our steps and the baseline's in every precision, each with the batches that it takes.

    The steps of an implementation share one network.
    """
    network, plain = workload.network().to(device), plain_network(workload).to(device)
    plain_batches = [PlainBatch.of(batch) for batch in batches]
    steps: dict[StepKey, tuple[Any, list[Any]]] = {}
    for precision in args.precision:
        steps["ours", precision] = OurStep(network, precision, device), list(batches)
        steps["baseline", precision] = PlainStep(plain, precision, device), plain_batches
    return steps


def time_steps(
    args: argparse.Namespace,
    case: str,
    workload: Workload,
    batches: Sequence[Batch],
    steps: Mapping[StepKey, tuple[Any, list[Any]]],
    count: int,
    rates: roofline.MachineRates,
) -> list[Measurement]:
    """Time our steps, the baseline's, and with ``--peer`` the peer's.

    Args:
        args: options: device, batch size, rounds, peer; ``work`` is the name in the rows.
        case: what is timed, for the rows.
        workload: model and shape of the batches.
        batches: batches of all contenders.
        steps: see ``make_steps``.
        count: steps of a round.
        rates: rates of the machine, for the floor.
    """
    print(rates)
    device = torch.device(args.device)
    contenders = {key: repeat(step, cycle(given), count, device) for key, (step, given) in steps.items()}
    with contextlib.ExitStack() as stack:
        if args.peer is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-step-")))
            worker = stack.enter_context(peer.step_worker(args, workload, batches, folder))
            contenders["peer", "32-true"] = partial(worker, count)
        seconds = time_rounds(contenders, args.rounds, warm_up=1, steps=count)
    return [
        Measurement.of_rounds(
            of_rounds,
            work=args.work,
            case=f"{case}, batch {args.batch_size:,}, {precision}, {args.device}",
            implementation=implementation,
            device=args.device,
            precision=precision,
            batch_size=args.batch_size,
            samples=args.batch_size,
            floor_s=roofline.floor(workload, batches, rates, precision) if precision in rates.flops else None,
            extra=speeds_of_ours(implementation, precision, seconds),
        )
        for (implementation, precision), of_rounds in seconds.items()
    ]


def speeds_of_ours(
    implementation: Implementation, precision: str, seconds: Mapping[StepKey, Sequence[float]]
) -> dict[str, float]:
    """Return how many times as fast ours is as each other contender; nothing for the others.

    Precisions are compared with themselves, but a peer has float32 only.
    """
    if implementation != "ours":
        return {}
    speeds: dict[str, float] = {}
    for (name, other), of_other in seconds.items():
        if name != "ours" and (other == precision or (name, precision) not in seconds):
            speeds |= speed_ratio(f"speed_over_{name}", seconds["ours", precision], of_other)
    return speeds
