"""Memory that can be allocated on this machine."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_VERSION_1 = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("max", "current", "inactive_file")
"""Names of a control group's limit, its use, and the part of it that is cached file content."""


def available_memory() -> float:
    """Return the bytes that can be allocated without swapping, within the limits of this process's control groups, such
    as those of a container or a SLURM job; infinite if the system does not say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return math.inf
    return min(int(fields["MemAvailable"].split()[0]) * 1024, *_left_in_cgroups(), math.inf)


def _left_in_cgroups() -> Iterator[float]:
    for folder, (limit, used, cached) in _memory_cgroups():
        # Without the file there is no such group here, and "max" is no limit.
        with contextlib.suppress(OSError, ValueError, KeyError):
            most, now = (int((folder / f"memory.{name}").read_text()) for name in (limit, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Cached file content gives way.
            yield most - now + int(stat[cached])


def _memory_cgroups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield this process's control groups of memory and the groups above them, with the names of their files."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root, names = (_CGROUPS, _VERSION_2) if not controllers else (_CGROUPS / "memory", _VERSION_1)
            own = root / path.lstrip("/")
            yield from ((folder, names) for folder in (own, *own.parents) if folder.is_relative_to(root))
