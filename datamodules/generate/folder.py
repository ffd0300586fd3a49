"""Generated datasets as folders: made once, whole or not at all, also by several processes at a time."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datamodules.parquet import DatasetWriter
from lightning_dlrm.contracts.errors import UserError, one_line
from lightning_dlrm.contracts.schema import SCHEMA_FILE, DatasetSchema

Write = Callable[[DatasetWriter, "tqdm[Any]"], dict[str, Any]]
"""Writes all rows and tells the bar how many; returns further fields of the schema, such as ``optimum``."""


def cache_folder(kind: str, key: Any) -> Path:
    """Where the cache keeps generated data, there or not.

    The cache is ``$LIGHTNING_DLRM_CACHE``, by default ``~/.cache/lightning_dlrm``.

    Args:
        kind: of data, the beginning of the folder's name.
        key: all that the data depend on, JSON values.
    """
    root = os.environ.get("LIGHTNING_DLRM_CACHE")
    cache = Path(root).expanduser() if root else Path.home() / ".cache" / "lightning_dlrm"
    return cache / f"{kind}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"


def make_once(planned: DatasetSchema, folder: Path, write: Write, progress: bool = True) -> DatasetSchema:
    """Writes a dataset, or finds it written already.

    Args:
        planned: its schema but for files, positives and optimum; its settings must hold all that the rows depend
            on beside their number.
        folder: the dataset folder to make. If it holds the dataset of this schema, also because another process
            finished it in the meantime, that one is kept.
        write: writes the rows.
        progress: show a progress bar, on a terminal.

    Raises:
        UserError: the folder holds something else, or its disk is full.
    """
    if (existing := _existing(planned, folder)) is not None:
        return existing
    try:
        with (
            DatasetWriter(folder, planned.columns) as writer,
            tqdm(
                total=sum(split.rows for split in planned.splits.values()),
                desc=f"Generating {planned.dataset} data",
                unit=" rows",
                unit_scale=True,
                # None: only on a terminal.
                disable=None if progress else True,
            ) as bar,
        ):
            further = write(writer, bar)
            return writer.finish(
                dataset=planned.dataset, protocol=planned.protocol, settings=planned.settings, **further
            )
    except (UserError, OSError) as error:
        # Another process may have finished the same folder first; its rows are these rows.
        if (existing := _existing(planned, folder)) is not None:
            return existing
        if isinstance(error, OSError):
            raise UserError(
                f"{folder} cannot be made ({one_line(error)}); free some disk, or choose another place"
            ) from error
        raise


def _existing(planned: DatasetSchema, folder: Path) -> DatasetSchema | None:
    """The schema in ``folder`` if it is the planned one, else None."""
    if not (Path(folder) / SCHEMA_FILE).is_file():
        return None
    found = DatasetSchema.load(folder)
    same = found.encoding_fingerprint == planned.encoding_fingerprint and all(
        name in found.splits and found.splits[name].rows == split.rows for name, split in planned.splits.items()
    )
    return found if same else None
