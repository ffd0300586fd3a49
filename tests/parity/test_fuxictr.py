"""Contract: our numbers are FuxiCTR's, for every file of shared/golden_fuxictr and of the folders in PARITY_DIR."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.engine.module import CTRModule, penalty_of
from lightning_dlrm.engine.plateau import ReduceOnPlateau
from lightning_dlrm.objectives.losses import LogLoss
from lightning_dlrm.sharding.checkpoint import CheckpointReader
from tests.engine.test_averaging import Stop
from tests.engine.test_fit import trainer_of
from tests.parity.folders import cases
from tests.parity.fuxictr import Case

CASES = cases("fuxictr_*.npz")
if not CASES:
    pytest.skip("FuxiCTR's golden files lie in ../shared/golden_fuxictr, which is not here", allow_module_level=True)


def files(kind: str) -> list[Path]:
    return [path for path in CASES if ("_fit_" in path.stem) == (kind == "fit")]


def close(name: str, ours: Tensor, theirs: Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    ours, theirs = ours.detach(), theirs.to(ours.dtype)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("path", files("train"), ids=lambda path: path.stem)
def test_training_run(path: Path) -> None:
    case = Case(path)
    module = case.module()
    network, arrays = module.network, case.arrays
    optimizer = module.make_optimizer(network)
    places, noisy = case.places(network), case.noisy(network)
    losses, totals, norms, probabilities = [], [], [], []
    for step in range(case.meta["steps"]):
        optimizer.zero_grad()
        batch = case.batch("", step)
        logits = module(batch)
        loss = module.batch_loss(logits, batch.label) / len(batch)
        if not case.meta["saturates"]:
            # The default loss is the same, from logits.
            close("LogLoss", LogLoss().summed(logits, batch.label) / len(batch), arrays["losses"][step], rtol=1e-5)
        total = loss + penalty_of(module.network, module.regularization)
        total.backward()
        losses.append(loss.detach())
        totals.append(torch.as_tensor(total).detach())
        norms.append(optimizer.gradient_norm())
        probabilities.append(logits.detach().sigmoid())
        if step == 0:
            for name, (tensor, view, change) in places.items():
                if f"first_grad/{name}" in arrays and id(tensor) not in noisy:
                    expected = change(arrays[f"first_grad/{name}"])
                    close(name, view(tensor.grad), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-9)
        optimizer.clip_gradient_norm(case.meta["max_gradient_norm"])
        optimizer.step()
    close("losses", torch.stack(losses), arrays["losses"], rtol=1e-5)
    close("total_losses", torch.stack(totals), arrays["total_losses"], rtol=1e-5)
    # Logits of saturated cases reach 3e9: changing them by 6e-8 of their value, a rounding of float32, moves a norm by
    # 7e-5 of its value.
    close("grad_norms", torch.stack(norms), arrays["grad_norms"], rtol=2e-4 if case.meta["saturates"] else 1e-5)
    close("first_probability", probabilities[0], arrays["first_probability"], atol=1e-6)
    close("last_probability", probabilities[-1], arrays["last_probability"], atol=1e-5)
    by_noise = 3e-5 if case.meta["net_regularizer"] else case.meta["optimizer"]["lr"] * case.meta["steps"]
    for name, (tensor, view, change) in places.items():
        close(name, view(tensor), change(arrays[f"final/{name}"]), atol=by_noise if id(tensor) in noisy else 1e-5)

    case.load(network, "final")
    with torch.no_grad():
        probability = module.eval()(case.batch("eval_", slice(None))).sigmoid()
    close("eval_probability", probability, arrays["eval_probability"], atol=1e-6)


class Batches(list[Batch]):
    """Batches in a fixed order, a loader that resumes."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class CaseData(pl.LightningDataModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.schema, self.batch_size = case.schema(), case.meta["batch_size"]
        self._batches = {
            kind: Batches(case.batch(kind, step) for step in range(len(case.arrays[f"{kind}ids"])))
            for kind in ("", "valid_")
        }

    def train_dataloader(self) -> Batches:
        return self._batches[""]

    def val_dataloader(self) -> Batches:
        return self._batches["valid_"]


class Watch(pl.Callback):
    """What FuxiCTR's arrays of a fit say of its epochs and steps."""

    def __init__(self, rule: ReduceOnPlateau) -> None:
        self.rule = rule
        self.found: dict[str, list[Any]] = {}

    def note(self, **values: Any) -> None:
        for name, value in values.items():
            self.found.setdefault(name, []).append(value)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.note(grad_norms=optimizer.gradient_norm().item())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.note(losses=outputs["step_loss"].item())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.note(lr_during_epoch=trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        rule = self.rule
        monitored = sum(weight * pl_module.results[name] for name, weight in rule.weights.items())
        self.note(monitor=monitored, best=rule.best, stopping_steps=rule.count)
        self.note(lr_after=trainer.optimizers[0].param_groups[0]["lr"])


def fit(case: Case, folder: Path, *more: pl.Callback, resume: bool = False) -> tuple[CTRModule, dict[str, list[Any]]]:
    meta, module = case.meta, case.module()
    given = meta["monitor"] if isinstance(meta["monitor"], dict) else {meta["monitor"]: 1.0}
    rule = ReduceOnPlateau(
        {{"AUC": "validation/auc", "logloss": "validation/log_loss"}[name]: weight for name, weight in given.items()},
        meta["monitor_mode"],
        patience=meta["early_stop_patience"],
        factor=meta["lr_factor"] if meta.get("reduce_lr_on_plateau", True) else 1.0,
        min_rate=meta["min_lr"],
        min_delta=meta["min_delta"],
    )
    watch = Watch(rule)
    trainer = trainer_of(
        folder,
        callbacks=list(more),
        max_epochs=meta["epochs_allowed"],
        gradient_clip_val=meta["max_gradient_norm"],
    )
    # As the command line orders them.
    trainer.callbacks[:0] = [rule, watch]
    trainer.fit(module, CaseData(case), ckpt_path=folder / "checkpoints/last" if resume else None)
    return module, watch.found


@pytest.mark.parametrize("path", files("fit"), ids=lambda path: path.stem)
def test_whole_fit(path: Path, tmp_path: Path) -> None:
    case = Case(path)
    module, found = fit(case, tmp_path / "whole")
    for name, rtol in {
        "losses": 1e-5, "grad_norms": 1e-5, "monitor": 1e-6, "best": 1e-6, "lr_during_epoch": 1e-7,
        "lr_after": 1e-7, "stopping_steps": 0,
    }.items():  # fmt: skip
        close(name, torch.tensor(found[name]).double(), case.arrays[name].double().flatten(), rtol=rtol)
    noisy, by_noise = case.noisy(module.network), case.meta["optimizer"]["lr"] * len(found["losses"])
    for name, (tensor, view, change) in case.places(module.network).items():
        close(name, view(tensor), change(case.arrays[f"final/{name}"]), atol=by_noise if id(tensor) in noisy else 1e-5)
    ours = {name: value.clone() for name, value in module.network.state_dict().items()}
    if noisy:
        case.load(module.network, "final")
    with torch.no_grad():
        valid = [module.eval()(case.batch("valid_", step)).sigmoid() for step in range(len(case.arrays["valid_ids"]))]
    close("valid_probability", torch.stack(valid), case.arrays["valid_probability"], atol=1e-5)
    # The best parameters are a checkpoint too, whose metrics are those of FuxiCTR's end.
    best = CheckpointReader(tmp_path / "whole/checkpoints/best")
    summary = json.loads((tmp_path / "whole/summary.json").read_text())["best"]
    assert best.header["step"] == summary["step"] == case.meta["steps_per_epoch"] * (case.meta["best_epoch"] + 1)
    final = case.meta["final_metrics"]
    assert summary["validation/auc"] == pytest.approx(final["AUC"], rel=1e-6)
    assert summary["validation/log_loss"] == pytest.approx(final["logloss"], rel=1e-5)

    # Interrupted in the epoch after the first drop of the rate, and resumed.
    at = case.meta["steps_per_epoch"] * (1 + found["stopping_steps"].index(1)) + 3
    with pytest.raises(KeyError):
        fit(case, tmp_path / "parts", Stop(at))
    parts, rest = fit(case, tmp_path / "parts", resume=True)
    for name, values in rest.items():
        assert values == found[name][len(found[name]) - len(values) :], name
    theirs = parts.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
