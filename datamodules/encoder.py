"""Encode rows of a click log in memory for a model, in the same way as the rows of a dataset. Nothing here imports
torch."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.folder import Folder, load_schema
from datamodules.preprocess.encoding import distinct_values, items_of, replace_placeholders
from datamodules.preprocess.log_columns import segment_of, staged_columns
from datamodules.preprocess.recipe import known_recipe
from datamodules.preprocess.staging import StagedRows
from datamodules.preprocess.table_encoding import PLACEHOLDER_IDS
from datamodules.preprocess.tables import arrow_table
from datamodules.values import BadValueError, staged_name
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import WEIGHTS_SUFFIX

if TYPE_CHECKING:
    import pandas as pd


class RowEncoder:
    """Encodes rows in the same way as the rows of a dataset, with the schema of its log and its vocabularies, which it
    keeps in memory.

    Args:
        folder: the dataset folder.

    Raises:
        UserError: the folder holds no dataset that was made of a log.
    """

    def __init__(self, folder: str | Path | Folder) -> None:
        where = Folder(folder)
        self.schema = load_schema(where)
        self._recipe, self._fitted = known_recipe(self.schema, where)
        log = self._recipe.schema
        features = {name: one for name, one in log.columns.items() if one.role not in ("keep", "leave")}
        self._features = replace(log, columns=features)
        self._known: dict[str, tuple[pa.Array, np.ndarray]] = {}
        """Of each table: its values, and their ids."""
        for table in self._recipe.tables(self._fitted):
            value = "value" if table.is_text else "hash"
            with where.open_vocabulary(self.schema.vocabulary[table.name].path) as file:
                known = file.read(columns=[value, "id"]).combine_chunks()
            known = known.filter(pc.is_valid(known.column(value))).combine_chunks()
            values = known.column(value)
            self._known[table.name] = values.combine_chunks(), known.column("id").to_numpy()

    def encode(self, rows: "pa.Table | pd.DataFrame") -> dict[str, Any]:
        """Return the features of rows.

        Args:
            rows: an Arrow table or a pandas data frame with the columns that features are made of; other columns are
                ignored.

        Returns:
            The B rows of each feature. Dense features are float32 [B], NaN where missing; categorical ones int32 [B];
            multi-hot ones a pair of int32 values [N] and int32 offsets [B + 1]; weights likewise, with float32 values.

        Raises:
            UserError: a column is missing, or a value is not of the schema.
        """
        log, given = self._features, arrow_table(rows)
        names = given.column_names
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, f"the table has two columns {twice!r}; rename one of the two")
        sources = log.sources(names)
        named = {name: given.column(name) for name in names if name in sources}
        replace(log, rest="leave").check_columns(names, "the table", labelled=False)
        try:
            found = staged_columns(log, pa.table(named), list(named), labelled=False, splits=False, nulls=log.nulls)
            staged = StagedRows(segment_of([found])[0])
        except BadValueError as error:
            row = int(error.rows[0])
            raise UserError(f"row {row:,}: {error.fault(row)}") from error
        columns = {column.name: column for column in self.schema.columns}
        arrays: dict[str, Any] = {**self._recipe.dense_values(self._fitted, staged)}
        for table in self._recipe.tables(self._fitted):
            values, codes, ends = distinct_values(table, staged)
            known, known_ids = self._known[table.name]
            places = pc.index_in(values, value_set=known)
            ids = np.full(len(values) + 1, PLACEHOLDER_IDS["unknown"], np.int32)
            ids[-1] = PLACEHOLDER_IDS["missing"]
            ids[:-1][places.is_valid().to_numpy(zero_copy_only=False)] = known_ids[places.drop_null().to_numpy()]
            replace_placeholders(ids, columns[table.name])
            arrays[table.name] = self._recipe.with_bags(table, ids[codes], ends, columns[table.name].cardinality)
            if table.name + WEIGHTS_SUFFIX in columns:
                weights = staged.column(staged_name("weights", table.name))
                _, ends = items_of(slice(None), weights.offsets.to_numpy())
                arrays[table.name + WEIGHTS_SUFFIX] = weights.values.to_numpy().astype(np.float32), ends
        return arrays
