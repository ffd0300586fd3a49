"""The fused kernels do what plain torch does: on ragged, empty, duplicate and out-of-order ids, for every rule.

On a CPU they run in Triton's interpreter, which ``conftest.py`` asks for; ``test_gpu.py`` runs them as they are.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "triton", "3.9", reason="needs Triton 3.9, whose interpreter runs with NumPy 2.4: the fused kernels are not tested"
)


from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.kernels.choice import choose
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule
from lightning_dlrm.tables.host import HostStorage
from lightning_dlrm.tables.lookup import DeviceStorage, EmbeddingTables
from lightning_dlrm.tables.table import Table

ROWS = (40, 3, 500)
"""A small table has rows whose indices fill many blocks."""

RULES = {
    "sgd": SGD(0.3),
    "sgd decayed": SGD(0.3, l2=0.01, weight_decay=0.02),
    "adagrad": Adagrad(0.1, initial_accumulator=0.1),
    "row-wise adagrad": RowWiseAdagrad(0.1, epsilon=1e-6),
    "adam": Adam(0.05, weight_decay=0.01),
}


def one_hot(size: int, generator: torch.Generator) -> SparseIds:
    columns = [torch.randint(rows, (size,), generator=generator, dtype=torch.int32) for rows in ROWS]
    return SparseIds(values=torch.stack(columns, dim=1), tables=len(ROWS))


def ragged(size: int, generator: torch.Generator, weighted: bool = False) -> SparseIds:
    """Bags of none to 9 ids, duplicates among them."""
    lengths = torch.randint(10, (size * len(ROWS),), generator=generator)
    lengths[::4] = 0
    table = torch.arange(len(lengths)).repeat_interleave(lengths) % len(ROWS)
    values = (torch.rand(len(table), generator=generator) * torch.tensor(ROWS)[table]).int()
    weights = torch.rand(len(table), generator=generator) if weighted else None
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return SparseIds(values=values, tables=len(ROWS), offsets=offsets, weights=weights)


def trained(
    kernels: str,
    batches: list[SparseIds],
    rule: UpdateRule,
    width: int,
    device: str = "cpu",
    tables: tuple[int, ...] = ROWS,
) -> tuple[list[Tensor], EmbeddingTables, dict[str, Tensor]]:
    """Vectors of each step, the tables at the end, and their optimizer state."""
    lookup = EmbeddingTables([Table.of_column(f"C{i}", rows) for i, rows in enumerate(tables)], width, seed=1)
    lookup.to(device)
    lookup.kernels = kernels
    optimizer = CTROptimizer([], [lookup], rule, rule)
    vectors = []
    for step, ids in enumerate(batches):
        optimizer.zero_grad()
        out = lookup(ids.map(lambda tensor: None if tensor is None else tensor.to(device)))
        vectors.append(out.detach())
        generator = torch.Generator().manual_seed(step)
        out.backward(torch.randn(out.shape, generator=generator).to(device))
        optimizer.step()
    return vectors, lookup, optimizer.table_state[0]


def assert_alike(
    batches: list[SparseIds], rule: UpdateRule, width: int, device: str = "cpu", tables: tuple[int, ...] = ROWS
) -> None:
    plain, fused = (trained(kernels, batches, rule, width, device, tables) for kernels in ("plain", "triton"))
    for ours, theirs in zip(fused[0], plain[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused[1].weight, plain[1].weight, rtol=1e-4, atol=1e-5)
    for slot, values in plain[2].items():
        torch.testing.assert_close(fused[2][slot], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_one_id_each(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    assert_alike([one_hot(size, generator) for size in (70, 1, 33)], RULES[rule], width=16)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weighted", [False, True])
def test_ragged_bags(rule: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    assert_alike([ragged(size, generator, weighted) for size in (40, 3)], RULES[rule], width=5)


def test_a_row_may_fill_more_blocks_than_are_summed_at_once() -> None:
    # 65 blocks of 64 sorted indices follow the first.
    ids = SparseIds(values=torch.zeros(64 * 67, 1, dtype=torch.int32), tables=1)
    assert_alike([ids], SGD(0.001), width=4, tables=ROWS[:1])


def test_empty_batches_and_empty_bags_leave_the_tables_alone() -> None:
    nothing = SparseIds(values=torch.zeros(0, dtype=torch.int32), tables=3, offsets=torch.zeros(7, dtype=torch.int64))
    vectors, lookup, _ = trained("triton", [nothing, one_hot(0, torch.Generator())], SGD(0.1), 4)
    assert vectors[0].shape == (2, 3, 4) and not vectors[0].any()
    untouched = EmbeddingTables([Table.of_column(f"C{i}", rows) for i, rows in enumerate(ROWS)], 4, seed=1)
    assert torch.equal(lookup.weight, untouched.weight)


def test_tables_on_the_host_use_the_same_kernels() -> None:
    generator = torch.Generator().manual_seed(0)
    batches, found = [ragged(20, generator, weighted=True), one_hot(9, generator)], []
    for kernels, storage in (("plain", DeviceStorage()), ("triton", HostStorage())):
        tables = [Table.of_column(f"C{i}", rows) for i, rows in enumerate(ROWS)]
        lookup = EmbeddingTables(tables, 8, seed=1, storage=storage)
        lookup.kernels = kernels
        optimizer = CTROptimizer([], [lookup], RULES["adam"], RULES["adam"])
        for ids in batches:
            optimizer.zero_grad()
            lookup(ids).square().sum().backward()
            optimizer.step()
        lookup.flush()
        found.append([lookup.weight.detach(), *optimizer.table_state[0].values()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_int64_ids_and_gradients_in_bfloat16() -> None:
    ids = one_hot(50, torch.Generator().manual_seed(0))
    ids.values = ids.values.long()
    assert_alike([ids], Adagrad(0.1), width=16)


def test_micro_batches_add_up() -> None:
    """Two backward passes before a step: the sum of their gradients, once."""
    lookups = {}
    for kernels in ("plain", "triton"):
        lookup = EmbeddingTables([Table.of_column(f"C{i}", rows) for i, rows in enumerate(ROWS)], 8, seed=1)
        lookup.kernels = kernels
        optimizer = CTROptimizer([], [lookup], Adagrad(0.1), Adagrad(0.1))
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            lookup(one_hot(30, generator)).square().sum().backward()
        optimizer.clip_gradient_norm(0.5)
        optimizer.step()
        lookups[kernels] = lookup
    torch.testing.assert_close(lookups["triton"].weight, lookups["plain"].weight, rtol=1e-5, atol=1e-6)


def test_learned_factors_get_their_gradient() -> None:
    gradients = []
    for kernels in ("plain", "triton"):
        ids = ragged(10, torch.Generator().manual_seed(0), weighted=True)
        ids.weights.requires_grad_()
        lookup = EmbeddingTables([Table.of_column(f"C{i}", rows) for i, rows in enumerate(ROWS)], 8, seed=1)
        lookup.kernels = kernels
        lookup(ids).square().sum().backward()
        gradients.append(ids.weights.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_wrong_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    choose.cache_clear()
    with pytest.raises(UserError, match="need a CUDA device"):
        choose("triton", "cpu", torch.float32)
    with pytest.raises(UserError, match="take float32 and bfloat16"):
        choose("triton", "cuda", torch.float64)
    with pytest.raises(UserError, match="one of auto, plain, native, triton"):
        choose("fast", "cpu", torch.float32)
    choose.cache_clear()
