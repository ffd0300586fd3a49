"""Contract: ``preprocess --infer`` leaves out and names a column that gives the label of some rows away, in any form;
it does not suspect ordinary columns, however few rows there are."""

import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from datamodules.log_schema import read_log_schema
from datamodules.preprocess.inference import infer, render

ROWS = 600
START = datetime(2026, 1, 1)


def schema_and_words(folder: Path, columns: dict[str, Sequence[Any]]) -> tuple[dict[str, Any], str]:
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    path = folder / "log.yaml"
    path.unlink(missing_ok=True)
    said = render(infer(path, "clicked", [str(folder / "log.csv")]))
    return read_log_schema(path).document(), " ".join(said.split())


def clicks(draw: random.Random, rows: int, share: float) -> list[int]:
    return [int(draw.random() < share) for _ in range(rows)]


LEAKS: dict[str, tuple[Callable[[random.Random, int, int], Any], str]] = {
    "an amount, missing without a click": (
        lambda draw, row, click: round(draw.random(), 3) if click and draw.random() < 0.6 else "",
        "has a value only in rows with label 1",
    ),
    "an amount, 0 without a click": (
        lambda draw, row, click: round(9 * draw.random(), 2) if click and draw.random() < 0.3 else "0.0",
        "is other than 0 only in rows with label 1",
    ),
    "a count, -1 or missing without a click": (
        lambda draw, row, click: draw.randint(0, 500) if click else draw.choice([-1, -1, ""]),
        "is other than -1 only in rows with label 1",
    ),
    "a category of clicked rows": (
        lambda draw, row, click: "opened" if click and draw.random() < 0.5 else draw.choice(["shown", "seen"]),
        "is opened only in rows with label 1",
    ),
    "several categories of clicked rows": (
        lambda draw, row, click: f"page{draw.randint(0, 2)}" if click else draw.choice(["page0", "none"]),
        "is page1 or page2 only in rows with label 1",
    ),
    "a list of clicked rows": (
        lambda draw, row, click: "|".join(draw.choices("abcdef", k=3)) if click and draw.random() < 0.7 else "",
        "has a value only in rows with label 1",
    ),
    "a time after the click": (
        lambda draw, row, click: START + timedelta(minutes=row, seconds=draw.randint(1, 50) * click),
        "is later than shown_at only in rows with label 1",
    ),
    "a time, far away without a click": (
        lambda draw, row, click: START + timedelta(minutes=row) if click else START - timedelta(days=9999),
        "is other than 1998-08-17 00:00:00 only in rows with label 1",
    ),
}


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("kind", LEAKS)
def test_a_column_that_gives_clicks_away_is_left_out_and_named(tmp_path: Path, kind: str, share: float) -> None:
    draw = random.Random(1)
    made, said = LEAKS[kind]
    clicked = clicks(draw, 2 * ROWS, share)
    columns = {
        "leak": [made(draw, row, click) for row, click in enumerate(clicked)],
        "shown_at": [START + timedelta(minutes=row) for row in range(len(clicked))],
        "user": [draw.randint(1, 30) for _ in clicked],
        "clicked": clicked,
    }
    document, words = schema_and_words(tmp_path, columns)
    assert document["columns"]["leak"] == {"role": "leave"}
    words = words.replace("page2 or page1", "page1 or page2")
    assert document["columns"]["user"]["role"] == "categorical"
    assert f"leaks leak ({said}): left out, as probably known only after the click" in words
    assert document["split"]["column"] == "shown_at", "not by a time that leaks"
    comment = " ".join((tmp_path / "log.yaml").read_text().replace("\n  #  ", "").split())
    comment = comment.replace("page2 or page1", "page1 or page2")
    assert f"it {said}, so it is probably known only afterwards" in comment


def test_the_rarer_label_is_the_one_that_leaks(tmp_path: Path) -> None:
    draw = random.Random(2)
    liked = clicks(draw, ROWS, 0.8)
    returned = [0 if one else draw.randint(0, 9) for one in liked]
    user = [draw.randint(1, 30) for _ in liked]
    document, words = schema_and_words(tmp_path, {"returned": returned, "user": user, "clicked": liked})
    assert document["columns"]["returned"] == {"role": "leave"}
    assert "returned (is other than 0 only in rows with label 0)" in words


@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("rows", [20, 120, ROWS])
def test_ordinary_columns_are_not_suspected(tmp_path: Path, rows: int, share: float) -> None:
    """Also not those on which clicks depend strongly, or that are nearly always 0 or missing."""
    for seed in range(12 if rows < ROWS else 4):  # few rows mislead more often
        draw = random.Random(seed)
        taste = [draw.betavariate(3 * share, 3 * (1 - share)) for _ in range(40)]  # users that click nearly always
        user = [min(int(draw.expovariate(0.12)), 39) for _ in range(rows)]
        clicked = [int(draw.random() < taste[one]) for one in user]
        clicked[:2] = [0, 1]
        columns = {
            "user": user,
            "item": [f"i{draw.randint(1, 200)}" for _ in user],
            "earlier_purchases": [draw.randint(1, 9) if draw.random() < 0.03 else 0 for _ in user],
            "discount": [round(draw.random(), 2) if draw.random() < 0.03 else "" for _ in user],
            "position": [draw.randint(1, 5) for _ in user],
            "price": [round(draw.lognormvariate(1, 1), 2) for _ in user],
            "shown_at": [START + timedelta(minutes=row) for row in range(rows)],
            "loaded_at": [START + timedelta(minutes=row, seconds=draw.choice([0, 1])) for row in range(rows)],
            "clicked": clicked,
        }
        _, words = schema_and_words(tmp_path, columns)
        assert "leaks" not in words, (seed, words)
