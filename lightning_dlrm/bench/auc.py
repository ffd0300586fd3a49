"""``bench auc``: the exact AUC at the scale of Terabyte's held-out day, against scikit-learn."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dlrm.bench.measurement import Measurement, median_and_spread, peak_bytes, time_rounds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.objectives.metrics import exact_auc

DESCRIPTION = """\
Times the exact AUC of drawn logits and labels: ours of as many as asked for, and scikit-learn's of at most 5,000,000
(it needs some 100 bytes a sample). Prints the difference of the two on those, and the process's peak memory.

examples:
  python -m lightning_dlrm bench auc
  python -m lightning_dlrm bench auc --samples 5000000 --click-rate 0.25 --rounds 5
"""

_PEER_SAMPLES = 5_000_000
_BATCH = 16_384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=90_000_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--click-rate", type=float, default=0.035, metavar="P", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="the median counts (default: %(default)s)")


def run(args: argparse.Namespace) -> list[Measurement]:
    """Times the AUC as ``add_arguments`` was told.

    Raises:
        UserError: an option is out of range.
    """
    if args.samples < 2 or args.rounds < 1 or not 0 < args.click_rate < 1:
        raise UserError("bench auc needs --samples of 2 or more, --rounds of 1 or more, --click-rate between 0 and 1")
    generator = torch.Generator().manual_seed(1)
    # In batches, as an evaluation collects them.
    sizes = [_BATCH] * (args.samples // _BATCH) + [args.samples % _BATCH]
    logits = [torch.randn(size, generator=generator) for size in sizes]
    labels = [(torch.rand(size, generator=generator) < args.click_rate).to(torch.int8) for size in sizes]
    before = peak_bytes()
    ours = time_rounds({"ours": lambda: exact_auc(logits, labels)}, args.rounds)["ours"]
    extra = peak_bytes() - before
    rows = [_row(args, "ours", args.samples, ours, {"bytes_beside_samples": extra})]
    few_logits, few_labels = (torch.cat(parts)[:_PEER_SAMPLES] for parts in (logits, labels))
    peer = _scikit_learn(few_logits, few_labels)
    difference = abs(peer() - exact_auc(few_logits, few_labels))
    contenders = {"ours": lambda: exact_auc(few_logits, few_labels), "peer": peer}
    seconds = time_rounds(contenders, args.rounds)
    rows.append(_row(args, "ours", len(few_labels), seconds["ours"], {"difference": difference}))
    rows.append(_row(args, "peer", len(few_labels), seconds["peer"], {}))
    return rows


def _scikit_learn(logits: Tensor, labels: Tensor) -> Callable[[], float]:
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise UserError("bench auc compares with scikit-learn: pip install 'lightning-dlrm[dev]'") from error
    return lambda: float(roc_auc_score(labels.numpy(), logits.numpy()))


def _row(
    args: argparse.Namespace, implementation: str, samples: int, seconds: list[float], extra: dict[str, float]
) -> Measurement:
    median, spread = median_and_spread(seconds)
    return Measurement(
        work="auc",
        case=f"{samples:,} samples, click rate {args.click_rate:g}",
        implementation="ours" if implementation == "ours" else "peer",
        device="cpu",
        precision="32-true",
        batch_size=_BATCH,
        samples=samples,
        median_s=median,
        spread_s=spread,
        extra=extra,
    )
