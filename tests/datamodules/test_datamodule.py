"""Contract: the Criteo datamodules give their schema before data are prepared, check the files of a
stage at its start, and under Lightning's fit stop and resume amid an epoch with the same batches."""

import gc
import itertools
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from datamodules import clicks
from datamodules import writer as writing
from datamodules.clicks import Clicks
from datamodules.criteo import Criteo, CriteoKaggle, CriteoTerabyte
from datamodules.generate.demo import DemoSettings, demo_folder
from datamodules.preprocess.workers import usable_cores
from datamodules.stream.loader import TrainingLoader
from datamodules.writer import DatasetWriter
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Column, DatasetSchema

COLUMNS = (
    Column(name="label", role="label"),
    Column(name="I1", role="dense"),
    Column(name="C1", role="categorical", cardinality=5000),
)
SIZES = {"train": 1050, "validation": 70, "test": 40}


def make_dataset(folder: Path, sizes: dict[str, int] = SIZES, dataset: str = "kaggle", ids: int = 5000) -> Path:
    rng = np.random.default_rng(0)
    with DatasetWriter(folder, COLUMNS) as writer:
        for split, rows in sizes.items():
            arrays = {
                "label": rng.integers(0, 2, rows).astype(np.int8),
                "I1": np.arange(rows, dtype=np.float32),
                "C1": rng.integers(0, ids, rows).astype(np.int32),
            }
            writer.write(split, arrays)
        writer.finish(dataset=dataset, protocol="dlrm")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("criteo") / "data")


class Recorder(pl.LightningModule):
    """Keeps the dense column, which tells the rows apart, of every batch that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.train_rows: list[list[float]] = []
        self.validation_rows: list[list[float]] = []

    def training_step(self, batch: Batch) -> torch.Tensor:
        self.train_rows.append(batch.dense[:, 0].tolist())
        return self.layer(batch.dense).sum() * 0

    def validation_step(self, batch: Batch) -> None:
        self.validation_rows.append(batch.dense[:, 0].tolist())

    def predict_step(self, batch: Batch) -> Any:
        return batch.rows

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(**options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**quiet, **options})


@pytest.mark.parametrize(
    ("options", "data_options", "stop"),
    [
        *(({}, {}, stop) for stop in (3, 11, 14)),
        *(({"val_check_interval": 4}, {}, stop) for stop in (3, 11)),
        *(({"accumulate_grad_batches": 3}, {}, stop) for stop in (7, 11)),
        *(({"limit_train_batches": 7}, {}, stop) for stop in (7, 11)),
        ({"val_check_interval": 4, "accumulate_grad_batches": 2}, {"shuffle": "full", "cache": "memory"}, 14),
        ({"val_check_interval": 4}, {"cache": "memory", "threads": 2}, 20),
    ],
    ids=str,
)
def test_a_fit_resumes_with_the_batches_that_would_have_come(
    folder: Path, tmp_path: Path, stop: int, options: dict[str, Any], data_options: dict[str, Any]
) -> None:
    """``stop`` counts batches, 11 (or 7) to an epoch; the checkpoint is that of the last batch before it."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if len(module.train_rows) == stop:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    def fit(callbacks: list[pl.Callback], ckpt_path: Path | None = None) -> Recorder:
        module = Recorder()
        trainer = make_trainer(max_epochs=3, callbacks=callbacks, **options)
        data = Criteo(str(folder), batch_size=100, seed=5, **data_options)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module

    whole = fit([Save()])
    batches = options.get("limit_train_batches", 11)
    assert len(whole.train_rows) == 3 * batches
    if batches == 11:
        for first in (0, 11, 22):
            assert sorted(itertools.chain(*whole.train_rows[first : first + 11])) == list(range(1050))
    assert whole.train_rows[0] != whole.train_rows[batches]
    assert sorted(whole.validation_rows[0]) == list(range(70))

    resumed = fit([], tmp_path / "last.ckpt")
    assert resumed.train_rows == whole.train_rows[stop:]


def test_predict_all_numbers_rows_through_the_splits(folder: Path) -> None:
    for split, count in (("all", 1050 + 70 + 40), ("validation", 70)):
        data = Criteo(str(folder), evaluation_batch_size=64, predict_split=split)  # type: ignore[arg-type]
        rows: Any = make_trainer().predict(Recorder(), datamodule=data)
        assert torch.equal(torch.cat(rows), torch.arange(count))


def test_evaluation_keeps_the_order_of_the_file_and_every_row(folder: Path) -> None:
    data = Criteo(str(folder), evaluation_batch_size=32)
    for loader, rows in ((data.val_dataloader(), 70), (data.test_dataloader(), 40)):
        assert torch.cat([batch.dense[:, 0] for batch in loader]).tolist() == list(range(rows))


def test_the_epoch_of_a_trainer_that_takes_a_share_of_the_batches(folder: Path) -> None:
    data = Criteo(str(folder), batch_size=100)
    make_trainer(limit_train_batches=0.5, max_epochs=1).fit(module := Recorder(), datamodule=data)
    loader = data.train_dataloader()
    assert isinstance(loader, TrainingLoader) and len(loader) == 11
    assert len(list(loader)) == len(module.train_rows) == 5


def test_demo_gives_its_schema_first_and_makes_its_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DLRM_CACHE", str(tmp_path))
    demo = DemoSettings(train_rows=3000, validation_rows=500, test_rows=400, max_table_rows=100)
    data = Criteo("demo", demo=demo)
    before = data.schema
    assert not demo_folder(demo).exists() and before.splits["train"].rows == 3000
    data.prepare_data()
    data.setup("fit")
    written = demo_folder(demo) / "dataset.json"
    stamp = written.stat().st_mtime_ns
    assert data.schema.features == before.features
    assert data.schema.encoding_fingerprint == before.encoding_fingerprint
    assert sum(len(batch) for batch in data.train_dataloader()) == 3000
    Criteo("demo", demo=demo).prepare_data()
    assert written.stat().st_mtime_ns == stamp


def test_a_wrong_path_is_an_error_and_no_fallback(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset folder at .*nowhere"):
        _ = Criteo(str(tmp_path / "nowhere")).schema
    with pytest.raises(UserError, match="is not a dataset folder"):
        Criteo(str(tmp_path)).setup("fit")


def test_clicks_have_no_demo_data_but_read_a_folder_of_this_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = r"^data.path is missing: give --data.path DIR, a folder made by preprocess \(demo data .* class Criteo\)$"
    for path in ("demo", Path("demo"), ""):
        with pytest.raises(UserError, match=said):
            Clicks(path)
    make_dataset(Path("demo"))
    assert Clicks("demo").schema.dataset == "kaggle"


def test_the_thin_names_refuse_other_datasets(tmp_path: Path, folder: Path) -> None:
    assert CriteoKaggle(str(folder)).schema.dataset == "kaggle"
    with pytest.raises(UserError, match=r"holds the dataset 'kaggle', but CriteoTerabyte reads 'terabyte'"):
        _ = CriteoTerabyte(str(folder)).schema
    terabyte = make_dataset(tmp_path / "terabyte", {"train": 3}, "terabyte")
    assert CriteoTerabyte(str(terabyte)).schema.dataset == "terabyte"
    with pytest.raises(UserError, match="CriteoKaggle reads 'kaggle'"):
        CriteoKaggle("demo").schema  # noqa: B018


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_split_without_rows_is_refused_at_the_start(tmp_path: Path, stage: str) -> None:
    other = "test" if stage in ("fit", "validate") else "train"
    folder = make_dataset(tmp_path / "data", {other: 30})
    with pytest.raises(UserError, match=rf"no rows in its \w+ split: it has {other} \(30 rows\)"):
        Criteo(str(folder)).setup(stage)


def test_damage_is_seen_at_the_start(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data")
    path = folder / "validation" / "part-00000.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    Criteo(str(folder)).setup("test")
    with pytest.raises(UserError, match=r"validation/part-00000\.parquet is truncated"):
        Criteo(str(folder)).setup("fit")
    path.unlink()
    with pytest.raises(UserError, match=r"validation/part-00000\.parquet is missing"):
        Criteo(str(folder)).setup("validate")


def test_ids_beyond_their_table_are_seen_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writing, "check_values", lambda *_: None)
        folder = make_dataset(tmp_path / "data", ids=6000)
    with pytest.raises(UserError, match=r"train/part-00000\.parquet, row group 0, column C1 has the id "):
        Criteo(str(folder)).setup("fit")


def test_values_of_one_file_a_split_are_read_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "ROW_GROUP_ROWS", 10)
    monkeypatch.setattr(writing, "ROWS_PER_FILE", 20)
    data = Criteo(str(make_dataset(tmp_path / "data", {"train": 70, "validation": 50})))
    opened, read = [], []
    open_part, read_slices = clicks.open_part, clicks.read_slices
    monkeypatch.setattr(clicks, "open_part", lambda *given: opened.append(given[2].path) or open_part(*given))
    monkeypatch.setattr(
        clicks, "read_slices", lambda *given, **options: read.append(given[1].path) or read_slices(*given, **options)
    )
    data.setup("fit")
    assert len(opened) == 4 + 3
    assert read == ["train/part-00000.parquet", "validation/part-00000.parquet"]
    opened.clear()
    monkeypatch.setattr(clicks, "_FILES_AT_START", 2)
    data.setup("fit")
    assert opened == read[:2] == read[2:]


def test_a_full_shuffle_needs_the_rows_in_memory(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.shuffle is full, which needs all rows in memory: set data\.cache to memory"
    ):
        Criteo(str(folder), shuffle="full")


def test_batches_are_pinned_where_the_trainer_is_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    data = Criteo(str(folder), batch_size=100)
    for device, count in (("cpu", 0), ("cuda", 11 * 3)):
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=0,
            world_size=1,
            num_nodes=1,
            limit_train_batches=1.0,
            max_epochs=1,
            max_steps=-1,
            accumulate_grad_batches=1,
            strategy=SimpleNamespace(root_device=torch.device(device)),
        )
        assert len(list(data.train_dataloader())) == 11 and len(pinned) == count
        assert data._loader_options()["threads"] == max(1, min(8, usable_cores() // 2) if count else 1)


@pytest.mark.parametrize("name", ["batch_size", "evaluation_batch_size", "threads"])
def test_a_batch_size_below_one_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 0"):
        Criteo(str(folder), **{name: 0})  # type: ignore[arg-type]


def test_more_ranks_than_lanes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Criteo(str(folder))
    monkeypatch.setattr(Criteo, "_rank_and_world", (0, 49))
    with pytest.raises(UserError, match=r"49 ranks, and data\.shuffle window serves at most 48"):
        data.train_dataloader()
    assert DatasetSchema.load(folder) == data.schema


def test_a_fit_that_ends_early_leaves_no_reader(folder: Path) -> None:
    others = set(threading.enumerate())

    def readers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread not in others]

    for end in (lambda data: data.teardown("fit"), lambda data: data.on_exception(KeyboardInterrupt())):
        # More batches than a reader makes ahead, so that it is still alive when the fit ends.
        data = Criteo(str(folder), batch_size=1)
        loader = data.train_dataloader()
        loader.limit_epoch(len(loader), epochs=9)
        batches = iter(loader)
        next(batches)
        assert "batch reader" in readers() and loader._next_epoch is not None
        end(data)
        batches.close()  # type: ignore[attr-defined]
        del batches
        gc.collect()
        assert not readers()


def test_ranks_with_more_samples_than_others_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for options, told in (({}, True), ({"shuffle": "full", "cache": "memory"}, False), ({"shuffle": "none"}, False)):
        data = Criteo(str(folder), **options)  # type: ignore[arg-type]
        monkeypatch.setattr(Criteo, "_rank_and_world", (0, 2))
        caplog.clear()
        data.train_dataloader()
        assert ("the busiest rank trains on 2.00 times the mean" in caplog.text) == told, caplog.text


def test_short_names_of_the_package() -> None:
    import datamodules

    assert (datamodules.Criteo, datamodules.CriteoKaggle, datamodules.CriteoTerabyte) == (
        Criteo,
        CriteoKaggle,
        CriteoTerabyte,
    )
    with pytest.raises(AttributeError, match="Avazu"):
        _ = datamodules.Avazu
