"""Predicted probabilities of each run on the scored samples, and the labels of these samples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_dlrm.cli.parser import build_model_and_data
from lightning_dlrm.cli.predictions import read_predictions
from lightning_dlrm.cli.trust import trust_options
from lightning_dlrm.compare.options import Split
from lightning_dlrm.compare.runs import Run
from lightning_dlrm.contracts.documents import read_json
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.objectives.metrics import chance_deviation, click_metrics, group_aucs
from lightning_dlrm.tracking.run_folder import CONFIG, PREDICTIONS

SOURCE = "source.json"
"""File that names the run, the split and the data of a folder's predictions."""

MOST_CHANCE = 0.05
"""An AUC that is higher above 0.5 is not called random: on few samples that would say nothing about the training."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The labels and groups of every sample of a split, in row order."""

    labels: NDArray[np.int8]
    train_click_rate: float | None
    """Click rate of the training samples; None if it is not known."""
    best_auc: float | None
    """Best reachable AUC; None if it is not known."""
    groups: NDArray[np.int64] | None = None
    """Number of each sample's group: see ``Batch.group``; None without groups."""

    @cached_property
    def chance(self) -> float:
        """Distance from 0.5 that an AUC of random predictions has at most, in 997 cases of 1,000."""
        clicks = int(np.sum(self.labels > 0))
        return min(3 * chance_deviation(clicks, len(self.labels) - clicks), MOST_CHANCE)

    @property
    def chance_words(self) -> str:
        """Return what ``chance`` is."""
        if self.chance == MOST_CHANCE:
            return f"{MOST_CHANCE}, the largest margin"
        return "3 standard deviations of the AUC of random predictions"

    @cached_property
    def of_click_rate(self) -> dict[str, float]:
        """Metrics of predicting the click rate of the split for every sample: see ``click_metrics``."""
        return _metrics(np.full(len(self.labels), np.mean(self.labels > 0), np.float32), self)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Probabilities and metrics of a run on every sample of a split."""

    probabilities: NDArray[np.float32]
    samples: Samples
    metrics: dict[str, float]
    """See ``click_metrics``."""

    @property
    def random(self) -> bool:
        """Whether the AUC is no better than that of random predictions."""
        return self.metrics["auc"] <= 0.5 + self.samples.chance


def scoring_command(run: Run, split: Split, folder: Path) -> list[str] | None:
    """Return the command that writes a run's predictions into a folder; None if the folder has them.

    Raises:
        UserError: the folder does not have them, and the run has no checkpoint.
    """
    if _is_scored(run, split, folder):
        return None
    if not run.checkpoint.exists():
        raise UserError(
            f"the run {run.path} has no checkpoints/best to score its {split} split with; train it again, or put the "
            "checkpoint back"
        )
    return predict_command(run.path, split, folder)


def predict_command(run: Path, split: Split, folder: Path) -> list[str]:
    """Return the command that scores the best checkpoint, on a single device.

    The run may be a stranger's, and callbacks, loggers and profilers write files: scores need none.
    """
    return [
        "predict", "--config", str(run / CONFIG), "--ckpt_path", str(run / "checkpoints" / "best"),
        "--run_dir", str(folder), "--data.predict_split", split,
        "--trainer.strategy", "auto", "--trainer.devices", "1", "--trainer.num_nodes", "1",
        "--trainer.callbacks", "null", "--trainer.logger", "false", "--trainer.profiler", "null", *trust_options(),
    ]  # fmt: skip


def note_source(run: Run, split: Split, folder: Path) -> None:
    """Write ``SOURCE`` into a folder of predictions, so that they are not made again."""
    (folder / SOURCE).write_text(json.dumps(_source(run, split)))


def _is_scored(run: Run, split: Split, folder: Path) -> bool:
    try:
        kept = read_json(folder / SOURCE, dict[str, Any], "they are made again")
    except UserError:
        return False
    return kept == _source(run, split) and (folder / PREDICTIONS).is_file()


def _source(run: Run, split: Split) -> dict[str, Any]:
    return {
        "run": str(run.path.resolve()),
        "split": split,
        "data_fingerprint": run.final["data_fingerprint"],
        "best": dict(run.best),
    }


def read_samples(run: Run, split: Split, group: str | None = None) -> Samples:
    """Return the labels [N] of a split of the data that a run was trained on, and the groups of a kept column.

    Raises:
        UserError: the data are missing or have changed, they have no such split or no labels in it, the column is not
            kept, or fewer than two of its groups have both labels.
    """
    grouping = [] if group is None else ["--data.group", group]
    options = ["--config", str(run.path / CONFIG), "--data.predict_split", split, *grouping]
    data = build_model_and_data(options).datamodule
    data.prepare_data()
    if data.schema.data_fingerprint != run.final["data_fingerprint"]:
        raise UserError(
            f"the run {run.path} was trained on data with fingerprint {run.final['data_fingerprint'][:12]}, but the "
            f"data of its configuration now have {data.schema.data_fingerprint[:12]}: restore the data"
        )
    data.setup("predict")
    batches = [(batch.label, batch.group) for batch in data.predict_dataloader()]
    parts = [label for label, _ in batches]
    if any(part is None for part in parts):
        raise UserError(f"the {split} split of {run.path} has no labels: compare on another --split")
    labels: NDArray[np.int8] = torch.cat(parts).to(torch.int8).numpy()
    if labels.min() == labels.max():
        raise UserError(f"all {len(labels):,} labels of the {split} split are {labels[0]}: compare on another --split")
    train = data.schema.splits.get("train")
    clicks, rows = (0, 0) if train is None else (train.positives or 0, train.rows)
    train_click_rate = clicks / rows if 0 < clicks < rows else None
    optimum = data.schema.optimum.get(split)
    best_auc = None if optimum is None else optimum.auc
    samples = Samples(labels=labels, train_click_rate=train_click_rate, best_auc=best_auc)
    if batches[0][1] is None:
        return samples
    groups: NDArray[np.int64] = torch.cat([number for _, number in batches]).numpy()
    counted = int((~np.isnan(group_aucs(np.zeros(len(labels), np.float32), labels, groups).auc)).sum())
    if counted < 2:
        raise UserError(
            f"{counted} of the groups of {data.group} in the {split} split of {data.folder} have samples of both "
            "labels; an AUC by group needs two such groups: group by another column"
        )
    return replace(samples, groups=groups)


def read_scores(folder: Path, samples: Samples) -> Scores:
    """Return a run's scores from its predictions and the labels and groups of their rows.

    Raises:
        UserError: the predictions are of other rows, or are not finite.
    """
    path, labels_N = folder / PREDICTIONS, samples.labels
    rows, probabilities = read_predictions(path, len(labels_N))
    if not np.array_equal(rows, np.arange(len(labels_N))):
        raise UserError(f"{path} has other rows than the data: remove it, and compare again")
    if not (np.isfinite(probabilities) & (probabilities >= 0) & (probabilities <= 1)).all():
        raise UserError(
            f"{path} holds probabilities that are not from 0 to 1: the run has diverged or the file was changed; "
            "train the run again"
        )
    return Scores(probabilities=probabilities, samples=samples, metrics=_metrics(probabilities, samples))


def _metrics(probabilities_N: NDArray[np.float32], samples: Samples) -> dict[str, float]:
    logits = torch.logit(torch.from_numpy(probabilities_N.astype(np.float64)), eps=2.0**-25)
    groups_N = () if samples.groups is None else torch.from_numpy(samples.groups)
    return click_metrics(logits, torch.from_numpy(samples.labels), groups_N=groups_N)


def shared_samples(runs: Sequence[Run], split: Split, group: str | None = None) -> dict[str, Samples]:
    """Return data fingerprint -> labels and groups of a split; each dataset is read once.

    Args:
        runs: the runs.
        split: the split.
        group: the kept column to group by; by default that of the runs.

    Raises:
        UserError: the runs are grouped by different columns, or see ``read_samples``.
    """
    columns = {run.config["data"].get("init_args", {}).get("group") for run in runs}
    if group is None and len(columns) > 1:
        listed = ", ".join(sorted(str(column or "no column") for column in columns))
        raise UserError(f"the runs are grouped by {listed}: give the column with --group")
    first_runs = {run.final["data_fingerprint"]: run for run in reversed(runs)}
    return {fingerprint: read_samples(run, split, group) for fingerprint, run in first_runs.items()}
