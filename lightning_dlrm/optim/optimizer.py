"""The one optimizer of a model: a torch.optim class for dense layers, update rules for tables."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.gradient import RowGradient
from lightning_dlrm.optim.compatibility import STATE_NAMES, torch_optimizer
from lightning_dlrm.optim.dense import (
    IMPLEMENTATIONS,
    DenseOptimizer,
    dense_settings,
    make_dense_optimizer,
    plain_setting,
)
from lightning_dlrm.optim.rules import UpdateRule, update_rows
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import keep_freed_memory


class CTROptimizer(torch.optim.Optimizer):
    """The optimizer of a model: updates dense layers from ``.grad`` and tables from their RowGradient.

    Its ``param_groups`` are the dictionaries of the dense layers' optimizer, then a group of the tables, and a group of
    the linear terms if they have a rule of their own. Each group has a ``name``: ``dense`` (``dense_2`` and so on if
    there are several), ``tables``, ``wide``. Values that schedulers and callbacks set in a group take effect at the
    next step; the groups of tables use ``lr`` only.

    The state of dense layers is that of the torch.optim class and has the parameters' dtype. The state of tables is
    float32 or wider. It can be as large as the tables, so it is not part of ``state_dict``: it is in ``table_state``,
    and checkpoints write it piece by piece.

    ``step`` also calls ``dense.step``, so global optimizer hooks and the profiler see two optimizers.

    Args:
        dense: parameters of the dense layers. Those of tables with ``dense_gradients`` are added.
        lookups: lookups of the tables; those whose rows are not trained are ignored.
        dense_optimizer: makes the dense layers' optimizer; not called without dense parameters.
        table_rule: update rule of the tables' rows; None if no table needs one.
        wide_rule: update rule of the rows of ``wide``; None for ``table_rule``.
        wide: the lookups of linear terms, among ``lookups``.
    """

    def __init__(
        self,
        dense: Sequence[nn.Parameter],
        lookups: Sequence[EmbeddingTables],
        dense_optimizer: DenseOptimizer,
        table_rule: UpdateRule | None,
        wide_rule: UpdateRule | None = None,
        wide: Sequence[EmbeddingTables] = (),
    ) -> None:
        of_wide = set(wide) if wide_rule is not None else set()
        trained = [lookup for lookup in lookups if lookup.weight.requires_grad]
        with_grad = [lookup.weight for lookup in trained if lookup.dense_gradients]
        trained = [lookup for lookup in trained if not lookup.dense_gradients]
        _check_rules(table_rule, wide_rule, any(lookup.tables for lookup in trained), bool(with_grad))
        dense = [*dense, *with_grad]
        by_group = {
            "tables": [lookup for lookup in trained if lookup not in of_wide],
            "wide": [lookup for lookup in trained if lookup in of_wide],
        }
        rules = {"tables": table_rule, "wide": wide_rule}
        self.rules = {name: rule for name, rule in rules.items() if rule is not None}
        self._tables = {lookup.weight for lookup in lookups}
        # In the order of the groups, in which the base class numbers the parameters.
        self.lookups = tuple(lookup for name in self.rules for lookup in by_group[name])
        self._group_of = {lookup: name for name, members in by_group.items() for lookup in members}
        # Each step of a fit allocates the same tensors.
        keep_freed_memory()
        self.dense = make_dense_optimizer(dense_optimizer, list(dense)) if dense else None
        """The optimizer of the dense layers; None without dense parameters."""
        dense_groups = [] if self.dense is None else self.dense.param_groups
        for i, group in enumerate(dense_groups):
            group.setdefault("name", f"dense_{i + 1}" if i else "dense")
        row_groups: list[dict[str, Any]] = [
            {
                "name": name,
                "params": [lookup.weight for lookup in by_group[name]],
                "lr": rule.learning_rate,
                "steps": 0,
            }
            for name, rule in self.rules.items()
        ]
        super().__init__([*dense_groups, *row_groups], {})
        self._row_groups = {group["name"]: group for group in row_groups}
        self._share_with_dense()
        self._settings = self._settings_now()
        self.table_state = [self.rules[self._group_of[lookup]].state(lookup.weight.detach()) for lookup in self.lookups]
        """For each of ``lookups``: name of the state -> tensor."""

    def _share_with_dense(self) -> None:
        if self.dense is not None:
            self.param_groups = [*self.dense.param_groups, *self._row_groups.values()]
            self.state = self.dense.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of dense layers' parameters, such as those of a layer that is trained from now on.

        Raises:
            UserError: they are rows of tables.
        """
        if not hasattr(self, "table_state"):
            # Called by the base class.
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        if self.dense is None or self._tables & set(given):
            raise UserError(
                "an optimizer gets its tables when it is made: let their rows require gradients from the start"
            )
        name = f"dense_{len(self.dense.param_groups) + 1}"
        self.dense.add_param_group({"name": name, **param_group, "params": given})
        self._share_with_dense()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every dense parameter with a gradient and every looked-up row of a table, once.

        Args:
            closure: computes the gradients and returns the loss.

        Returns:
            The closure's result; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.dense is not None:
            self.dense.step()
        for group in self._row_groups.values():
            group["steps"] += 1
        self._update_tables()
        return loss

    @torch.no_grad()
    def _update_tables(self) -> None:
        for lookup, state in zip(self.lookups, self.table_state, strict=True):
            gradient = lookup.gradient()
            if gradient is not None:
                name = self._group_of[lookup]
                change = partial(
                    update_rows,
                    rule=self.rules[name],
                    learning_rate=float(self._row_groups[name]["lr"]),
                    step=self._row_groups[name]["steps"],
                    kernels=lookup.kernels,
                )
                lookup.update(gradient, state, change)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of dense parameters and of tables."""
        super().zero_grad(set_to_none)
        for lookup in self.lookups:
            lookup.clear_gradient()

    def _dense_parameters(self) -> list[nn.Parameter]:
        """Return the dense parameters with a gradient."""
        groups = [] if self.dense is None else self.dense.param_groups
        return [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm over all dense gradients and summed row gradients of all ranks, a 0-dim tensor."""
        grads = [parameter.grad for parameter in self._dense_parameters()]
        # A sum of squares in bf16 has three digits.
        precise = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads if grad is not None]
        squares = [torch.nn.utils.get_total_norm(precise).square()] if precise else []
        if self.lookups:
            of_tables = torch.stack([lookup.squared_gradient_norm() for lookup in self.lookups]).sum()
            squares.append(self.lookups[0].over_ranks(of_tables))
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    @torch.no_grad()
    def clip_gradient_norm(self, max_norm: float) -> None:
        """Scale all gradients so that their global norm is at most ``max_norm``."""
        norm = self.gradient_norm()
        torch.nn.utils.clip_grads_with_norm_(self._dense_parameters(), max_norm, norm)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self._map_row_gradients(lambda values: values * factor)

    @torch.no_grad()
    def clip_gradient_values(self, max_value: float) -> None:
        """Clamp every element of every gradient to [-max_value, max_value]."""
        torch.nn.utils.clip_grad_value_(self._dense_parameters(), max_value)
        self._map_row_gradients(lambda values: values.clamp(-max_value, max_value))

    def _map_row_gradients(self, change: Callable[[Tensor], Tensor]) -> None:
        for lookup in self.lookups:
            gradient = lookup.gradient()
            if gradient is not None:
                lookup.replace_gradient(RowGradient(gradient.rows, change(gradient.values)))

    def state_dict(self) -> dict[str, Any]:
        """Return the dense optimizer's state_dict, the groups of tables, and all settings, without ``table_state``."""
        return {
            "dense": None if self.dense is None else self.dense.state_dict(),
            "row_groups": [
                {key: value for key, value in group.items() if key != "params"} for group in self._row_groups.values()
            ],
            "rules": self._settings,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned in this or an earlier release.

        An entry ``read_table_rows(piece, slot, out)``, if there is one, is called to fill ``table_state``.

        Raises:
            UserError: the state was saved with other classes or settings.
        """
        read_table_rows = state_dict.get("read_table_rows")
        if "row_groups" not in state_dict:
            state_dict = self._of_earlier_release(state_dict)
        self._check_settings(state_dict["rules"])
        if self.dense is not None:
            ours = self.dense.state_dict()["param_groups"]
            saved = dict(state_dict["dense"])
            # A resumed run may use another implementation.
            saved["param_groups"] = [
                theirs | {key: group[key] for key in IMPLEMENTATIONS if key in group}
                for theirs, group in zip(saved["param_groups"], ours, strict=True)
            ]
            self.dense.load_state_dict(saved)
        for group, saved in zip(self._row_groups.values(), state_dict["row_groups"], strict=True):
            group.update(saved)
        self._share_with_dense()
        if read_table_rows is not None:
            for lookup, state in zip(self.lookups, self.table_state, strict=True):
                for piece, (slot, values) in itertools.product(lookup.pieces, state.items()):
                    read_table_rows(piece, slot, piece.of(values))

    def _of_earlier_release(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state_dict of a release with update rules for dense layers in today's form."""
        # The first release had neither l2 nor weight_decay.
        rules = {group: {"l2": 0.0, "weight_decay": 0.0} | rule for group, rule in state_dict["rules"].items()}
        settings = dict(rules.pop("dense"))
        name, arguments = torch_optimizer(settings.pop("rule"), settings)
        defaults = getattr(torch.optim, name)([torch.zeros(1)], **arguments).defaults
        groups = [
            {
                key: int(value) if key == "steps" else plain_setting(value)
                for key, value in ({"steps": 0} | group).items()
            }
            for group in state_dict["param_groups"]
        ]
        dense = None
        if self.dense is not None:
            packed = self.dense.state_dict()["param_groups"][0]
            step = torch.tensor(float(groups[0]["steps"]))
            state = {
                index: {"step": step.clone(), **{STATE_NAMES[slot]: values for slot, values in slots.items()}}
                for index, slots in state_dict["state"].items()
                if slots
            }
            dense = {"state": state, "param_groups": [packed | {"lr": groups[0]["lr"]}]}
        row_groups = [{key: value for key, value in group.items() if key != "params"} for group in groups[1:]]
        return {
            "dense": dense,
            "row_groups": row_groups,
            "rules": {"dense": {"rule": name, **defaults, "betas": tuple(defaults.get("betas", ()))}, **rules},
        }

    def _settings_now(self) -> dict[str, dict[str, Any]]:
        dense = {} if self.dense is None else dense_settings(self.dense)
        return dense | {name: {"rule": type(rule).__name__, **vars(rule)} for name, rule in self.rules.items()}

    def _check_settings(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """
        Raises:
            UserError: saved settings differ from this run's. Settings that only one of them has are ignored, because
                releases of torch add some.
        """
        theirs, ours = _differing(saved, self._settings), _differing(self._settings, saved)
        require(
            not theirs and not ours,
            f"the checkpoint was trained with {_words(theirs)}; this run asks for {_words(ours)}: choose the same "
            "classes and settings, or start a new run",
        )


def _check_rules(table_rule: UpdateRule | None, wide_rule: UpdateRule | None, by_rows: bool, by_grad: bool) -> None:
    """
    Raises:
        UserError: there is no rule for tables that need one, or a rule for none.
    """
    require(
        table_rule is not None or not by_rows,
        "table_optimizer is missing: give a rule such as RowWiseAdagrad, or set network.tables.dense_gradients to "
        "true, with which dense_optimizer updates the tables too",
    )
    for name, rule in (("table_optimizer", table_rule), ("wide_optimizer", wide_rule)):
        require(
            rule is None or by_rows or not by_grad,
            f"{name} is given, but dense_optimizer updates all tables if tables.dense_gradients is true: set {name} to "
            "null",
        )


def _differing(
    settings: Mapping[str, Mapping[str, Any]], others: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the class of each group with other settings, and these settings; the class alone if it is another one."""
    found: dict[str, dict[str, Any]] = {}
    for group, ours in settings.items():
        theirs = others.get(group, {})
        different = {
            key: value
            for key, value in ours.items()
            if key in theirs and plain_setting(theirs[key]) != plain_setting(value)
        }
        if not theirs or "rule" in different:
            found[group] = {"rule": ours["rule"]}
        elif different:
            found[group] = {"rule": ours["rule"], **different}
    return found


def _words(rules: Mapping[str, Mapping[str, Any]]) -> str:
    words = []
    for group, settings in rules.items():
        listed = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "rule")
        words.append(f"{group}: {settings['rule']}{f' ({listed})' if listed else ''}")
    return " and ".join(words) or "no such optimizer"
