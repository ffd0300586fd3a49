"""Contract: every command works as it is typed, with default flags, on one rank and on two, in every precision, on a
terminal and into a pipe; an interrupted fit that is resumed logs what an uninterrupted one does.

The default run has three whole fits, one in each precision, and twelve cells: fits that are interrupted and resumed,
which are compared with a whole fit, and evaluations, which open its checkpoint. Together they cover every pair of
values of two factors.
"""

import itertools
import json
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.forked import INTERPRETER, WHOLE_END, interpreter
from tests.front_door.conftest import TINY, Finished, Shell, asked_for

RANKS = (1, 2)
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
TASKS = ("resume", "validate", "test", "predict", "fit")
STEPS = 32
Metrics = dict[int, dict[str, float]]
"""Logged metrics by step."""
INTERRUPTED_AT = 13

OWN = f"""\
import os
import signal

from pytorch_lightning import Callback


class Interrupt(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.is_global_zero and trainer.global_step == {INTERRUPTED_AT}:
            os.kill(os.getpid(), signal.SIGTERM)
"""


@dataclass(frozen=True)
class Cell:
    task: str
    precision: str
    ranks: int
    terminal: bool

    def __str__(self) -> str:
        return f"{self.task}-{self.precision}-{self.ranks}-{'terminal' if self.terminal else 'pipe'}"


ALL = [Cell(*values) for values in itertools.product(TASKS, PRECISIONS, RANKS, (False, True))]


def covering() -> list[Cell]:
    """Return each task with each precision; one cell of a task has two ranks, which cost twice as much.

    In each precision, the whole fit and the resumed one have equally many ranks, so that their metrics are compared.
    """
    return [
        Cell(task, precision, 2 if place == 0 else 1, terminal=place == 1 or (place == 0 and i % 2 == 0))
        for i, (task, shift) in enumerate(zip(TASKS, (0, 1, 2, 1, 0), strict=True))
        for precision, place in zip(PRECISIONS, [(shift + j) % 3 for j in range(3)], strict=True)
    ]


def test_the_cells_cover_all_pairs() -> None:
    def pairs(cells: list[Cell]) -> set[Any]:
        return {pair for cell in cells for pair in itertools.combinations(vars(cell).items(), 2)}

    assert len(covering()) == 12 + len(PRECISIONS) and pairs(covering()) == pairs(ALL)


FITS = {cell.precision: cell for cell in covering() if cell.task == "fit"}


@pytest.fixture(scope="module")
def outcomes(shell: Shell, request: pytest.FixtureRequest) -> Iterator[dict[Cell, "Future[None]"]]:
    """All cells that are asked for, running two at a time after the fits that they need."""
    Path(shell.folder, "tiny.yaml").write_text(TINY)
    Path(shell.folder, "own.py").write_text(OWN)
    asked = asked_for(request, "cell")
    # Two ranks, with their threads and sockets, free all their objects at their end.
    forked = replace(shell, environment=shell.environment | {INTERPRETER: interpreter()})
    shells = {1: forked, 2: replace(forked, environment=forked.environment | {WHOLE_END: "1"})}
    with ThreadPoolExecutor(2) as pool:
        fits = {
            precision: pool.submit(fit_whole, shells[FITS[precision].ranks], precision)
            for precision in {cell.precision for cell in asked}
        }
        yield {cell: pool.submit(check, shells[cell.ranks], cell, fits[cell.precision]) for cell in asked}
        pool.shutdown(cancel_futures=True)


@pytest.mark.dist
@pytest.mark.parametrize(
    "cell", [c if c in covering() else pytest.param(c, marks=pytest.mark.slow) for c in ALL], ids=str
)
def test_cell(cell: Cell, outcomes: dict[Cell, "Future[None]"]) -> None:
    outcomes[cell].result()


def fit_whole(shell: Shell, precision: str) -> str:
    """Return the run folder of a fit that is not interrupted."""
    cell = FITS[precision]
    fit(shell, cell, f"whole-{precision}")
    return f"whole-{precision}"


def check(shell: Shell, cell: Cell, whole_fit: "Future[str]") -> None:
    whole, folder = whole_fit.result(), str(cell)
    if cell.task == "fit":
        if cell != FITS[cell.precision]:
            fit(shell, cell, folder)
    elif cell.task == "resume":
        fit(shell, cell, folder, "--trainer.callbacks+=own.Interrupt", code=143)
        assert max(metrics(shell, folder)) < STEPS
        fit(shell, cell, folder, "--resume", "auto")
        check_resumed(metrics(shell, folder), metrics(shell, whole), cell)
    else:
        where = ["--config", f"{whole}/config.yaml", "--ckpt_path", f"{whole}/checkpoints/best", "--run_dir", folder]
        expect(shell.cli(cell.task, *where, *flags(cell), terminal=cell.terminal), 0, cell)
        check_evaluation(cell.task, Path(shell.folder, folder))


def check_resumed(found: Metrics, expected: Metrics, cell: Cell) -> None:
    assert found.keys() == expected.keys() and max(found) == STEPS
    # Two ranks sum in another order than one.
    assert found == expected or cell.ranks != FITS[cell.precision].ranks


def check_evaluation(task: str, folder: Path) -> None:
    if task == "predict":
        rows = pq.read_table(folder / "predictions.parquet")
        assert rows["row"].to_pylist() == list(range(256))
        assert all(0 < probability < 1 for probability in rows["probability"].to_pylist())
    else:
        found = json.loads((folder / f"{task}.json").read_text())
        assert found and all(math.isfinite(value) for value in found.values())


def fit(shell: Shell, cell: Cell, run: str, *more: str, code: int = 0) -> None:
    arguments = ["--config", "dlrm.yaml", "--config", "tiny.yaml", "--run_dir", run, *flags(cell), *more]
    expect(shell.cli("fit", *arguments, terminal=cell.terminal), code, cell)


def flags(cell: Cell) -> list[str]:
    several = ["--trainer.strategy", "embedding_sharded_ddp", "--trainer.devices", str(cell.ranks)]
    return [*(several if cell.ranks > 1 else []), "--trainer.precision", cell.precision]


def expect(done: Finished, code: int, cell: Cell) -> None:
    assert done.code == code, done.output
    assert "Traceback" not in done.output and "Warning" not in done.output, done.output
    # Bars are redrawn on a terminal only.
    assert ("\r" in done.output.replace("\r\n", "\n")) == cell.terminal, done.output


def metrics(shell: Shell, run: str) -> Metrics:
    """What was logged of training and validations, by step."""
    found: Metrics = {}
    for line in Path(shell.folder, run, "metrics.jsonl").read_text().splitlines():
        logged = json.loads(line)
        kept = {name: value for name, value in logged.items() if name.startswith(("train/", "validation/"))}
        found.setdefault(logged["step"], {}).update(kept)
    return found
