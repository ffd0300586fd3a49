"""The protocols of Criteo's files by their names. Each is a schema, ``configs/datasets/criteo_<name>.yaml``.

Scores under different protocols cannot be compared, so a dataset names its protocol. To add one, write its schema, and
add it to ``PROTOCOLS``.

Differences between these protocols and the published systems:

- All protocols here order ids by descending count (ties by value). facebookresearch/dlrm and
  torchrec number values in the order in which they occur, NVIDIA and FuxiCTR by count; any order
  gives the same model.
- torchrec takes one minimum over all 13 columns of a file, so that equal values differ from file
  to file; ``mlperf`` takes the minimum of each column over all files.
- NVIDIA's log(x + 3) has no value below x = -2: such values become 0, as missing ones do.
- FuxiCTR keeps a row for padding beside the one for missing, rare and unknown values; no Criteo row
  ever uses it, so ``bars`` has none. Its split is stratified by label with scikit-learn; ours draws
  one of every ten rows for test and another for validation, in one pass over the data.
- FuxiCTR takes the integer 0 as missing (``na_value: 0``), so that 0 and missing integers share the
  row of rare ones; in ``bars`` 0 and missing integers share a row of their own. That is one row more
  for each integer column, and keeps rare bins apart from 0. Rare bins hold 0.0003% of the integers
  in 160,000 generated training rows, and 0.7% in 8,000 rows of Terabyte.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Dataset = Literal["kaggle", "terabyte"]
DATASETS: tuple[Dataset, ...] = get_args(Dataset)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """An encoding of Criteo's rows as features."""

    summary: str
    """One line for ``--help``."""
    modulo: Literal["hash", "id"] | None = None
    """What ``max_rows`` is the modulus of: raw hashes before counting, or ids after it."""
    superseded_by: str = ""
    """One line about the protocol that replaces this one; empty if it is not replaced."""


PROTOCOLS: Mapping[str, Protocol] = {
    "dlrm": Protocol(summary="as facebookresearch/dlrm: each hash has its own row of a table", modulo="hash"),
    "mlperf": Protocol(summary="as torchrec_dlrm: as dlrm, with other dense features", modulo="id"),
    "nvidia": Protocol(summary="as NVIDIA DeepLearningExamples: rare hashes share a row"),
    "bars": Protocol(summary="as FuxiCTR on Criteo_x4: integers are categories, random split"),
    "quantile": Protocol(summary="this project's own: integers also in quantile bins"),
    "modern": Protocol(
        summary="superseded by quantile",
        superseded_by="protocol modern is superseded by quantile, whose bins have no collisions and whose unknown "
        "values share the row of rare ones; datasets of modern stay usable",
    ),
}
