"""The kernels in C do what plain torch does, and where they cannot be had it is said.

Bit for bit, but for torch's square roots, which are not always rounded to nearest, the mean squares of rows of fewer
than eight, and sums of bfloat16 rows, which torch's kernels round their own way.
"""

import logging
import mmap
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.gradient import RowGradient
from lightning_dlrm.kernels import compiled, native
from lightning_dlrm.kernels.choice import choose
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule, update_rows
from lightning_dlrm.tables.gradients import LookupGradient, Segments, SortedLookups
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import Table
from tests.ranks import run_ranks

try:
    compiled.compiler()
    HAS_COMPILER = True
except compiled.NativeError:
    HAS_COMPILER = False

needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason="needs a C compiler (cc, gcc or clang): the native kernels are not tested"
)

RULES = {
    "sgd": SGD(0.3),
    "sgd, l2, decay": SGD(0.3, l2=0.01, weight_decay=0.02),
    "adagrad": Adagrad(0.1, initial_accumulator=0.1),
    "adagrad, l2, decay": Adagrad(0.1, l2=0.01, weight_decay=0.02),
    "row-wise adagrad": RowWiseAdagrad(0.1, epsilon=1e-6),
    "row-wise adagrad, l2, decay": RowWiseAdagrad(0.1, l2=0.01, weight_decay=0.02),
    "adam": Adam(0.05),
    "adam, short memory, l2, decay": Adam(0.05, beta1=0.3, l2=0.01, weight_decay=0.02),
}
ROWS = (40, 3, 500)
UNOPTIMIZED = compiled._FLAGS.replace("-O3", "-O0")
"""Flags that compile in a fifth of the time, for tests that call no kernel."""


@pytest.fixture(autouse=True)
def _forgets() -> Iterator[None]:
    """What was chosen and loaded counts for one test."""
    yield
    choose.cache_clear()
    compiled.library.cache_clear()


def draw_ids(size: int, generator: torch.Generator, bags: bool, weighted: bool) -> SparseIds:
    """Out of order, with duplicates, the last row of every table among them; bags of none to 9 ids."""
    if not bags:
        columns = [torch.randint(rows, (size,), generator=generator, dtype=torch.int32) for rows in ROWS]
        values = torch.stack(columns, dim=1)
        values[-1:] = torch.tensor(ROWS, dtype=torch.int32) - 1
        return SparseIds(
            values=values, tables=3, weights=torch.randn(values.shape, generator=generator) if weighted else None
        )
    lengths = torch.randint(10, (size * 3,), generator=generator)
    lengths[::4] = 0
    table = torch.arange(len(lengths)).repeat_interleave(lengths) % 3
    values = (torch.rand(len(table), generator=generator) * torch.tensor(ROWS)[table]).int()
    values[::17] = torch.tensor(ROWS, dtype=torch.int32)[table[::17]] - 1
    return SparseIds(
        values=values,
        tables=3,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        weights=torch.randn(len(table), generator=generator) if weighted else None,
    )


def train(
    kernels: str, batches: list[SparseIds], rule: UpdateRule, width: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Vectors of each step, the rows at the end, and their state."""
    lookup = EmbeddingTables([Table.of_column(f"C{i}", rows) for i, rows in enumerate(ROWS)], width, seed=1).to(dtype)
    lookup.kernels = kernels
    optimizer = CTROptimizer([], [lookup], rule, rule)
    vectors = []
    for step, ids in enumerate(batches):
        optimizer.zero_grad()
        out = lookup(ids)
        vectors.append(out.detach())
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(step)).to(dtype))
        optimizer.step()
    return vectors, lookup.weight.detach(), optimizer.table_state[0]


@needs_compiler
@pytest.mark.parametrize("width", [1, 2, 7, 16, 17, 64, 300])
@pytest.mark.parametrize("rule", RULES)
def test_native_is_plain(rule: str, width: int) -> None:
    """Several steps, one id each and bags, with factors and without, in one thread and in several."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        draw_ids(size, generator, bags, weighted)
        for size, bags, weighted in [(400, True, False), (50, True, True), (90, False, False), (1, False, True)]
    ]
    plain, fast = (train(kernels, batches, RULES[rule], width) for kernels in ("plain", "native"))
    if isinstance(RULES[rule], (Adam, RowWiseAdagrad)):
        tolerance = {"rtol": 1e-5, "atol": 3e-6}
    else:
        # Only where this processor has what torch's kernels fuse products and sums by.
        fused = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        tolerance = {"rtol": 0.0, "atol": 0.0} if fused else {"rtol": 1e-6, "atol": 1e-6}
    for found, expected in zip(
        [*fast[0], fast[1], *fast[2].values()], [*plain[0], plain[1], *plain[2].values()], strict=True
    ):
        torch.testing.assert_close(found, expected, **tolerance)


@needs_compiler
@pytest.mark.parametrize("rule", ["sgd", "adam, short memory, l2, decay"])
def test_tables_in_bfloat16(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [draw_ids(100, generator, bags=True, weighted=weighted) for weighted in (False, True)]
    plain, fast = (train(kernels, batches, RULES[rule], 16, torch.bfloat16) for kernels in ("plain", "native"))
    torch.testing.assert_close(fast[1], plain[1], rtol=2**-7, atol=1e-4)
    for found, expected in zip(fast[0], plain[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-2)


@needs_compiler
def test_sums_of_bfloat16_rows_are_rounded_once_to_nearest() -> None:
    weight = torch.randn(50, 33, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.arange(49, dtype=torch.int32)
    vectors, rows, bags = native.lookup(
        weight, ids, torch.tensor([0, 2, 2, 49]), torch.tensor([1], dtype=torch.int32), None
    )
    assert torch.equal(vectors[0], (weight[1].float() + weight[2].float()).bfloat16())
    assert not vectors[1].any()
    assert torch.equal(rows, ids + 1) and bags.tolist() == [0] * 2 + [2] * 47


@needs_compiler
def test_one_row_looked_up_many_times_in_several_threads() -> None:
    """The same bits, whatever the number of threads."""
    ids = SparseIds(values=torch.zeros(7000, 3, dtype=torch.int32), tables=3)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(train("native", [ids, ids], Adagrad(0.1), 16)[1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0], train("plain", [ids, ids], Adagrad(0.1), 16)[1])


@needs_compiler
@pytest.mark.parametrize("count", [0, 1, 5000, 70_000])
@pytest.mark.parametrize("rows", [1, 2, 700, 2**31 - 1])
def test_rows_are_sorted_as_by_torch_in_any_number_of_threads(rows: int, count: int) -> None:
    rows_N = torch.randint(rows, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.int32)
    rows_N[: count // 3] = rows - 1
    expected, threads = torch.sort(rows_N, stable=True), torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            sorted_N, order_N = native.sort(rows_N, rows)
            assert torch.equal(sorted_N, expected.values) and torch.equal(order_N, expected.indices), number
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("count", [0, 1, 5000, 50_000])
@pytest.mark.parametrize("rows", [1, 2, 700, 2**31 - 1])
def test_each_row_moves_by_the_sum_of_its_lookups(rows: int, count: int) -> None:
    """Of the largest table, only the pages that are touched are ever in memory."""
    generator = torch.Generator().manual_seed(count)
    rows_N = torch.randint(rows, (count,), generator=generator, dtype=torch.int32)
    rows_N[: count // 3] = rows - 1
    bag_N, weights_N = torch.randint(9, (count,), generator=generator), torch.rand(count, generator=generator)
    dtype = torch.bfloat16 if rows > 700 else torch.float32
    # Zeros, too, but torch.zeros would write every page.
    weight = torch.frombuffer(mmap.mmap(-1, rows * dtype.itemsize), dtype=dtype).view(rows, 1)
    for bags, factors in ((None, None), (bag_N, None), (bag_N, weights_N)):
        gradient_BD = torch.randn(count if bags is None else 9, 1, generator=generator)
        segments = Segments.of(SortedLookups.of(rows_N), bags, factors)
        weight[segments.rows] = 0
        for prepare in (lambda gradient: gradient, lambda gradient: (gradient.rows, gradient)[1]):
            gradient = prepare(LookupGradient(rows_N, gradient_BD, bags, factors))
            update_rows(weight, gradient, {}, SGD(1.0), torch.tensor(1.0), torch.tensor(1.0), "native")
        expected = (-segments.sums(gradient_BD)).to(dtype)
        expected = (expected.float() - segments.sums(gradient_BD)).to(dtype)
        torch.testing.assert_close(weight[segments.rows], expected, rtol=0.0, atol=0.0)


@needs_compiler
def test_empty_batches_and_summed_gradients() -> None:
    nothing = SparseIds(values=torch.zeros(0, dtype=torch.int32), tables=3, offsets=torch.zeros(7, dtype=torch.int64))
    none = SparseIds(values=torch.zeros(0, 3, dtype=torch.int32), tables=3)
    vectors, weight, _ = train("native", [nothing, none], SGD(0.1), 4)
    assert vectors[0].shape == (2, 3, 4) and not vectors[0].any()
    assert torch.equal(weight, train("plain", [], SGD(0.1), 4)[1])
    rows_N, grad_ND = torch.tensor([9, 2, 9, 9], dtype=torch.int32), torch.randn(4, 5)
    for prepare in (lambda g: g, lambda g: (g.rows, g)[1], lambda g: RowGradient(g.rows, g.values)):
        weight = torch.ones(10, 5)
        gradient = prepare(LookupGradient(rows_N, grad_ND))
        update_rows(weight, gradient, {}, SGD(0.5), torch.tensor(0.5), torch.tensor(1.0), "native")
        expected = torch.ones(10, 5)
        for row, grad_D in zip(rows_N.tolist(), grad_ND, strict=True):
            expected[row] -= 0.5 * grad_D
        torch.testing.assert_close(weight, expected)


@needs_compiler
@pytest.mark.parametrize("wrong", [-1, 500])
def test_an_id_outside_the_tables_is_an_error(wrong: int) -> None:
    ids = draw_ids(2000, torch.Generator().manual_seed(0), bags=False, weighted=False)
    ids.values[1234, 2 if wrong > 0 else 0] = wrong
    with pytest.raises(IndexError, match=rf"id {wrong} at place 370\d is outside the tables, which have 543 rows"):
        train("native", [ids], SGD(0.1), 4)


@needs_compiler
def test_learned_factors_get_their_gradient() -> None:
    gradients = []
    for kernels in ("plain", "native"):
        ids = draw_ids(10, torch.Generator().manual_seed(0), bags=True, weighted=True)
        ids.weights.requires_grad_()
        lookup = EmbeddingTables([Table.of_column(f"C{i}", rows) for i, rows in enumerate(ROWS)], 8, seed=1)
        lookup.kernels = kernels
        lookup(ids).square().sum().backward()
        gradients.append(ids.weights.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@needs_compiler
def test_one_openmp_library_is_loaded() -> None:
    """Two would let their threads wait in loops beside each other. In a process of its own, as others' libraries may
    bring theirs."""
    script = (
        "from pathlib import Path; import torch; from lightning_dlrm.kernels import compiled; compiled.library();"
        "print({line.split()[-1] for line in Path('/proc/self/maps').read_text().splitlines() if 'omp' in line})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("omp") == 1, done.stdout


@needs_compiler
def test_processes_that_compile_at_once_share_one_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        f"from lightning_dlrm.kernels import compiled; compiled._FLAGS = {UNOPTIMIZED!r}; "
        "print(compiled.library()._name)"
    )
    cache = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", str(cache))
    names = {text.strip() for text in run_ranks(["-c", script], 2)}
    assert [str(path) for path in (cache / "native").iterdir()] == list(names)


def test_without_a_compiler_auto_is_plain_and_native_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    choose.cache_clear()
    compiled.library.cache_clear()
    with caplog.at_level(logging.INFO, "lightning_dlrm"):
        assert choose("auto", "cpu", torch.float32) == "plain"
        assert choose("auto", "cpu", torch.float32) == "plain"
        assert choose("auto", "meta", torch.float32) == choose("native", "meta", torch.float32) == "plain"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert (
        record.message == "kernels on cpu: plain torch, which is slower: no C compiler is installed (cc, gcc or clang)"
    )
    with pytest.raises(
        UserError, match=r"^kernels is native, but no C compiler is installed .*: set it to auto or plain$"
    ):
        choose("native", "cpu", torch.float32)
    monkeypatch.setenv("CC", "mycc -m64")
    with pytest.raises(UserError, match="CC is mycc, which is not installed"):
        choose("native", "cpu", torch.float32)


def test_a_compiler_that_fails_is_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'native.c: note: hm' >&2\necho 'native.c:1: error: no space' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", str(tmp_path / "cache"))
    choose.cache_clear()
    compiled.library.cache_clear()
    assert choose("auto", "cpu", torch.float32) == choose("auto", "cpu", torch.float32) == "plain"
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message.endswith(f"which is slower: the C compiler {broken} failed: native.c:1: error: no space")
    with pytest.raises(
        UserError, match=r"kernels is native, but the C compiler .* failed: native.c:1: error: no space"
    ):
        choose("native", "cpu", torch.float32)
    assert not list((tmp_path / "cache" / "native").iterdir())


@needs_compiler
def test_a_library_that_others_may_write_is_not_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "_FLAGS", UNOPTIMIZED)
    compiled.library.cache_clear()
    library = Path(compiled.library()._name)
    assert library.parent == tmp_path / "native" and stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    for loose in ("folder", "library", "link"):
        if loose == "link":
            library.symlink_to(library.rename(tmp_path / "elsewhere.so"))
        else:
            (library if loose == "library" else library.parent).chmod(0o770)
        compiled.library.cache_clear()
        choose.cache_clear()
        caplog.clear()
        assert choose("auto", "cpu", torch.float32) == "plain"
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "may be written by users other than" in caplog.text and str(tmp_path / "native") in caplog.text
        library.chmod(0o700)
        library.parent.chmod(0o700)


def test_native_is_for_a_cpu_and_types_it_knows() -> None:
    with pytest.raises(UserError, match="the tables are on cuda, and the native kernels need a CPU"):
        choose("native", "cuda", torch.float32)
    with pytest.raises(UserError, match="float64, and these kernels take float32 and bfloat16"):
        choose("native", "cpu", torch.float64)
    assert choose("auto", "cpu", torch.float64) == "plain"


@needs_compiler
def test_strided_ids_and_factors_are_read_as_they_are() -> None:
    tables = EmbeddingTables([Table.of_column("C1", 10)], 4, seed=1)
    wide = torch.tensor([[1, 9], [2, 8], [3, 7]], dtype=torch.int32)
    for weights in (None, torch.tensor([2.0]).expand(3, 1)):
        ids = SparseIds(values=wide[:, :1], tables=1, weights=weights)
        found = []
        for kernels in ("native", "plain"):
            tables.kernels = kernels
            found.append(tables(ids))
        assert torch.equal(*found)


@needs_compiler
@pytest.mark.parametrize("offsets", [[0, 1, 50_000_000], [0, 2, 1], [1, 1, 2], [0, 1, 1], [0, 5, 2]])
def test_offsets_that_are_none_are_refused(offsets: list[int]) -> None:
    tables = EmbeddingTables([Table.of_column("C1", 10)], 4, seed=1)
    tables.kernels = "native"
    ids = SparseIds(values=torch.tensor([1, 2], dtype=torch.int32), tables=1, offsets=torch.tensor(offsets))
    with pytest.raises(IndexError, match="offsets"):
        tables(ids)
