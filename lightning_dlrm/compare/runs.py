"""Finished runs as ``fit`` leaves them, grouped by configuration."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Number
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lightning_dlrm.cli.configs import flat
from lightning_dlrm.cli.parser import PublishedScore
from lightning_dlrm.cli.resuming import resume_command
from lightning_dlrm.contracts.documents import parse_json, read_json, read_yaml
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.engine.retired import update_document
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import CONFIG, SUMMARY, RunFolder

NO_PART_OF_A_CONFIGURATION = (
    "seed_everything", "model.seed", "data.init_args.seed", "wandb", "run_dir", "resume", "ckpt_path", "config",
    "checkpoint", "trainer.logger", "trainer.default_root_dir", "trainer.enable_progress_bar",
    "data.init_args.predict_split", "data.init_args.group", "data.init_args.demo.class_path", "log_norms", "published",
)  # fmt: skip
"""Settings that may differ between runs of one configuration."""

DATA = ("dataset", "protocol", "encoding_fingerprint", "data_fingerprint")
"""Keys of a run's summary that must be equal in runs that are compared."""

NEEDED = (
    f"{names.VALIDATION}/auc", f"{names.VALIDATION}/log_loss", names.SAMPLES, names.TRAINING_SECONDS,
    names.SAMPLES_PER_SECOND, names.PARAMETERS_TABLES, names.PARAMETERS_DENSE, names.PARAMETERS_TOTAL,
    names.FLOPS_FORWARD, names.FLOPS_TRAINING, names.RANKS, names.BYTES_PER_RANK, *DATA,
)  # fmt: skip
"""Keys of a run's summary without which it cannot be compared."""

STEADY = 1.5
"""Largest ratio of two times that are compared."""

_GENERATED = ("demo", "random", "trace")
"""Names of the datasets that ``generate`` writes."""
_DATA_REPORT = "report.json"
"""File of ``preprocess`` in a dataset's folder."""
_SECTIONS = {"seed_everything": int, "model": dict, "data": dict, "trainer": dict, "wandb": dict}
"""Keys of a run's configuration that are read here, with the types of their values."""
_DAMAGED = "the run folder is damaged: restore the file from a copy, or train the run again"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished fit."""

    name: str
    path: Path
    config: Mapping[str, Any]
    """As in ``config.yaml``."""
    final: Mapping[str, Any]
    best: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    """The lines of ``metrics.jsonl``."""

    @property
    def seed(self) -> int:
        return int(self.config["seed_everything"])

    @property
    def generated(self) -> bool:
        """Whether ``generate`` made the data: the dataset itself, or the raw files that ``preprocess`` read."""
        if self.final["dataset"] in _GENERATED or self.final.get(names.OPTIMUM_AUC) is not None:
            return True
        folder = Path(str(self.config["data"].get("init_args", {}).get("path")))
        try:
            return bool(read_json(folder / _DATA_REPORT, dict[str, Any], "").get("generated"))
        except UserError:
            return False

    @property
    def checkpoint(self) -> Path:
        """Checkpoint of the best validation."""
        return RunFolder(self.path).checkpoints / "best"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """See ``settings_of``."""
        return settings_of(self.config)

    def curve(self, x: str, y: str, first: float = 0.0) -> tuple[list[float], list[float]]:
        """Return two metrics of every logged step that has both, from a number of samples on."""
        points = [
            (line[x], line[y])
            for line in self.history
            if line.get(x) is not None and line.get(y) is not None and line.get(names.SAMPLES, first) >= first
        ]
        return [x for x, _ in points], [y for _, y in points]

    @property
    def late_rise(self) -> float | None:
        """How far the best validation AUC of the last quarter of the training is above the best before it; None without
        a validation in the last quarter, or in the two quarters before it."""
        samples, aucs = self.curve(names.SAMPLES, f"{names.VALIDATION}/auc")
        shares = [count / self.final[names.SAMPLES] for count in samples]
        late = [auc for share, auc in zip(shares, aucs, strict=True) if share > 0.75]
        if not late or not any(0.25 < share <= 0.75 for share in shares):
            return None
        return max(late) - max(aucs[: -len(late)])

    @property
    def fall(self) -> float:
        """How far the last validation AUC is below that of the best validation."""
        auc = f"{names.VALIDATION}/auc"
        return float(self.best[auc] - self.final[auc])


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A configuration and its runs, one for each seed, in the order of their seeds."""

    name: str
    runs: Sequence[Run]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    @property
    def published(self) -> list[PublishedScore]:
        """The published scores of the configuration.

        Raises:
            UserError: they have another form.
        """
        run = self.runs[0]
        found = json.dumps(run.config.get("published") or [])
        return parse_json(found, list[PublishedScore], f"published in {run.path / CONFIG}", "correct it there")

    @property
    def late_rise(self) -> float | None:
        """The mean of ``Run.late_rise``; None if a run has none."""
        rises = [run.late_rise for run in self.runs]
        return None if None in rises else float(np.mean(rises))  # type: ignore[arg-type]

    @property
    def fall(self) -> float:
        """The mean of ``Run.fall``."""
        return float(np.mean([run.fall for run in self.runs]))

    @property
    def encoding(self) -> str:
        """How the data were encoded, in words."""
        # Logs with a schema of their own have no named protocol.
        protocol = self["protocol"]
        return "encoded by its own schema" if protocol == "schema" else f"protocol {protocol}"

    def median(self, name: str) -> float:
        """Return the median over the runs of a number at their end; NaN if one of them lacks it."""
        return float(np.median([run.final.get(name, np.nan) for run in self.runs]))

    def span(self, name: str) -> tuple[float, float]:
        """Return the smallest and the largest value of a number at the end of the runs; zeros without one."""
        values = [run.final[name] for run in self.runs if run.final.get(name) is not None]
        return min(values, default=0.0), max(values, default=0.0)

    def is_steady(self, name: str) -> bool:
        """Return whether a time differs at most ``STEADY`` times between the runs."""
        low, high = self.span(name)
        return high <= STEADY * low

    def __getitem__(self, name: str) -> Any:
        """Return a number that does not depend on the seed, such as ``parameters/total``."""
        return self.runs[0].final[name]


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration by full keys, without keys that may differ between its runs or that it does not use.

    Options without a value are left out, so a run of a release without such an option has the same configuration.
    Classes of this project are compared by name, as their modules may change.
    """
    # Sizes of demo data stand in a configuration with their class, or as in earlier releases without it.
    settings = {
        key.replace(".demo.init_args.", ".demo."): _class_name(value)
        for key, value in flat(update_document(config)[0]).items()
        if value is not None
    }
    demo = () if settings.get("data.init_args.path") == "demo" else ("data.init_args.demo",)
    left_out = (*NO_PART_OF_A_CONFIGURATION, *demo)
    return {key: value for key, value in settings.items() if not within(key, left_out)}


def _class_name(value: Any) -> Any:
    ours = isinstance(value, str) and value.startswith(("lightning_dlrm.", "datamodules."))
    return value.rpartition(".")[2] if ours else value


_Values: TypeAlias = Mapping[str, float | int | str | bool | None]


@dataclass(frozen=True, kw_only=True)
class _Summary:
    """The content of ``summary.json``."""

    final: _Values = field(default_factory=dict)
    best: _Values | None = None


def read_run(path: Path, name: str | None = None) -> Run:
    """Read a run folder.

    Raises:
        UserError: the folder is not a run, its fit has not ended, or its summary lacks a number.
    """
    remedy = "give a run folder, such as the --run_dir of a fit"
    require(path.is_dir(), f"there is no folder {path}: {remedy}")
    require((path / CONFIG).exists(), f"{path} has no {CONFIG}, so it is not a run folder: {remedy}")
    config = read_yaml(path / CONFIG, _DAMAGED)
    for key, kind in _SECTIONS.items():
        if not isinstance(config.get(key), kind):
            raise UserError(f"{path / CONFIG} has no {key} as fit writes it; {_DAMAGED}")
    again = resume_command(path)
    require((path / SUMMARY).exists(), f"the run {path} is not finished; end it with: {again}")
    summary = read_json(path / SUMMARY, _Summary, "train the run again")
    final, best = summary.final, summary.best or {}
    history, step = RunFolder(path).lines(), final.get(names.STEP)
    step = step if isinstance(step, int) else 0
    if history and history[-1][names.STEP] > step:
        raise UserError(
            f"the run {path} is not finished: it has gone on to step {history[-1][names.STEP]} since its summary of "
            f"step {step}; end it with: {again}"
        )
    missing = [metric for metric in NEEDED if not isinstance(final.get(metric), str if metric in DATA else Number)]
    missing += [f"best {metric}" for metric in NEEDED[:1] if not isinstance(best.get(metric), Number)]
    if missing:
        raise UserError(f"the run {path} has no {', '.join(missing)} in its {SUMMARY}; train it again")
    return Run(name=name or path.resolve().name, path=path, config=config, final=final, best=best, history=history)


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Group runs by configuration, and name the arms after what differs between them.

    Raises:
        UserError: two runs of a configuration have the same seed.
    """
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if group[0].settings == run.settings), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    for group in groups:
        seeds = [run.seed for run in group]
        if len(set(seeds)) < len(seeds):
            twice = [str(run.path) for run in group if seeds.count(run.seed) > 1]
            raise UserError(f"{' and '.join(twice)} are runs of the same configuration and seed: give only one of them")
    titles = name_arms([group[0].settings for group in groups], [group[0].name for group in groups])
    return [
        Arm(name=title, runs=sorted(group, key=lambda run: run.seed))
        for title, group in zip(titles, groups, strict=True)
    ]


def name_arms(settings: Sequence[Mapping[str, Any]], fallback: Sequence[str]) -> list[str]:
    """Return a short name for each configuration: its network, and optimizers if they differ; else the run's name."""
    parts = ("network", "table_optimizer", "dense_optimizer")
    paths = [[str(setting.get(f"model.{part}.class_path")) for part in parts] for setting in settings]
    classes = [[path.rpartition(".")[2] for path in of_arm] for of_arm in paths]
    networks = [network for network, *_ in classes]
    both = [f"{network} {' / '.join(dict.fromkeys(rules))}" for network, *rules in classes]
    return next((titles for titles in (networks, both) if len(set(titles)) == len(titles)), list(fallback))


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the keys whose values differ between configurations.

    Args:
        settings: name of a configuration -> full key -> value.

    Returns:
        Full key -> name of a configuration -> its value, if it has the key.
    """
    keys = list(dict.fromkeys(key for setting in settings.values() for key in setting))
    # Keys that only a later configuration has follow the others of their section.
    sections = list(dict.fromkeys(_section(key) for key in keys))
    keys.sort(key=lambda key: sections.index(_section(key)))
    found = {}
    for key in keys:
        values = {name: setting[key] for name, setting in settings.items() if key in setting}
        if len(values) < len(settings) or any(value != next(iter(values.values())) for value in values.values()):
            found[key] = values
    return found


def _section(key: str) -> str:
    """Return the section of a key: ``model.network`` for ``model.network.init_args.top_mlp``."""
    return ".".join(key.split(".")[:2])


def data_differences(runs: Sequence[Run]) -> list[str]:
    """Return a line for each difference between the data of runs."""
    lines = []
    for name in DATA:
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(str(run.final[name])[:12], []).append(run.name)
        if len(values) > 1:
            sides = "; ".join(f"{value} in {_few(members)}" for value, members in values.items())
            lines.append(f"{name.replace('_', ' ')}: {sides}")
    if lines:
        for key, by_run in differing({run.name: run.settings for run in runs}).items():
            # Sizes of demo data do not matter beside other data.
            of_data = within(key, ("data.class_path", "data.init_args.path", "data.init_args.demo"))
            if of_data and len(by_run) == len(runs):
                lines.append(f"{key}: {', '.join(dict.fromkeys(str(value) for value in by_run.values()))}")
    return lines


def by_data(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    """Group configurations by dataset and protocol, and, if these are equal, by fingerprint."""
    groups: dict[tuple[str, ...], list[Arm]] = {}
    for arm in arms:
        groups.setdefault((arm["data_fingerprint"], arm["dataset"], arm["protocol"]), []).append(arm)
    titles = [f"{group[0]['dataset']} ({group[0].encoding})" for group in groups.values()]
    if len(set(titles)) < len(titles):
        titles = [f"{title[:-1]}, fingerprint {key[0][:12]})" for title, key in zip(titles, groups, strict=True)]
    return dict(zip(titles, groups.values(), strict=True))


def _few(members: Sequence[str]) -> str:
    return ", ".join(members[:3]) + (f" and {len(members) - 3} more" if len(members) > 3 else "")


def format_value(value: Any) -> str:
    """Return a value for a table: the name of a class, a list as "512, 256", a dash for a missing value."""
    if value is None or value is False:
        return "-"
    if isinstance(value, list) and value:
        return ", ".join(map(str, value))
    return value.rpartition(".")[2] if isinstance(value, str) else str(value)


def within(key: str, sections: Sequence[str]) -> bool:
    """Whether a full key is one of some settings, or lies in one of some sections."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)
