"""Runs of Weights & Biases: start, callback and end; and the run of a comparison, beside the compared runs."""

import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import wandb
from pydantic import ValidationError
from pytorch_lightning.loggers import WandbLogger

from lightning_dlrm.contracts.errors import UserError, one_line, shown_path
from lightning_dlrm.contracts.schema import SCHEMA_FILE
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import WANDB, RunFolder

_PER_TENSOR_PREFIXES = tuple(
    f"{name}/" for name in (names.GRADIENT_NORM, names.ROW_NORM, names.ROW_GRADIENT_NORM, names.TABLES)
)

JOB_TYPE = "compare"
"""Job type of the run of a comparison."""

log = logging.getLogger("lightning_dlrm")


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """Project, name and group of a run in W&B.

    Args:
        project: W&B project.
        entity: user or team; None for the account's default.
        name: name of the run.
        group: group of the run, such as an experiment of several runs.
        job_type: kind of the run, such as train or test.
        tags: tags of the run.
    """

    project: str
    name: str
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] = ()


class Service:
    """The process that W&B starts for this one; commands go on without W&B if it ends."""

    def __init__(self) -> None:
        self.is_connected = True

    def attempt(self, action: Callable[[], object]) -> None:
        """Call a function that sends something to W&B, unless W&B's process has ended; warn once if it has."""
        if not self.is_connected:
            return
        try:
            action()
        except ConnectionError:
            self.is_connected = False
            log.warning(
                "W&B: its process (wandb-core) has ended, so W&B lacks the rest of the run; this command goes on, and "
                "the run folder has all results"
            )


_SERVICE = Service()
"""That of this process."""


class RunLogger(WandbLogger):
    """Lightning's WandbLogger, for a command that goes on without W&B if W&B's process ends.

    Args:
        experiment: the run, which has been started.
    """

    def __init__(self, experiment: wandb.Run) -> None:
        super().__init__(experiment=experiment)
        # A process of W&B that ended with an earlier run has been replaced.
        _SERVICE.is_connected = True

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        _SERVICE.attempt(lambda: super(RunLogger, self).log_metrics(metrics, step))

    def log_hyperparams(self, params: Any) -> None:
        _SERVICE.attempt(lambda: super(RunLogger, self).log_hyperparams(params))


def start_wandb(
    folder: Path,
    place: RunPlace,
    *,
    mode: Literal["online", "offline"],
    reason: str = "",
    run_id: str | None = None,
    config: Mapping[str, Any],
) -> tuple[RunLogger, str]:
    """Start a run, with its files in the run folder.

    If the server refuses the run, it starts offline instead, so that the fit does not fail.

    Args:
        folder: the run folder.
        place: project, name and group of the run.
        mode: see ``choose_mode``.
        reason: see ``choose_mode``.
        run_id: id of the run; a run with this id is continued. None for a new id.
        config: configuration of the run, for its page.

    Returns:
        The logger, and the reason of the offline mode; empty if the run is online.

    Raises:
        UserError: W&B refuses a setting.
    """

    def start(mode: Literal["online", "offline"]) -> RunLogger:
        run = wandb.init(
            project=place.project,
            entity=place.entity,
            name=place.name,
            group=place.group,
            job_type=place.job_type,
            # An empty list would replace those of WANDB_TAGS.
            tags=list(place.tags) or None,
            id=run_id,
            resume=None if mode == "offline" else "allow",
            # W&B's service keeps the working directory of its start, so the path must be absolute.
            dir=folder.resolve(),
            mode=mode,
            config=dict(config),
            # An offline run would store every redraw of a progress bar in its console output.
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )
        _define_metrics(run)
        return RunLogger(experiment=run)

    try:
        if mode == "online":
            try:
                return start("online"), ""
            except (wandb.Error, OSError) as error:
                reason = one_line(error)
        return start("offline"), reason
    except ValidationError as error:
        # Such as a tag of 65 characters.
        reasons = "; ".join(" ".join(found["msg"].split()) for found in error.errors())
        raise UserError(f"W&B refuses a setting: {reasons}; correct the option of --wandb") from error


def _define_metrics(run: wandb.Run) -> None:
    """Set samples as the x-axis of all metrics, and the best value as the summary of validation metrics."""
    run.define_metric(names.SAMPLES)
    run.define_metric("*", step_metric=names.SAMPLES)
    for metric in names.METRICS:
        name, best = f"{names.VALIDATION}/{metric}", names.BETTER.get(metric)
        run.define_metric(name, step_metric=names.SAMPLES, summary=f"{best},last" if best else "last")


def training_run_id(folder: RunFolder) -> str:
    """Return the W&B id of the run that trains in a folder; a resumed run keeps it.

    WANDB_RUN_ID, which agents of a W&B sweep set, gives the id of a new run.
    """
    path = folder.path / WANDB / "id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{os.environ.get('WANDB_RUN_ID') or secrets.token_hex(4)}\n")
    return path.read_text().strip()


def offline_folders(folder: RunFolder) -> str:
    """Return the pattern of the offline runs of a run folder, for ``wandb sync``."""
    return shown_path(folder.path / WANDB / "offline-run-*")


def run_address(loggers: Sequence[object], folder: RunFolder) -> str | None:
    """Return the URL of a run, or the command that sends it to W&B; None for a run without W&B."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            return f"offline; send it with: wandb sync {offline_folders(folder)}" if run.offline else run.url
    return None


class WandbExtras(pl.Callback):
    """Callback that logs the curves of evaluations, the dataset and, on request, the best checkpoint to W&B.

    Args:
        folder: the run folder.
        logger: logger of the run.
        final: returns the metrics of the fit; called at its end.
        log_model: upload the best checkpoint as an artifact at the end of a fit.
    """

    def __init__(
        self, folder: RunFolder, logger: WandbLogger, final: Callable[[], Mapping[str, Any]], log_model: bool
    ) -> None:
        self._folder = folder
        self._run: wandb.Run = logger.experiment
        self._final = final
        self._log_model = log_model

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refer_to_dataset(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._refer_to_dataset(trainer)
        if not trainer.sanity_checking:
            self._plot(names.VALIDATION, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refer_to_dataset(trainer)
        self._plot(names.TEST, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _SERVICE.attempt(self._log_final)

    def _log_final(self) -> None:
        # W&B's summary already has the best values of logged metrics.
        logged = (f"{names.TRAIN}/", f"{names.VALIDATION}/")
        final = self._final()
        shown = {k: v for k, v in final.items() if not k.startswith(logged)}
        self._run.summary.update(shown | names.amounts_in_gib(final))
        best = self._folder.checkpoints / "best"
        if not self._log_model or not best.exists():
            return
        # W&B allows 100 entries of metadata; metrics of single tensors and tables are left out.
        metadata = {k: v for k, v in dict(self._run.summary).items() if not k.startswith(_PER_TENSOR_PREFIXES)}
        artifact = wandb.Artifact(f"{self._folder.path.name}-weights", "model", metadata=metadata)
        # skip_cache: a copy of the tables for the upload would double their disk space.
        artifact.add_dir(str(best.resolve()), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["best"])

    def _plot(self, stage: str, pl_module: pl.LightningModule) -> None:
        curves: Any = pl_module.curves
        if curves is None:
            return
        points = zip(curves.recall, curves.precision, curves.threshold, strict=True)
        precision_recall = wandb.plot_table(
            "wandb/area-under-curve/v0",
            wandb.Table(["class", "recall", "precision", "threshold"], [["click", *point] for point in points]),
            {"x": "recall", "y": "precision", "class": "class"},
            {"title": f"{stage}: precision and recall", "x-axis-title": "recall", "y-axis-title": "precision"},
            split_table=True,
        )
        calibration = wandb.plot.line_series(
            xs=curves.predicted.tolist(),
            ys=[curves.observed.tolist(), curves.predicted.tolist()],
            keys=["observed", "if calibrated"],
            title=f"{stage}: observed and predicted click rate",
            xname="predicted click rate",
            split_table=True,
        )
        plots = {names.PRECISION_RECALL: precision_recall, names.CALIBRATION_CURVE: calibration}
        _SERVICE.attempt(lambda: self._run.log({f"{stage}/{name}": plot for name, plot in plots.items()}))

    def _refer_to_dataset(self, trainer: pl.Trainer) -> None:
        """Log the dataset as an artifact that refers to the files of its folder.

        The artifact holds ``dataset.json`` with the checksum of every file, so other data make another version.
        """
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        folder = getattr(datamodule, "folder", None)
        if folder is None:
            return
        schema = datamodule.schema
        artifact = wandb.Artifact(
            re.sub(r"[^\w.-]", "-", f"{schema.dataset}-{schema.protocol}"),
            "dataset",
            metadata={
                "location": str(folder),
                "encoding_fingerprint": schema.encoding_fingerprint,
                "data_fingerprint": schema.data_fingerprint,
                "rows": {name: split.rows for name, split in schema.splits.items()},
            },
        )
        with artifact.new_file(SCHEMA_FILE, mode="wb") as file:
            file.write(folder.read(SCHEMA_FILE))
        # A reference to remote storage needs its client library; the location is in the metadata.
        if folder.local is not None:
            artifact.add_reference(folder.local.resolve().as_uri(), name="files", checksum=False)
        # W&B records inputs of a run only online.
        refer = self._run.log_artifact if self._run.offline else self._run.use_artifact
        try:
            _SERVICE.attempt(lambda: refer(artifact))
        except (wandb.Error, OSError) as error:
            log.warning("W&B: the run does not refer to its dataset: %s", " ".join(str(error).split()))


def finish_wandb(succeeded: bool) -> None:
    """Finish the open run of this process, if there is one, with its exit state."""
    if wandb.run is None:
        return
    _SERVICE.attempt(lambda: wandb.finish(exit_code=0 if succeeded else 1))
    if not _SERVICE.is_connected:
        # Otherwise W&B tries to finish at the end of the interpreter, and prints a traceback.
        with suppress(ConnectionError):
            wandb.teardown()


# --- comparisons ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with numbers and names."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class ComparisonPage:
    """Figures, tables and files of a comparison.

    Args:
        figures: name in ``names.COMPARISON_FIGURES`` -> PNG files, each with its caption.
        tables: name in ``names.COMPARISON_TABLES`` -> table.
        files: files of an artifact, such as the report.
        findings: sentences at the head of a dashboard's report.
    """

    figures: Mapping[str, Sequence[tuple[Path, str]]]
    tables: Mapping[str, Table]
    files: Sequence[Path]
    findings: Sequence[str] = ()


def send_comparison(
    page: ComparisonPage, output: Path, place: RunPlace, mode: Literal["online", "offline"], reason: str = ""
) -> tuple[str, str]:
    """Log a page in one run, which later calls for the same folder continue.

    Args:
        page: the page.
        output: folder of the comparison, which also holds W&B's files.
        place: project, group and name of the run; its job type is ``compare``.
        mode: see ``choose_mode``.
        reason: see ``choose_mode``.

    Returns:
        The URL of the page, or the command that sends it; and the reason of the offline mode, empty if online.
    """
    folder = RunFolder(output)
    logger, reason = start_wandb(
        output, place, mode=mode, reason=reason, run_id=training_run_id(folder), config={"comparison": place.name}
    )
    succeeded = False
    try:
        _log(page, logger.experiment)
        where = run_address([logger], folder) or ""
        succeeded = True
    finally:
        finish_wandb(succeeded)
    return where, reason


def _log(page: ComparisonPage, run: wandb.Run) -> None:
    shown: dict[str, Any] = {
        names.comparison_figure(name): [wandb.Image(str(path), caption=caption) for path, caption in pictures]
        for name, pictures in page.figures.items()
    }
    shown |= {
        names.comparison_table(name): wandb.Table(columns=list(table.columns), data=list(map(list, table.rows)))
        for name, table in page.tables.items()
    }
    run.log(shown)
    report = wandb.Artifact(f"comparison-{run.id}", "report")
    for path in page.files:
        report.add_file(str(path))
    run.log_artifact(report)
