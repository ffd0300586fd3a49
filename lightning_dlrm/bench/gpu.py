"""``bench gpu``: the targets of this project for one H100, checked and timed in one call."""

import argparse
import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from datamodules.preprocess.inspection import aligned
from lightning_dlrm.bench.contenders import OurStep, Workload, draw_batch, kaggle
from lightning_dlrm.bench.measurement import DEFAULT, Measurement, check
from lightning_dlrm.cli.plain_parser import PlainParser
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tables.lookup import EmbeddingTables

DESCRIPTION = """\
Runs on a CUDA device, and fails with a list of missed targets:

  - float32 with fused kernels gives the loss of plain float32, on the first step to 1e-6;
  - bfloat16 with fused kernels keeps the mean loss of every 100 steps within 2e-3 of it, for 1,000 steps;
  - bench paper (1,000 batches of section 5.2 in under 1.0 s), bench step of DLRM, DCN v1 and v2 at batch 65,536 (DLRM
    at 15 million samples/s or more), bench lookup, and bench fit (10 million samples/s from Parquet), in bfloat16.

The rates are targets for an H100; on another GPU only the measurements matter. Tests of the fused kernels on a GPU:
pytest -m gpu tests/kernels/test_gpu.py

examples:
  python -m lightning_dlrm bench gpu --json gpu.json
"""

_STEPS = 1000
_WINDOW = 100
_LARGE = ["--batch-size", "65536", "--precision", "bf16-mixed"]

RUNS: dict[str, tuple[str, list[str]]] = {
    "paper": ("paper", ["--precision", "32-true", "bf16-mixed", "--batches", "1000", "--rounds", "10"]),
    "step dlrm": ("step", ["--model", "dlrm", *_LARGE]),
    "step dcn": ("step", ["--model", "dcn", *_LARGE]),
    "step dcn_v2": ("step", ["--model", "dcn_v2", *_LARGE]),
    "lookup": ("lookup", ["--batch-size", "65536"]),
    "fit": ("fit", _LARGE),
}
"""Name -> subcommand of ``bench`` and its options."""


@dataclass(frozen=True)
class Target:
    """A target, and whether it is met."""

    what: str
    asked: str
    found: str
    met: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", choices=("cuda",), help=DEFAULT)
    parser.add_argument("--only", choices=("losses", *RUNS), nargs="+", help="run these parts only (default: all)")


def run(args: argparse.Namespace) -> list[Measurement]:
    """Check and time, and print which targets are met.

    Raises:
        UserError: there is no CUDA device, or a target is missed.
    """
    if not torch.cuda.is_available():
        raise UserError("bench gpu needs a CUDA device, and torch finds none here")
    device = check(args)
    wanted = args.only or ["losses", *RUNS]
    print(torch.cuda.get_device_name(device))
    targets: list[Target] = []
    rows: list[Measurement] = []
    if "losses" in wanted:
        targets += loss_targets(kaggle(1_000_000), device, 2048, _STEPS)
    for name in (name for name in RUNS if name in wanted):
        work, options = RUNS[name]
        module = importlib.import_module(f"lightning_dlrm.bench.{work}")
        parser = PlainParser()
        module.add_arguments(parser)
        found = module.run(parser.parse_args([*options, "--device", "cuda"], argparse.Namespace(work=work)))
        rows += found
        targets += list(_rate_targets(name, found))
    print("\n" + render_targets(targets))
    missed = [target.what for target in targets if not target.met]
    if missed:
        raise UserError(f"{len(missed)} of {len(targets)} targets missed: {'; '.join(missed)}")
    return rows


def loss_targets(workload: Workload, device: torch.device, batch_size: int, steps: int) -> list[Target]:
    """Train three copies of a model on the same batches, and compare their losses with those of plain float32."""

    def losses(precision: str, fused: bool) -> torch.Tensor:
        network = workload.network().to(device)
        for lookup in network.lookups():
            assert isinstance(lookup, EmbeddingTables)
            lookup.kernels = "triton" if fused else "plain"
        step = OurStep(network, precision, device)
        found = [step(draw_batch(workload, batch_size, seed)) for seed in range(steps)]
        return torch.stack(found).double().cpu()

    exact, fused, bf16 = losses("32-true", False), losses("32-true", True), losses("bf16-mixed", True)
    first = abs(fused[0] / exact[0] - 1).item()
    windows = zip(exact.split(_WINDOW), bf16.split(_WINDOW), strict=True)
    drift = max(abs(mine.mean() / plain.mean() - 1).item() for plain, mine in windows)
    return [
        Target("fused float32: first loss against eager", "1e-6", f"{first:.1e}", first <= 1e-6),
        Target(f"fused bfloat16: means of {_WINDOW} losses, {steps} steps", "2e-3", f"{drift:.1e}", drift <= 2e-3),
    ]


def _rate_targets(name: str, rows: list[Measurement]) -> Iterator[Target]:
    ours = [row for row in rows if row.implementation == "ours" and row.precision == "bf16-mixed" and row.shown]
    if name == "paper":
        seconds = ours[0].extra["seconds_for_1000"]
        yield Target("section 5.2, 1,000 batches", "under 1.0 s", f"{seconds:.2f} s", seconds < 1.0)
    asked = {"step dlrm": 15e6, "fit": 10e6}
    if name in asked:
        rate = ours[0].samples_per_s
        yield Target(name, f"{asked[name]:,.0f} samples/s", f"{rate:,.0f}", rate >= asked[name])


def render_targets(targets: list[Target]) -> str:
    cells = [("target", "asked", "found", "")]
    cells += [(target.what, target.asked, target.found, "met" if target.met else "MISSED") for target in targets]
    return "\n".join(aligned(cells, left=(0, 3)))
