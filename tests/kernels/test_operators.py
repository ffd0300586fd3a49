"""Contract: every kernel is an operator of torch, with a fake kernel and autograd, that checks its arguments."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_dlrm.kernels import compiled, dense, native

try:
    compiled.library()
except compiled.NativeError as error:
    pytest.skip(f"the native kernels are not tested: {error}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
"""For sums in another order."""
TABLES = torch.tensor([0, 40, 43], dtype=torch.int32)
ROWS = 90
OPERATORS = torch.ops.lightning_dlrm
RULES = {"sgd": (), "adagrad": ((ROWS, 5),), "row_wise_adagrad": ((ROWS,),), "adam": ((ROWS, 5), (ROWS, 5))}


def draw(*shape: int, dtype: torch.dtype = torch.float32, contiguous: bool = True) -> Tensor:
    """A tensor; without ``contiguous`` every other column of a wider one."""
    values = torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    values = values.to(dtype)
    return values[..., ::2].contiguous() if contiguous else values[..., ::2]


def draw_lookup(kind: str, dtype: torch.dtype, contiguous: bool = True) -> tuple[Any, ...]:
    """The arguments of ``lookup``; ``kind`` is "one", "bags" or "empty", with "weighted" or without."""
    weight = draw(ROWS, 5, dtype=dtype, contiguous=contiguous).requires_grad_()
    ids, offsets = torch.arange(24, dtype=torch.int32) % 3, None
    if "bags" in kind:
        offsets = torch.tensor([0, 3, 3, 10, 11, 20, 24])
    if "empty" in kind:
        ids, offsets = ids[:0], torch.zeros(4, dtype=torch.int64) if "bags" in kind else None
    if not contiguous:
        ids = torch.stack([ids, ids], 1)[:, 0]
    factors = draw(len(ids), contiguous=contiguous).requires_grad_() if "weighted" in kind else None
    return weight, ids, offsets, TABLES, factors


KINDS = ["one", "one weighted", "bags", "bags weighted", "empty", "empty bags weighted"]
CASES: dict[str, Callable[[torch.dtype], tuple[Any, ...]]] = {
    **{f"lookup {kind}": lambda dtype, kind=kind: draw_lookup(kind, dtype) for kind in KINDS},
    "lookup strided": lambda dtype: draw_lookup("bags weighted", dtype, contiguous=False),
    **{
        f"update {rule} {kind}": lambda dtype, rule=rule, kind=kind: draw_update(rule, kind, dtype)
        for rule, kind in [
            ("sgd", "one"),
            ("adagrad", "ascending"),
            ("row_wise_adagrad", "bags"),
            ("adam", "bags weighted strided"),
            ("adam", "empty"),
        ]
    },
    **{
        f"pair_{name} {kind}": lambda dtype, name=name, kind=kind: draw_pairs(name, kind, dtype)
        for name in ("products", "gradients")
        for kind in ("contiguous", "strided", "empty", "mixed self")
    },
    "sort": lambda dtype: (torch.arange(24, dtype=torch.int32) % 7, 7),
    "sort strided": lambda dtype: ((torch.arange(24, dtype=torch.int32) % 7)[::2], 9),
    "sort empty": lambda dtype: (torch.arange(0, dtype=torch.int32), 7),
    "relu_bf16": lambda dtype: (draw(7, 5, dtype=torch.bfloat16),),
    **{
        f"relu_gradients {kind}": lambda dtype, kind=kind: (
            draw(0 if "empty" in kind else 70, 5, dtype=dtype),
            draw(0 if "empty" in kind else 70, 5, dtype=dtype, contiguous="strided" not in kind),
            "transposed" in kind,
        )
        for kind in ("sums", "transposed strided", "empty transposed")
    },
}


def draw_update(rule: str, kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    count, bags = 0 if kind == "empty" else 24, 6 if "bags" in kind else None
    rows = torch.arange(count, dtype=torch.int32) % (ROWS if kind == "ascending" else 7)
    contiguous = "strided" not in kind
    return (
        draw(ROWS, 5, dtype=dtype),
        [draw(*shape).square() for shape in RULES[rule]],
        rows,
        draw(bags or count, 5, dtype=dtype, contiguous=contiguous),
        None if bags is None else torch.arange(count) % bags,
        draw(count, contiguous=contiguous) if "weighted" in kind else None,
        kind == "ascending",
        rule,
        0.1,
        2.0,
        0.01,
        0.02,
        1e-6,
        0.9,
        0.99,
    )


def draw_pairs(name: str, kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    size, contiguous, self_interaction = 0 if kind == "empty" else 4, kind != "strided", "self" in kind
    first = draw(size, 3, dtype=dtype, contiguous=contiguous).requires_grad_()
    others = draw(size, 4, 3, dtype=torch.float32 if "mixed" in kind else dtype, contiguous=contiguous)
    grad = draw(size, 3 + (15 if self_interaction else 10), dtype=dtype, contiguous=contiguous).requires_grad_()
    return (first, others.requires_grad_(), *([grad] if name == "gradients" else []), self_interaction)


def check_operator(operator: Any, arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    """All of torch's checks; the tracing of steps, which takes longest, in float32 alone."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if dtype == torch.float32:
        checks += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(operator, arguments, test_utils=checks, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_operators_keep_torchs_rules(case: str, dtype: torch.dtype) -> None:
    check_operator(getattr(OPERATORS, case.split()[0]).default, CASES[case](dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_steps_in_bfloat16_are_traced(case: str) -> None:
    arguments = CASES[case](torch.bfloat16)
    operator = getattr(OPERATORS, case.split()[0]).default
    torch.library.opcheck(operator, arguments, test_utils="test_aot_dispatch_dynamic", **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_no_result_depends_on_the_default_dtype(default: torch.dtype) -> None:
    """Lightning sets it for bf16-true, 16-true and 64-true."""
    for case, dtype in itertools.product(CASES, DTYPES):
        operator, results = getattr(OPERATORS, case.split()[0]).default, []
        for default_dtype in (torch.float32, default):
            arguments = CASES[case](dtype)
            torch.set_default_dtype(default_dtype)
            try:
                results.append([operator(*arguments), tensors(arguments)])
            finally:
                torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(*results, rtol=0, atol=0)


def tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    state = [x for argument in arguments if isinstance(argument, list) for x in argument]
    return [*state, *(argument for argument in arguments if isinstance(argument, Tensor))]


def test_a_lookup_has_the_gradients_of_torchs_own() -> None:
    for kind in KINDS:
        weight, ids, offsets, _, factors = draw_lookup(kind, torch.float32)
        vectors, rows, _ = native.lookup(weight, ids, offsets, TABLES, factors)
        starts = torch.arange(len(ids)) if offsets is None else offsets[:-1]
        expected = torch.nn.functional.embedding_bag(rows, weight, starts, mode="sum", per_sample_weights=factors)
        torch.testing.assert_close(vectors, expected)
        inputs = [weight] if factors is None else [weight, factors]
        seed = draw(*vectors.shape)
        grads = zip(
            torch.autograd.grad(vectors, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
        )
        for found, wanted in grads:
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("self_interaction", [False, True])
def test_pair_products_are_differentiable_twice(self_interaction: bool) -> None:
    first, others = draw(4, 3).requires_grad_(), draw(4, 5, 3).requires_grad_()

    def plain(first: Tensor, others: Tensor) -> Tensor:
        vectors = torch.cat([first[:, None], others], 1)
        i, j = torch.tril_indices(6, 6, 0 if self_interaction else -1)
        return torch.cat([first, (vectors @ vectors.transpose(1, 2))[:, i, j]], 1)

    results = []
    for function in (plain, lambda *vectors: dense.pair_products(*vectors, self_interaction)):
        out = function(first, others)
        grads = torch.autograd.grad(out.pow(3).sum(), [first, others], create_graph=True)
        seconds = torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), [first, others])
        results.append([out, *grads, *seconds])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def one(count: int, stop: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.arange(count, dtype=dtype) % stop


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: native.lookup(draw(9, 4).double(), one(3, 3), None, TABLES, None), TypeError, "float64"),
        (lambda: native.lookup(draw(9, 4), one(3, 3).long(), None, TABLES, None), TypeError, "ids is torch.int64"),
        (lambda: native.lookup(draw(9), one(3, 3), None, TABLES, None), ValueError, "two dimensions"),
        (lambda: native.lookup(draw(9, 4), one(3, 3), None, TABLES[:0], None), ValueError, "0 tables"),
        (lambda: native.lookup(draw(9, 4), one(3, 3), None, TABLES, draw(2)), ValueError, "factor for each"),
        (lambda: native.lookup(draw(9, 4), one(3, 3), None, TABLES, None), IndexError, "id 1 at place 1"),
        (lambda: move(draw(9, 4), one(3, 12) + 7), IndexError, "rows 7 to 9"),
        (lambda: move(draw(9, 4), one(3, 3) - 1), IndexError, "rows -1 to 1"),
        (lambda: move(draw(9, 4), one(3, 3), bags=one(3, 4)), IndexError, "bags 0 to 2"),
        (lambda: move(draw(9, 4), one(3, 3), state=[draw(8, 4)]), ValueError, "do not fit"),
        (lambda: move(draw(9, 4), one(3, 3), state=[]), ValueError, "0 tensors of state"),
        (lambda: move(draw(9, 4), one(3, 3), state=[draw(9, 4).double()]), TypeError, "first is torch.float64"),
        (lambda: move(draw(9, 4, contiguous=False), one(3, 3)), TypeError, "contiguous"),
        (lambda: move(draw(9, 4), one(3, 3), factors=draw(2)), ValueError, "do not fit"),
        (lambda: native.sort(one(3, 3), 2), IndexError, "rows 0 to 2"),
        (lambda: native.sort(one(3, 3) - 1, 3), IndexError, "rows -1 to 1"),
        (lambda: native.sort(one(3, 3).long(), 3), TypeError, "rows is torch.int64"),
        (lambda: native.sort(one(3, 3).view(1, -1), 3), ValueError, "expected one dimension"),
        (lambda: dense.pair_products(draw(2, 3), draw(2, 4, 5), False), ValueError, "do not fit"),
        (lambda: dense.pair_products(draw(2, 3).half(), draw(2, 4, 3), False), TypeError, "float16"),
        (lambda: OPERATORS.pair_gradients(draw(2, 3), draw(2, 4, 3), draw(2, 12), False), ValueError, "do not fit"),
        (lambda: dense.relu_bf16(draw(3, 4)), TypeError, "expected .*bfloat16"),
        (lambda: dense.relu_gradients(draw(3, 4), draw(3, 5), False), ValueError, "equal shapes"),
        (lambda: dense.relu_gradients(draw(3, 4), draw(3, 4).bfloat16(), False), ValueError, "equal shapes"),
        (lambda: compiled.call("relu_bf16", 1, values=None), TypeError, "got arguments"),
        (lambda: compiled.call("relu_bf16", 1, values=None, count=0, size=0), AttributeError, "size"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def move(
    weight: Tensor,
    rows: Tensor,
    bags: Tensor | None = None,
    factors: Tensor | None = None,
    state: list[Tensor] | None = None,
) -> None:
    grad = draw(2 if bags is not None else 3, 4)
    state = [draw(9, 4)] if state is None else state
    native.update(weight, rows, grad, bags, factors, False, state, "adagrad", {}, 0.1, 1.0)


def test_fake_tensors_profiler_and_compiler_see_operators() -> None:
    def score(first: Tensor, others: Tensor) -> Tensor:
        return dense.pair_products(first, others, False).relu()

    with FakeTensorMode(allow_non_fake_inputs=True):
        vectors, rows, bags = native.lookup(*draw_lookup("bags weighted", torch.bfloat16))
        assert (vectors.shape, rows.shape, bags.shape) == ((6, 5), (24,), (24,)) and vectors.dtype == torch.bfloat16
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        expected = score(draw(4, 3), draw(4, 5, 3))
    assert "lightning_dlrm::pair_products" in {event.key for event in profile.key_averages()}
    compiled_score = torch.compile(score, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled_score(draw(4, 3), draw(4, 5, 3)), expected)


@pytest.mark.slow
def test_no_kernel_reads_or_writes_beyond_its_tensors(tmp_path: Path) -> None:
    """Every test above once more, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = compiled.compiler()
    libraries = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"{compiler[0]} has no sanitizers")
    environment = {
        **os.environ,
        "CC": f"{' '.join(compiler)} -g -fsanitize=address,undefined -fno-sanitize-recover=all",
        "LIGHTNING_DLRM_CACHE": str(tmp_path),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    tests = [__file__, str(Path(__file__).with_name("test_native.py")), "-k", "not (openmp or compile or write)"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
