"""Random data and traces as LightningDataModules: made once, in the cache folder, and streamed like any dataset."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from datamodules.criteo import FolderData
from datamodules.generate.random import RandomRows, RandomSettings, generate_random, random_folder, random_schema
from datamodules.generate.trace import TraceSettings, TraceSource, generate_trace, trace_folder, trace_schema
from datamodules.stream.order import ranges
from lightning_dlrm.contracts.batch import Batch, SparseIds
from lightning_dlrm.contracts.schema import WEIGHTS_SUFFIX, DatasetSchema


class RandomData(FolderData):
    """Tables, dense features and bags of any size, ids by a law, clicks that depend on nothing: for measuring.

    Args:
        tables: Rows of each table; by default those of the preset, or 26 tables of 100,000.
        dense: Dense features, standard normal; 13 by default.
        indices: Ids of a bag, for all tables or for each; 1 by default. The most of them with `min_indices`.
        min_indices: Fewest ids of a bag, also 0, for all tables or for each: bags are of any size in between.
        law: How ids are drawn within each table's size; uniform by default.
        exponent: Of zipf: id k has a chance proportional to (k + 1) ** -exponent; 1.05 by default.
        mean: Of gaussian, as a share of the table's rows; 0.5 by default.
        deviation: Of gaussian, as a share of the table's rows; 0.15 by default.
        weights: A weight in (0, 1] for each id.
        click_rate: Chance of label 1; 0.25 by default.
        preset: The shape of a known workload, of which the other arguments replace parts: paper (section 5.2 of
            Naumov et al. 2019), kaggle, mlperf.
        train_rows: Rows of the training split.
        validation_rows: Rows of the validation split.
        test_rows: Rows of the test split.
        data_seed: Of the rows; `seed` is that of their order.
        options: Those of FolderData.

    Raises:
        UserError: an argument is out of range or without effect.
    """

    def __init__(
        self,
        tables: list[int] | None = None,
        dense: int | None = None,
        indices: int | list[int] | None = None,
        min_indices: int | list[int] | None = None,
        law: Literal["uniform", "gaussian", "zipf"] | None = None,
        exponent: float | None = None,
        mean: float | None = None,
        deviation: float | None = None,
        weights: bool = False,
        click_rate: float | None = None,
        preset: Literal["paper", "kaggle", "mlperf"] | None = None,
        train_rows: int = 1_048_576,
        validation_rows: int = 65_536,
        test_rows: int = 65_536,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        self.settings = RandomSettings.of(
            preset,
            tables=tables,
            dense=dense,
            indices=indices,
            min_indices=min_indices,
            law=law,
            exponent=exponent,
            mean=mean,
            deviation=deviation,
            weights=weights,
            click_rate=click_rate,
            train_rows=train_rows,
            validation_rows=validation_rows,
            test_rows=test_rows,
            seed=data_seed,
        )
        super().__init__(random_folder(self.settings), **options)

    @property
    def planned(self) -> DatasetSchema:
        return random_schema(self.settings)

    def _generate(self, folder: Path) -> None:
        generate_random(self.settings, folder)


class TraceData(FolderData):
    """One id from each of some traces that repeat the LRU behaviour of a dataset's columns: for measuring.

    Args:
        source: A dataset folder, or a file of profiles that `generate trace` saved.
        columns: Whose traces; by default all that have a table.
        split: Of the dataset, to profile.
        train_rows: Rows of the training split; by default as many as the source has.
        validation_rows: Rows of the validation split.
        test_rows: Rows of the test split.
        dense: Dense features, standard normal.
        click_rate: Chance of label 1.
        data_seed: Of the rows; `seed` is that of their order.
        options: Those of FolderData.

    Raises:
        UserError: there is no such source or column, or an argument is out of range.
    """

    def __init__(
        self,
        source: str,
        columns: list[str] | None = None,
        split: Literal["train", "validation", "test"] = "train",
        train_rows: int | None = None,
        validation_rows: int = 65_536,
        test_rows: int = 65_536,
        dense: int = 13,
        click_rate: float = 0.25,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        self.source = TraceSource(source, columns, split)
        self.settings = TraceSettings(
            train_rows=self.source.length if train_rows is None else train_rows,
            validation_rows=validation_rows,
            test_rows=test_rows,
            dense=dense,
            click_rate=click_rate,
            seed=data_seed,
        )
        super().__init__(trace_folder(self.source, self.settings), **options)

    @property
    def planned(self) -> DatasetSchema:
        return trace_schema(self.source, self.settings)

    def _generate(self, folder: Path) -> None:
        generate_trace(self.source, self.settings, folder)


def random_batch(source: RandomRows, number: int, size: int) -> Batch:
    """A batch of random training rows made in memory, without files.

    Args:
        source: the rows' settings and laws; make it once for many batches.
        number: which block the rows are drawn as; different numbers give different rows.
        size: of the batch; that of a block gives the rows that a dataset has there.
    """
    block = source.block("train", number, size)
    dense = [block[column.name] for column in source.columns if column.role == "dense"]
    tables = [column for column in source.columns if column.cardinality]
    if all(column.role == "categorical" for column in tables):
        values = np.stack([block[column.name] for column in tables] or [np.empty((size, 0), np.int32)], axis=-1)
        ids = SparseIds(values=torch.from_numpy(values.reshape(size, len(tables))), tables=len(tables))
    else:
        bags = [
            block[column.name] if column.role == "multi_hot" else (block[column.name], np.arange(size + 1))
            for column in tables
        ]
        lengths_BF = np.stack([np.diff(offsets) for _, offsets in bags], axis=1)
        offsets = np.concatenate([[0], np.cumsum(lengths_BF)])
        values, weights = np.empty(offsets[-1], np.int32), np.ones(offsets[-1], np.float32)
        for table, (column, (ids_of_table, _)) in enumerate(zip(tables, bags, strict=True)):
            places = ranges(offsets[:-1].reshape(lengths_BF.shape)[:, table], lengths_BF[:, table])
            values[places] = ids_of_table
            if source.settings.weights:
                weights[places] = block[column.name + WEIGHTS_SUFFIX][0]
        ids = SparseIds(
            values=torch.from_numpy(values),
            tables=len(tables),
            offsets=torch.from_numpy(offsets),
            weights=torch.from_numpy(weights) if source.settings.weights else None,
        )
    return Batch(
        label=torch.from_numpy(block["label"]),
        dense=torch.from_numpy(np.stack(dense, axis=1) if dense else np.empty((size, 0), np.float32)),
        ids=ids,
        global_size=size,
    )
