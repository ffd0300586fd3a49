"""Contract: with tables in host memory a fit is, bit for bit, that with tables on the device: losses, tables and
optimizer state, for rows that one batch fetches while another one updates them; micro-batches, clipping, resuming
and evaluation too. Here the CPU stands in for the device: what is fetched is a copy."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.engine.metrics_logger import served_by_device
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD, Adam
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.sharding.placement import ShardedPlacement
from lightning_dlrm.sharding.plan import Piece, Plan
from lightning_dlrm.tables import host as host_module
from lightning_dlrm.tables.embeddings import Embeddings, QuotientRemainder, TableSettings
from lightning_dlrm.tables.host import HostStorage
from lightning_dlrm.tables.lookup import DeviceStorage, EmbeddingTables, placed_by
from lightning_dlrm.tables.table import Table
from lightning_dlrm.tracking import names
from tests.sharded_fits import HALF, PARITY, RESUMED, RULES, Fit, global_batch, metrics, run
from tests.sharding.test_sharded import tables
from tests.toy import optimizer_of, toy_schema


def placed(features: Features, seed: int, on_host: Any, **settings: Any) -> DLRM:
    tables = TableSettings(on_host=on_host, **settings)
    return DLRM(features, seed, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8], tables=tables)


def host_tables(rows: int = 50) -> EmbeddingTables:
    return EmbeddingTables([Table.of_column("A", rows)], 3, storage=HostStorage())


SPLIT: dict[str, Any] = {
    "dims": {"C2": 2},
    "project": True,
    "quotient_remainder": QuotientRemainder(collisions=10, threshold=500),
    "pooling_weights": "learned",
}
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "all": ({}, "all"),
    "some": ({}, ["C2", "C4"]),
    "split": (SPLIT, ["C4", "C2"]),
    "cut": ({}, {"C4": 40, "C1": 0, "C2": 99}),
    "cut_more": (SPLIT | {"pooling": "mean", "quotient_remainder": None}, {"C4": 100, "C2": 5}),
}


@pytest.mark.parametrize(
    ("kind", "hot", "rule", "micro"),
    [
        ("all", "one", "sgd", 1),
        ("all", "weighted", "adam", 3),
        ("some", "one", "row_wise", 3),
        ("some", "multi", "adagrad", 1),
        ("some", "weighted", "row_wise", 1),
        ("split", "one", "adam", 1),
        ("cut", "one", "row_wise", 3),
        ("cut", "weighted", "adam", 1),
        ("cut_more", "weighted", "adagrad", 1),
        ("cut_more", "multi", "row_wise", 3),
        ("split", "multi", "adagrad", 3),
        ("split", "weighted", "sgd", 1),
    ],
)
def test_steps_are_those_with_tables_on_the_device(kind: str, hot: str, rule: str, micro: int) -> None:
    """Prefetched one batch ahead, with many rows in one batch and the next; the rows are looked at every step."""
    settings, on_host = KINDS[kind]
    features = toy_schema().features
    torch.set_default_dtype(torch.float64)
    try:
        networks = [placed(features, 3, where, **settings) for where in ((), on_host)]
    finally:
        torch.set_default_dtype(torch.float32)
    optimizers = [optimizer_of(n, RULES[rule](), RULES[rule]()) for n in networks]
    assert any(lookup.storage.on_host for lookup in networks[1].lookups())
    for network, optimizer in zip(networks, optimizers, strict=True):
        network.losses = []
        upcoming = global_batch(0, hot)
        for index in range(8 * micro):
            batch, upcoming = upcoming, global_batch(index + 1, hot)
            network.prefetch(upcoming.ids)
            # As batches are brought to a device: other tensors, the same ids.
            ids = batch.map(lambda tensor: tensor if tensor is None else tensor.clone()).ids
            loss = nn.functional.binary_cross_entropy_with_logits(
                network(batch.dense.double(), ids), batch.label.double()
            )
            loss.backward()
            network.losses.append(loss.item())
            if (index + 1) % micro == 0:
                if kind == "all":
                    # With tables of both kinds the norm would be summed in another order.
                    optimizer.clip_gradient_norm(0.05)
                optimizer.step()
                optimizer.zero_grad()
                # An evaluation between the steps.
                with torch.inference_mode():
                    network.losses.append(network(batch.dense.double(), global_batch(3, hot).ids).sum().item())
        for lookup in network.lookups():
            lookup.flush()
    device, host = networks
    assert len(set(host.losses)) > 8
    if kind.startswith("cut"):
        # Sums over fewer rows, or over a bag in two parts, are rounded otherwise.
        torch.testing.assert_close(host.losses, device.losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            contents(host, optimizers[1]), contents(device, optimizers[0]), rtol=1e-9, atol=1e-15
        )
    else:
        assert host.losses == device.losses
        assert contents(host, optimizers[1]) == contents(device, optimizers[0])


def contents(network: DLRM, optimizer: CTROptimizer) -> dict[str, list]:
    """Every row of every table and slot, by the table's name."""
    found: dict[str, list] = {}
    for lookup, state in zip(optimizer.lookups, optimizer.table_state, strict=True):
        for piece in lookup.pieces:
            for slot, values in {"weight": lookup.weight.detach(), **state}.items():
                found.setdefault(f"{piece.name}/{slot}", []).append((piece.start, piece.of(values).tolist()))
    return {name: [row for _, rows in sorted(pieces) for row in rows] for name, pieces in found.items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"trainer": (("accumulate_grad_batches", 3),)}],
    ids=["plain", "accumulated"],
)
def test_a_fit_with_its_checkpoint_is_that_with_tables_on_the_device(tmp_path: Path, options: dict[str, Any]) -> None:
    fits = [
        Fit(name=name, rule="row_wise", plan="auto", network=name, hot="multi", **options) for name in ("dlrm", "host")
    ]
    for fit in fits:
        run(fit, tmp_path, 1)
    device, host = (tmp_path / fit.name for fit in fits)
    assert torch.equal(metrics(host, "train/loss"), metrics(device, "train/loss"))
    for slot in ("weight", "sum"):
        expected, found = tables(device, slot), tables(host, slot)
        assert all(torch.equal(found[name], expected[name]) for name in expected) and expected.keys() == found.keys()


@pytest.mark.parametrize("places", [("host", "dlrm"), ("dlrm", "host"), ("host", "cut"), ("cut", "dlrm")])
def test_a_checkpoint_opens_wherever_the_tables_are(tmp_path: Path, places: tuple[str, str]) -> None:
    whole = next(fit for fit in PARITY if (fit.rule, fit.hot) == (RESUMED.rule, RESUMED.hot))
    first, second = (Fit(**vars(fit) | {"network": place}) for fit, place in zip((HALF, RESUMED), places, strict=True))
    for fit in (whole, first, second):
        run(fit, tmp_path, 1)
    expected = metrics(tmp_path / whole.name, "train/loss")[HALF.steps :]
    found = metrics(tmp_path / RESUMED.name, "train/loss")
    # Of a table in two parts, a bag's sum is rounded otherwise.
    assert "cut" in places or torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_rows_are_fetched_before_they_are_needed_and_written_back_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefetched batch's lookup fetches and waits for nothing; an update waits only for the one before it."""
    tables = host_tables()
    ids, later = (SparseIds(values=torch.tensor(v, dtype=torch.int32), tables=1) for v in ([[4], [1], [4]], [[1], [7]]))
    optimizer = CTROptimizer([], [tables], SGD(1.0), SGD(1.0))
    before = tables.weight.detach().clone()

    def step(ids: SparseIds) -> None:
        tables(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    tables.prefetch(ids)
    tables.prefetch(later)
    host_module.host_io_executor.submit(lambda: None).result()  # after both fetches
    may_write, write = threading.Event(), HostStorage._write_back
    monkeypatch.setattr(host_module.Copies, "gather", lambda *args: pytest.fail("the rows are fetched already"))
    monkeypatch.setattr(HostStorage, "_write_back", lambda *args: (may_write.wait(30), write(*args))[1])
    step(ids)
    assert torch.equal(tables.weight, before), "not written yet"
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(step, later)
        with pytest.raises(TimeoutError):
            second.result(0.2)
        may_write.set()
        second.result(30)
    tables.flush()
    expected = before.clone()
    expected[[4, 1, 7], :] -= torch.tensor([[2.0], [2.0], [1.0]])
    torch.testing.assert_close(tables.weight.detach(), expected)


def test_a_batch_that_is_never_looked_up_is_forgotten() -> None:
    tables = host_tables()
    ids = SparseIds(values=torch.tensor([[4]], dtype=torch.int32), tables=1)
    tables.prefetch(ids)
    assert len(tables.storage._pending) == 1
    host_module.host_io_executor.submit(lambda: None).result()
    del ids
    assert len(tables.storage._pending) == 0


def test_moving_the_module_leaves_the_tables_where_they_are() -> None:
    tables = host_tables()
    assert tables.to("meta").weight.device.type == "cpu" and tables.device.type == "meta"
    assert host_tables().double().weight.dtype == torch.float64
    with torch.device("meta"):
        assert host_tables(10**12).weight.device.type == "meta"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{C1: 1460}", "keeps the rows of C1 from 1460 on in host memory; expected 0 to 1459"),
        ("{Z9: 1}", "tables.on_host names Z9, which is not a table"),
        ("[C1,Z9]", "tables.on_host names Z9, which is not a table"),
        ("some", "expected all, or a list of columns"),
    ],
)
def test_mistakes_are_told_in_a_line(capsys: pytest.CaptureFixture[str], given: str, said: str) -> None:
    assert main(["params", "--config", "dlrm.yaml", f"--model.network.tables.on_host={given}"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["sgd", "row_wise", "adam"])
def test_steps_on_a_gpu_are_those_with_tables_on_it(rule: str) -> None:
    features, device = toy_schema().features, torch.device("cuda")
    found = []
    for where in ((), ["C2", "C4"]):
        network = placed(features, 3, where).to(device)
        optimizer = optimizer_of(network, RULES[rule](), RULES[rule]())
        losses, upcoming = [], global_batch(0, "multi").pin_memory()
        for index in range(30):
            batch, upcoming = upcoming, global_batch(index + 1, "multi").pin_memory()
            network.prefetch(upcoming.ids)
            moved = batch.to(device)
            loss = nn.functional.binary_cross_entropy_with_logits(network(moved.dense, moved.ids), moved.label.float())
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.stack(losses).cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["one loss", "two losses", "the first is prefetched", "both are prefetched"])
def test_two_lookups_before_an_update(kind: str) -> None:
    """Their rows overlap, and the first update makes the optimizer's state."""
    draws = torch.Generator().manual_seed(0)
    batches = [SparseIds(values=torch.randint(20, (6, 1), generator=draws), tables=1) for _ in range(8)]
    found = []
    for storage in (DeviceStorage(), HostStorage()):
        tables = EmbeddingTables([Table.of_column("A", 20)], 3, seed=1, storage=storage)
        optimizer = CTROptimizer([], [tables], Adam(0.1), Adam(0.1))
        for first, second in zip(batches[::2], batches[1::2], strict=True):
            for ids in {"the first is prefetched": [first], "both are prefetched": [first, second]}.get(kind, []):
                tables.prefetch(ids)
            losses = [tables(ids).square().sum() for ids in (first, second)]
            for loss in [sum(losses)] if kind == "one loss" else losses:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        tables.flush()
        found.append([tables.weight.detach(), *optimizer.table_state[0].values()])
    for device, host in zip(*found, strict=True):
        assert torch.equal(device, host)


@pytest.mark.parametrize("place", ["host", "shards"])
def test_ids_that_a_network_changes_after_the_prefetch(place: str) -> None:
    tables = host_tables()
    if place == "shards":
        plan = Plan(ranks=1, pieces=(Piece(table="A", start=0, stop=50, rank=0),))
        with placed_by(partial(ShardedPlacement, plan=plan, ranks=Ranks())):
            tables = EmbeddingTables([Table.of_column("A", 50)], 3)
    for change in (
        lambda ids: ids.map(lambda tensor: None if tensor is None else 5 - tensor),
        lambda ids: dataclasses.replace(ids, values=5 - ids.values),
    ):
        ids = SparseIds(values=torch.tensor([[4], [0], [2]], dtype=torch.int32), tables=1)
        tables.prefetch(ids)
        assert torch.equal(tables(change(ids)).flatten(1), tables.weight.detach()[[1, 5, 3]])


@pytest.mark.parametrize("offsets", [None, [0, 2, 3, 4]])
def test_lookups_that_the_device_serves_are_counted(offsets: list[int] | None) -> None:
    settings = TableSettings(on_host={"C1": 40, "C3": 0})
    tables = Embeddings({"C1": 50, "C2": 5, "C3": 7}, 4, 0, settings)
    # Of the lookups in C1 and C3, the device serves the ids below 40 of C1.
    ids = SparseIds(values=torch.tensor([[39, 1, 2], [40, 2, 3], [5, 3, 4], [49, 0, 0]], dtype=torch.int32), tables=3)
    served = 2 / 8
    if offsets is not None:
        values = torch.tensor([1, 45, 3, 6], dtype=torch.int32)
        ids, served = SparseIds(values=values, tables=3, offsets=torch.tensor(offsets)), 1 / 3
    for group in tables.groups:
        before = dict(vars(group))
        group.ids_of(ids)
        assert vars(group) == before, "a prefetch, which may run at any time, changes no count"
    tables(ids)
    assert served_by_device(tables) == {names.DEVICE_SERVED: pytest.approx(served)}  # type: ignore[arg-type]
    assert served_by_device(tables) == {}  # type: ignore[arg-type]
    tables.eval()(ids)
    assert served_by_device(tables) == {}  # type: ignore[arg-type]
