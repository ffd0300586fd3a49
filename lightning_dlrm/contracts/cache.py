"""Where what can be made again is kept."""

import os
from pathlib import Path


def cache_root() -> Path:
    """``$LIGHTNING_DLRM_CACHE``, by default ``~/.cache/lightning_dlrm``, there or not."""
    root = os.environ.get("LIGHTNING_DLRM_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "lightning_dlrm"
