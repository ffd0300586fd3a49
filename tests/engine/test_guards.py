"""Contract: a fit that has gone wrong says so in one line, and never saves a bad state over a good one;
a fit with a target stops there and says how long it took."""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file

from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import file_sha256
from lightning_dlrm.engine import guards
from lightning_dlrm.engine.checkpointing import FolderCheckpointIO, newest_checkpoint
from lightning_dlrm.engine.evaluation import TrainingWindow
from lightning_dlrm.engine.guards import words_of_chance
from lightning_dlrm.engine.metrics_logger import MetricsLogger
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.stopping import StopAtAUC
from lightning_dlrm.models.baselines import DeepFM
from lightning_dlrm.objectives.metrics import exact_auc
from lightning_dlrm.optim.rules import SGD, Adam
from lightning_dlrm.optim.schedules import Cosine
from lightning_dlrm.sharding.checkpoint import CheckpointReader
from lightning_dlrm.tables.embeddings import QuotientRemainder, TableSettings
from lightning_dlrm.tracking.run_folder import RunFolder
from tests.engine.test_fit import StopAt, lines, losses, trainer_of
from tests.engine.test_from_python import trainer_in
from tests.toy import ToyData, ToyLoader, toy_batch, toy_dlrm, toy_module, toy_schema


class Spoilt(ToyData):
    """One dense value that overflows, in sample 3 of the batch of step 6."""

    def train_dataloader(self) -> ToyLoader:
        loader = ToyLoader("train", self.batch_size)
        loader.batches[5].dense[3, 1] = torch.finfo(torch.float32).max
        return loader


@pytest.mark.parametrize(("log_every", "every"), [(4, 0), (1, 0), (100, 7), (100, 0)])
def test_an_infinite_loss_stops_the_fit_and_saves_nothing(log_every: int, every: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {"log_every_n_steps": log_every, "every": every, "val_check_interval": 4}
    with pytest.raises(UserError) as found:
        trainer_of(run, **options).fit(toy_module(), Spoilt())
    message = str(found.value)
    checked = {(4, 0): 8, (1, 0): 6, (100, 7): 7, (100, 0): 8}[log_every, every]
    late = f"; found after step {checked}" if checked > 6 else ""
    first = "first in sample 3 of it, counted from 0"
    assert f"NaN or infinite at step 6 (batch 6 of epoch 1, {first}{late}): lower the" in message
    assert "learning rates (dense 0.05, tables 0.1)" in message and "\n" not in message
    assert ("; largest gradients at step 5: " in message) == (log_every == 1)
    assert ("; set trainer.log_every_n_steps to 1 to see the largest gradients" in message) == (log_every > 1)
    assert CheckpointReader(newest_checkpoint(run / "checkpoints")).header["step"] == 4


def test_a_fit_that_logs_and_saves_nothing_ends_at_an_infinite_loss_too(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, enable_checkpointing=False, log_every_n_steps=100)
    with pytest.raises(UserError, match="the loss is NaN or infinite at step 6"):
        trainer.fit(toy_module(), Spoilt())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step == 14:
                module.network.lookups()[0].weight.data[3, 1] = float("nan")

    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"embeddings.* is NaN or infinite after step 14, so nothing is saved"):
        trainer_of(run, every=5, limit_val_batches=0, callbacks=[Spoil()]).fit(toy_module(), ToyData())
    assert CheckpointReader(newest_checkpoint(run / "checkpoints")).header["step"] == 10


def test_nothing_is_read_from_the_device_between_logged_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = torch.Tensor.item
    trainer = trainer_of(tmp_path / "run", log_every_n_steps=7, limit_val_batches=0)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: (read.append(trainer.global_step), plain(self))[1])
    trainer.fit(toy_module(), ToyData())
    # Of the first step, the guard keeps the gradients.
    assert read and set(read) <= {0, 6, 7, 13, 14}


def test_predictions_no_better_than_chance_draw_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lightning_dlrm"):
        trainer_of(tmp_path / "run").fit(toy_module(toy_dlrm, SGD(1e-9), SGD(1e-9)), ToyData())
        said = [record.getMessage() for record in caplog.records if "random predictions" in record.getMessage()]
        assert len(said) == 1
        assert "1e-09 for dense and 1e-09 for tables" in said[0] and "batches of 50" in said[0]
        caplog.clear()
        trainer_of(tmp_path / "good", max_epochs=3).fit(toy_module(), ToyData())
        assert "random predictions" not in caplog.text


def test_large_numbers_of_the_data_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    schema = replace(toy_schema(), report={"large_numbers": {"I2": 91230.0}})
    module = toy_module(toy_dlrm, SGD(1e-9), SGD(1e-9), schema=schema)
    named = (
        r"large numbers in I2 \(up to 91,230\): make the dataset with transform: standard or log1p of these columns; "
    )
    with caplog.at_level(logging.WARNING, "lightning_dlrm"):
        trainer_of(tmp_path / "run").fit(module, ToyData(schema=schema))
    assert re.search(f"random predictions .* Likely causes: {named}too few steps", caplog.text)
    with pytest.raises(UserError, match=f"infinite at step 6 .*: the data have {named}or lower the learning rates"):
        trainer_in(tmp_path, enable_checkpointing=False).fit(toy_module(schema=schema), Spoilt())


def test_chance_is_told_from_skill_by_the_number_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    warned = 0
    for _ in range(200):
        scores, labels = torch.rand(500, generator=generator), (torch.rand(500, generator=generator) < 0.2).int()
        warned += bool(words_of_chance(exact_auc(scores, labels), int(labels.sum()), 500, 1, {}))
    assert warned >= 197, "three standard deviations hold 99.7%"
    assert not words_of_chance(0.52, 20_000, 100_000, 1, {})
    assert words_of_chance(0.5, 20_000, 100_000, 1, {})
    assert words_of_chance(0.45, 20_000, 100_000, 1, {}).startswith("AUC 0.4500 is no better than random predictions")
    assert not words_of_chance(float("nan"), 0, 100, 1, {})


class Probabilities(DeepFM):
    """A network that takes the sigmoid itself, before it changes the shape."""

    def score(self, dense: torch.Tensor, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().score(dense, vectors)[:, None].sigmoid().squeeze(1)


def test_probabilities_in_place_of_logits_draw_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = "returns probabilities; expected logits, as the loss takes the sigmoid"
    with caplog.at_level(logging.WARNING, "lightning_dlrm"):
        module = toy_module(partial(Probabilities, embedding_dim=4, deep=[4]), SGD(1e-9), SGD(1e-9))
        trainer_of(tmp_path / "run").fit(module, ToyData())
        said = [record.getMessage() for record in caplog.records if words in record.getMessage()]
        assert [line.startswith("validation AUC") for line in said] == [False, True], "once, and at the validation"
        assert all("Probabilities.score (" in line and "test_guards.py, line" in line for line in said)
        assert words in module.chance and "learning rates" not in module.chance
        caplog.clear()
        trainer_of(tmp_path / "good").fit(toy_module(), ToyData())
        assert "probabilities" not in caplog.text


def test_logits_of_zero_are_explained(caplog: pytest.LogCaptureFixture) -> None:
    for log_loss, is_zero in ((0.6933, True), (0.56, False)):
        words = words_of_chance(0.5, 20_000, 100_000, 1, {}, log_loss=log_loss)
        assert words and ("ends in a ReLU" in words) == is_zero


def test_a_log_loss_far_above_that_of_the_click_rate_is_that_of_a_fit_that_diverged() -> None:
    words = words_of_chance(0.5, 20_000, 100_000, 1, {"dense": 1000.0}, log_loss=7.5e28)
    assert words.endswith(
        "Likely cause: learning rates (1000 for dense) that are too high: the log loss is 7.5e+28, and 0.5 for the "
        "click rate alone. Try a tenth of the rates"
    )
    for log_loss, has_diverged in ((1.4, False), (1.6, True)):
        words = words_of_chance(0.5, 20_000, 100_000, 1, {}, log_loss=log_loss)
        assert ("ten times the rates" in words) == (not has_diverged) and ("too high" in words) == has_diverged


def with_target(folder: Path, target: float, **options: Any) -> pl.Trainer:
    """As the command line puts the callbacks together."""
    trainer = trainer_of(folder, **options)
    recorder = next(c for c in trainer.callbacks if isinstance(c, MetricsLogger))
    trainer.callbacks.insert(0, StopAtAUC(target, recorder))
    return trainer


def test_a_fit_stops_at_its_target(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with_target(run, 0.62, max_epochs=10, val_check_interval=2).fit(toy_module(), ToyData())
    validated = [line for line in lines(run) if "validation/auc" in line]
    assert len(validated) > 1, "the first validation should be too early for this test"
    assert [line["validation/auc"] >= 0.62 for line in validated] == [False] * (len(validated) - 1) + [True]
    final = json.loads((run / "summary.json").read_text())["final"]
    assert final["samples_to_target"] == final["samples"] == 50 * validated[-1]["step"]
    assert 0 < final["time_to_target_s"] < 60
    assert CheckpointReader(run / "checkpoints/last").header["step"] == validated[-1]["step"]


def test_a_run_that_has_reached_its_target_is_not_trained_on(tmp_path: Path) -> None:
    run, options = tmp_path / "run", {"max_epochs": 10, "val_check_interval": 2}
    with_target(run, 0.62, **options).fit(toy_module(), ToyData())
    written, said = (run / "summary.json").read_text(), lines(run)
    with_target(run, 0.62, **options).fit(toy_module(), ToyData(), ckpt_path=run / "checkpoints/last")
    assert (run / "summary.json").read_text() == written and lines(run) == said
    higher = with_target(run, 0.625, **options)
    higher.fit(toy_module(), ToyData(), ckpt_path=run / "checkpoints/last")
    assert higher.global_step > said[-1]["step"]


def test_a_target_that_is_not_reached_is_null(tmp_path: Path) -> None:
    with_target(tmp_path / "run", 0.99).fit(toy_module(), ToyData())
    final = json.loads((tmp_path / "run/summary.json").read_text())["final"]
    assert final["time_to_target_s"] is None and final["samples_to_target"] is None
    with pytest.raises(UserError, match=r"stop_at_auc is 0\.3"):
        StopAtAUC(0.3, MetricsLogger(RunFolder(tmp_path), None))


def many_lookups(features: Any, seed: int) -> DeepFM:
    """Linear weights, vectors of two widths, quotients and remainders, learned factors."""
    tables = TableSettings(
        dims={"C2": 2},
        project=True,
        quotient_remainder=QuotientRemainder(collisions=10, threshold=500),
        pooling_weights="learned",
    )
    return DeepFM(features, seed, embedding_dim=4, deep=[8], batch_norm=True, tables=tables, missing="learned")


@pytest.mark.parametrize("stop", [5, 17])
def test_a_fit_with_many_lookups_lazy_adam_and_cosine_resumes_exactly(stop: int, tmp_path: Path) -> None:
    class Counted(ToyData):
        training_batches = 14

    def module() -> Any:
        return toy_module(
            many_lookups, Adam(0.02, l2=1e-3), Adam(0.01, weight_decay=0.1), partial(Cosine, warmup_steps=3)
        )

    options: dict[str, Any] = {"max_epochs": 2, "every": 1, "val_check_interval": 7, "gradient_clip_val": 1.0}
    trainer_of(tmp_path / "whole", **options).fit(whole := module(), Counted())
    run = tmp_path / "run"
    with pytest.raises(InterruptedError):
        trainer_of(run, callbacks=[StopAt(stop)], **options).fit(module(), Counted())
    trainer_of(run, **options).fit(resumed := module(), Counted(), ckpt_path=newest_checkpoint(run / "checkpoints"))
    assert losses(run) == losses(tmp_path / "whole")
    for a, b in zip(resumed.network.state_dict().values(), whole.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    tables = CheckpointReader(run / "checkpoints/last").manifest.tables
    assert {"C1", "C1/linear", "C1/pooling", "C2", "C4/quotient", "C4/remainder"} <= set(tables)
    assert set(tables["C4/quotient"].shapes) == {"weight", "mean", "square"}
    assert (run / "checkpoints/last/tables/C1/linear.0.safetensors").is_file()


def test_a_checkpoint_of_other_tables_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path / "run", max_steps=2).fit(toy_module(many_lookups), ToyData())

    def other(features: Any, seed: int) -> DeepFM:
        return DeepFM(features, seed, embedding_dim=4, deep=[8])

    trainer = pl.Trainer(
        logger=False, plugins=[FolderCheckpointIO()], enable_progress_bar=False, default_root_dir=tmp_path
    )
    with pytest.raises(UserError, match="it is of another model"):
        trainer.validate(toy_module(other), ToyData(), ckpt_path=tmp_path / "run/checkpoints/last", verbose=False)


def test_half_precision_weights_train_and_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "every": 1, "precision": "bf16-true"}
    whole = toy_module(toy_dlrm, Adam(0.02), Adam(0.02))
    trainer_of(tmp_path / "whole", **options).fit(whole, ToyData())
    assert {p.dtype for p in whole.network.parameters()} == {torch.bfloat16}
    found = list(losses(tmp_path / "whole").values())
    assert sum(found[-5:]) < sum(found[:5])
    run = tmp_path / "run"
    with pytest.raises(InterruptedError):
        trainer_of(run, callbacks=[StopAt(9)], **options).fit(toy_module(toy_dlrm, Adam(0.02), Adam(0.02)), ToyData())
    trainer_of(run, **options).fit(
        toy_module(toy_dlrm, Adam(0.02), Adam(0.02)), ToyData(), ckpt_path=newest_checkpoint(run / "checkpoints")
    )
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda batch: batch.label.__setitem__(3, -1),
            r"sample 3 of a batch has the label -1; expected 0 \(no click\)",
        ),
        (lambda batch: batch.label.__setitem__(0, 7), "sample 0 of a batch has the label 7"),
        (
            lambda batch: setattr(batch, "label", torch.full([len(batch)], math.nan)),
            "sample 0 of a batch has the label nan",
        ),
        (
            lambda batch: batch.dense.__setitem__((4, 1), -math.inf),
            "sample 4 of a batch has the dense value -inf in column 1",
        ),
        (lambda batch: batch.ids.values.__setitem__((4, 0), 5), "sample 4 of a batch has the id 5 of table C1"),
        (lambda batch: batch.ids.values.__setitem__((0, 1), -1), "sample 0 of a batch has the id -1 of table C2"),
    ],
)
@pytest.mark.parametrize("stage", ["train", "validation", "test", "predict"])
def test_values_that_cannot_be_end_every_command(
    spoil: Callable[[Batch], Any], message: str, stage: str, tmp_path: Path
) -> None:
    data, trainer = ToyData(), trainer_in(tmp_path, enable_checkpointing=False)
    split = {"predict": "test"}.get(stage, stage)
    loader = ToyLoader(split, 50)
    spoil(loader.batches[1])
    run = {"train": trainer.fit, "validation": trainer.validate, "test": trainer.test, "predict": trainer.predict}
    name = {"validation": "val"}.get(stage, stage)
    setattr(data, f"{name}_dataloader", lambda: loader)
    with pytest.raises(UserError, match=message):
        run[stage](toy_module(), data)


@pytest.mark.parametrize("change", [None, "features", "replace"])
def test_values_that_a_loader_has_checked_are_not_checked_again(change: str | None) -> None:
    module, batch = toy_module(), toy_batch(3, seed=1)
    batch.dense[2, 1] = math.inf
    batch.checked_table_rows = (9, 9, 9, 9) if change == "features" else module.schema.features.table_rows
    batch = dataclasses.replace(batch) if change == "replace" else batch.to("cpu").map(lambda tensor: tensor)
    if change is None:
        assert module.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
    else:
        with pytest.raises(UserError, match="sample 2 of a batch has the dense value inf in column 1"):
            module.transfer_batch_to_device(batch, torch.device("cpu"), 0)


def test_one_label_is_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, trainer = ToyData(), trainer_in(tmp_path)
    loader = ToyLoader("test", 50)
    for batch in loader.batches:
        batch.label.zero_()
    data.test_dataloader = lambda: loader  # type: ignore[method-assign]
    trainer.test(toy_module(), data)
    assert "all labels of the test split are equal, so its AUC is not defined (nan)" in caplog.text


def test_labels_other_than_0_and_1_end_a_fit() -> None:
    window = TrainingWindow()
    window.add(torch.zeros(3), torch.tensor([1, -1, 1], dtype=torch.int8), global_size=3)
    with pytest.raises(UserError, match=r"the labels are \[-1, 1\]; expected 0 \(no click\) and 1 \(click\)"):
        window.gather()


def test_parameters_and_optimizer_state_are_checked_at_the_end_of_a_fit_that_saves_nothing(tmp_path: Path) -> None:
    class Spoil(pl.Callback):
        def __init__(self, what: str) -> None:
            self.what = what

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step == 14:
                optimizer = module.optimizers(False)
                {
                    "dense": next(iter(optimizer.state.values()))["sum"],
                    "tables": optimizer.table_state[0]["sum"],
                    "rows": module.network.lookups()[0].weight.data,
                }[self.what][0] = float("inf")

    for what, named in {
        "dense": r"optimizer state\.dense\.bottom.*\.sum",
        "tables": r"optimizer state\.tables\.rows of C1\.\.C4\.sum",
        "rows": r"embeddings.*weight",
    }.items():
        trainer = trainer_in(tmp_path, enable_checkpointing=False, limit_val_batches=0, callbacks=[Spoil(what)])
        with pytest.raises(UserError, match=f"^{named} is NaN or infinite after step 14"):
            trainer.fit(toy_module(), ToyData())


def test_an_unlogged_loss_is_checked_on_all_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[Any] = []
    monkeypatch.setattr(guards.Ranks, "run_on_all_ranks", lambda self, action: together.append(action))
    guard, network = guards.LossGuard({}), toy_dlrm(toy_schema().features, 0)
    for step in range(guard.MOST_KEPT):
        assert not together
        guard.watch(torch.tensor(0.0), torch.zeros(1), guards.Position(step, 0, step), network)
    assert together == [guard.check]


def wreck(folder: Path, what: str) -> None:
    """Put a NaN into a checkpoint that is whole otherwise."""
    reader = CheckpointReader(folder)
    rest = reader.rest()
    manifest = json.loads((folder / "manifest.json").read_text())
    if what == "rest":
        rest["state_dict"][min(rest["state_dict"])].flatten()[0] = float("nan")
        torch.save(rest, folder / "rest.pt")
        parts = [manifest["rest"]]
    else:
        parts = manifest["tables"]["C2"]["pieces"]
        tensors = load_file(folder / parts[0]["file"])
        tensors[what][7] = float("inf")
        save_file(tensors, folder / parts[0]["file"])
    for part in parts:
        part["bytes"], part["sha256"] = (folder / part["file"]).stat().st_size, file_sha256(folder / part["file"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("rest", r"state_dict\.network\.bottom"),
        ("weight", r"weight of table C2, first in row 7 \(tables/C2\.0\.safetensors\)"),
        ("sum", r"sum of table C2, first in row 7 \(tables/C2\.0\.safetensors\)"),
    ],
)
def test_a_checkpoint_with_nan_is_refused_and_named(what: str, named: str, tmp_path: Path) -> None:
    module = toy_module(dense=partial(torch.optim.Adagrad, lr=0.05))
    trainer_of(tmp_path / "run", max_steps=2).fit(module, ToyData())
    last = tmp_path / "run/checkpoints/last"
    wreck(last, what)
    with pytest.raises(UserError, match=named):
        CheckpointReader(last).verify()

    def evaluate(**options: Any) -> None:
        trainer_in(tmp_path, plugins=[FolderCheckpointIO(**options)]).validate(
            toy_module(), ToyData(), ckpt_path=last, verbose=False
        )

    with pytest.raises(UserError, match=f"has NaN or infinite values: {named}"):
        trainer_of(tmp_path / "again").fit(toy_module(), ToyData(), ckpt_path=last)
    if what == "sum":
        # Evaluations do not need the optimizer state.
        evaluate()
        return
    with pytest.raises(UserError, match=named):
        evaluate()
    with pytest.raises(UserError, match=named):
        CTRModule.load_from_checkpoint(last, toy_dlrm)
    evaluate(allow_nonfinite=True)
    found = CTRModule.load_from_checkpoint(last, toy_dlrm, allow_nonfinite=True).network.state_dict()
    assert not all(value.isfinite().all() for value in found.values())


def test_a_value_that_overflows_in_validation_ends_the_fit(tmp_path: Path) -> None:
    class SpoiltValidation(ToyData):
        def val_dataloader(self) -> ToyLoader:
            loader = ToyLoader("validation", self.batch_size)
            loader.batches[2].dense[3, 1] = 3e38
            return loader

    with pytest.raises(UserError, match="the log loss of the validation split is NaN or infinite"):
        trainer_of(tmp_path / "run").fit(toy_module(), SpoiltValidation())
