"""Contract: a fused lookup equals one plain table per column, forward and backward, and any piece
of a table starts the same wherever it is made."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tables.gradients import LookupGradient
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import BLOCK_ROWS, Table, TablePiece, fill_initial_rows

TABLES = {"A": 4, "B": 30, "C": 1}


def tables_of(rows: dict[str, int]) -> list[Table]:
    return [Table.of_column(name, n) for name, n in rows.items()]


def plain_vectors(tables: EmbeddingTables, bags: list[list[list[tuple[int, float]]]]) -> tuple[Tensor, Tensor]:
    """Vectors [B, F, D] by loops, and the dense weight they are differentiable in."""
    weight = tables.weight.detach().clone().requires_grad_()
    rows = []
    for sample in bags:
        for piece, bag in zip(tables.pieces, sample, strict=True):
            vector = 0 * weight[0]  # differentiable also where the bag is empty
            for row, factor in bag:
                vector = vector + factor * piece.of(weight)[row]
            rows.append(vector)
    return torch.stack(rows).view(len(bags), len(tables.pieces), tables.width), weight


def as_ids(bags: list[list[list[tuple[int, float]]]], weighted: bool) -> SparseIds:
    flat = [bag for sample in bags for bag in sample]
    offsets = torch.tensor([0, *(len(bag) for bag in flat)]).cumsum(0)
    values = torch.tensor([row for bag in flat for row, _ in bag], dtype=torch.int32)
    weights = torch.tensor([factor for bag in flat for _, factor in bag]) if weighted else None
    return SparseIds(values=values, tables=len(TABLES), offsets=offsets, weights=weights)


def dense_gradient(tables: EmbeddingTables) -> Tensor:
    gradient = tables.gradient()
    full = torch.zeros_like(tables.weight)
    if gradient is not None:
        assert (gradient.rows.diff() > 0).all(), "rows are distinct and ascending"
        full[gradient.rows] = gradient.values
    return full


bag = lambda rows: st.lists(st.tuples(st.integers(0, rows - 1), st.sampled_from([0.5, 1.0, -2.0])), max_size=4)  # noqa: E731
samples = st.lists(st.tuples(*(bag(rows) for rows in TABLES.values())).map(list), min_size=1, max_size=6)


@given(bags=samples, weighted=st.booleans())
@settings(max_examples=60)
def test_multi_hot_lookup_equals_loops(bags: list, weighted: bool) -> None:
    if not weighted:
        bags = [[[(row, 1.0) for row, _ in one] for one in sample] for sample in bags]
    tables = EmbeddingTables(tables_of(TABLES), 3, seed=1).double()
    expected, weight = plain_vectors(tables, bags)
    vectors = tables(as_ids(bags, weighted))
    torch.testing.assert_close(vectors, expected)
    factor = torch.arange(1.0, vectors.numel() + 1).view_as(vectors).double()
    (vectors * factor).sum().backward()
    (expected * factor).sum().backward()
    torch.testing.assert_close(dense_gradient(tables), weight.grad)


def test_one_hot_lookup_equals_loops_and_micro_batches_add_up() -> None:
    tables = EmbeddingTables(tables_of(TABLES), 3, seed=1).double()
    total = torch.zeros_like(tables.weight)
    for seed in (0, 1, 2):
        ids = torch.stack(
            [torch.randint(0, n, (50,), generator=torch.Generator().manual_seed(seed)) for n in TABLES.values()], 1
        )
        bags = [[[(row, 1.0)] for row in sample] for sample in ids.tolist()]
        expected, weight = plain_vectors(tables, bags)
        vectors = tables(SparseIds(values=ids.int(), tables=3))
        torch.testing.assert_close(vectors, expected)
        vectors.square().sum().backward()
        expected.square().sum().backward()
        total += weight.grad
    torch.testing.assert_close(dense_gradient(tables), total)
    tables.clear_gradient()
    assert tables.gradient() is None


def test_an_empty_slice_has_vectors_and_a_gradient() -> None:
    tables = EmbeddingTables(tables_of(TABLES), 3)
    vectors = tables(SparseIds(values=torch.zeros(0, 3, dtype=torch.int32), tables=3))
    assert vectors.shape == (0, 3, 3)
    vectors.sum().backward()
    assert tables.gradient().rows.numel() == 0


def test_a_compiled_network_looks_up_eagerly() -> None:
    tables = EmbeddingTables(tables_of(TABLES), 3, seed=1)
    network = torch.nn.Sequential(tables, torch.nn.Flatten(), torch.nn.Linear(9, 1))
    ids, found = SparseIds(values=torch.tensor([[1, 29, 0], [3, 8, 0]], dtype=torch.int32), tables=3), []
    for forward in (network, torch.compile(network, backend="eager")):
        logits = forward(ids)
        logits.sum().backward()
        found.append([logits.detach(), tables.gradient().rows, tables.gradient().values])
        tables.clear_gradient()
    torch.testing.assert_close(*found)


def test_no_gradient_tensor_of_the_size_of_the_tables() -> None:
    tables = EmbeddingTables(tables_of(TABLES), 3)
    tables(SparseIds(values=torch.zeros(2, 3, dtype=torch.int32), tables=3)).sum().backward()
    assert tables.weight.grad is None


def test_row_gradient_of_bfloat16_is_summed_in_float32() -> None:
    gradient = LookupGradient(torch.zeros(1000, dtype=torch.int32), torch.full((1000, 1), 1.0).bfloat16())
    assert gradient.values.dtype == torch.float32
    assert gradient.values.item() == 1000


def test_any_piece_of_a_table_starts_as_in_the_whole() -> None:
    rows = 2 * BLOCK_ROWS + 1000
    whole = EmbeddingTables(tables_of({"A": 10, "B": rows}), 2, seed=7)
    table = whole.pieces[1].of(whole.weight)
    for start, stop in [(0, rows), (5, 70), (BLOCK_ROWS - 3, BLOCK_ROWS + 3), (rows - 1, rows), (9, 9)]:
        piece = TablePiece(name="B", table_rows=rows, start=start, stop=stop, offset=4)
        held = torch.full((4 + stop - start, 2), 99.0)
        fill_initial_rows(held, whole.tables, [piece], seed=7)
        assert torch.equal(held[4:], table[start:stop])
        assert (held[:4] == 99).all(), "rows of others stay"


def test_initial_rows_are_uniform_as_published() -> None:
    rows = 40_000
    table = EmbeddingTables(tables_of({"A": rows}), 8, seed=1).weight
    bound = rows**-0.5
    assert table.abs().max() <= bound
    assert abs(table.mean()) < 0.01 * bound
    assert table.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not torch.equal(table, EmbeddingTables(tables_of({"A": rows}), 8, seed=2).weight)
    assert not torch.equal(table, EmbeddingTables(tables_of({"B": rows}), 8, seed=1).weight)


def test_tables_without_rows_or_width_are_refused() -> None:
    with pytest.raises(UserError, match="tables without rows: B"):
        EmbeddingTables(tables_of({"A": 1, "B": 0}), 4)
    with pytest.raises(UserError, match="embedding_dim is 0"):
        EmbeddingTables(tables_of({"A": 1}), 0)
