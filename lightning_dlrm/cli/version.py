"""The version of the code that makes a run."""

import importlib.metadata
import subprocess
from pathlib import Path

import lightning_dlrm


def code_version() -> dict[str, str | None]:
    """Return the release of this project and, in a checkout, the commit."""
    return {"version": _version(), "git_commit": _git_commit()}


def _version() -> str:
    try:
        return importlib.metadata.version("lightning-dlrm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_commit() -> str | None:
    """Return the commit of the checkout that this code runs from; None if it is installed from a wheel."""
    command = ["git", "-C", str(Path(lightning_dlrm.__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
