"""The W&B page of a comparison: the figures of its report, and the numbers behind them as tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_dlrm.compare.anatomy import Anatomy
from lightning_dlrm.compare.figures import Picture
from lightning_dlrm.compare.results import Comparison
from lightning_dlrm.tracking.wandb_comparison import ComparisonPage, Table


def page_of(
    comparison: Comparison,
    pictures: Sequence[Picture],
    anatomies: Mapping[str, Anatomy],
    operators: Mapping[str, Mapping[str, float]],
    files: Sequence[Path],
) -> ComparisonPage:
    """Return the page.

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
    tables = {"verdicts": _verdicts(comparison), "parameters": _parameters(anatomies)}
    if operators:
        tables["operators"] = Table(
            columns=["configuration", "kind of operator", "milliseconds of a training step"],
            rows=[(arm, kind, value) for arm, kinds in operators.items() for kind, value in kinds.items()],
        )
    if any(anatomy.sharding for anatomy in anatomies.values()):
        tables["load"] = _load(anatomies)
    return ComparisonPage(figures=figures, tables=tables, files=files)


def _verdicts(comparison: Comparison) -> Table:
    keys = ("a", "b", "metric", "difference", "low", "high", "verdict", "reason")
    return Table(columns=keys, rows=[[pair[key] for key in keys] for pair in comparison.document()["pairs"]])


def _parameters(anatomies: Mapping[str, Anatomy]) -> Table:
    return Table(
        columns=["configuration", "kind", "part", "parameters"],
        rows=[
            (arm, kind, part, count)
            for arm, anatomy in anatomies.items()
            for kind, counts in (("dense", anatomy.dense), ("table", anatomy.tables))
            for part, count in counts.items()
        ],
    )


def _load(anatomies: Mapping[str, Anatomy]) -> Table:
    return Table(
        columns=[
            "configuration", "rank", "rows", "bytes", "rows asked for a batch", "ids sent in a step, bytes",
            "vectors sent, bytes", "gradients sent, bytes",
        ],
        rows=[
            (arm, cost.rank, cost.rows, cost.bytes, cost.work, cost.sent_ids, cost.sent_vectors, cost.sent_gradients)
            for arm, anatomy in anatomies.items()
            if anatomy.sharding
            for cost in anatomy.sharding.costs
        ],
    )  # fmt: skip
