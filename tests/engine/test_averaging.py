"""Contract: averages of weights, tables included, are those of a plain loop over all rows; training, resuming and the
checkpoint's trained weights do not change by them; evaluations take them."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.engine.averaging import Averaging, WeightAverages, kept_share
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models.dcn import DCN
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.optim.rules import RowWiseAdagrad
from tests.engine.test_fit import trainer_of
from tests.toy import ToyData, toy_schema


def wide_dlrm(features: Features, seed: int) -> DLRM:
    return DLRM(features, seed, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8], wide=True, dropout=0.2)


def normalized_dcn(features: Features, seed: int) -> DCN:
    return DCN(features, seed, embedding_dim=4, cross_layers=2, deep=[8], batch_norm=True)


def module_of(network: Any = wide_dlrm, averaging: Averaging | None = None) -> CTRModule:
    torch.manual_seed(5)  # of dropout
    return CTRModule(
        network,
        RowWiseAdagrad(0.1),
        partial(torch.optim.Adagrad, lr=0.05),
        averaging=averaging,
        schema=toy_schema(),
        seed=3,
    )


class Weights(pl.Callback):
    """The network's weights after every step, copied."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, CTRModule)
        self.after.append({k: v.clone() for k, v in pl_module.network.state_dict().items()})


class Stop(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


def plain_average(weights: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    average = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in weights[0].items()}
    for k, of_step in enumerate(weights, start=1):
        kept = min(decay, (k - 1) / k)
        average = {name: kept * average[name] + (1 - kept) * value.double() for name, value in of_step.items()}
    return average


def evaluated(module: CTRModule, folder: Path, checkpoint: str = "last") -> tuple[dict[str, Tensor], dict[str, float]]:
    trainer = trainer_of(folder.with_name("evaluation"))
    trainer.test(module, ToyData(), ckpt_path=str(folder / "checkpoints" / checkpoint), verbose=False)
    return module.network.state_dict(), module.results


@pytest.mark.parametrize("decay", [0.8, 0.0, 1.0])
def test_the_share_kept_is_the_product_over_the_steps(decay: float) -> None:
    for steps in (1, 4, 5, 6, 40):
        for before in range(steps + 1):
            product = 1.0
            for k in range(before + 1, steps + 1):
                product *= min(decay, (k - 1) / k)
            assert kept_share(decay, torch.tensor([before]), steps).item() == pytest.approx(product, abs=1e-14)


def test_averages_of_bfloat16_weights_move() -> None:
    network = wide_dlrm(toy_schema().features, 3).bfloat16()
    averages = WeightAverages(network, Averaging(decay=0.99), 0)
    weight = network.get_parameter("wide.bias")
    for step in range(1, 1001):
        weight.data.fill_(1.0 if step < 500 else 1.1)
        averages.before_batch(step)
    assert averages.dense_average["wide.bias"].item() == pytest.approx(weight.item() - 0.1 * 0.99**501, abs=1e-3)


@pytest.mark.parametrize("network", [wide_dlrm, normalized_dcn])
@pytest.mark.parametrize(("decay", "start_share"), [(0.8, 0.0), (1.0, 0.5)])
def test_evaluations_take_the_average_of_all_rows(
    tmp_path: Path, network: Any, decay: float, start_share: float
) -> None:
    weights = Weights()
    module = module_of(network, Averaging(decay=decay, start_share=start_share))
    trainer_of(tmp_path / "run", callbacks=[weights], max_steps=14).fit(module, ToyData())
    counted = weights.after[int(start_share * len(weights.after)) :]
    expected = plain_average(counted, decay)
    found, results = evaluated(module_of(network), tmp_path / "run")
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    plain = trainer_of(tmp_path / "plain")
    trained = module_of(network)
    plain.fit(trained, ToyData())
    # Training itself goes the same way, and is what the weights are again after a validation.
    for name, value in trained.network.state_dict().items():
        assert torch.equal(value, weights.after[-1][name])
        assert torch.equal(value, module.network.state_dict()[name])
    assert results["test/log_loss"] != evaluated(module_of(network), tmp_path / "plain")[1]["test/log_loss"]


def test_a_validation_in_the_fit_scores_the_same_average(tmp_path: Path) -> None:
    module = module_of(averaging=Averaging(decay=0.8))
    trainer_of(tmp_path / "run", every=3, val_check_interval=5).fit(module, ToyData())
    in_fit = dict(module.results)
    other = module_of()
    trainer_of(tmp_path / "evaluation").validate(
        other, ToyData(), ckpt_path=str(tmp_path / "run/checkpoints/last"), verbose=False
    )
    assert other.results == in_fit


def test_the_module_that_was_trained_is_evaluated_by_its_averages_too(tmp_path: Path) -> None:
    module = module_of(averaging=Averaging(decay=0.8))
    trainer_of(tmp_path / "run", max_steps=14).fit(module, ToyData())
    # As a fit on a GPU ends, and an evaluation begins: other memory.
    module._apply(torch.clone)
    trained = {name: value.clone() for name, value in module.network.state_dict().items()}
    _, expected = evaluated(module_of(), tmp_path / "run")
    trainer_of(tmp_path / "evaluation").test(module, ToyData(), verbose=False)
    assert module.results == expected
    assert all(torch.equal(value, trained[name]) for name, value in module.network.state_dict().items())
    # A checkpoint's averages are not averaged with the fit's once more.
    assert evaluated(module, tmp_path / "run")[1] == expected


def test_an_error_in_a_validation_leaves_the_trained_weights(tmp_path: Path) -> None:
    class Failing(pl.Callback):
        def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyError("full disk")

    weights = Weights()
    module = module_of(averaging=Averaging(decay=0.8))
    trainer = trainer_of(tmp_path / "run", callbacks=[weights, Failing()], max_steps=14)
    with pytest.raises(KeyError):
        trainer.fit(module, ToyData())
    found = module.network.state_dict()
    assert all(torch.equal(value, weights.after[-1][name]) for name, value in found.items())
    trainer_of(tmp_path / "evaluation").test(module, ToyData(), verbose=False)


def test_resumed_to_the_last_bit(tmp_path: Path) -> None:
    def fit(name: str, stop: int | None, checkpoint: str | None = None) -> None:
        callbacks: list[pl.Callback] = [] if stop is None else [Stop(stop)]
        trainer = trainer_of(tmp_path / name, every=4, callbacks=callbacks, max_epochs=2, max_steps=28)
        trainer.fit(module_of(averaging=Averaging(decay=0.9, start_share=0.1)), ToyData(), ckpt_path=checkpoint)

    fit("whole", None)
    with pytest.raises(KeyError):
        fit("parts", 18)
    fit("parts", None, str(tmp_path / "parts/checkpoints/last"))
    whole, _ = evaluated(module_of(), tmp_path / "whole")
    parts, _ = evaluated(module_of(), tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_other_averages_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path / "run", max_epochs=1).fit(module_of(averaging=Averaging(decay=0.9)), ToyData())
    last = str(tmp_path / "run/checkpoints/last")
    for averaging, words in (
        (None, "has averages .* asks for no averages"),
        (Averaging(decay=0.5), "decay 0.9, .*decay 0.5"),
    ):
        with pytest.raises(UserError, match=words):
            trainer_of(tmp_path / "other", max_epochs=2).fit(module_of(averaging=averaging), ToyData(), ckpt_path=last)
    for wrong, words in (
        ({"decay": 1.5}, "averaging.decay is 1.5; expected 0 to 1"),
        ({"decay": 0.9, "start_share": 1.0}, "averaging.start_share is 1.0; expected 0, or a share"),
    ):
        with pytest.raises(UserError, match=words):
            Averaging(**wrong)


def test_averages_of_a_fit_that_failed_are_not_those_of_the_next(tmp_path: Path) -> None:
    averaging = Averaging(decay=0.9)
    trainer_of(tmp_path / "a", max_steps=2).fit(module_of(averaging=averaging), ToyData())
    module = module_of(averaging=averaging)

    class Fail(pl.Callback):
        def on_load_checkpoint(self, *args: Any) -> None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trainer_of(tmp_path / "b", callbacks=[Fail()]).fit(module, ToyData(), ckpt_path=tmp_path / "a/checkpoints/last")
    trainer_of(tmp_path / "c", max_steps=1, limit_val_batches=0).fit(module, ToyData())
    assert module.averages is not None and module.averages.dense_steps == 0
