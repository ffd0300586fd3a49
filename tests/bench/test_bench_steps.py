"""What the step benchmarks compare is the same work, the gate counts steps, and rows have the promised fields."""

import argparse
import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.generate.random import RandomSettings, generate_random
from lightning_dlrm.__main__ import main
from lightning_dlrm.bench import figures, fit, paper, peer, roofline
from lightning_dlrm.bench.breakdown import OTHER, ROWS, by_kind, by_part, mark, marked_parts, profile_steps
from lightning_dlrm.bench.contenders import (
    OurStep,
    PlainBatch,
    PlainDCN,
    PlainDLRM,
    PlainStep,
    Workload,
    draw_batch,
    plain_network,
)
from lightning_dlrm.bench.figures import draw_roofline
from lightning_dlrm.bench.gpu import loss_targets, render_targets
from lightning_dlrm.bench.measurement import Measurement, machine, speed_ratio
from lightning_dlrm.bench.paper import OPERATORS
from lightning_dlrm.bench.processes import Worker
from lightning_dlrm.bench.rendering import headline, render
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.kernels.choice import choose
from lightning_dlrm.models.network import model_size

CPU = torch.device("cpu")
DLRM = Workload(tables=(50, 3, 200), dense=5, width=8, bottom=(16, 8), top=(12,))
FIELDS = {
    *("work", "implementation", "device", "precision", "batch_size"),
    *("median_s", "spread_s", "samples_per_s", "floor_s"),
}


@pytest.fixture(autouse=True)
def rough_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rates are measured once each: floors are not tested here."""
    monkeypatch.setattr(roofline, "_LONG_S", 0.0)
    monkeypatch.setattr(roofline, "_BUDGET_S", 0.0)


@pytest.mark.parametrize(
    "workload",
    [
        DLRM,
        Workload(tables=(50, 3), dense=5, width=8, bottom=(16, 8), top=(12,), bags=(0, 6)),
        Workload(tables=(50, 3), dense=5, width=8, top=(12, 6), model="dcn"),
        Workload(tables=(50, 3), dense=5, width=8, top=(12, 6), model="dcn_v2"),
    ],
    ids=["dlrm", "bags", "dcn", "dcn_v2"],
)
def test_ours_and_the_baseline_train_alike(workload: Workload) -> None:
    ours, plain = workload.network(), plain_network(workload)
    _copy(ours, plain)
    of_ours, of_plain = OurStep(ours, "32-true", CPU), PlainStep(plain, "32-true", CPU)
    for seed in range(5):
        batch = draw_batch(workload, 32, seed)
        assert of_ours(batch).item() == pytest.approx(of_plain(PlainBatch.of(batch)).item(), rel=1e-5)
    (lookup,) = ours.lookups()
    expected = torch.cat([bag.weight for bag in plain.tables.bags])
    torch.testing.assert_close(lookup.weight, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["dlrm", "dlrm_dcn", "dcn", "dcn_v2"])
def test_operations_of_the_parts_are_the_models(model: str) -> None:
    bottom = (16, 8) if model.startswith("dlrm") else ()
    workload = Workload(tables=(50, 3), dense=5, width=8, bottom=bottom, top=(12, 6), model=model, cross_rank=4)
    batch = draw_batch(workload, 16, 0)
    costs = roofline.costs(workload, [batch], "32-true")
    products = sum(cost.flops for part, cost in costs.items() if part not in ("tables", "update"))
    assert products == 16 * model_size(workload.network()).flops_per_sample_training
    rows = {(i % 2, int(value)) for i, value in enumerate(batch.ids.values.flatten())}
    assert roofline.distinct_rows(workload, batch) == len(rows)


def test_the_losses_that_a_gpu_is_asked_for_are_compared() -> None:
    """On a CPU through Triton's interpreter."""
    pytest.importorskip(
        "triton",
        "3.9",
        reason="needs Triton 3.9, whose interpreter runs with NumPy 2.4: fused kernels are not compared",
    )
    workload = Workload(tables=(30, 3), dense=5, width=8, bottom=(16, 8), top=(12,))
    targets = loss_targets(workload, CPU, 16, 3)
    assert [target.met for target in targets] == [True, True]
    assert "first loss against eager" in render_targets(targets)


LOOP = """
import sys
from lightning_dlrm.bench.gate import Gate
gate = Gate()
steps = 0
while True:
    steps += 1
    open("steps", "w").write(str(steps))
    gate.waited += 0.5
    if not gate.passed():
        sys.exit()
"""


def test_a_worker_makes_the_steps_it_is_asked_for(tmp_path: Path) -> None:
    with Worker("loop", [sys.executable, "-c", LOOP], tmp_path) as worker:
        assert (tmp_path / "steps").read_text() == "1"  # the first step, then it waits
        worker(3)
        worker(2)
        assert (tmp_path / "steps").read_text() == "6"
        assert worker.waited == [1.5, 1.0]


def test_a_worker_that_fails_tells_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^loop failed: ValueError: no such thing$"):
        Worker("loop", [sys.executable, "-c", "raise ValueError('no such thing')"], tmp_path)
    # This program's commands begin their last line with "error: ", as this one will.
    with pytest.raises(UserError, match=r"^loop failed: no such folder$"):
        Worker("loop", [sys.executable, "-c", "import sys; sys.exit('error: no such folder')"], tmp_path)


def test_paths_for_the_peer_do_not_depend_on_the_folder_where_it_runs() -> None:
    for given, expected in (("bin/python", str(Path.cwd() / "bin/python")), ("python3", "python3")):
        args = argparse.Namespace(peer=Path("dlrm"), peer_python=given)
        command = peer.peer_command(args, "module", "", "argument")
        assert command[0] == expected and command[3] == str(Path.cwd() / "dlrm")


def test_a_peer_that_cannot_run_is_one_line(tmp_path: Path) -> None:
    """It names the peer, what its interpreter lacks and what to do, and has nothing of the program that it runs."""
    (tmp_path / "dlrm_s_pytorch.py").write_text("import no_such_package\n")
    args = argparse.Namespace(peer=tmp_path, peer_python=sys.executable, device="cpu")
    for version, found in (("2.4.0", "NumPy 2.4.0 found, which it fails on"), ("1.26.4", "No module named 'no_such_")):
        (tmp_path / "numpy.py").write_text(f"__version__ = '{version}'\n")
        with pytest.raises(UserError) as raised:
            peer.step_worker(args, DLRM, [draw_batch(DLRM, 4, 0)], tmp_path)
        line = str(raised.value)
        assert line.startswith(f"the peer {tmp_path} (run by {sys.executable}) failed: {found}")
        assert line.endswith("with numpy<2, torch, scikit-learn and tensorboard with --peer-python")
        assert "\n" not in line and len(line) < 400


@pytest.mark.parametrize(
    "arguments",
    [
        ["lookup", "--rows", "50", "--tables", "3", "--bag", "0", "4"],
        ["step", "--max-rows", "50", "--precision", "32-true", "bf16-mixed"],
    ],
)
def test_rows_have_the_promised_fields(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # FBGEMM takes 8 s to import
    small = ["--batch-size", "16", "--steps", "2", "--rounds", "2", "--json", str(tmp_path / "rows.json")]
    assert main(["bench", *arguments, *small]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["implementation"] for row in rows} >= {"ours", "baseline"}
    for row in rows:
        assert set(row) >= FIELDS and row["work"] == arguments[0] and row["batch_size"] == 16
        assert row["samples_per_s"] == pytest.approx(16 / row["median_s"]) and row["floor_s"] > 0
    said = capsys.readouterr().out.splitlines()
    compared = r"times as fast as plain PyTorch"
    assert re.search(rf"batch 16, 32-true, cpu: lightning_dlrm takes [\d.]+ .* for 16 samples, .* {compared}", said[0])
    notes = ("A ratio is the median of the ratios", "An uncertain ratio is given as its range")
    assert any(line.startswith(notes) for line in said)
    assert arguments[0] == "lookup" or said[0].startswith("dlrm, tables of at most 50 rows, batch 16, ")


@pytest.mark.parametrize("make", [OurStep, PlainStep])
def test_a_breakdown_leaves_no_part_of_a_step_out(make: type) -> None:
    network = DLRM.network() if make is OurStep else plain_network(DLRM)
    step = make(network, "32-true", CPU)
    batch = draw_batch(DLRM, 16, 0)
    given = batch if make is OurStep else PlainBatch.of(batch)
    with marked_parts(network):
        _, times = profile_steps(lambda _: step(given, mark), 2, CPU)
    parts = by_part(times)
    assert set(parts) - {"begin"} == {part for parts in OPERATORS.values() for part in parts}
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(by_kind(times).values()) == pytest.approx(sum(parts.values()))


@pytest.mark.parametrize("kernels", ["plain", "native"])
def test_time_of_the_tables_counts_for_rows(kernels: str) -> None:
    """The profiler knows operators of this package by name, so that native kernels count like plain ones."""
    if kernels == "native" and choose("auto", "cpu", torch.float32) != "native":
        pytest.skip("no compiler for native kernels here: only plain ones are measured")
    workload = Workload(tables=(20_000,) * 8, dense=2, width=16, top=(4,), bags=(20, 20), model="dcn")
    network = workload.network()
    for lookup in network.lookups():
        lookup.kernels = kernels
    step = OurStep(network, "32-true", CPU)
    batch = draw_batch(workload, 512, 0)
    steps = [by_kind(times) for times in profile_steps(lambda _: step(batch), 6, CPU)[1:]]
    kinds = {kind: min(of_step[kind] for of_step in steps) for kind in steps[0] if kind != OTHER}
    # Python's share depends on what else the machine does.
    assert kinds[ROWS] > 0.1 * sum(kinds.values()), kinds


def test_the_papers_benchmark_draws_operators_and_roofline(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [roofline.MachineRates({"32-true": 1.65e9}, 8e9)]
    # Measured once: text and figure have the same rates.
    monkeypatch.setattr(roofline, "measure_rates", lambda *args: rates.pop())
    drawn: list[roofline.MachineRates] = []
    monkeypatch.setattr(figures, "draw_roofline", lambda *args: (drawn.append(args[1]), draw_roofline(*args)))
    options = ["--max-rows", "50", "--batch-size", "16", "--batches", "4", "--rounds", "2"]
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "figure.png")]
    assert main(["bench", "paper", *options, *files]) == 0
    assert not rates and str(drawn[0]).endswith("1.65 GFLOP/s in 32-true, 8 GB/s")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["work"] for row in rows} == {"paper"} and set(rows[0]) >= FIELDS
    output = capsys.readouterr().out
    assert output.count("GB/s") == 1 and str(drawn[0]) in " ".join(output.split())
    assert all(word in output for word in [*OPERATORS, *roofline.PARTS, "bound by", "FLOP/byte"])
    tables = output[output.index("\n\n") :].partition("figures:")
    assert max(map(len, tables[0].splitlines())) <= 80
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("figure.png", "figure-roofline.png"))


def test_a_roofline_says_why_a_part_is_above_its_line(tmp_path: Path) -> None:
    """A part under the flat line is there because its peak was measured too low, and not because of caches."""
    rates = roofline.MachineRates({"32-true": 1.65e9}, 8e9)
    for flops, reason, other in ((100.0, "square product", "caches"), (0.1, "caches", "square product")):
        cost = roofline.Cost(flops * 1e6, 1e6)
        parts = {"top MLP": (cost, 0.9 * rates.floor(cost.flops, cost.bytes, "32-true"))}
        draw_roofline({"32-true": parts | {"tables": (cost, 1.0)}}, rates, "cpu", "DLRM", [], tmp_path / "roofline.svg")
        drawn = (tmp_path / "roofline.svg").read_text()
        assert (
            ("memory: 8 GB/s" in drawn) == (flops < 1)
            and "arithmetic: 1.65 GFLOP/s" in drawn
            and "top MLP 111%" in drawn
        )
        assert reason in drawn and other not in drawn


def test_a_fit_is_timed_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command runs in another folder, so that paths which the user gives must not be relative to it."""
    settings = RandomSettings(tables=(30, 40), dense=3, train_rows=256, validation_rows=16, test_rows=0)
    generate_random(settings, tmp_path / "data", progress=False)
    options = ["--data", "data", "--batch-size", "16", "--steps", "3", "--rounds", "2"]
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "fit", *options, "--json", "rows.json"]) == 0
    whole, bare, plain = json.loads((tmp_path / "rows.json").read_text())
    assert [row["implementation"] for row in (whole, bare, plain)] == ["ours", "ours", "baseline"]
    (least_bare, most_bare), (least_fit, most_fit) = _both_rounds(bare), _both_rounds(whole)
    assert least_bare / most_fit <= whole["of_bare_loop"] <= most_bare / least_fit
    assert whole["case"] == "fit, data, batch 16, 32-true, cpu"


def test_a_compiled_fit_is_asked_for_by_model_compile(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    for options, value in (([], "false"), (["--compile"], "true")):
        command = fit.fit_command(parser.parse_args(options), tmp_path, "32-true", tmp_path / "run")
        assert f"--model.compile={value}" in command


def _both_rounds(row: dict) -> tuple[float, float]:
    """The seconds of two rounds, of which the median is the mean."""
    return row["median_s"] - row["spread_s"] / 2, row["median_s"] + row["spread_s"] / 2


def test_quotients_are_those_of_each_round() -> None:
    """Of a machine that takes twice as long in its second half, and where one round is disturbed."""
    found = speed_ratio("ratio", [1, 1, 2, 2, 9], [3, 3, 6, 6, 6])
    assert found == {"ratio": 3, "ratio_low": 6 / 9, "ratio_high": 3}
    assert speed_ratio("ratio", [1], [3], samples=2)["ratio"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--batch-size", "0"], "--batch-size is 0"),
        (["lookup", "--tables", "-1"], "--tables is -1"),
        (["lookup", "--bag", "5", "1"], "--bag is 5 1"),
        (["lookup", "--json", "nowhere/rows.json"], "there is no folder nowhere"),
        (["lookup", "--json", "."], "--json . is a folder; give a file, such as results.json"),
        (["paper", "--batches", "2"], "give at least as many batches"),
        (["gpu"], "bench gpu needs a CUDA device"),
        (["gpu", "--budget", "-1"], "--budget is -1"),
        (["gpu", "--predict", "--max-rows", "0"], "--max-rows is 0"),
        (["paper", "--plot", "figure.doc"], "does not have the suffix of a figure"),
        (["step", "--peer", "nowhere"], "not a checkout of facebookresearch/dlrm"),
        (["step", "--model", "dcn", "--max-rows", "0"], "--max-rows is 0"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out


def test_what_is_known_before_the_first_result_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no clock")

    monkeypatch.setattr("lightning_dlrm.bench.step.time_rounds", fail)
    file = tmp_path / "rows.json"
    # The error of this file counts as one in the user's own code.
    assert main(["bench", "step", "--max-rows", "50", "--batch-size", "16", "--json", str(file)]) == 2
    (known,) = json.loads(file.read_text())
    assert known["error"] == "RuntimeError: no clock" and known["machine"] == machine()
    assert known["command"].startswith("python -m lightning_dlrm bench step --device cpu --precision 32-true ")
    first, kernels, *_, of_machine, command = capsys.readouterr().out.splitlines()
    assert first == "bench step failed before its first result"
    assert kernels.startswith("kernels of lightning_dlrm: ")
    assert (of_machine, command) == (f"machine: {known['machine']}", f"command: {known['command']}")


def _copy(ours: torch.nn.Module, plain: PlainDLRM | PlainDCN) -> None:
    """The same weights to both: linear layers in order, tables, cross layers."""
    (lookup,) = ours.lookups()
    with torch.no_grad():
        for bag, piece in zip(plain.tables.bags, lookup.pieces, strict=True):
            bag.weight.copy_(piece.of(lookup.weight))
        names = ["bottom", "top"] if isinstance(plain, PlainDLRM) else ["deep"]
        pairs = [
            pair
            for name in names
            for pair in zip(getattr(ours, name).linears(), _linears(getattr(plain, name)), strict=True)
        ]
        if isinstance(plain, PlainDCN):
            pairs.append((ours.logit.linears()[0], plain.logit))
            for layer, (weight, bias) in enumerate(zip(plain.cross, plain.biases, strict=True)):
                weight.weight.copy_(ours.cross.weight[layer].view_as(weight.weight))
                bias.copy_(ours.cross.bias[layer])
        for mine, theirs in pairs:
            theirs.weight.copy_(mine.weight)
            theirs.bias.copy_(mine.bias)


def _linears(module: torch.nn.Module) -> list[torch.nn.Linear]:
    return [layer for layer in module if isinstance(layer, torch.nn.Linear)]


def test_a_table_of_one_round_has_no_spread_and_uncertain_rows_are_counted() -> None:
    def row(implementation: Any, *seconds: float) -> Measurement:
        return Measurement.of_rounds(
            seconds, work="auc", case="some", implementation=implementation, device="cpu", precision="32-true",
            batch_size=1, samples=10, floor_s=seconds[0] / 1234.5,
        )  # fmt: skip

    said = render([row("ours", 1.0), row("peer", 2.0)])
    assert "of one round, which shows no spread" in said and said.count(" 1,234\n") == 2 and "  spread  " not in said
    said = render([row("ours", 1.0, 1.1), row("peer", 2.0, 4.0)])
    assert [line.split()[3] for line in said.splitlines()[2:4]] == ["10%", "67%"]
    assert said.count("minus that of the fastest, as a\nshare of the median.") == 1
    (warning,) = headline([row("ours", 1.0, 1.5), row("peer", 2.0, 4.0), row("baseline", 1.0, 1.1)])
    assert "times of scikit-learn differ by 67% of their median, those of lightning_dlrm by 40%. Another" in warning
    # Steady times can have an uncertain ratio.
    steady = row("ours", 1.0, 1.2)
    steady = replace(steady, extra=speed_ratio("speed_over_peer", (1.0, 1.2), (1.2, 1.0)))
    result, warning = headline([steady])
    assert "takes 1.10 s for 10 samples, 0.833 to 1.20 times as fast as" in result
    assert warning.startswith(
        "warning: a ratio differs by more than 25% between the rounds. Another run may give other"
    )
    assert ", so it is not known which is faster. Stop" in warning
    faster = replace(steady, extra=speed_ratio("speed_over_peer", (1.0, 1.2), (3.2, 1.3)))
    assert headline([faster])[1].startswith(
        "warning: a ratio differs by more than 25% between the rounds. Another run may give other ratios. Stop"
    )
    # Lines that are longer than a terminal would break, whether ratios are sure or not.
    sure = replace(steady, extra=speed_ratio("speed_over_peer", (1.0, 1.2), (2.0, 2.5)))
    said = render([steady, sure])
    assert "the ratios of the rounds, not" in said and "An uncertain ratio" in said
    assert max(map(len, said.splitlines())) < 80
    assert "takes 1.00 s to 1.50 s for 10 samples" in headline([replace(row("ours", 1.0, 1.5), extra=steady.extra)])[0]


def test_rows_and_updates_are_bound_in_float32() -> None:
    """In bfloat16, only the matrix products are; a processor without its instructions multiplies slowly in it."""
    rates = roofline.MachineRates({"32-true": 100e9, "bf16-mixed": 1e9}, 10e9)
    cost = roofline.Cost(5e9, 1e9)
    bounds = {part: rates.bound_of(part, cost, "bf16-mixed") for part in roofline.PARTS}
    assert {part for part, bound in bounds.items() if bound == "memory"} == {"tables", "update"}
    assert rates.floor_of("update", cost, "bf16-mixed") == 0.1 and rates.floor_of("top MLP", cost, "bf16-mixed") == 5.0
    parts = {"update": (cost, 1.0), "top MLP": (cost, 6.0)}
    (update,) = (
        line
        for line in paper.render_roofline("bf16-mixed", parts, rates, 7.0).splitlines()
        if line.startswith("update ")
    )
    assert "memory" in update and update.endswith(" 10%")
    doubt = "The profiler changes the time of a step much"
    assert doubt in paper.render_roofline("bf16-mixed", parts, rates, 1.0)
    assert doubt not in paper.render_roofline("bf16-mixed", parts, rates, 7.0)
    # Longer lines would break on a terminal.
    assert max(map(len, paper.render_roofline("bf16-mixed", parts, rates, 1.0).splitlines())) < 80


def test_a_slow_profiler_is_named() -> None:
    columns = {name: dict.fromkeys(paper.OPERATORS, 1.0) for name in ("ours", "baseline")}
    steps = len(paper.OPERATORS)
    assert "warning" not in paper.render_operators("32-true", columns, {"ours": steps, "baseline": steps})
    said = paper.render_operators("32-true", columns, {"ours": steps / 5, "baseline": steps})
    told = " ".join(said.split())
    assert "under the profiler, a step of ours takes 5 times the time" in told and "of baseline takes" not in told
    # The contender whose times are uncertain has no shares.
    assert said.count("1.00 s  14%") == len(paper.OPERATORS) and said.count("100%") == 1
    said = paper.render_operators("32-true", columns, {"ours": 2.1 * steps, "baseline": 3 * steps})
    told = " ".join(said.split())
    assert "a step of ours takes 0.48 times the time" in told and "of baseline takes 0.33 times" in told
    # If the rounds differ, no contender has shares.
    doubtful = paper.render_operators(
        "32-true", columns, {"ours": steps, "baseline": steps}, ["The rounds differ much."]
    )
    assert "%" not in doubtful and "\nThe rounds differ much.\n" in doubtful
    columns["ours"] = dict.fromkeys(paper.OPERATORS, 0.9)
    said = paper.render_operators("32-true", columns, {"ours": steps, "baseline": 0.9 * steps})
    assert "warning: ours is faster under the profiler, baseline without it." in said
    doubtful = paper.render_operators("32-true", columns, {"ours": steps, "baseline": 0.9 * steps}, ["Uncertain."])
    assert "is faster" not in doubtful


@pytest.mark.parametrize(
    ("ours", "peer", "said"),
    [
        ((1.0,), (3.0,), "3.00 times as fast as scikit-learn (uncertain: one round)"),
        ((4.06,), (1.0,), "0.246 times as fast as scikit-learn (uncertain: one round)"),
        ((1.0, 1.0, 1.0), (3.0, 3.1, 3.2), "3.10 times as fast as scikit-learn (rounds: 3.00 to 3.20)"),
        ((4.0, 4.2, 4.4), (1.0, 1.0, 1.0), "0.238 times as fast as scikit-learn (rounds: 0.227 to 0.250)"),
        ((1.0, 1.0, 1.0), (0.9, 0.98, 1.1), "0.980 times as fast as scikit-learn (rounds: 0.900 to 1.10)"),
        ((1.0, 1.0, 1.0), (2.0, 80.0, 90.0), "2.00 to 90.0 times as fast as scikit-learn (uncertain, median 80.0)"),
        ((1.5, 2.0, 4.0), (1.0, 1.0, 1.0), "0.250 to 0.667 times as fast as scikit-learn (uncertain, median 0.500)"),
        ((1.0, 1.0, 1.0), (0.5, 0.9, 2.0), "0.500 to 2.00 times as fast as scikit-learn (uncertain, median 0.900)"),
    ],
)
def test_a_ratio_says_how_sure_it_is(ours: tuple[float, ...], peer: tuple[float, ...], said: str) -> None:
    """A ratio that the rounds contradict is given as their range."""
    extra = speed_ratio("speed_over_peer", ours, peer)
    row = Measurement.of_rounds(
        ours, work="auc", case="some", implementation="ours", device="cpu", precision="", batch_size=1, samples=10,
        extra=extra,
    )  # fmt: skip
    assert f"    {said}\n" in render([row])
    assert headline([row])[0].endswith(f" samples, {said}")
    # Beside plain PyTorch, also with the longest numbers, a line of the table fits 80 columns.
    wide = replace(
        row, work="paper", extra=speed_ratio("speed_over_baseline", (1.0, 1.0, 1.0), (0.6777, 0.8777, 1.0877))
    )
    assert max(map(len, render([wide]).splitlines())) <= 80


def test_a_fit_that_is_faster_than_its_own_loop_is_uncertain() -> None:
    def said(share: float) -> str:
        row = Measurement(
            work="fit", case="fit", implementation="ours", device="cpu", precision="", batch_size=1, samples=10,
            median_s=1.0, spread_s=0.1, extra=speed_ratio("of_bare_loop", (1.0, 1.0), (share, share + 0.01)),
        )  # fmt: skip
        return headline([row])[-1]

    assert "warning: a fit has up to 164% of the speed of the bare loop, which is a part of it." in said(1.63)
    assert "warning" not in said(1.03)


def test_equal_aucs_are_equal_up_to_a_precision() -> None:
    def said(difference: float) -> str:
        row = Measurement(
            work="auc", case="some", implementation="ours", device="cpu", precision="", batch_size=1, samples=10,
            median_s=1.0, spread_s=0.1, extra={"difference": difference, "bytes_beside_samples": 0.0},
        )  # fmt: skip
        return render([row])

    assert "its AUC differs by less than 1e-15 from that of scikit-learn" in said(0.0)
    assert "its AUC differs by 2.2e-10 from that" in said(2.2e-10)
    assert "computing the AUC adds 0 bytes to the peak memory" in said(0.0)
