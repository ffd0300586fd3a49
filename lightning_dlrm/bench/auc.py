"""``bench auc``: the exact AUC at the scale of Terabyte's held-out day, against scikit-learn."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dlrm.bench.measurement import (
    DEFAULT,
    Implementation,
    Measurement,
    add_rounds,
    check_numbers,
    peak_bytes,
    speed_ratio,
    time_rounds,
)
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.objectives.metrics import exact_auc

DESCRIPTION = """\
Time the exact AUC of random logits and labels, and compare it with scikit-learn.

examples:
  python -m lightning_dlrm bench auc
  python -m lightning_dlrm bench auc --samples 5000000 --click-rate 0.25 --rounds 5
"""
DETAILS = """\
The AUCs of lightning_dlrm and of scikit-learn are timed in turns on at most 5,000,000 samples, because scikit-learn
needs about 100 bytes a sample. If --samples is more, that of lightning_dlrm is also timed alone on all of them. It
takes the samples in batches, as an evaluation collects them. The default is the size of Terabyte's held-out day.
"""

_PEER_SAMPLES = 5_000_000
_BATCH = 16_384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=90_000_000, metavar="N", help=f"number of samples {DEFAULT}")
    parser.add_argument("--click-rate", type=float, default=0.035, metavar="SHARE", help=f"share of labels 1 {DEFAULT}")
    add_rounds(parser, 3)


def run(args: argparse.Namespace) -> list[Measurement]:
    """Time the AUC.

    Raises:
        UserError: an option is out of range.
    """
    check_numbers(args)
    if args.samples < 2 or not 0 < args.click_rate < 1:
        raise UserError("bench auc needs --samples of 2 or more, and a --click-rate between 0 and 1")
    generator = torch.Generator().manual_seed(1)
    # In batches, as an evaluation collects them.
    sizes = [_BATCH] * (args.samples // _BATCH) + [args.samples % _BATCH]
    logits = [torch.randn(size, generator=generator) for size in sizes]
    labels = [(torch.rand(size, generator=generator) < args.click_rate).to(torch.int8) for size in sizes]
    before = peak_bytes()
    found = exact_auc(logits, labels)
    beside = {"bytes_beside_samples": float(peak_bytes() - before)}
    rows = []
    if args.samples > _PEER_SAMPLES:
        ours = time_rounds({"ours": lambda: exact_auc(logits, labels)}, args.rounds)["ours"]
        rows.append(_row(args, "ours", args.samples, ours, beside))
        batches = _PEER_SAMPLES // _BATCH
        logits, labels, beside = logits[:batches], labels[:batches], {}
        found = exact_auc(logits, labels)
    # Not ours on one long tensor: torch would wait for its threads, which takes most of the time on a busy machine.
    samples = sum(map(len, labels))
    peer = _scikit_learn(torch.cat(logits), torch.cat(labels))
    difference = abs(peer() - found)
    seconds = time_rounds({"ours": lambda: exact_auc(logits, labels), "peer": peer}, args.rounds)
    compared = speed_ratio("speed_over_peer", seconds["ours"], seconds["peer"]) | {"difference": difference}
    return [
        *rows,
        _row(args, "ours", samples, seconds["ours"], compared | beside),
        _row(args, "peer", samples, seconds["peer"], {}),
    ]


def _scikit_learn(logits: Tensor, labels: Tensor) -> Callable[[], float]:
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise UserError("bench auc compares with scikit-learn: pip install 'lightning-dlrm[dev]'") from error
    return lambda: float(roc_auc_score(labels.numpy(), logits.numpy()))


def _row(
    args: argparse.Namespace,
    implementation: Implementation,
    samples: int,
    seconds: list[float],
    extra: dict[str, float],
) -> Measurement:
    return Measurement.of_rounds(
        seconds,
        work="auc",
        case=f"{samples:,} samples, click rate {args.click_rate:g}",
        implementation=implementation,
        device="cpu",
        precision="32-true",
        batch_size=_BATCH,
        samples=samples,
        extra=extra,
    )
