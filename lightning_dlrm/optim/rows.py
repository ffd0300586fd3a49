"""Update of the looked-up rows of a table by an update rule and a gradient.

Shape suffixes: D width, R rows of a table's weight, N looked-up indices, U unique rows among them.
"""

import torch
from torch import Tensor

from lightning_dlrm.contracts.gradient import RowGradient
from lightning_dlrm.kernels import native
from lightning_dlrm.kernels.choice import Kernels, choose
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule
from lightning_dlrm.tables.gradients import LookupGradient, Lookups
from lightning_dlrm.tables.memory import gather_rows, put_rows

_KERNEL_RULES: dict[type[UpdateRule], str] = {
    SGD: "sgd",
    Adagrad: "adagrad",
    RowWiseAdagrad: "row_wise_adagrad",
    Adam: "adam",
}
"""Rule -> its name in the kernels."""


def update_rows(
    weight: Tensor,
    gradient: RowGradient,
    state: dict[str, Tensor],
    rule: UpdateRule,
    learning_rate: float,
    step: int,
    kernels: Kernels,
) -> None:
    """Apply a rule to the rows of a gradient, in place.

    A kernel with the rule sorts, sums and updates the rows in one call. Otherwise unique rows are gathered, updated and
    put back block by block.

    Args:
        weight: the table, [R, D].
        gradient: gradient of its rows.
        state: name -> optimizer state, [R, D] or [R].
        rule: the update rule.
        learning_rate: learning rate of this step.
        step: number of this step, from 1.
        kernels: see ``kernels.choice``.
    """
    known = _KERNEL_RULES.get(type(rule))
    chosen = "plain" if known is None else choose(kernels, weight.device.type, weight.dtype)
    if known is not None and chosen == "triton":
        _update_by_triton(weight, Lookups.of(gradient), state, known, rule, learning_rate, step)
    elif known is not None and chosen == "native" and len(weight) <= torch.iinfo(torch.int32).max:
        summed = not isinstance(gradient, LookupGradient) or gradient.unsummed is None
        slots, rate = list(state.values()), learning_rate
        native.update(weight, *Lookups.of(gradient), summed, slots, known, vars(rule), rate, float(step))
    else:
        for block in gradient.blocks():
            touched = gather_rows(weight, block.rows)
            touched_state = {name: values.index_select(0, block.rows) for name, values in state.items()}
            rule.apply(touched, block.values, touched_state, learning_rate, step)
            put_rows(weight, block.rows, touched)
            for name, values in touched_state.items():
                put_rows(state[name], block.rows, values)


def _update_by_triton(
    weight: Tensor,
    lookups: Lookups,
    state: dict[str, Tensor],
    known: str,
    rule: UpdateRule,
    learning_rate: float,
    step: int,
) -> None:
    # Builds of torch for CPUs have no Triton.
    from lightning_dlrm.kernels import fused

    settings = vars(rule)
    scalars = torch.tensor(
        [
            learning_rate,
            1 - learning_rate * settings["weight_decay"],
            1 - settings.get("beta1", 0.0) ** step,
            1 - settings.get("beta2", 0.0) ** step,
        ],
        dtype=torch.float32,
        device="cpu",
    )
    names = ("l2", "epsilon", "beta1", "beta2")
    formula = fused.Formula(known, **{name: settings[name] for name in names if name in settings})
    fused.update(weight, *lookups, state, formula, scalars.to(weight.device, non_blocking=True))
