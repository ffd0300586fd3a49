"""The torch.optim optimizer of the dense layers, and the classes behind the callables that make optimizers."""

import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_dlrm.contracts.errors import UserError, one_line, require
from lightning_dlrm.contracts.own_code import place_in_own_code, with_place
from lightning_dlrm.optim.compatibility import torch_optimizer
from lightning_dlrm.optim.rules import UpdateRule


def target_of(factory: Callable[..., Any], base: type) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the class or function behind ``functools.partial`` objects, and the keywords that they bind.

    Args:
        factory: a class, a function, or a partial of either. The command line passes partials of a function of its
            own, with the class among their positional arguments.
        base: base of the class, such as torch.optim.Optimizer.
    """
    keywords: dict[str, Any] = {}
    while isinstance(factory, functools.partial):
        keywords = {**factory.keywords, **keywords}
        classes = [given for given in factory.args if isinstance(given, type) and issubclass(given, base)]
        factory = classes[0] if classes else factory.func
    return factory, keywords


def takes(target: Callable[..., Any], name: str) -> bool:
    """Whether a class or function has a parameter of this name."""
    try:
        return name in inspect.signature(target).parameters
    except ValueError:
        # The signature of a function in C is unknown.
        return False


def name_of(target: Callable[..., Any]) -> str:
    return getattr(target, "__name__", type(target).__name__)


DenseOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""A class of torch.optim or a ``functools.partial`` of it: returns an optimizer of parameters."""

IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")
"""Settings that change how an optimizer computes, and not its result."""


def make_dense_optimizer(dense_optimizer: DenseOptimizer, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Return the optimizer of dense layers.

    On a CPU, classes of torch.optim with a fused implementation use it unless ``fused`` or ``foreach`` is given; on a
    CUDA device torch itself chooses ``foreach``.

    Raises:
        UserError: the class refuses the settings or the parameters, or cannot update dense layers in one pass.
    """
    target, given = target_of(dense_optimizer, Optimizer)
    name = with_place(target)
    settings: dict[str, Any] = {}
    from_torch = getattr(target, "__module__", "").startswith("torch.optim.")
    if from_torch and takes(target, "fused") and not any(given.get(option) for option in ("differentiable", "foreach")):
        on_cpu = all(parameter.is_cpu and parameter.is_floating_point() for parameter in parameters)
        if on_cpu and given.get("fused") is None and given.get("foreach") is None:
            settings["fused"] = True
    try:
        made = dense_optimizer(parameters, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        if place_in_own_code(error) is not None:
            raise
        raise UserError(_refusal(name, one_line(error))) from error
    require(
        isinstance(made, Optimizer), f"dense_optimizer makes a {type(made).__name__}; expected a torch.optim.Optimizer"
    )
    closure = inspect.signature(made.step).parameters.get("closure")
    require(
        closure is None or closure.default is not closure.empty,
        f"dense_optimizer {name} computes the loss several times in a step, but rows of tables are updated once: "
        "choose a class that needs a single gradient, such as Adagrad",
    )
    require(
        not isinstance(made, torch.optim.SparseAdam),
        f"dense_optimizer {name} takes sparse gradients only; dense layers have none: use Adam",
    )
    for group in made.param_groups:
        require("lr" in group, f"dense_optimizer {name} has no lr; give its base class the defaults {{'lr': lr}}")
        require(math.isfinite(group["lr"]), f"dense_optimizer {name}: lr is {group['lr']}; expected a finite number")
    return made


def _refusal(name: str, message: str) -> str:
    """Return torch's message about a number of an optimizer with the setting's name and its range.

    >>> _refusal("Adagrad", "Invalid learning rate: -1.0")
    'dense_optimizer.lr is -1.0; Adagrad takes 0 or more'
    """
    if match := re.fullmatch(r"Invalid (.+?)(?: value)?: (-\S+)", message):
        setting = {"learning rate": "lr", "epsilon": "eps"}.get(match[1], match[1])
        if setting.isidentifier():
            return f"dense_optimizer.{setting} is {match[2]}; {name} takes 0 or more"
    return f"dense_optimizer {name}: {message}"


def torch_class(rule: UpdateRule) -> DenseOptimizer:
    """Return the class of torch.optim that equals a rule, with its arguments; warns of the deprecation.

    Raises:
        UserError: torch.optim has no such class.
    """
    name, arguments = torch_optimizer(type(rule).__name__, vars(rule))
    settings = ", ".join(f"{key}={value}" for key, value in arguments.items())
    warnings.warn(
        "dense_optimizer is an update rule of tables, which is deprecated; give "
        f"functools.partial(torch.optim.{name}, {settings})",
        DeprecationWarning,
        stacklevel=3,
    )
    return functools.partial(getattr(torch.optim, name), **arguments)


def dense_settings(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Return name of a group -> its class and settings, which must be equal when a fit is resumed."""
    left_out = ("params", "name", "initial_lr", *IMPLEMENTATIONS)
    return {
        group["name"]: {
            "rule": type(optimizer).__name__,
            **{key: plain_setting(value) for key, value in group.items() if key not in left_out},
        }
        for group in optimizer.param_groups
    }


def dense_state_bytes(dense_optimizer: DenseOptimizer, parameters: Sequence[nn.Parameter]) -> int:
    """Return the bytes of an optimizer's state after its first step, without scalars; 0 without parameters.

    Args:
        dense_optimizer: makes the optimizer.
        parameters: parameters on any device, including meta; the step is made with zeros on the CPU.
    """
    if not parameters:
        return 0
    stand_ins = [nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device="cpu")) for p in parameters]
    for parameter in stand_ins:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_dense_optimizer(dense_optimizer, stand_ins)
    for group in optimizer.param_groups:
        group["capturable"] = False
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in tensors if tensor.dim())


def plain_setting(value: Any) -> Any:
    """Return a number in place of a 0-dim tensor, a tuple in place of a list, and anything else as it is."""
    if isinstance(value, list):
        return tuple(value)
    return value.item() if torch.is_tensor(value) and value.numel() == 1 else value
