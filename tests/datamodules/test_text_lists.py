"""Contract: lists in columns of text are found with their separator, their elements are counted and encoded, also of
lists in brackets; names, titles and numbers are not taken for lists, and words for missing values are named."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from datamodules import values
from datamodules.log_schema import read_log_schema
from datamodules.preprocess.inference import infer, render
from datamodules.preprocess.text_lists import TextLists, find_lists
from lightning_dlrm.__main__ import main

TAGS = ["sports", "news", "music", "cars", "food", "art"]


def drawn(form: str, separator: str, rows: int = 300, items: Sequence[str] = TAGS) -> list[str]:
    draw = random.Random(0)
    return [form.format(separator.join(draw.sample(list(items), draw.randint(1, 4)))) for _ in range(rows)]


@pytest.mark.parametrize(
    ("texts", "separator", "brackets"),
    [
        (drawn("{}", "|"), "|", False),
        (drawn("{}", ","), ",", False),
        (drawn("{}", ", "), ", ", False),
        (drawn("{}", ";"), ";", False),
        (drawn("{}", " "), " ", False),
        (drawn("[{}]", ", ", items="12345"), ",", True),
        (drawn("['{}']", "', '"), ",", True),
        (drawn('["{}"]', '","'), ",", True),
        (drawn("[{}]", " ", items="12345"), " ", True),
        (drawn("({})", ","), ",", True),
        (drawn("{{{}}}", ","), ",", True),
        (["[7]", "[8]", "[]"], ",", True),
    ],
)
def test_lists_are_found_with_their_form(texts: list[str], separator: str, brackets: bool) -> None:
    found = find_lists(texts)
    assert found == TextLists(separator=separator, brackets=brackets)
    items = {item for text in texts for item in found.items(text)}
    assert not any(set(item) & set("[](){}'\" ") for item in items)
    column = pa.chunked_array([pa.array(texts)])
    bags, _ = values.bags("tags", column, separator, brackets)
    assert bags.to_pylist() == [found.items(text) for text in texts]


@pytest.mark.parametrize(
    "texts",
    [
        [f"{browser} {kind}" for browser in ("Chrome", "Firefox", "Edge") for kind in ("Mobile", "Desktop", "TV")] * 9,
        ["New York", "New Delhi", "Rio de Janeiro", "York", "Delhi", "Rome"] * 9,
        [f"the {a} {b}" for a in ("red", "old", "big") for b in ("car", "house", "tree", "cat")] * 9,
        [f"{row},5" for row in range(99)],
        ['{"a": 1}', '{"b": 2}'] * 9,
        ["(left) top", "(right) top"] * 9,
        ["home", "search", "ads"] * 9,
    ],
)
def test_names_titles_and_numbers_are_single_values(texts: list[str]) -> None:
    assert find_lists(texts) is None


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(3)
    tags, plain = drawn("[{}]", ", ", items="12345"), drawn("{}", " ")
    lines = [
        f'{draw.randint(0, 1)},"{tags[row]}",{plain[row]},{draw.choice(["ios", "web", "NA", "-"])},{row % 7}'
        for row in range(300)
    ]
    Path("log.csv").write_text("clicked,ids,tags,device,n\n" + "\n".join(lines) + "\n")
    return tmp_path


def test_elements_are_counted_and_encoded(log: Path) -> None:
    infer(log / "log.yaml", "clicked", ["log.csv"])
    columns: dict[str, Any] = read_log_schema(log / "log.yaml").document()["columns"]
    assert columns["ids"] == {"role": "multi_hot", "separator": ",", "brackets": True}
    assert columns["tags"] == {"role": "multi_hot", "separator": " "}
    text = (log / "log.yaml").read_text()
    assert (
        "5 different items" in text and "6 different items" in text and "different values, none missing, [" not in text
    )
    command = ["preprocess", "--schema", "log.yaml", "--input", "log.csv", "--output", "data", "--workers", "1"]
    assert main(command) == 0
    for name, items in (("ids", set("12345")), ("tags", set(TAGS))):
        stored = pq.read_table(log / "data" / "vocabulary" / f"{name}.parquet").column("value").to_pylist()
        assert set(stored) - {None} == items


def test_words_for_missing_values_are_named(log: Path) -> None:
    said = " ".join(render(infer(log / "log.yaml", "clicked", ["log.csv"])).split())
    nulls = re.search(
        r"missing\? device \(.*\): if these texts mean missing values, set '(nulls: \[.*?\])' split", said
    )
    assert nulls is not None and set(yaml.safe_load(nulls[1])["nulls"]) == {"", "NA", "-"}
    text = (log / "log.yaml").read_text()
    assert "to nulls if a missing value is meant" in " ".join(text.replace("\n  #  ", "").split())
    (log / "log.yaml").write_text(text.replace("nulls: ['']", nulls[1]))
    assert set(read_log_schema(log / "log.yaml").nulls) == {"", "NA", "-"}


def test_brackets_need_a_separator(log: Path) -> None:
    infer(log / "log.yaml", "clicked", ["log.csv"])
    text = (log / "log.yaml").read_text().replace("separator: ',', brackets", "brackets")
    (log / "log.yaml").write_text(text)
    assert main(["preprocess", "--schema", "log.yaml", "--input", "log.csv", "--output", "data"]) == 2
