"""Contract: no private name of Lightning or torch is used, apart from those in docs/architecture.md with their reason.

A private name starts with one underscore and belongs to something else than ``self`` or ``cls``.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \| (.+) \|$", re.MULTILINE)


def private_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("lightning_dlrm", "datamodules")):
            for name in (*(node.module or "").split("."), *(alias.name for alias in node.names)):
                if is_private(name):
                    yield f"{node.module}.{name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if any(map(is_private, alias.name.split("."))))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_every_private_name_is_listed_with_its_reason() -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for package in ("lightning_dlrm", "datamodules")
        for path in (ROOT / package).rglob("*.py")
        for name in private_names(path)
    }
    section = (ROOT / "docs/architecture.md").read_text().partition("## Private names")[2]
    listed = {(file, name): reason for name, file, reason in ROW.findall(section)}
    assert found == listed.keys()
    assert all(len(reason) > 20 for reason in listed.values())
