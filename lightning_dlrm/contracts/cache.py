"""The folder of cached files, all of which can be made again."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Return ``$LIGHTNING_DLRM_CACHE``, by default ``~/.cache/lightning_dlrm``; the folder need not exist."""
    root = os.environ.get("LIGHTNING_DLRM_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "lightning_dlrm"
