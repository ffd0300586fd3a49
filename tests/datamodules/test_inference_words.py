"""Contract: the report of ``preprocess --infer`` and the comments of its schema say how values are read."""

import json
from pathlib import Path

import pytest

from datamodules.preprocess.inference import infer, render


def words_of(folder: Path, text: str, name: str = "log.csv") -> tuple[str, str]:
    """Return the report on a log with the label ``y``, and the schema, each as one line."""
    (folder / name).write_text(text)
    report = render(infer(folder / "log.yaml", "y", [str(folder / name)]))
    lines = (line.strip().removeprefix("#").strip() for line in (folder / "log.yaml").read_text().splitlines())
    return " ".join(report.split()), " ".join(lines)


def log_of(header: str, *rows: str) -> str:
    return "\n".join([header, *rows * 20]) + "\n"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            ("0,NA,NA", "1,DE,7", "0,NA,8", "1,FR,9.5"),
            "'NA' counts as missing in every column; 'NA' in country (50.0%) counts as missing, because income needs "
            "it; if it is a category there, write another text for it in the file",
        ),
        (
            ("0,N/A,1", "1,DE,-", "0,-,8", "1,FR,9.5"),
            "'-', 'N/A' count as missing in every column; '-' in country (25.0%) counts as missing, because income "
            "needs it; if it is a category there, write another text for it in the file; 'N/A' in country (25.0%) "
            "counts as missing; if",
        ),
        (("0,DE,NA", "1,FR,7", "0,DE,8", "1,FR,9.5"), "'NA' counts as missing in every column split"),
        (("0,NA,1", "1,DE,7", "0,NA,8", "1,FR,9.5"), "missing? country ('NA'): if these texts mean missing values"),
    ],
)
def test_texts_that_count_as_missing_are_said(tmp_path: Path, rows: tuple[str, ...], said: str) -> None:
    report, schema = words_of(tmp_path, log_of("y,country,income", *rows))
    assert said in report
    if not said.startswith("missing?"):
        assert "because" not in said or "because income needs it; if it is a category there" in schema
        assert "as missing in every column. " in schema


def test_nothing_is_said_of_logs_without_such_texts(tmp_path: Path) -> None:
    report, _ = words_of(tmp_path, log_of("y,country,income", "0,,1", "1,DE,", "0,FR,8"))
    assert "missing" not in report


def test_the_share_of_labels_is_of_the_rows_with_one(tmp_path: Path) -> None:
    report, schema = words_of(tmp_path, "y,a\n1,x\n0,z\n,x\n")
    assert "y (true in 50.0% of the rows with a label)" in report
    assert "True in 50.0% of the rows with a label. Missing in 1:" in schema


def test_empty_lists_count_as_missing(tmp_path: Path) -> None:
    rows = [{"y": row % 2, "full": ["a"], "tags": [[], ["a"], ["a", "b"], None][row % 4]} for row in range(40)]
    _, schema = words_of(tmp_path, "\n".join(map(json.dumps, rows)) + "\n", "log.jsonl")
    assert "2 different items, 50.0% missing or empty" in schema and "one item, none missing or empty" in schema


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ("1.5 1.6 1.7 90.5", "log1p, because the largest 1% are more than 10 times the median."),
        ("-1.5 1.6 1.7 1.8", "Here: numbers with fractions. "),
    ],
)
def test_a_logarithm_has_a_reason(tmp_path: Path, numbers: str, why: str) -> None:
    _, schema = words_of(tmp_path, log_of("y,a", *(f"{row % 2},{one}" for row, one in enumerate(numbers.split()))))
    assert why in schema
