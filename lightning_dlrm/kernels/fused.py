"""Fused lookup and fused update of table rows in Triton, for GPUs, as operators of torch.

Import it only if ``choose`` says triton: torch for CPUs comes without it. Shapes do not depend on the values of ids and
nothing is read back from the device, so that a CUDA graph can hold all of it; ids are not checked for the same reason.

Shape suffixes: B bags (output vectors), F tables, D width, R rows of all tables, N indices of all bags,
C sorted indices that one program handles.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dlrm.kernels.operators import check_update, count_change, nothing, register

BLOCKS_PER_READ = 32
_INTEGERS = (torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.bfloat16)
_FACTORS = (*_FLOATS, torch.float16, torch.float64)


class Layout(NamedTuple):
    """How a kernel divides its work, for a table's width: the most that spills no registers on sm_80, sm_90, sm_100.

    ``columns`` is D, the width rounded up to a power of 2; ``items`` are the bags or sorted indices of a program.
    """

    columns: int
    items: int
    warps: int


def lookup_layout(width: int) -> Layout:
    columns = triton.next_power_of_2(width)
    return Layout(columns, 16 if columns <= 64 else 8, 4)


def update_layout(width: int) -> Layout:
    columns = max(16, triton.next_power_of_2(width))
    return Layout(columns, 64 if columns <= 16 else 32 if columns <= 128 else 16, 8)


def lookup(
    weight_RD: Tensor, ids_N: Tensor, row_offsets_F: Tensor, offsets: Tensor | None, factors_N: Tensor | None
) -> Tensor:
    """Return the (weighted) sum of each bag's rows: [B, D], of the weight's dtype; zeros for empty bags.

    Differentiable in ``weight_RD``, whose gradient is dense, and in ``factors_N``.

    Args:
        weight_RD: float32 or bfloat16.
        ids_N: int32 or int64, each within its own table; ids after the last bag are ignored.
        row_offsets_F: int32 or int64, where each table begins; bag b is of table b % F.
        offsets: int64 [B + 1], where each bag begins; None if each bag has one id.
        factors_N: a factor for each index; None means 1.

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes or devices are not those above.
    """
    return torch.ops.lightning_dlrm.fused_lookup(weight_RD, ids_N, row_offsets_F, offsets, factors_N)


def update(
    weight_RD: Tensor,
    rows_N: Tensor,
    grad_BD: Tensor,
    bags_N: Tensor | None,
    factors_N: Tensor | None,
    state: Mapping[str, Tensor],
    rule: str,
    settings: Mapping[str, float],
    scalars_4: Tensor,
) -> None:
    """Sum the gradients of each unique row, and update the row and its state, in place.

    Sums are taken in a fixed order, so equal calls give equal bits. A NaN or infinite gradient may spoil rows beside
    its own.

    Args:
        weight_RD: float32 or bfloat16, contiguous.
        rows_N: int32 or int64, the row of each index, in any order; indices with row R are ignored.
        grad_BD: the gradient of each output vector.
        bags_N: int64, the output vector that each index went into; None if index i went into vector i.
        factors_N: a factor for each index; None means 1.
        state: optimizer state of the rule, float32 [R, D] or [R], contiguous.
        rule: ``sgd``, ``adagrad``, ``row_wise_adagrad`` or ``adam``.
        settings: the rule's hyperparameters, by name.
        scalars_4: float32: the learning rate, 1 - learning rate * weight decay, and Adam's two bias corrections.

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes, devices or strides are not those above.
    """
    numbers = [settings.get(name, 0.0) for name in ("l2", "epsilon", "beta1", "beta2")]
    torch.ops.lightning_dlrm.fused_update(
        weight_RD, list(state.values()), rows_N, grad_BD, bags_N, factors_N, scalars_4, rule, *numbers
    )


def _check(function: str, device: torch.device, **arguments: tuple[Tensor | None, tuple[torch.dtype, ...]]) -> None:
    """Raise a TypeError for tensors that are on another device, not contiguous or of another dtype."""
    for name, (tensor, dtypes) in arguments.items():
        if tensor is not None and not (tensor.dtype in dtypes and tensor.device == device and tensor.is_contiguous()):
            raise TypeError(
                f"{function}: {name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}; expected a "
                f"contiguous tensor of {' or '.join(map(str, dtypes))} on {device}"
            )


def _lookup(
    weight_RD: Tensor, ids_N: Tensor, row_offsets_F: Tensor, offsets: Tensor | None, factors_N: Tensor | None
) -> Tensor:
    weight_RD, ids_N, row_offsets_F = weight_RD.contiguous(), ids_N.flatten().contiguous(), row_offsets_F.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    factors_N = None if factors_N is None else factors_N.flatten().contiguous()
    _check(
        "fused_lookup",
        weight_RD.device,
        weight=(weight_RD, _FLOATS),
        ids=(ids_N, _INTEGERS),
        row_offsets=(row_offsets_F, _INTEGERS),
        offsets=(offsets, (torch.int64,)),
        factors=(factors_N, _FACTORS),
    )
    if weight_RD.dim() != 2 or not len(row_offsets_F) or (factors_N is not None and factors_N.shape != ids_N.shape):
        raise ValueError(
            f"fused_lookup: a weight of {list(weight_RD.shape)}, {len(row_offsets_F)} tables, {len(ids_N)} ids; "
            "expected two dimensions, a table, and a factor for each id"
        )
    out_BD = _lookup_results(weight_RD, ids_N, row_offsets_F, offsets, factors_N)
    bags, width = out_BD.shape
    if bags:
        layout, or_ids = lookup_layout(width), lambda given: ids_N if given is None else given
        _lookup_kernel[(triton.cdiv(bags, layout.items),)](
            *(weight_RD, ids_N, row_offsets_F, or_ids(offsets), or_ids(factors_N), out_BD),
            *(bags, len(row_offsets_F), width),
            HAS_BAGS=offsets is not None,
            WEIGHTED=factors_N is not None,
            BAGS=layout.items,
            D=layout.columns,
            num_warps=layout.warps,
            enable_fp_fusion=True,
        )
    return out_BD


def _lookup_results(
    weight_RD: Tensor, ids_N: Tensor, row_offsets_F: Tensor, offsets: Tensor | None, factors_N: Tensor | None
) -> Tensor:
    """Return a tensor for ``lookup``'s result, not yet filled."""
    return weight_RD.new_empty(ids_N.numel() if offsets is None else offsets.shape[0] - 1, weight_RD.shape[1])


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_lookup(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
    weight_RD, ids_N, row_offsets_F, offsets, factors_N = ctx.saved_tensors
    rows, bags_N = weight_RD.shape[0], torch.arange(ids_N.numel(), device=ids_N.device)
    if offsets is not None:
        # Indices after the last bag get the gradient of an additional bag, which is zero.
        bags_N = torch.searchsorted(offsets, bags_N, right=True) - 1
        grad_BD = torch.cat([grad_BD, grad_BD.new_zeros(1, grad_BD.shape[1])])
    inside_N = bags_N < grad_BD.shape[0] - (offsets is not None)
    rows_N = ids_N.flatten() + row_offsets_F[bags_N % row_offsets_F.shape[0]]
    rows_N, grad_ND = torch.where(inside_N, rows_N, 0), grad_BD.index_select(0, bags_N)
    grad_weight = grad_factors = None
    if ctx.needs_input_grad[0]:
        parts_ND = grad_ND if factors_N is None else grad_ND * factors_N.flatten()[:, None].to(grad_ND.dtype)
        grad_weight = grad_ND.new_zeros(rows, grad_ND.shape[1]).index_add(0, rows_N, parts_ND)
    if ctx.needs_input_grad[4]:
        grad_factors = (weight_RD.index_select(0, rows_N) * grad_ND).sum(1).to(factors_N.dtype).view(factors_N.shape)
    return grad_weight, None, None, None, grad_factors


def _update(
    weight_RD: Tensor,
    state: list[Tensor],
    rows_N: Tensor,
    grad_BD: Tensor,
    bags_N: Tensor | None,
    factors_N: Tensor | None,
    scalars_4: Tensor,
    rule: str,
    l2: float,
    epsilon: float,
    beta1: float,
    beta2: float,
) -> None:
    grad_BD = grad_BD.contiguous()
    bags_N, factors_N = (None if x is None else x.contiguous() for x in (bags_N, factors_N))
    check_update(weight_RD, state, rows_N, grad_BD, bags_N, factors_N, rule)
    if scalars_4.shape != (4,):
        raise ValueError(f"fused_update: scalars of {list(scalars_4.shape)}; expected four")
    _check(
        "fused_update",
        weight_RD.device,
        weight=(weight_RD, _FLOATS),
        **{f"state[{i}]": (x, (torch.float32,)) for i, x in enumerate(state)},
        rows=(rows_N, _INTEGERS),
        grad=(grad_BD, _FACTORS),
        bags=(bags_N, (torch.int64,)),
        factors=(factors_N, _FACTORS),
        scalars=(scalars_4, (torch.float32,)),
    )
    if not len(rows_N):
        return
    rows, width = weight_RD.shape
    sorted_N, order_N = torch.sort(rows_N, stable=True)
    layout = update_layout(width)
    blocks = triton.cdiv(len(rows_N), layout.items)
    # Partial sums of rows whose indices are in several blocks: one of the row's first block, one of each later block.
    first_sums, later_sums = (grad_BD.new_empty(blocks, layout.columns, dtype=torch.float32) for _ in range(2))
    first, second = (*state, weight_RD, weight_RD)[:2]
    tensors, sizes = (weight_RD, first, second, scalars_4, sorted_N), (len(rows_N), rows, width)
    formula = {"RULE": rule, "L2": l2, "EPSILON": epsilon, "BETA1": beta1, "BETA2": beta2}
    formula |= {"C": layout.items, "D": layout.columns, "num_warps": layout.warps, "enable_fp_fusion": True}
    _update_kernel[(blocks,)](
        *tensors,
        order_N,
        grad_BD,
        order_N if bags_N is None else bags_N,
        grad_BD if factors_N is None else factors_N,
        first_sums,
        later_sums,
        *sizes,
        HAS_BAGS=bags_N is not None,
        WEIGHTED=factors_N is not None,
        **formula,
    )
    _update_spread_kernel[(blocks,)](*tensors, first_sums, later_sums, *sizes, BLOCKS=BLOCKS_PER_READ, **formula)
    count_change(weight_RD, *state)


# A count that happens to be 1 or a multiple of 16 must not cause a new compilation.
@triton.jit(do_not_specialize=["bags"])
def _lookup_kernel(
    weight,
    ids,
    row_offsets,
    offsets,
    factors,
    out,
    bags,
    tables,
    width,
    HAS_BAGS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BAGS: tl.constexpr,
    D: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    column = tl.arange(0, D)
    live = bag < bags
    in_row = column[None, :] < width
    table_start = tl.load(row_offsets + bag % tables, mask=live, other=0).to(tl.int64)
    if HAS_BAGS:
        begin = tl.load(offsets + bag, mask=live, other=0)
        end = tl.load(offsets + bag + 1, mask=live, other=0)
    else:
        begin = bag
        end = tl.where(live, bag + 1, bag)
    total = tl.zeros((BAGS, D), dtype=tl.float32)
    for step in range(tl.max(end - begin)):
        at = begin + step
        there = at < end
        row = tl.load(ids + at, mask=there, other=0).to(tl.int64) + table_start
        values = tl.load(weight + row[:, None] * width + column[None, :], mask=there[:, None] & in_row, other=0.0)
        values = values.to(tl.float32)
        if WEIGHTED:
            values *= tl.load(factors + at, mask=there, other=0.0).to(tl.float32)[:, None]
        total += values
    tl.store(out + bag[:, None] * width + column[None, :], total, mask=live[:, None] & in_row)


@triton.jit
def _apply_rule(
    row,
    moves,
    sums,
    weight,
    first,
    second,
    scalars,
    width,
    RULE: tl.constexpr,
    L2: tl.constexpr,
    EPSILON: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    D: tl.constexpr,
):
    """Apply the rule to some rows [n] with summed gradients ``sums`` [n, D]; only rows with ``moves`` change."""
    column = tl.arange(0, D)
    place = row[:, None] * width + column[None, :]
    mask = moves[:, None] & (column[None, :] < width)
    rate = tl.load(scalars)
    values = tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
    if L2 != 0.0:
        sums += L2 * values
    values *= tl.load(scalars + 1)
    if RULE == "sgd":
        values -= sums * rate
    elif RULE == "adagrad":
        squares = tl.load(first + place, mask=mask, other=1.0) + sums * sums
        tl.store(first + place, squares, mask=mask)
        values -= sums / (tl.sqrt(squares) + EPSILON) * rate
    elif RULE == "row_wise_adagrad":
        square = tl.load(first + row, mask=moves, other=1.0) + tl.sum(sums * sums, axis=1) / width
        tl.store(first + row, square, mask=moves)
        values -= sums * (rate / (tl.sqrt(square) + EPSILON))[:, None]
    else:
        mean = tl.load(first + place, mask=mask, other=0.0)
        mean += (sums - mean) * (1 - BETA1)
        square = tl.load(second + place, mask=mask, other=0.0) * BETA2 + sums * sums * (1 - BETA2)
        tl.store(first + place, mean, mask=mask)
        tl.store(second + place, square, mask=mask)
        spread = tl.sqrt(square / tl.load(scalars + 3)) + EPSILON
        values -= mean / spread * (rate / tl.load(scalars + 2))
    tl.store(weight + place, values, mask=mask)


@triton.jit(do_not_specialize=["count", "table_rows"])
def _update_kernel(
    weight,
    first,
    second,
    scalars,
    rows,
    order,
    grad,
    bags,
    factors,
    first_sums,
    later_sums,
    count,
    table_rows,
    width,
    HAS_BAGS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RULE: tl.constexpr,
    L2: tl.constexpr,
    EPSILON: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
):
    """Update the rows whose indices are all in this block of sorted indices, and store partial sums of other rows."""
    block = tl.program_id(0).to(tl.int64)
    at = block * C + tl.arange(0, C)
    column = tl.arange(0, D)
    inside = at < count
    row = tl.load(rows + at, mask=inside, other=table_rows).to(tl.int64)
    counts = row < table_rows
    index = tl.load(order + at, mask=inside, other=0)
    vector = index
    if HAS_BAGS:
        vector = tl.load(bags + index, mask=counts, other=0)
    values = tl.load(
        grad + vector[:, None] * width + column[None, :],
        mask=counts[:, None] & (column[None, :] < width),
        other=0.0,
    ).to(tl.float32)
    if WEIGHTED:
        values *= tl.load(factors + index, mask=counts, other=0.0).to(tl.float32)[:, None]
    # Each index gets the sum over all indices of the block with its row.
    same = (row[:, None] == row[None, :]).to(tl.float32)
    sums = tl.dot(same, values, input_precision="ieee")
    before = tl.load(rows + at - 1, mask=inside & (at > 0), other=-1).to(tl.int64)
    after = tl.load(rows + (block + 1) * C, mask=(block + 1) * C < count, other=table_rows).to(tl.int64)
    begins = counts & (row != before)
    goes_on = row == after
    _apply_rule(
        row, begins & (row != after), sums, weight, first, second, scalars, width, RULE, L2, EPSILON, BETA1, BETA2, D
    )
    place = block * D + column[None, :] + tl.zeros((C, 1), dtype=tl.int64)
    tl.store(first_sums + place, sums, mask=(begins & goes_on)[:, None])
    tl.store(later_sums + place, sums, mask=((at == block * C) & counts & (row == before))[:, None])


@triton.jit(do_not_specialize=["count", "table_rows"])
def _update_spread_kernel(
    weight,
    first,
    second,
    scalars,
    rows,
    first_sums,
    later_sums,
    count,
    table_rows,
    width,
    RULE: tl.constexpr,
    L2: tl.constexpr,
    EPSILON: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Update the row that begins in this block and continues in the next blocks, if there is such a row."""
    block = tl.program_id(0).to(tl.int64)
    start, stop = block * C, (block + 1) * C
    column = tl.arange(0, D)
    row = tl.load(rows + stop, mask=stop < count, other=table_rows).to(tl.int64)
    last = tl.load(rows + stop - 1, mask=stop < count, other=table_rows).to(tl.int64)
    head = tl.load(rows + start).to(tl.int64)
    before = tl.load(rows + start - 1, mask=start > 0, other=-1).to(tl.int64)
    if (row < table_rows) & (last == row) & ((head != row) | (before != row)):
        total = tl.load(first_sums + block * D + column)
        follower = block + 1
        more = True
        while more:
            blocks = follower + tl.arange(0, BLOCKS)
            same = tl.load(rows + blocks * C, mask=blocks * C < count, other=-1).to(tl.int64) == row
            parts = tl.load(later_sums + blocks[:, None] * D + column[None, :], mask=same[:, None], other=0.0)
            total += tl.sum(parts, axis=0)
            follower += BLOCKS
            more = tl.min(same.to(tl.int32)) > 0
        only = tl.zeros((1,), dtype=tl.int64) + row
        _apply_rule(
            only, only < table_rows, total[None, :], weight, first, second, scalars, width,
            RULE, L2, EPSILON, BETA1, BETA2, D,
        )  # fmt: skip


register(
    "fused_lookup(Tensor weight, Tensor ids, Tensor row_offsets, Tensor? offsets, Tensor? factors) -> Tensor",
    _lookup,
    _lookup_results,
    _differentiate_lookup,
    _save_lookup,
    devices=("CPU", "CUDA"),
)
register(
    "fused_update(Tensor(a!) weight, Tensor(b!)[] state, Tensor rows, Tensor grad, Tensor? bags, Tensor? factors, "
    "Tensor scalars, str rule, float l2, float epsilon, float beta1, float beta2) -> ()",
    _update,
    nothing,
    devices=("CPU", "CUDA"),
)
