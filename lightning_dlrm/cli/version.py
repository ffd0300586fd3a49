"""The versions of the code and the packages that make a run."""

import functools
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import lightning_dlrm


def code_version() -> dict[str, str | None]:
    """Return the release of this project and, in a checkout, the commit."""
    return {"version": _version(), "git_commit": _git_commit()}


def versions() -> dict[str, str | None]:
    """Return the versions of this project, Python, and each package that this project needs."""
    return {
        "lightning-dlrm": _version(),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        **_package_versions(),
    }


@functools.cache
def _package_versions() -> dict[str, str]:
    """Return the version of each package that this project needs."""
    try:
        needed = importlib.metadata.requires("lightning-dlrm") or []
    except importlib.metadata.PackageNotFoundError:
        needed = ["torch", "pytorch-lightning"]
    names = [re.split(r"[^\w.-]", line)[0] for line in needed if "extra ==" not in line]
    return {name: importlib.metadata.version(name) for name in names}


def _version() -> str:
    try:
        return importlib.metadata.version("lightning-dlrm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _git_commit() -> str | None:
    """Return the commit of the checkout that this code runs from; None if it is installed from a wheel."""
    command = ["git", "-C", str(Path(lightning_dlrm.__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
