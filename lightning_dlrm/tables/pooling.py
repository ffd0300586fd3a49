"""Factors of table rows, which the vectors of a bag are multiplied with before they are summed."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import Table


def pooling_tables(
    setting: str | None, columns: Mapping[str, int], seed: int, dense_gradients: bool
) -> EmbeddingTables | None:
    """Return tables of width 1 with a factor for every row, or None without factors.

    Args:
        setting: see TableSettings.pooling_weights.
        columns: name -> rows.
        seed: seed of the tables.
        dense_gradients: see EmbeddingTables.

    Raises:
        UserError: the file of fixed factors does not fit the tables.
    """
    if setting is None:
        return None
    if setting == "learned":
        tables = [Table(name=f"{name}/pooling", rows=rows, bound=0.0, centre=1.0) for name, rows in columns.items()]
        return EmbeddingTables(tables, 1, seed, dense_gradients=dense_gradients)
    given = _read_factors(setting, columns)
    tables = [
        Table(name=f"{name}/pooling", rows=rows, bound=0.0, given=given[name].view(rows, 1))
        for name, rows in columns.items()
    ]
    return EmbeddingTables(tables, 1, seed, trainable=False)


def _read_factors(path: str, columns: Mapping[str, int]) -> dict[str, Tensor]:
    remedy = "expected learned, or a file of torch.save({table: factors [rows]})"
    require(Path(path).is_file(), f"tables.pooling_weights: there is no file {path}; {remedy}")
    try:
        given = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"tables.pooling_weights: {path} cannot be read ({' '.join(str(error).split())[:80]}); {remedy}"
        ) from error
    for name, rows in columns.items():
        found = given.get(name) if isinstance(given, dict) else None
        shape = tuple(found.shape) if isinstance(found, Tensor) else "missing"
        require(
            shape == (rows,), f"tables.pooling_weights: {path} has factors {shape} for table {name}, expected ({rows},)"
        )
    return given
