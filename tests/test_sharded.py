"""Contract: with tables in pieces over ranks, a fit is that of one process on the same global batches: losses,
gradients, tables and optimiser state, whatever the plan, the slices and the number of ranks."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_dlrm.contracts.lookup import TablePiece
from lightning_dlrm.sharding.checkpoint import CheckpointReader
from tests.ranks import run_ranks
from tests.sharded_fits import BF16, FIRST_STEP, HALF, PARITY, RESUMED, STEPS, Fit, metrics, run
from tests.toy import TABLES, toy_dlrm, toy_schema

SLOTS = {"sgd": (), "adagrad": ("sum",), "row_wise": ("sum",), "adam": ("mean", "square")}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fit alone, and on 2, 3 and 4 ranks; those on 1, 2 and 3 resume from the checkpoint of 4."""
    top = tmp_path_factory.mktemp("sharded")
    names = [fit.name for fit in (*PARITY, FIRST_STEP)]
    for ranks in (1, 2, 3, 4):
        (top / str(ranks)).mkdir()
    run_ranks(["-m", "tests.sharded_fits", str(top / "4"), *names, HALF.name, BF16.name], 4)
    for ranks in (1, 2, 3):
        shutil.copytree(top / "4" / HALF.name, top / str(ranks) / HALF.name)
    for ranks in (2, 3):
        run_ranks(["-m", "tests.sharded_fits", str(top / str(ranks)), *names, RESUMED.name], ranks)
    for fit in (*PARITY, FIRST_STEP, RESUMED, BF16):
        run(fit, top / "1", 1)
    return top


def tables(run_folder: Path, slot: str = "weight") -> dict[str, Tensor]:
    """Whole tables of a run's checkpoint, by name."""
    reader, found = CheckpointReader(run_folder / "checkpoints/last"), {}
    for name, entry in reader.manifest.tables.items():
        found[name] = torch.empty(entry.shapes[slot], dtype=torch.float64)
        piece = TablePiece(name=name, table_rows=entry.shapes[slot][0], start=0, stop=entry.shapes[slot][0], offset=0)
        reader.read_rows(piece, slot, found[name])
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("fit", PARITY, ids=lambda fit: fit.name)
def test_a_fit_in_float64_is_that_of_one_process(folder: Path, fit: Fit, ranks: int) -> None:
    alone, found = folder / "1" / fit.name, folder / str(ranks) / fit.name
    assert len(metrics(alone, "train/loss")) == STEPS
    torch.testing.assert_close(metrics(found, "train/loss"), metrics(alone, "train/loss"), rtol=1e-10, atol=0)
    torch.testing.assert_close(metrics(found, "train/auc"), metrics(alone, "train/auc"), rtol=0, atol=0)
    for slot in ("weight", *SLOTS[fit.rule]):
        torch.testing.assert_close(tables(found, slot), tables(alone, slot), rtol=0, atol=1e-6)
    dense = [CheckpointReader(path / "checkpoints/last").rest()["state_dict"] for path in (found, alone)]
    torch.testing.assert_close(*dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_first_step_in_float32(folder: Path, ranks: int) -> None:
    alone, found = folder / "1" / FIRST_STEP.name, folder / str(ranks) / FIRST_STEP.name
    torch.testing.assert_close(metrics(found, "train/loss"), metrics(alone, "train/loss"), rtol=1e-5, atol=0)
    # The rule is SGD with a rate of 1: weights differ by as much as gradients do.
    start = {name: tensor.double() for name, tensor in _initial_tables().items()}
    ours, theirs = tables(found), tables(alone)
    gradient = torch.cat([(theirs[name] - start[name]).flatten() for name in TABLES])
    difference = torch.cat([(theirs[name] - ours[name]).flatten() for name in TABLES])
    assert gradient.norm() > 0 and difference.norm() <= 1e-5 * gradient.norm()


def _initial_tables() -> dict[str, Tensor]:
    (lookup,) = toy_dlrm(toy_schema().features, 3).lookups()
    return {piece.name: piece.of(lookup.weight.detach()) for piece in lookup.pieces}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_saved_on_four_ranks_opened_on_fewer(folder: Path, ranks: int) -> None:
    whole = next(fit for fit in PARITY if (fit.rule, fit.hot) == (RESUMED.rule, RESUMED.hot))
    expected = metrics(folder / "1" / whole.name, "train/loss")[STEPS // 2 :]
    found = metrics(folder / str(ranks) / RESUMED.name, "train/loss")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_bf16_in_the_matrix_products_and_on_the_wire(folder: Path) -> None:
    ours, alone = (metrics(folder / ranks / BF16.name, "train/loss") for ranks in "41")
    # Rounding of 2^-9 in vectors and gradients; exact sums would be equal, no exchange would be far off.
    assert not torch.equal(ours, alone)
    torch.testing.assert_close(ours, alone, rtol=0.03, atol=0)
    assert tables(folder / "4" / BF16.name)["C2"].isfinite().all()
