"""The one optimiser of a model: a rule for the dense layers, a rule for the tables."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.gradient import RowGradient
from lightning_dlrm.optim.rows import update_rows
from lightning_dlrm.optim.rules import UpdateRule
from lightning_dlrm.optim.schedules import Schedule
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.memory import keep_freed_memory


class CTROptimizer(torch.optim.Optimizer):
    """Updates dense layers from their ``.grad`` and tables from their RowGradient.

    A ``torch.optim.Optimizer`` with two groups, ``dense`` and ``tables``, or a third, ``wide``, so that
    schedulers and Lightning's automatic optimisation treat it as one. Learning rates and the number of steps are
    0-dim tensors.

    The state of the tables is as large as the tables themselves can be. It is kept apart, in
    ``table_state``, and is not part of ``state_dict``: checkpoints write it piece by piece.

    Args:
        dense: the dense layers' weights.
        lookups: of the tables; those whose rows stay as they are are passed over.
        dense_rule: of the dense layers.
        table_rule: of the tables' rows.
        wide_rule: of the rows of ``wide``; None where they have table_rule as well.
        wide: those of ``lookups`` that hold linear terms.
    """

    def __init__(
        self,
        dense: Sequence[nn.Parameter],
        lookups: Sequence[EmbeddingTables],
        dense_rule: UpdateRule,
        table_rule: UpdateRule,
        wide_rule: UpdateRule | None = None,
        wide: Sequence[EmbeddingTables] = (),
    ) -> None:
        of_wide = set(wide) if wide_rule is not None else set()
        trained = [lookup for lookup in lookups if lookup.weight.requires_grad]
        by_group = {
            "tables": [lookup for lookup in trained if lookup not in of_wide],
            "wide": [lookup for lookup in trained if lookup in of_wide],
        }
        # Group by group, as the base class numbers the weights.
        self.lookups = (*by_group["tables"], *by_group["wide"])
        self._group_of = {lookup: name for name, members in by_group.items() for lookup in members}
        self.rules = {"dense": dense_rule, "tables": table_rule}
        if wide_rule is not None:
            self.rules["wide"] = wide_rule
        weights_of = {name: [lookup.weight for lookup in members] for name, members in by_group.items()}
        weights_of["dense"] = list(dense)
        # Whoever trains makes the same tensors at every step.
        keep_freed_memory()
        super().__init__(
            [
                {"name": name, "params": weights_of[name], "lr": _learning_rate(rule), "steps": _no_steps()}
                for name, rule in self.rules.items()
            ],
            {},
        )
        for parameter in dense:
            self.state[parameter] = dense_rule.state(parameter.detach())
        self.table_state = [self.rules[self._group_of[lookup]].state(lookup.weight.detach()) for lookup in self.lookups]
        """For each of ``lookups``: slot name -> tensor."""
        self.replay: Callable[[], None] | None = None
        """Does ``update_weights`` in its place for the next step, where it was recorded."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every dense weight with a gradient and of every touched table row."""
        return self._observed_step(closure) if self._is_observed() else self._step(closure)

    # Or the base class would open a record for the profiler and look for hooks at every step, for a hundredth of the
    # time of a small one.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
        if self.replay is not None:
            self.replay()
        else:
            self.update_weights({group["name"]: (group["lr"], group["steps"]) for group in self.param_groups})
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)

    def _is_observed(self) -> bool:
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        of_all = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
        return bool(own or of_all) or torch.autograd.profiler._is_profiler_enabled

    @torch.no_grad()
    def update_weights(self, rates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """The step's work on the weights' device.

        Args:
            rates: group name -> learning rate and number of the step, 0-dim, from 1.
        """
        dense = self.param_groups[0]
        moving = [parameter for parameter in dense["params"] if parameter.grad is not None]
        if moving:
            gradients, states = [weight.grad for weight in moving], [self.state[weight] for weight in moving]
            self.rules["dense"].apply(moving, gradients, states, *rates["dense"])
        for lookup, state in zip(self.lookups, self.table_state, strict=True):
            gradient = lookup.gradient()
            if gradient is not None:
                name = self._group_of[lookup]
                rule, (rate, steps) = self.rules[name], rates[name]
                change = partial(update_rows, rule=rule, learning_rate=rate, step=steps, kernels=lookup.kernels)
                lookup.update(gradient, state, change)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if set_to_none:
            # Tables' weights have no ``.grad``, and the base class opens a record for the profiler at every step.
            for parameter in self.param_groups[0]["params"]:
                parameter.grad = None
        else:
            super().zero_grad(set_to_none)
        for lookup in self.lookups:
            lookup.clear_gradient()

    def gradient_norm(self) -> Tensor:
        """The global 2-norm: dense gradients and each touched row's summed gradient; 0-dim."""
        grads = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
        # In half precision the sum of squares would keep three digits.
        squares = [grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum() for grad in grads]
        if self.lookups:
            of_tables = torch.stack([lookup.squared_gradient_norm() for lookup in self.lookups]).sum()
            squares.append(self.lookups[0].over_ranks(of_tables))
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    @torch.no_grad()
    def clip_gradient_norm(self, max_norm: float) -> None:
        """Scales all gradients so that their global norm is at most ``max_norm``."""
        factor = (max_norm / (self.gradient_norm() + 1e-6)).clamp(max=1.0)
        self._map_gradients(lambda gradient: gradient * factor)

    @torch.no_grad()
    def clip_gradient_values(self, max_value: float) -> None:
        """Cuts every element of every gradient to [-max_value, max_value]."""
        self._map_gradients(lambda gradient: gradient.clamp(-max_value, max_value))

    def _map_gradients(self, change: Callable[[Tensor], Tensor]) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.copy_(change(parameter.grad))
        for lookup in self.lookups:
            gradient = lookup.gradient()
            if gradient is not None:
                lookup.replace_gradient(RowGradient(gradient.rows, change(gradient.values)))

    def state_dict(self) -> dict[str, Any]:
        """Learning rates and the dense layers' state; the tables' state is ``table_state``."""
        return super().state_dict() | {"rules": self._rule_settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what ``state_dict`` gave.

        Where it also holds ``read_table_rows(piece, slot, out)``, that fills ``table_state``.

        Raises:
            UserError: the state is that of other rules.
        """
        state_dict = dict(state_dict)
        # Checkpoints of the first release know neither l2 nor weight decay.
        rules = {group: {"l2": 0.0, "weight_decay": 0.0} | rule for group, rule in state_dict.pop("rules").items()}
        read_table_rows = state_dict.pop("read_table_rows", None)
        if rules != self._rule_settings():
            raise UserError(
                f"the checkpoint was trained with {_words(rules)}; this run asks for "
                f"{_words(self._rule_settings())}: choose the same rules and settings, or start a new run"
            )
        # Where rows are held, and so in how many weights, is no matter of the checkpoint.
        dense, *of_tables = state_dict["param_groups"]
        numbers = itertools.count(len(dense["params"]))
        of_tables = [
            saved | {"params": list(itertools.islice(numbers, len(group["params"])))}
            for saved, group in zip(of_tables, self.param_groups[1:], strict=True)
        ]
        super().load_state_dict(state_dict | {"param_groups": [dense, *of_tables]})
        for group in self.param_groups:
            group.setdefault("steps", _no_steps())
        # The base class would cast the state to the weights' own precision.
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            self.state[parameter] = self.rules["dense"].state(parameter.detach())
            for slot, values in self.state[parameter].items():
                values.copy_(state_dict["state"][index][slot])
        if read_table_rows is not None:
            for lookup, state in zip(self.lookups, self.table_state, strict=True):
                for piece, (slot, values) in itertools.product(lookup.pieces, state.items()):
                    read_table_rows(piece, slot, piece.of(values))

    def _rule_settings(self) -> dict[str, dict[str, Any]]:
        return {group: {"rule": type(rule).__name__, **vars(rule)} for group, rule in self.rules.items()}


class ScheduledRates:
    """Sets the learning rates of an optimiser's groups, step after step.

    As LambdaLR of torch, whose state it reads too, at a third of its time, which is felt on small batches.

    Args:
        optimizer: whose rules have the rates that the schedule changes.
        schedule: of them all.
        total_steps: of the whole fit; None where the schedule needs none.
    """

    def __init__(self, optimizer: CTROptimizer, schedule: Schedule, total_steps: int | None) -> None:
        self.optimizer = optimizer
        self._schedule, self._total_steps = schedule, total_steps
        self._steps = 0
        self._set()

    def step(self) -> None:
        """Called after each step of the optimiser."""
        self._steps += 1
        self._set()

    def _set(self) -> None:
        for group in self.optimizer.param_groups:
            base = self.optimizer.rules[group["name"]].learning_rate
            group["lr"].fill_(self._schedule.learning_rate(self._steps + 1, base, self._total_steps))

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = state_dict["last_epoch"]
        self._set()


def _words(rules: dict[str, dict[str, Any]]) -> str:
    return " and ".join(
        f"{group}: {settings['rule']} ({', '.join(f'{k} {v}' for k, v in settings.items() if k != 'rule')})"
        for group, settings in rules.items()
    )


def _no_steps() -> Tensor:
    return torch.zeros((), dtype=torch.float64, device="cpu")


def _learning_rate(rule: UpdateRule) -> Tensor:
    if not math.isfinite(rule.learning_rate):
        raise UserError(f"{type(rule).__name__}: learning_rate is {rule.learning_rate}; expected a finite number")
    return torch.tensor(rule.learning_rate, dtype=torch.float64, device="cpu")
