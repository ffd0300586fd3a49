"""Flushes and locks of files, which some file systems (CIFS, FUSE, Lustre, NFS) refuse."""

import errno
import fcntl
import functools
import logging
import os
from pathlib import Path
from typing import IO

log = logging.getLogger("lightning_dlrm")

_REFUSALS = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that do not have a call."""


def flush(path: Path) -> None:
    """Flush a file or folder to the disk; if its file system cannot, log one warning.

    Raises:
        OSError: the flush failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        _warn("flush folders" if path.is_dir() else "flush files", "after a power failure the last files may be gone")
    finally:
        os.close(descriptor)


def lock(file: IO[bytes] | IO[str]) -> bool:
    """Lock an open file for this process and those that inherit it; if its file system cannot, log one warning.

    Returns:
        False if another process has locked it.

    Raises:
        OSError: the file cannot be locked.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        _warn("lock files", "do not start the same command twice at the same time")
    return True


@functools.cache
def _warn(call: str, consequence: str) -> None:
    log.warning("the file system cannot %s: %s", call, consequence)
