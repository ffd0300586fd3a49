"""Text that ``compare`` prints: the arms at its start, and the result at its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dlrm.compare.experiment import PlannedArm
from lightning_dlrm.compare.results import METRIC_TITLES, Comparison
from lightning_dlrm.compare.runs import Arm, format_value
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.sparkline import sparkline

SPARK_WIDTH = 12
"""Characters of a sparkline, with which the closing table fits into 80 columns."""


def arms_table(arms: Sequence[PlannedArm], compared: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """Return a table of each arm's parameters and FLOPs, and of the settings in which the arms differ."""
    rows: list[tuple[str, ...]] = [("arm", "tables", "dense", "total", "forward", "training", "samples")]
    for arm in arms:
        size = arm.size
        counts = (f"{count:,}" for count in (size.tables, size.dense, size.total))
        flops = (f"{n:,}" if n else "unknown" for n in (size.flops_per_sample_forward, size.flops_per_sample_training))
        samples = f"{arm.samples:,.0f}" if arm.samples != float("inf") else "unbounded"
        rows.append((arm.name, *counts, *flops, samples))
    lines = [
        *table(rows),
        "tables, dense, total: parameters; forward, training: FLOPs per sample",
        "samples: trained on in a run, in the same order for all arms of a seed",
        "",
    ]
    differ: list[tuple[str, ...]] = [("differs", *(arm.name for arm in arms))]
    for key, values in compared.items():
        cells = [format_value(values.get(arm.name)) for arm in arms]
        if len(set(cells)) > 1:
            differ.append((key.removeprefix("model.").replace("init_args.", "").replace(".class_path", ""), *cells))
    lines += table(differ)
    lines += ["", f"seeds {', '.join(map(str, seeds))}: {len(arms) * len(seeds)} runs"]
    return "\n".join(lines)


def closing_words(comparison: Comparison, output: Path) -> str:
    """Return a table of each configuration's metrics and validations, and the verdicts."""
    lines = [f"WARNING: {warning}" for warning in comparison.warnings]
    columns = ("auc", "log_loss", "accuracy", "calibration")
    rows: list[tuple[str, ...]] = [("", *(METRIC_TITLES[name] for name in columns), "samples/s", "validation")]
    for arm in comparison.arms:
        values = [np.mean(comparison.values(arm, name)) for name in columns]
        speed = np.median([run.final[names.SAMPLES_PER_SECOND] for run in arm.runs])
        course = sparkline(mean_course(arm, f"{names.VALIDATION}/auc"), SPARK_WIDTH)
        rows.append((arm.name, *(f"{value:.5f}" for value in values), f"{speed:,.0f}", course))
    seeds = ", ".join(dict.fromkeys(str(len(arm.runs)) for arm in comparison.arms))
    lines += ["", *table(rows)]
    of = "one seed each" if comparison.one_seed else f"means over the seeds ({seeds})"
    on = comparison.scored if comparison.warnings else f"the {comparison.split} split"
    lines += [f"{of}, on {on}; validation: the course of the AUC", ""]
    lines += [pair.sentence for pair in comparison.pairs]
    lines += ["", f"report: {output / 'report.html'}"]
    return "\n".join(lines)


def mean_course(arm: Arm, metric: str) -> list[float]:
    """Return the mean over a configuration's runs of each logged value, in order."""
    courses = [run.curve(names.SAMPLES, metric)[1] for run in arm.runs]
    shortest = min(len(course) for course in courses)
    return [float(np.mean([course[i] for course in courses])) for i in range(shortest)]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
