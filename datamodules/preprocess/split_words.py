"""How the rows of a dataset were split, in words for people. Nothing here imports torch."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from datamodules.log_settings import LogSplit
from datamodules.preprocess.options import split_of_protocol
from datamodules.preprocess.protocols import PROTOCOLS
from datamodules.preprocess.splits import DAYS
from lightning_dlrm.contracts.documents import parse_settings
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import SPLITS, DatasetSchema


def split_words(schema: DatasetSchema) -> str:
    """Describe which rows are training, validation and test rows; empty if ``preprocess`` did not split them."""
    split: dict[str, Any] = {}
    # Only datasets that are encoded with the vocabulary of another one count unknown values in their report.
    if "unknown" in schema.report:
        return "all rows are test rows, because they are encoded with the vocabulary of another dataset"
    if schema.protocol in PROTOCOLS:
        days = "files" if schema.dataset == "terabyte" else "position"
        given = {name: schema.settings[name] for name in _OPTIONS if name in schema.settings}
        split = {**asdict(split_of_protocol(schema.protocol)), "days": days, **given}
    elif (of_log := schema_of_log(schema).get("split")) is not None:
        with suppress(UserError):
            # Checked, because anyone can write a dataset.json.
            split = asdict(parse_settings(of_log, LogSplit, "split"))
    if not split:
        return "each split is generated on its own" if schema.protocol in _GENERATED else ""
    files = [str(name) for name, _ in schema.report.get("rows_per_file", ())]
    words = _words(split, files)
    if split["by"] == "time":
        words += _real_shares(schema, split["ratios"])
    share = split["negative_sampling_rate"]
    if isinstance(share, float) and share < 1:
        words += f"; {_percent(share)} of the training rows with label 0 are kept, drawn from seed {split['seed']}"
    return words


_GENERATED = ("demo", "random", "trace")
_OPTIONS = ("seed", "negative_sampling_rate")
"""Settings of a protocol that belong to its split."""
_SAME_SHARE = 0.005
"""Difference of shares of rows that is not worth words."""


def schema_of_log(schema: DatasetSchema) -> Mapping[str, Any]:
    """Return the schema of the log that a dataset was made of; empty for other datasets."""
    found = schema.settings.get("schema")
    return found if isinstance(found, Mapping) else {}


def _words(split: Mapping[str, Any], files: Sequence[str]) -> str:
    kind, column = split["by"], split["column"]
    train, validation, test = (_percent(share) for share in split["ratios"])
    in_order = f"first {train} training, then {validation} validation, then {test} test rows"
    if kind == "days":
        return _days(split, files)
    if kind == "tenths":
        return f"at random: of every 10 rows 1 is a test and 1 a validation row, seed {split['seed']}"
    if kind == "random":
        return f"at random: {train} training, {validation} validation, {test} test rows, seed {split['seed']}"
    if kind == "time":
        return f"by time, in the order of {column}: {in_order}"
    if kind == "position":
        return f"by position, in the order of the rows: {in_order}"
    given = {name: split.get(name) for name in ("train", "validation", "test", "leave")}
    by = "by the names of the files" if kind == "files" else f"by the values of {column}"
    listed = (f"{name} {', '.join(map(str, values))}" for name, values in given.items() if values)
    return f"{by}: {'; '.join(listed)}"


def _real_shares(schema: DatasetSchema, ratios: Sequence[float]) -> str:
    """Return the shares of the rows in the splits of a split by time if they differ from those of its settings."""
    rows = sum(count for _, count in schema.report.get("rows_per_file", ()))
    if not (rows and schema.splits):
        return ""
    # Of the training rows, sampling may drop some.
    held_out = [schema.splits[name].rows / rows if name in schema.splits else 0.0 for name in SPLITS[1:]]
    shares = [1 - sum(held_out), *held_out]
    if max(abs(share - ratio) for share, ratio in zip(shares, ratios, strict=True)) < _SAME_SHARE:
        return ""
    train, validation, test = (f"{share:.1%}" for share in shares)
    return f"; rows of equal time stay in one split, so the real shares are {train}, {validation} and {test}"


def _days(split: Mapping[str, Any], files: Sequence[str]) -> str:
    first, second = split["held_out"]
    halves = f"its first half is the {first} split, its second half the {second} split"
    if split["days"] == "files" and len(files) > 1:
        return f"by files: {files[-1]}, the last one, is held out: {halves}"
    return f"by position: the rows are cut into {DAYS} equal days, of which the last is held out: {halves}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
