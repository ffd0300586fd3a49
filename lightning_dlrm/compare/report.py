"""The result of a comparison: ``report.html``, one file that opens without a network; a page at W&B; text."""

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import jinja2
import numpy as np

from lightning_dlrm.bench.breakdown import KINDS
from lightning_dlrm.cli.report import rounded
from lightning_dlrm.compare.anatomy import Anatomy, StepTimes
from lightning_dlrm.compare.drawing import PAGE_WIDTH, Picture
from lightning_dlrm.compare.experiment import PlannedArm
from lightning_dlrm.compare.numbers import in_column, p_text
from lightning_dlrm.compare.pairs import METRIC_TITLES, Pair
from lightning_dlrm.compare.ranking import answer, behind, distances, with_spread
from lightning_dlrm.compare.results import CLICK_RATE_ALONE, Comparison, pair_of, ranked, sample_counts
from lightning_dlrm.compare.runs import Arm, by_data
from lightning_dlrm.compare.settings_tables import differing_rows, settings_of_runs, shared_rows
from lightning_dlrm.compare.statistics import Metric, Score
from lightning_dlrm.compare.training_length import fallen, still_improving
from lightning_dlrm.contracts.terminal import aligned, emphasized, wrapped
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.sparkline import sparkline
from lightning_dlrm.tracking.wandb_run import ComparisonPage, Table

SPARK_WIDTH = 12
"""Characters of a sparkline, so that the closing table fits into 80 columns."""
_TERMINAL_WIDTH = 80
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(
    comparison: Comparison,
    pictures: Sequence[Picture],
    anatomies: Mapping[str, Anatomy],
    steps: StepTimes,
    path: Path,
) -> None:
    """Write the report.

    Args:
        comparison: result of the comparison.
        pictures: figures in their order, which are embedded in the file.
        anatomies: configuration -> its anatomy.
        steps: times of a step.
        path: HTML file.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    head, *paragraphs = answer(comparison)
    settings = {arm.name: settings_of_runs(arm) for arm in ranked(comparison)}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        comparison=comparison,
        p_text=p_text,
        head=head,
        paragraphs=paragraphs,
        ranking=_ranking(comparison),
        pairs=comparison.pairs,
        overlapping=_overlapping(comparison),
        data=by_data(comparison.arms),
        metric_titles=METRIC_TITLES,
        scores=_summary(comparison),
        costs=_costs(comparison, anatomies, steps),
        steps=steps,
        pictures={name: [found for found in pictures if found.name == name] for name in names.COMPARISON_FIGURES},
        page_width=PAGE_WIDTH,
        operators=_operators(comparison, steps.shown),
        parameters=_parameters(ranked(comparison), anatomies),
        settings=[["setting", *settings], *differing_rows(settings)],
        shared=[["setting", "value"], *shared_rows(settings)],
        runs=_runs(comparison),
    )
    path.write_text(text, encoding="utf-8")


def _ranking(comparison: Comparison) -> list[list[str]]:
    """Return the configurations with their scores, the highest AUC first; the first row has the titles."""
    first = ranked(comparison)[0]
    rows = [["configuration", "AUC", "behind the first (95% interval)", "verdict", "log loss", "training"]]
    aucs, losses = (with_spread(comparison, metric, 4) for metric in ("auc", "log_loss"))
    for arm, auc, loss in zip(ranked(comparison), aucs, losses, strict=False):
        is_behind = behind(comparison, arm)
        pair = pair_of(comparison, first, arm) if is_behind else None
        rows.append([arm.name, auc, is_behind, _verdict_on(comparison, arm, pair), loss, _training_of(comparison, arm)])
    if comparison.click_rate_alone:
        rows.append([CLICK_RATE_ALONE, aucs[-1], "", "", losses[-1], ""])
    return rows if any(row[-1] for row in rows[1:]) else [row[:-1] for row in rows]


def _verdict_on(comparison: Comparison, arm: Arm, pair: Pair | None) -> str:
    """Return the verdict on a configuration against the first, with its adjusted p."""
    if len(comparison.random_runs(arm)) == len(arm.runs):
        return "did not train"
    if pair is None:
        return ""
    return ("worse" if pair.decided else pair.word) + f" (p {p_text(pair.p_adjusted)})" * (not pair.single)


def _training_of(comparison: Comparison, arm: Arm) -> str:
    """Return which seeds of a configuration did not train, whether it was still improving, and when it was best."""
    random = len(comparison.random_runs(arm))
    if random == len(arm.runs):
        return ""
    failed = f"{random} of {len(arm.runs)} seeds did not train" if random else ""
    improving = "still improving" if arm.name in {one.arm for one in still_improving(comparison)} else ""
    fell = [one.when for one in fallen(comparison) if one.arm == arm.name]
    return "; ".join(filter(None, [failed, improving, *fell]))


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
    best, arms = f"{names.VALIDATION}/auc", ranked(comparison)
    columns = {
        "configuration": [*(arm.name for arm in arms), *[CLICK_RATE_ALONE] * bool(comparison.click_rate_alone)],
        **{title: with_spread(comparison, metric) for metric, title in _titles(comparison).items()},
    }
    # Beside the AUC: a narrow page shows the first columns.
    of_validation = [f"{np.mean([run.best[best] for run in arm.runs]):.5f}" for arm in arms]
    (name, names_shown), (auc, aucs), *others = columns.items()
    columns = {name: names_shown, auc: aucs, "best validation AUC": of_validation, **dict(others)}
    return [list(columns), *(list(row) for row in zip_longest(*columns.values(), fillvalue=""))]


def _costs(comparison: Comparison, anatomies: Mapping[str, Anatomy], steps: StepTimes) -> list[list[str]]:
    """Return time, memory and size of every configuration, a row each; the first row has the titles."""
    arms = ranked(comparison)

    def rates(name: str, of: Callable[[Arm, float], float]) -> list[str]:
        """Return a column of times or rates: the medians, or, if they vary, the lowest and the highest."""
        steady = comparison.steady(name)
        return in_column(
            [sorted(of(arm, end) for end in ([arm.median(name)] if steady else arm.span(name)) if end) for arm in arms]
        )

    def vary(name: str) -> str:
        return "" if comparison.steady(name) else " (lowest to highest)"

    columns = {
        "configuration": [arm.name for arm in arms],
        "samples": [sample_counts(arm) for arm in arms],
        f"seconds of training{vary(names.TRAINING_SECONDS)}": rates(names.TRAINING_SECONDS, lambda _, value: value),
        f"samples per second{vary(names.SAMPLES_PER_SECOND)}": rates(names.SAMPLES_PER_SECOND, lambda _, value: value),
    }
    if steps.shown:
        columns["step in training (milliseconds)"] = rates(
            names.SAMPLES_PER_SECOND, lambda arm, value: 1e3 * anatomies[arm.name].batch_size / value
        )
        columns["step alone (milliseconds)"] = in_column(
            [[sum(steps.shown[arm.name].values())] if arm.name in steps.shown else [] for arm in arms]
        )
    columns |= {
        "peak memory (GiB)": in_column([[arm.median(names.PEAK_MEMORY) / 2**30] for arm in arms]),
        "parameters": [f"{arm[names.PARAMETERS_TOTAL]:,}" for arm in arms],
        "FLOPs of a training sample": [
            f"{arm[names.FLOPS_TRAINING]:,}" if arm[names.FLOPS_TRAINING] else "unknown" for arm in arms
        ],
    }
    return [list(columns), *(list(row) for row in zip(*columns.values(), strict=True))]


def _titles(comparison: Comparison) -> dict[Score, str]:
    return {metric: METRIC_TITLES[metric] for metric in comparison.metrics}


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
    if not measured:
        return []
    columns = [in_column([[t] for t in (*times.values(), sum(times.values()))]) for times in measured.values()]
    return [
        ["milliseconds of a training step", *measured],
        *(list(row) for row in zip([*KINDS, "step"], *columns, strict=True)),
    ]


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
        findings=[*answer(comparison), *(pair.sentence for pair in comparison.pairs)],
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
    for key, *cells in differing_rows({arm.name: arm.settings for arm in arms}):
        by_value: dict[str, list[str]] = {}
        for arm, cell in zip(arms, cells, strict=True):
            by_value.setdefault(cell, []).append(arm.name)
        values = "; ".join(f"{value} in {', '.join(of)}" for value, of in by_value.items() if value != "-")
        differ.append(f"  {key}: {values or 'none'}")
    return wrapped(
        [
            *aligned(rows),
            "tables, dense, total: parameters; forward, training: FLOPs per sample of the dense parts",
            "samples: trained on in a run, in the same order for all configurations of a seed",
            "",
            "what differs:",
            *differ,
            "",
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: {len(arms) * len(seeds)} runs",
        ]
    )


def closing_words(comparison: Comparison, output: Path) -> str:
    """Return which configuration is better, a table of them all, and every difference."""
    # At most four, so that the table fits into 80 columns.
    columns: list[Score] = ["auc", "log_loss", "accuracy", "calibration"]
    if "group_auc" in comparison.metrics:
        columns[-1] = "group_auc"
    rows = [["", *(METRIC_TITLES[name] for name in columns), "validation"]]
    courses = {arm.name: _mean_course(arm, f"{names.VALIDATION}/auc") for arm in comparison.arms}
    every_value = [value for course in courses.values() for value in course]
    for arm in ranked(comparison):
        values = (f"{np.mean(comparison.values(arm, name)):.5f}" for name in columns)
        course = courses[arm.name]
        # One value is no course.
        rows.append([arm.name, *values, sparkline(course, SPARK_WIDTH, every_value) if len(course) > 1 else ""])
    if alone := comparison.click_rate_alone:
        rows.append([CLICK_RATE_ALONE, *(f"{alone[name]:.5f}" for name in columns), ""])
    seeds = ", ".join(dict.fromkeys(str(len(arm.runs)) for arm in comparison.arms))
    of = "one seed each" if comparison.one_seed else f"means over the seeds ({seeds})"
    head, *paragraphs = answer(comparison)
    return wrapped(
        [
            *(f"WARNING: {warning}" for warning in comparison.warnings),
            "",
            emphasized(head, sys.stdout),
            *paragraphs,
            "",
            *aligned(rows),
            f"{of}, on the {comparison.split} split"
            + ("; validation: the course of the AUC, on one scale" if any(row[-1] for row in rows[1:]) else ""),
            *filter(None, [comparison.click_rate_note, comparison.groups_note]),
            "",
            *_differences(comparison),
            *filter(None, [comparison.adjustment]),
            *(note for arm in comparison.arms for note in comparison.published(arm)),
            "",
            f"report: {output / 'report.html'}",
        ]
    )


def _differences(comparison: Comparison) -> list[str]:
    """Return a table of the differences by each metric; sentences if a pair has no verdict."""
    if any(pair.single or not pair.same_data for pair in comparison.pairs):
        return ["differences, with 95% intervals:", *(f"  {pair.sentence}" for pair in comparison.pairs)]
    lines = []
    for metric in comparison.judged:
        pairs = [pair for pair in comparison.pairs if pair.metric == metric]
        table = _differences_in(metric, pairs, " - ")
        if max(map(len, table)) >= _TERMINAL_WIDTH:
            table = _differences_in(metric, pairs, "\n- ")
        lines += [*table, ""]
    return lines


def _differences_in(metric: Metric, pairs: Sequence[Pair], minus: str) -> list[str]:
    """Return a table of the differences by a metric; a line break in ``minus`` makes two lines of a row."""
    rows = [["difference in", "first - second", "adjusted", ""]]
    rows.append([METRIC_TITLES[metric], "(95% interval)", "p", "verdict"])
    for pair, shown in zip(pairs, distances(pairs), strict=True):
        word = "a side did not train" if pair.untrained else pair.word
        name, *rest = f"{pair.winner}{minus}{pair.loser}".splitlines()
        rows.append([name, shown, p_text(None if pair.untrained else pair.p_adjusted), word])
        rows += [[line, "", "", ""] for line in rest]
    return aligned(rows, left=(0, 3))


def _mean_course(arm: Arm, metric: str) -> list[float]:
    """Return the mean over a configuration's runs of each logged value, in order."""
    courses = [run.curve(names.SAMPLES, metric)[1] for run in arm.runs]
    # As far as every run has values.
    return [float(np.mean(values)) for values in zip(*courses, strict=False)]
