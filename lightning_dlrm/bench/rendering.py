"""Results of benchmarks for a terminal: the result in words, a warning if rounds differ, and the table of all rows."""

from collections.abc import Mapping, Sequence

from lightning_dlrm.bench.measurement import Measurement, duration
from lightning_dlrm.contracts.terminal import aligned, binary_size, counted

_DLRM = {"baseline": "plain PyTorch", "peer": "facebookresearch/dlrm"}
_NAMES: Mapping[str, Mapping[str, str]] = {
    "auc": {"peer": "scikit-learn"},
    "fit": _DLRM,
    "loader": {"baseline": "bare pyarrow"},
    "lookup": {"baseline": "plain PyTorch", "peer": "FBGEMM"},
    "paper": _DLRM,
    "preprocess": {"baseline": "pyarrow.csv", "peer": "facebookresearch/dlrm"},
    "sharding": {"baseline": "whole tables under DDP", "peer": "whole tables without exchange"},
    "step": _DLRM,
    "trace": {"baseline": "a Python list"},
}
"""Benchmark -> what its contenders beside this project are."""
_COMPARISONS: Mapping[str, str] = {
    "speed_over_baseline": "{:.3g} times as fast as {baseline}",
    "speed_over_peer": "{:.3g} times as fast as {peer}",
    "speed_over_peer_without_data": "{:.3g} times as fast as {peer} without its loader",
    "speed_over_host": "{:.3g} times as fast as with rows in host memory",
    "of_bare_loop": "{:.0%} of the speed of the bare loop",
    "of_baseline": "{:.0%} of the speed of {baseline}",
    "of_baseline_cpu": "{:.0%} of that speed by processor time",
}
"""Name of a further number that compares two contenders -> its words."""
_WORDS: Mapping[str, str] = {
    **_COMPARISONS,
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
    "bytes_beside_samples": "memory beside the samples {}",
    "table_bytes_per_rank": "tables {} a rank",
}
_LARGE_SPREAD = 0.25
"""Spread of the rounds, as a share of their median, from which on a result is uncertain."""
_MOST_RESULTS = 3


def headline(rows: Sequence[Measurement]) -> list[str]:
    """Return the result in words, a line for each of the first rows that compare this project with another contender,
    and a warning if rounds differ much."""
    compared = [row for row in rows if row.shown and not row.error and _COMPARISONS.keys() & row.extra.keys()]
    lines = []
    for row in compared[:_MOST_RESULTS]:
        whole = [_words(row, name) for name in _TIMES if name.endswith("_for_1000") and name in row.extra]
        time = whole[0] if whole else f"{duration(row.median_s)} for {row.samples:,} samples"
        comparisons = [_words(row, name) for name in _COMPARISONS if name in row.extra]
        lines.append(f"{row.case}: {_name(row)} takes {time}, {', '.join(comparisons)}")
    measured = [row for row in rows if row.shown and not row.error and row.median_s]
    uncertain = [row for row in measured if row.spread_s / row.median_s > _LARGE_SPREAD]
    if uncertain:
        worst = max(uncertain, key=lambda row: row.spread_s / row.median_s)
        more = f" (and those of {counted(len(uncertain) - 1, 'other row')} by less)" if len(uncertain) > 1 else ""
        lines.append(
            f"warning: the rounds of {worst.case} ({_name(worst)}) differ by "
            f"{worst.spread_s / worst.median_s:.0%} of their median{more}. The "
            "result is uncertain: stop other work on this machine, or give more --rounds"
        )
    return lines


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
                        duration(row.spread_s) if row.spread_s else "",
                        f"{row.samples_per_s:,.0f}",
                    ]
                ),
                "" if floor is None or row.error else duration(floor),
                "" if floor is None or row.error else f"{float(f'{row.median_s / floor:.3g}'):,g}",
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
            shown_names = [name for name in row.extra if not name.endswith(("_low", "_high"))]
            text.append("    " + ", ".join(_words(row, name) for name in shown_names))
    text.append("Times are medians of the rounds; less is better. --help has the details.")
    if any(row.spread_s for row in shown):
        text.append("The spread is the time of the slowest round minus that of the fastest.")
    if any(row.floor_s is not None for row in shown):
        text.append("The floor is the least time on this machine; x floor is median / floor.")
    return "\n".join(text)


def _name(row: Measurement) -> str:
    """Return what the contender of a row is."""
    return "lightning_dlrm" if row.implementation == "ours" else _others(row.work)[row.implementation]


def _others(work: str) -> Mapping[str, str]:
    return {"baseline": "the baseline", "peer": "the peer", **_NAMES.get(work, {})}


def _words(row: Measurement, name: str) -> str:
    """Return a further number of a row in words; of a speed also its range over the rounds."""
    value, extra = row.extra[name], row.extra
    if name in _WORDS:
        words = _WORDS[name].format(value, **_others(row.work))
        low, high = (f"{extra.get(f'{name}_{end}', value):.3g}" for end in ("low", "high"))
        return f"{words} ({low} to {high} in the rounds)" if low != high else words
    if name in _SIZES:
        return _SIZES[name].format(binary_size(value))
    if name in _TIMES:
        return _TIMES[name].format(duration(value))
    return f"{name.removesuffix('_s').replace('_', ' ')} {duration(value)}"
