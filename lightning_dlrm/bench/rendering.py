"""Results of benchmarks for a terminal: the result in words, a warning if rounds differ, and the table of all rows."""

from collections.abc import Mapping, Sequence

from lightning_dlrm.bench.measurement import Measurement, duration, three_digits
from lightning_dlrm.contracts.terminal import aligned, binary_size, counted

_DLRM = {"baseline": "plain PyTorch", "peer": "facebookresearch/dlrm"}
_NAMES: Mapping[str, Mapping[str, str]] = {
    "auc": {"peer": "scikit-learn"},
    "fit": _DLRM,
    "loader": {"baseline": "bare pyarrow"},
    "lookup": {"baseline": "plain PyTorch with Adagrad", "peer": "FBGEMM"},
    "paper": _DLRM,
    "preprocess": {"baseline": "pyarrow.csv", "peer": "facebookresearch/dlrm"},
    "sharding": {"baseline": "whole tables under DDP", "peer": "whole tables without exchange"},
    "step": _DLRM,
    "trace": {"baseline": "a Python list"},
}
"""Benchmark -> what its contenders beside this project are."""
_SPEEDS: Mapping[str, str] = {
    "speed_over_baseline": "{baseline}",
    "speed_over_peer": "{peer}",
    "speed_over_peer_without_data": "{peer} without its loader",
    "speed_over_host": "itself with rows in host memory",
}
"""Name of a ratio of speeds -> the contender that it compares with."""
_SHARES: Mapping[str, str] = {
    "of_bare_loop": "the speed of the bare loop",
    "of_baseline": "the speed of {baseline}",
    "of_baseline_cpu": "that speed by processor time",
}
"""Name of a ratio of speeds that is shown in percent -> its words."""
_RATIOS = (*_SPEEDS, *_SHARES)
"""Names of all ratios of speeds."""
_WORDS: Mapping[str, str] = {
    "difference": "its AUC differs by {:.2g} from that of {peer}",
    "data_wait": "{:.0%} of its time is its loader's",
    "threads": "threads {:.0f}",
    "first": "{:.1e} difference of the first loss",
    "drift": "{:.1e} difference of later losses",
    "met": "targets met: {:.0f} (1 is yes)",
    "asked_samples_per_s": "target {:,.0f} samples/s",
    "largest_table_rows": "largest table {:,.0f} rows",
}
_TIMES: Mapping[str, str] = {
    "seconds_for_1000": "{} for 1,000 batches",
    "projected_seconds_for_1000": "{} for 1,000 batches (projected)",
    "seam_s": "{} from an epoch to the next",
    "host_s": "host {}",
    "cpu_s": "processor time {}",
}
"""Name of a time -> its words; other times are those of stages."""
_SIZES: Mapping[str, str] = {
    "peak_bytes": "peak memory {}",
    "peak_disk_bytes": "peak disk space {}",
    "output_bytes": "output {}",
    "bytes_beside_samples": "computing the AUC adds {} to the peak memory",
    "table_bytes_per_rank": "tables {} a rank",
}
_EXACT = 1e-15
"""Difference of two AUCs below which they are equal in float64."""
LARGE_SPREAD = 0.25
"""Spread of the rounds, as a share of their median, from which on a result is uncertain."""
_MOST_OF_LOOP = 1.05
"""Speed of a fit, as a share of that of its own loop, above which the measurement is uncertain."""
_MOST_RESULTS = 3


def headline(rows: Sequence[Measurement]) -> list[str]:
    """Return the result in words, a line for each of the first rows that compare this project with another contender,
    and a warning if rounds differ much."""
    compared = [row for row in rows if row.shown and not row.error and any(name in row.extra for name in _RATIOS)]
    lines = []
    for row in compared[:_MOST_RESULTS]:
        whole = next((name for name in _TIMES if name.endswith("_for_1000") and name in row.extra), None)
        samples = f"{row.samples:,} samples"
        words = "{}" if row.case.startswith(samples) else f"{{}} for {samples}"
        words = words if whole is None else _TIMES[whole]
        time = words.format(_time(row, 1.0 if whole is None else row.extra[whole] / row.median_s))
        ratios = [_comparison(row, name) for name in _RATIOS if name in row.extra]
        lines.append(f"{row.case}: {_name(row)} takes {', '.join([time, *ratios])}")
    measured = [row for row in rows if row.shown and not row.error and row.median_s]
    if warning := _uncertainty(measured):
        lines.append(warning)
    shares = [row.extra["of_bare_loop_high"] for row in measured if "of_bare_loop_high" in row.extra]
    if shares and max(shares) > _MOST_OF_LOOP:
        lines.append(
            f"warning: a fit has up to {max(shares):.0%} of the speed of the bare loop, which is a part of it. So "
            "other work disturbed the measurement: stop that work, or give more --rounds"
        )
    return lines


def _time(row: Measurement, factor: float) -> str:
    """Return a multiple of the median of the rounds; if they differ much, of the fastest and of the slowest."""
    if not is_uncertain(row):
        return duration(factor * row.median_s)
    return f"{duration(factor * row.fastest_s)} to {duration(factor * (row.fastest_s + row.spread_s))}"


def is_uncertain(row: Measurement) -> bool:
    """Return whether the times of the rounds differ much."""
    return row.spread_s > LARGE_SPREAD * row.median_s


def _uncertainty(measured: Sequence[Measurement]) -> str:
    """Return a warning if times or ratios are uncertain; empty if they are not."""
    # Each round of the paper's workload takes batches of its own.
    more = "--batches and --rounds" if any(row.work == "paper" for row in measured) else "--rounds"
    do = f"Stop other work on this machine, or give more {more}"
    ranges = [(_range(row, name), _is_sure(row, name)) for row in measured for name in _SPEEDS]
    unsure = [range_ for range_, is_sure in ranges if range_ is not None and not is_sure]
    unknown = f"Another run may give other {'ratios' if unsure else 'times'}"
    unknown += ", so it is not known which is faster. " if any(low < 1 < high for low, high in unsure) else ". "
    if uncertain := [row for row in measured if is_uncertain(row)]:
        worst, *others = sorted(uncertain, key=lambda row: -row.spread_s / row.median_s)
        is_one_case = len({row.case for row in measured}) == 1
        label, *labels = [_name(row) if is_one_case else f"{_name(row)} ({row.case})" for row in (worst, *others)]
        also = [f"those of {name} by {_spread(row)}" for name, row in zip(labels, others, strict=True)]
        if len(also) > _MOST_RESULTS:
            also = [f"those of {counted(len(also), 'other row')} by less"]
        times = ", ".join([f"the times of {label} differ by {_spread(worst)} of their median", *also])
        return f"warning: uncertain: {times}. {unknown}{do}"
    if unsure:
        return f"warning: a ratio differs by more than {LARGE_SPREAD:.0%} between the rounds. {unknown}{do}"
    return ""


def _spread(row: Measurement) -> str:
    return f"{row.spread_s / row.median_s:.0%}"


def render(rows: Sequence[Measurement]) -> str:
    """Return the rows as a table for a terminal: cases, their implementations, and those' further numbers."""
    shown = [row for row in rows if row.shown or row.error]
    cells: list[tuple[str, ...]] = [("", "median", "spread", "samples/s", "floor", "x floor")]
    for row in shown:
        floor = row.floor_s
        cells.append(
            (
                f"  {_name(row)}",
                *(
                    ["", "", ""]
                    if row.error
                    else [
                        duration(row.median_s),
                        _spread(row) if row.spread_s else "",
                        f"{row.samples_per_s:,.0f}",
                    ]
                ),
                "" if floor is None or row.error else duration(floor),
                "" if floor is None or row.error else three_digits(row.median_s / floor),
            )
        )
    header, *lines = aligned(cells, left=(0,))
    text, case = [header], ""
    for row, line in zip(shown, lines, strict=True):
        text += [row.case] * (row.case != case) + [line]
        case = row.case
        if row.error:
            text.append(f"    {row.error}")
        elif row.extra:
            names = [name for name in row.extra if not name.endswith(("_low", "_high"))]
            ratios = [name for name in names if name in _RATIOS]
            for of_line in (ratios, [name for name in names if name not in _RATIOS]):
                text += ["    " + "; ".join(_words(row, name) for name in of_line)] * bool(of_line)
    return "\n".join(text + _notes(shown))


def _notes(shown: Sequence[Measurement]) -> list[str]:
    """Return the lines below a table, which say what its numbers are."""
    if any(row.spread_s for row in shown):
        lines = [
            "Times are medians of the rounds; less is better. --help has the details.",
            "The spread is the time of the slowest round minus that of the fastest, as a",
            "share of the median.",
        ]
    else:
        lines = ["Times are of one round, which shows no spread; less is better."]
    sure = [_is_sure(row, name) for row in shown for name in _RATIOS if _range(row, name)]
    if any(sure):
        lines += [
            "A ratio is the median of the ratios of the rounds, not the ratio of the",
            "medians; in brackets is its range over the rounds.",
        ]
    if not all(sure):
        lines += [
            "An uncertain ratio is given as its range over the rounds; in brackets is the",
            "median of the ratios of the rounds, which is not the ratio of the medians.",
        ]
    if any(row.floor_s is not None for row in shown):
        lines += [
            "The floor is the least time of this work, by rates of the machine that were",
            "measured now. x floor is median / floor, and 1 is the limit. x floor is large",
            "if tensors are small, because starting operators takes time, or if other work",
            "ran during the rounds.",
        ]
    if any(row.floor_s is not None and row.median_s < row.floor_s for row in shown):
        lines.append("Below 1: data were in caches, or a limit was measured too low.")
    return lines


def _name(row: Measurement) -> str:
    """Return what the contender of a row is."""
    return "lightning_dlrm" if row.implementation == "ours" else _others(row.work)[row.implementation]


def _others(work: str) -> Mapping[str, str]:
    return {"baseline": "the baseline", "peer": "the peer", **_NAMES.get(work, {})}


def _words(row: Measurement, name: str) -> str:
    """Return a further number of a row in words."""
    value = row.extra[name]
    if name in _RATIOS:
        return _comparison(row, name)
    if name == "difference" and value < _EXACT:
        return f"its AUC differs by less than {_EXACT:g} from that of {_others(row.work)['peer']}"
    if name in _WORDS:
        return _WORDS[name].format(value, **_others(row.work))
    if name in _SIZES:
        return _SIZES[name].format(binary_size(value))
    if name in _TIMES:
        return _TIMES[name].format(duration(value))
    return f"{name.removesuffix('_s').replace('_', ' ')} {duration(value)}"


def _range(row: Measurement, name: str) -> tuple[float, float] | None:
    """Return the lowest and the highest ratio of a round; None if there is no ratio, or no range."""
    low, high = (row.extra.get(f"{name}_{end}") for end in ("low", "high"))
    return None if low is None or high is None or low == high else (low, high)


def _is_sure(row: Measurement, name: str) -> bool:
    """Return whether a row has several rounds, whose ratios are near each other."""
    range_ = _range(row, name)
    return range_ is not None and range_[1] - range_[0] <= LARGE_SPREAD * row.extra[name]


def _comparison(row: Measurement, name: str) -> str:
    """Return a ratio of speeds in words: its median first if it is sure, otherwise its range over the rounds."""
    is_share = name in _SHARES
    words = (f"of {_SHARES[name]}" if is_share else f"times as fast as {_SPEEDS[name]}").format(**_others(row.work))
    value, range_ = (f"{row.extra[name]:.0%}" if is_share else three_digits(row.extra[name])), _range(row, name)
    if range_ is None:
        return f"{value} {words}" + " (uncertain: one round)" * (not row.spread_s)
    rounds = " to ".join(dict.fromkeys(f"{end:.0%}" if is_share else three_digits(end) for end in range_))
    if _is_sure(row, name):
        return f"{value} {words} (rounds: {rounds})"
    return f"{rounds} {words} (uncertain, median {value})"
