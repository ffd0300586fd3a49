"""``bench trace``: stack distances profiled, and accesses generated from a profile, on one core."""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from datamodules.generate.profiles import Profile, Profiler
from datamodules.generate.trace import BLOCK_ACCESSES, TraceGenerator
from lightning_dlrm.bench.measurement import (
    DEFAULT,
    Implementation,
    Measurement,
    add_rounds,
    check_numbers,
    speed_ratio,
    time_rounds,
)
from lightning_dlrm.contracts.errors import UserError

DESCRIPTION = """\
Time the profiling of a column's accesses, and the generation of accesses from it.

examples:
  python -m lightning_dlrm bench trace
  python -m lightning_dlrm bench trace --table-rows 10000 --accesses 2000000
"""
DETAILS = """\
The accesses are uniform, which is the worst case for an LRU stack, or skewed. The baseline keeps its stack in a Python
list, as published generators do. It is timed on fewer accesses of the same kind, with a stack that holds the whole
table.
"""

_BASELINE_ACCESSES = 300
_PIECE = 16_384  # a row group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table-rows", type=int, default=1_000_000, metavar="N", help=f"rows of the table {DEFAULT}")
    parser.add_argument("--accesses", type=int, default=10_000_000, metavar="N", help=f"accesses to rows {DEFAULT}")
    add_rounds(parser, 3)


def run(args: argparse.Namespace) -> list[Measurement]:
    """Time profiling and generation.

    Raises:
        UserError: an option is out of range, or numba is not installed.
    """
    check_numbers(args)
    if args.table_rows >= 2**31 or args.accesses < BLOCK_ACCESSES:
        raise UserError(
            f"bench trace needs --table-rows of at most {2**31 - 1} and --accesses of at least {BLOCK_ACCESSES}"
        )
    uniform = np.random.default_rng(1).random(args.accesses)
    kinds = {
        "uniform": (uniform * args.table_rows).astype(np.int32),
        "skewed": np.minimum(args.table_rows**uniform - 1, args.table_rows - 1).astype(np.int32),
    }
    measurements = []
    for kind, ids in kinds.items():
        profile = _profile(ids, args.table_rows)
        few = ids[-_BASELINE_ACCESSES:]
        distances = np.maximum(_distances(ids, args.table_rows)[-_BASELINE_ACCESSES:], 1)
        stack = list(range(args.table_rows))
        contenders: dict[tuple[str, Implementation, int], Callable[[], object]] = {
            ("profiled", "ours", len(ids)): partial(_profile, ids, args.table_rows),
            ("profiled", "baseline", len(few)): partial(_list_distances, few.tolist(), stack),
            ("generated", "ours", len(ids)): partial(_generate, profile, len(ids)),
            ("generated", "baseline", len(few)): partial(_list_accesses, distances.tolist(), stack),
        }
        seconds = time_rounds(contenders, args.rounds)
        speeds = {
            what: speed_ratio(
                "speed_over_baseline",
                seconds[what, "ours", len(ids)],
                seconds[what, "baseline", len(few)],
                len(ids) / len(few),
            )
            for what in ("profiled", "generated")
        }
        measurements += [
            Measurement.of_rounds(
                of_rounds,
                work="trace",
                case=f"{kind} accesses {what}, {profile.distinct:,} distinct rows",
                implementation=implementation,
                device="cpu",
                precision="",
                batch_size=0,
                samples=accesses,
                extra=speeds[what] if implementation == "ours" else {},
            )
            for (what, implementation, accesses), of_rounds in seconds.items()
        ]
    return measurements


def _profile(ids: NDArray[np.int32], table_rows: int) -> Profile:
    profiler = Profiler("C1", table_rows)
    for start in range(0, len(ids), _PIECE):
        profiler.add(ids[start : start + _PIECE])
    return profiler.profile()


def _generate(profile: Profile, accesses: int) -> None:
    trace = TraceGenerator(profile, seed=0)
    for _ in range(0, accesses, BLOCK_ACCESSES):
        trace.next_block()


def _distances(ids: NDArray[np.int32], table_rows: int) -> NDArray[np.int32]:
    from datamodules.generate.lru import LruStack

    return LruStack(table_rows).distances(ids)


def _list_distances(ids: list[int], stack: list[int]) -> list[int]:
    """Return stack distances; the stack is a list with the latest row last."""
    distances = []
    for row in ids:
        place = stack.index(row)
        distances.append(len(stack) - place)
        stack.append(stack.pop(place))
    return distances


def _list_accesses(distances: list[int], stack: list[int]) -> list[int]:
    for distance in distances:
        stack.append(stack.pop(-distance))
    return stack[-len(distances) :]
