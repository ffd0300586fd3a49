"""What keeps Lightning's own work at each step small: it makes some fifty calls around a step of a few milliseconds."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.core.hooks import DataHooks
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.trainer.call import _call_callback_hooks, _call_lightning_module_hook

from lightning_dlrm.contracts.batch import Batch

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


def pass_over_transfers(module: LightningModule) -> None:
    """Batches stay where they are, on a CPU, and nobody ``changes_batches``: Lightning would look for who does, three
    times a step."""
    module._on_before_batch_transfer = _same_batch  # type: ignore[method-assign]
    module._apply_batch_transfer_handler = _same_batch  # type: ignore[method-assign]


def give_transfers_back(module: LightningModule) -> None:
    """Undoes ``pass_over_transfers``."""
    for name in ("_on_before_batch_transfer", "_apply_batch_transfer_handler"):
        vars(module).pop(name, None)


def changes_batches(hooks_of: Iterable[Any], *hooks: str) -> bool:
    """Whether a model or a datamodule has a hook of its own among these."""
    return any(
        getattr(getattr(one, hook), "__func__", None) is not getattr(DataHooks, hook)
        for one, hook in product(hooks_of, hooks)
    )


def _same_batch(batch: Batch, *_: Any, **__: Any) -> Batch:
    return batch


def hears_of_parts(trainer: Trainer) -> bool:
    """Whether somebody beside the model follows the parts of a step: callbacks with hooks within it, a profiler, or a
    strategy or precision that is not Lightning's. Callbacks that come later are not asked."""
    within = ("on_before_zero_grad", "on_before_backward", "on_after_backward")
    heard = any(callable(getattr(callback, hook)) for callback, hook in product(trainer.callbacks, within))  # type: ignore[attr-defined]
    plugins = (trainer.strategy, trainer.precision_plugin)
    own = any(type(plugin).__module__.split(".")[0] != "pytorch_lightning" for plugin in plugins)
    return heard or own or not isinstance(trainer.profiler, PassThroughProfiler)  # type: ignore[attr-defined]


def shorten_steps(
    trainer: Trainer, is_short: Callable[[Batch], bool], step: Callable[[Any, Batch, int], dict[str, Any]]
) -> None:
    """Makes steps without the closures, contexts and hooks of Lightning's automatic optimisation, where these would do
    nothing; they take as long as a tenth of a step of 128 samples.

    Args:
        trainer: that begins to train; nobody ``hears_of_parts``.
        is_short: whether a batch's step is made so.
        step: makes it, of the optimiser, the batch and its index; returns what a training step returns.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    made_by_lightning = loop.run

    def run(optimizer: Any, batch_idx: int, kwargs: Any) -> Any:
        batch = kwargs["batch"]
        if not is_short(batch):
            return made_by_lightning(optimizer, batch_idx, kwargs)
        # Lightning's count of steps, and what else checkpoints hold of it.
        progress = loop.optim_progress.optimizer
        progress.zero_grad.increment_ready()
        progress.zero_grad.increment_started()
        progress.zero_grad.increment_completed()
        progress.step.increment_ready()
        outputs = step(optimizer, batch, batch_idx)
        progress.step.increment_completed()
        return outputs

    loop.run = run  # type: ignore[method-assign]


def tell_before_update(trainer: Trainer, optimizer: Any) -> None:
    """Tells callbacks and the model that a step's gradients are there."""
    _call_callback_hooks(trainer, "on_before_optimizer_step", optimizer)
    _call_lightning_module_hook(trainer, "on_before_optimizer_step", optimizer)


def lengthen_steps(trainer: Trainer) -> None:
    """Undoes ``shorten_steps``."""
    vars(trainer.fit_loop.epoch_loop.automatic_optimization).pop("run", None)
