"""What the settings of all generated data have in common: rows of each split, and checks."""

from collections.abc import Mapping

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import SplitName

SEED_RANGE = "a number from 0 to 2**64 - 1"


class SplitRows:
    """Mixin for settings with the fields ``train_rows``, ``validation_rows`` and ``test_rows``."""

    train_rows: int
    validation_rows: int
    test_rows: int

    @property
    def split_rows(self) -> dict[SplitName, int]:
        """Rows of each split that has any."""
        rows: dict[SplitName, int] = {
            "train": self.train_rows,
            "validation": self.validation_rows,
            "test": self.test_rows,
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
