"""MLPerf DLRM v2's synthetic multi-hot rows: each id becomes a bag of a fixed size per column.

As in torchrec_dlrm, a bag begins with the id itself, and the rest depends on the id alone, so that equal ids have equal
bags. The rest is uniform over the table, or floor(Pareto(0.25)) modulo its rows. torchrec draws a whole table of bags
from numpy's global generator; here each id is mixed with the seed, so that any worker can make any row, without
tables of 40M bags.
"""

import numpy as np

from datamodules.log_settings import MlperfBags
from datamodules.preprocess.splits import mixed
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL

MLPERF_SIZES = dict(
    zip(
        CRITEO_CATEGORICAL,
        (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1),
        strict=True,
    )
)
"""Number of ids in each column's bag in MLPerf DLRM v2; 214 in a row."""

_STREAM = 16  # of random numbers, plus the column's position; apart from those of ``splits``


def mlperf_bags(bags: MlperfBags, column: str, ids: np.ndarray, table_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bags of some rows.

    Args:
        bags: distribution and seed of their ids.
        column: of Criteo, C1 to C26.
        ids: int32 [n].
        table_rows: rows of the column's table.

    Returns:
        int32 values [n * size] and int32 offsets [n + 1].
    """
    size = MLPERF_SIZES[column]
    values = np.empty((len(ids), size), np.int32)
    values[:, 0] = ids
    positions = ids.astype(np.uint64)[:, None] * np.uint64(size) + np.arange(1, size, dtype=np.uint64)
    drawn = mixed(bags.seed, _STREAM + CRITEO_CATEGORICAL.index(column), positions) >> np.uint64(32)
    if bags.distribution == "uniform":
        values[:, 1:] = drawn * np.uint64(table_rows) >> np.uint64(32)
    else:
        # (1 - u) ** (-1 / 0.25) - 1 for u uniform in [0, 1), by multiplication, which is exact everywhere.
        inverse = 2.0**32 / (2.0**32 - drawn.astype(np.float64))
        squared = inverse * inverse
        values[:, 1:] = np.fmod(np.floor(squared * squared - 1.0), float(table_rows))
    return values.reshape(-1), np.arange(len(ids) + 1, dtype=np.int32) * np.int32(size)
