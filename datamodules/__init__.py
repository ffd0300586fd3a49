"""The datamodules by their short names, such as ``datamodules.Criteo``; loaded when first asked for."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Importing one room must not drag in another: preprocessing starts without torch and Lightning.
    if name in ("Criteo", "CriteoKaggle", "CriteoTerabyte"):
        from datamodules import criteo

        return getattr(criteo, name)
    if name in ("RandomData", "TraceData"):
        from datamodules import synthetic

        return getattr(synthetic, name)
    raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
