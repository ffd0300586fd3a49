"""Contract: with tables in pieces over ranks, a fit is that of one process on the same global batches: losses,
gradients, tables and optimizer state, whatever the plan, the slices and the number of ranks."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.sharding.checkpoint import CheckpointReader
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.sharding.costs import imbalance
from lightning_dlrm.sharding.placement import ShardedPlacement
from lightning_dlrm.sharding.plan import Piece, Plan
from lightning_dlrm.tables.lookup import EmbeddingTables, placed_by
from lightning_dlrm.tables.table import Table, TablePiece
from tests.caches import new_cache
from tests.forked import INTERPRETER, NETWORK, ForkedPython, interpreter
from tests.ranks import ROOT, run_ranks, start_ranks
from tests.sharded_fits import (
    BF16,
    CASES,
    FIRST_STEP,
    HALF,
    OWN_DROPOUT,
    PARITY,
    RESUMED,
    SLOW_CASES,
    STEPS,
    WIDE_HALF,
    WIDE_RESUMED,
    Fit,
    global_batch,
    metrics,
    plan_of,
    run,
    slice_of,
)
from tests.toy import TABLES, toy_dlrm, toy_schema

SLOTS = {"sgd": (), "adagrad": ("sum",), "row_wise": ("sum",), "adam": ("mean", "square")}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fit alone and on 2 or 3 ranks; those that resume on 1, 2 and 3 do so from the checkpoint of 4."""
    top = tmp_path_factory.mktemp("sharded")
    run_ranks(["-m", "tests.sharded_fits", str(top)], 1, 400)
    (top / "1").mkdir()
    for half in (HALF, WIDE_HALF):
        (top / "1" / half.name).symlink_to(top / "4" / half.name)
    for fit in (*PARITY, FIRST_STEP, RESUMED, WIDE_RESUMED, BF16):
        # Alone, all tables are on the device.
        run(replace(fit, network="dlrm") if fit.network in ("host", "cut") else fit, top / "1", 1)
    return top


@pytest.fixture(scope="module")
def slow_folder(folder: Path) -> Path:
    """The same folder with every fit on 2, 3 and 4 ranks."""
    run_ranks(["-m", "tests.sharded_fits", str(folder), "slow"], 1, 400)
    return folder


def tables(run_folder: Path, slot: str = "weight") -> dict[str, Tensor]:
    """Those whole tables of a run's checkpoint that have the slot, by name."""
    reader, found = CheckpointReader(run_folder / "checkpoints/last"), {}
    having = {name: entry for name, entry in reader.manifest.tables.items() if slot in entry.shapes}
    for name, entry in having.items():
        found[name] = torch.empty(entry.shapes[slot], dtype=torch.float64)
        piece = TablePiece(name=name, table_rows=entry.shapes[slot][0], start=0, stop=entry.shapes[slot][0], offset=0)
        reader.read_rows(piece, slot, found[name])
    return found


def named(value: object) -> str:
    return getattr(value, "name", str(value))


@pytest.mark.parametrize(("fit", "ranks"), CASES, ids=named)
def test_a_fit_in_float64_is_that_of_one_process(folder: Path, fit: Fit, ranks: int) -> None:
    assert_same_fit(folder, fit, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("fit", "ranks"), SLOW_CASES, ids=named)
def test_it_is_on_every_number_of_ranks(slow_folder: Path, fit: Fit, ranks: int) -> None:
    assert_same_fit(slow_folder, fit, ranks)
    if fit.recorded:
        assert_traffic_is_logged(slow_folder, fit, ranks)


def assert_same_fit(folder: Path, fit: Fit, ranks: int) -> None:
    alone, found = folder / "1" / fit.name, folder / str(ranks) / fit.name
    assert len(metrics(alone, "train/loss")) == STEPS
    torch.testing.assert_close(metrics(found, "train/loss"), metrics(alone, "train/loss"), rtol=1e-10, atol=0)
    assert fit.recorded == (len(metrics(alone, "train/auc")) == STEPS)
    torch.testing.assert_close(metrics(found, "train/auc"), metrics(alone, "train/auc"), rtol=0, atol=0)
    of_tables = [name for name in tables(alone) if fit.wide_rule is None or not name.endswith("/linear")]
    of_wide = [name for name in tables(alone) if name not in of_tables]
    slots = {"weight": [*of_tables, *of_wide]} | dict.fromkeys(SLOTS[fit.rule], of_tables)
    slots |= dict.fromkeys(() if fit.wide_rule is None else SLOTS[fit.wide_rule], of_wide)
    for slot, members in slots.items():
        assert set(tables(alone, slot)) == set(members)
        torch.testing.assert_close(tables(found, slot), tables(alone, slot), rtol=0, atol=1e-6)
    dense = [CheckpointReader(path / "checkpoints/last").rest()["state_dict"] for path in (found, alone)]
    torch.testing.assert_close(*dense, rtol=0, atol=1e-6)


RECORDED = [(fit, ranks) for fit, ranks in CASES if fit.recorded]


@pytest.mark.parametrize(("fit", "ranks"), RECORDED, ids=named)
def test_traffic_of_each_table_is_logged(folder: Path, fit: Fit, ranks: int) -> None:
    assert_traffic_is_logged(folder, fit, ranks)


def assert_traffic_is_logged(folder: Path, fit: Fit, ranks: int) -> None:
    """In metrics.jsonl and the summary, as counted here one index at a time."""
    run_folder, micro = folder / str(ranks) / fit.name, dict(fit.trainer).get("accumulate_grad_batches", 1)
    final = json.loads((run_folder / "summary.json").read_text())["final"]
    assert (metrics(run_folder, "parallel/exchange_ms_per_step") > 0).all()
    plan = plan_of(fit.plan, ranks, fit.pooled)
    if plan is None:
        return
    width = {name: 2 if fit.network == "means" and name == "C2" else 4 for name in TABLES}
    for table, name in enumerate(TABLES):
        held = [sum(p.rows for p in plan.tables[name] if p.rank == rank) for rank in range(ranks)]
        assert final[f"parallel/tables/{name}/rows_per_rank"] == max(held)
        state = {"adagrad": width[name], "row_wise": 1, "adam": 2 * width[name]}[fit.rule]
        assert final[f"parallel/tables/{name}/bytes_per_rank"] == max(held) * 8 * (width[name] + state)
        asked, moved, busiest = [], [], []
        for step in range(STEPS):
            of_owners, moved_here = [0] * ranks, 0
            for index, rank in itertools.product(range(step * micro + 1, (step + 1) * micro + 1), range(ranks)):
                ids = slice_of(global_batch(index, fit.hot), index, rank, ranks).ids
                for owner, (units, entries) in enumerate(counted(plan, name, table, ids)):
                    of_owners[owner] += units
                    if owner != rank:
                        factor = 4 * (ids.weights is not None and bool(fit.pooled))
                        moved_here += entries * (4 + factor) + units * 2 * 8 * width[name]
            asked.append(sum(of_owners))
            moved.append(moved_here)
            busiest.append(imbalance(of_owners))
        for key, expected in (("asked_rows_per_step", asked), ("moved_bytes_per_step", moved)):
            assert metrics(run_folder, f"parallel/tables/{name}/{key}").tolist() == expected
        found = metrics(run_folder, f"parallel/tables/{name}/work_imbalance")
        torch.testing.assert_close(found, torch.tensor(busiest, dtype=torch.float64))
        assert final[f"parallel/tables/{name}/moved_bytes_per_step"] == moved[-1]


def counted(plan: Plan, name: str, table: int, ids: SparseIds) -> list[tuple[int, int]]:
    """Of each rank: the vectors of a table, and the rows for them, that a batch needs."""
    units: list[set] = [set() for _ in range(plan.ranks)]
    entries: list[set] = [set() for _ in range(plan.ranks)]
    for index, (row, bag) in enumerate(zip(ids.values.flatten().tolist(), ids.bag_of_each().tolist(), strict=True)):
        if bag % ids.tables == table:
            (rank,) = (p.rank for p in plan.tables[name] if p.start <= row < p.stop)
            units[rank].add(bag if name in plan.pooled else row)
            entries[rank].add(index if name in plan.pooled else row)
    return [(len(a), len(b)) for a, b in zip(units, entries, strict=True)]


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
    ours, theirs = (CheckpointReader(path / "checkpoints/last").rest()["state_dict"] for path in (found, alone))
    initial = {f"network.{name}": weight for name, weight in toy_dlrm(toy_schema().features, 3).state_dict().items()}
    assert ours.keys() == theirs.keys() == initial.keys() - {"network.embeddings.groups.0.lookup.weight"}
    for name in ours:
        gradient, difference = (theirs[name].double() - other[name].double() for other in (initial, ours))
        assert gradient.norm() > 0 and difference.norm() <= 1e-5 * gradient.norm(), name


def _initial_tables() -> dict[str, Tensor]:
    (lookup,) = toy_dlrm(toy_schema().features, 3).lookups()
    return {piece.name: piece.of(lookup.weight.detach()) for piece in lookup.pieces}


@pytest.mark.parametrize(("resumed", "whole"), [(RESUMED, "row_wise_whole_multi"), (WIDE_RESUMED, "wide")])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_saved_on_four_ranks_opened_on_fewer(folder: Path, ranks: int, resumed: Fit, whole: str) -> None:
    expected = metrics(folder / "1" / whole, "train/loss")[STEPS // 2 :]
    found = metrics(folder / str(ranks) / resumed.name, "train/loss")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_each_rank_goes_on_with_its_own_random_numbers(folder: Path) -> None:
    """Their slices differ in size, so that they have drawn differently many."""
    whole, resumed = (metrics(folder / "2" / fit.name, "train/loss") for fit in (OWN_DROPOUT[0], OWN_DROPOUT[2]))
    assert torch.equal(resumed, whole[STEPS // 2 :]) and len(resumed) == STEPS // 2


def test_bf16_in_the_matrix_products_and_on_the_wire(folder: Path) -> None:
    ours, alone = (metrics(folder / ranks / BF16.name, "train/loss") for ranks in "41")
    # Rounding of 2^-9 in vectors and gradients; exact sums would be equal, no exchange would be far off.
    assert not torch.equal(ours, alone)
    torch.testing.assert_close(ours, alone, rtol=0.03, atol=0)
    assert tables(folder / "4" / BF16.name)["C2"].isfinite().all()


FIT = [
    *["fit", "--config", "dlrm.yaml", "--config", "small.yaml", "--wandb.mode=disabled", "--data.batch_size=256"],
    *["--data.demo.train_rows=4096", "--data.demo.validation_rows=2048", "--data.demo.test_rows=1024"],
    *["--data.demo.max_table_rows=1000", "--trainer.precision=64-true", "--trainer.log_every_n_steps=1"],
    *["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"],
]


def sharded(ranks: int) -> list[str]:
    return ["--trainer.strategy=embedding_sharded_ddp", f"--trainer.devices={ranks}"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fit of one process, beside the cache with its data."""
    top = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_DLRM_CACHE", new_cache(top / "cache"))
        assert main([*FIT, "--run_dir", str(top / "run")]) == 0
    return top / "run"


@pytest.fixture
def same_data(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", str(alone.parent / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def assert_same_metrics(run_folder: Path, alone: Path) -> None:
    for name in ("train/loss", "train/auc", "validation/log_loss"):
        torch.testing.assert_close(metrics(run_folder, name), metrics(alone, name), rtol=1e-10, atol=0)


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces, joined by a veth pair."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"lightning-dlrm-{os.getpid()}-{host}" for host in (1, 2)]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        commands = [f"netns add {names[1]}", f"-n {names[0]} link add veth0 type veth peer veth0 netns {names[1]}"]
        for host, name in enumerate(names, start=1):
            commands += [f"-n {name} addr add 10.77.0.{host}/24 dev veth0", f"-n {name} link set veth0 up"]
            commands += [f"-n {name} link set lo up"]
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.usefixtures("same_data")
def test_two_hosts_find_the_same(tmp_path: Path, alone: Path, two_hosts: list[str]) -> None:
    """torchrun on either host, with its own rendezvous."""
    fit = [*FIT, "--run_dir", str(tmp_path / "run"), *sharded(1), "--trainer.num_nodes=2"]
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    environment = {"GLOO_SOCKET_IFNAME": "veth0", "OMP_NUM_THREADS": "1", INTERPRETER: interpreter()}
    hosts = [
        ForkedPython(
            [
                *torchrun,
                *["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29511", f"--local-addr=10.77.0.{host}"],
                # Both have the machine's name, which does not tell torchrun whose address the endpoint is.
                f"--rdzv-conf=is_host={int(host == 1)}",
                *["-m", "lightning_dlrm", *fit],
            ],
            os.environ | environment | {NETWORK: name},
            ROOT,
        )
        for host, name in enumerate(two_hosts, start=1)
    ]
    said = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert_same_metrics(tmp_path / "run", alone)


def assert_tables_are_logged(run_folder: Path) -> None:
    """Each table's traffic is possible, and that of all tables is what the two ranks have sent."""
    sent = metrics(run_folder, "parallel/sent_bytes_per_step")
    moved, entries = torch.zeros_like(sent), CheckpointReader(run_folder / "checkpoints/last").manifest.tables
    final = json.loads((run_folder / "summary.json").read_text())["final"]
    for name, entry in entries.items():
        rows = entry.shapes["weight"][0]
        table = f"parallel/tables/{name}"
        asked, moved_here = (metrics(run_folder, f"{table}/{key}_per_step") for key in ("asked_rows", "moved_bytes"))
        assert (asked > 0).all() and (asked <= 2 * min(rows, 128)).all()
        # An id of 4 bytes, a vector and a gradient of 16 float64, for rows of the other rank.
        assert (moved_here <= asked * (4 + 2 * 128)).all()
        moved = moved + moved_here[-len(sent) :]
        assert ((metrics(run_folder, f"{table}/work_imbalance") >= 1) & (asked > 0)).all()
        assert rows / 2 <= final[f"{table}/rows_per_rank"] <= rows
        assert final[f"{table}/bytes_per_rank"] == 128 * final[f"{table}/rows_per_rank"]
    on_two_ranks = slice(-10, None)
    assert (sent[on_two_ranks] <= moved[on_two_ranks]).all() and (moved[on_two_ranks] <= 2 * sent[on_two_ranks]).all()


class KillThirdRank(pl.Callback):
    """Kills rank 2 after step 6."""

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_rank == 2 and trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("same_data")
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path: Path, alone: Path) -> None:
    """Three ranks, one killed; two go on."""
    command = [*FIT, "--run_dir", str(tmp_path / "run"), "--checkpoint.every_n_steps=4"]
    kill = [f"--trainer.callbacks+={__name__}.{KillThirdRank.__name__}", "--trust", "tests"]
    ranks = start_ranks([["-m", "lightning_dlrm", *command, *sharded(3), *kill]] * 3)
    said = [ranks[2].communicate(timeout=300)[0]]
    killed_at = time.monotonic()
    said += [rank.communicate(timeout=60)[0] for rank in ranks[:2]]
    assert time.monotonic() - killed_at < 60
    assert [rank.returncode for rank in ranks] == [2, 2, -signal.SIGKILL], said
    assert any("error: another rank has ended or does not answer" in text for text in said)
    step = CheckpointReader(tmp_path / "run/checkpoints/last").header["step"]
    assert step == 4

    said = run_ranks(["-m", "lightning_dlrm", *command, *sharded(2), "--resume=auto"], 2)
    assert f"resumed at step {step}" in said[0] and [text.count("run folder:") for text in said] == [1, 0]
    assert_same_metrics(tmp_path / "run", alone)
    assert (metrics(tmp_path / "run", "parallel/exchange_ms_per_step") > 0).all()
    assert (metrics(tmp_path / "run", "parallel/sent_bytes_per_step") > 0).all()
    assert_tables_are_logged(tmp_path / "run")
    final = json.loads((tmp_path / "run/summary.json").read_text())["final"]
    total = sum(
        entry.shapes["weight"][0]
        for entry in CheckpointReader(tmp_path / "run/checkpoints/last").manifest.tables.values()
    )
    assert final["parallel/ranks"] == 2 and total / 2 <= final["parallel/rows_per_rank"] < 0.6 * total
    # 16 float64 a row, and no state.
    assert final["parallel/bytes_per_rank"] == 128 * final["parallel/rows_per_rank"]


def test_exchanges_of_validations_are_no_traffic_of_training() -> None:
    plan = Plan(ranks=1, pieces=(Piece(table="A", start=0, stop=6, rank=0),))
    with placed_by(partial(ShardedPlacement, plan=plan, ranks=Ranks())):
        tables = EmbeddingTables([Table.of_column("A", 6)], 3, 1)
    ids = SparseIds(values=torch.tensor([[4], [1], [4]], dtype=torch.int32), tables=1)
    tables.eval()(ids)
    nothing = tables.placement.measure(tables)
    assert nothing.seconds == 0 and nothing.tables["A"].rows.tolist() == [0]
    tables.train()(ids)
    found = tables.placement.measure(tables)
    assert found.seconds > 0 and found.tables["A"].rows.tolist() == [2]


ONE_RANK_SPOILT = """
import sys
from pathlib import Path
import torch
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.checkpointing import RunCheckpoints
from lightning_dlrm.sharding.collectives import Ranks
from tests.sharded_fits import Fit, run

save = RunCheckpoints.on_train_end

def spoil(checkpoints, trainer, module):
    if Ranks().rank == 1:
        module.network.lookups()[0].weight.data[0, 0] = float("nan")
    save(checkpoints, trainer, module)

RunCheckpoints.on_train_end = spoil
torch.distributed.init_process_group("gloo")
try:
    run(Fit(name="spoilt", rule="sgd", plan="ranges", steps=2), Path(sys.argv[1]), 2)
except UserError as error:
    print("told:", error)
"""


def test_bad_rows_of_one_rank_are_told_to_all_before_the_first_save(tmp_path: Path) -> None:
    said = run_ranks(["-c", ONE_RANK_SPOILT, str(tmp_path)], 2)
    assert all("told: embeddings" in text and "is NaN or infinite after step 2" in text for text in said), said
    assert not (tmp_path / "spoilt/checkpoints/last").exists()


@pytest.mark.usefixtures("same_data")
def test_a_plan_that_cannot_be_is_told_in_a_line(tmp_path: Path) -> None:
    strategy = ["--trainer.strategy.class_path=EmbeddingShardedDDP"]
    given = {
        "--trainer.strategy.memory_per_rank=1KiB": "too few: give ",
        "--trainer.strategy.plan=nowhere.yaml": "cannot read the plan nowhere.yaml",
    }
    for i, (option, expected) in enumerate(given.items()):
        (fit,) = start_ranks([["-m", "lightning_dlrm", *FIT, "--run_dir", str(tmp_path / str(i)), *strategy, option]])
        said = fit.communicate(timeout=120)[0]
        assert fit.returncode == 2 and expected in said and "Traceback" not in said, said
        assert not (tmp_path / str(i)).exists()


@pytest.mark.usefixtures("same_data")
def test_ranks_with_other_settings_are_told(tmp_path: Path) -> None:
    command = ["-m", "lightning_dlrm", *FIT, "--run_dir", str(tmp_path / "run"), *sharded(2)]
    ranks = start_ranks([command, [*command, "--data.batch_size=512"]])
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert sum("error: rank 1 has data.init_args.batch_size = 512, rank 0 has 256" in text for text in said) == 1, said
    assert not (tmp_path / "run").exists()
