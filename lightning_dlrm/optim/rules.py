"""Update rules: how weights move along their gradients.

One definition of each formula serves dense layers (whole tensors, all at once: a tensor at a time costs
more in calls than in arithmetic) and tables (the touched rows).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.tables.memory import empty_table


class UpdateRule:
    """Base of the rules. A rule holds settings; its state per weight lives with the optimiser.

    Of a table, ``l2`` and ``weight_decay`` touch the rows that the step touches, and no others.

    Args:
        learning_rate: lr, the step size at full schedule.
        l2: adds l2 w to the gradient, that of the penalty l2 w^2 / 2.
        weight_decay: d; takes lr d w off the weight, beside the gradient's step (Loshchilov and Hutter
            2019, algorithm 2, "decoupled").
    """

    def __init__(self, learning_rate: float, l2: float = 0.0, weight_decay: float = 0.0) -> None:
        name = type(self).__name__
        if not learning_rate > 0:
            raise UserError(f"{name}: learning_rate is {learning_rate}; expected a number above 0")
        if not (0 <= l2 < math.inf and 0 <= weight_decay < math.inf):
            raise UserError(f"{name}: l2 is {l2} and weight_decay {weight_decay}; expected numbers of 0 or more")
        self.learning_rate = learning_rate
        self.l2 = l2
        self.weight_decay = weight_decay

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """Fresh state of a weight: slot name -> tensor whose first dimension is the weight's, float32 at least."""
        raise TypeError(f"{type(self).__name__} does not define state")

    @torch.no_grad()
    def apply(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        learning_rate: Tensor,
        step: Tensor,
    ) -> None:
        """One update, in place: decay, then the rule; in float32 at least, whatever a weight's precision.

        Args:
            weights: whole weights, or some rows of them; one or more.
            gradients: of the same shapes.
            states: the slots of ``state``, whole or the same rows.
            learning_rate: 0-dim.
            step: 0-dim, the number of this update of the model, from 1.
        """
        # Asking is cheaper than calling ``to`` for each of a small model's tensors.
        exact = [w if w.dtype in (torch.float32, torch.float64) else w.to(_precise(w)) for w in weights]
        gradients = [g if g.dtype == w.dtype else g.to(w.dtype) for g, w in zip(gradients, exact, strict=True)]
        if self.l2:
            gradients = list(torch._foreach_add(gradients, exact, alpha=self.l2))
        if self.weight_decay:
            torch._foreach_mul_(exact, 1 - learning_rate * self.weight_decay)
        slots = {slot: [state[slot] for state in states] for slot in states[0]}
        self.update(exact, gradients, slots, learning_rate, step)
        for weight, moved in zip(weights, exact, strict=True):
            if moved is not weight:
                weight.copy_(moved)

    def update(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        slots: Mapping[str, list[Tensor]],
        learning_rate: Tensor,
        step: Tensor,
    ) -> None:
        """The rule's formula: moves ``weights`` and their ``slots`` in place; see ``apply``."""
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

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {}

    def update(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        slots: Mapping[str, list[Tensor]],
        learning_rate: Tensor,
        step: Tensor,
    ) -> None:
        if _in_one_pass(weights, gradients):
            torch._foreach_add_(weights, gradients, alpha=-learning_rate.item())
            return
        torch._foreach_sub_(weights, torch._foreach_mul(gradients, learning_rate))


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
        if epsilon < 0 or initial_accumulator < 0:
            raise UserError(
                f"{type(self).__name__}: epsilon is {epsilon} and initial_accumulator {initial_accumulator}; "
                "expected numbers of 0 or more"
            )
        self.epsilon = epsilon
        self.initial_accumulator = initial_accumulator

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"sum": _slot(weight, self.initial_accumulator)}

    def update(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        slots: Mapping[str, list[Tensor]],
        learning_rate: Tensor,
        step: Tensor,
    ) -> None:
        if _in_one_pass(weights, gradients):
            # The kernel of torch.optim.Adagrad(fused=True); its steps count for a decay of the rate, of which there
            # is none here.
            steps = [torch.ones((), dtype=torch.float32)] * len(weights)
            torch._fused_adagrad_(
                weights,
                gradients,
                slots["sum"],
                steps,
                lr=learning_rate.item(),
                lr_decay=0.0,
                weight_decay=0.0,
                eps=self.epsilon,
                maximize=False,
            )
            return
        torch._foreach_addcmul_(slots["sum"], gradients, gradients)
        spreads = torch._foreach_sqrt(slots["sum"])
        torch._foreach_add_(spreads, self.epsilon)
        moves = torch._foreach_div(gradients, spreads)
        torch._foreach_mul_(moves, learning_rate)
        torch._foreach_sub_(weights, moves)


class RowWiseAdagrad(Adagrad):
    """Adagrad with one accumulator for each row: s <- s + mean(g^2 over the row).

    The form of facebookresearch/dlrm and FBGEMM: a table's state takes 1/D of Adagrad's memory. A
    vector, such as a bias, has rows of one element.

    Args:
        learning_rate: lr.
        epsilon: eps, keeps the division finite.
        initial_accumulator: s before the first step.
        l2: adds l2 w to the gradient.
        weight_decay: takes lr times this share off the weight.
    """

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"sum": _slot(weight.flatten(1)[:, 0] if weight.dim() > 1 else weight, self.initial_accumulator)}

    def update(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        slots: Mapping[str, list[Tensor]],
        learning_rate: Tensor,
        step: Tensor,
    ) -> None:
        for weight, gradient, accumulator in zip(weights, gradients, slots["sum"], strict=True):
            if weight.dim() < 2:
                super().update([weight], [gradient], {"sum": [accumulator]}, learning_rate, step)
                continue
            accumulator.add_(gradient.square().flatten(1).mean(1))
            size = learning_rate / (accumulator.sqrt().add_(self.epsilon))
            weight.addcmul_(gradient, size.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1)), value=-1)


class Adam(UpdateRule):
    """Adam (Kingma and Ba 2015, algorithm 1); lazy on tables, where a row's moments wait until it is touched.

    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, w <- w - lr m' / (sqrt(v') + eps) with
    m' = m / (1 - b1^t), v' = v / (1 - b2^t). The bias correction counts the model's steps t, also for a
    row that most steps pass over, as in torch.optim.SparseAdam.

    Args:
        learning_rate: lr.
        beta1: b1, how long the mean of the gradients remembers.
        beta2: b2, how long the mean of their squares does.
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
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and epsilon >= 0):
            raise UserError(
                f"Adam: beta1 is {beta1}, beta2 {beta2}, epsilon {epsilon}; expected 0 to below 1, and 0 or more"
            )
        self.beta1 = beta1
        self.beta2 = beta2
        self.epsilon = epsilon

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"mean": _slot(weight, 0.0), "square": _slot(weight, 0.0)}

    def update(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        slots: Mapping[str, list[Tensor]],
        learning_rate: Tensor,
        step: Tensor,
    ) -> None:
        means, squares = slots["mean"], slots["square"]
        torch._foreach_lerp_(means, gradients, 1 - self.beta1)
        torch._foreach_mul_(squares, self.beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - self.beta2)
        spreads = torch._foreach_div(squares, 1 - self.beta2**step)
        torch._foreach_sqrt_(spreads)
        torch._foreach_add_(spreads, self.epsilon)
        moves = torch._foreach_div(means, spreads)
        torch._foreach_mul_(moves, learning_rate / (1 - self.beta1**step))
        torch._foreach_sub_(weights, moves)


def _in_one_pass(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
    """Whether kernels may be used that take the learning rate as a number: on a CPU it is at hand anyway, and each
    pass over all weights costs as much as a layer's forward pass on a small batch."""
    return all(tensor.is_cpu and tensor.is_contiguous() for tensor in (*weights, *gradients))


def _precise(weight: Tensor) -> torch.dtype:
    """The weight's type, or float32 where it has fewer digits."""
    return torch.promote_types(weight.dtype, torch.float32)


def _slot(weight: Tensor, value: float) -> Tensor:
    return empty_table(weight.shape, _precise(weight), weight.device).fill_(value)
