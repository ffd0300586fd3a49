"""Lookup, sort and update of table rows on a CPU, with ``native.c``.

The kernels run in torch's own threads, and their results do not depend on the number of threads. Sums are taken in
float32.

Shape suffixes: B bags (output vectors), F tables, D width, R rows of all tables, N indices of all bags.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dlrm.kernels.compiled import call
from lightning_dlrm.kernels.operators import check_update, count_change, nothing, register, threads

_INT32_MAX = torch.iinfo(torch.int32).max
_RULES = ("sgd", "adagrad", "row_wise_adagrad", "adam")
_DIGIT_BITS = 9
"""Largest number of bits that one pass sorts by: the counters stay in the first-level cache."""
_BUCKET_INDICES = 2**11
"""Smallest mean number of indices of a bucket; each bucket is sorted by the lower bits alone."""
_LONE_BUCKET_INDICES = 2**15
"""The same for one thread, which needs buckets for its caches alone."""


def lookup(
    weight_RD: Tensor, ids_N: Tensor, offsets: Tensor | None, tables_F: Tensor, factors_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the (weighted) sum of each bag's rows, zeros for empty bags; the kernel prefetches rows.

    Differentiable in ``weight_RD``, whose gradient is dense, and in ``factors_N``.

    Args:
        weight_RD: float32 or bfloat16.
        ids_N: int32, the id of each index within its table.
        offsets: integers [B + 1], where each bag begins; None if each bag has one id.
        tables_F: int32, where each table begins; bag b is of table b % F.
        factors_N: a factor for each index, rounded to the weight's dtype; None means 1.

    Returns:
        [B, D], of the weight's dtype; int32 [N], the row of each index; int64 [N], its bag, or [0] without ``offsets``.

    Raises:
        IndexError: an id is outside the tables, or the offsets do not ascend from 0 to N.
        ValueError: the shapes do not fit each other.
        TypeError: dtypes or devices are not those above.
    """
    return torch.ops.lightning_dlrm.lookup(weight_RD, ids_N, offsets, tables_F, factors_N)


def sort(rows_N: Tensor, stop: int) -> tuple[Tensor, Tensor]:
    """Sort rows, as ``torch.sort(rows_N, stable=True)`` does in four times the time.

    Args:
        rows_N: int32, from 0 to ``stop`` - 1.
        stop: bound of the rows.

    Returns:
        The sorted rows, int32 [N], and their indices, int64 [N]; the indices of equal rows ascend.

    Raises:
        IndexError: a row is out of bounds.
    """
    return torch.ops.lightning_dlrm.sort(rows_N, stop)


def update(
    weight_RD: Tensor,
    rows_N: Tensor,
    grad_BD: Tensor,
    bags_N: Tensor | None,
    factors_N: Tensor | None,
    ascending: bool,
    state: Sequence[Tensor],
    rule: str,
    settings: Mapping[str, float],
    learning_rate: float,
    step: float,
) -> None:
    """Sort lookups by row, sum the gradients of each row, and update the row and its state, in place.

    For SGD and Adagrad the results are bit for bit those of ``UpdateRule.apply`` with the sums. For row-wise Adagrad
    and Adam they differ in two cases: torch does not always round square roots to nearest, and it takes the mean square
    of fewer than eight elements in another order.

    Args:
        weight_RD: float32 or bfloat16, contiguous; at most 2^31 - 1 rows.
        rows_N: integers, the row of each index.
        grad_BD: the gradient of each output vector.
        bags_N: integers, the output vector that each index went into; None if index i went into vector i.
        factors_N: a factor for each index; None means 1.
        ascending: whether the rows are unique and ascend, so that they need no sorting.
        state: optimizer state of the rule, float32 [R, D] or [R], contiguous.
        rule: ``sgd``, ``adagrad``, ``row_wise_adagrad`` or ``adam``.
        settings: the rule's hyperparameters, by name.
        learning_rate: learning rate of this step.
        step: number of this step, from 1.

    Raises:
        IndexError: a row is not in the table, or a bag is not in the gradient.
        ValueError: the shapes do not fit each other.
        TypeError: dtypes, devices or strides are not those above.
    """
    names = ("l2", "weight_decay", "epsilon", "beta1", "beta2")
    numbers = [settings.get(name, 0.0) for name in names]
    torch.ops.lightning_dlrm.update(
        weight_RD, list(state), rows_N, grad_BD, bags_N, factors_N, ascending, rule, learning_rate, step, *numbers
    )


def _lookup(
    weight_RD: Tensor, ids_N: Tensor, offsets: Tensor | None, tables_F: Tensor, factors_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    weight_RD, ids_N, tables_F = weight_RD.contiguous(), ids_N.flatten().contiguous(), tables_F.contiguous()
    count, bags = ids_N.numel(), ids_N.numel() if offsets is None else len(offsets) - 1
    if offsets is not None:
        offsets = offsets.long().contiguous()
        if not (len(offsets) and offsets[0] == 0 and offsets[-1] == count):
            ends = f"{offsets[:1].tolist()} and {offsets[-1:].tolist()}"
            raise IndexError(f"offsets of bags begin and end with {ends}, expected 0 and the number of ids, {count:,}")
    if factors_N is not None:
        factors_N = factors_N.flatten().to(weight_RD.dtype).float().contiguous()
    if (
        weight_RD.dim() != 2
        or (bags and not tables_F.numel())
        or (factors_N is not None and factors_N.numel() != count)
    ):
        raise ValueError(
            f"lookup: a weight of {list(weight_RD.shape)}, {tables_F.numel()} tables, {count} ids and factors of "
            f"{None if factors_N is None else list(factors_N.shape)}; expected two dimensions, a table and a factor "
            "for each id"
        )
    vectors_BD, rows_N, bags_N = _lookup_results(weight_RD, ids_N, offsets, tables_F, factors_N)
    done = call(
        "look_up",
        threads(count),
        weight=weight_RD,
        ids=ids_N,
        offsets=offsets,
        tables=tables_F,
        factors=factors_N,
        vectors=vectors_BD,
        rows=rows_N,
        bags=None if offsets is None else bags_N,
        bag_count=bags,
        table_count=tables_F.numel(),
        width=weight_RD.shape[1],
        row_count=weight_RD.shape[0],
        bf16=weight_RD.dtype == torch.bfloat16,
        wrong=-1,
        next=0,
    )
    if done.wrong == count:
        raise IndexError("the offsets of bags do not ascend")
    if done.wrong >= 0:
        raise IndexError(
            f"id {ids_N[done.wrong]} at place {done.wrong} is outside the tables, which have {weight_RD.shape[0]:,} "
            "rows together"
        )
    return vectors_BD, rows_N, bags_N


def _lookup_results(
    weight_RD: Tensor, ids_N: Tensor, offsets: Tensor | None, tables_F: Tensor, factors_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors for ``lookup``'s results, not yet filled."""
    count = ids_N.numel()
    return (
        weight_RD.new_empty(count if offsets is None else offsets.shape[0] - 1, weight_RD.shape[1]),
        weight_RD.new_empty(count, dtype=torch.int32),
        weight_RD.new_empty(0 if offsets is None else count, dtype=torch.int64),
    )


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    weight_RD, _, offsets, _, factors_N = inputs
    _, rows_N, bags_N = output
    ctx.save_for_backward(weight_RD, rows_N, None if offsets is None else bags_N, factors_N)


def _differentiate_lookup(ctx: Any, grad_BD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    weight_RD, rows_N, bags_N, factors_N = ctx.saved_tensors
    grad_ND = grad_BD if bags_N is None else grad_BD.index_select(0, bags_N)
    grad_weight = grad_factors = None
    if ctx.needs_input_grad[0]:
        parts_ND = grad_ND if factors_N is None else grad_ND * factors_N.flatten()[:, None].to(grad_ND.dtype)
        grad_weight = torch.zeros_like(weight_RD).index_add(0, rows_N, parts_ND)
    if ctx.needs_input_grad[4]:
        grad_factors = (weight_RD.index_select(0, rows_N) * grad_ND).sum(1).to(factors_N.dtype).view(factors_N.shape)
    return grad_weight, None, None, None, grad_factors


def _sort(rows_N: Tensor, stop: int) -> tuple[Tensor, Tensor]:
    if rows_N.dim() != 1 or len(rows_N) > _INT32_MAX:
        raise ValueError(
            f"sort: rows of the shape {list(rows_N.shape)}; expected one dimension with at most {_INT32_MAX} rows"
        )
    _check_bounds("sort: there are rows", rows_N, stop)
    sorted_N, order_N = _sort_results(rows_N, stop)
    number = threads(len(rows_N))
    call(
        "sort_rows",
        number,
        rows=rows_N.contiguous(),
        sorted=sorted_N,
        order=order_N,
        **_sorting(rows_N, stop, number),
    )
    return sorted_N, order_N


def _sort_results(rows_N: Tensor, stop: int) -> tuple[Tensor, Tensor]:
    """Return tensors for ``sort``'s results, not yet filled."""
    return torch.empty_like(rows_N), torch.empty_like(rows_N, dtype=torch.int64)


def _update(
    weight_RD: Tensor,
    state: list[Tensor],
    rows_N: Tensor,
    grad_BD: Tensor,
    bags_N: Tensor | None,
    factors_N: Tensor | None,
    ascending: bool,
    rule: str,
    learning_rate: float,
    step: float,
    l2: float,
    weight_decay: float,
    epsilon: float,
    beta1: float,
    beta2: float,
) -> None:
    if max(*weight_RD.shape, len(rows_N)) > _INT32_MAX:
        raise ValueError(
            f"update: a weight of {list(weight_RD.shape)}, {len(rows_N)} rows; expected {_INT32_MAX} at most"
        )
    check_update(weight_RD, state, rows_N, grad_BD, bags_N, factors_N, rule)
    _check_bounds("update: there are rows", rows_N, len(weight_RD))
    _check_bounds("update: there are bags", bags_N, len(grad_BD))
    first, second = (*state, None, None)[:2]
    number = threads(len(rows_N))
    call(
        "update_rows",
        number,
        weight=weight_RD,
        first=first,
        second=second,
        rows=rows_N.int().contiguous(),
        bags=None if bags_N is None else bags_N.long().contiguous(),
        factors=None if factors_N is None else factors_N.float().contiguous(),
        gradient=grad_BD.float().contiguous(),
        width=weight_RD.shape[1],
        bf16=weight_RD.dtype == torch.bfloat16,
        rule=_RULES.index(rule),
        rate=learning_rate,
        decay_factor=1 - learning_rate * weight_decay,
        l2=l2,
        epsilon=epsilon,
        share1=1 - beta1,
        beta2=beta2,
        share2=1 - beta2,
        correction2=1 - beta2**step,
        adam_rate=learning_rate / (1 - beta1**step),
        next_chunk=0,
        **_sorting(rows_N, 0 if ascending else len(weight_RD), number),
    )
    count_change(weight_RD, *state)


def _sorting(rows_N: Tensor, stop: int, thread_count: int) -> dict[str, Tensor | int]:
    """Return the arguments of C's struct sorting, except the rows and tags; a ``stop`` of 0 means ascending rows.

    ``thread_count`` must be that of the call: ``counts`` has a row for each thread.
    """
    count = len(rows_N)
    bits = max((stop - 1).bit_length(), 1) if stop else 0
    buckets = count // (_LONE_BUCKET_INDICES if thread_count == 1 else _BUCKET_INDICES)
    high = min(max(buckets.bit_length() - 1, 0), _DIGIT_BITS, bits)
    passes = max(-(-(bits - high) // _DIGIT_BITS), 1)
    return {
        "scratch": rows_N.new_empty(2 * count, dtype=torch.int64),
        "counts": rows_N.new_empty(thread_count + 1 << high, dtype=torch.int32),
        "count": count,
        "bits": bits,
        "high": high,
        "digit": max(-(-(bits - high) // passes), 1),
        "next_bucket": 0,
    }


def _check_bounds(found: str, values: Tensor | None, stop: int) -> None:
    if values is not None and values.numel():
        low, high = (int(bound) for bound in values.aminmax())
        if low < 0 or high >= stop:
            raise IndexError(f"{found} {low} to {high}; expected 0 to {stop - 1}")


register(
    "lookup(Tensor weight, Tensor ids, Tensor? offsets, Tensor tables, Tensor? factors) -> (Tensor, Tensor, Tensor)",
    _lookup,
    _lookup_results,
    _differentiate_lookup,
    _save_lookup,
)
register("sort(Tensor rows, SymInt stop) -> (Tensor, Tensor)", _sort, _sort_results)
register(
    "update(Tensor(a!) weight, Tensor(b!)[] state, Tensor rows, Tensor grad, Tensor? bags, Tensor? factors, "
    "bool ascending, str rule, float learning_rate, float step, float l2, float weight_decay, float epsilon, "
    "float beta1, float beta2) -> ()",
    _update,
    nothing,
)
