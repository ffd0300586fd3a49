"""The result of a comparison: ``report.html``, one file that opens without a network; a page at W&B; text."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np

from lightning_dlrm.bench.breakdown import KINDS
from lightning_dlrm.cli.report import rounded
from lightning_dlrm.compare.anatomy import Anatomy
from lightning_dlrm.compare.cost_figures import disturbed
from lightning_dlrm.compare.drawing import PAGE_WIDTH, Picture
from lightning_dlrm.compare.experiment import PlannedArm
from lightning_dlrm.compare.ranking import answer, behind, distances, pair_of, ranked, with_spread
from lightning_dlrm.compare.results import METRIC_TITLES, Comparison, Pair, sample_counts, span
from lightning_dlrm.compare.runs import Arm, by_data, differing, format_value
from lightning_dlrm.compare.statistics import Score
from lightning_dlrm.contracts.terminal import aligned, emphasized, wrapped
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.sparkline import sparkline
from lightning_dlrm.tracking.wandb_run import ComparisonPage, Table

SPARK_WIDTH = 12
"""Characters of a sparkline, so that the closing table fits into 80 columns."""
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(
    comparison: Comparison,
    pictures: Sequence[Picture],
    anatomies: Mapping[str, Anatomy],
    operator_notes: Sequence[str],
    path: Path,
    operators: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Write the report.

    Args:
        comparison: result of the comparison.
        pictures: figures in their order, which are embedded in the file.
        anatomies: configuration -> its anatomy.
        operator_notes: reason for each configuration whose operators were not measured.
        path: HTML file.
        operators: measured configuration -> kind of operator -> milliseconds of a step.
    """
    alone = {arm: sum(kinds.values()) for arm, kinds in (operators or {}).items()}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    head, more = answer(comparison)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        comparison=comparison,
        head=head,
        more=more,
        ranking=_ranking(comparison),
        pairs=comparison.pairs,
        overlapping=_overlapping(comparison),
        data=by_data(comparison.arms),
        metric_titles=METRIC_TITLES,
        optimum=names.OPTIMUM_AUC,
        scores=_summary(comparison),
        costs=_costs(comparison, anatomies, alone),
        disturbed=disturbed(comparison, anatomies, operators or {}),
        pictures={name: [found for found in pictures if found.name == name] for name in names.COMPARISON_FIGURES},
        page_width=PAGE_WIDTH,
        operator_notes=operator_notes,
        operators=_operators(comparison, operators or {}),
        parameters=_parameters(comparison.arms, anatomies),
        settings=[
            ["setting", *(arm.name for arm in comparison.arms)],
            *([_short(key), *cells] for key, *cells in _differing(comparison.arms)),
        ],
        runs=_runs(comparison),
    )
    path.write_text(text, encoding="utf-8")


def _ranking(comparison: Comparison) -> list[list[str]]:
    """Return the configurations with their scores, the highest AUC first; the first row has the titles."""
    first = ranked(comparison)[0]
    rows = [["configuration", "AUC", "behind the first (95% interval)", "verdict", "log loss"]]
    for arm in ranked(comparison):
        is_behind = behind(comparison, arm)
        pair = pair_of(comparison, first, arm) if is_behind else None
        verdict = "" if pair is None else _verdict_on_loser(pair)
        scores = [with_spread(comparison, arm, metric, 4) for metric in ("auc", "log_loss")]
        rows.append([arm.name, scores[0], is_behind, verdict, scores[1]])
    return rows


def _verdict_on_loser(pair: Pair) -> str:
    """Return the verdict on the side with the worse mean, with its adjusted p."""
    if pair.single:
        return pair.word
    return f"{'worse' if pair.decided else 'no verdict'} (p {pair.p_adjusted:.2g})"


def _overlapping(comparison: Comparison) -> bool:
    """Return whether two configurations differ by a verdict although their means, plus or minus the standard
    deviations of their runs, overlap."""
    arms = {arm.name: arm for arm in comparison.arms}
    return any(
        pair.decided
        and pair.difference.paired
        and abs(pair.interval.value)
        < sum(np.std(comparison.values(arms[name], pair.metric), ddof=1) for name in (pair.a, pair.b))
        for pair in comparison.pairs
    )


def _summary(comparison: Comparison) -> list[list[str]]:
    """Return every score of every configuration, a row each; the first row has the titles."""
    titles, best = _titles(comparison), f"{names.VALIDATION}/auc"
    rows = [["configuration", *titles.values(), "best validation AUC"]]
    for arm in ranked(comparison):
        rows.append(
            [
                arm.name,
                *(with_spread(comparison, arm, metric) for metric in titles),
                f"{np.mean([run.best[best] for run in arm.runs]):.5f}",
            ]
        )
    return rows


def _costs(comparison: Comparison, anatomies: Mapping[str, Anatomy], alone: Mapping[str, float]) -> list[list[str]]:
    """Return time, memory and size of every configuration, a row each; the first row has the titles.

    Args:
        comparison: result of the comparison.
        anatomies: configuration -> its anatomy.
        alone: measured configuration -> milliseconds of a step outside training.
    """
    times = {names.TRAINING_SECONDS: "training, s", names.SAMPLES_PER_SECOND: "samples/s"}
    titles = [f"{title}{'' if comparison.steady(name) else ' (not comparable)'}" for name, title in times.items()]
    steps = ["step in training, ms", "step alone, ms"] if alone else []
    rows = [
        ["configuration", "samples", *titles, *steps, "peak memory, GiB", "parameters",
         "training FLOPs per sample, dense parts"]
    ]  # fmt: skip
    for arm in ranked(comparison):
        rows.append(
            [
                arm.name,
                sample_counts(arm),
                *(_time(comparison, arm, name) for name in times),
                *(_steps(comparison, anatomies, arm, alone) if alone else []),
                f"{arm.median(names.PEAK_MEMORY) / 2**30:.2f}",
                f"{arm[names.PARAMETERS_TOTAL]:,}",
                f"{arm[names.FLOPS_TRAINING]:,}" if arm[names.FLOPS_TRAINING] else "unknown",
            ]
        )
    return rows


def _steps(comparison: Comparison, anatomies: Mapping[str, Anatomy], arm: Arm, alone: Mapping[str, float]) -> list[str]:
    """Return the milliseconds of a step in a configuration's training, and alone."""
    ends = dict.fromkeys(rounded(time) for time in _step_times(comparison, anatomies, arm))
    return [" to ".join(ends), rounded(alone[arm.name]) if arm.name in alone else "-"]


def _step_times(comparison: Comparison, anatomies: Mapping[str, Anatomy], arm: Arm) -> list[float]:
    """Return the milliseconds of a step in a configuration's training: the median, or, if they vary, both ends."""
    steady = comparison.steady(names.SAMPLES_PER_SECOND)
    rates = [arm.median(names.SAMPLES_PER_SECOND)] if steady else span(arm, names.SAMPLES_PER_SECOND)[::-1]
    return [1e3 * anatomies[arm.name].batch_size / rate for rate in rates if rate]


def _titles(comparison: Comparison) -> dict[Score, str]:
    return {metric: METRIC_TITLES[metric] for metric in comparison.metrics}


def _time(comparison: Comparison, arm: Arm, name: str) -> str:
    if comparison.steady(name):
        return rounded(arm.median(name))
    ends = dict.fromkeys(rounded(value) for value in span(arm, name))
    return " to ".join(ends)


def _parameters(arms: Sequence[Arm], anatomies: Mapping[str, Anatomy]) -> list[list[str]]:
    counted = {
        "all": names.PARAMETERS_TOTAL, "in tables": names.PARAMETERS_TABLES, "dense": names.PARAMETERS_DENSE,
        "FLOPs per sample of the dense parts, forward": names.FLOPS_FORWARD,
        "FLOPs per sample of the dense parts, training": names.FLOPS_TRAINING,
    }  # fmt: skip
    rows = [["part", *(arm.name for arm in arms)]]
    rows += [[title, *(f"{arm[name]:,}" for arm in arms)] for title, name in counted.items()]
    for kind, prefix in (("dense", ""), ("tables", "table ")):
        of_arms = [getattr(anatomies[arm.name], kind) for arm in arms]
        for part in dict.fromkeys(name for counts in of_arms for name in counts):
            rows.append([f"{prefix}{part}", *(f"{counts[part]:,}" if part in counts else "-" for counts in of_arms)])
    return rows


def _operators(comparison: Comparison, operators: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return the milliseconds of a step by kind of operator, a column for each measured configuration."""
    measured = {arm.name: operators[arm.name] for arm in ranked(comparison) if arm.name in operators}
    rows = [["milliseconds of a training step", *measured]]
    rows += [[kind, *(f"{times[kind]:.2f}" for times in measured.values())] for kind in KINDS if measured]
    return [*rows, ["step", *(f"{sum(times.values()):.2f}" for times in measured.values())]] if measured else rows


def _differing(arms: Sequence[Arm] | Sequence[PlannedArm]) -> list[list[str]]:
    """Return the settings in which configurations differ: full key, then the value of each, as text.

    An argument of a class is left out if all configurations with such a class give it the same value.
    """
    rows = []
    for key, values in differing({arm.name: arm.settings for arm in arms}).items():
        owner = key.partition(".init_args.")[0] + ".class_path"
        owners = {arm.settings.get(owner) for arm in arms if arm.name in values}
        having = [arm for arm in arms if ".init_args." not in key or arm.settings.get(owner) in owners]
        if len({format_value(values.get(arm.name)) for arm in having}) > 1:
            rows.append([key, *(format_value(values.get(arm.name)) for arm in arms)])
    return rows


def _short(key: str) -> str:
    """Return a setting's key as tables show it: table_optimizer.learning_rate."""
    return key.removeprefix("model.").replace("init_args.", "").replace(".class_path", "")


def _runs(comparison: Comparison) -> list[list[str]]:
    rows = [["run", "seed", *_titles(comparison).values(), "samples", "training, s", "folder"]]
    rows += [
        [
            run.name,
            str(run.seed),
            *(f"{comparison.scores[run.name].metrics[name]:.5f}" for name in comparison.metrics),
            f"{run.final[names.SAMPLES]:,.0f}",
            rounded(run.final[names.TRAINING_SECONDS]),
            str(run.path),
        ]
        for run in comparison.runs
    ]
    return rows


# --- W&B --------------------------------------------------------------------------------------------


def page_of(
    comparison: Comparison,
    pictures: Sequence[Picture],
    anatomies: Mapping[str, Anatomy],
    operators: Mapping[str, Mapping[str, float]],
    files: Sequence[Path],
) -> ComparisonPage:
    """Return the page at W&B: the figures, and the numbers behind them as tables.

    Args:
        comparison: result of the comparison.
        pictures: figures of its report.
        anatomies: configuration -> its anatomy.
        operators: measured configuration -> kind of operator -> milliseconds of a step.
        files: further files, such as the report.
    """
    figures: dict[str, list[tuple[Path, str]]] = {}
    for picture in pictures:
        figures.setdefault(picture.name, []).append((picture.path, f"{picture.title}. {picture.caption}"))
    verdicts = comparison.document()["pairs"]
    parts = [
        (arm, kind, part, count)
        for arm, anatomy in anatomies.items()
        for kind, counts in (("dense", anatomy.dense), ("table", anatomy.tables))
        for part, count in counts.items()
    ]
    times = [(arm, kind, value) for arm, kinds in operators.items() for kind, value in kinds.items()]
    loads = [
        (arm, cost.rank, cost.rows, cost.bytes, cost.work, cost.sent_ids, cost.sent_vectors, cost.sent_gradients)
        for arm, anatomy in anatomies.items()
        if anatomy.sharding
        for cost in anatomy.sharding.costs
    ]
    tables = {
        "verdicts": Table(columns=list(verdicts[0]), rows=[list(pair.values()) for pair in verdicts]),
        "parameters": Table(columns=["configuration", "kind", "part", "parameters"], rows=parts),
        "operators": Table(
            columns=["configuration", "kind of operator", "milliseconds of a training step"], rows=times
        ),
        "load": Table(
            columns=[
                "configuration", "rank", "rows", "bytes", "rows asked for a batch", "ids sent in a step, bytes",
                "vectors sent, bytes", "gradients sent, bytes",
            ],
            rows=loads,
        ),
    }  # fmt: skip
    return ComparisonPage(
        figures=figures,
        tables={name: table for name, table in tables.items() if table.rows},
        files=files,
        findings=[*filter(None, answer(comparison)), *(pair.sentence for pair in comparison.pairs)],
    )


# --- terminal ---------------------------------------------------------------------------------------


def arms_table(arms: Sequence[PlannedArm], seeds: Sequence[int]) -> str:
    """Return a table of each configuration's parameters and FLOPs, and of the settings in which they differ."""
    rows = [["configuration", "tables", "dense", "total", "forward", "training", "samples"]]
    for arm in arms:
        size = arm.size
        counts = (f"{count:,}" for count in (size.tables, size.dense, size.total))
        flops = (f"{n:,}" if n else "unknown" for n in (size.flops_per_sample_forward, size.flops_per_sample_training))
        samples = f"{arm.samples:,.0f}" if arm.samples != float("inf") else "unbounded"
        rows.append([arm.name, *counts, *flops, samples])
    differ = []
    for key, *cells in _differing(arms):
        by_value: dict[str, list[str]] = {}
        for arm, cell in zip(arms, cells, strict=True):
            by_value.setdefault(cell, []).append(arm.name)
        values = "; ".join(f"{value} in {', '.join(of)}" for value, of in by_value.items() if value != "-")
        differ.append(f"  {_short(key)}: {values or 'none'}")
    return wrapped(
        [
            *aligned(rows),
            "tables, dense, total: parameters; forward, training: FLOPs per sample of the dense parts",
            "samples: trained on in a run, in the same order for all configurations of a seed",
            "",
            "what differs:",
            *differ,
            "",
            f"seeds {', '.join(map(str, seeds))}: {len(arms) * len(seeds)} runs",
        ]
    )


def closing_words(comparison: Comparison, output: Path) -> str:
    """Return which configuration is better, a table of them all, and every difference."""
    # At most four, so that the table fits into 80 columns.
    columns: list[Score] = ["auc", "log_loss", "accuracy", "calibration"]
    if "group_auc" in comparison.metrics:
        columns[-1] = "group_auc"
    rows = [["", *(METRIC_TITLES[name] for name in columns), "samples/s", "validation"]]
    steady = comparison.steady(names.SAMPLES_PER_SECOND)
    for arm in ranked(comparison):
        values = (f"{np.mean(comparison.values(arm, name)):.5f}" for name in columns)
        speed = rounded(arm.median(names.SAMPLES_PER_SECOND)) if steady else ""
        course = _mean_course(arm, f"{names.VALIDATION}/auc")
        # One value is no course.
        rows.append([arm.name, *values, speed, sparkline(course, SPARK_WIDTH) if len(course) > 1 else ""])
    seeds = ", ".join(dict.fromkeys(str(len(arm.runs)) for arm in comparison.arms))
    of = "one seed each" if comparison.one_seed else f"means over the seeds ({seeds})"
    head, more = answer(comparison)
    return wrapped(
        [
            *(f"WARNING: {warning}" for warning in comparison.warnings),
            "",
            emphasized(head, sys.stdout),
            more,
            "",
            *aligned(rows),
            f"{of}, on the {comparison.split} split"
            + ("; validation: the course of the AUC" if any(row[-1] for row in rows[1:]) else ""),
            *([] if steady else ["samples/s are not comparable: seeds differ by a factor of more than 1.5"]),
            *filter(None, [comparison.groups_note]),
            "",
            *_differences(comparison),
            *filter(None, [comparison.adjustment]),
            *(note for arm in comparison.arms for note in comparison.published(arm)),
            "",
            f"report: {output / 'report.html'}",
        ]
    )


def _differences(comparison: Comparison) -> list[str]:
    """Return a table of the differences by each metric; sentences for two arms, or if a pair has no verdict."""
    if len(comparison.arms) == 2 or any(pair.single or not pair.same_data for pair in comparison.pairs):
        return ["differences, with 95% intervals:", *(f"  {pair.sentence}" for pair in comparison.pairs)]
    lines = []
    for metric in comparison.judged:
        pairs = [pair for pair in comparison.pairs if pair.metric == metric]
        rows = [[f"difference in {METRIC_TITLES[metric]}", "first - second (95% interval)", "p", "verdict"]]
        for pair, shown in zip(pairs, distances(pairs), strict=True):
            word = "better" if pair.decided else "-"
            rows.append([f"{pair.winner} - {pair.loser}", shown, f"{pair.p_adjusted:.2g}", word])
        lines += [*aligned(rows, left=(0, 3)), ""]
    return [*lines, "p is adjusted; - means not distinguishable, even if the interval excludes 0"]


def _mean_course(arm: Arm, metric: str) -> list[float]:
    """Return the mean over a configuration's runs of each logged value, in order."""
    courses = [run.curve(names.SAMPLES, metric)[1] for run in arm.runs]
    # As far as every run has values.
    return [float(np.mean(values)) for values in zip(*courses, strict=False)]
