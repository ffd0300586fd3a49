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
    "dlrm": Protocol(
        summary="as facebookresearch/dlrm: log(max(x, 0) + 1), missing as 0; every hash has a row of its own, missing "
        "hashes count as hash 0; counted over all rows. --max-rows: hash modulo N before counting",
        modulo="hash",
    ),
    "mlperf": Protocol(
        summary="as torchrec_dlrm: log(x - minimum of the whole column + 2), missing as 0; hashes as in dlrm. --max-"
        "rows: id modulo N after counting. --multi-hot mlperf makes DLRM v2's bags",
        modulo="id",
    ),
    "nvidia": Protocol(
        summary="as NVIDIA DeepLearningExamples: log(x + 3), or 0 if x is missing or below -2; hashes seen fewer than "
        "15 times (NVIDIA also publishes 3 and 2: --min-count), missing and unknown hashes share id 0; counted over "
        "all rows",
    ),
    "bars": Protocol(
        summary="as FuxiCTR on Criteo_x4 (_001; --min-count 2 for _002): integers become categories, floor(log(x)^2) "
        "above 2, missing as 0; values seen fewer than 10 times, missing and unknown values share id 0; counted over "
        "the training split; random 8:1:1. No dense columns",
    ),
    "quantile": Protocol(
        summary="this project's own: sign(x) log(|x| + 1) with missing as null, and the same integers as categories "
        "B1..B13, in quantile bins of the training split (--bins, at most 30 by default); missing values have id 0; "
        "rare values (seen fewer than 3 times) and unknown values share id 1, or the id of the rarest value if no "
        "training row has a rare value; counted over the training split",
    ),
    "modern": Protocol(
        summary="superseded by quantile, because its bins collide: sign(x) log(|x| + 1) with missing as null, and the "
        "same integers binned as categories B1..B13; missing, rare (seen once in training) and unknown values have the "
        "ids 0, 1 and 2; counted over the training split",
        superseded_by="protocol modern is superseded by quantile, whose bins have no collisions and whose unknown "
        "values share the row of rare ones; datasets of modern stay usable",
    ),
}
