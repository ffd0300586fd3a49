"""Fused lookup and fused update of table rows in Triton, for GPUs; plain torch does the same elsewhere.

Import it only where ``choose`` says triton: torch for CPUs comes without it. Shapes do not depend on the values of
ids, and nothing is read back from the device, so that a CUDA graph can hold all of it.

Shape suffixes: B bags (output vectors), F tables, D width, R rows of all tables, N indices of all bags,
C sorted indices that one program handles.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BAGS = 16
_SORTED = 64
_BLOCKS = 64


@dataclass(frozen=True)
class Formula:
    """An update rule as the kernel computes it; see ``lightning_dlrm.optim.rules``."""

    rule: str
    """``sgd``, ``adagrad``, ``row_wise_adagrad`` or ``adam``."""
    l2: float = 0.0
    epsilon: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0


def lookup(
    weight_RD: Tensor, ids_N: Tensor, row_offsets_F: Tensor, offsets: Tensor | None, weights_N: Tensor | None
) -> Tensor:
    """[B, D], of the weight's type: for every bag the (weighted) sum of its rows, zeros for an empty one.

    Args:
        ids_N: int32 or int64, each within its own table; those after the last bag count for nothing.
        row_offsets_F: int32 or int64, where each table begins; bag b is of table b % F.
        offsets: int64 [B + 1], where each bag begins; None for one id each.
        weights_N: a factor for each index.
    """
    bags = len(ids_N) if offsets is None else len(offsets) - 1
    out_BD = weight_RD.new_empty(bags, weight_RD.shape[1])
    if bags:
        _lookup_kernel[(triton.cdiv(bags, _BAGS),)](
            weight_RD,
            ids_N,
            row_offsets_F,
            ids_N if offsets is None else offsets,
            ids_N if weights_N is None else weights_N,
            out_BD,
            bags,
            len(row_offsets_F),
            weight_RD.shape[1],
            HAS_BAGS=offsets is not None,
            WEIGHTED=weights_N is not None,
            BAGS=_BAGS,
            D=triton.next_power_of_2(weight_RD.shape[1]),
        )
    return out_BD


def update(
    weight_RD: Tensor,
    rows_N: Tensor,
    grad_BD: Tensor,
    bag_N: Tensor | None,
    weights_N: Tensor | None,
    state: Mapping[str, Tensor],
    formula: Formula,
    scalars_4: Tensor,
) -> None:
    """Sums the gradients of each distinct row and moves the row and its state along them, in place.

    Sums are taken in a fixed order, so equal calls give equal bits. A gradient that is no finite number may spoil
    rows beside its own.

    Args:
        rows_N: int32 or int64, the row of each index, in any order; R for those that count for nothing.
        grad_BD: of each output vector.
        bag_N: int64, the output vector that each index went into; None when index i went into vector i.
        weights_N: a factor for each index.
        state: the rule's slots, float32 [R, D] or [R].
        scalars_4: float32: the learning rate, what weight decay leaves of a weight, and Adam's two corrections.
    """
    if not len(rows_N):
        return
    rows, width = weight_RD.shape
    sorted_N, order_N = torch.sort(rows_N, stable=True)
    blocks = triton.cdiv(len(rows_N), _SORTED)
    columns = max(16, triton.next_power_of_2(width))
    # Of a row whose indices lie in several blocks: what its first block adds to it, and each that follows.
    begun, went_on = (grad_BD.new_empty(blocks, columns, dtype=torch.float32) for _ in range(2))
    first, second = (*state.values(), weight_RD, weight_RD)[:2]
    shared = {
        "RULE": formula.rule,
        "L2": formula.l2,
        "EPSILON": formula.epsilon,
        "BETA1": formula.beta1,
        "BETA2": formula.beta2,
        "C": _SORTED,
        "D": columns,
    }
    _update_kernel[(blocks,)](
        weight_RD,
        first,
        second,
        scalars_4,
        sorted_N,
        order_N,
        grad_BD,
        order_N if bag_N is None else bag_N,
        grad_BD if weights_N is None else weights_N,
        begun,
        went_on,
        len(rows_N),
        rows,
        width,
        HAS_BAGS=bag_N is not None,
        WEIGHTED=weights_N is not None,
        **shared,
    )
    _update_spread_kernel[(blocks,)](
        weight_RD,
        first,
        second,
        scalars_4,
        sorted_N,
        begun,
        went_on,
        len(rows_N),
        rows,
        width,
        BLOCKS=_BLOCKS,
        **shared,
    )


@triton.jit
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
def _move_rows(
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
    """The rule's formula for some rows [n] whose summed gradients are ``sums`` [n, D]; only those that move."""
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


@triton.jit
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
    begun,
    went_on,
    count,
    nowhere,
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
    """A block of sorted indices: moves the rows that lie wholly in it, and keeps the sums of those that do not."""
    block = tl.program_id(0).to(tl.int64)
    at = block * C + tl.arange(0, C)
    column = tl.arange(0, D)
    inside = at < count
    row = tl.load(rows + at, mask=inside, other=nowhere).to(tl.int64)
    counts = row < nowhere
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
    after = tl.load(rows + (block + 1) * C, mask=(block + 1) * C < count, other=nowhere).to(tl.int64)
    begins = counts & (row != before)
    goes_on = row == after
    _move_rows(
        row, begins & (row != after), sums, weight, first, second, scalars, width, RULE, L2, EPSILON, BETA1, BETA2, D
    )
    place = block * D + column[None, :] + tl.zeros((C, 1), dtype=tl.int64)
    tl.store(begun + place, sums, mask=(begins & goes_on)[:, None])
    tl.store(went_on + place, sums, mask=((at == block * C) & counts & (row == before))[:, None])


@triton.jit
def _update_spread_kernel(
    weight,
    first,
    second,
    scalars,
    rows,
    begun,
    went_on,
    count,
    nowhere,
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
    """The row that begins in a block and goes on in the next ones, if there is one."""
    block = tl.program_id(0).to(tl.int64)
    start, stop = block * C, (block + 1) * C
    column = tl.arange(0, D)
    row = tl.load(rows + stop, mask=stop < count, other=nowhere).to(tl.int64)
    last = tl.load(rows + stop - 1, mask=stop < count, other=nowhere).to(tl.int64)
    head = tl.load(rows + start).to(tl.int64)
    before = tl.load(rows + start - 1, mask=start > 0, other=-1).to(tl.int64)
    if (row < nowhere) & (last == row) & ((head != row) | (before != row)):
        total = tl.load(begun + block * D + column)
        follower = block + 1
        more = True
        while more:
            blocks = follower + tl.arange(0, BLOCKS)
            same = tl.load(rows + blocks * C, mask=blocks * C < count, other=-1).to(tl.int64) == row
            parts = tl.load(went_on + blocks[:, None] * D + column[None, :], mask=same[:, None], other=0.0)
            total += tl.sum(parts, axis=0)
            follower += BLOCKS
            more = tl.min(same.to(tl.int32)) > 0
        only = tl.zeros((1,), dtype=tl.int64) + row
        _move_rows(
            only, only < nowhere, total[None, :], weight, first, second, scalars, width,
            RULE, L2, EPSILON, BETA1, BETA2, D,
        )  # fmt: skip
