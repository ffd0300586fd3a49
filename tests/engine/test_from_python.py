"""Contract: from Python, Lightning's calls do what its documentation says, and a checkpoint alone makes a module."""

import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn

from datamodules.criteo import Criteo
from lightning_dlrm import DLRM, SGD, Averaging, CTRModule, CTRNetwork, FolderCheckpointIO, RowWiseAdagrad
from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.engine.loading import KEY
from lightning_dlrm.engine.metrics_logger import EvaluationWriter
from lightning_dlrm.engine.plateau import ReduceOnPlateau
from lightning_dlrm.optim.schedules import WarmupThenDecay
from lightning_dlrm.sharding.checkpoint import CheckpointReader
from lightning_dlrm.tables.embeddings import Embeddings, TableSettings
from lightning_dlrm.tracking.run_folder import RunFolder
from tests.front_door.test_frozen_files import ARCHIVE
from tests.toy import ToyData, toy_batch, toy_dlrm, toy_module, toy_schema


class OwnNetwork(CTRNetwork):
    """A user's own, which does not say what it computes."""

    def __init__(self, features: Features, seed: int) -> None:
        super().__init__(features.dense)
        self.embeddings = Embeddings(features.tables, 4, seed)
        self.logit = nn.Linear(4 * len(features.tables) + features.dense, 1)

    def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        return self.logit(torch.cat([self.embeddings(ids), dense_BI], 1)).squeeze(1)


def trainer_in(folder: Path, **options: object) -> pl.Trainer:
    options = {"logger": False, "plugins": [FolderCheckpointIO()], **options}
    return pl.Trainer(  # type: ignore[arg-type]
        max_epochs=1, enable_progress_bar=False, use_distributed_sampler=False, accelerator="cpu",
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, **options,
    )  # fmt: skip


def fitted(module: CTRModule, folder: Path) -> Path:
    """Train for an epoch and save a checkpoint."""
    trainer = trainer_in(folder, enable_checkpointing=False)
    trainer.fit(module, ToyData())
    trainer.save_checkpoint(folder / "checkpoint")
    return folder / "checkpoint"


def test_what_lightnings_calls_return(tmp_path: Path) -> None:
    module, data, trainer = toy_module(), ToyData(), trainer_in(tmp_path)
    trainer.fit(module, data)
    for stage in ("validate", "test"):
        [metrics] = getattr(trainer, stage)(module, data, verbose=False)
        assert metrics == module.results and len(metrics) == 5
    predictions = trainer.predict(module, data)
    assert predictions is not None and sum(len(batch["probability"]) for batch in predictions) == 100
    batch = toy_batch(3, seed=1)
    assert module(batch).shape == (3,)
    assert torch.equal(toy_module()(batch), toy_module()(batch)), "an untrained module is called as well"


def test_a_trainer_without_our_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="FolderCheckpointIO"):
        trainer_in(tmp_path, plugins=None).fit(toy_module(), ToyData())
    trainer_in(tmp_path, plugins=None, enable_checkpointing=False, limit_train_batches=1).fit(toy_module(), ToyData())


@pytest.mark.parametrize("averaging", [None, Averaging(decay=0.9)], ids=["last", "averages"])
def test_a_module_from_its_checkpoint(averaging: Averaging | None, tmp_path: Path) -> None:
    tables = TableSettings(dims={"C3": 2})
    network = partial(DLRM, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[6], interaction="cat", tables=tables)
    module = CTRModule(
        network,
        RowWiseAdagrad(0.1),
        partial(torch.optim.Adagrad, lr=0.01),
        averaging=averaging,
        schema=toy_schema(),
        seed=3,
    )
    folder = fitted(module, tmp_path)
    loaded = CTRModule.load_from_checkpoint(folder)
    evaluations = [trainer_in(tmp_path).validate(which, ToyData(), verbose=False) for which in (module, loaded)]
    assert evaluations[0] == evaluations[1]
    assert loaded.schema == module.schema and loaded.table_rule.learning_rate == 0.1


def test_data_of_another_encoding_are_refused(tmp_path: Path) -> None:
    """Their ids name other values, so scores would be wrong, even if all tables have the same sizes."""
    load = partial(CTRModule.load_from_checkpoint, fitted(toy_module(), tmp_path), toy_dlrm)
    other = toy_schema(protocol="other")
    assert load(schema=toy_schema()).schema == toy_schema()
    for schema in (other, toy_schema(tables={"C1": 5})):
        with pytest.raises(UserError, match=r"checkpoint was trained on data with another encoding .*: give the data"):
            load(schema=schema)
    loaded = load()
    for call in ("validate", "test", "predict", "fit"):
        with pytest.raises(UserError, match="the module was made or trained on data with another encoding"):
            getattr(trainer_in(tmp_path), call)(loaded, ToyData(schema=other))


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    module = CTRModule(OwnNetwork, SGD(0.1), torch.optim.Adagrad, schema=toy_schema())
    assert module.size.flops_per_sample_forward == 2 * 18, "counted by torch"
    folder = fitted(module, tmp_path)
    with pytest.raises(UserError, match=r"names .*OwnNetwork, which is not a class of this package"):
        CTRModule.load_from_checkpoint(folder)
    batch = toy_batch(5, seed=1)
    assert torch.equal(CTRModule.load_from_checkpoint(folder, network=OwnNetwork)(batch), module(batch))
    lambdas = CTRModule(DLRM, SGD(0.1), lambda parameters: torch.optim.SGD(parameters, lr=0.1), schema=toy_schema())
    with pytest.raises(UserError, match="does not describe its dense_optimizer"):
        CTRModule.load_from_checkpoint(fitted(lambdas, tmp_path / "lambdas"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("network", "hostile.Network"),
        ("network", {"class_path": "hostile.Network"}),
        ("schedule", {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "hostile.rate"}}),
        ("loss", ["hostile.Loss"]),
    ],
)
def test_a_checkpoint_imports_no_module(
    option: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = fitted(toy_module(dense=partial(torch.optim.Adagrad, lr=0.05)), tmp_path)
    rest = CheckpointReader(folder).rest()
    rest[KEY]["options"] |= {"network": {"class_path": "DLRM"}, option: value}
    monkeypatch.setattr(CheckpointReader, "rest", lambda _: rest)
    with pytest.raises(
        UserError, match=r"names hostile\.\w+, which is not a class of this package and is not imported"
    ):
        CTRModule.load_from_checkpoint(folder)


def test_a_rule_as_dense_optimizer_as_in_earlier_releases() -> None:
    with pytest.deprecated_call(match=r"functools\.partial\(torch\.optim\.SGD, lr=0\.1"):
        module = CTRModule(OwnNetwork, SGD(1.0), SGD(0.1), schema=toy_schema())  # type: ignore[arg-type]
    assert module.learning_rates["dense"] == 0.1
    with pytest.raises(UserError, match="RowWiseAdagrad updates rows of tables"):
        CTRModule(OwnNetwork, SGD(1.0), RowWiseAdagrad(0.1), schema=toy_schema())  # type: ignore[arg-type]


def test_a_fast_dev_run_takes_any_warm_up(tmp_path: Path) -> None:
    schedule = partial(WarmupThenDecay, warmup_steps=100)
    trainer_in(tmp_path, fast_dev_run=True).fit(toy_module(schedule=schedule), ToyData())
    with pytest.raises(UserError, match=r"more than half of the fit's 1 steps; leave it out, or take a schedule with"):
        trainer_in(tmp_path, max_steps=1).fit(toy_module(schedule=schedule), ToyData())


def test_an_interrupted_evaluation_leaves_no_samples_behind(tmp_path: Path) -> None:
    class Interrupted(pl.Callback):
        def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyError("interrupted")

    module = toy_module()
    [expected] = trainer_in(tmp_path).validate(module, ToyData(), verbose=False)
    with pytest.raises(KeyError):
        trainer_in(tmp_path, callbacks=[Interrupted()]).validate(module, ToyData(), verbose=False)
    assert trainer_in(tmp_path).validate(module, ToyData(), verbose=False) == [expected]


def test_metrics_of_an_evaluation_are_logged_once_with_all_digits(tmp_path: Path) -> None:
    class Kept(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            told.append({name: value for name, value in metrics.items() if name != "epoch"})

    told: list[dict[str, float]] = []
    module = toy_module()
    trainer = trainer_in(tmp_path, logger=Kept(), callbacks=[EvaluationWriter(RunFolder(tmp_path))])
    trainer.validate(module, ToyData(), verbose=False)
    assert told == [module.results]


def test_a_plateau_of_a_metric_that_validations_do_not_yield_is_refused(tmp_path: Path) -> None:
    ungrouped, unknown = ToyData(), ToyData()
    ungrouped.group = None  # type: ignore[attr-defined]
    # Misspelt; without groups, as the datamodule says; without groups, as the first validation shows.
    for data, monitor, said in (
        (unknown, "validation/acu", "monitor is validation/acu, which validations do not report; did you mean valid"),
        (ungrouped, {"validation/auc": 1.0, "validation/group_auc": 1.0}, "validation/group_auc needs a kept column"),
        (unknown, "validation/group_auc", "validation/group_auc needs a kept column as the datamodule's group"),
    ):
        module, trainer = toy_module(), trainer_in(tmp_path, callbacks=[ReduceOnPlateau(monitor)])
        with pytest.raises(UserError, match=said) as refused:
            trainer.fit(module, data)
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("run", ["dlrm", "dcn"])
def test_a_checkpoint_of_an_earlier_release(run: str, tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "runs" / run / "checkpoints/last"
    data = Criteo(str(tmp_path / "dataset"))
    with pytest.raises(UserError, match=r"schema=data\.schema"):
        CTRModule.load_from_checkpoint(folder)
    module = CTRModule.load_from_checkpoint(folder, schema=data.schema)
    [metrics] = trainer_in(tmp_path).validate(module, data, verbose=False)
    [expected] = trainer_in(tmp_path).validate(module, data, ckpt_path=folder, verbose=False)
    assert metrics == pytest.approx(expected, rel=1e-6)
    (folder.parents[1] / "config.yaml").unlink()
    with pytest.raises(UserError, match="does not describe its model"):
        CTRModule.load_from_checkpoint(folder, schema=data.schema)


def test_options_that_a_checkpoint_cannot_name_draw_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = toy_module(schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer))
    trainer = trainer_in(tmp_path, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module, ToyData())
    said = [record.getMessage() for record in caplog.records if "checkpoints cannot describe" in record.getMessage()]
    assert len(said) == 1 and "schedule" in said[0] and "network" not in said[0]
