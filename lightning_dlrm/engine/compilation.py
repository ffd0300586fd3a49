"""``model.compile``: the dense arithmetic of a step under torch.compile, and a log of compilation times."""

import logging
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
import torch._dynamo

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.models.network import CTRNetwork

log = logging.getLogger("lightning_dlrm")

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


def compile_mode(given: bool | str) -> CompileMode | None:
    """Return the mode of torch.compile that ``model.compile`` asks for, or None for eager steps.

    Raises:
        UserError: torch.compile has no such mode.
    """
    if isinstance(given, bool):
        return "default" if given else None
    modes = get_args(CompileMode)
    if given not in modes:
        raise UserError(f"model.compile is {given!r}; expected true, false, {', '.join(modes[:-1])} or {modes[-1]}")
    return given  # type: ignore[return-value]


def compiled(function: Callable[..., Any], mode: CompileMode) -> Callable[..., Any]:
    """Return a function that is compiled at its first call, and again when a guard fails.

    In the default mode random numbers equal those of eager PyTorch, so dropout is the same as without compilation.
    """
    # By default torch.compile does not notice a hook that is registered after compilation.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    if mode == "default":
        return torch.compile(function, options={"fallback_random": True})
    run = torch.compile(function, mode=mode)
    if mode == "max-autotune-no-cudagraphs":
        return run

    def cloned(*arguments: Any, **options: Any) -> Any:
        result = run(*arguments, **options)
        # The next step writes into the memory of what a CUDA graph returns; metrics keep logits for longer.
        return result.clone() if isinstance(result, torch.Tensor) else result

    return cloned


def compile_score(network: CTRNetwork, mode: CompileMode) -> None:
    """Compile a network's ``score``; its lookups stay eager.

    Raises:
        UserError: the network defines ``forward`` and no ``score``.
    """
    require(
        network.has_score,
        f"model.compile compiles a network's score, and {type(network).__name__} defines forward only: "
        "define score(dense, vectors), or set model.compile to false",
    )
    network.score = compiled(network.score, mode)  # type: ignore[method-assign]


class CompilationLog(pl.Callback):
    """Callback that logs the time of every compilation during a fit, and their number at its end.

    The first steps compile; a later step compiles again if a batch size, a hook, a layer or the loss has changed.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        handler = torch._dynamo.callback.callback_handler
        handler.register_start_callback(self._on_start)
        handler.register_end_callback(self._on_end)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._unregister()
        log.info("torch.compile: %d compilations took %.1f s", self.count, self.seconds)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._unregister()

    def _unregister(self) -> None:
        handler = torch._dynamo.callback.callback_handler
        if self._on_start in handler.start_callbacks:
            handler.remove_start_callback(self._on_start)
            handler.remove_end_callback(self._on_end)

    def _on_start(self, args: Any) -> None:
        self._began = time.perf_counter()

    def _on_end(self, args: Any) -> None:
        seconds = time.perf_counter() - self._began
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        log.info("torch.compile: compilation %d took %.1f s", self.count, seconds)
