"""Drawing of a plan: what each rank holds, looks up and sends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_dlrm.cli.palette import OKABE_ITO, filling
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.sharding.costs import RankCost, TableLoad
from lightning_dlrm.sharding.plan import Plan

PLOT_WIDTH = 10.0
"""Inches."""
_TABLES_COLOURED = 8


def draw(
    plan: Plan, loads: Sequence[TableLoad], costs: Sequence[RankCost], batch_size: int, path: Path, note: str = ""
) -> None:
    """Draw the bytes of each rank by table, its work, and the bytes that it sends; ``note`` is printed above.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PLOT_WIDTH, 8), layout="constrained")
    held, work, sent = figure.subplots(3, 1, sharex=True)
    ranks, width = [cost.rank for cost in costs], 0.8 if plan.ranks <= 64 else 1.0

    def looks(number: int) -> dict[str, Any]:
        # On thin bars hatches and edges would hide the colours.
        return filling(number) if plan.ranks <= 64 else {"color": OKABE_ITO[number]}

    largest = sorted(loads, key=lambda load: -load.bytes)[:_TABLES_COLOURED]
    bottom = [0.0] * plan.ranks
    for number, load in enumerate(largest):
        sizes = [cost.bytes_of_table.get(load.name, 0) / 2**30 for cost in costs]
        held.bar(ranks, sizes, width, bottom, label=load.name, **looks(number))
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    if len(loads) > len(largest):
        rest = [cost.bytes / 2**30 - b for cost, b in zip(costs, bottom, strict=True)]
        held.bar(ranks, rest, width, bottom, label=f"{len(loads) - len(largest)} others", color="0.7")
    held.set_ylabel("tables and\noptimizer state, GiB")
    held.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    work.bar(ranks, [cost.work for cost in costs], width, color=OKABE_ITO[0])
    work.set_ylabel("rows, or sums,\nasked for a batch")
    bottom = [0.0] * plan.ranks
    for number, (name, amounts) in enumerate(
        (
            ("ids", [cost.sent_ids for cost in costs]),
            ("vectors", [cost.sent_vectors for cost in costs]),
            ("gradients", [cost.sent_gradients for cost in costs]),
        )
    ):
        sizes = [amount / 2**20 for amount in amounts]
        sent.bar(ranks, sizes, width, bottom, label=name, **looks(number))
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    sent.set_ylabel("sent in a\ntraining step, MiB")
    sent.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    sent.set_xlabel("rank")
    if plan.ranks <= 16:
        sent.set_xticks(ranks)
    for axes in (held, work, sent):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        (f"{note}\n" if note else "")
        + f"{len(loads)} tables in {len(plan.pieces)} pieces on {plan.ranks} ranks, global batch {batch_size:,}"
    )
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot draw {path}: {error}; give --plot a file such as plan.png") from error
