"""Text that a fit prints at its start and at its end."""

import re
import sys
from collections.abc import Mapping, Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason

from lightning_dlrm.cli.classes import PRECISIONS
from lightning_dlrm.cli.parser import PublishedScore
from lightning_dlrm.cli.trust import trust_options
from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.contracts.terminal import command_line, counted, emphasized, wrapped
from lightning_dlrm.engine.plateau import ReduceOnPlateau
from lightning_dlrm.models.network import ModelSize
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import CONFIG, RunFolder
from lightning_dlrm.tracking.sparkline import sparkline


def demo_note() -> str:
    """Return the note at the start of every run on demo data."""
    return (
        "This is DEMO DATA: generated clicks of a planted model, whose best reachable score is known. For real data:\n"
        "  python -m lightning_dlrm preprocess --dataset kaggle --protocol dlrm --input train.txt --output criteo\n"
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
    data = "demo data" if schema.dataset == "demo" else f"{schema.dataset} data"
    ranks = trainer.world_size
    if isinstance(trainer.accelerator, CUDAAccelerator):
        devices = f"{counted(ranks, 'GPU')} ({torch.cuda.get_device_name()})"
    elif isinstance(trainer.accelerator, CPUAccelerator):
        devices = counted(torch.get_num_threads(), "CPU core") + f" on each of {ranks} ranks" * (ranks > 1)
    else:
        devices = counted(ranks, "device")
    batch = "" if batch_size is None else f", batch {batch_size:,}"
    return f"{network} on {data}{batch}, {PRECISIONS.get(str(trainer.precision), trainer.precision)}, {devices}"


def cells_note(schema: DatasetSchema) -> str:
    """Return the note at the start of a fit: the share of unknown, rare and missing values in each split's ids; empty
    if preprocessing did not count them."""
    splits = []
    for name, tables in schema.cells.items():
        words = ", ".join(f"{share:.2%} {kind}" for kind, share in schema.cell_shares(name).items())
        most = sorted(((counts.get("unknown", 0), table) for table, counts in tables.items()), reverse=True)[:2]
        most_words = ", ".join(f"{table} {count / schema.splits[name].rows:.0%}" for count, table in most if count)
        splits.append(f"{name} {words}{f' (unknown most in {most_words})' if most_words else ''}")
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
) -> str:
    """Return the report at the end of a run: scores and their course, size, speed, locations, and next commands.

    Args:
        folder: the run folder.
        final: every metric at the end of the run.
        best: metrics of the best validation.
        schema: schema of the data.
        wandb: address of the run at W&B; None without W&B.
        published: the published scores of the configuration.
    """
    title, *scores = _scores(final, best)
    lines = ["", emphasized(title, sys.stdout), *scores]
    lines += published_notes(published, final, names.VALIDATION, schema.dataset)
    history = folder.lines()
    courses = ((f"{names.VALIDATION}/auc", "validation AUC"), (names.TRAIN_LOSS, "training loss"))
    facts: list[tuple[str, str | None]] = [(title, _course(history, name)) for name, title in courses]
    facts += [
        ("parameters", size_words(final[names.PARAMETERS_TABLES], final[names.PARAMETERS_DENSE])),
        ("speed", _speed(final)),
        (
            "training",
            f"{final[names.SAMPLES]:,} samples in {rounded(final[names.TRAINING_SECONDS])} s; "
            f"{final[names.PEAK_MEMORY] / 2**30:.2f} GiB of memory at most",
        ),
        ("run folder", str(folder.path)),
        ("W&B", wandb),
    ]
    lines += ["", *(f"{title:16s}{words}" for title, words in facts if words)]
    auc, optimum = final.get(f"{names.VALIDATION}/auc"), final.get(names.OPTIMUM_AUC)
    if schema.dataset == "demo" and auc is not None and optimum is not None:
        lines += ["", demo_result(auc, optimum)]
    if (folder.checkpoints / "best").exists():
        trust = trust_options()
        best_checkpoint = folder.checkpoints / "best"
        again = ["--config", str(folder.path / CONFIG), "--ckpt_path", str(best_checkpoint), *trust]
        commands = [
            ["test", *again],
            ["predict", *again, "--data.predict_split", "all"],
            ["compare", str(folder.path), "OTHER_RUN", "--output", "comparison", *trust],
        ]
        lines += ["", emphasized("next:", sys.stdout)]
        lines += [f"  {command_line(*command)}" for command in commands]
    return wrapped(lines)


def _scores(final: Mapping[str, float], best: Mapping[str, float]) -> list[str]:
    """Return the validation metrics, with the best reachable values of planted data."""
    optimum = {"auc": final.get(names.OPTIMUM_AUC), "log_loss": final.get(names.OPTIMUM_LOG_LOSS)}
    reachable = "" if None in optimum.values() else "best reachable"
    metrics = {
        metric: final[name]
        for metric in (*names.METRICS, names.GROUP_AUC)
        if (name := f"{names.VALIDATION}/{metric}") in final
    }
    if not metrics:
        return ["no validation was made"]
    of_best = {metric: best.get(f"{names.VALIDATION}/{metric}") for metric in metrics}
    is_best = of_best == metrics
    step = f"step {best[names.STEP]:,}" if best else ""
    titles = ["at the end, the best" if is_best else "at the end"]
    titles += [] if is_best or not best else [f"best, {step}"]
    rows = [("validation", *titles, reachable)]
    for metric, value in metrics.items():
        values = [value, *([] if len(titles) == 1 else [of_best[metric]]), optimum.get(metric)]
        rows.append((names.title_of(metric), *("" if value is None else f"{value:.6f}" for value in values)))
    return [f"{row[0]:20s}{''.join(f'{cell:>21s}' for cell in row[1:])}".rstrip() for row in rows]


def _speed(final: Mapping[str, float]) -> str:
    """Return the speed, and the wait for data if it was logged: not if a fit was killed at its end and resumed."""
    speed, wait = f"{final[names.SAMPLES_PER_SECOND]:,.0f} samples/s on average", final.get(names.DATA_WAIT_SHARE)
    return speed if wait is None else f"{speed}; {100 * wait:.1f}% of the time waiting for data"


def _course(history: Sequence[Mapping[str, float]], name: str) -> str:
    """Return a sparkline with its first and last value; empty if there are fewer than two values."""
    values = [line[name] for line in history if line.get(name) is not None]
    return f"{sparkline(values)}  {values[0]:.4f} to {values[-1]:.4f}" if len(values) > 1 else ""


def demo_result(auc: float, optimum: float) -> str:
    """Return how close a fit on demo data came to the best reachable AUC."""
    share = (auc - 0.5) / (optimum - 0.5)
    return (
        f"DEMO DATA: AUC {auc:.4f} of the best reachable {optimum:.4f}; "
        f"{100 * share:.1f}% of the way from 0.5, {optimum - auc:.4f} short"
    )
