"""Table rows, dot products of vectors and ReLUs on a CPU: ``native.c``, compiled when it is first needed.

The library is kept in the cache, one for each source, compiler and processor, and runs in torch's own threads. Its
results do not depend on how many there are.

Shape suffixes: B bags (output vectors), F tables, D width, R rows of all tables, N indices of all bags, U distinct
rows, V vectors, P pairs of them, n any other.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dlrm.contracts.cache import cache_root
from lightning_dlrm.contracts.lookup import LookupGradient, RowGradient

_SOURCE = Path(__file__).with_name("native.c")
# No flag that lets results differ from the formulas as written.
_FLAGS = "-std=c11 -O3 -march=native -fPIC -shared -fno-math-errno -fno-trapping-math -ffp-contract=off"
_THREADS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
_RULES = ("sgd", "adagrad", "row_wise_adagrad", "adam")
_DIGIT = 9
"""Most bits that are sorted by in one pass: as many counters stay in the first cache."""
_A_BUCKET = 2**11
"""Indices that are sorted together at least, and so by lower bits alone."""
_ROWS_A_SUM = 64
"""ROWS_A_SUM of ``native.c``."""
_ALONE = 2**10
"""Indices from which on a second thread is worth waking."""


class NativeError(Exception):
    """The kernels cannot be had here; says why.

    Args:
        why: ends "..., but".
        broken: a compiler is there, and failed.
    """

    def __init__(self, why: str, broken: bool = False) -> None:
        super().__init__(why)
        self.broken = broken


class _Lookup(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "ids", "offsets", "tables", "factors")),
        *((name, ctypes.c_void_p) for name in ("vectors", "rows", "bags")),
        *((name, ctypes.c_int64) for name in ("bag_count", "table_count", "width", "row_count")),
        ("bf16", ctypes.c_bool),
        ("wrong", ctypes.c_int64),
        ("next", ctypes.c_int64),
    ]


class _Update(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "first", "second", "rows", "bags", "factors", "gradient")),
        *((name, ctypes.c_void_p) for name in ("scratch", "counts")),
        *((name, ctypes.c_int64) for name in ("count", "width", "bits", "high", "digit")),
        ("bf16", ctypes.c_bool),
        ("rule", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("rate", "decay_factor", "l2", "epsilon")),
        *((name, ctypes.c_float) for name in ("share1", "beta2", "share2", "correction2", "adam_rate")),
        *((name, ctypes.c_int64) for name in ("next_bucket", "next_chunk")),
    ]


class _Pairs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("first", "others", "out", "grad_first", "grad_others", "spaces")),
        *((name, ctypes.c_int64) for name in ("samples", "vectors", "width", "space")),
        *((name, ctypes.c_bool) for name in ("bf16_first", "bf16_others", "self_interaction")),
    ]


class _ReluBF16(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("count", ctypes.c_int64)]


class _Relu(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad", "activation", "transposed", "sums")),
        *((name, ctypes.c_int64) for name in ("samples", "width")),
        ("bf16", ctypes.c_bool),
    ]


@cache
def library() -> ctypes.CDLL:
    """The kernels; compiles them where the cache has none.

    Raises:
        NativeError: they cannot be had here.
    """
    if sys.platform != "linux":
        raise NativeError(f"the native kernels are for Linux, and this is {sys.platform}")
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    missing = [name for name in _THREADS if not hasattr(torch_library, name)]
    if missing:
        raise NativeError(f"torch here has no {missing[0]}, by which the native kernels would use its threads")
    try:
        native = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError) as error:
        # Without a home, for instance.
        told = (
            f"the native kernels cannot be made, kept in the cache ($LIGHTNING_DLRM_CACHE) or loaded from it: {error}"
        )
        raise NativeError(told, broken=True) from error
    native.use_threads.argtypes = [ctypes.c_void_p] * len(_THREADS)
    native.use_threads(*(ctypes.cast(getattr(torch_library, name), ctypes.c_void_p) for name in _THREADS))
    functions = {
        "look_up": _Lookup,
        "update_rows": _Update,
        "pair_products": _Pairs,
        "relu_bf16": _ReluBF16,
        "relu_gradients": _Relu,
    }
    for name, arguments in functions.items():
        getattr(native, name).argtypes = [ctypes.POINTER(arguments), ctypes.c_int]
        getattr(native, name).restype = None
    return native


def compiler() -> list[str]:
    """The command of the C compiler: ``$CC``, or the first of cc, gcc and clang that there is.

    Raises:
        NativeError: there is none.
    """
    try:
        asked = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise NativeError(f"CC is {os.environ['CC']}, which is no command: {error}", broken=True) from error
    found = [name for name in ([asked[0]] if asked else ["cc", "gcc", "clang"]) if shutil.which(name)]
    if not found:
        raise NativeError(
            f"CC is {asked[0]}, which is not there" if asked else "no C compiler is installed (cc, gcc or clang)",
            broken=bool(asked),
        )
    return [found[0], *asked[1:]]


def lookup(
    weight_RD: Tensor, values_N: Tensor, offsets: Tensor | None, tables_F: Tensor, factors_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The (weighted) sum of each bag's rows, zeros for an empty one, by a kernel that fetches rows ahead.

    Args:
        weight_RD: float32 or bfloat16.
        values_N: int32, the id of each index within its table.
        offsets: int64 [B + 1], where each bag begins; None for one id each.
        tables_F: int32, where each table begins; bag b is of table b % F.
        factors_N: a factor for each index; None means 1.

    Returns:
        [B, D], of the weight's type; int32 [N], the row of each index; int64 [N], its bag, or [0] without ``offsets``.

    Raises:
        IndexError: an id is outside the tables.
    """
    return torch.ops.lightning_dlrm.lookup(weight_RD, values_N, offsets, tables_F, factors_N)


def update(
    weight_RD: Tensor,
    gradient: RowGradient,
    state: Mapping[str, Tensor],
    rule: str,
    settings: Mapping[str, float],
    learning_rate: float,
    step: float,
) -> None:
    """Sorts lookups by row, sums the gradients of each row and moves the row and its state along them, in place.

    Bit for bit ``UpdateRule.apply`` of the sums for SGD and Adagrad; for the others but for torch's square roots, which
    are not always rounded to nearest, and for the mean squares of rows of less than eight.

    Args:
        weight_RD: float32 or bfloat16, contiguous.
        gradient: of its rows.
        state: the rule's slots, float32 [R, D] or [R], contiguous.
        rule: ``sgd``, ``adagrad``, ``row_wise_adagrad`` or ``adam``.
        settings: of the rule.
        learning_rate: of this step.
        step: its number, from 1.
    """
    rows, width = weight_RD.shape
    if isinstance(gradient, LookupGradient) and not gradient.summed:
        rows_N, bag_N, factors_N = gradient.lookups
        output, bits = gradient.output, max((rows - 1).bit_length(), 1)
    else:
        rows_N, bag_N, factors_N = gradient.rows, None, None
        output, bits = gradient.values, 0
    rows_N, output = rows_N.int().contiguous(), output.float().contiguous()
    bag_N = None if bag_N is None else bag_N.long().contiguous()
    factors_N = None if factors_N is None else factors_N.float().contiguous()
    count = len(rows_N)
    threads = _threads(count)
    high = min(max((count // _A_BUCKET).bit_length() - 1, 0), _DIGIT, bits)
    passes = max(-(-(bits - high) // _DIGIT), 1)
    scratch, counts = torch.empty(2 * count, dtype=torch.int64), torch.empty(threads + 1 << high, dtype=torch.int32)
    beta1, beta2 = settings.get("beta1", 0.0), settings.get("beta2", 0.0)
    first, second = (*state.values(), None, None)[:2]
    all_ = _Update(
        weight=_at(weight_RD),
        first=_at(first),
        second=_at(second),
        rows=_at(rows_N),
        bags=_at(bag_N),
        factors=_at(factors_N),
        gradient=_at(output),
        scratch=_at(scratch),
        counts=_at(counts),
        count=count,
        width=width,
        bits=bits,
        high=high,
        digit=max(-(-(bits - high) // passes), 1),
        bf16=weight_RD.dtype == torch.bfloat16,
        rule=_RULES.index(rule),
        rate=learning_rate,
        decay_factor=1 - learning_rate * settings["weight_decay"],
        l2=settings["l2"],
        epsilon=settings.get("epsilon", 0.0),
        share1=1 - beta1,
        beta2=beta2,
        share2=1 - beta2,
        correction2=1 - beta2**step,
        adam_rate=learning_rate / (1 - beta1**step),
    )
    library().update_rows(all_, threads)


def _look_up(
    weight_RD: Tensor, values_N: Tensor, offsets: Tensor | None, tables_F: Tensor, factors_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    values_N, weight_RD = values_N.flatten().contiguous(), weight_RD.contiguous()
    if offsets is not None:
        offsets = offsets.long().contiguous()
        if not (len(offsets) and offsets[0] == 0 and offsets[-1] == len(values_N)):
            ends = f"{offsets[:1].tolist()} and {offsets[-1:].tolist()}"
            raise IndexError(
                f"offsets of bags begin and end with {ends}, expected 0 and the ids' number {len(values_N):,}"
            )
    count, bags = len(values_N), len(values_N) if offsets is None else len(offsets) - 1
    # The plain path rounds factors to the weight's type as well.
    factors_N = None if factors_N is None else factors_N.flatten().to(weight_RD.dtype).float().contiguous()
    vectors_BD = torch.empty(bags, weight_RD.shape[1], dtype=weight_RD.dtype)
    rows_N = torch.empty(count, dtype=torch.int32)
    bag_N = torch.empty(0 if offsets is None else count, dtype=torch.int64)
    all_ = _Lookup(
        weight=_at(weight_RD),
        ids=_at(values_N),
        offsets=_at(offsets),
        tables=_at(tables_F),
        factors=_at(factors_N),
        vectors=_at(vectors_BD),
        rows=_at(rows_N),
        bags=None if offsets is None else _at(bag_N),
        bag_count=bags,
        table_count=len(tables_F),
        width=weight_RD.shape[1],
        row_count=weight_RD.shape[0],
        bf16=weight_RD.dtype == torch.bfloat16,
    )
    library().look_up(all_, _threads(count))
    if all_.wrong == count:
        raise IndexError("the offsets of bags do not ascend")
    if all_.wrong >= 0:
        raise IndexError(
            f"id {values_N[all_.wrong]} at place {all_.wrong} is outside the tables, which have {weight_RD.shape[0]:,} "
            "rows together"
        )
    return vectors_BD, rows_N, bag_N


def pair_products(first_BD: Tensor, others_BVD: Tensor, self_interaction: bool) -> Tensor:
    """Each sample's first vector, then the dot products of its pairs of vectors (i, j), j < i, row by row.

    Args:
        first_BD: float32 or bfloat16; the result has its type, sums are taken in float32.
        others_BVD: the other vectors, either type.
        self_interaction: also take the pairs (i, i).

    Returns:
        [B, D + P].
    """
    return torch.ops.lightning_dlrm.pair_products(first_BD, others_BVD, self_interaction)


def pair_gradients(
    first_BD: Tensor, others_BVD: Tensor, grad_Bn: Tensor, self_interaction: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of both arguments of ``pair_products``, from that of its result."""
    return torch.ops.lightning_dlrm.pair_gradients(first_BD, others_BVD, grad_Bn, self_interaction)


def _pair_products(first_BD: Tensor, others_BVD: Tensor, self_interaction: bool) -> Tensor:
    samples, others, width = others_BVD.shape
    pairs = others * (others + 1) // 2 + (others + 1 if self_interaction else 0)
    out_Bn = first_BD.new_empty(samples, width + pairs)
    _call_pairs(first_BD, others_BVD, self_interaction, out_Bn)
    return out_Bn


def _pair_gradients(
    first_BD: Tensor, others_BVD: Tensor, grad_Bn: Tensor, self_interaction: bool
) -> tuple[Tensor, Tensor]:
    # Contiguous, whatever the arguments are.
    grads = torch.empty(first_BD.shape, dtype=first_BD.dtype), torch.empty(others_BVD.shape, dtype=others_BVD.dtype)
    _call_pairs(first_BD, others_BVD, self_interaction, grad_Bn.contiguous(), *grads)
    return grads


def _call_pairs(first_BD: Tensor, others_BVD: Tensor, self_interaction: bool, out_Bn: Tensor, *grads: Tensor) -> None:
    first_BD, others_BVD = first_BD.contiguous(), others_BVD.contiguous()
    grad_first, grad_others = (*grads, None, None)[:2]
    all_ = _Pairs(
        first=_at(first_BD),
        others=_at(others_BVD),
        out=_at(out_Bn),
        grad_first=_at(grad_first),
        grad_others=_at(grad_others),
        samples=others_BVD.shape[0],
        vectors=others_BVD.shape[1] + 1,
        width=others_BVD.shape[2],
        bf16_first=first_BD.dtype == torch.bfloat16,
        bf16_others=others_BVD.dtype == torch.bfloat16,
        self_interaction=self_interaction,
    )
    threads, vectors, width = _threads(out_Bn.numel()), all_.vectors + 15 & ~15, all_.width + 15 & ~15
    # What lies beyond the vectors is zero, and stays so.
    spaces = torch.zeros(threads, 3 * vectors * width + 2 * vectors * vectors + width, dtype=torch.float32)
    all_.spaces, all_.space = _at(spaces), spaces.shape[1]
    library().pair_products(all_, threads)


def relu_bf16(values: Tensor) -> Tensor:
    """The ReLU of bfloat16, contiguous; in place. What is no number stays."""
    return torch.ops.lightning_dlrm.relu_bf16(values)


def _relu_bf16(values: Tensor) -> Tensor:
    all_ = _ReluBF16(values=_at(values), count=values.numel())
    library().relu_bf16(all_, _threads(values.numel()))
    return values


def relu_gradients(grad_Bd: Tensor, activation_Bd: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """The backward pass of a ReLU and of the bias before it.

    Args:
        grad_Bd: gradient of the ReLU's result, float32 or bfloat16, contiguous; in place that of its input.
        activation_Bd: the ReLU's result, of the same type.
        transposed: whether that is wanted transposed, as well.

    Returns:
        [d, B], or [0] without ``transposed``; float32 [d], the gradient of the bias.
    """
    return torch.ops.lightning_dlrm.relu_gradients(grad_Bd, activation_Bd, transposed)


def _relu_gradients(grad_Bd: Tensor, activation_Bd: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    samples, width = grad_Bd.shape
    activation_Bd = activation_Bd.contiguous()
    transposed_dB = grad_Bd.new_empty((width, samples) if transposed else 0)
    parts = -(-samples // _ROWS_A_SUM) if samples else 1
    sums = torch.zeros(parts, width, dtype=torch.float32)
    all_ = _Relu(
        grad=_at(grad_Bd),
        activation=_at(activation_Bd),
        transposed=_at(transposed_dB) if transposed else None,
        sums=_at(sums),
        samples=samples,
        width=width,
        bf16=grad_Bd.dtype == torch.bfloat16,
    )
    if samples:
        library().relu_gradients(all_, _threads(grad_Bd.numel()))
    return transposed_dB, sums[0]


# Operators of torch, so that whoever records or counts a step's operators sees it.
_operators = torch.library.Library("lightning_dlrm", "DEF")
_operators.define(
    "lookup(Tensor weight, Tensor values, Tensor? offsets, Tensor tables, Tensor? factors) -> (Tensor, Tensor, Tensor)"
)
_operators.define("pair_products(Tensor first, Tensor others, bool self_interaction) -> Tensor")
_operators.define("pair_gradients(Tensor first, Tensor others, Tensor grad, bool self_interaction) -> (Tensor, Tensor)")
_operators.define("relu_bf16(Tensor(a!) values) -> Tensor(a!)")
_operators.define("relu_gradients(Tensor(a!) grad, Tensor activation, bool transposed) -> (Tensor, Tensor)")
_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "lookup": _look_up,
    "pair_products": _pair_products,
    "pair_gradients": _pair_gradients,
    "relu_bf16": _relu_bf16,
    "relu_gradients": _relu_gradients,
}
for _name, _implementation in _IMPLEMENTATIONS.items():
    _operators.impl(_name, _implementation, "CPU")


def implementation(operation: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """What does an operation on a CPU, if it is one of these: torch finds it again at every call."""
    return _IMPLEMENTATIONS.get(operation._opname) if operation.namespace == "lightning_dlrm" else None


def _threads(count: int) -> int:
    return torch.get_num_threads() if count >= _ALONE else 1


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _compiled() -> Path:
    """The library's file in the cache. Written elsewhere first, so that processes at the same time are safe."""
    command = [*compiler(), *_FLAGS.split()]
    version = _run([*compiler(), "--version"]).stdout
    key = hashlib.sha256("\n".join([_SOURCE.read_text(), *command, version, _processor()]).encode()).hexdigest()
    path = cache_root() / f"native-{key[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".native-") as folder:
        made = Path(folder) / path.name
        done = _run([*command, str(_SOURCE), "-o", str(made), "-lm"])
        if done.returncode or not made.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            told = next((line for line in lines if "error" in line), lines[0] if lines else "it wrote nothing")
            raise NativeError(f"the C compiler {command[0]} failed: {told.strip()}", broken=True)
        # Or a power cut could leave a part of it under its name.
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(path)
    return path


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def _processor() -> str:
    """What the compiler sees of this processor."""
    told = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    # Frequencies and the like change from one moment to the next.
    kept = [line for line in told.splitlines() if line.lower().startswith(("vendor", "cpu ", "model", "flags", "feat"))]
    return "\n".join([platform.machine(), *(line for line in kept if "MHz" not in line)])
