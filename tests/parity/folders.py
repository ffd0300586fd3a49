"""The folders of golden files: beside this file, ``../shared`` beside the checkout, and those in PARITY_DIR."""

import os
from pathlib import Path

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared/golden_fuxictr"
GIVEN = [Path(name) for name in os.environ.get("PARITY_DIR", "").split(os.pathsep) if name]
FOLDERS = [HERE / "golden", SHARED, *GIVEN]
"""PARITY_DIR names further folders, separated by colons."""


def cases(pattern: str) -> list[Path]:
    """Return the files of all folders that match a pattern."""
    return sorted({path.resolve() for folder in FOLDERS for path in folder.rglob(pattern)})
