"""Contract: touched rows move as under torch's own optimizer of a dense gradient, every other row stays to the last
bit, and dense layers are updated by the class of torch.optim that was asked for."""

import copy
import math
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_dlrm.cli.params import count
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.gradient import RowGradient
from lightning_dlrm.engine.memory import table_loads
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.compatibility import torch_configuration
from lightning_dlrm.optim.dense import DenseOptimizer
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule
from lightning_dlrm.optim.schedules import (
    Constant,
    Cosine,
    Schedule,
    WarmupQuadraticDecay,
    WarmupThenDecay,
    make_schedule,
)
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import Table
from tests.toy import TABLES, as_dense, optimizer_of, toy_batch, toy_dlrm, toy_module, toy_schema, wide_dlrm


def make(dense: DenseOptimizer | UpdateRule, table_rule: UpdateRule):
    network = toy_dlrm(toy_schema().features, 3).double()
    return network, optimizer_of(network, dense, table_rule)


def rates(schedule: Schedule, steps: int, base: float = 1.0, total_steps: int = 0) -> list[float]:
    """The learning rates of the first steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    made = make_schedule(schedule, optimizer, lambda: total_steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return found


def backward(network, seed: int) -> None:
    batch = toy_batch(20, seed)
    logits = network(batch.dense.double(), batch.ids)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.label.double()).backward()


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (SGD(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (Adagrad(0.05), lambda p: torch.optim.Adagrad(p, lr=0.05)),
        (
            Adagrad(0.05, epsilon=1e-3, initial_accumulator=0.5),
            lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1e-3, initial_accumulator_value=0.5),
        ),
    ],
)
def test_dense_and_tables_move_as_under_torch_optim(rule: UpdateRule, reference) -> None:
    network, optimizer = make(rule, rule)
    twin = copy.deepcopy(network)
    plain = reference(list(twin.parameters()))
    before = network.lookups()[0].weight.detach().clone()
    touched = set()
    for step in range(10):
        optimizer.zero_grad()
        backward(network, step)
        optimizer.step()
        plain.zero_grad()
        backward(twin, step)
        gradient = twin.lookups()[0].gradient()
        twin.lookups()[0].weight.grad = torch.zeros_like(twin.lookups()[0].weight).index_copy(
            0, gradient.rows, gradient.values
        )
        touched |= set(gradient.rows.tolist())
        twin.lookups()[0].clear_gradient()
        plain.step()
    for (name, ours), theirs in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}", rtol=1e-12, atol=1e-12)
    untouched = sorted(set(range(len(before))) - touched)
    assert untouched
    assert torch.equal(network.lookups()[0].weight[untouched], before[untouched])


def test_norm_of_half_precision_gradients_has_the_digits_of_float32() -> None:
    weight = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 1.0078125)
    found = CTROptimizer([weight], [], torch.optim.SGD, SGD(1.0)).gradient_norm()
    assert found.item() == pytest.approx(1000**0.5 * 1.0078125, rel=1e-6)


def test_row_wise_adagrad_by_loops() -> None:
    rule = RowWiseAdagrad(0.1, epsilon=1e-4)
    tables = EmbeddingTables([Table.of_column("A", 6)], 3, seed=1).double()
    optimizer = CTROptimizer([], [tables], SGD(1.0), rule)
    weight = tables.weight.detach().clone().tolist()
    sums = [0.0] * 6
    for _ in range(4):
        gradient = RowGradient(torch.tensor([1, 2, 5]), torch.randn(3, 3, dtype=torch.float64))
        tables.clear_gradient()
        tables.add_gradient(gradient)
        optimizer.step()
        for row, values in zip(gradient.rows.tolist(), gradient.values.tolist(), strict=True):
            sums[row] += sum(v * v for v in values) / 3
            for d, v in enumerate(values):
                weight[row][d] -= 0.1 * v / (math.sqrt(sums[row]) + 1e-4)
        torch.testing.assert_close(tables.weight.detach(), torch.tensor(weight, dtype=torch.float64))
    assert optimizer.table_state[0]["sum"].shape == (6,)


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipping_counts_table_rows(kind: str) -> None:
    network, optimizer = make(SGD(0.1), SGD(0.1))
    backward(network, 0)
    backward(network, 1)  # a second micro-batch
    gradient = network.lookups()[0].gradient()
    everything = [p.grad.clone() for p in network.dense_parameters()] + [gradient.values.clone()]
    norm = torch.cat([g.flatten() for g in everything]).norm()
    torch.testing.assert_close(optimizer.gradient_norm(), norm)
    if kind == "norm":
        optimizer.clip_gradient_norm(norm.item() / 4)
        expected = [g / 4 for g in everything]
    else:
        optimizer.clip_gradient_values(1e-3)
        expected = [g.clamp(-1e-3, 1e-3) for g in everything]
    clipped = [p.grad for p in network.dense_parameters()] + [network.lookups()[0].gradient().values]
    for ours, theirs in zip(clipped, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


def test_a_small_norm_is_left_alone() -> None:
    network, optimizer = make(SGD(0.1), SGD(0.1))
    backward(network, 0)
    before = network.lookups()[0].gradient().values.clone()
    optimizer.clip_gradient_norm(1e6)
    assert torch.equal(network.lookups()[0].gradient().values, before)


def test_state_of_other_rules_is_refused() -> None:
    state = make(SGD(0.1), Adagrad(0.1))[1].state_dict()
    with pytest.raises(UserError, match="choose the same classes"):
        make(SGD(0.1), RowWiseAdagrad(0.1))[1].load_state_dict(state)


def test_linear_terms_take_a_rule_of_their_own() -> None:
    """One step moves them as it moves them where all tables have that rule, and everything else as without it; a loaded
    state goes on as the one that was saved."""

    def make_wide(table_rule: UpdateRule, wide_rule: UpdateRule | None = None):
        module = toy_module(wide_dlrm, table_rule, SGD(0.1), wide_rule=wide_rule)
        network = wide_dlrm(toy_schema().features, 3).double()
        return network, module.make_optimizer(network)

    def step(network: CTRNetwork, optimizer: CTROptimizer, seed: int) -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        backward(network, seed)
        optimizer.step()
        return {name: value.clone() for name, value in network.state_dict().items()}

    adam, adagrad = (lambda: Adam(0.01)), (lambda: Adagrad(0.2))
    network, optimizer = make_wide(adam(), adagrad())
    ours, as_tables, as_wide = (
        step(*made, 0) for made in ((network, optimizer), make_wide(adam()), make_wide(adagrad()))
    )
    for name, value in ours.items():
        assert torch.equal(value, (as_wide if name == "wide.tables.weight" else as_tables)[name]), name
    assert not torch.equal(as_wide["wide.tables.weight"], as_tables["wide.tables.weight"])
    assert [(group["name"], float(group["lr"])) for group in optimizer.param_groups] == [
        ("dense", 0.1), ("tables", 0.01), ("wide", 0.2)
    ]  # fmt: skip

    again, resumed = make_wide(adam(), adagrad())
    again.load_state_dict(network.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for state, saved in zip(resumed.table_state, optimizer.table_state, strict=True):
        for slot, values in state.items():
            values.copy_(saved[slot])
    went_on = step(network, optimizer, 1)
    for name, value in step(again, resumed, 1).items():
        assert torch.equal(value, went_on[name]), name
    with pytest.raises(UserError, match=r"trained with wide: Adagrad; this run asks for no such optimizer"):
        make_wide(adam())[1].load_state_dict(optimizer.state_dict())


def test_a_rule_for_linear_terms_that_cannot_have_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"wide_optimizer is given, but the network DLRM has no linear terms"):
        toy_module(wide_rule=Adagrad(0.1))


def test_memory_and_advice_count_linear_terms_with_their_own_rule() -> None:
    module = toy_module(wide_dlrm, SGD(0.1), SGD(0.2), wide_rule=Adam(0.01))
    loads = {load.name: load.bytes_per_row for load in table_loads(wide_dlrm(toy_schema().features, 3), module)}
    assert loads == dict.fromkeys(TABLES, 4 * 4) | {f"{name}/linear": 4 * 3 for name in TABLES}
    assert count(module)["bytes_optimizer_tables"] == 4 * 2 * sum(TABLES.values())
    assert "(dense 0.2, tables 0.1, wide 0.01)" in module.guard.advice


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_learning_rates_that_cannot_train_are_refused(rate: float) -> None:
    with pytest.raises(UserError, match="learning_rate"):
        SGD(rate)


def test_a_decay_before_the_warm_up_ends_is_refused() -> None:
    with pytest.raises(UserError, match="before the warm-up of 4 steps ends"):
        rates(partial(WarmupQuadraticDecay, warmup_steps=4, decay_start_step=3, decay_steps=2), 1)
    with pytest.raises(UserError, match="numbers of 0 or more"):
        rates(partial(WarmupQuadraticDecay, warmup_steps=-1), 1)


def test_formulas_of_schedules() -> None:
    published = partial(WarmupQuadraticDecay, warmup_steps=4, decay_start_step=6, decay_steps=2)
    assert rates(published, 9, 8.0, 9) == [2.0, 4.0, 6.0, 6.0, 6.0, 8.0, 2.0, 2.0, 2.0]
    assert rates(partial(WarmupQuadraticDecay, warmup_steps=2), 50, 8.0, 50)[-1] == 8.0
    assert rates(Constant, 3, 8.0) == [8.0] * 3
    assert rates(partial(WarmupThenDecay, warmup_steps=2), 9, 16.0, 8) == [8, 16, 16, 16, 16, 9, 4, 1, 0]
    assert rates(partial(WarmupThenDecay, decay_share=0.0), 8, 16.0, 8)[-1] == 16.0
    assert rates(partial(WarmupThenDecay, warmup_share=0.25), 9, 16.0, 8) == [8, 16, 16, 16, 16, 9, 4, 1, 0]
    assert rates(partial(WarmupThenDecay, warmup_steps=4, warmup_share=0.1), 4, 16.0, 8) == [4, 8, 12, 16]
    found = rates(partial(Cosine, warmup_steps=2, final_share=0.1), 11, 10.0, 10)
    assert found[:3] == [5.0, 10.0, 10.0]
    expected = [1 + 9 * 0.5, 1 + 9 * 0.5 * (1 + math.cos(math.pi * 7 / 8)), 1.0]
    assert [found[6], found[9], found[10]] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (partial(WarmupThenDecay, warmup_steps=-1), "WarmupThenDecay: warmup_steps is -1"),
        (partial(WarmupThenDecay, decay_share=1.5), "decay_share is 1.5"),
        (partial(WarmupThenDecay, warmup_share=0.6), "WarmupThenDecay: warmup_share is 0.6"),
        (partial(Cosine, final_share=1.5), "Cosine: final_share is 1.5"),
        (partial(lr_scheduler.StepLR, step_size=1, gama=2), "schedule StepLR: .*gama"),
        (lr_scheduler.ReduceLROnPlateau, "schedule ReduceLROnPlateau follows a metric"),
        (lambda optimizer: optimizer, "schedule makes a CTROptimizer"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused_before_the_data_are_prepared(schedule, message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy_module(schedule=schedule)
    with pytest.raises(UserError, match="give total_steps"):
        Cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0))


@pytest.mark.parametrize("schedule", [WarmupThenDecay, Cosine, partial(WarmupQuadraticDecay, decay_start_step=30)])
def test_a_warm_up_above_half_of_the_fit_is_refused(schedule: Schedule) -> None:
    rates(partial(schedule, warmup_steps=28), 1, total_steps=57)
    message = r"warmup_steps is 29, more than half of the fit's 57 steps; give at most 28, or take a schedule with w"
    with pytest.raises(UserError, match=message):
        rates(partial(schedule, warmup_steps=29), 1, total_steps=57)


def test_schedules_of_torch_change_all_groups() -> None:
    """Also those with a parameter total_steps, which is filled in; the same classes run on a bare torch.optim.SGD."""
    bare = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    for schedule in (
        partial(lr_scheduler.OneCycleLR, max_lr=0.1, cycle_momentum=False),
        partial(lr_scheduler.StepLR, step_size=2),
        partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (step + 1)),
    ):
        _, optimizer = make(partial(torch.optim.SGD, lr=0.1), SGD(0.1))
        ours = make_schedule(schedule, optimizer, lambda: 6)
        bare.param_groups[0].pop("initial_lr", None)
        bare.param_groups[0]["lr"] = 0.1
        theirs = schedule(bare, **({"total_steps": 6} if schedule.func is lr_scheduler.OneCycleLR else {}))
        for _ in range(6):
            assert [group["lr"] for group in optimizer.param_groups] == [bare.param_groups[0]["lr"]] * 2
            for part in (optimizer, ours, bare, theirs):
                part.step()


def test_schedules_go_on_after_a_saved_step(caplog: pytest.LogCaptureFixture) -> None:
    """With the settings and the length of the run that goes on; LambdaLR of the first release has more in its state."""
    _, optimizer = make(partial(torch.optim.SGD, lr=0.1), SGD(0.2))
    schedule = WarmupThenDecay(optimizer, decay_share=1.0, total_steps=10)
    with caplog.at_level("INFO"):
        schedule.load_state_dict({"last_epoch": 5, "_step_count": 6, "base_lrs": [3.0], "total_steps": 7})
        schedule.load_state_dict(schedule.state_dict())
    (said,) = caplog.messages
    assert said == (
        "the fit now has 10 steps, and 7 before: schedule WarmupThenDecay gave the steps so far the learning rates of "
        "a fit of 7 steps"
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * 0.5**2, 0.2 * 0.5**2] == schedule.get_last_lr()
    assert schedule.state_dict() == {"last_epoch": 5, "total_steps": 10}


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (Adam(0.05), lambda p: torch.optim.Adam(p, lr=0.05)),
        (
            Adam(0.05, beta1=0.5, beta2=0.9, epsilon=1e-3, l2=0.1),
            lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
        ),
        (Adam(0.05, weight_decay=0.2), lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.2)),
        (SGD(0.1, l2=0.3), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3)),
        (Adagrad(0.1, l2=0.3), lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.3)),
    ],
)
def test_where_every_row_is_touched_rules_are_those_of_torch(rule: UpdateRule, reference) -> None:
    """Dense layers, and tables whose every row is in every step, move as under torch.optim."""
    dense = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    tables = EmbeddingTables([Table.of_column("A", 6)], 3, seed=1).double()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (dense, tables.weight)]
    optimizer, plain = CTROptimizer([dense], [tables], as_dense(rule), rule), reference(twins)
    for _ in range(5):
        gradients = [torch.randn_like(p) for p in twins]
        optimizer.zero_grad()
        dense.grad = gradients[0].clone()
        tables.add_gradient(RowGradient(torch.arange(6), gradients[1].clone()))
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient
        optimizer.step()
        plain.step()
    for ours, theirs in zip((dense, tables.weight), twins, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_lazy_adam_is_that_of_torch_and_leaves_other_rows() -> None:
    """Also the bias correction: by the model's steps, not by a row's."""
    tables = EmbeddingTables([Table.of_column("A", 6)], 3, seed=1).double()
    twin = torch.nn.Parameter(tables.weight.detach().clone())
    optimizer = CTROptimizer([], [tables], SGD(1.0), Adam(0.05, epsilon=1e-30))
    plain = torch.optim.SparseAdam([twin], lr=0.05, eps=1e-30)
    before = tables.weight.detach().clone()
    for rows in ([1, 4], [4], [4, 5], [1]):
        values = torch.randn(len(rows), 3, dtype=torch.float64)
        optimizer.zero_grad()
        tables.add_gradient(RowGradient(torch.tensor(rows), values))
        twin.grad = torch.sparse_coo_tensor(torch.tensor([rows]), values, twin.shape)
        optimizer.step()
        plain.step()
    torch.testing.assert_close(tables.weight, twin, rtol=1e-10, atol=1e-12)
    assert torch.equal(tables.weight[[0, 2, 3]], before[[0, 2, 3]])


@pytest.mark.parametrize("rule", [SGD(0.1, l2=0.5), SGD(0.1, weight_decay=0.5), Adam(0.1, weight_decay=0.5)])
def test_l2_and_decay_touch_the_touched_rows_alone(rule: UpdateRule) -> None:
    tables = EmbeddingTables([Table.of_column("A", 6)], 3, seed=1).double()
    optimizer = CTROptimizer([], [tables], SGD(1.0), rule)
    before = tables.weight.detach().clone()
    tables.add_gradient(RowGradient(torch.tensor([2, 3]), torch.zeros(2, 3, dtype=torch.float64)))
    optimizer.step()
    torch.testing.assert_close(tables.weight[[2, 3]], before[[2, 3]] * 0.95)
    assert torch.equal(tables.weight[[0, 1, 4, 5]], before[[0, 1, 4, 5]])


@pytest.mark.parametrize("rule", [Adagrad(0.05), RowWiseAdagrad(0.05), Adam(0.05)])
def test_state_of_bf16_tables_is_float32(rule: UpdateRule) -> None:
    """Dense layers' state has their own precision, as torch.optim keeps it."""
    dense = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    tables = EmbeddingTables([Table.of_column("A", 6)], 3, seed=1).bfloat16()
    optimizer = CTROptimizer([dense], [tables], torch.optim.Adam, rule)
    dense.grad = torch.randn(4, 3).bfloat16()
    tables.add_gradient(RowGradient(torch.tensor([1, 5]), torch.randn(2, 3)))
    optimizer.step()
    assert all(values.dtype == torch.float32 for values in optimizer.table_state[0].values())
    assert dense.dtype == tables.weight.dtype == optimizer.state[dense]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "dense",
    [
        partial(torch.optim.Adagrad, lr=0.05, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.05, amsgrad=True),
        partial(torch.optim.RMSprop, lr=0.05, momentum=0.5),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
        lambda parameters: torch.optim.Adamax([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:]}]),
    ],
)
def test_any_class_of_torch_optim_updates_dense_layers(dense: DenseOptimizer) -> None:
    """As without the facade, also after its state is saved and loaded; what is set in a group takes effect."""
    network, optimizer = make(dense, SGD(0.1))
    assert isinstance(optimizer.dense, torch.optim.Optimizer)
    twin, resumed = (copy.deepcopy(network) for _ in range(2))
    plain = dense(twin.dense_parameters())
    for step in range(6):
        if step == 3:
            again = optimizer_of(resumed, dense, SGD(0.1))
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            resumed.load_state_dict(network.state_dict())
            network, optimizer = resumed, again
        for group in (optimizer.param_groups[0], plain.param_groups[0]):
            group["lr"] = 0.01 * (step + 1)
        for model, optimizers in ((network, [optimizer]), (twin, [plain])):
            for part in optimizers:
                part.zero_grad()
            backward(model, step)
            for part in optimizers:
                part.step()
        # Only dense layers are compared.
        twin.lookups()[0].clear_gradient()
        with torch.no_grad():
            twin.lookups()[0].weight.copy_(network.lookups()[0].weight)
    for ours, theirs in zip(network.dense_parameters(), twin.dense_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert [group["name"] for group in optimizer.param_groups] == (
        ["dense", "dense_2", "tables"] if len(plain.param_groups) == 2 else ["dense", "tables"]
    )


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (torch.optim.LBFGS, "dense_optimizer LBFGS computes the loss several times"),
        (torch.optim.SparseAdam, "dense_optimizer SparseAdam takes sparse gradients only"),
        (partial(torch.optim.SGD, lr=-1.0), "dense_optimizer.lr is -1.0; SGD takes 0 or more"),
        (partial(torch.optim.SGD, lr=math.inf), "lr is inf"),
        (lambda parameters: 3, "dense_optimizer makes a int"),
    ],
)
def test_dense_optimizers_that_cannot_train_are_refused_before_the_data_are_prepared(dense, message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy_module(dense=dense)


def test_fused_is_the_default_on_a_cpu_alone_and_no_reason_to_refuse_a_state() -> None:
    network, optimizer = make(partial(torch.optim.Adagrad, lr=0.1), SGD(0.1))
    assert optimizer.param_groups[0]["fused"]
    other = optimizer_of(network, partial(torch.optim.Adagrad, lr=0.1, foreach=True), SGD(0.1))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not other.param_groups[0]["fused"] and other.param_groups[0]["foreach"]


@pytest.mark.parametrize(
    ("rule", "settings", "slots", "dense"),
    [
        ("SGD", {"l2": 0.1}, {}, partial(torch.optim.SGD, lr=0.1, weight_decay=0.1)),
        ("Adagrad", {"epsilon": 1e-4}, {"sum": "sum"}, partial(torch.optim.Adagrad, lr=0.1, eps=1e-4)),
        (
            "Adam",
            {"beta1": 0.5, "beta2": 0.9, "weight_decay": 0.2},
            {"mean": "exp_avg", "square": "exp_avg_sq"},
            partial(torch.optim.AdamW, lr=0.1, betas=(0.5, 0.9), weight_decay=0.2),
        ),
    ],
)
def test_states_of_rules_for_dense_layers_open(rule: str, settings: dict, slots: dict, dense: DenseOptimizer) -> None:
    network, optimizer = make(dense, SGD(0.1))
    backward(network, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    tables = {name: saved["rules"][name] for name in ("tables",)}
    state = {
        index: {old: values[new] for old, new in slots.items()} for index, values in saved["dense"]["state"].items()
    }
    params = saved["dense"]["param_groups"][0]["params"]
    old = {
        "state": state,
        "param_groups": [
            {"name": name, "params": params, "lr": torch.tensor(0.03), "steps": torch.tensor(1.0)}
            for name in ("dense", "tables")
        ],
        "rules": {"dense": {"rule": rule, "learning_rate": 0.1, "l2": 0.0, "weight_decay": 0.0} | settings, **tables},
    }
    again = optimizer_of(network, dense, SGD(0.1))
    again.load_state_dict(old)
    for parameter, values in optimizer.state.items():
        for name in ("step", *slots.values()) if slots else ():
            assert torch.equal(again.state[parameter][name], values[name])
    assert [group["lr"] for group in again.param_groups] == pytest.approx([0.03, 0.03])
    words = f"trained with dense: {type(optimizer.dense).__name__}.*; this run asks for dense: Adagrad"
    with pytest.raises(UserError, match=words):
        optimizer_of(network, partial(torch.optim.Adagrad, lr=0.2), SGD(0.1)).load_state_dict(old)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"class_path": "lightning_dlrm.optim.rules.Adagrad", "init_args": {"learning_rate": 0.2, "l2": 0.1}},
            {"class_path": "torch.optim.Adagrad", "init_args": {"lr": 0.2, "weight_decay": 0.1}},
        ),
        (
            {"class_path": "Adam", "init_args": {"beta1": 0.8, "weight_decay": 0.1}},
            {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.8, 0.999], "weight_decay": 0.1}},
        ),
        (
            "lightning_dlrm.optim.rules.SGD",
            {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "weight_decay": 0.0}},
        ),
        ({"init_args": {"learning_rate": 0.3, "epsilon": 1e-5}}, {"init_args": {"lr": 0.3, "eps": 1e-5}}),
        ({"class_path": "Adagrad", "init_args": {"lr": 0.3}}, None),
        ({"class_path": "torch.optim.SGD"}, None),
        ("SGD", None),
        (None, None),
    ],
)
def test_configurations_with_rules_for_dense_layers_are_those_of_torch(old, new) -> None:
    assert torch_configuration(old) == (old if new is None else new)
    assert torch_configuration(new) == new


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("RowWiseAdagrad", "dense_optimizer RowWiseAdagrad updates rows of tables"),
        ({"class_path": "Adagrad", "init_args": {"learning_rate": 1, "weight_decay": 0.1}}, "AdamW for weight_decay"),
        ({"init_args": {"beta1": 0.5}}, "dense_optimizer has beta1: .*betas"),
    ],
)
def test_rules_for_dense_layers_that_torch_does_not_have_are_refused(value, message: str) -> None:
    with pytest.raises(UserError, match=message):
        torch_configuration(value)


def test_groups_that_are_added_later() -> None:
    network, optimizer = make(lambda parameters: torch.optim.SGD(parameters, lr=0.1), SGD(0.1))
    late = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": late, "lr": 0.5})
    late.grad = torch.ones(2)
    optimizer.step()
    assert late.tolist() == [0.5, 0.5] and [g["name"] for g in optimizer.param_groups] == ["dense", "dense_2", "tables"]
    with pytest.raises(UserError, match="require gradients from the start"):
        optimizer.add_param_group({"params": [network.lookups()[0].weight]})


def test_frozen_rows_have_no_state() -> None:
    frozen = EmbeddingTables([Table.of_column("A", 6)], 1, trainable=False)
    optimizer = CTROptimizer([], [frozen, EmbeddingTables([Table.of_column("B", 6)], 3)], SGD(1.0), Adagrad(0.1))
    assert len(optimizer.table_state) == len(optimizer.lookups) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(0.1, l2=-1.0), "l2 is -1.0"),
        (lambda: Adagrad(0.1, weight_decay=math.inf), "weight_decay inf"),
        (lambda: Adam(0.1, beta1=1.0), "beta1 is 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_hooks_and_profilers_of_torch_see_each_step() -> None:
    _, optimizer = make(SGD(0.1), SGD(0.1))
    told: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: told.append("before")),
        optimizer.register_step_post_hook(lambda *_: told.append("after")),
        register_optimizer_step_pre_hook(lambda *_: told.append("before any")),
    ]
    optimizer.step(lambda: told.append("step"))
    assert told == ["before any", "before", "step", "before any", "after"]
    for handle in handles:
        handle.remove()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any("Optimizer.step#CTROptimizer" in event.name for event in profile.events())
    assert len(told) == 5
