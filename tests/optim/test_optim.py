"""Contract: updating touched rows equals torch's own optimiser on a dense gradient, and every
other row stays to the last bit."""

import copy
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_dlrm.cli.params import count
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.lookup import RowGradient, Table
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.strategy import table_loads
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule
from lightning_dlrm.optim.schedules import Constant, Cosine, WarmupQuadraticDecay, WarmupThenDecay
from lightning_dlrm.tables.tables import EmbeddingTables
from tests.toy import TABLES, optimizer_of, toy_batch, toy_dlrm, toy_module, toy_schema, wide_dlrm


def make(dense_rule: UpdateRule, table_rule: UpdateRule):
    network = toy_dlrm(toy_schema().features, 3).double()
    return network, optimizer_of(network, dense_rule, table_rule)


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
    found = CTROptimizer([weight], [], SGD(1.0), SGD(1.0)).gradient_norm()
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


def test_row_wise_adagrad_of_dense_layers() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    rule = RowWiseAdagrad(0.1)
    for parameter in (weight, bias):
        state, gradient, before = rule.state(parameter), torch.randn_like(parameter), parameter.clone()
        rule.apply([parameter], [gradient], [state], torch.tensor(0.1), torch.tensor(1.0))
        square = gradient.square().mean(1) if parameter.dim() == 2 else gradient.square()
        torch.testing.assert_close(state["sum"], square)
        scale = square.sqrt().view(-1, *[1] * (parameter.dim() - 1))
        torch.testing.assert_close(parameter, before - 0.1 * gradient / scale)


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
    with pytest.raises(UserError, match="choose the same rules"):
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
    assert not torch.equal(as_wide["wide.tables.weight"], as_tables["wide.lookup.weight"])
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
    with pytest.raises(UserError, match=r"and wide: Adagrad .*; this run asks for dense: SGD .* and tables: Adam"):
        make_wide(adam())[1].load_state_dict(optimizer.state_dict())


def test_a_rule_for_linear_terms_that_cannot_have_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"wide_optimizer is given, but this DLRM has no linear terms"):
        toy_module(wide_rule=Adagrad(0.1))
    with pytest.raises(UserError, match="kernels fbgemm gives all tables one rule: leave wide_optimizer out"):
        CTRModule(wide_dlrm, SGD(0.1), SGD(0.1), wide_optimizer=Adagrad(0.1), kernels="fbgemm", schema=toy_schema())


def test_memory_and_advice_count_linear_terms_with_their_own_rule() -> None:
    module = toy_module(wide_dlrm, SGD(0.1), SGD(0.2), wide_rule=Adam(0.01))
    loads = {load.name: load.bytes_per_row for load in table_loads(wide_dlrm(toy_schema().features, 3), module)}
    assert loads == dict.fromkeys(TABLES, 4 * 4) | {f"{name}/linear": 4 * 3 for name in TABLES}
    assert count(module)["bytes_optimizer_tables"] == 4 * 2 * sum(TABLES.values())
    assert "(dense 0.2, tables 0.1, wide 0.01)" in module.guard.advice


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_learning_rates_that_cannot_train_are_refused(rate: float) -> None:
    with pytest.raises(UserError, match="learning_rate"):
        make(SGD(rate), SGD(0.1))


def test_schedule_as_published() -> None:
    schedule = WarmupQuadraticDecay(warmup_steps=4, decay_start_step=6, decay_steps=2)
    rates = [schedule.learning_rate(step, 8.0) for step in range(1, 10)]
    assert rates == [2.0, 4.0, 6.0, 6.0, 6.0, 8.0, 2.0, 2.0, 2.0]
    assert WarmupQuadraticDecay(2).learning_rate(50, 8.0) == 8.0
    assert Constant().learning_rate(1, 8.0) == 8.0


def test_warm_up_then_decay_fits_any_length() -> None:
    schedule = WarmupThenDecay(warmup_steps=2, decay_share=0.5)
    assert [schedule.learning_rate(step, 16.0, 8) for step in range(1, 10)] == [8, 16, 16, 16, 16, 9, 4, 1, 0]
    assert WarmupThenDecay(0, 0.0).learning_rate(8, 16.0, 8) == 16.0
    for settings in ((-1, 0.5), (0, 1.5), (0, -0.1)):
        with pytest.raises(UserError, match="WarmupThenDecay"):
            WarmupThenDecay(*settings)


def test_a_decay_before_the_warm_up_ends_is_refused() -> None:
    with pytest.raises(UserError, match="before the warm-up of 4 steps ends"):
        WarmupQuadraticDecay(warmup_steps=4, decay_start_step=3, decay_steps=2)
    with pytest.raises(UserError, match="numbers of 0 or more"):
        WarmupQuadraticDecay(warmup_steps=-1)


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
    optimizer, plain = CTROptimizer([dense], [tables], rule, rule), reference(twins)
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
def test_state_of_half_precision_weights_is_float32_also_when_loaded(rule: UpdateRule) -> None:
    def pair() -> tuple[CTROptimizer, torch.nn.Parameter, EmbeddingTables]:
        dense = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
        tables = EmbeddingTables([Table.of_column("A", 6)], 3, seed=1).bfloat16()
        return CTROptimizer([dense], [tables], rule, rule), dense, tables

    def steps(optimizer: CTROptimizer, dense: torch.nn.Parameter, tables: EmbeddingTables) -> None:
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            optimizer.zero_grad()
            dense.grad = torch.randn(4, 3, generator=generator).bfloat16()
            tables.add_gradient(RowGradient(torch.tensor([1, 5]), torch.randn(2, 3, generator=generator)))
            optimizer.step()

    optimizer, dense, tables = pair()
    steps(optimizer, dense, tables)
    other, other_dense, _ = pair()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for slot, values in optimizer.state[dense].items():
        assert values.dtype == other.state[other_dense][slot].dtype == torch.float32
        assert torch.equal(values, other.state[other_dense][slot])
    assert all(values.dtype == torch.float32 for values in optimizer.table_state[0].values())
    assert dense.dtype == tables.weight.dtype == torch.bfloat16
    assert [group["steps"].item() for group in other.param_groups] == [3, 3]


def test_frozen_rows_have_no_state() -> None:
    frozen = EmbeddingTables([Table.of_column("A", 6)], 1, trainable=False)
    optimizer = CTROptimizer([], [frozen, EmbeddingTables([Table.of_column("B", 6)], 3)], SGD(1.0), Adagrad(0.1))
    assert len(optimizer.table_state) == len(optimizer.lookups) == 1


def test_cosine_fits_any_length() -> None:
    schedule = Cosine(warmup_steps=2, final_share=0.1)
    rates = [schedule.learning_rate(step, 10.0, 10) for step in range(1, 11)]
    assert rates[:3] == [5.0, 10.0, 10.0]
    assert rates[6] == pytest.approx(1 + 9 * 0.5)
    assert rates[9] == pytest.approx(1 + 9 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert schedule.learning_rate(11, 10.0, 10) == pytest.approx(1.0)
    for settings in ((-1, 0.5), (0, 1.5)):
        with pytest.raises(UserError, match="Cosine"):
            Cosine(*settings)


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
    assert told == ["before any", "before", "step", "after"]
    for handle in handles:
        handle.remove()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any("Optimizer.step#CTROptimizer" in event.name for event in profile.events())
    assert len(told) == 4
