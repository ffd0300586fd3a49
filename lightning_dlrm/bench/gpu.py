"""``bench gpu``: the targets of this project for one GPU, checked and timed in one call."""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from datamodules.folder import part_files
from lightning_dlrm.bench import lookup, predict
from lightning_dlrm.bench.contenders import OurStep, Workload, draw_batch, kaggle, mlperf, nvidia, paper, repeat
from lightning_dlrm.bench.measurement import (
    DEFAULT,
    Measurement,
    add_data,
    add_max_rows,
    add_rounds,
    add_steps,
    check,
    check_numbers,
    data_name,
    finisher,
    limit_name,
    open_dataset,
    peak_bytes,
    time_rounds,
)
from lightning_dlrm.bench.predict import Gpu
from lightning_dlrm.bench.rendering import render
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.contracts.terminal import aligned
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.rules import RowWiseAdagrad, UpdateRule
from lightning_dlrm.tables.embeddings import TableSettings
from lightning_dlrm.tables.lookup import EmbeddingTables

DESCRIPTION = """\
Check and time everything for one GPU in one call, and compare with targets.

examples:
  python -m lightning_dlrm bench gpu --budget 360 --json gpu.json
  python -m lightning_dlrm bench gpu --only "step dlrm" fit --threads 12
  python -m lightning_dlrm bench gpu --predict
"""
DETAILS = """\
The rows are training steps of several models and batch sizes in bfloat16, losses compared with those of plain float32,
and a whole fit from Parquet, the most important first. Each row is printed, and written to --json, when it is done. A
row that fails, for example for lack of memory, is written with its error, and the next one begins. A row for which
--budget leaves no time is written as not started. The exit code is 2 if a row failed, or missed its target for an H100
or H200.

A row of a step also has the time of the host, measured without waiting for the device, and the most memory of the
device. With --predict nothing runs on a GPU: the command prints what each row should reach by counted operations, bytes
and launches, with the assumptions.

Tests of the fused kernels on a GPU: pytest -m gpu tests/kernels/test_gpu.py
"""

PRECISION = "bf16-mixed"
_BATCH = 65_536
_DRAWN_BATCHES = 4
_LOSS_STEPS = 1000
_WINDOW = 100
_FIT_BATCHES = 256
"""Batches of an epoch of the fit, at least: longer than what is read ahead."""
_HOST_STEPS = 3
"""Steps that the host queues while its time is measured: a device holds the launches of so few."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of this benchmark."""

    name: str
    seconds: float
    """Time that the row takes on an H200, building and compiling included, as estimated."""
    measure: Callable[[argparse.Namespace], list[Measurement]]
    asked: float | None = None
    """Samples a second that are asked."""
    workload: Callable[[int | None], Workload] | None = None
    """Makes the workload, its tables cut to a number of rows, for predictions; None for no prediction."""
    batch_size: int = _BATCH


@dataclass(frozen=True)
class Target:
    """A target, and whether it is met."""

    what: str
    asked: float
    """The largest value that meets it."""
    value: float

    @property
    def met(self) -> bool:
        return self.value <= self.asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=f"cpu only tries the rows {DEFAULT}")
    names = list(dict.fromkeys(row.name.partition(",")[0] for row in ROWS))
    parser.add_argument(
        "--only",
        choices=names,
        nargs="+",
        metavar="ROW",
        help=f"run these rows only: {', '.join(names)} (default: all)",
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no row that would not end in this time (default: none)"
    )
    parser.add_argument("--predict", action="store_true", help="print predictions for one H200, without a GPU")
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"replaces {_BATCH:,} and 2,048 of the rows")
    parser.add_argument("--threads", type=int, metavar="N", help="data.threads of the fit (default: that of fit)")
    add_data(parser)
    add_max_rows(parser)
    add_steps(parser)
    add_rounds(parser)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """Yield the rows as they are measured, and print which targets are met.

    Raises:
        UserError: there is no CUDA device, or an option is out of range; after the last row, if a row failed or missed
            its target.
    """
    check_numbers(args)
    if args.budget is not None and not args.budget > 0:
        raise UserError(f"bench gpu: --budget is {args.budget:g}; give seconds, more than 0")
    wanted = [row for row in ROWS if args.only is None or row.name.partition(",")[0] in args.only]
    if args.batch_size is not None:
        # With one batch size, these rows would all be the first one.
        wanted = [row for row in wanted if not row.name.startswith("batch sizes")]
    if args.predict:
        print_predictions(wanted, args.max_rows, args.batch_size)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("bench gpu needs a CUDA device, but torch finds none here: give --predict or --device cpu")
    device = check(args)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    began, bad = time.monotonic(), []
    for row in wanted:
        left = float("inf") if args.budget is None else args.budget - (time.monotonic() - began)
        if row.seconds > left:
            yield _failed(row, args, f"not started: it takes about {row.seconds:.0f} s, and {left:.0f} s are left")
            continue
        for found in _measured(row, args):
            # Targets are of the row's own sizes, on a GPU.
            own_sizes = args.batch_size is None and args.max_rows is None
            asked = row.asked if device.type == "cuda" and own_sizes and not found.error else None
            if asked is not None:
                found = replace(found, extra={"asked_samples_per_s": asked, **found.extra})
            if found.error or (asked is not None and found.samples_per_s < asked) or not found.extra.get("met", 1.0):
                bad.append(f"{row.name}: {found.error or 'missed'}")
            line = ", ".join(part.strip() for part in render([found]).splitlines()[1:])
            print(f"{time.monotonic() - began:.0f} s: {line}", flush=True)
            yield found
        _free(device)
    if bad:
        raise UserError(f"{len(bad)} of {len(wanted)} rows failed or missed their target: {'; '.join(bad)}")


def _measured(row: Row, args: argparse.Namespace) -> list[Measurement]:
    """Return the row's measurements; if it fails, one with the error."""
    try:
        return row.measure(args)
    except Exception as error:  # any error of a row must leave the others their turn
        lines = str(error).strip().splitlines() or [""]
        return [_failed(row, args, f"{type(error).__name__}: {lines[0][:300]}")]


def _failed(row: Row, args: argparse.Namespace, error: str) -> Measurement:
    return Measurement(
        work="gpu",
        case=row.name,
        implementation="ours",
        device=args.device,
        precision=PRECISION,
        batch_size=0,
        samples=0,
        median_s=0.0,
        spread_s=0.0,
        error=error,
    )


def _free(device: torch.device) -> None:
    """Give the memory of a row back, for the next one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _time_step(
    args: argparse.Namespace,
    name: str,
    make: Callable[[int | None], Workload],
    batch_size: int = _BATCH,
    rule: UpdateRule | None = None,
    tables: TableSettings | None = None,
    compiles: bool = False,
) -> list[Measurement]:
    """Time steps of a workload on batches in the memory of the device."""
    device, workload = torch.device(args.device), make(args.max_rows)
    batch_size = args.batch_size or batch_size
    network = _on_device(workload, device, tables)
    if compiles:
        # It imports Lightning, which eager steps do not need.
        from lightning_dlrm.engine.compilation import compile_score

        compile_score(network, "default")
    step = OurStep(network, PRECISION, device, rule)
    batches = [draw_batch(workload, batch_size, seed).to(device) for seed in range(_DRAWN_BATCHES)]
    steps = repeat(step, cycle(batches), args.steps, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = time_rounds({"ours": steps}, args.rounds, warm_up=1, steps=args.steps)["ours"]
    extra = {
        "host_s": _host_seconds(step, batches[0], device),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes(),
    }
    return [_measurement(args, seconds, f"{name}, batch {batch_size:,}{limit_name(args.max_rows)}", batch_size, extra)]


def _measurement(
    args: argparse.Namespace, seconds: list[float], case: str, batch_size: int, extra: dict[str, float] | None = None
) -> Measurement:
    """Return the measurement of rounds of a step."""
    return Measurement.of_rounds(
        seconds,
        work="gpu",
        case=case,
        implementation="ours",
        device=args.device,
        precision=PRECISION,
        batch_size=batch_size,
        samples=batch_size,
        extra=extra or {},
    )


def _on_device(workload: Workload, device: torch.device, tables: TableSettings | None) -> CTRNetwork:
    # Tables of 105 GB are made where they stay: host memory need not hold them.
    with device:
        return workload.network(tables).to(device)


def _host_seconds(step: OurStep, batch: Any, device: torch.device) -> float:
    """Return the time in which the host queues a step, without waiting for the device."""
    finish = finisher(device)
    finish()
    start = time.perf_counter()
    for _ in range(_HOST_STEPS):
        step(batch)
    seconds = (time.perf_counter() - start) / _HOST_STEPS
    finish()
    return seconds


def _time_paper(args: argparse.Namespace) -> list[Measurement]:
    """Time section 5.2, on batches in the memory of the device."""
    (row,) = _time_step(args, "section 5.2", paper, 2048)
    if args.batch_size is None and args.max_rows is None:
        row = replace(row, extra={"projected_seconds_for_1000": 1000 * row.median_s, **row.extra})
    return [row]


def _time_mlperf(args: argparse.Namespace) -> list[Measurement]:
    # Rows that start at zero need no 26 billion random numbers, and take the same time.
    settings = TableSettings(initial_bound=0.0)
    return _time_step(args, "mlperf", mlperf, rule=RowWiseAdagrad(0.005), tables=settings)


def _time_lookup(args: argparse.Namespace) -> list[Measurement]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    lookup.add_arguments(parser)
    options = ["--device", args.device, "--precision", PRECISION, "--batch-size", str(args.batch_size or _BATCH)]
    options += ["--rows", str(args.max_rows or 1_000_000), "--steps", str(args.steps), "--rounds", str(args.rounds)]
    return lookup.run(parser.parse_args(options, argparse.Namespace(work="lookup")))


def _compare_losses(args: argparse.Namespace) -> list[Measurement]:
    batch_size, began = args.batch_size or 2048, time.perf_counter()
    workload = kaggle(min(args.max_rows or 1_000_000, 1_000_000))
    targets = loss_targets(workload, torch.device(args.device), batch_size, _LOSS_STEPS)
    print(render_targets(targets))
    row = Measurement(
        work="gpu",
        case=f"losses of {_LOSS_STEPS:,} steps against eager float32, batch {batch_size:,}, tables of at most "
        f"{max(workload.tables):,} rows",
        implementation="ours",
        device=args.device,
        precision=PRECISION,
        batch_size=batch_size,
        samples=3 * _LOSS_STEPS * batch_size,
        median_s=time.perf_counter() - began,
        spread_s=0.0,
        extra={"first": targets[0].value, "drift": targets[1].value, "met": float(all(t.met for t in targets))},
    )
    return [row]


def loss_targets(workload: Workload, device: torch.device, batch_size: int, steps: int) -> list[Target]:
    """Train three copies of a model on the same batches, and compare their losses with those of plain float32."""

    def losses(precision: str, fused: bool) -> torch.Tensor:
        network = workload.network().to(device)
        for tables in network.lookups():
            assert isinstance(tables, EmbeddingTables)
            tables.kernels = "triton" if fused else "plain"
        step = OurStep(network, precision, device)
        found = [step(draw_batch(workload, batch_size, seed)) for seed in range(steps)]
        return torch.stack(found).double().cpu()

    exact, fused, bf16 = losses("32-true", False), losses("32-true", True), losses(PRECISION, True)
    first = abs(fused[0] / exact[0] - 1).item()
    windows = zip(exact.split(_WINDOW), bf16.split(_WINDOW), strict=True)
    drift = max(abs(mine.mean() / plain.mean() - 1).item() for plain, mine in windows)
    return [
        Target("fused float32: first loss against eager", 1e-6, first),
        Target(f"fused bfloat16: means of {_WINDOW} losses, {steps} steps", 2e-3, drift),
    ]


def render_targets(targets: list[Target]) -> str:
    cells = [("target", "asked", "found", "")]
    cells += [(t.what, f"{t.asked:.0e}", f"{t.value:.1e}", "met" if t.met else "MISSED") for t in targets]
    return "\n".join(aligned(cells, left=(0, 3)))


def _time_fit(args: argparse.Namespace) -> list[Measurement]:
    """Time the command fit in a process of its own, from Parquet."""
    # It needs what reads options and configurations, and W&B.
    from lightning_dlrm.bench import fit
    from lightning_dlrm.bench.processes import Worker

    batch_size = args.batch_size or _BATCH
    folder, schema = open_dataset(args.data)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as temporary:
        data = Path(temporary) / "data"
        times = -(-_FIT_BATCHES * batch_size // schema.splits["train"].rows)
        repeat_training_rows(folder, schema, times, data)
        options = argparse.Namespace(device=args.device, batch_size=batch_size, compile=False, threads=args.threads)
        command = fit.fit_command(options, data, PRECISION, Path(temporary) / "run")
        with Worker("lightning_dlrm fit", command, Path(temporary)) as worker:
            worker(fit.WARM_UP_STEPS)
            seconds = time_rounds({"ours": partial(worker, args.steps)}, args.rounds, warm_up=1, steps=args.steps)
    case = f"fit from Parquet, {data_name(args.data)}, batch {batch_size:,}"
    return [_measurement(args, seconds["ours"], case, batch_size)]


def repeat_training_rows(folder: Path, schema: DatasetSchema, times: int, output: Path) -> DatasetSchema:
    """Make a dataset folder whose training split is that of another one several times over, by links to its files."""
    train = schema.splits["train"]
    copies = [
        (file, replace(file, path=f"train/{copy}-{Path(file.path).name}"))
        for copy in range(times)
        for file in train.files
    ]
    kept = [(file, file) for file in (*schema.vocabulary.values(), *part_files(schema, ["validation", "test"]))]
    for file, copy in (*copies, *kept):
        (output / copy.path).parent.mkdir(parents=True, exist_ok=True)
        (output / copy.path).symlink_to((folder / file.path).resolve())
    positives = None if train.positives is None else train.positives * times
    longer = replace(train, rows=train.rows * times, positives=positives, files=tuple(copy for _, copy in copies))
    repeated = replace(schema, splits={**schema.splits, "train": longer})
    repeated.save(output)
    return repeated


def print_predictions(rows: list[Row], max_rows: int | None, batch_size: int | None) -> None:
    """Print what each row should reach on one H200, with its own batch size if ``batch_size`` is None."""
    gpu = Gpu()
    lines = []
    for row in rows:
        if row.workload is not None:
            found = predict.predict(row.workload(max_rows), batch_size or row.batch_size, gpu)
            rate = found.samples_per_s
            if row.name == "fit":
                rate = min(rate, gpu.threads * gpu.decoded_per_s)
            own_sizes = max_rows is None and batch_size is None
            asked = "" if row.asked is None or not own_sizes else f"{row.asked / 1e6:g}M samples/s"
            lines.append((row.name, asked, found, rate))
    print(f"{gpu}\n\n{predict.render_predictions(lines)}")
    without = dict.fromkeys(row.name for row in rows if row.workload is None)
    if without:
        print(f"no prediction: {'; '.join(without)}")


def _step_row(
    name: str, seconds: float, make: Callable[[int | None], Workload], asked: float | None, **options: Any
) -> Row:
    measure = partial(_time_step, name=name, make=make, **options)
    size = options.get("batch_size", _BATCH)
    # Predictions are of eager steps.
    predicted = None if options.get("compiles") else make
    return Row(name=name, seconds=seconds, measure=measure, asked=asked, workload=predicted, batch_size=size)


ROWS: tuple[Row, ...] = (
    _step_row("step dlrm", 25, kaggle, 15e6),
    Row(name="losses", seconds=45, measure=_compare_losses),
    Row(name="fit", seconds=75, measure=_time_fit, asked=10e6, workload=kaggle),
    # 1,000 batches of 2,048 in a second.
    Row(name="paper", seconds=30, measure=_time_paper, asked=2.048e6, workload=paper, batch_size=2048),
    _step_row("step dcn", 25, partial(kaggle, model="dcn"), 10e6),
    _step_row("step dcn_v2", 25, partial(kaggle, model="dcn_v2"), 8e6),
    _step_row("nvidia", 40, nvidia, 8e6),
    Row(name="mlperf", seconds=90, measure=_time_mlperf, asked=1.5e6, workload=mlperf),
    _step_row("compiled, dlrm", 75, kaggle, 20e6, compiles=True),
    _step_row("compiled, section 5.2", 60, paper, 2.048e6, batch_size=2048, compiles=True),
    *(_step_row("batch sizes, dlrm", 15, kaggle, None, batch_size=size) for size in (2048, 8192, 16_384, 32_768)),
    _step_row("compiled, dcn", 60, partial(kaggle, model="dcn"), None, compiles=True),
    _step_row("compiled, dcn_v2", 60, partial(kaggle, model="dcn_v2"), None, compiles=True),
    Row(name="lookup", seconds=45, measure=_time_lookup),
)
"""The rows, most important first. ``--only`` takes the part of a name before its first comma."""
