"""Make a dataset folder of a table in memory."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.log_schema import LogSchema, log_schema, read_log_schema
from datamodules.preprocess.pipeline import preprocess
from datamodules.preprocess.progress import Progress
from lightning_dlrm.contracts.errors import UserError, one_line, require
from lightning_dlrm.contracts.schema import DatasetSchema

if TYPE_CHECKING:
    import pandas as pd

_ROWS_OF_GROUP = 1 << 17
_LATEST_NS = 4 * 10**18  # the year 2096: file systems keep no later times


def encode(
    rows: "pa.Table | pd.DataFrame",
    schema: LogSchema | Mapping[str, Any] | Path | str | None,
    output: Path | str,
    *,
    vocabulary: Path | str | None = None,
    workers: int = 1,
) -> DatasetSchema:
    """Make a dataset folder of a table, as ``preprocess --schema`` does of files.

    Args:
        rows: an Arrow table or a pandas data frame, whose index is left out.
        schema: of the rows: a LogSchema, the values of its keys, or the path of a YAML file; None with a vocabulary.
        output: the folder to make, a path or a URL; it must not exist, or must be empty or hold the
            dataset of an equal table.
        vocabulary: a dataset folder that ``preprocess`` or ``encode`` made; the rows, with labels or without, are
            encoded as its rows were, and become the test split.
        workers: processes; more than one only under ``if __name__ == "__main__":``.

    Returns:
        The schema of the dataset. ``datamodules.Clicks(output)`` reads it.

    Raises:
        UserError: the schema or a value is wrong, or see ``pipeline.preprocess``; nothing is left then.
    """
    if isinstance(schema, Path | str):
        schema = read_log_schema(Path(schema))
    elif schema is not None and not isinstance(schema, LogSchema):
        schema = log_schema(schema)
    if schema is not None and schema.format != "criteo":  # "criteo" is kept: it also decides the encoding
        schema = replace(schema, format=None)
    table = arrow_table(rows)
    with tempfile.TemporaryDirectory(prefix="encode-") as folder:
        file = Path(folder) / "the table"
        try:
            pq.write_table(table, file, row_group_size=_ROWS_OF_GROUP)
        except (pa.ArrowException, ValueError) as error:
            raise _not_writable(error) from error
        # A finished dataset is known by the sizes and times of its input: equal tables have equal times.
        with file.open("rb") as content:
            stamp = int(hashlib.file_digest(content, "sha256").hexdigest(), 16) % _LATEST_NS
        os.utime(file, ns=(stamp, stamp))
        try:
            return preprocess(
                None,
                None,
                [file],
                output,
                schema=schema,
                vocabulary=vocabulary,
                is_table=True,
                workers=workers,
                progress=Progress(show=False),
            )
        except UserError as error:
            words = str(error).replace(str(file), "the table")
            raise UserError(words.replace("use --vocabulary DIR", "give vocabulary, a dataset folder")) from error


def arrow_table(rows: "pa.Table | pd.DataFrame") -> pa.Table:
    """Return an Arrow table, or the columns of a pandas data frame without its index as one.

    Raises:
        UserError: the rows are neither of them, or a column of the data frame has several types.
    """
    if isinstance(rows, pa.Table):
        return rows
    pandas = sys.modules.get("pandas")
    require(
        pandas is not None and isinstance(rows, pandas.DataFrame),
        f"rows is a {type(rows).__name__}; expected an Arrow table or a pandas data frame",
    )
    try:
        return pa.Table.from_pandas(rows, preserve_index=False)
    except (pa.ArrowException, ValueError) as error:
        raise _not_writable(error) from error


def _not_writable(error: Exception) -> UserError:
    return UserError(
        f"the table cannot be written as Parquet ({one_line(error)}); give each column one type and a name of its own"
    )
