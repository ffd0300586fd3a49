"""``report.html``: the result of a comparison in one file that opens without a network."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup, escape

from lightning_dlrm.compare.anatomy import Anatomy
from lightning_dlrm.compare.figures import PAGE_WIDTH, Picture
from lightning_dlrm.compare.results import METRIC_TITLES, Comparison
from lightning_dlrm.compare.runs import Arm, by_data, differing, format_value
from lightning_dlrm.tracking import names

TEMPLATE = Path(__file__).with_name("report.html.jinja")
_METRICS = ("auc", "log_loss", "accuracy", "normalized_entropy", "calibration")


def write_report(
    comparison: Comparison,
    pictures: Sequence[Picture],
    anatomies: Mapping[str, Anatomy],
    operator_notes: Sequence[str],
    path: Path,
) -> None:
    """Write the report.

    Args:
        comparison: result of the comparison.
        pictures: figures in their order, which are embedded in the file.
        anatomies: configuration -> its anatomy.
        operator_notes: reason for each configuration whose operators were not measured.
        path: HTML file.
    """
    data = by_data(comparison.arms)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    paired = any(pair.difference.paired for pair in comparison.pairs)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=comparison.title,
        warnings=comparison.warnings,
        pairs=comparison.pairs,
        metric_titles=METRIC_TITLES,
        summary=_summary(comparison),
        split_note=_split_note(comparison),
        pictures=pictures,
        show=_embedded,
        pairing="Runs of the same seed see the samples in the same order and are taken in pairs." if paired else "",
        operator_notes=operator_notes,
        parameters=_parameters(comparison.arms, anatomies),
        settings=_settings(comparison.arms),
        runs=_runs(comparison),
        data_note=" ".join(
            f"Data{'' if len(data) == 1 else ' of ' + ', '.join(arm.name for arm in arms)}: {arms[0]['dataset']}, "
            f"protocol {arms[0]['protocol']}, fingerprint {arms[0]['data_fingerprint'][:12]}."
            for arms in data.values()
        ),
        verdict_note=_verdict_note(comparison),
        seeds_note=_seeds_note(comparison),
    )
    path.write_text(text, encoding="utf-8")


def _embedded(picture: Picture) -> Markup:
    """Return a figure as HTML with its file embedded."""
    data = base64.b64encode(picture.path.read_bytes()).decode()
    share = min(1.0, picture.width / PAGE_WIDTH)
    title, caption = escape(picture.title), escape(picture.caption)
    return Markup(
        f'<figure><img style="width: {share:.0%}" alt="{title}: {caption}" src="data:image/png;base64,{data}">'
        f"<figcaption><strong>{title}.</strong> {caption}</figcaption></figure>"
    )


def _verdict_note(comparison: Comparison) -> str:
    """Return an explanation of the verdicts and their intervals."""
    pairs = comparison.pairs
    notes = []
    judged = sum(not pair.single for pair in pairs)
    if judged:
        notes.append(
            "A verdict compares configurations, not single runs: its interval includes the variation over seeds and "
            f"over test samples. Each of these {judged} intervals contains the true difference 19 times out of 20, so "
            "some of many intervals miss it."
        )
    if judged < len(pairs):
        notes.append(
            "If a side has one seed, there is no verdict: the interval leaves out the variation over its seeds, which "
            "may be larger than the interval."
        )
    if not all(pair.same_data for pair in pairs):
        notes.append(
            "If the data differ, both sides scored different samples: the interval takes them as independent and shows "
            "the distance of their scores, each on its own data; it does not show which model is better."
        )
    else:
        notes.append(
            "The verdicts hold for these data and settings: rates tuned for one side, or longer training, can reverse "
            "them."
        )
    return " ".join(notes)


def _seeds_note(comparison: Comparison) -> str:
    """Return the meaning of the numbers of each configuration."""
    if comparison.one_seed:
        return "Each configuration has one run: the numbers are that run's, and the variation between seeds is unknown."
    several = "Means over the seeds ± half of the 95% interval over the seeds (Student's t)"
    alone = any(len(arm.runs) == 1 for arm in comparison.arms)
    return f"{several}; for a configuration with one seed, the number of its run." if alone else f"{several}."


def _split_note(comparison: Comparison) -> str:
    """Return a description of the scored samples, and the best reachable score if it is known."""
    note = f"On {comparison.scored}, with the parameters of each run's best validation AUC."
    data = by_data(comparison.arms)
    for title, arms in data.items():
        optimum = arms[0].runs[0].final.get(names.OPTIMUM_AUC)
        if optimum is None:
            continue
        which = "Demo data" if len(data) == 1 else f"{title} is demo data"
        note += (
            f" {which}: generated clicks of a planted model, whose best reachable validation AUC is {optimum:.4f}; "
            "results on them do not apply to real clicks."
        )
    return note


def _summary(comparison: Comparison) -> list[list[str]]:
    arms = comparison.arms

    def median(arm: Arm, name: str) -> float:
        return float(np.median([run.final.get(name, np.nan) for run in arm.runs]))

    def timing(arm: Arm, name: str) -> str:
        if comparison.steady(name):
            return f"{median(arm, name):,.0f}"
        values = [run.final[name] for run in arm.runs]
        ends = dict.fromkeys(f"{value:,.0f}" for value in (min(values), max(values)))
        return f"{' to '.join(ends)}, not comparable"

    times = {"training, s": names.TRAINING_SECONDS, "samples/s": names.SAMPLES_PER_SECOND}

    def best(arm: Arm) -> float:
        return float(np.mean([run.best[f"{names.VALIDATION}/auc"] for run in arm.runs]))

    return [
        ["", *(arm.name for arm in arms)],
        ["seeds", *(", ".join(map(str, arm.seeds)) for arm in arms)],
        *([METRIC_TITLES[metric], *(_mean_and_reach(comparison, arm, metric) for arm in arms)] for metric in _METRICS),
        ["best validation AUC", *(f"{best(arm):.5f}" for arm in arms)],
        *([title, *(timing(arm, name) for arm in arms)] for title, name in times.items()),
        ["peak memory, GiB", *(f"{median(arm, names.PEAK_MEMORY) / 2**30:.2f}" for arm in arms)],
        ["parameters", *(f"{arm[names.PARAMETERS_TOTAL]:,}" for arm in arms)],
        ["FLOPs a sample, training", *(f"{arm[names.FLOPS_TRAINING]:,}" for arm in arms)],
    ]


def _mean_and_reach(comparison: Comparison, arm: Arm, metric: str) -> str:
    interval = comparison.interval(arm, metric)
    if interval is None:
        return f"{comparison.values(arm, metric)[0]:.5f}"
    return f"{interval.value:.5f} ± {interval.high - interval.value:.5f}"


def _parameters(arms: Sequence[Arm], anatomies: Mapping[str, Anatomy]) -> list[list[str]]:
    rows = [["", *(arm.name for arm in arms)]]
    rows.append(["all", *(f"{arm[names.PARAMETERS_TOTAL]:,}" for arm in arms)])
    rows.append(["in tables", *(f"{arm[names.PARAMETERS_TABLES]:,}" for arm in arms)])
    rows.append(["dense", *(f"{arm[names.PARAMETERS_DENSE]:,}" for arm in arms)])
    rows.append(["FLOPs per sample, forward", *(f"{arm[names.FLOPS_FORWARD]:,}" for arm in arms)])
    rows.append(["FLOPs per sample, training", *(f"{arm[names.FLOPS_TRAINING]:,}" for arm in arms)])
    for kind, prefix in (("dense", ""), ("tables", "table ")):
        of_arms = [getattr(anatomies[arm.name], kind) for arm in arms]
        for part in dict.fromkeys(name for counts in of_arms for name in counts):
            rows.append([f"{prefix}{part}", *(f"{counts[part]:,}" if part in counts else "-" for counts in of_arms)])
    return rows


def _settings(arms: Sequence[Arm]) -> list[list[str]]:
    rows = [["", *(arm.name for arm in arms)]]
    for key, values in differing({arm.name: arm.settings for arm in arms}).items():
        cells = [format_value(values.get(arm.name)) for arm in arms]
        if len(set(cells)) > 1:
            rows.append([key, *cells])
    return rows


def _runs(comparison: Comparison) -> list[list[str]]:
    rows = [["run", "seed", *(METRIC_TITLES[name] for name in _METRICS), "samples", "training s", "folder"]]
    for run in comparison.runs:
        metrics = comparison.scores[run.name].metrics
        rows.append(
            [
                run.name,
                str(run.seed),
                *(f"{metrics[name]:.5f}" for name in _METRICS),
                f"{run.final[names.SAMPLES]:,.0f}",
                f"{run.final[names.TRAINING_SECONDS]:,.0f}",
                str(run.path),
            ]
        )
    return rows
