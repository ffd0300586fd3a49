"""Experiments in YAML: arms, seeds, compared sections, and settings of all arms."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_dlrm.cli.configs import find_config, flat
from lightning_dlrm.cli.parser import ModelAndData, build_model_and_data, build_model_parser
from lightning_dlrm.compare.runs import differing, settings_of, within
from lightning_dlrm.contracts.documents import read_yaml
from lightning_dlrm.contracts.errors import UserError, nearest_first
from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.models.network import ModelSize

EXPECTED = "expected an experiment such as figure5.yaml, or an overlay for its runs"
_WRITTEN = "it holds an arm as an earlier call trained it: restore the file from a copy, or choose another --output"
_KEYS = {"arms": dict, "seeds": list, "compared": list, "kept": list, "settings": dict}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The content of an experiment's YAML.

    Args:
        name: name of the file.
        arms: name -> configurations, each laid over the previous.
        seeds: seeds; each arm has a run with each of them.
        compared: sections in which the arms may differ.
        kept: sections that overlays do not change.
        settings: settings laid over those of all arms.
    """

    name: str
    arms: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    compared: Sequence[str]
    kept: Sequence[str]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """An arm with its whole configuration, before it is trained."""

    name: str
    document: Mapping[str, Any]
    """The resolved configuration; its seed is replaced in each run."""
    size: ModelSize
    schema: DatasetSchema
    samples: float
    """Number of samples that a run trains on; infinite if no setting bounds it."""
    built: ModelAndData

    @property
    def settings(self) -> dict[str, Any]:
        """See ``settings_of``."""
        return settings_of(self.document)


def is_experiment(path: Path) -> bool:
    """Whether a YAML is an experiment and not the configuration of a run."""
    return "arms" in read_yaml(path, EXPECTED)


def chooses_network(path: Path) -> bool:
    """Whether a YAML is a whole configuration, and not an overlay."""
    return any(key.startswith("model.network") for key in flat(read_yaml(path)))


def how_to_write(files: Sequence[str]) -> str:
    """Return how an experiment is written that compares some configurations, or the shipped ones of two models.

    >>> how_to_write(["dlrm.yaml"])
    "write a YAML with the line 'arms: {dlrm: dlrm.yaml, dcn: dcn.yaml}', and give it with --config (docs/compare.md)"
    """
    arms = ", ".join(f"{Path(file).stem}: {file}" for file in (files if len(files) > 1 else ("dlrm.yaml", "dcn.yaml")))
    return f"write a YAML with the line 'arms: {{{arms}}}', and give it with --config (docs/compare.md)"


def read_experiment(path: Path, seeds: Sequence[int] | None = None) -> Experiment:
    """Read an experiment.

    Args:
        path: the YAML.
        seeds: seeds in place of those of the YAML.

    Raises:
        UserError: a key is unknown or missing, or its value has another type.
    """
    document = read_yaml(path, EXPECTED)
    for key, value in document.items():
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {key}{nearest_first(key, _KEYS, 'an experiment has')}")
        if not isinstance(value, _KEYS[key]) or not value:
            expected = "a list" if _KEYS[key] is list else "keys with values"
            raise UserError(f"{path}: {key} is {value!r}; expected {expected}")
    arms = document["arms"]
    if len(arms) < 2:
        raise UserError(f"{path} has one arm, {next(iter(arms))}; give two or more to compare")
    for name, files in arms.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise UserError(
                f"{path}: an arm's name is part of file names, so it may have letters, digits, . _ - only; "
                f"found {name!r}"
            )
        if not isinstance(files, str) and not (isinstance(files, list) and all(isinstance(f, str) for f in files)):
            raise UserError(f"{path}: arm {name} is {files!r}; expected a configuration's file, or a list of them")
    chosen = list(seeds or document.get("seeds", [1]))
    if not all(isinstance(seed, int) and seed >= 0 for seed in chosen) or len(set(chosen)) < len(chosen):
        raise UserError(f"seeds are {chosen}; expected different whole numbers, 0 or more")
    return Experiment(
        name=path.stem,
        arms={name: [files] if isinstance(files, str) else files for name, files in arms.items()},
        seeds=chosen,
        compared=document.get("compared", ["model"]),
        kept=document.get("kept", []),
        settings=document.get("settings", {}),
    )


def plan_arms(
    experiment: Experiment, overlays: Sequence[str], options: Sequence[str]
) -> tuple[list[PlannedArm], list[str]]:
    """Build each arm's configuration from its files, the experiment's settings, the overlays and the options.

    Args:
        experiment: the experiment.
        overlays: names of further configurations.
        options: options of the command line, such as ``--data.path DIR``.

    Returns:
        The arms, and a line for each overlay with sections that the experiment keeps.

    Raises:
        UserError: the configuration of an arm is wrong, or the arms differ in what is not compared.
    """
    notes = []
    documents = {"settings.yaml": experiment.settings} if experiment.settings else {}
    for number, overlay in enumerate(overlays):
        path = find_config(overlay)
        document, left_out = without(read_yaml(path), experiment.kept)
        if left_out:
            notes.append(
                f"{overlay}: {', '.join(left_out)} ignored, because the arms of {experiment.name} keep their own"
            )
        if document:
            documents[f"{number}-{path.name}"] = document
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        shared = [_write(Path(folder, name), document) for name, document in documents.items()]
        arms = [_plan_arm(name, [*files, *shared], options) for name, files in experiment.arms.items()]
    _check(experiment, arms)
    return arms, notes


def _plan_arm(name: str, files: Sequence[str], options: Sequence[str]) -> PlannedArm:
    configs = [part for file in files for part in ("--config", file)]
    try:
        built = build_model_and_data([*configs, *options], build_model_parser("params"))
    except UserError as error:
        raise UserError(f"arm {name}: {error}") from error
    return PlannedArm(
        name=name,
        document=built.document(),
        size=built.module.size,
        schema=built.datamodule.schema,
        samples=_training_samples(built),
        built=built,
    )


def without(document: Mapping[str, Any], kept: Sequence[str], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return settings without some sections, and the names of those that were removed.

    >>> without({"model": {"a": 1}, "data": {"size": 2, "path": "x"}}, ["model", "data.size"])
    ({'data': {'path': 'x'}}, ['model', 'data.size'])
    """
    rest: dict[str, Any] = {}
    left_out = []
    for key, value in document.items():
        full = f"{prefix}{key}"
        if full in kept:
            left_out.append(full)
        elif isinstance(value, Mapping):
            inner, lost = without(value, kept, f"{full}.")
            left_out += lost
            if inner or not value:
                rest[key] = inner
        else:
            rest[key] = value
    return rest, left_out


def _write(path: Path, document: Mapping[str, Any]) -> str:
    path.write_text(yaml.safe_dump(dict(document), sort_keys=False))
    return str(path)


def _check(experiment: Experiment, arms: Sequence[PlannedArm]) -> None:
    """Check that the arms differ in the compared sections, and in no other.

    Raises:
        UserError: two arms are equal, or differ in another section.
    """
    found = differing({arm.name: arm.settings for arm in arms})
    wrong = {key: values for key, values in found.items() if not within(key, experiment.compared)}
    if wrong:
        listed = "; ".join(f"{key}: {_format_by_name(values)}" for key, values in wrong.items())
        raise UserError(
            f"the arms of {experiment.name} differ in settings that are not compared ({listed}): make these equal, or "
            f"name them in its key 'compared' (now {', '.join(experiment.compared)})"
        )
    for number, arm in enumerate(arms):
        for other in arms[:number]:
            if arm.settings == other.settings:
                raise UserError(f"arms {other.name} and {arm.name} have the same settings: nothing is compared")


def _format_by_name(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} in {name}" for name, value in values.items())


def _training_samples(built: ModelAndData) -> float:
    """Return the number of samples of a whole fit with these settings."""
    trainer, data = built.settings.trainer, built.datamodule
    split = data.schema.splits.get("train")
    batches, limit = data.training_batches, trainer.limit_train_batches
    if limit is not None:
        batches = min(limit, batches) if isinstance(limit, int) else int(batches * limit)
    bounds = [float("inf")]
    if trainer.max_epochs not in (None, -1):
        bounds.append(trainer.max_epochs * min(batches * data.batch_size, split.rows if split else 0))
    if trainer.max_steps >= 0:
        bounds.append(trainer.max_steps * data.batch_size * trainer.accumulate_grad_batches)
    return min(bounds)


def keep_configurations(arms: Sequence[PlannedArm], output: Path) -> dict[str, Path]:
    """Write each arm's whole configuration that an earlier call did not write.

    Returns:
        Arm -> file.
    """
    files = _files(arms, output)
    for arm in arms:
        path = files[arm.name]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write(path, arm.document)
    return files


def check_configurations(arms: Sequence[PlannedArm], output: Path) -> None:
    """Check that the files of earlier calls have the settings of these arms.

    Raises:
        UserError: the folder has files of an experiment with other settings.
    """
    for arm in arms:
        path = _files(arms, output)[arm.name]
        if not path.exists():
            continue
        changed = differing({"there": settings_of(read_yaml(path, _WRITTEN)), "here": arm.settings})
        if changed:
            listed = "; ".join(f"{key}: {_format_by_name(values)}" for key, values in list(changed.items())[:5])
            raise UserError(
                f"{output} holds runs with other settings of {arm.name} ({listed}): give the same settings to "
                "continue, or another --output"
            )


def _files(arms: Sequence[PlannedArm], output: Path) -> dict[str, Path]:
    return {arm.name: output / "configurations" / f"{arm.name}.yaml" for arm in arms}
