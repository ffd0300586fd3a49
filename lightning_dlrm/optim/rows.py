"""How an update rule moves the touched rows of a table."""

import torch
from torch import Tensor

from lightning_dlrm.contracts.lookup import LookupGradient, RowGradient, gather_rows, put_rows
from lightning_dlrm.kernels import native
from lightning_dlrm.kernels.choice import Kernels, choose
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule
from lightning_dlrm.tables.fbgemm_tables import FBGEMMGradient
from lightning_dlrm.tables.fused_tables import UnsummedGradient, fused_update


def update_rows(
    weight: Tensor,
    gradient: RowGradient,
    state: dict[str, Tensor],
    rule: UpdateRule,
    learning_rate: float,
    step: int,
    kernels: Kernels,
) -> None:
    """Applies a rule to the touched rows: by a kernel that knows it, or a block at a time: gather, update, put back.
    Rows are distinct, so none is lost."""
    if isinstance(gradient, FBGEMMGradient):
        gradient.move(state, learning_rate)
        return
    if isinstance(gradient, UnsummedGradient) and type(rule) in _FUSED:
        scalars = torch.tensor([learning_rate, step], dtype=torch.float64)
        fused_update(weight, gradient, state, _FUSED[type(rule)], vars(rule), *scalars)
        return
    known = _FUSED.get(type(rule))
    has_short_rows = len(weight) <= torch.iinfo(torch.int32).max
    if known is not None and has_short_rows and choose(kernels, weight.device.type, weight.dtype) == "native":
        if isinstance(gradient, LookupGradient) and not gradient.summed:
            (rows_N, bags_N, factors_N), grad_BD, ascending = gradient.lookups, gradient.output, False
        else:
            (rows_N, bags_N, factors_N), grad_BD, ascending = (gradient.rows, None, None), gradient.values, True
        native.update(
            weight,
            rows_N,
            grad_BD,
            bags_N,
            factors_N,
            ascending,
            list(state.values()),
            known,
            vars(rule),
            learning_rate,
            float(step),
        )
        return
    for block in gradient.blocks():
        rows, sums = block.rows, block.values
        touched = gather_rows(weight, rows)
        touched_state = {slot: values.index_select(0, rows) for slot, values in state.items()}
        rule.apply(touched, sums, touched_state, learning_rate, step)
        put_rows(weight, rows, touched)
        for slot, values in touched_state.items():
            put_rows(state[slot], rows, values)


_FUSED: dict[type[UpdateRule], str] = {
    SGD: "sgd",
    Adagrad: "adagrad",
    RowWiseAdagrad: "row_wise_adagrad",
    Adam: "adam",
}
"""Rules that the kernels know, and their names there."""
