"""The class or function behind a callable that makes an optimizer or a schedule."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


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
