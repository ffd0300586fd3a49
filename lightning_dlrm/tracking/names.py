"""Names of all logged metrics, in the run folder and in W&B."""

from collections.abc import Mapping
from typing import Any

TRAIN = "train"
TRAIN_LOSS = "train/loss"
VALIDATION = "validation"
TEST = "test"
METRICS = ("auc", "log_loss", "normalized_entropy", "accuracy", "calibration")
"""Metrics of an evaluation; logged as EVALUATION/METRIC."""
TRAIN_METRICS = ("auc", "accuracy", "log_loss")
"""Metrics of all training samples so far, up to the last ``WINDOW_SAMPLES``; logged as TRAIN/METRIC."""
WINDOW_SAMPLES = 65_536
GROUP_AUC = "group_auc"
GROUPS = "groups"
GROUPS_LEFT_OUT = "groups_left_out"
"""Of evaluations whose rows are grouped by a kept column: the mean AUC over the groups, their number, and the number of
groups with one label, which have no AUC."""
BY_GROUP = (GROUP_AUC, GROUPS, GROUPS_LEFT_OUT)
BETTER = {"auc": "max", "log_loss": "min", "normalized_entropy": "min", "accuracy": "max", GROUP_AUC: "max"}
"""Metric -> whether larger or smaller values are better; calibration is best at 1."""
PRECISION_RECALL = "precision_recall"
CALIBRATION_CURVE = "calibration_curve"
LEARNING_RATE = "learning_rate"
# Logged on request, as NORM/NAME with the name of a dense parameter or of a table.
GRADIENT_NORM = "gradient_norm"
ROW_NORM = "row_norm"
ROW_GRADIENT_NORM = "row_gradient_norm"

PARAMETERS_TABLES = "parameters/tables"
PARAMETERS_DENSE = "parameters/dense"
PARAMETERS_TOTAL = "parameters/total"
FLOPS_FORWARD = "flops_per_sample/forward"
FLOPS_TRAINING = "flops_per_sample/training"
OPTIMUM_AUC = "data/optimum_auc"
OPTIMUM_LOG_LOSS = "data/optimum_log_loss"
RANKS = "parallel/ranks"
ROWS_PER_RANK = "parallel/rows_per_rank"
BYTES_PER_RANK = "parallel/bytes_per_rank"
EXCHANGE_MS = "parallel/exchange_ms_per_step"
SENT_BYTES = "parallel/sent_bytes_per_step"
SENT_MIB = "parallel/sent_mib_per_step"
"""``SENT_BYTES`` in MiB, because panels of W&B cannot convert."""
WORK_IMBALANCE = "parallel/work_imbalance"
TABLES = "parallel/tables"
"""Prefix of metrics by table: its largest share on a rank, and the requests and bytes of all ranks in a step."""
ASKED_ROWS = "asked_rows_per_step"
MOVED_BYTES = "moved_bytes_per_step"
IMBALANCE = "work_imbalance"
HOST_BYTES = "parallel/host_bytes"
"""Bytes of ``BYTES_PER_RANK`` in host memory, on the rank that holds most of them."""
DEVICE_SERVED = "tables/served_by_device"
"""Share of the lookups in tables in host memory that read rows on the device, of the first rank's samples."""
SAMPLES_PER_SECOND = "speed/samples_per_s"
# Shares of the training time, which add up to 1; with a GPU they are shares of the host's time.
DATA_WAIT_SHARE = "speed/data_wait_share"
FORWARD_SHARE = "speed/forward_share"
BACKWARD_SHARE = "speed/backward_share"
UPDATE_SHARE = "speed/update_share"
LIGHTNING_SHARE = "speed/lightning_share"
TRAINING_SECONDS = "speed/training_s"
PEAK_MEMORY = "memory/peak_bytes"
PEAK_DEVICE_MEMORY = "memory/peak_device_bytes"
_IN_GIB = {PEAK_MEMORY: "memory/peak_gib", PEAK_DEVICE_MEMORY: "memory/peak_device_gib",
           BYTES_PER_RANK: "parallel/gib_per_rank"}  # fmt: skip
TIME_TO_TARGET = "time_to_target_s"
SAMPLES_TO_TARGET = "samples_to_target"

SAMPLES = "samples"
STEP = "step"

COMPARISON_FIGURES = {
    "differences": "differences between configurations, with 95% intervals",
    "auc": "AUC against samples, time and FLOPs of training",
    "results": "AUC, log loss and accuracy of every seed",
    "calibration": "observed against predicted click rate",
    "cost": "training time (s), speed (samples/s) and memory (GiB) of every run",
    "operators": "milliseconds of a training step by kind of operator",
    "parameters": "parameters of each part, and of the largest tables",
    "load": "memory, requested rows and sent data of each rank",
    "figure5": "accuracy against samples of training",
    "log_loss": "log loss against samples, time and FLOPs of training",
}
"""Name of a figure of a comparison -> what it shows."""
COMPARISON_TABLES = {
    "verdicts": "difference, 95% interval, p-value and verdict of each pair of configurations",
    "parameters": "number of parameters of each part and table",
    "operators": "milliseconds of a training step by kind of operator, in numbers",
    "load": "memory, requested rows and sent data of each rank, in numbers",
}
"""Name of a table of a comparison -> what it shows."""
LOAD = "load"
"""The figure and the table of a comparison that exist only if tables are sharded."""


def title_of(metric: str) -> str:
    """Return a metric's name in words.

    >>> [title_of(metric) for metric in ("auc", "log_loss", "group_auc")]
    ['AUC', 'log loss', 'AUC by group']
    """
    return {"auc": "AUC", GROUP_AUC: "AUC by group"}.get(metric, metric.replace("_", " "))


def comparison_figure(name: str) -> str:
    """Return the name under which a figure of a comparison is logged."""
    return f"comparison/{name}"


def comparison_table(name: str) -> str:
    """Return the name under which a table of a comparison is logged."""
    return f"comparison/{name}_table"


def in_gib(name: str) -> str:
    """Return the name under which W&B also has a number of bytes in GiB, because its panels cannot convert."""
    return _IN_GIB[name]


def amounts_in_gib(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of bytes among some metrics in GiB, under the names of ``in_gib``."""
    return {gib: metrics[name] / 2**30 for name, gib in _IN_GIB.items() if metrics.get(name) is not None}
