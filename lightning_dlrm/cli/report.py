"""Text that commands print at their start and at their end."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason

from lightning_dlrm.cli.classes import PRECISIONS
from lightning_dlrm.cli.parser import PublishedScore
from lightning_dlrm.cli.predictions import Predictions
from lightning_dlrm.cli.trust import trusting_command
from lightning_dlrm.contracts.errors import shown_path
from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.contracts.terminal import aligned, counted, decimal, emphasized, wrapped
from lightning_dlrm.engine.plateau import ReduceOnPlateau
from lightning_dlrm.kernels.choice import SLOW_BF16, bf16_is_slow
from lightning_dlrm.models.network import ModelSize
from lightning_dlrm.objectives.metrics import click_rate_log_loss
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import CONFIG, RunFolder
from lightning_dlrm.tracking.sparkline import sparkline


def demo_note() -> str:
    """Return the note at the start of every run on demo data."""
    return (
        "This is DEMO DATA: generated clicks of a planted model, whose best reachable score is known.\n"
        "For real data:\n"
        "  python -m lightning_dlrm preprocess --dataset kaggle --protocol dlrm \\\n"
        "    --input train.txt --output criteo\n"
        "  python -m lightning_dlrm fit --config dlrm.yaml --config criteo_kaggle.yaml --data.path criteo\n"
        "For your own log: preprocess --infer; see docs/own-data.md"
    )


def setup_note(network: str, schema: DatasetSchema, batch_size: int | None, trainer: pl.Trainer) -> str:
    """Return the first line of a fit, such as ``DLRM on demo data, batch 2,048, float32, 2 CPU cores``.

    Args:
        network: class of the network.
        schema: schema of the data.
        batch_size: global batch size; None if the datamodule does not say it.
        trainer: trainer of the fit.
    """
    data = data_words(schema)
    ranks = trainer.world_size
    if isinstance(trainer.accelerator, CUDAAccelerator):
        devices = f"{counted(ranks, 'GPU')} ({torch.cuda.get_device_name()})"
    elif isinstance(trainer.accelerator, CPUAccelerator):
        # Lightning shares the cores among several ranks only when it starts them, after this line.
        devices = counted(torch.get_num_threads(), "CPU core") if ranks == 1 else f"{ranks} ranks on CPU cores"
    else:
        devices = counted(ranks, "device")
    batch = "" if batch_size is None else f", batch {batch_size:,}"
    return f"{network} on {data}{batch}, {PRECISIONS.get(str(trainer.precision), trainer.precision)}, {devices}"


def precision_note(trainer: pl.Trainer) -> str:
    """Return the note at the start of a command in bfloat16 on a processor that is slow at it; else empty."""
    on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
    if not on_cpu or not str(trainer.precision).startswith("bf16") or not bf16_is_slow():
        return ""
    return f"{SLOW_BF16}: --trainer.precision 32-true is faster here than {trainer.precision}"


def data_words(schema: DatasetSchema) -> str:
    """Return the name of the data in a sentence."""
    return "demo data" if schema.dataset == "demo" else f"dataset {schema.dataset}"


def cells_note(schema: DatasetSchema) -> str:
    """Return the note at the start of a fit: the shares of unknown, rare and missing values in each split's ids, apart
    from those that are 0; empty if there are none, or if preprocessing did not count them."""
    splits = []
    for name, tables in schema.cells.items():
        shares = [f"{share:.2%} {kind}" for kind, share in schema.cell_shares(name).items() if share >= 5e-5]
        unknown = [
            (counts.get("unknown", 0) / (schema.counted_values(name, table) or 1), table)
            for table, counts in tables.items()
        ]
        most = sorted(unknown, reverse=True)[:2]
        most_words = ", ".join(f"{table} {share:.0%}" for share, table in most if share >= 0.005)
        if shares:
            words = f"{name} {', '.join(shares)}"
            splits.append(f"{words} (unknown most in {most_words})" if most_words else words)
    return f"ids of unknown, rare and missing values: {'; '.join(splits)}" if splits else ""


def size_note(size: ModelSize) -> str:
    """Return the note at the start of every run; the same numbers as ``params`` counts."""
    forward, training = size.flops_per_sample_forward, size.flops_per_sample_training
    flops = f"{forward:,} forward, {training:,} in training" if forward else "unknown"
    return f"parameters: {size_words(size.tables, size.dense)}\nFLOPs per sample: {flops}"


def size_words(tables: float, dense: float) -> str:
    """Return the number of parameters: total, in tables, and in dense layers."""
    return f"{tables + dense:,} ({tables:,} in tables, {dense:,} dense)"


def early_stop_note(callback: EarlyStopping | ReduceOnPlateau, step: int, total: float) -> str:
    """Return why a fit ended before its last step; empty if this callback did not end it.

    Args:
        callback: the callback, after the fit.
        step: step at which the fit ended.
        total: number of steps of the whole fit.
    """
    if isinstance(callback, ReduceOnPlateau):
        if not callback.stops or step >= total:
            return ""
        return (
            f"stopped early at step {step:,}: {' + '.join(callback.weights)} not better for "
            f"{counted(callback.count, 'validation')} (best {callback.best:.6f})"
        )
    metric, best, waited = callback.monitor, float(callback.best_score), callback.wait_count
    reasons = {
        EarlyStoppingReason.PATIENCE_EXHAUSTED: f"{metric} not better for {counted(waited, 'validation')} "
        f"(best {best:.6f})",
        EarlyStoppingReason.STOPPING_THRESHOLD: f"{metric} has reached the threshold {callback.stopping_threshold}",
        EarlyStoppingReason.DIVERGENCE_THRESHOLD: f"{metric} is beyond the limit {callback.divergence_threshold}",
        EarlyStoppingReason.NON_FINITE_METRIC: f"{metric} is not finite",
    }
    reason = reasons.get(callback.stopping_reason)
    return f"stopped early at step {step:,}: {reason}" if reason and step < total else ""


def rounded(value: float) -> str:
    """Format a number of any size with at least three digits.

    >>> [rounded(value) for value in (75936.2, 123.4, 24.0, 12.34, 0.0351)]
    ['75,936', '123', '24.0', '12.3', '0.0351']
    """
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def published_notes(
    published: Sequence[PublishedScore] | None, metrics: Mapping[str, float], split: str, dataset: str
) -> list[str]:
    """Return a line for each published score: how far a run's or a mean metric is from it; none on demo data, and none
    for a score whose source names other splits.

    Args:
        published: the scores of the configuration.
        metrics: name, with the split before it -> value; scores of other metrics are left out.
        split: split of the metrics.
        dataset: name of the dataset.
    """
    notes = []
    for score in published or ():
        value = metrics.get(f"{split}/{score.metric}")
        of_splits = re.findall(r"\b(train|validation|test)(?:ing)?\b", score.source)
        if dataset == "demo" or value is None or (of_splits and split not in of_splits):
            continue
        difference = value - score.value
        notes.append(
            f"{split} {names.title_of(score.metric)} {value:.5f} is {abs(difference):.5f} "
            f"{'below' if difference < 0 else 'above'} the published {score.value:g} ({score.source}"
            f"{'' if of_splits else '; the source does not name the split'})"
        )
    return notes


def final_report(
    folder: RunFolder,
    final: Mapping[str, float],
    best: Mapping[str, float],
    schema: DatasetSchema,
    wandb: str | None,
    published: Sequence[PublishedScore] | None = None,
    chance: str = "",
) -> str:
    """Return the report at the end of a run: scores and their course, size, speed, locations, and next commands.

    Args:
        folder: the run folder.
        final: every metric at the end of the run.
        best: metrics of the best validation.
        schema: schema of the data.
        wandb: address of the run at W&B; None without W&B.
        published: the published scores of the configuration.
        chance: why the AUC is no better than that of random predictions; empty if it is better.
    """
    title, *scores = _scores(final, best, schema)
    lines = ["", emphasized(title, sys.stdout), *scores]
    lines += published_notes(published, final, names.VALIDATION, schema.dataset)
    history = folder.lines()
    last, several = min(final[names.SAMPLES], names.WINDOW_SAMPLES), final.get(names.RANKS, 1) > 1
    facts: list[tuple[str, str | None]] = [
        ("validation AUC", _course(history, f"{names.VALIDATION}/auc")),
        ("training log loss", _course(history, f"{names.TRAIN}/log_loss", f" (last {last:,} samples)")),
        ("parameters", size_words(final[names.PARAMETERS_TABLES], final[names.PARAMETERS_DENSE])),
        ("speed", _speed(final)),
        (
            "training",
            f"{final[names.SAMPLES]:,} samples in {rounded(final[names.TRAINING_SECONDS])} s; "
            f"{final[names.PEAK_MEMORY] / 2**30:.2f} GiB of memory at most{' on rank 0' * several}",
        ),
        ("run folder", str(folder.path)),
        ("W&B", wandb),
    ]
    lines += ["", *(f"{title:19s}{words}" for title, words in facts if words)]
    auc, optimum = final.get(f"{names.VALIDATION}/auc"), final.get(names.OPTIMUM_AUC)
    if chance:
        lines += ["", f"did not train: {chance}"]
    elif schema.dataset == "demo" and auc is not None and optimum is not None:
        lines += ["", demo_result(auc, optimum)]
    if (folder.checkpoints / "best").exists():
        best_checkpoint = folder.checkpoints / "best"
        again = ["--config", str(folder.path / CONFIG), "--ckpt_path", str(best_checkpoint)]
        commands = [
            ["test", *again],
            ["predict", *again, "--data.predict_split", "all"],
            ["compare", str(folder.path), "OTHER_RUN", "--output", "comparison"],
        ]
        lines += ["", emphasized("next:", sys.stdout)]
        lines += [f"  {trusting_command(*command)}" for command in commands]
    return wrapped(lines)


def _scores(final: Mapping[str, float], best: Mapping[str, float], schema: DatasetSchema) -> list[str]:
    """Return the table of validation metrics: the last, and those of the best validation if they differ."""
    last, of_best = (_metrics_of(names.VALIDATION, metrics) for metrics in (final, best))
    if not last:
        return ["no validation was made"]
    is_best = all(of_best.get(metric) == value for metric, value in last.items())
    columns = {"last and best" if is_best else "last": last}
    if best and not is_best:
        columns[f"best, step {best[names.STEP]:,}"] = of_best
    return score_table(names.VALIDATION, columns, schema)


def _metrics_of(split: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of a split: metric -> value."""
    scores = (*names.METRICS, names.GROUP_AUC)
    return {metric: metrics[name] for metric in scores if (name := f"{split}/{metric}") in metrics}


def score_table(split: str, columns: Mapping[str, Mapping[str, float]], schema: DatasetSchema) -> list[str]:
    """Return a table of the metrics of a split, with those of always predicting the split's click rate, and the best
    reachable ones of planted data.

    Args:
        split: the split.
        columns: title -> metric -> value.
        schema: schema of the data.
    """
    of_split, optimum = schema.splits.get(split), schema.optimum.get(split)
    shown = dict(columns)
    if of_split is not None and of_split.positives and of_split.positives < of_split.rows:
        rate = of_split.positives / of_split.rows
        shown["click rate alone"] = {
            "auc": 0.5,
            "log_loss": click_rate_log_loss(rate),
            "normalized_entropy": 1.0,
            "accuracy": max(rate, 1 - rate),
            "calibration": 1.0,
        }
    if optimum is not None:
        shown["best reachable"] = {"auc": optimum.auc, "log_loss": optimum.log_loss}
    rows = [(split, *shown)]
    for metric in next(iter(columns.values())):
        rows.append(
            (names.title_of(metric), *(decimal(of[metric], 6) if metric in of else "" for of in shown.values()))
        )
    return aligned(rows)


def evaluation_report(model: str, split: str, results: Mapping[str, float], schema: DatasetSchema, file: Path) -> str:
    """Return the report of ``validate`` and ``test``: the scores, the numbers of groups, and where they are kept.

    Args:
        model: the network and its checkpoint.
        split: the split.
        results: every metric, with the split before its name.
        schema: schema of the data.
        file: file with the metrics.
    """
    scores = _metrics_of(split, results)
    others = {name.removeprefix(f"{split}/"): value for name, value in results.items()}
    title, *rows = score_table(split, {"score": scores}, schema)
    lines = [f"{model}, {data_words(schema)}", "", emphasized(title, sys.stdout), *rows]
    # Numbers of groups end where the scores end.
    end = title.index("score") + len("score")
    counts = {names.title_of(name): f"{value:,}" for name, value in others.items() if name not in scores}
    lines += [f"{name}{value:>{end - len(name)}}" for name, value in counts.items()]
    return wrapped([*lines, "", f"kept in {shown_path(file)}"])


def prediction_report(model: str, written: Predictions, schema: DatasetSchema, file: Path) -> str:
    """Return the report of ``predict``: rows, mean probability and click rate of each split, and the file's columns.

    Args:
        model: the network and its checkpoint.
        written: content of the file.
        schema: schema of the data.
        file: file with the probabilities.
    """
    if not written.splits:
        return "no rows were scored"
    rows = [("split", "rows", "mean probability", "click rate")]
    for name, of in written.splits.items():
        clicks = f"{of.clicks / of.labels:.6f}" if of.labels else ""
        rows.append((name, f"{of.rows:,}", f"{of.probabilities / of.rows:.6f}", clicks))
    title, *lines = aligned(rows)
    return wrapped(
        [
            f"{model}, {data_words(schema)}",
            "",
            emphasized(title, sys.stdout),
            *lines,
            "",
            f"kept in {shown_path(file)}, with the columns {', '.join(written.columns)}",
        ]
    )


def _speed(final: Mapping[str, float]) -> str:
    """Return the speed, and the wait for data if it was logged: not if a fit was killed at its end and resumed."""
    speed, wait = f"{final[names.SAMPLES_PER_SECOND]:,.0f} samples/s on average", final.get(names.DATA_WAIT_SHARE)
    return speed if wait is None else f"{speed}; {100 * wait:.1f}% of the time waiting for data"


def _course(history: Sequence[Mapping[str, float]], name: str, of: str = "") -> str:
    """Return a sparkline, its first and last value and what they are of; empty if there are fewer than two values."""
    values = [line[name] for line in history if line.get(name) is not None]
    if len(values) < 2:
        return ""
    return f"{sparkline(values, 20)}  {decimal(values[0], 4)} to {decimal(values[-1], 4)}{of}"


def demo_result(auc: float, optimum: float) -> str:
    """Return how close a fit on demo data came to the best reachable AUC."""
    share = (auc - 0.5) / (optimum - 0.5)
    way = f" ({100 * share:.1f}% of the way from 0.5 to it)" if share > 0 else ""
    return f"DEMO DATA: AUC {auc:.4f}; best reachable {optimum:.4f}{way}"
