"""Encode categorical columns by the vocabulary of another dataset: the alternative to ``counting``."""

import shutil
from typing import Any

import numpy as np
import pyarrow.compute as pc

from datamodules.folder import Folder
from datamodules.preprocess.encoding import Encoding, IdsWriter, distinct_values, scratch_folder
from datamodules.preprocess.journal import record, recorded, written_aside
from datamodules.preprocess.protocols import Table
from datamodules.preprocess.segments import OpenSegment, load_segments
from lightning_dlrm.contracts.schema import DatasetSchema

_COPIED_AT_ONCE = 1 << 20


def look_up_column(encoding: Encoding, vocabulary: str, known: DatasetSchema, table: Table) -> dict[str, Any]:
    """Write the ids of every segment's distinct values by the vocabulary of another dataset, and copy the vocabulary.

    A value that the vocabulary lacks gets the id ``unknown``; without one, ``rare``; without either, the last id: that
    of the rarest value, whose row was trained least.

    Args:
        encoding: the encoding.
        vocabulary: the folder of the other dataset.
        known: its schema.
        table: the column.

    Returns:
        ``cardinality`` and ``unknown_rows``.
    """
    if done := recorded(encoding.record_of(table)):
        return done
    folder, file = Folder(vocabulary), known.vocabulary[table.name].path
    (column,) = (column for column in known.columns if column.name == table.name)
    unknown = column.reserved.get("unknown", column.reserved.get("rare", column.cardinality - 1))
    known_values, unknown_rows = _known_values(folder, file), 0
    with scratch_folder(encoding, table.name) as scratch:
        out = IdsWriter(scratch, encoding, table, column.reserved.get("missing", 0))
        for segment in load_segments(encoding.segments):
            with OpenSegment(segment) as opened:
                values, codes = distinct_values(encoding, table, opened)
                ids, found = _look_up(known_values, values, unknown)
                unknown_rows += int(np.bincount(codes, minlength=len(values))[: len(values)][~found].sum())
                out.write(ids)
        out.finish()
    encoding.vocabulary(table).parent.mkdir(parents=True, exist_ok=True)
    with (
        written_aside(encoding.vocabulary(table)) as partial,
        folder.open(file) as source,
        partial.open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy, _COPIED_AT_ONCE)
    return record(
        encoding.record_of(table),
        {"cardinality": column.cardinality, "unknown_rows": unknown_rows},
        encoding.files_of(table),
    )


def _known_values(folder: Folder, path: str) -> np.ndarray:
    """Return the hashes of a vocabulary and their ids as ``hash << 32 | id``, uint64 [n] in ascending order.

    Terabyte's largest column takes 2.3 GB; neither reading nor sorting holds it twice.

    Raises:
        UserError: the file is missing or altered.
    """
    end = 0
    with folder.open_vocabulary(path) as file:
        known = np.empty(file.metadata.num_rows, np.uint64)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["hash", "id"], use_threads=False)
            table = table.filter(pc.is_valid(table.column("hash")))
            part = known[end : end + table.num_rows]
            part[:] = table.column("hash").to_numpy()
            part <<= np.uint64(32)
            part |= table.column("id").to_numpy().astype(np.uint64)
            end += len(part)
    known = known[:end]
    known.sort()
    return known


def _look_up(known: np.ndarray, values: np.ndarray, unknown: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids int32 [d] of values uint32 [d], and whether each is known, bool [d].

    Args:
        known: as ``_known_values`` returns them.
        unknown: the id of unknown values.
    """
    ids, found = np.full(len(values), unknown, np.int32), np.zeros(len(values), bool)
    if len(known):
        ascending = np.argsort(values)  # any other order would jump through a large vocabulary
        wanted = values[ascending].astype(np.uint64) << np.uint64(32)
        entry = known[np.minimum(np.searchsorted(known, wanted), len(known) - 1)]
        found[ascending] = is_known = entry >> np.uint64(32) == wanted >> np.uint64(32)
        ids[ascending[is_known]] = (entry[is_known] & np.uint64(0xFFFFFFFF)).astype(np.int32)
    return ids, found
