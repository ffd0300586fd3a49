"""``bench fit``: the whole ``fit`` from a dataset folder, against a bare loop of the same step and plain loops."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from datamodules.stream.loader import TrainingLoader
from lightning_dlrm.bench import peer, roofline
from lightning_dlrm.bench.contenders import (
    LEARNING_RATE,
    OurStep,
    PlainBatch,
    PlainStep,
    Workload,
    kaggle,
    plain_network,
    repeat,
)
from lightning_dlrm.bench.measurement import (
    FLOOR,
    Implementation,
    Measurement,
    add_data,
    add_device_arguments,
    add_peer_python,
    add_steps,
    check,
    data_name,
    open_dataset,
    speed_ratio,
    time_rounds,
)
from lightning_dlrm.bench.processes import Worker
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError

DESCRIPTION = """\
Time a whole fit from a dataset folder, and bare loops over the same rows.

examples:
  python -m lightning_dlrm bench fit --precision 32-true bf16-mixed
  python -m lightning_dlrm bench fit --batch-size 128 --steps 200 --compile
  python -m lightning_dlrm bench fit --batch-size 128 --steps 200 --peer ~/dlrm --peer-python ~/numpy1/bin/python
"""
DETAILS = """\
The model is the paper's DLRM (540 million parameters on the demo data), trained with plain SGD and without validations
or checkpoints.

what is timed, in turns:
  fit            lightning_dlrm: the command fit in a process of its own, with Lightning, metrics every 100 steps,
                 progress, W&B offline, the stream
  bare loop      lightning_dlrm: the same step in a plain for loop over the same stream
  plain loop     plain PyTorch: one nn.EmbeddingBag(sparse=True) for each table, torch.optim.SGD, over the same stream
  whole program  with --peer, dlrm_s_pytorch.py of a checkout of facebookresearch/dlrm with its own loader, in float32,
                 on the same rows; a second ratio leaves out the time of its loader

Each contender makes its steps twice in a round, and the second time counts, because a fit does not share the
processor's caches with other models. Each fit, the bare loops together, the plain loops together, and the whole program
have the model in memory, 2 GiB each.
"""
DETAILS += FLOOR

WARM_UP_STEPS = 20
"""Steps of a fit before the first round."""
_PEER_ROWS = 262_144


Key = tuple[Implementation, str, str]
"""Implementation, what is timed, and precision."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_arguments(parser)
    add_data(parser)
    add_steps(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="data.threads of the fit (default: that of fit)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the fit and the bare loop, as model.compile does"
    )
    add_peer_python(parser)


def run(args: argparse.Namespace) -> list[Measurement]:
    """Time the loops.

    Raises:
        UserError: an option is out of range, there is no such device, or a contender fails.
    """
    device = check(args)
    print("Starting the contenders, which takes about a minute", file=sys.stderr)
    folder, schema = open_dataset(args.data)
    workload = replace(kaggle(), tables=schema.features.table_rows, dense=schema.features.dense)
    compiled, of_all = ", compiled" if args.compile else "", f"{data_name(args.data)}, batch {args.batch_size:,}"
    # A loader has a position, so every loop needs its own.
    options: dict[str, Any] = {"seed": 1, "batch_size": args.batch_size, "pin": device.type == "cuda"}
    loader = partial(TrainingLoader, folder, schema, ["train"], shuffle="window", **options)
    if len(loader()) < 2:
        raise UserError(f"{folder} has less than two batches of {args.batch_size:,} rows to train on")
    waited: list[float] = []
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-fit-")))
        contenders = _loops(args, workload, loader, device)
        for precision in args.precision:
            command = fit_command(args, folder, precision, temporary / f"fit-{precision}")
            fit = stack.enter_context(Worker("lightning_dlrm fit", command, temporary))
            fit(WARM_UP_STEPS)
            contenders["ours", "fit", precision] = partial(fit, args.steps)
        if args.peer is not None:
            rows = list(islice(loader(), max(2, _PEER_ROWS // args.batch_size)))
            (temporary / "peer").mkdir()
            worker = stack.enter_context(peer.fit_worker(args, workload, rows, temporary / "peer"))
            contenders["peer", "whole program", "32-true"] = partial(worker, args.steps)
            waited = worker.waited
        rates = roofline.measure_rates(device, args.precision)
        print(rates)
        some = list(islice(loader(), 4))
        floor = {precision: roofline.floor(workload, some, rates, precision) for precision in args.precision}
        seconds = time_rounds(contenders, args.rounds, warm_up=1, steps=args.steps, repeated=True)
    # The first round warms up, and the second call of a round counts.
    waits = [of_call / args.steps for of_call in waited[3::2]]
    return [
        Measurement.of_rounds(
            of_rounds,
            work="fit",
            case=f"{case}{compiled if name == 'ours' else ''}, {of_all}, {precision}, {args.device}",
            implementation=name,
            device=args.device,
            precision=precision,
            batch_size=args.batch_size,
            samples=args.batch_size,
            floor_s=floor.get(precision),
            extra=_extra((name, case, precision), seconds, waits),
        )
        for (name, case, precision), of_rounds in sorted(seconds.items(), key=lambda item: _ORDER[item[0][1]])
    ]


_ORDER = {"fit": 0, "bare loop": 1, "plain loop": 2, "whole program": 3}


def _loops(
    args: argparse.Namespace, workload: Workload, loader: Callable[[], TrainingLoader], device: torch.device
) -> dict[Key, Callable[[], object]]:
    """Return the loops of this process: ours without Lightning, and the baseline's."""
    network, plain = workload.network().to(device), plain_network(workload).to(device)
    if args.compile:
        # It imports Lightning, which the other benchmarks do not need.
        from lightning_dlrm.engine.compilation import compile_score

        compile_score(network, "default")
    loops: dict[Key, Callable[[], object]] = {}
    for precision in args.precision:
        ours, theirs = OurStep(network, precision, device), PlainStep(plain, precision, device)
        loops["ours", "bare loop", precision] = repeat(ours, _endless(loader(), device), args.steps, device)
        batches = map(PlainBatch.of, _endless(loader(), device))
        loops["baseline", "plain loop", precision] = repeat(theirs, batches, args.steps, device)
    return loops


def _extra(key: Key, seconds: Mapping[Key, Sequence[float]], waits: Sequence[float]) -> dict[str, float]:
    """Return the quotients of a contender's row.

    Args:
        key: contender.
        seconds: contender -> seconds of a step in each round.
        waits: seconds of a step that the peer's loader takes, in each round.
    """
    name, case, precision = key
    whole = seconds.get(("peer", "whole program", "32-true"))
    if name == "peer":
        return {"data_wait": sum(waits) / sum(seconds[key])}
    if case != "fit":
        return {}
    extra = speed_ratio("of_bare_loop", seconds[key], seconds["ours", "bare loop", precision])
    extra |= speed_ratio("speed_over_baseline", seconds[key], seconds["baseline", "plain loop", precision])
    if whole is not None:
        without = [step - wait for step, wait in zip(whole, waits, strict=True)]
        extra |= speed_ratio("speed_over_peer", seconds[key], whole)
        extra |= speed_ratio("speed_over_peer_without_data", seconds[key], without)
    return extra


def fit_command(args: argparse.Namespace, folder: Path, precision: str, run_dir: Path) -> list[str]:
    """Return the command as a user gives it, without validations and checkpoints, which no other contender makes.

    Args:
        args: options: device, batch size, threads, compile.
        folder: dataset folder.
        precision: of the trainer.
        run_dir: run folder.
    """
    command = [sys.executable, "-m", "lightning_dlrm", "fit", "--config", "dlrm.yaml", "--data.path"]
    # The command runs in another folder.
    command.append(str(folder.absolute()))
    for group in ("table", "dense"):
        command += [f"--model.{group}_optimizer=SGD", f"--model.{group}_optimizer.learning_rate={LEARNING_RATE}"]
    options = {
        "run_dir": run_dir,
        "wandb.mode": "offline",
        "data.batch_size": args.batch_size,
        "trainer.accelerator": "gpu" if args.device == "cuda" else "cpu",
        "trainer.precision": precision,
        "model.compile": str(args.compile).lower(),
        # As in the configurations for real data.
        "trainer.log_every_n_steps": 100,
        "trainer.max_epochs": -1,
        "trainer.max_steps": 100_000_000,
        "trainer.limit_val_batches": 0,
        "trainer.enable_checkpointing": "false",
        "trainer.callbacks+": "lightning_dlrm.bench.step_gate.StepGate",
    }
    if args.threads is not None:
        options["data.threads"] = args.threads
    return command + [f"--{name}={value}" for name, value in options.items()]


def _endless(loader: TrainingLoader, device: torch.device) -> Iterator[Batch]:
    while True:
        for batch in loader:
            yield batch.to(device)
