"""Click logs in a dataset folder as a LightningDataModule: the base of all datamodules of this package."""

import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytorch_lightning as pl

from datamodules.folder import Folder, check_sizes, load_schema, part_files
from datamodules.parquet import open_part, read_beside, read_slices
from datamodules.preprocess.workers import usable_cores
from datamodules.stream.loader import Cache, Loader, TrainingLoader, require_kept
from datamodules.stream.order import LANES, Shuffle
from lightning_dlrm.contracts.errors import UserError, nearest_first, require
from lightning_dlrm.contracts.schema import SCHEMA_FILE, SPLITS, DatasetSchema, SplitName
from lightning_dlrm.contracts.terminal import counted

# A footer takes some 10 ms to check. Those of further files are checked when their rows are read.
_FILES_AT_START = 100

_UNEVEN = 1.1
"""The busiest rank's samples over the mean from which on a warning says so."""

log = logging.getLogger("lightning_dlrm")

DEMO = "demo"
"""The path that stands for demo data."""

_STAGE_SPLITS: dict[str, tuple[SplitName, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
}


class FolderData(pl.LightningDataModule):
    """A dataset folder as batches: the base class of all datamodules here.

    The shuffle `window` shuffles the row groups, reads 48 of them at once, and shuffles the rows of each 48. A window
    of row groups of 16,384 rows (786,432 rows) and the batches decoded ahead take about 170 MB for Criteo's columns,
    over all ranks, and between epochs twice as much. Larger row groups, which other writers make, are read in parts
    (512 MB for all 48 together), and each row group is decoded once for each of its parts.

    Args:
        folder: The dataset folder.
        batch_size: Training samples of a batch over all ranks together (the global batch).
        evaluation_batch_size: Samples of a batch over all ranks in validate, test and predict.
        shuffle: `window` for a new order in every epoch, shuffled within windows of 48 row groups; `full` for a shuffle
            of all rows, which needs `cache: memory`; `none` for the order of the files.
        cache: `memory` to decode the rows once and keep them: 157 bytes a row for Criteo's columns; every rank keeps
            the whole training split. It is refused if the rows do not fit. `none` to decode them in every epoch.
        threads: Threads that decode; by default one thread for training on a CPU, and half of the cores of each rank
            (at most 8) for training on a GPU.
        verify: Compare the checksums of the pages that are read, which takes about 5% of the reader's speed.
        seed: Seed of the orders of `window` and `full`; by default the seed of seed_everything, or 0 if the datamodule
            is made in Python.
        predict_split: The split that predict scores; `all` is train, validation and test, one after the other.
        group: A kept column, such as the user: evaluations also report the mean AUC over the groups of rows with the
            same value. `Batch.group` holds the values as numbers.

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
        threads: int | None = None,
        verify: bool = True,
        seed: int | None = None,
        predict_split: Literal["train", "validation", "test", "all"] = "test",
        group: str | None = None,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "evaluation_batch_size": evaluation_batch_size}
        counts |= {} if threads is None else {"threads": threads}
        for name, count in counts.items():
            require(count >= 1, f"data.{name} is {count}; give 1 or more")
        require(
            shuffle != "full" or cache == "memory",
            "data.shuffle is full, which needs all rows in memory: set data.cache to memory, or data.shuffle to window",
        )
        self.folder = Folder(folder)
        self.batch_size, self.evaluation_batch_size, self.shuffle = batch_size, evaluation_batch_size, shuffle
        self.seed, self.predict_split, self.group = seed or 0, predict_split, group
        self._threads = threads
        self._reading = {"cache": cache, "verify": verify}
        self._schema: DatasetSchema | None = None
        self._training_loader: TrainingLoader | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, batch_size={self.batch_size})"

    # Lightning's looks for loaders of torch within the batches.
    __str__ = __repr__

    @property
    def schema(self) -> DatasetSchema:
        """The schema of the data, without preparing them; that of data not yet generated lists no files.

        Raises:
            UserError: the folder holds no dataset, or one that the datamodule does not read; `group` is not a kept
                column.
        """
        if self._schema is not None:
            return self._schema
        planned = self._to_generate()
        found = self._accepted(load_schema(self.folder) if planned is None else planned)
        require_kept(self.folder, found, self.group)
        self._schema = found if planned is None else None
        return found

    @property
    def planned(self) -> DatasetSchema | None:
        """The schema of data that are generated when they are first needed; None for data that must exist."""
        return None

    @property
    def training_batches(self) -> int:
        """Batches of a training epoch, within the trainer's limit; known without preparing the data."""
        split = self.schema.splits.get("train")
        return self._limited_batches(-(-split.rows // self.batch_size)) if split else 0

    def prepare_data(self) -> None:
        """Generate planned data that do not exist yet. Real data are prepared by `preprocess`."""
        if self._to_generate() is not None:
            assert self.folder.local is not None
            self._generate(self.folder.local)

    def setup(self, stage: str) -> None:
        """Check the files that the stage needs: their sizes, their footers, and, on this machine, the first values of
        each split.

        Raises:
            UserError: a split has no rows; a file is missing or altered, or has values that its schema does not allow.
        """
        splits = list(_STAGE_SPLITS.get(stage, self._predict_splits))
        if stage == "fit" and self.trainer is not None and self.trainer.limit_val_batches == 0:
            splits.remove("validation")
        self._require(splits)
        files = list(part_files(self.schema, splits))
        check_sizes(self.folder, files)
        rank, world = self._rank_and_world
        firsts = [next(part_files(self.schema, [split]), None) for split in splits]
        # The first file of each split is always among the files that are opened.
        files.sort(key=lambda file: file not in firsts)
        for file in files[rank::world][:_FILES_AT_START]:
            with open_part(self.folder, self.schema, file) as part:
                if self.folder.local is not None and file in firsts and file.row_groups:
                    next(read_slices(self.folder, file, part, 0, self.schema.columns, threads=False), None)

    def train_dataloader(self) -> TrainingLoader:
        """Return shuffled batches; Lightning keeps the loader's position in checkpoints."""
        self._require(["train"])
        _, world = self._rank_and_world
        require(
            world <= LANES or self.shuffle != "window",
            f"there are {world} ranks, and data.shuffle window serves at most {LANES}: use at most {LANES} ranks, or "
            "set data.shuffle to none, or to full with data.cache memory",
        )
        # As with Lightning's own samplers, overfit_batches takes the same batches in every epoch.
        overfits = getattr(self.trainer, "overfit_batches", 0) > 0
        loader = TrainingLoader(
            self.folder,
            self.schema,
            ["train"],
            shuffle="none" if overfits else self.shuffle,
            seed=self.seed,
            batch_size=self.batch_size,
            **self._loader_options(),
        )
        batches = self._limited_batches(len(loader))
        loader.limit_epoch(batches, self._epochs(batches))
        self._warn_of_uneven_ranks(loader)
        self._training_loader = loader
        return loader

    def teardown(self, stage: str) -> None:
        """End the threads of a fit that has ended before its last epoch."""
        if self._training_loader is not None:
            self._training_loader.drop_next_epoch()

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")

    def _warn_of_uneven_ranks(self, loader: TrainingLoader) -> None:
        rank, world = self._rank_and_world
        largest = float(loader.rank_shares(world).max()) * world
        if rank == 0 and largest > _UNEVEN:
            groups = sum(len(file.row_groups) for file in part_files(self.schema, ["train"]))
            log.warning(
                "the busiest rank trains on %.2f times the mean number of samples, and the others wait for it: the "
                "training split has only %s; use data.shuffle full with data.cache memory, or fewer ranks",
                *(largest, counted(groups, "row group")),
            )

    def val_dataloader(self) -> Loader:
        return self._evaluation_loader(["validation"], group=self.group)

    def test_dataloader(self) -> Loader:
        return self._evaluation_loader(["test"], group=self.group)

    def predict_dataloader(self) -> Loader:
        return self._evaluation_loader(self._predict_splits, rows=True, group=self.group)

    def read_beside(self) -> Iterator[pa.Table]:
        """Yield the columns other than features of the rows that predict scores, in order: ``split``, the label if
        there is one, and kept columns."""
        yield from read_beside(self.folder, self.schema, self._predict_splits)

    @property
    def _predict_splits(self) -> tuple[SplitName, ...]:
        if self.predict_split == "all":
            return tuple(name for name in SPLITS if name in self.schema.splits)
        return (self.predict_split,)

    @property
    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _limited_batches(self, batches: int) -> int:
        """Return how many batches of an epoch the trainer takes."""
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return min(limit, batches) if isinstance(limit, int) else int(batches * limit)

    def _epochs(self, batches: int) -> float:
        """Return how many epochs of so many batches the trainer begins; infinite if its settings do not say, and 0
        without a trainer."""
        trainer = self.trainer
        if trainer is None:
            return 0
        epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
        steps = math.ceil(batches / trainer.accumulate_grad_batches)
        return min(epochs, math.ceil(trainer.max_steps / max(steps, 1))) if trainer.max_steps >= 0 else epochs

    def _evaluation_loader(self, splits: Sequence[SplitName], **options: Any) -> Loader:
        self._require(splits)
        options |= self._loader_options()
        return Loader(self.folder, self.schema, splits, batch_size=self.evaluation_batch_size, **options)

    def _loader_options(self) -> dict[str, Any]:
        rank, world = self._rank_and_world
        trainer = self.trainer
        on_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        copies = 1 if trainer is None else -(-world // trainer.num_nodes)
        threads = max(1, min(8, usable_cores() // (2 * copies))) if on_gpu else 1
        return {
            **self._reading,
            "rank": rank,
            "world": world,
            "threads": self._threads or threads,
            "pin": on_gpu,
            "copies": copies,
        }

    def _to_generate(self) -> DatasetSchema | None:
        """Return the schema of planned data that do not exist yet, else None."""
        folder = self.folder.local
        return None if folder is None or (folder / SCHEMA_FILE).is_file() else self.planned

    def _require(self, splits: Sequence[SplitName]) -> None:
        has = {name: split.rows for name, split in self.schema.splits.items() if split.rows}
        for name in splits:
            if name not in has:
                found = ", ".join(f"{name} ({rows:,} rows)" for name, rows in has.items()) or "no rows at all"
                raise UserError(
                    f"{self.folder} has no rows in its {name} split: it has {found}; give a dataset with this split, "
                    "or choose another split"
                )
        require(splits, f"{self.folder} has no rows at all; make the dataset again")

    def _accepted(self, schema: DatasetSchema) -> DatasetSchema:
        """Return the schema, or raise a UserError if the datamodule does not read such data."""
        return schema

    def _generate(self, folder: Path) -> None:
        """Generate the planned data."""
        raise TypeError(f"{type(self).__name__} does not define _generate")


def require_options(datamodule: FolderData, options: Sequence[str]) -> None:
    """Refuse options that neither a datamodule's class nor its base classes have.

    Raises:
        UserError: one of them is unknown.
    """
    classes = [made for made in type(datamodule).__mro__ if issubclass(made, FolderData)]
    named = dict.fromkeys(name for made in classes for name in inspect.signature(made).parameters)
    known = [name for name in named if name not in ("folder", "options")]
    for name in options:
        require(
            name in known,
            f"{type(datamodule).__name__} has no option {name}{nearest_first(name, known, 'expected')}",
        )


class Clicks(FolderData):
    """A dataset folder of any click log, made by `preprocess`, `datamodules.encode` or `DatasetWriter`.

    Args:
        path: The dataset folder. A URL such as `s3://bucket/folder`, `gs://...` or `hf://...` works if the package for
            it is installed.
        options: Those of FolderData, which `help(datamodules.clicks.FolderData)` explains: `batch_size` (2048),
            `evaluation_batch_size` (16_384), `shuffle` ("window", "full" or "none"), `cache` ("none" or "memory"),
            `threads`, `verify` (True), `seed`, `predict_split` ("test") and `group`.

    Raises:
        UserError: there is no dataset at `path`, or an option is unknown or out of range.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        require_options(self, list(options))
        # dlrm.yaml and other configurations give it to the class Criteo; an overlay with this class keeps the path.
        require(
            path != "" and (str(path) != DEMO or Path(DEMO).exists()),
            "data.path is missing: give --data.path DIR, a folder made by preprocess (demo data are for the class "
            "Criteo)",
        )
        super().__init__(path, **options)
        self.path = path
