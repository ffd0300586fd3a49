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

from lightning_dlrm.bench import floors, peer, roofline
from lightning_dlrm.bench.contenders import (
    OurStep,
    PlainBatch,
    PlainStep,
    Workload,
    draw_batch,
    kaggle,
    paper,
    plain_network,
)
from lightning_dlrm.bench.measurement import Implementation, Measurement, median_and_spread, time_rounds, times_as_fast
from lightning_dlrm.bench.options import add_device_arguments, add_peer_arguments, check, finisher
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError

DESCRIPTION = """\
Times whole training steps, plain SGD for all weights, on the same drawn batches that are in memory (on the device)
already, in turns:
  ours      the step of fit, without Lightning
  baseline  one nn.EmbeddingBag(sparse=True) for each table, torch.optim.SGD, an eager loop
  peer      with --peer, the network and loss of a checkout of facebookresearch/dlrm, in float32

The floor is the sum over the model's parts of what their operations or their memory traffic take at least, at rates
measured in the same run.

examples:
  python -m lightning_dlrm bench step --precision 32-true bf16-mixed
  python -m lightning_dlrm bench step --model paper --peer ~/dlrm --peer-python ~/numpy1/bin/python
  python -m lightning_dlrm bench step --device cuda --batch-size 65536 --precision bf16-mixed --model dcn_v2
"""

MODELS: Mapping[str, Callable[[int | None], Workload]] = {
    "dlrm": kaggle,
    "dcn": partial(kaggle, model="dcn"),
    "dcn_v2": partial(kaggle, model="dcn_v2"),
    "paper": paper,
}
_BATCHES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_arguments(parser)
    parser.add_argument(
        "--model",
        default="dlrm",
        choices=MODELS,
        help="dlrm, dcn, dcn_v2: at Kaggle's table sizes, log-uniform ids; paper: section 5.2 of Naumov et al. 2019 "
        "(default: %(default)s)",
    )
    parser.add_argument("--max-rows", type=int, default=2**31 - 1, metavar="N", help="cap of a table's rows")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of a round (default: %(default)s)")
    add_peer_arguments(parser)


def run(args: argparse.Namespace) -> list[Measurement]:
    """Times the steps as ``add_arguments`` was told.

    Raises:
        UserError: an option is out of range, there is no such device, or the peer fails.
    """
    device = check(args)
    workload = MODELS[args.model](args.max_rows)
    if args.peer is not None and workload.model != "dlrm":
        raise UserError(f"--peer has DLRM only; leave it out for --model {args.model}")
    batches = [draw_batch(workload, args.batch_size, seed) for seed in range(_BATCHES)]
    with contextlib.ExitStack() as stack:
        contenders = _contenders(args, workload, batches, device)
        if args.peer is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-step-")))
            worker = stack.enter_context(peer.step_worker(args, workload, batches, folder))
            contenders["peer", "32-true"] = partial(worker, args.steps)
        return measure(args, workload, batches, contenders, device, floors.measure(device, args.precision))


def measure(
    args: argparse.Namespace,
    workload: Workload,
    batches: Sequence[Batch],
    contenders: Mapping[tuple[Implementation, str], Callable[[], object]],
    device: torch.device,
    rates: floors.MachineRates,
) -> list[Measurement]:
    """Times contenders that each make ``args.steps`` steps; the first round, which warms up, does not count."""
    print(rates)
    rounds = time_rounds({str(key): work for key, work in contenders.items()}, args.rounds + 1)
    seconds = {key: [value / args.steps for value in rounds[str(key)][1:]] for key in contenders}
    rows = []
    for key in contenders:
        implementation, precision = key
        median, spread = median_and_spread(seconds[key])
        extra = {}
        if implementation == "ours":
            others = [other for other in contenders if other[0] != "ours"]
            # A peer in float32 only is what ours in any precision is faster than.
            extra = {
                f"speed_over_{name}": times_as_fast(seconds[key], seconds[name, other])
                for name, other in others
                if other == precision or name == "peer"
            }
        floor = roofline.floor(workload, batches, rates, precision) if precision in rates.flops else None
        rows.append(
            Measurement(
                work="step",
                case=f"{args.model}, batch {args.batch_size:,}, {precision}, {args.device}",
                implementation=implementation,
                device=args.device,
                precision=precision,
                batch_size=args.batch_size,
                samples=args.batch_size,
                median_s=median,
                spread_s=spread,
                floor_s=floor,
                extra=extra,
            )
        )
    return rows


def _contenders(
    args: argparse.Namespace, workload: Workload, batches: Sequence[Batch], device: torch.device
) -> dict[tuple[Implementation, str], Callable[[], object]]:
    """Ours and the baseline's, in every precision; of each one network."""
    network, plain = workload.network().to(device), plain_network(workload).to(device)
    of_ours = [batch.to(device) for batch in batches]
    of_plain = [PlainBatch.of(batch) for batch in of_ours]
    contenders: dict[tuple[Implementation, str], Callable[[], object]] = {}
    for precision in args.precision:
        contenders["ours", precision] = repeat(args, OurStep(network, precision, device), of_ours, device)
        contenders["baseline", precision] = repeat(args, PlainStep(plain, precision, device), of_plain, device)
    return contenders


def repeat(
    args: argparse.Namespace, step: Callable[[Any], object], batches: Sequence[Any], device: torch.device
) -> Callable[[], None]:
    """What makes ``args.steps`` steps on batches, over and over, and waits until they are done."""
    endless = cycle(batches)
    finish = finisher(device)

    def make() -> None:
        for _ in range(args.steps):
            step(next(endless))
        finish()

    return make
