"""What the settings of all generated data have in common: rows of each split, and checks."""

from collections.abc import Mapping
from typing import Protocol

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import SplitName

SEED_RANGE = "a number from 0 to 2**64 - 1"


class HasSplitRows(Protocol):
    """Settings that give the rows of each split."""

    @property
    def train_rows(self) -> int: ...
    @property
    def validation_rows(self) -> int: ...
    @property
    def test_rows(self) -> int: ...


def rows_of_splits(settings: HasSplitRows) -> dict[SplitName, int]:
    """Return the rows of each split that has any.

    A function, because a configuration names the class of settings that inherit from another class.
    """
    rows: dict[SplitName, int] = {
        "train": settings.train_rows,
        "validation": settings.validation_rows,
        "test": settings.test_rows,
    }
    return {name: count for name, count in rows.items() if count}


def check_settings(kind: str, settings: object, checks: Mapping[str, tuple[bool, str]]) -> None:
    """Check settings one by one.

    Args:
        kind: of data, the beginning of the message.
        settings: has an attribute for each check.
        checks: for each setting whether it is valid, and what is expected. (A comparison with NaN is False: write
            checks so that they hold for valid values.)

    Raises:
        UserError: a setting is not valid.
    """
    for name, (valid, expected) in checks.items():
        if not valid:
            raise UserError(f"{kind}: {name} is {getattr(settings, name)!r}; give {expected}")
