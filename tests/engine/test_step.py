"""Contract: a training step is what its parts are now: a loss, a forward, a layer or a hook that is put in amid a fit
takes effect at the next step, eagerly and under ``model.compile``; compiled steps train as eager ones do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.engine.averaging import Averaging
from lightning_dlrm.engine.compilation import compiled
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models.dcn import DCN
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.objectives.losses import Loss
from tests.engine.test_fit import losses, trainer_of
from tests.toy import ToyData, toy_dlrm, toy_module


class Constant(Loss):
    """A loss that is the same for all logits."""

    def summed(self, logits_B: Tensor, label_B: Tensor) -> Tensor:
        return logits_B.sum() * 0 + 7.0 * len(logits_B)


class AtStep(pl.Callback):
    """Change a module before a step."""

    def __init__(self, step: int, change: Callable[[CTRModule], Any]) -> None:
        self.step, self.change = step, change

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step - 1:
            self.change(pl_module)  # type: ignore[arg-type]


def fitted(folder: Path, module: CTRModule, *callbacks: pl.Callback, **options: Any) -> dict[int, float]:
    trainer_of(folder, callbacks=list(callbacks), **options).fit(module, ToyData())
    return losses(folder)


COMPILE = pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)


@COMPILE
def test_a_replaced_loss_is_the_loss_of_the_next_step(compile: bool, tmp_path: Path) -> None:
    def replace(module: CTRModule) -> None:
        module.loss = Constant()

    found = fitted(tmp_path, toy_module(compile=compile), AtStep(8, replace))
    assert [step for step, loss in found.items() if loss == 7.0] == list(range(8, 15))


def test_a_replaced_forward_and_hooks_of_the_network_take_effect(tmp_path: Path) -> None:
    class Doubled(DLRM):
        def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
            return super().forward(dense_BI, ids) * 0 + 100

    def doubled(features: Features, seed: int) -> DLRM:
        return Doubled(features, seed, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8])

    seen: list[int] = []

    def watch(module: CTRModule) -> None:
        module.network.register_forward_hook(lambda *args: seen.append(len(args)))

    found = fitted(tmp_path, toy_module(doubled), AtStep(3, watch))
    assert min(found.values()) > 10
    assert len(seen) >= 12


class OwnNetwork(CTRNetwork):
    """A network that defines ``forward`` alone, without counting its multiply-adds."""

    def __init__(self, features: Features, seed: int) -> None:
        super().__init__(features.dense)
        self.inner = toy_dlrm(features, seed)

    def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        return self.inner(dense_BI, ids)

    def multiply_adds(self) -> int:
        return self.inner.multiply_adds()


def test_a_network_with_forward_alone_trains_as_one_with_score(tmp_path: Path) -> None:
    assert fitted(tmp_path / "own", toy_module(OwnNetwork)) == fitted(tmp_path / "plain", toy_module())
    with pytest.raises(UserError, match="OwnNetwork defines forward only"):
        fitted(tmp_path / "compiled", toy_module(OwnNetwork, compile=True))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_what_a_cuda_graph_returns_is_copied(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.zeros(2)
    monkeypatch.setattr(torch, "compile", lambda function, mode: lambda value: memory.fill_(function(value)))
    run = compiled(lambda value: 2 * value, mode)
    assert [run(1.0).tolist(), run(2.0).tolist()] == [[2.0, 2.0], [4.0, 4.0]]
    assert run(1.0).data_ptr() != memory.data_ptr()


def test_unknown_compile_mode() -> None:
    with pytest.raises(UserError, match=r"model\.compile is 'fast'; expected true, false, default"):
        toy_module(compile="fast")


def everything(features: Features, seed: int) -> DCN:
    """Batch normalization, dropout and linear terms."""
    return DCN(features, seed, embedding_dim=4, cross_layers=2, deep=[8, 4], batch_norm=True, wide=True, dropout=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed"])
def test_compiled_steps_train_as_eager_ones(precision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lightning_dlrm")
    found = {}
    for compile in (False, True):
        pl.seed_everything(1)
        module = toy_module(everything, compile=compile, averaging=Averaging(decay=0.9))
        options = {"precision": precision, "accumulate_grad_batches": 2, "max_epochs": 8, "max_steps": 50}
        found[compile] = fitted(tmp_path / str(compile), module, **options)
    steps, rel = (51, 1e-10) if precision == "64-true" else (2, 1e-5 if precision == "32-true" else 1e-2)
    assert [found[True][step] for step in range(1, steps)] == pytest.approx(
        [found[False][step] for step in range(1, steps)], rel=rel
    )
    assert "compilations took" in caplog.text
