"""What keeps Lightning's own work at each step small: it makes some fifty calls around a step of a few milliseconds."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import product

from pytorch_lightning import Callback
from pytorch_lightning.profilers import PassThroughProfiler

_NOTHING: AbstractContextManager[None] = nullcontext()

_STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class NoProfiler(PassThroughProfiler):
    """Stands in for Lightning's profiler where nobody asked for one: measures nothing, as its default, without making a
    context for each call."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return _NOTHING


def pass_over_idle_hooks(callbacks: Iterable[Callback]) -> None:
    """Takes the hooks of every step from callbacks that leave them as they are: Lightning passes over what cannot be
    called, and would name, time and call each of them."""
    for callback, hook in product(callbacks, _STEP_HOOKS):
        if getattr(getattr(callback, hook), "__func__", None) is getattr(Callback, hook):
            setattr(callback, hook, None)


def give_hooks_back(callbacks: Iterable[Callback]) -> None:
    """Undoes ``pass_over_idle_hooks``."""
    for callback, hook in product(callbacks, _STEP_HOOKS):
        if vars(callback).get(hook, callback) is None:
            delattr(callback, hook)
