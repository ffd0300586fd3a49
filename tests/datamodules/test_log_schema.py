"""The schema of a raw log: what a YAML file may say, and the one line that each mistake gets."""

import copy
import datetime
import re
from typing import Any

import pytest
import yaml

from datamodules.log_schema import Label, log_schema, read_log_schema
from lightning_dlrm.contracts.errors import UserError

TEXT = """
dataset: avazu
label: click
columns:
  hour: {role: keep, time: "%y%m%d%H"}
  C1: {role: categorical, min_count: 10, max_rows: 1000000}
  price: {role: dense, transform: log1p}
  age: {role: categorical, transform: quantile, bins: 10}
  genres: {role: multi_hot, separator: "|", weights: genre_weights}
  id: {role: leave}
split: {by: time, column: hour, ratios: [0.7, 0.2, 0.1]}
"""
COLUMNS = ["click", "hour", "C1", "price", "age", "genres", "genre_weights", "id"]


def test_a_schema_is_read_and_written(tmp_path):
    path = tmp_path / "avazu.yaml"
    path.write_text(TEXT)
    schema = read_log_schema(path)
    assert schema == log_schema(schema.document())
    assert schema.columns["age"].quantiles == 10
    assert schema.made == ["hour", "C1", "price", "age", "genres", "genres_weights"]
    schema.check_columns(COLUMNS, "a.csv")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("lable", "x", "unknown key lable; did you mean label? Known keys are dataset, "),
        ("dataset", None, "dataset is missing; write a name of your choice: 'dataset: ads'"),
        (
            "label",
            None,
            "label is missing; write what the model predicts: a column of 0 and 1, such as 'label: cl",
        ),
        ("columns", None, "columns is missing; write the role of each column: 'columns: {user: {role: categorical}"),
        ("split", None, "split is missing; write how rows are split: 'split: {by: random}', or"),
        ("split", {"seed": 1}, "split: by is missing; write one of position, time,"),
        ("columns", [1], "columns: "),
        ("columns.x", "dense", "columns: x: found 'dense'; write x: {role: dense}"),
        ("columns.x", None, "columns: x: found None; write x: {role: categorical}"),
        ("columns.x", {"min_count": 2}, "columns: x: role is missing; write one of dense, "),
        ("columns.x", {"role": "leave", "source": None, "bins": 1.5}, "columns: x: bins: found 1.5; expected a valid"),
        ("split", "time", "split: found 'time'; write keys with their values"),
        ("nulls", "NA", "nulls: found 'NA'; write a list: [NA]"),
        ("columns.x", {"rol": "dense"}, "columns: x: unknown key rol; did you mean role? Known keys are role, "),
        ("columns.x", {"role": "dens"}, "columns: x: role: found 'dens'; expected 'dense', 'categorical'"),
        (
            "columns.x",
            {"role": "dense", "min_count": 3},
            "x: min_count is for categorical and multi_hot, not for dense",
        ),
        ("columns.x", {"role": "categorical", "min_count": "3"}, "columns: x: min_count: found '3'"),
        ("columns.x", {"role": "categorical", "transform": "log1p"}, "expected quantile or log_squared, or role dense"),
        ("columns.x", {"role": "categorical", "bins": 5}, "bins is for transform quantile"),
        ("columns.x", {"role": "dense", "transform": "quantile", "bins": 1}, "bins is 1, expected 2 to 256"),
        ("columns.x", {"role": "keep", "time": "hour"}, "time is 'hour'; expected unix, unix_ms, iso"),
        ("columns.genres_weights", {"role": "keep"}, "genres_weights would occur twice"),
        ("columns.label", {"role": "categorical"}, "label would occur twice"),
        ("columns.row", {"role": "keep"}, "predictions have a column row already; choose another name"),
        ("columns.a/b", {"role": "keep"}, "give 'source: a/b'"),
        ("columns", {"id": {"role": "leave"}}, "no dense, categorical or multi_hot column"),
        ("columns", {True: {"role": "dense"}}, "YAML reads a name as True, not as text; put it in quotes"),
        ("columns", {datetime.date(2026, 1, 1): {"role": "dense"}}, "not as text; put it in quotes"),
        ("split", {"by": "tim"}, "split: by: found 'tim'"),
        ("split", {"by": "time"}, "split: column is missing"),
        ("split", {"by": "column", "column": "f", "train": [0, True], "test": ["true"]}, "true is given twice"),
        ("split", {"by": "position", "seed": 1}, "seed is not for a split by position"),
        ("split", {"by": "random", "ratios": [0.5, 0.5]}, "ratios are 0.5, 0.5"),
        ("split", {"by": "files", "test": ["c.csv"]}, "train is missing"),
        ("nulls", [None], "nulls: 0: "),
        ("encoding", "utf-9", "encoding is 'utf-9'"),
        ("header", False, "give the columns as 'names:"),
        ("names", ["a", "a"], "names: a occurs twice"),
        ("separator", "", "separator is empty"),
        ("max_rows", 1, "max_rows is 1, expected at least 3"),
        ("dataset", "a/b", "dataset is 'a/b'"),
        (
            "columns.x",
            {"role": "categorical", "transform": "quantile", "type": "hash"},
            "type is for categories that are",
        ),
        (
            "columns.x",
            {"role": "dense", "transform": "log_plus_three", "fill": 1},
            "fill is not for transform log_plus",
        ),
        ("split", {"by": "days", "held_out": ["test", "test"]}, "held_out is "),
        ("split", {"by": "days", "ratios": [1, 0, 0]}, "ratios is not for a split by days, which takes days, held_out"),
        ("split", {"by": "tenths", "negative_sampling_rate": 0}, "negative_sampling_rate is 0.0, expected a share"),
        ("hash_modulo", 7, "hash_modulo is for columns of type hash; there are none"),
        ("id_modulo", 0, "id_modulo is 0, expected at least 1"),
        ("id_modulo", 7, "id_modulo needs 'unknown: none', and 'missing: zero' of"),
        ("mlperf_bags", {}, "mlperf_bags is for format criteo"),
        ("format", "criteo", "label is 'click'; of format criteo it is 'label'"),
    ],
)
def test_a_mistake_gets_one_line_that_names_it(key: str, value: Any, message: str):
    content = copy.deepcopy(yaml.safe_load(TEXT))
    parts = key.split(".", 1)
    (content if len(parts) == 1 else content[parts[0]])[parts[-1]] = value
    with pytest.raises(UserError) as caught:
        log_schema({name: value for name, value in content.items() if value is not None}, "a.yaml")
    assert str(caught.value).startswith("a.yaml: ") and "\n" not in str(caught.value)
    assert message in str(caught.value)


def test_columns_of_files_are_compared_with_the_schema():
    schema = log_schema(yaml.safe_load(TEXT))
    wrong = [name.replace("price", "prise") for name in COLUMNS]
    with pytest.raises(
        UserError, match=r"a.csv has no column 'price', .*columns: price.*did you mean prise\? Its columns are click, "
    ):
        schema.check_columns(wrong, "a.csv")
    with pytest.raises(UserError, match=r"columns that the schema does not name: x; .*rest: leave"):
        schema.check_columns([*COLUMNS, "x"], "a.csv")
    log_schema({**schema.document(), "rest": "leave"}).check_columns([*COLUMNS, "x"], "a.csv")
    with pytest.raises(UserError, match=r"a condition needs ==.* write 'click == 1'"):
        log_schema({**schema.document(), "label": "click = 1"}).check_columns(COLUMNS, "a.csv")
    columns = {"m": {"role": "multi_hot", "weights": "click"}}
    of_label = log_schema({**schema.document(), "columns": columns, "rest": "leave", "split": {"by": "position"}})
    with pytest.raises(UserError, match=r"columns: m is made of the label's column click, .*leave, or other weights"):
        of_label.check_columns(["click", "m"], "a.csv")
    schema.check_columns(COLUMNS[1:], "a.csv", labelled=False)
    with pytest.raises(UserError, match=r"no column 'click'.*\(label\)"):
        schema.check_columns(COLUMNS[1:], "a.csv")


@pytest.mark.parametrize(
    "text, label",
    [
        ("click", Label(column="click")),
        ("rating >= 4", Label(column="rating", operator=">=", value="4")),
        ("a b=='x y'", Label(column="a b", operator="==", value="x y")),
        ("geklickt != nein", Label(column="geklickt", operator="!=", value="nein")),
        ("a > b", Label(column="a > b")),
    ],
)
def test_a_label_is_a_column_or_a_condition(text: str, label: Label):
    schema = log_schema({**yaml.safe_load(TEXT), "label": text})
    assert schema.label_in(["click", "a > b", "rating"]) == label


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"columns": {"I1": {"role": "categorical"}}},
            "I1: I1 of format criteo is a number; give it role dense, or a tr",
        ),
        (
            {"columns": {"C1": {"role": "dense"}}},
            "C1: C1 of format criteo is a hash; give it role categorical and type h",
        ),
        ({"columns": {"C1": {"role": "keep"}}}, "C1 of format criteo is a hash"),
        (
            {"columns": {"x": {"role": "dense", "source": "I14"}}},
            "x: format criteo has no column I14; it has I1 to I13",
        ),
        (
            {"split": {"by": "time", "column": "I1"}},
            "no column to split by; split by days, files, position, random or tenths",
        ),
        ({"header": True, "decimal": ","}, "decimal, header is for other formats than criteo; leave it out"),
        ({"split": {"by": "days", "held_out": ["test", "test"]}}, "held_out is test and test; expected test and vali"),
        ({"id_modulo": 5, "unknown": "none", "columns": {"C1": {"role": "categorical", "type": "hash"}}}, "id_modulo"),
        ({"mlperf_bags": {"seed": -1}}, "mlperf_bags: seed is -1; expected 0 to"),
        ({"list_rare": True, "unknown": "none"}, "list_rare is true, and 'unknown: none' keeps no row for rare values"),
    ],
)
def test_format_criteo_takes_what_its_text_has(keys: dict[str, Any], message: str):
    document = {"dataset": "d", "format": "criteo", "label": "label", "split": {"by": "days"}}
    with pytest.raises(UserError, match=re.escape(message)):
        log_schema({**document, "columns": {"I1": {"role": "dense"}}, **keys})
