"""Contract: a plan gives every row to one rank, within its memory and balanced in bytes and work; it is the same
every time, and one that does not fit says by how much."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.sharding.balance import HostPlacement, make_plan, place_tables
from lightning_dlrm.sharding.costs import (
    RankCost,
    TableLoad,
    UniqueRows,
    imbalance,
    parse_bytes,
    parse_memory,
    rank_costs,
    rows_of_tables,
    table_costs,
)
from lightning_dlrm.sharding.plan import Piece, Plan
from tests.caches import new_cache

# Criteo Terabyte with at most 40M rows a table (MLPerf v2).
TERABYTE = (
    *(40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4),
    *(976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36),
)
GIB = 2**30


def loads(rows: tuple[int, ...] = TERABYTE, width: int = 128, skew: float = 1.0) -> list[TableLoad]:
    """Tables under row-wise Adagrad: one accumulator a row."""
    return [
        TableLoad(name=f"C{i}", rows=n, width=width, bytes_per_row=4 * width + 4, skew=skew)
        for i, n in enumerate(rows, start=1)
    ]


def held(plan: Plan, tables: list[TableLoad]) -> list[int]:
    """Bytes of each rank, counted afresh; checks that every row is in one piece."""
    totals, of_name = [0] * plan.ranks, {table.name: table for table in tables}
    rows = dict.fromkeys(of_name, 0)
    for piece in sorted(plan.pieces, key=lambda p: (p.table, p.start)):
        assert piece.start == rows[piece.table] < piece.stop
        rows[piece.table] = piece.stop
        totals[piece.rank] += (piece.stop - piece.start) * of_name[piece.table].bytes_per_row
    assert rows == {table.name: table.rows for table in tables}
    return totals


@pytest.mark.parametrize(
    ("ranks", "skew"), [(8, 0.0), (8, 1.0), (8, 1.2), (64, 0.0), (64, 1.0), (64, 1.2), (1024, 1.0)]
)
def test_terabyte_is_balanced(ranks: int, skew: float) -> None:
    tables = loads(skew=skew)
    memory = math.ceil(1.15 * sum(table.bytes for table in tables) / ranks)
    plan = make_plan(tables, ranks, 65_536, memory)
    totals = held(plan, tables)
    assert max(totals) <= memory
    costs = rank_costs(plan, tables, 65_536)
    assert [cost.bytes for cost in costs] == totals
    assert imbalance(totals) < 1.15 and imbalance([cost.work for cost in costs]) < 1.15
    assert imbalance([cost.sent_vectors for cost in costs]) < 1.3
    if ranks == 8:
        assert len(plan.pieces) <= 60
        assert all(len(plan.tables[name]) == 1 for name in ("C6", "C13", "C17", "C19")), "tiny tables are not cut"


def test_every_time_the_same() -> None:
    script = (
        "import hashlib; from lightning_dlrm.sharding.balance import make_plan;"
        "from lightning_dlrm.sharding.costs import TableLoad;"
        f"tables = [TableLoad(name=f'C{{i}}', rows=n, width=128, bytes_per_row=516) for i, n in enumerate({TERABYTE})];"
        "print(hashlib.sha256(repr(make_plan(tables, 64, 65536)).encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_planning_needs_no_torch() -> None:
    planning = "lightning_dlrm.sharding.balance, lightning_dlrm.sharding.balance"
    script = f"import sys, {planning}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@settings(max_examples=60)
@given(
    rows=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    ranks=st.integers(1, 12),
    slack=st.floats(1.0, 2.0),
    skew=st.floats(0.0, 2.0),
    seed=st.integers(0, 100),
)
def test_any_tables_fit_where_there_is_room(rows: list[int], ranks: int, slack: float, skew: float, seed: int) -> None:
    tables = loads(tuple(rows), 4, skew)
    draw = random.Random(seed)
    # Ranks of any sizes, some without any memory; a row more each for what a row cannot fill.
    weights = [draw.choice([0, 1, 1, 3]) for _ in range(ranks)]
    weights[draw.randrange(ranks)] = 1
    total = sum(table.bytes for table in tables)
    memory = [math.ceil(total * slack * weight / sum(weights)) + 20 * (weight > 0) for weight in weights]
    plan = make_plan(tables, ranks, 64, memory)
    assert all(size <= limit for size, limit in zip(held(plan, tables), memory, strict=True))


def test_more_ranks_than_rows_and_one_table_larger_than_any_rank() -> None:
    tables = loads((3,), 4)
    assert sorted(held(make_plan(tables, 5, 8), tables)) == [0, 0, 20, 20, 20]
    tables = loads((1000,), 4)
    plan = make_plan(tables, 4, 8, memory=6 * 1000)
    assert max(held(plan, tables)) <= 6000 and {piece.rank for piece in plan.pieces} == {0, 1, 2, 3}


def test_a_head_that_all_samples_look_up_is_spread() -> None:
    tables = loads((1_000_000,), 16, skew=1.2)
    plan = make_plan(tables, 4, 4096)
    costs = rank_costs(plan, tables, 4096)
    equal = Plan(
        ranks=4, pieces=tuple(Piece(table="C1", start=250_000 * r, stop=250_000 * (r + 1), rank=r) for r in range(4))
    )
    assert imbalance([c.work for c in costs]) < 1.15 < 2 < imbalance([c.work for c in rank_costs(equal, tables, 4096)])


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("rows", [1, 50, 3000])
def test_expected_distinct_rows_are_those_of_the_sum(rows: int, skew: float) -> None:
    draws = 700
    shares = [(i + 1) ** -skew for i in range(rows)]
    chance = [1 - math.exp(-draws * share / sum(shares)) for share in shares]
    table = TableLoad(name="C1", rows=rows, width=4, bytes_per_row=16, skew=skew, indices_per_sample=3.5)
    found = UniqueRows(table, draws / 3.5)
    for start, stop in ((0, rows), (0, rows // 3), (rows // 3, rows // 2)):
        expected = sum(chance[start:stop])
        assert found.between(start, stop) == pytest.approx(expected, rel=0.02, abs=0.05)


@pytest.mark.parametrize("skew", [0.0, 1.1])
def test_ranges_of_a_table_have_its_traffic_between_them_and_a_plan_of_their_own(skew: float) -> None:
    whole = TableLoad(name="C1", rows=50_000, width=40, bytes_per_row=160, skew=skew)
    hot = replace(whole, rows=400, table_rows=50_000)
    cold = replace(whole, rows=49_600, start=400, table_rows=50_000, on_host=True)
    of_whole, of_hot, of_cold = (UniqueRows(load, 3000) for load in (whole, hot, cold))
    for row in (0, 100, 30_000, 49_600):
        assert of_cold.below(row) == pytest.approx(of_whole.between(400, 400 + row), rel=0.01, abs=0.01)
    assert of_hot.below(400) == pytest.approx(of_whole.below(400), rel=0.01)
    assert of_hot.share(0, 400) + of_cold.share(0, 49_600) == pytest.approx(1)
    plan = make_plan([hot, cold, replace(whole, name="C2")], ranks=3, batch_size=3000)
    assert rows_of_tables([hot, cold]) == {"C1": 50_000}
    plan.check({"C1": 50_000, "C2": 50_000}, 3)
    costs = rank_costs(plan, [hot, cold, replace(whole, name="C2")], 3000)
    assert sum(cost.host_bytes for cost in costs) == cold.bytes and "C1" not in plan.pooled
    assert sum(cost.bytes_of_table["C1"] for cost in costs) == whole.bytes
    assert max(cost.host_bytes for cost in costs) < 1.2 * cold.bytes / 3


@pytest.mark.parametrize("rows", [(911, 20, 300, 5, 12, 3), (911, 911, 911)])
def test_small_tables_are_cut_for_work_alone(rows: tuple[int, ...]) -> None:
    """Kibibytes need no balance: with it, each of these tables would have up to 30 pieces."""
    tables = loads(rows, width=16)
    plan = make_plan(tables, 8, 2048)
    assert max(map(len, plan.tables.values())) <= 10 and len(plan.pieces) < 20
    assert imbalance([cost.work for cost in rank_costs(plan, tables, 2048)]) < 1.1


def test_counted_rows_are_busy_wherever_they_are() -> None:
    counts = np.random.default_rng(0).permutation(np.arange(3000) ** 3)
    table = TableLoad(name="C1", rows=3000, width=4, bytes_per_row=16, counts=counts)
    found = UniqueRows(table, 700)
    chance = 1 - np.exp(-700 * counts / counts.sum())
    for start, stop in ((0, 3000), (0, 64), (10, 40)):
        assert found.between(start, stop) == pytest.approx(chance[start:stop].sum())
    costs = rank_costs(make_plan([table], 3, 2100), [table], 2100)
    assert imbalance([cost.work for cost in costs]) < 1.15 and imbalance([cost.bytes for cost in costs]) < 1.15


def test_the_command_counts_lookups_in_the_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", new_cache(tmp_path / "cache"))
    made = ["--tables", "50,400", "--rows", "3000", "--validation-rows", "10", "--test-rows", "10"]
    assert main(["generate", "random", "--output", str(tmp_path / "data"), *made, "--dense", "1"]) == 0
    capsys.readouterr()
    command = ["plan", "--config", "dlrm.yaml", "--data.path", str(tmp_path / "data"), "--ranks", "1", "--json"]
    assert main([*command, "--counted"]) == 0
    # Uniform ids, 450 rows, most of them in a batch of 2,048, where Zipf's law expects fewer of them.
    found = json.loads(capsys.readouterr().out)
    assert found["per_rank"][0]["rows_asked_per_batch"] == pytest.approx(440, abs=5) and found["skew"] is None
    assert main([*command[:-1], "--counted"]) == 0
    assert "on dataset random, global batch 2,048, 1 rank; lookups as counted in the" in capsys.readouterr().out
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["per_rank"][0]["rows_asked_per_batch"] < 430
    assert main(["plan", "--config", "dlrm.yaml", "--counted"]) == 2
    assert "no dataset folder at" in capsys.readouterr().err


def test_bytes_sent_are_those_of_a_hand_count() -> None:
    # Every sample looks up every row of two tables: all rows are distinct rows of each slice.
    tables = [
        TableLoad(name="A", rows=10, width=4, bytes_per_row=16, skew=0.0, indices_per_sample=1e6),
        TableLoad(name="B", rows=6, width=4, bytes_per_row=16, skew=0.0, indices_per_sample=1e6),
    ]
    pieces = (Piece(table="A", start=0, stop=10, rank=1), Piece(table="B", start=0, stop=6, rank=0))
    costs = rank_costs(Plan(ranks=3, pieces=pieces), tables, 3)
    assert [c.sent_ids for c in costs] == pytest.approx([10 * 4, 6 * 4, 16 * 4])
    assert [c.sent_vectors for c in costs] == pytest.approx([6 * 16 * 2, 10 * 16 * 2, 0])
    assert [c.sent_gradients for c in costs] == pytest.approx([10 * 16, 6 * 16, 16 * 16])
    assert [c.work for c in costs] == pytest.approx([18, 30, 0])


def test_bags_are_summed_where_that_is_fewer_bytes() -> None:
    """Against draws: 400 bags of 20 ids for each of two ranks, from a table cut in the middle, and from a whole one."""
    tables = [
        TableLoad(name="A", rows=4000, width=8, bytes_per_row=32, skew=0.0, indices_per_sample=20, factors=True),
        TableLoad(name="B", rows=50, width=8, bytes_per_row=32, skew=0.0, indices_per_sample=20),
        TableLoad(name="C", rows=1000, width=8, bytes_per_row=32, skew=0.0),
        TableLoad(name="D", rows=4000, width=8, bytes_per_row=32, skew=0.0, indices_per_sample=20, may_pool=False),
    ]
    halves = [[("A", 0, 2000, 0), ("A", 2000, 4000, 1)], [("B", 0, 50, 0)], [("C", 0, 1000, 1)], [("D", 0, 4000, 0)]]
    pieces = tuple(Piece(table=n, start=a, stop=b, rank=r) for of_table in halves for n, a, b, r in of_table)
    costs = {cost.name: cost for cost in table_costs(Plan(ranks=2, pieces=pieces), tables, 800)}
    drawn = np.random.default_rng(0).integers(0, 4000, (2, 400, 20))
    expected_rows, expected_sums = [], []
    for asks, holds in ((0, 1), (1, 0)):
        there = (drawn[asks] >= 2000) == holds
        expected_rows.append(len(set(drawn[asks][there].tolist())) * (4 + 2 * 8 * 4))
        expected_sums.append(there.sum() * (4 + 4) + there.any(1).sum() * 2 * 8 * 4)
    assert costs["A"].sent_rows.sum() == pytest.approx(sum(expected_rows), rel=0.03)
    assert costs["A"].sent_sums.sum() == pytest.approx(sum(expected_sums), rel=0.03)
    assert costs["B"].sent_rows.tolist() == pytest.approx([50 * 32, 50 * (4 + 32)])
    assert costs["B"].sent_sums.tolist() == pytest.approx([400 * 32, 400 * (20 * 4 + 32)])
    assert np.isinf(costs["D"].sent_sums).all()
    plan = make_plan(tables, 2, 800)
    assert plan.pooled == ("A",)
    (as_rows, as_sums) = (rank_costs(replace(plan, pooled=names), tables, 800) for names in ((), ("A",)))
    chosen = {cost.name: cost for cost in table_costs(plan, tables, 800)}["A"]
    for rank, (rows, sums) in enumerate(zip(as_rows, as_sums, strict=True)):
        saved = chosen.sent_rows[rank] - chosen.sent_sums[rank]
        assert sent(rows) - sent(sums) == pytest.approx(saved) and sent(sums) < sent(rows)


def sent(cost: RankCost) -> float:
    return cost.sent_ids + cost.sent_vectors + cost.sent_gradients


def test_what_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(
        UserError, match=r"take 19\.53 KiB, but 2 ranks together have 11\.72 KiB, 7\.812 KiB too few: give 2 more"
    ):
        make_plan(loads((1000,), 4), 2, 8, memory=6000)
    no_less, less = r"each rank, or a smaller width", r"less state \(RowWiseAdagrad\), or a smaller"
    for element, state, advice in ((4, 4, no_less), (4, 16, less), (8, 0, no_less), (8, 8, no_less), (8, 32, less)):
        table = TableLoad(name="C1", rows=1000, width=4, bytes_per_row=4 * element + state, element_bytes=element)
        with pytest.raises(UserError, match=advice):
            make_plan([table], 2, 8, memory=6000)
    with pytest.raises(UserError, match="memory is given for 2 ranks, but there are 3"):
        make_plan(loads((1000,), 4), 3, 8, memory=[6000, 7000])


def test_a_plan_is_written_and_read_back() -> None:
    plan = make_plan(loads(), 8, 65_536)
    assert Plan.of_document(yaml.safe_load(yaml.safe_dump(plan.document(), sort_keys=False))) == plan
    plan.check({load.name: load.rows for load in loads()}, 8)
    with pytest.raises(UserError, match="for 8 ranks, this run has 4"):
        plan.check({}, 4)
    with pytest.raises(UserError, match="the plan has 40000000 rows for table C1, the model has 7"):
        plan.check({load.name: load.rows for load in loads()} | {"C1": 7}, 8)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"ranks": 2, "tables": {"C1": [[0, 5, 0], [6, 9, 1]]}}, "expected a piece from row 5 on"),
        ({"ranks": 2, "tables": {"C1": [[0, 5, 2]]}}, "on rank 2, but ranks are 2"),
        ({"ranks": 2, "tables": {"C1": [0, 5, 1]}}, "not of the form"),
        ({"ranks": 2, "tables": {"C1": [[0, 5, 1]]}, "pooled": ["C2"]}, "pooled names C2, which has no pieces"),
        ({"ranks": 2, "tables": {"C1": [[0, 5, 1]]}, "pooled": 3}, "not of the form"),
        ([], "not of the form"),
    ],
)
def test_a_plan_with_mistakes_is_refused(document: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Plan.of_document(document)


def test_amounts_of_memory() -> None:
    assert parse_memory("80GiB", "memory") == 80 * GIB
    assert parse_memory("24GiB, 1000", "memory") == [24 * GIB, 1000]
    for bad in ("80Gigs", "", "-1GB", "nan", "1GiB,", "1GiB,lots"):
        with pytest.raises(UserError, match=rf"^memory is {bad}; expected a number .* for each rank: 24GiB,80GiB$"):
            parse_memory(bad, "memory")
        with pytest.raises(UserError, match=rf"^--device-memory is {bad}; expected a number with a unit .*80GiB$"):
            parse_bytes(bad, "--device-memory")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, figure = tmp_path / "plan.yaml", tmp_path / "plan.png"
    command = ["plan", "--config", "dlrm.yaml"]
    assert main([*command, "--ranks", "8", "--json", "--output", str(plan), "--plot", str(figure)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(rank["rows"] for rank in found["per_rank"]) == 33_762_577
    # Plain SGD keeps no state: 4 bytes an element.
    assert sum(rank["bytes"] for rank in found["per_rank"]) == 4 * 540_201_232
    assert found["tables"] == yaml.safe_load(plan.read_text())["tables"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--plan", str(plan), "--plot", str(figure), "--output", str(tmp_path / "again.yaml")]) == 0
    said = capsys.readouterr().out
    setup, _, table = said.partition("\n\n")
    zipf = "assumed: the k-th row of a table is looked up 1/k times as often as its first row"
    subject = f"DLRM of dlrm.yaml on demo data, global batch 2,048, 8 ranks of the plan {plan}"
    assert " ".join(setup.split()) == f"{subject}; {zipf}"
    assert said.index("\nrank  ") < said.index("requested: ") < said.index("\ntable  ") < said.index("first piece: ")
    assert "on 8 ranks" in table and "Bytes are" not in said
    assert max(map(len, table.partition("\n26 tables")[0].splitlines())) <= 80
    assert main([*command, "--ranks", "8", "--data.demo.max_table_rows", "911"]) == 0
    assert "Bytes are balanced from 1 MiB a rank on" in capsys.readouterr().out
    assert f"plan written to {tmp_path / 'again.yaml'}\ndrawing written to {figure}\n" in said
    assert main([*command, "--ranks", "2", "--memory-per-rank", "1GiB"]) == 2
    assert " 12.7 MiB too few: give 1 more rank of 1 GiB, or" in capsys.readouterr().err
    assert main([*command, "--plan", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read the plan" in capsys.readouterr().err
    assert main([*command, "--plan", str(plan), "--ranks", "2"]) == 2
    assert f"--ranks is 2, but {plan} is a plan for 8 ranks: leave --ranks out" in capsys.readouterr().err


def asked_rows(*indices: int) -> float:
    """Distinct rows of 2,048 samples' ids in tables of 1,000 rows, all drawn alike."""
    return sum(1000 * (1 - math.exp(-2048 * number / 1000)) for number in indices)


def asked_heads(places: HostPlacement, tables: list[TableLoad]) -> float:
    """Rows of a batch that need not be fetched, for the device has them."""
    return sum(UniqueRows(table, 64).below(places.cut.get(table.name, 0)) for table in tables)


def test_tables_stay_in_host_memory_only_where_they_must() -> None:
    tables = loads((1_000_000, 500, 200_000, 10, 40_000), 4)
    size = {table.name: table.bytes for table in tables}
    names = list(size)
    everything = place_tables(tables, names, 64, sum(size.values()))
    assert everything.on_host == () and everything.device_bytes == sum(size.values())
    for memory in (500, 15_000, 900_000, 5_000_000, 12_000_000, 24_000_000):
        try:
            places = place_tables(tables, names, 64, memory)
        except UserError:
            assert memory == 500
            continue
        host = sum(size[name] for name in places.on_host)
        fetched = [
            UniqueRows(table, 64).between(places.cut.get(table.name, 0), table.rows)
            for table in tables
            if table.name in places.on_host
        ]
        # What room is left goes to first rows.
        kept = 20 * sum(places.cut.values())
        assert kept == 0 or memory - places.device_bytes <= 20 * len(places.cut) + 3 * 20 * asked_heads(places, tables)
        assert all(0 < first < table.rows for table in tables if (first := places.cut.get(table.name)))
        assert list(places.fetched.values()) == pytest.approx(fetched) and places.bus_bytes == pytest.approx(
            20 * sum(fetched)
        )
        assert places.host_bytes == host - kept
        assert sum(size.values()) - host + kept + 3 * 20 * sum(fetched) <= places.device_bytes + 60 <= memory + 60
        # None of them would fit as well.
        without = {name: places.cached_bytes - 3 * math.ceil(20 * rows) for name, rows in places.fetched.items()}
        assert all(sum(size.values()) - host + size[name] + without[name] > memory for name in places.on_host)
    with pytest.raises(
        UserError, match=r"take 400 bytes, but the device has 300 bytes: 100 bytes .* give more memory, a"
    ):
        place_tables(loads((10, 10), 4, 0.0), ["C1"], 1000, 300)
    with pytest.raises(UserError, match=r"the 2 devices have 400 bytes, of which 95% are planned, 380 bytes: 20 "):
        place_tables(loads((10, 10), 4, 0.0), ["C1"], 1000, 200, 2)


def test_the_command_writes_a_configuration_that_keeps_tables_on_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, command = tmp_path / "places.yaml", ["plan", "--config", "dlrm.yaml", "--device-memory", "1GiB"]
    assert main([*command, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "--model.network.tables.on_host '{C3: " in said
    fit = f"python -m lightning_dlrm fit --config dlrm.yaml --config {output}\n"
    assert f"configuration written to {output}; train with it:\n  {fit}or, in place of that file, with" in said
    on_host = yaml.safe_load(output.read_text())["model"]["network"]["init_args"]["tables"]["on_host"]
    assert list(on_host) == ["C3", "C12"] and 0 < on_host["C3"] < 10_131_227 and 0 < on_host["C12"] < 8_351_593
    assert main([*command, "--config", str(output), "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["on_host"]) == ["C12", "C3"]
    assert "served" in said and "%" in said
    # Two such devices, with a plan for the rows of each.
    assert main([*command[:-1], "0.5GiB", "--ranks", "2", "--output", str(output)]) == 0
    capsys.readouterr()
    assert main(["plan", "--config", "dlrm.yaml", "--config", str(output), "--ranks", "2", "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["per_rank"]
    assert all(rank["bytes"] - rank["host_bytes"] <= 0.5 * GIB for rank in ranks)
    assert main(["plan", "--config", str(output)]) == 2
    assert (
        "unknown key model.network.tables.on_host.C3: no class that has this key is chosen; a file"
        in capsys.readouterr().err
    )
    assert main([*command, "--plot", "plan.png"]) == 2
    assert "--device-memory chooses tables for host memory, but --plot is for a plan" in capsys.readouterr().err


def test_the_command_counts_the_ids_of_a_bag(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--config", "dlrm.yaml", "--data.demo.max_table_rows", "20", "--ranks", "1", "--skew", "0"]

    def asked(indices: str) -> float:
        assert main([*command, "--json", "--indices", indices]) == 0
        return json.loads(capsys.readouterr().out)["per_rank"][0]["rows_asked_per_batch"]

    assert asked("0") == 0
    assert asked("1,1" + ",0" * 24) == pytest.approx(40), "every row of two tables of 20"
    # By default what the dataset knows: bags of 1 and of 2 to 4 ids.
    random = ["--data", "RandomData", "--data.tables=[1000,1000]", "--data.indices=[1,4]", "--data.min_indices=[1,2]"]
    command = ["plan", "--config", "dlrm.yaml", *random, "--ranks", "1", "--skew", "0", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["per_rank"][0]["rows_asked_per_batch"] == pytest.approx(asked_rows(1, 3))
    command = ["plan", "--config", "dlrm.yaml", "--data.demo.max_table_rows", "20", "--ranks", "1", "--skew", "0"]
    assert main([*command[:-4], "--ranks", "2", "--json", "--wire", "bf16"]) == 0
    rank = json.loads(capsys.readouterr().out)["per_rank"][0]["sent_bytes_per_step"]
    # As many rows of others as gradients of theirs: 16 elements of 2 bytes, and an id of 4.
    assert rank["gradients"] == pytest.approx(rank["ids"] / 4 * 16 * 2)
    # Bags of ten ids are sent as their sums, but for a model's own factors.
    random = ["--data", "RandomData", "--data.tables=[1000,50000]", "--data.indices=[1,10]"]
    wide = ["plan", "--config", "dlrm.yaml", *random, "--ranks", "2"]
    assert main([*wide, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    of_table = found["sent_bytes_per_step"]["C2"]
    assert found["pooled"] == ["C2"] and of_table["as_sums"] < of_table["as_rows"]
    assert main(wide) == 0
    assert "sums\n" in capsys.readouterr().out
    assert main([*wide, "--json", "--model.network.tables.pooling_weights=learned"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pooled"] == [] and found["sent_bytes_per_step"]["C2"]["as_sums"] is None
    for bad, said in (
        ("1,2", "2 numbers, but the data have 26"),
        ("many", "expected numbers"),
        ("-1", "--indices is -1"),
    ):
        assert main([*command, "--indices", bad]) == 2
        assert said in capsys.readouterr().err
