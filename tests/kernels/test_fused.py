"""Contract: the fast paths are the plain ones: dense layers, pair products, gathered rows, updates in one pass."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_dlrm.contracts import gradient as row_gradient
from lightning_dlrm.kernels import compiled
from lightning_dlrm.models import fused
from lightning_dlrm.models.dcn import MatrixCross
from lightning_dlrm.models.layers import MLP, DotInteraction
from lightning_dlrm.optim import rules
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.tables.gradients import LookupGradient
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import Table, empty_table, gather_rows, keep_freed_memory, put_rows


def gradients(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    return list(torch.autograd.grad(output, inputs, torch.randn(output.shape).to(output.dtype)))


@pytest.mark.parametrize("linear_output", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rows", "tolerance"),
    [
        (torch.float64, 5, 1e-12),
        (torch.float64, 512, 1e-12),
        (torch.float32, 300, 1e-5),
        (torch.float32, 1, 1e-5),
        (torch.float32, 0, 0.0),
    ],
)
def test_dense_layers_equal_autograd(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, tolerance: float, linear_output: bool
) -> None:
    # So that both kernels take part.
    monkeypatch.setattr(fused, "_LARGE_PRODUCT", min(fused._LARGE_PRODUCT, 300 * 64))
    torch.manual_seed(1)
    # Widths 37 and 45 are not aligned: with 512 rows, products have columns of zeros.
    layers = MLP([37, 64, 45, 1], linear_output=linear_output).to(dtype)
    x = torch.randn(rows, 37, dtype=dtype, requires_grad=True)
    ours, plain = layers(x), nn.Sequential.forward(layers, x)
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    inputs = [x, *layers.parameters()]
    for found, expected in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("rows", [6, 512])
@pytest.mark.parametrize("width", [5, 37, 40])
def test_matrix_crosses_equal_their_equation(width: int, rows: int) -> None:
    torch.manual_seed(1)
    layers = MatrixCross(width, 2).double()
    nn.init.normal_(layers.weight)
    nn.init.normal_(layers.bias)
    start = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    plain = start
    for weight, bias in zip(layers.weight, layers.bias, strict=True):
        plain = start * (plain @ weight.t() + bias) + plain
    ours, inputs = layers(start), [start, layers.weight, layers.bias]
    torch.testing.assert_close([ours, *gradients(ours, inputs)], [plain, *gradients(plain, inputs)])


def test_dense_layers_under_autocast_cast_as_torch_does() -> None:
    torch.manual_seed(1)
    layers, x = MLP([13, 64, 8]), torch.randn(50, 13)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = layers(x), nn.Sequential.forward(layers, x)
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(ours, plain)
    inputs = list(layers.parameters())
    for found, expected in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        # Sums of biases' gradients: in float32 here, rounded to bfloat16 there.
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-2)


def test_first_layers_input_needs_no_gradient() -> None:
    layers, x = MLP([3, 4]), torch.randn(2, 3)
    layers(x).sum().backward()
    assert x.grad is None and all(parameter.grad is not None for parameter in layers.parameters())


def pairs_one_by_one(first: Tensor, others: Tensor, squares: bool) -> Tensor:
    vectors = [first, *others.unflatten(1, (-1, first.shape[1])).unbind(1)]
    count = len(vectors)
    pairs = [(i, j) for i, j in itertools.product(range(count), range(count)) if j < i or (squares and i == j)]
    return torch.cat([first, *((vectors[i] * vectors[j]).sum(1, keepdim=True) for i, j in pairs)], dim=1)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("rows", [0, 6])
def test_pair_products_equal_a_loop(squares: bool, rows: int) -> None:
    torch.manual_seed(1)
    first = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    others = torch.randn(rows, 4 * 3, dtype=torch.float64, requires_grad=True)
    plain = pairs_one_by_one(first, others, squares)
    ours = DotInteraction(5, 3, squares)(first, others)
    torch.testing.assert_close(ours, plain)
    for found, expected in zip(gradients(ours, [first, others]), gradients(plain, [first, others]), strict=True):
        torch.testing.assert_close(found, expected)


def test_pair_products_in_half_precision_round_once() -> None:
    torch.manual_seed(1)
    first, others = torch.randn(7, 3).bfloat16(), torch.randn(7, 4 * 3)
    interaction = DotInteraction(5, 3)
    interaction.kernels = "plain"
    with torch.autocast("cpu", torch.bfloat16):
        found = interaction(first, others)
    vectors = torch.cat([first, others.bfloat16()], dim=1).view(7, 5, 3)
    products = torch.bmm(vectors, vectors.transpose(1, 2))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:, 3:], torch.stack([products[:, i, j] for i in range(5) for j in range(i)], dim=1))


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize(
    ("rows", "vectors", "width"), [(0, 3, 4), (1, 2, 1), (40, 27, 16), (7, 18, 20), (33, 5, 64), (3, 33, 3)]
)
@pytest.mark.parametrize(
    ("of_first", "of_others"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_native_pair_products_equal_a_loop(
    rows: int, vectors: int, width: int, squares: bool, of_first: torch.dtype, of_others: torch.dtype
) -> None:
    _need_native()
    interaction = DotInteraction(vectors, width, squares)
    interaction.kernels = "native"
    torch.manual_seed(1)
    first = torch.randn(rows, width).to(of_first).requires_grad_()
    # Not contiguous, as columns of something wider are.
    wide = torch.randn(rows, (vectors - 1) * width + 1).to(of_others).requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (first, wide)]
    ours = interaction(first, wide[:, 1:].contiguous())
    plain = pairs_one_by_one(exact[0], exact[1][:, 1:], squares)
    assert ours.dtype == of_first
    # Sums are taken in float32, and rounded once.
    rounding = 1e-5 if of_first == torch.float32 else 2**-8
    torch.testing.assert_close(ours.double(), plain, rtol=rounding, atol=1e-5 * width)
    grads = zip(gradients(ours, [first, wide]), gradients(plain, exact), strict=True)
    for tensor, (found, expected) in zip((first, wide), grads, strict=True):
        assert found.dtype == tensor.dtype
        rounding = 1e-5 if of_first == torch.float32 else 2**-7
        torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=(rounding * 4) * vectors)


def test_pair_products_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(1)
    interaction = DotInteraction(27, 16)
    first, others = torch.randn(100, 16), torch.randn(100, 26 * 16)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(interaction(first, others))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 16, 64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_gathered_rows_are_the_rows(dtype: torch.dtype, width: int, index: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = torch.randn(1000, width).to(dtype)
    for rows in ([], [999], [5, 5, 0, 999, 5], torch.randint(0, 1000, (700,)).tolist()):
        picked = torch.tensor(rows, dtype=index)
        assert torch.equal(gather_rows(weight, picked), weight[picked.long()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (16,), (64,), (2, 2)])
def test_put_rows_are_there_and_others_stay(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for rows in (torch.tensor([], dtype=torch.int64), torch.tensor([999]), torch.randperm(9000)[:8500]):
        weight, values = torch.randn(9000, *shape).to(dtype), torch.randn(len(rows), *shape).to(dtype)
        if len(rows):
            values[0] = torch.nan
        expected = weight.clone()
        expected[rows] = values
        put_rows(weight, rows, values)
        assert torch.equal(weight.view(bits), expected.view(bits))


@pytest.mark.parametrize(
    "rule", [rules.SGD(0.5, l2=0.1), rules.Adagrad(0.1), rules.RowWiseAdagrad(0.1), rules.Adam(0.1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_update_block_by_block_is_that_of_all_rows_at_once(
    monkeypatch: pytest.MonkeyPatch, rule: rules.UpdateRule, dtype: torch.dtype, weighted: bool
) -> None:
    """Bit for bit, on ragged and empty bags, duplicate and out-of-order ids; the last block is not full."""
    torch.manual_seed(1)
    lengths = torch.tensor([3, 0, 1, 40, 0, 7, 2])
    bag_N = torch.repeat_interleave(torch.arange(7), lengths)
    ids, grad_BD = torch.randint(0, 60, (len(bag_N),), dtype=torch.int32), torch.randn(7, 4).to(dtype)
    factors = torch.randn(len(bag_N)) if weighted else None
    dense = torch.zeros(60, 4, dtype=torch.float64)
    each = grad_BD.double()[bag_N] * (1.0 if factors is None else factors.double()[:, None])
    dense.index_add_(0, ids.long(), each)

    def updated(block_bytes: int) -> list[Tensor]:
        monkeypatch.setattr(row_gradient, "_BLOCK_BYTES", block_bytes)
        tables = EmbeddingTables([Table.of_column("A", 60)], 4, seed=1)
        gradient = LookupGradient(ids, grad_BD, bag_N, factors)
        blocks = [(len(block.rows), block.values) for block in gradient.blocks()]
        assert len(blocks) == -(-len(gradient.rows) * 16 // block_bytes)
        assert torch.equal(torch.cat([values for _, values in blocks]), gradient.values)
        torch.testing.assert_close(gradient.values, dense[gradient.rows].float(), rtol=1e-5, atol=1e-5)
        assert [rows for rows, _ in blocks] == [len(block.rows) for block in gradient.blocks()], "summed or not"
        optimizer = CTROptimizer([], [tables], rules.SGD(1.0), rule)
        for _ in range(2):
            optimizer.zero_grad()
            tables.add_gradient(LookupGradient(ids, grad_BD, bag_N, factors))
            optimizer.step()
        return [tables.weight.detach(), *optimizer.table_state[0].values()]

    for found, expected in zip(updated(5 * 16), updated(2**22), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", [rules.SGD(0.5), rules.Adagrad(0.1), rules.RowWiseAdagrad(0.1), rules.Adam(0.1)])
def test_update_of_rows_equals_update_of_the_whole_table(rule: rules.UpdateRule) -> None:
    """Duplicate and out-of-order ids, some rows untouched; all rules move no row whose gradient is zero at first."""
    torch.manual_seed(1)
    tables = EmbeddingTables([Table.of_column("A", 50)], 4, seed=1)
    whole = tables.weight.detach().clone()
    ids, grad = torch.tensor([7, 3, 7, 49, 0, 3, 7], dtype=torch.int32), torch.randn(7, 4)
    tables.add_gradient(LookupGradient(ids, grad))
    CTROptimizer([], [tables], rules.SGD(1.0), rule).step()
    dense = torch.zeros(50, 4, dtype=torch.float64).index_add_(0, ids.long(), grad.double()).float()
    rule.apply(whole, dense, rule.state(whole), rule.learning_rate, 1)
    torch.testing.assert_close(tables.weight.detach(), whole, rtol=1e-5, atol=1e-6)
    untouched = sorted(set(range(50)) - set(ids.tolist()))
    assert torch.equal(tables.weight.detach()[untouched], whole[untouched])


def test_large_tables_are_ordinary_tensors() -> None:
    small, large = empty_table((3, 2), torch.float64), empty_table((2**19, 3), torch.float32)
    assert small.shape == (3, 2) and small.dtype == torch.float64
    large.fill_(2.0)
    assert large.sum() == 3 * 2**20 and large.is_contiguous() and large.clone().shape == (2**19, 3)
    assert empty_table((2**19, 3), torch.float32, torch.device("meta")).is_meta
    keep_freed_memory()


def _need_native() -> None:
    try:
        compiled.library()
    except compiled.NativeError as error:
        pytest.skip(f"the native kernels are not tested: {error}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_native", [False, True])
@pytest.mark.parametrize("size", [4, 256])
def test_what_is_no_number_reaches_the_loss(dtype: torch.dtype, by_native: bool, size: int) -> None:
    """Through small layers and large ones, which other kernels make."""
    if by_native:
        _need_native()
    x_Bd = torch.randn(size, 256).to(dtype)
    weights = [torch.randn(256, 256).to(dtype) for _ in range(2)]
    weights[0][5, 7] = float("nan")
    biases = [torch.zeros(256, dtype=dtype)] * 2
    assert fused.fused_mlp(x_Bd, weights, biases, [True, False], by_native=by_native).isnan().all()
