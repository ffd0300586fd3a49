"""Criteo's click logs, and demo data shaped like them, as LightningDataModules."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl

from datamodules.generate.demo import DemoSettings, demo_folder, demo_schema, generate_demo
from datamodules.parquet import Folder, check_sizes, load_schema, open_part, part_files
from datamodules.stream.loader import Cache, Loader, TrainingLoader
from datamodules.stream.order import LANES, Shuffle
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import SCHEMA_FILE, SPLITS, DatasetSchema, SplitName

DEMO = "demo"

# Looking into a footer takes some 10 ms. Of larger datasets the rest is seen when a file is opened.
_FOOTERS_AT_START = 100

_STAGE_SPLITS: dict[str, tuple[SplitName, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
}


class FolderData(pl.LightningDataModule):
    """A dataset folder as batches; what all datamodules here have in common.

    Args:
        folder: The dataset folder.
        batch_size: Training samples of a batch over all ranks together (the global batch).
        evaluation_batch_size: Samples of a batch over all ranks in validate, test and predict.
        shuffle: `window` for another order in every epoch: shuffled row groups, read in 48 lanes at once, each
            shuffled in itself. The window, a row group of 16,384 rows in each lane (786,432 rows), and what is decoded
            ahead take about 170 MB for Criteo's columns, over all ranks. `full` for a shuffle of all rows in every
            epoch; it needs `cache: memory`. `none` for the order of the files.
        cache: `memory` to decode the rows once and keep them: 157 bytes a row for Criteo's columns, in every rank
            those of the whole training split. It is refused where they do not fit. `none` to decode them every time.
        threads: How many threads decode. One feeds a training on the CPU with little to spare for more; a GPU may
            want more.
        verify: Compare the checksums of the pages that are read, which takes about 5% of the reader's speed.
        seed: Chooses the orders of `window` and `full`; by default seed_everything, or 0 from Python.
        predict_split: What predict scores; `all` is train, validation and test, one after the other.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 2048,
        evaluation_batch_size: int = 16_384,
        shuffle: Shuffle = "window",
        cache: Cache = "none",
        threads: int = 1,
        verify: bool = True,
        seed: int | None = None,
        predict_split: Literal["train", "validation", "test", "all"] = "test",
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "evaluation_batch_size": evaluation_batch_size, "threads": threads}
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"data: {name} is {count}; give at least 1")
        if shuffle == "full" and cache != "memory":
            raise UserError("data: shuffle full needs all rows in memory: set data.cache to memory, or shuffle window")
        self.folder = Folder(folder)
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.shuffle = shuffle
        self.cache = cache
        self.threads = threads
        self.verify = verify
        self.seed = seed or 0
        self.predict_split = predict_split
        self._schema: DatasetSchema | None = None

    @property
    def schema(self) -> DatasetSchema:
        """What the data are, without preparing them. Data that are not made yet have no files in it.

        Raises:
            UserError: there is no dataset in the folder, or it is not what the datamodule reads.
        """
        if self._schema is not None:
            return self._schema
        if (planned := self._to_make()) is not None:
            return self._accepted(planned)
        self._schema = self._accepted(load_schema(self.folder))
        return self._schema

    @property
    def planned(self) -> DatasetSchema | None:
        """The schema of data that are generated when they are first needed; None for data that must be there."""
        return None

    @property
    def training_batches(self) -> int:
        """Batches of a training epoch, as far as the trainer takes them; known without preparing the data."""
        split = self.schema.splits.get("train")
        return self._batches_taken(-(-split.rows // self.batch_size)) if split else 0

    def prepare_data(self) -> None:
        """Makes data that are generated, unless they are there. Real data are prepared by `preprocess`."""
        if self._to_make() is not None:
            assert self.folder.local is not None
            self._generate(self.folder.local)

    def setup(self, stage: str) -> None:
        """Looks at the files that the stage needs: their sizes, and what their footers tell.

        Raises:
            UserError: a split has no rows; a file is missing or altered, or has ids beyond its table.
        """
        splits = list(_STAGE_SPLITS.get(stage, self._predict_splits))
        if stage == "fit" and self.trainer is not None and self.trainer.limit_val_batches == 0:
            splits.remove("validation")
        self._require(splits)
        files = list(part_files(self.schema, splits))
        check_sizes(self.folder, files)
        rank, world = self._rank_and_world
        for file in files[rank::world][:_FOOTERS_AT_START]:
            open_part(self.folder, self.schema, file).close()

    def train_dataloader(self) -> TrainingLoader:
        """Batches in shuffled order, with a position that Lightning keeps in checkpoints."""
        self._require(["train"])
        _, world = self._rank_and_world
        if world > LANES and self.shuffle == "window":
            raise UserError(
                f"{world} ranks, but data.shuffle window reads {LANES} lanes, and each rank needs one: use at most "
                f"{LANES} ranks, or data.shuffle full with data.cache memory, or none"
            )
        loader = TrainingLoader(
            str(self.folder),
            self.schema,
            ["train"],
            shuffle=self.shuffle,
            seed=self.seed,
            batch_size=self.batch_size,
            **self._loader_options(),
        )
        loader.limit_epoch(self._batches_taken(len(loader)))
        return loader

    def val_dataloader(self) -> Loader:
        return self._evaluation_loader(["validation"])

    def test_dataloader(self) -> Loader:
        return self._evaluation_loader(["test"])

    def predict_dataloader(self) -> Loader:
        return self._evaluation_loader(self._predict_splits, rows=True)

    @property
    def _predict_splits(self) -> tuple[SplitName, ...]:
        if self.predict_split == "all":
            return tuple(name for name in SPLITS if name in self.schema.splits)
        return (self.predict_split,)

    @property
    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _batches_taken(self, batches: int) -> int:
        """How many batches of an epoch the trainer takes."""
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return min(limit, batches) if isinstance(limit, int) else int(batches * limit)

    def _evaluation_loader(self, splits: Sequence[SplitName], **options: Any) -> Loader:
        self._require(splits)
        options |= self._loader_options()
        return Loader(str(self.folder), self.schema, splits, batch_size=self.evaluation_batch_size, **options)

    def _loader_options(self) -> dict[str, Any]:
        rank, world = self._rank_and_world
        trainer = self.trainer
        return {
            "rank": rank,
            "world": world,
            "cache": self.cache,
            "threads": self.threads,
            "verify": self.verify,
            "pin": trainer is not None and trainer.strategy.root_device.type == "cuda",
            "copies": 1 if trainer is None else -(-world // trainer.num_nodes),
        }

    def _to_make(self) -> DatasetSchema | None:
        """The schema of data that are yet to be generated."""
        folder = self.folder.local
        return None if folder is None or (folder / SCHEMA_FILE).is_file() else self.planned

    def _require(self, splits: Sequence[SplitName]) -> None:
        has = {name: split.rows for name, split in self.schema.splits.items() if split.rows}
        for name in splits:
            if name not in has:
                found = ", ".join(f"{name} ({rows:,} rows)" for name, rows in has.items()) or "no rows at all"
                raise UserError(f"{self.folder} has no rows in its {name} split: it has {found}; choose another split")
        if not splits:
            raise UserError(f"{self.folder} has no rows at all; make the dataset again")

    def _accepted(self, schema: DatasetSchema) -> DatasetSchema:
        """The schema, if the datamodule reads such data."""
        return schema

    def _generate(self, folder: Path) -> None:
        """Makes the planned data."""
        raise TypeError(f"{type(self).__name__} does not define _generate")


class Criteo(FolderData):
    """A dataset folder made by `preprocess` or `generate`, or demo data.

    Args:
        path: A dataset folder, or `demo` for planted demo data, which are made when they are first needed. A URL such
            as `s3://bucket/folder`, `gs://...` or `hf://...` works where the package for it is installed.
        demo: What demo data to make; of no effect on a dataset folder.
        options: Those of FolderData.

    Raises:
        UserError: there is no dataset at `path`, or an option is out of range.
    """

    kind: ClassVar[str | None] = None
    """The only `dataset` that a schema may name; None for any."""

    def __init__(
        self,
        path: str,
        *,
        demo: DemoSettings = DemoSettings(),  # noqa: B008 (immutable)
        **options: Any,
    ) -> None:
        super().__init__(demo_folder(demo) if path == DEMO else path, **options)
        self.path = path
        self.demo = demo

    @property
    def planned(self) -> DatasetSchema | None:
        return demo_schema(self.demo) if self.path == DEMO else None

    def _generate(self, folder: Path) -> None:
        generate_demo(self.demo, folder)

    def _accepted(self, schema: DatasetSchema) -> DatasetSchema:
        if self.kind is not None and schema.dataset != self.kind:
            raise UserError(
                f"{self.path} holds the dataset {schema.dataset!r}, {type(self).__name__} reads {self.kind!r}: "
                "give its dataset folder with --data.path, or use the datamodule Criteo, which reads any"
            )
        return schema


class CriteoKaggle(Criteo):
    """Criteo, but only for the Display Advertising Challenge of Kaggle."""

    kind = "kaggle"


class CriteoTerabyte(Criteo):
    """Criteo, but only for the Terabyte click logs."""

    kind = "terabyte"
