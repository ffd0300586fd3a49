"""Conversion of earlier releases' optimizers of dense layers to classes of torch.optim.

Earlier releases had update rules of this project for dense layers too. Their configurations and checkpoints still open.
"""

from collections.abc import Mapping
from typing import Any

from lightning_dlrm.contracts.errors import UserError, require

RENAMED = {
    "learning_rate": "lr",
    "epsilon": "eps",
    "initial_accumulator": "initial_accumulator_value",
    "l2": "weight_decay",
}
"""Settings of the rules -> arguments of torch.optim's classes."""
STATE_NAMES = {"sum": "sum", "mean": "exp_avg", "square": "exp_avg_sq"}
"""State of the rules -> state of torch.optim's classes."""

_RULES = "lightning_dlrm.optim.rules."
_RATES = {"SGD": 0.1, "Adagrad": 0.01, "Adam": 1e-3}
"""Default learning rates of the rules."""


def torch_optimizer(rule: str, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the class of torch.optim that equals a rule of an earlier release, and its arguments.

    Args:
        rule: the rule's name, such as Adagrad.
        settings: the rule's settings.

    Raises:
        UserError: torch.optim has no such class.
    """
    require(
        rule in _RATES,
        f"dense_optimizer {rule} updates rows of tables; dense layers take a class of torch.optim, such as Adagrad",
    )
    given = {"learning_rate": _RATES[rule], **settings}
    decay, l2 = given.pop("weight_decay", 0.0), given.pop("l2", 0.0)
    betas = given.pop("beta1", 0.9), given.pop("beta2", 0.999)
    arguments = {RENAMED.get(name, name): value for name, value in given.items()}
    if rule == "Adam":
        arguments["betas"] = list(betas)
    if rule == "SGD":
        # SGD without momentum: both settings have the same effect.
        l2, decay = l2 + decay, 0.0
    require(
        not decay or (rule != "Adagrad" and not l2),
        f"dense_optimizer {rule} has weight_decay {decay} and l2 {l2}: torch.optim has AdamW for weight_decay and "
        "Adam, Adagrad and SGD for l2 (there called weight_decay); choose one of them",
    )
    return ("AdamW" if decay else rule), arguments | {"weight_decay": decay or l2}


def torch_configuration(value: Any) -> Any:
    """Return the value of ``model.dense_optimizer`` in today's form.

    Args:
        value: value in a configuration: a class's name, a mapping with class_path and init_args, or only settings,
            which overlay those of another file. A value in today's form is returned unchanged.

    Raises:
        UserError: torch.optim has no class for the rule.
    """
    if isinstance(value, str):
        path, settings = value, {}
    elif isinstance(value, Mapping):
        path, settings = value.get("class_path", ""), value.get("init_args", {} if "class_path" in value else value)
    else:
        return value
    if not isinstance(path, str) or not isinstance(settings or {}, Mapping):
        # The parser reports the fault.
        return value
    is_old = path.startswith(_RULES) or any(name in (settings or {}) for name in (*RENAMED, "beta1", "beta2"))
    rule = path.removeprefix(_RULES)
    if rule == "RowWiseAdagrad" or (is_old and "." not in rule and rule):
        name, arguments = torch_optimizer(rule, settings or {})
        return {"class_path": f"torch.optim.{name}", "init_args": arguments}
    if not is_old or rule:
        return value
    if lone := {"beta1", "beta2"} & set(settings):
        raise UserError(f"dense_optimizer has {' and '.join(sorted(lone))}: give both as betas, such as [0.9, 0.99]")
    renamed = {RENAMED.get(name, name): setting for name, setting in settings.items()}
    return {**value, "init_args": renamed} if "init_args" in value else renamed
