"""Update rules of table rows, SGD, Adagrad, RowWiseAdagrad and Adam, and the update of a gradient's rows by a rule.

Shape suffixes: D width, R rows of a table's weight, U unique looked-up rows.
"""

import math

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.gradient import RowGradient
from lightning_dlrm.kernels import native
from lightning_dlrm.kernels.choice import Kernels, choose
from lightning_dlrm.tables.gradients import LookupGradient, Lookups
from lightning_dlrm.tables.table import empty_table, gather_rows, put_rows


class UpdateRule:
    """Base class of update rules; a rule holds settings, and the optimizer holds the state of each table.

    State is float32 or wider, for any dtype of the tables. ``l2`` and ``weight_decay`` change only the rows that the
    step updates.

    Args:
        learning_rate: lr, before the schedule changes it.
        l2: adds l2 w to the gradient, which is the gradient of the penalty l2 w^2 / 2.
        weight_decay: d; subtracts lr d w from the weight, beside the gradient's step (Loshchilov and Hutter 2019,
            algorithm 2, "decoupled").
    """

    def __init__(self, learning_rate: float, l2: float = 0.0, weight_decay: float = 0.0) -> None:
        name = type(self).__name__
        require(
            0 < learning_rate < math.inf,
            f"{name}: learning_rate is {learning_rate}; expected a number above 0, such as 0.01",
        )
        require(
            0 <= l2 < math.inf and 0 <= weight_decay < math.inf,
            f"{name}: l2 is {l2} and weight_decay {weight_decay}; expected numbers of 0 or more",
        )
        self.learning_rate = learning_rate
        self.l2 = l2
        self.weight_decay = weight_decay

    def state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        """Return the initial state of a table: name -> tensor of R rows, float32 or wider."""
        raise TypeError(f"{type(self).__name__} does not define state")

    @torch.no_grad()
    def apply(
        self, weight_UD: Tensor, gradient_UD: Tensor, state: dict[str, Tensor], learning_rate: float, step: int
    ) -> None:
        """Update rows in place: decay, then the rule, in float32 or wider.

        Args:
            weight_UD: the rows.
            gradient_UD: their gradients.
            state: the state of the rows, as ``state`` returns it for a table.
            learning_rate: learning rate of this step.
            step: number of this step of the model, from 1.
        """
        exact_UD = weight_UD.to(_precise(weight_UD))
        gradient_UD = gradient_UD.to(exact_UD.dtype)
        if self.l2:
            gradient_UD = gradient_UD.add(exact_UD, alpha=self.l2)
        if self.weight_decay:
            exact_UD.mul_(1 - learning_rate * self.weight_decay)
        self.update(exact_UD, gradient_UD, state, learning_rate, step)
        if exact_UD is not weight_UD:
            weight_UD.copy_(exact_UD)

    def update(
        self, weight_UD: Tensor, gradient_UD: Tensor, state: dict[str, Tensor], learning_rate: float, step: int
    ) -> None:
        """Apply the rule's formula to rows and their ``state``, in place; see ``apply``."""
        raise TypeError(f"{type(self).__name__} does not define update")


class SGD(UpdateRule):
    """Gradient descent without momentum: w <- w - lr g.

    Args:
        learning_rate: lr.
        l2: adds l2 w to the gradient.
        weight_decay: takes lr times this share off the weight.
    """

    def __init__(self, learning_rate: float = 0.1, l2: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(learning_rate, l2, weight_decay)

    def state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        return {}

    def update(
        self, weight_UD: Tensor, gradient_UD: Tensor, state: dict[str, Tensor], learning_rate: float, step: int
    ) -> None:
        weight_UD.add_(gradient_UD, alpha=-learning_rate)


class Adagrad(UpdateRule):
    """Adagrad (Duchi et al. 2011, figure 1, diagonal): s <- s + g^2, w <- w - lr g / (sqrt(s) + eps).

    Args:
        learning_rate: lr.
        epsilon: eps, keeps the division finite.
        initial_accumulator: s before the first step.
        l2: adds l2 w to the gradient.
        weight_decay: takes lr times this share off the weight.
    """

    def __init__(
        self,
        learning_rate: float = 0.01,
        epsilon: float = 1e-10,
        initial_accumulator: float = 0.0,
        l2: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(learning_rate, l2, weight_decay)
        require(
            epsilon >= 0 and initial_accumulator >= 0,
            f"{type(self).__name__}: epsilon is {epsilon} and initial_accumulator {initial_accumulator}; "
            "expected numbers of 0 or more",
        )
        self.epsilon = epsilon
        self.initial_accumulator = initial_accumulator

    def state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        return {"sum": _slot(weight_RD, self.initial_accumulator)}

    def update(
        self, weight_UD: Tensor, gradient_UD: Tensor, state: dict[str, Tensor], learning_rate: float, step: int
    ) -> None:
        if weight_UD.is_cpu:
            # One pass over the rows. torch uses the step for lr_decay only, which is 0.
            adagrad(
                [weight_UD],
                [gradient_UD.contiguous()],
                [state["sum"]],
                [torch.ones((), dtype=torch.float32)],
                fused=True,
                lr=learning_rate,
                weight_decay=0.0,
                lr_decay=0.0,
                eps=self.epsilon,
                maximize=False,
            )
            return
        state["sum"].addcmul_(gradient_UD, gradient_UD)
        spread_UD = state["sum"].sqrt().add_(self.epsilon)
        weight_UD.sub_(gradient_UD.div(spread_UD).mul_(learning_rate))


class RowWiseAdagrad(Adagrad):
    """Adagrad with a single accumulator for each row: s <- s + mean(g^2 over the row).

    As in facebookresearch/dlrm and FBGEMM. A table's state takes 1/D of Adagrad's memory.

    Args:
        learning_rate: lr.
        epsilon: eps, keeps the division finite.
        initial_accumulator: s before the first step.
        l2: adds l2 w to the gradient.
        weight_decay: takes lr times this share off the weight.
    """

    def state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        return {"sum": _slot(weight_RD[:, 0], self.initial_accumulator)}

    def update(
        self, weight_UD: Tensor, gradient_UD: Tensor, state: dict[str, Tensor], learning_rate: float, step: int
    ) -> None:
        sum_U = state["sum"]
        sum_U.add_(gradient_UD.square().mean(1))
        size_U = torch.full_like(sum_U, learning_rate).div_(sum_U.sqrt().add_(self.epsilon))
        weight_UD.addcmul_(gradient_UD, size_U.to(gradient_UD.dtype)[:, None], value=-1)


class Adam(UpdateRule):
    """Lazy Adam (Kingma and Ba 2015, algorithm 1): a row's moments change only in steps that update the row.

    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, w <- w - lr m' / (sqrt(v') + eps) with
    m' = m / (1 - b1^t), v' = v / (1 - b2^t). The bias correction counts all steps t of the model, also those that do
    not update the row, as in torch.optim.SparseAdam.

    Args:
        learning_rate: lr.
        beta1: b1, decay of the mean of the gradients.
        beta2: b2, decay of the mean of their squares.
        epsilon: eps, keeps the division finite.
        l2: adds l2 w to the gradient.
        weight_decay: takes lr times this share off the weight.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        l2: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(learning_rate, l2, weight_decay)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            require(0 <= beta < 1, f"Adam: {name} is {beta}; expected 0, or a number below 1")
        require(epsilon >= 0, f"Adam: epsilon is {epsilon}; expected 0 or more")
        self.beta1 = beta1
        self.beta2 = beta2
        self.epsilon = epsilon

    def state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        return {"mean": _slot(weight_RD, 0.0), "square": _slot(weight_RD, 0.0)}

    def update(
        self, weight_UD: Tensor, gradient_UD: Tensor, state: dict[str, Tensor], learning_rate: float, step: int
    ) -> None:
        mean_UD, square_UD = state["mean"], state["square"]
        mean_UD.lerp_(gradient_UD, 1 - self.beta1)
        square_UD.mul_(self.beta2).addcmul_(gradient_UD, gradient_UD, value=1 - self.beta2)
        spread_UD = square_UD.div(1 - self.beta2**step).sqrt_().add_(self.epsilon)
        weight_UD.sub_(mean_UD.div(spread_UD).mul_(learning_rate / (1 - self.beta1**step)))


def require_rules(**options: object) -> None:
    """Check options that take an update rule or None.

    Raises:
        UserError: an option is something else, such as an optimizer of torch.optim.
    """
    for option, rule in options.items():
        name = getattr(rule, "__name__", type(rule).__name__)
        require(
            rule is None or isinstance(rule, UpdateRule),
            f"{option} is {name}, which cannot update single rows of a table; give a rule of "
            "lightning_dlrm.optim.rules, such as RowWiseAdagrad(0.01)",
        )


def _precise(weight: Tensor) -> torch.dtype:
    """Return the weight's dtype, or float32 if that is wider."""
    return torch.promote_types(weight.dtype, torch.float32)


def _slot(weight: Tensor, value: float) -> Tensor:
    return empty_table(weight.shape, _precise(weight), weight.device).fill_(value)


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
    fused.update(weight, *lookups, state, known, settings, scalars.to(weight.device, non_blocking=True))
