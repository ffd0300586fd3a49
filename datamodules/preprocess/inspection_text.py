"""The facts of a dataset folder as text, for ``inspect``: rows, columns, what is suspicious, encoding and files."""

from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.folder import Folder
from datamodules.preprocess.leakage import render_equal_rows
from datamodules.preprocess.recipe import SCHEMA_PROTOCOL
from datamodules.preprocess.text_tables import filled_below, fitted
from lightning_dlrm.contracts.schema import ROLE_NAMES, SCHEMA_FILE
from lightning_dlrm.contracts.terminal import aligned, binary_size, counted

_FEATURES = ("dense", "categorical", "multi_hot")


def render(facts: Mapping[str, Any], width: int = 0) -> str:
    """Format the facts of ``summary`` as text, and under ``leakage`` those of ``equal_rows`` if there are any.

    Args:
        facts: as ``summary`` returns them.
        width: of the terminal, which lines do not exceed; 0 for no limit.
    """
    entries = [("columns", _roles(facts))]
    if facts["left_out"]:
        entries.append(("left out", ", ".join(facts["left_out"])))
    if facts["split_rule"]:
        entries.append(("split", facts["split_rule"]))
    protocol = "" if facts["protocol"] == SCHEMA_PROTOCOL else f", protocol {facts['protocol']}"
    lines = filled_below(f"{counted(facts['rows'], 'row')} of dataset {facts['dataset']}{protocol}", width, indent=2)
    lines += [*_entry_lines(entries, width), "", *_split_table(facts, width), "", *_column_table(facts, width)]
    if facts["optimum"]:
        lines += ["", "best scores that any model can reach:"]
        lines += [
            f"  {name:<10}  AUC {optimum['auc']:.4f}, log loss {optimum['log_loss']:.4f}"
            for name, optimum in facts["optimum"].items()
        ]
    if facts["suspicious"]:
        lines += ["", "check these:"]
        lines += [part for words in facts["suspicious"] for part in filled_below(words, width, "  ", 4)]
    lines += ["", "encoding and files:", *_entry_lines([*_transforms(facts), *_files(facts)], width)]
    if facts.get("leakage"):
        lines += ["", *render_equal_rows(facts["leakage"])]
    return "\n".join(lines)


def _entry_lines(entries: Sequence[tuple[str, str]], width: int) -> list[str]:
    return [line for name, words in entries for line in filled_below(words, width, f"  {name:<13} ")]


def _files(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return entries about reserved rows, settings, inputs, size and fingerprints."""
    # Mappings are settings of single columns, which the transforms describe.
    of_all = {
        name: value for name, value in facts["settings"].items() if not (value is None or isinstance(value, Mapping))
    }
    settings = ", ".join(f"{name} {value}" for name, value in of_all.items())
    inputs = ", ".join(f"{name} ({rows:,} rows)" for name, rows in facts["rows_per_file"] or ())
    prints = facts["fingerprints"]
    entries = [
        *_by_words("reserved rows", {column["name"]: column["reserved_rows"] for column in facts["columns"]}),
        ("settings", settings),
        ("made from", inputs),
        ("stored as", f"{Folder(facts['folder']) / SCHEMA_FILE}, and {binary_size(facts['bytes'])} of Parquet"),
        ("fingerprints", f"encoding {prints['encoding'][:16]} (a model scores only rows with this encoding)"),
        ("", f"data {prints['data'][:16]} (a run resumes only on these rows)"),
    ]
    return [entry for entry in entries if entry[1]]


def _roles(facts: Mapping[str, Any]) -> str:
    """Return how many columns have each role, and their names."""
    names: dict[str, list[str]] = {}
    for column in facts["columns"]:
        names.setdefault(column["role"], []).append(column["name"])
    return "; ".join(
        role if role == "label" else f"{len(names[role])} {words} ({_ranges(names[role])})"
        for role, words in ROLE_NAMES.items()
        if role in names
    )


def _transforms(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return for each role the transform of its columns, with the columns' names if transforms differ."""
    of_role: dict[str, dict[str, str]] = {}
    for column in facts["columns"]:
        of_role.setdefault(column["role"], {})[column["name"]] = column["transform"]
    return [
        entry for role, words in of_role.items() for entry in _by_words(ROLE_NAMES[role], words, named=role == "keep")
    ]


def _by_words(title: str, words_of: Mapping[str, str], named: bool = False) -> list[tuple[str, str]]:
    """Return an entry for each text of some columns, with the columns' names if texts differ or ``named`` is set."""
    columns: dict[str, list[str]] = {}
    for name, words in words_of.items():
        if words:
            columns.setdefault(words, []).append(name)
    named = named or len(columns) > 1
    return [
        ("" if number else title, f"{_ranges(names)}: {words}" if named else words)
        for number, (words, names) in enumerate(columns.items())
    ]


def _ranges(names: Sequence[str]) -> str:
    """Join names; three or more consecutive ones become a range, such as C1..C26.

    >>> _ranges(["I1", "I2", "I3", "I5", "I6", "size", "C7"])
    'I1..I3, I5, I6, size, C7'
    """
    runs: list[list[str]] = []
    for name in names:
        if runs and name == _next_name(runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def _next_name(name: str) -> str | None:
    """Return the name with the number at its end incremented; None without a number."""
    stem = name.rstrip("0123456789")
    return f"{stem}{int(name[len(stem) :]) + 1}" if stem != name else None


def _split_table(facts: Mapping[str, Any], width: int) -> list[str]:
    header = ("split", "rows", "share", "positive", "unknown", "rare")
    body = [
        (
            name,
            f"{split['rows']:,}",
            f"{split['rows'] / facts['rows']:.1%}" if facts["rows"] else "",
            "" if split["label_mean"] is None else f"{split['label_mean']:.2%}",
            *(f"{split[kind]:.2%}" if kind in split else "" for kind in ("unknown", "rare")),
        )
        for name, split in facts["splits"].items()
    ]
    lines = aligned([header, *body])
    # Without splits all cells are empty, and there are no lines.
    shown = lines[0] if lines else ""
    words = ["positive: share of the rows with label 1"] if "positive" in shown else []
    if "unknown" in shown:
        words.append(
            "unknown, rare: shares of the values of all tables; rare values are too infrequent to get their own row"
        )
    return lines + [part for one in words for part in filled_below(one, width, "  ", 4)]


_LEGENDS = {
    "missing": "share of the rows without a value; of multi-hot columns, with an empty list",
    "unknown": "share of the validation and test values that the vocabulary lacks; 0 if the vocabulary is of all rows",
    "top id": "share of the most frequent id",
    "90%": "number of the most frequent ids that together have 90% of the lookups",
}
"""Header of the table of columns, and what it means."""


def _column_table(facts: Mapping[str, Any], width: int) -> list[str]:
    """Return a table of the features, and what its headers mean."""
    features = [column for role in _FEATURES for column in facts["columns"] if column["role"] == role]
    columns = [column for column in features if column["cardinality"] or column["missing"] is not None]
    if not columns:
        return ["missing values are not counted in this dataset"]
    header = ("column", "role", "missing", "unknown", "table rows", "top id", "90%")
    body = [
        (
            column["name"],
            ROLE_NAMES[column["role"]],
            _share(column["missing"]),
            _share(column["unknown"]),
            f"{column['cardinality']:,}" if column["cardinality"] else "",
            f"{_share(column['most_frequent'])}{_of_reserved(column)}",
            "" if column["ids_for_90"] is None else f"{column['ids_for_90']:,}",
        )
        for column in columns
    ]
    if facts["table_rows"]:
        body.append(("all", "", "", "", f"{facts['table_rows']:,}", "", ""))
    shown = [number for number, cells in enumerate(zip(*body, strict=True)) if any(cells)]
    lines = fitted([[row[number] for number in shown] for row in (header, *body)], width, left=(0, 1))
    legends = [f"{header[number]}: {_LEGENDS[header[number]]}" for number in shown if header[number] in _LEGENDS]
    if kinds := sorted({kind for column in columns for kind in (column["most_frequent_is"] or "").split("/") if kind}):
        legends.append(f"({') or ('.join(kinds)}): the most frequent id stands for such values")
    if any(column["missing"] is None for column in features):
        legends.append("missing values of columns without a share of them are not counted in this dataset")
    if any(column["role"] == "multi_hot" and column["ids_for_90"] is None for column in columns):
        legends.append("top id and 90% of multi-hot columns: not counted here; --plot counts and draws them")
    return lines + [part for legend in legends for part in filled_below(legend, width, "  ", 4)]


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _of_reserved(column: Mapping[str, Any]) -> str:
    return f" ({column['most_frequent_is']})" if column["most_frequent_is"] else ""
