"""The datamodules by their short names, such as ``datamodules.Criteo``; loaded when first used."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Lazy, so that preprocessing starts without torch and Lightning.
    if name in ("Criteo", "CriteoKaggle", "CriteoTerabyte"):
        from datamodules import criteo

        return getattr(criteo, name)
    if name in ("RandomData", "TraceData"):
        from datamodules import synthetic

        return getattr(synthetic, name)
    raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
