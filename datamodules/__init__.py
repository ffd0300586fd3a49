"""The datamodules by their short names, such as ``datamodules.Clicks``, and ``encode``, which makes a dataset folder of
a table; loaded when first used."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Lazy, so that preprocessing starts without torch and Lightning.
    if name in ("Criteo", "CriteoKaggle", "CriteoTerabyte"):
        from datamodules import criteo

        return getattr(criteo, name)
    if name == "Clicks":
        from datamodules.clicks import Clicks

        return Clicks
    if name == "encode":
        from datamodules.preprocess.tables import encode

        return encode
    if name in ("RandomData", "TraceData"):
        from datamodules import synthetic

        return getattr(synthetic, name)
    raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
