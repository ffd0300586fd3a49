"""Random data and traces as LightningDataModules: generated once into the cache folder, streamed like any dataset."""

from pathlib import Path
from typing import Any, Literal

from datamodules.clicks import FolderData, require_options
from datamodules.generate.profiles import TraceSource
from datamodules.generate.random import RandomSettings, generate_random, random_folder, random_schema
from datamodules.generate.trace import TraceSettings, generate_trace, trace_folder, trace_schema
from lightning_dlrm.contracts.schema import DatasetSchema


class RandomData(FolderData):
    """Random rows for benchmarks: any tables, dense features and bags, ids by a law, clicks independent of both.

    Args:
        tables: Rows of each table; by default those of the preset, or 26 tables of 100,000.
        dense: Number of dense features, standard normal; 13 by default.
        indices: Ids of a bag, one number for all tables or one for each; 1 by default. The maximum with `min_indices`.
        min_indices: Fewest ids of a bag (0 or more), one number for all tables or one for each: bag sizes are uniform
            between it and `indices`.
        law: How ids are drawn within each table's size; uniform by default.
        exponent: Exponent of zipf: the probability of id k is proportional to (k + 1) ** -exponent; 1.05 by default.
        mean: Mean of gaussian, as a share of the table's rows; 0.5 by default.
        deviation: Standard deviation of gaussian, as a share of the table's rows; 0.15 by default.
        weights: Give each id a weight in (0, 1].
        click_rate: Probability of label 1; 0.25 by default.
        preset: The shape of a known workload: paper (section 5.2 of Naumov et al. 2019), kaggle, mlperf. Other
            arguments replace its values.
        train_rows: Rows of the training split.
        validation_rows: Rows of the validation split.
        test_rows: Rows of the test split.
        data_seed: Seed of the rows; `seed` is that of their order.
        options: Those of FolderData.

    Raises:
        UserError: an argument is out of range or has no effect.
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
        require_options(self, list(options))
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
    """Rows for benchmarks whose ids repeat the LRU behaviour of a dataset's columns, one trace for each column.

    Args:
        source: A dataset folder, or a file of profiles that `generate trace` saved.
        columns: The columns to trace; by default all that have a table.
        split: The split to profile.
        train_rows: Rows of the training split; by default as many as the source has.
        validation_rows: Rows of the validation split.
        test_rows: Rows of the test split.
        dense: Number of dense features, standard normal.
        click_rate: Probability of label 1.
        data_seed: Seed of the rows; `seed` is that of their order.
        options: Those of FolderData.

    Raises:
        UserError: the source or a column does not exist, or an argument is out of range.
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
        require_options(self, list(options))
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
