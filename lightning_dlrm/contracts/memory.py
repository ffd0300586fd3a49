"""Memory that can be allocated on this machine."""

import math
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> float:
    """Return the bytes that can be allocated without swapping, within a container's limit; infinite if the
    system does not say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return math.inf
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Cached file content gives way.
        return min(available, limit - used + int(cached["inactive_file"]))
    except (OSError, ValueError):  # no such control group, or no limit ("max")
        return available
