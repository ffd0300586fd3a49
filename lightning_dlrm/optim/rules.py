"""Update rules: how a weight moves along its gradient.

One definition of each formula serves dense layers (the whole tensor) and tables (the touched rows).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError


class UpdateRule:
    """Base of the rules. A rule holds settings; its state per weight lives with the optimiser.

    Args:
        learning_rate: step size at full schedule.
    """

    def __init__(self, learning_rate: float) -> None:
        if not learning_rate > 0:
            raise UserError(f"{type(self).__name__}: learning_rate is {learning_rate}; expected a number above 0")
        self.learning_rate = learning_rate

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """Fresh state of a weight: slot name -> tensor whose first dimension is the weight's."""
        raise TypeError(f"{type(self).__name__} does not define state")

    def update(self, weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], learning_rate: Tensor) -> None:
        """Moves ``weight`` and ``state`` in place.

        Args:
            weight: a whole weight, or some rows of it.
            gradient: of the same shape.
            state: the slots of ``state``, whole or the same rows.
            learning_rate: 0-dim.
        """
        raise TypeError(f"{type(self).__name__} does not define update")


class SGD(UpdateRule):
    """Gradient descent without momentum: w <- w - lr g.

    Args:
        learning_rate: lr.
    """

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__(learning_rate)

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {}

    def update(self, weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], learning_rate: Tensor) -> None:
        weight.sub_(gradient * learning_rate)


class Adagrad(UpdateRule):
    """Adagrad (Duchi et al. 2011, figure 1, diagonal): s <- s + g^2, w <- w - lr g / (sqrt(s) + eps).

    Args:
        learning_rate: lr.
        epsilon: eps, keeps the division finite.
        initial_accumulator: s before the first step.
    """

    def __init__(self, learning_rate: float = 0.01, epsilon: float = 1e-10, initial_accumulator: float = 0.0) -> None:
        super().__init__(learning_rate)
        if epsilon < 0 or initial_accumulator < 0:
            raise UserError(
                f"{type(self).__name__}: epsilon is {epsilon} and initial_accumulator {initial_accumulator}; "
                "expected numbers of 0 or more"
            )
        self.epsilon = epsilon
        self.initial_accumulator = initial_accumulator

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"sum": torch.full_like(weight, self.initial_accumulator, requires_grad=False)}

    def update(self, weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], learning_rate: Tensor) -> None:
        accumulator = state["sum"]
        accumulator.addcmul_(gradient, gradient)
        weight.sub_(gradient.div(accumulator.sqrt().add_(self.epsilon)).mul_(learning_rate))


class RowWiseAdagrad(Adagrad):
    """Adagrad with one accumulator for each row: s <- s + mean(g^2 over the row).

    The form of facebookresearch/dlrm and FBGEMM: a table's state takes 1/D of Adagrad's memory. A
    vector, such as a bias, has rows of one element.

    Args:
        learning_rate: lr.
        epsilon: eps, keeps the division finite.
        initial_accumulator: s before the first step.
    """

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        return {
            "sum": torch.full_like(
                weight.detach().flatten(1)[:, 0] if weight.dim() > 1 else weight.detach(), self.initial_accumulator
            )
        }

    def update(self, weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], learning_rate: Tensor) -> None:
        if weight.dim() == 1:
            return super().update(weight, gradient, state, learning_rate)
        accumulator = state["sum"]
        accumulator.add_(gradient.square().flatten(1).mean(1))
        step = learning_rate / (accumulator.sqrt().add_(self.epsilon))
        weight.sub_(gradient * step.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1)))
        return None
