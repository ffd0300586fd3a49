"""``bench fit``: the whole ``fit`` from a dataset folder, against a bare loop of the same step and plain loops."""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from datamodules.folder import load_schema
from datamodules.generate.demo import DemoSettings, demo_folder, generate_demo
from datamodules.stream.loader import TrainingLoader
from lightning_dlrm.bench import floors, peer, roofline
from lightning_dlrm.bench.contenders import LEARNING_RATE, OurStep, PlainBatch, PlainStep, Workload, plain_network
from lightning_dlrm.bench.gate import Gate
from lightning_dlrm.bench.measurement import Implementation, Measurement, median_and_spread, time_rounds, times_as_fast
from lightning_dlrm.bench.options import add_device_arguments, add_peer_arguments, check, finisher
from lightning_dlrm.bench.worker import REPLIES, REQUESTS, Worker
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.recorded import EAGER_STEPS

DESCRIPTION = """\
Times training of the paper's DLRM (Kaggle's shape: 540 million parameters on the demo data), plain SGD, with all that a
run does after its first 100 steps but validations and checkpoints, in turns:
  ours, fit             the command fit in a process of its own: Lightning, metrics every 100 steps, progress, W&B
                        offline, the stream
  ours, bare loop       the same step in a plain for loop over the same stream
  baseline, plain loop  one nn.EmbeddingBag(sparse=True) for each table, torch.optim.SGD, over the same stream
  peer, whole program   with --peer, dlrm_s_pytorch.py of a checkout of facebookresearch/dlrm with its own loader, in
                        float32, on the same rows; "data_wait" is the share of its time that its loader takes
"of_bare_loop" is the fit's throughput as a share of the bare loop's. Quotients are medians of those of each round, in
which the contenders run one after the other.

Each contender has the model in memory: 2.2 GB apiece, three to five of them.

examples:
  python -m lightning_dlrm bench fit --precision 32-true bf16-mixed
  python -m lightning_dlrm bench fit --batch-size 128 --steps 200 --peer ~/dlrm --peer-python ~/numpy1/bin/python
"""

_PEER_ROWS = 262_144


class StepGate(pl.Callback):
    """Stops a fit after as many steps as the benchmark asked for, until it asks for more."""

    def __init__(self) -> None:
        self._gate: Gate | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._gate is None:
            finish = finisher(trainer.strategy.root_device)
            self._gate = Gate(int(os.environ[REQUESTS]), int(os.environ[REPLIES]), finish)
        if not self._gate.passed():
            trainer.should_stop = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_arguments(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="a dataset folder (default: the demo data of fit)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of a round (default: %(default)s)")
    add_peer_arguments(parser)


def run(args: argparse.Namespace) -> list[Measurement]:
    """Times the loops as ``add_arguments`` was told.

    Raises:
        UserError: an option is out of range, there is no such device, or a contender fails.
    """
    device = check(args)
    folder = args.data
    if folder is None:
        folder = demo_folder(DemoSettings())
        generate_demo(DemoSettings(), folder)
    schema = load_schema(folder)
    workload = Workload(
        tables=schema.features.table_rows,
        dense=schema.features.dense,
        width=16,
        bottom=(512, 256, 64, 16),
        top=(512, 256),
    )

    def loader() -> TrainingLoader:
        return TrainingLoader(
            folder, schema, ["train"], shuffle="window", seed=1, batch_size=args.batch_size, pin=device.type == "cuda"
        )

    if len(loader()) < 2:
        raise UserError(f"{folder} has less than two batches of {args.batch_size:,} rows to train on")
    contenders: dict[tuple[Implementation, str, str], Callable[[], object]] = {}
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-fit-")))
        network, plain = workload.network().to(device), plain_network(workload).to(device)
        for precision in args.precision:
            command = _fit_command(args, folder, precision, temporary / f"fit-{precision}")
            fit = stack.enter_context(Worker(command, temporary))
            # As every step of a longer fit, of which the first ones are made otherwise.
            fit(EAGER_STEPS)
            contenders["ours", "fit", precision] = partial(fit, args.steps)
            ours, theirs = (
                OurStep(network, precision, device, graphs=device.type == "cuda"),
                PlainStep(plain, precision, device),
            )
            contenders["ours", "bare loop", precision] = _loop(args, ours, _endless(loader(), device), device)
            batches = map(PlainBatch.of, _endless(loader(), device))
            contenders["baseline", "plain loop", precision] = _loop(args, theirs, batches, device)
        if args.peer is not None:
            rows = list(islice(loader(), max(2, _PEER_ROWS // args.batch_size)))
            (temporary / "peer").mkdir()
            peer_worker = stack.enter_context(peer.fit_worker(args, workload, rows, temporary / "peer"))
            contenders["peer", "whole program", "32-true"] = partial(peer_worker, args.steps)
        rates = floors.measure(device, args.precision)
        print(rates)
        some = list(islice(loader(), 4))
        least = {precision: roofline.floor(workload, some, rates, precision) for precision in args.precision}
        rounds = time_rounds({str(key): work for key, work in contenders.items()}, args.rounds + 1)
        waited = peer_worker.waited[1:] if args.peer is not None else []
    # The first round warms up.
    seconds = {key: [s / args.steps for s in rounds[str(key)][1:]] for key in contenders}
    rows_out = []
    for (name, case, precision), of_rounds in seconds.items():
        median, spread = median_and_spread(of_rounds)
        extra = {}
        if (name, case) == ("ours", "fit"):
            extra["of_bare_loop"] = times_as_fast(of_rounds, seconds["ours", "bare loop", precision])
            extra["speed_over_baseline"] = times_as_fast(of_rounds, seconds["baseline", "plain loop", precision])
            if args.peer is not None:
                whole = seconds["peer", "whole program", "32-true"]
                without = [all_ - data / args.steps for all_, data in zip(whole, waited, strict=True)]
                extra["speed_over_peer"] = times_as_fast(of_rounds, whole)
                extra["speed_over_peer_without_data"] = times_as_fast(of_rounds, without)
        elif name == "peer":
            extra["data_wait"] = sum(waited) / args.steps / sum(of_rounds)
        rows_out.append(
            Measurement(
                work="fit",
                case=f"{case}, batch {args.batch_size:,}, {precision}, {args.device}",
                implementation=name,
                device=args.device,
                precision=precision,
                batch_size=args.batch_size,
                samples=args.batch_size,
                median_s=median,
                spread_s=spread,
                floor_s=least.get(precision),
                extra=extra,
            )
        )
    return rows_out


def _fit_command(args: argparse.Namespace, folder: Path, precision: str, run_dir: Path) -> list[str]:
    """The command as a user gives it; validations and checkpoints, which no other contender makes, left out."""
    command = [sys.executable, "-m", "lightning_dlrm", "fit", "--config", "dlrm.yaml", "--data.path", str(folder)]
    for group in ("table", "dense"):
        command += [f"--model.{group}_optimizer=SGD", f"--model.{group}_optimizer.learning_rate={LEARNING_RATE}"]
    options = {
        "run_dir": run_dir,
        "wandb.mode": "offline",
        "data.batch_size": args.batch_size,
        "trainer.accelerator": "gpu" if args.device == "cuda" else "cpu",
        "trainer.precision": precision,
        "model.cuda_graphs": str(args.device == "cuda").lower(),
        # As the configurations for real data.
        "trainer.log_every_n_steps": 100,
        "trainer.max_epochs": -1,
        "trainer.max_steps": 100_000_000,
        "trainer.limit_val_batches": 0,
        "trainer.enable_checkpointing": "false",
        "trainer.callbacks+": "lightning_dlrm.bench.fit.StepGate",
    }
    return command + [f"--{name}={value}" for name, value in options.items()]


def _endless(loader: TrainingLoader, device: torch.device) -> Iterator[Batch]:
    while True:
        for batch in loader:
            yield batch.to(device)


def _loop(
    args: argparse.Namespace, step: Callable[[Any], object], batches: Iterator[Any], device: torch.device
) -> Callable[[], None]:
    def make() -> None:
        for _ in range(args.steps):
            step(next(batches))
        finish()

    finish = finisher(device)
    return make
