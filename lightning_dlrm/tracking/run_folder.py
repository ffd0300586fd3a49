"""The run folder, which holds all results of a run.

``config.yaml``, ``versions.json``, ``metrics.jsonl``, ``summary.json``, ``checkpoints/``, ``predictions.parquet``,
``validate.json``, ``test.json``, ``validation_curves.json``, ``test_curves.json``, and W&B's files in ``wandb/``.
"""

import datetime
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightning_dlrm.contracts.disk import write_fault
from lightning_dlrm.contracts.documents import MAX_BYTES, YAML_FAULTS, parse_yaml, read_json
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.lock import LOCK

log = logging.getLogger("lightning_dlrm")

CONFIG = "config.yaml"
VERSIONS = "versions.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PREDICTIONS = "predictions.parquet"
WANDB = "wandb"
RUNS = Path("runs")
"""Folder of the runs for which the user names no folder."""
BOUNDS = ("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs", "limit_train_batches")
"""Settings of the trainer that end a fit."""


def curves_file(stage: str) -> str:
    """Return the name of the file with the curves of the last evaluation on a split."""
    return f"{stage}_curves.json"


class RunFolder:
    """Paths of a run and the small files in it."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.is_new = False
        """Whether this process has made the folder."""
        self.refusal: str | None = None
        """The reason why this run may not use the folder; on rank 0."""

    def agree(self, strategy: Strategy) -> None:
        """Take the path that rank 0 has chosen; all ranks call it together.

        Raises:
            UserError: on all ranks, if rank 0 was refused the folder.
        """
        self.path, refusal = strategy.broadcast((self.path, self.refusal))
        if refusal is not None:
            raise UserError(refusal)

    @classmethod
    def create(cls, path: Path | None, model: str, job: str | None = None) -> "RunFolder":
        """Create the folder of a new run.

        Args:
            path: path that the user gave; None for ``runs/<date>-<model>-<n>``.
            model: name of the model, for the default path.
            job: SLURM's job; its default path is ``runs/slurm-<job>-<model>-<n>``, by which it is found again.

        Raises:
            UserError: the folder is not empty, or cannot be created.
        """
        if path is None:
            return cls._create_numbered(f"{_today()}-{model}" if job is None else f"slurm-{job}-{model}")
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"--run_dir {path} is a file; give an empty folder or a new one")
        if path.exists() and any(not entry.name.startswith(LOCK) for entry in path.iterdir()):
            raise UserError(
                f"the run folder {path} exists and is not empty; continue that run with --resume auto, "
                "or choose another --run_dir"
            )
        folder = cls(path)
        folder.is_new = _create_folder(path)
        return folder

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        """Return the folder of a run that continues.

        Raises:
            UserError: the folder does not hold a run.
        """
        found = {entry.name for entry in path.iterdir() if not entry.name.startswith(LOCK)}
        if found and not found & {CONFIG, METRICS, "checkpoints", WANDB}:
            raise UserError(
                f"{path} is not a run folder: it holds {min(found)} and no {CONFIG}; give the folder of the run to "
                "continue, or a new one"
            )
        return cls(path)

    @classmethod
    def _create_numbered(cls, name: str) -> "RunFolder":
        _create_folder(RUNS)
        for n in range(1, 100_000):
            path = RUNS / f"{name}-{n}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            folder = cls(path)
            folder.is_new = True
            return folder
        raise UserError(f"{RUNS} holds 100,000 runs named {name}; give --run_dir")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl`` without an incomplete line of a killed run.

        Raises:
            UserError: a line is not a JSON object with an integer step.
        """
        found = []
        for line in self._raw_lines():
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue
            is_line = isinstance(content, dict) and type(content.get(names.STEP)) is int and content[names.STEP] >= 0
            require(is_line, f"{self.metrics} has a line without a step ({line[:40]!r}); remove the line")
            other = [name for name, value in content.items() if not isinstance(value, (int, float, NoneType))]
            require(
                not other,
                f"{self.metrics}: {''.join(other[:1])} is not a number in the line {line[:40]!r}; remove the line",
            )
            found.append(content)
        return found

    def _raw_lines(self) -> Iterator[bytes]:
        if not self.metrics.is_file():
            return
        with self.metrics.open("rb") as file:
            while line := file.readline(MAX_BYTES):
                yield line

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a small JSON file atomically; NaN and infinite values become null."""
        self.write_text(name, json.dumps(_replace_nonfinite(content), indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a small file atomically."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file atomically."""
        partial = self.path / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(self.path / name)

    def write_summary(self, final: Mapping[str, Any], best: Mapping[str, Any]) -> None:
        """Write ``summary.json``: the metrics at the end of the run, and those of its best validation."""
        self.write_json(SUMMARY, {"final": final, "best": best})

    def final(self) -> dict[str, Any]:
        """Return the metrics at the end of the run from ``summary.json``; empty without such a file, or if damaged."""
        path = self.path / SUMMARY
        if not path.exists():
            return {}
        try:
            return read_json(path, dict[str, dict[str, Any]], "it is written again").get("final", {})
        except UserError as error:
            log.warning("%s", error)
            return {}

    def set_lines_aside(self, step: int) -> None:
        """Move the lines of ``metrics.jsonl`` after ``step``, which a resumed run writes again, to a file of today."""
        if not self.metrics.exists():
            return
        # A damaged line may be no text in UTF-8.
        content = self.metrics.read_bytes()
        kept = "".join(json.dumps(line) + "\n" for line in self.lines() if line[names.STEP] <= step).encode()
        if content != kept:
            stays = set(kept.splitlines())
            cut = [line for line in content.splitlines() if line not in stays]
            aside = _free_name(self.metrics)
            self.write_bytes(aside.name, b"\n".join(cut) + b"\n")
            self.write_bytes(METRICS, kept)
            log.info("the lines of %s after step %s are set aside in %s", self.metrics, step, aside)

    def write_start(self, config: str, versions: Mapping[str, str | None]) -> None:
        """Write ``config.yaml`` and ``versions.json``; those of an earlier start are set aside if they differ.

        Settings that end a fit may differ.
        """
        for name, text in ((CONFIG, config), (VERSIONS, json.dumps(versions, indent=1) + "\n")):
            path = self.path / name
            if path.exists() and _without_bounds(path.read_bytes()) != _without_bounds(text.encode()):
                log.info("%s has changed; the previous version is kept as %s", path, set_aside(path))
            self.write_text(name, text)

    def remove_without_results(self) -> bool:
        """Remove the folder if the run failed before its first result; return whether it did."""
        if self.metrics.exists() or self.checkpoints.exists():
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        return not self.path.exists()


class JsonLinesLogger(Logger):
    """Lightning logger that writes ``metrics.jsonl``, with one line for all metrics of a step.

    Each line is written to the file at once.
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self._folder = folder
        self._step: int | None = None
        self._line: dict[str, Any] = {}
        self._line_start = 0

    @property
    def name(self) -> str:
        return self._folder.path.name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._folder.path)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self._folder.metrics.open("ab") as file:
            if step is None or step != self._step:
                self._step, self._line = step, {names.STEP: step}
                self._line_start = file.seek(0, os.SEEK_END)
            else:
                file.truncate(self._line_start)
                file.seek(0, os.SEEK_END)
            self._line |= metrics
            file.write((json.dumps(_replace_nonfinite(self._line)) + "\n").encode())


def set_aside(path: Path) -> Path:
    """Give a file or folder a name with the date, and return the name."""
    return path.rename(_free_name(path))


def _free_name(path: Path) -> Path:
    date = datetime.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    names_of_today = (path.with_name(f"{path.stem}-{date}{n or ''}{path.suffix}") for n in itertools.count())
    return next(name for name in names_of_today if not name.exists())


def _without_bounds(content: bytes) -> Any:
    """Return a configuration without the settings that end a fit; the content itself if it is not a configuration."""
    try:
        document = parse_yaml(content.decode())
        trainer = {key: value for key, value in document["trainer"].items() if key not in BOUNDS}
    except (UserError, yaml.YAMLError, RecursionError, *YAML_FAULTS):
        return content
    return document | {"trainer": trainer, "stop_at_auc": None}


def _today() -> str:
    return datetime.datetime.now().astimezone().strftime("%Y%m%d")


def _create_folder(path: Path) -> bool:
    """Create a folder; return whether there was none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:
            if path.is_dir():
                return False
            raise
        return True
    except OSError as error:
        raise UserError(write_fault(path, error, "another --run_dir")) from error


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    if hasattr(value, "item"):
        # Lightning's LearningRateMonitor logs learning rates that are tensors as tensors.
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
