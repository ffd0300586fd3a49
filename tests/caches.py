"""Cache folders of tests, which begin with the compiled kernels: compiling them takes 7 s."""

import shutil
from functools import cache
from pathlib import Path

import pytest

from lightning_dlrm.contracts.cache import cache_root
from lightning_dlrm.kernels.compiled import NativeError, _cached_library

ROOT = cache_root()
"""The cache outside tests."""


def new_cache(folder: Path) -> str:
    """A cache folder for ``LIGHTNING_DLRM_CACHE`` with the kernels and no data, or one that an earlier test made."""
    folder.mkdir(exist_ok=True)
    kernels, target = _kernels(), folder / "native"
    if kernels is not None and not target.exists():
        target.mkdir(mode=0o700)
        shutil.copy2(kernels, target)
    return str(folder)


@cache
def _kernels() -> Path | None:
    """The compiled library in the cache outside tests; None where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_DLRM_CACHE", str(ROOT))
        try:
            return _cached_library()
        except NativeError:
            return None
