"""Flushes and locks of files, and the words for a file that cannot be written.

Some file systems (CIFS, FUSE, Lustre, NFS) refuse flushes and locks.
"""

import errno
import fcntl
import functools
import logging
import os
import tempfile
from pathlib import Path
from typing import IO

from lightning_dlrm.contracts.errors import UserError, one_line

log = logging.getLogger("lightning_dlrm")

_REFUSALS = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that do not have a call."""


def write_fault(path: Path, error: Exception, choice: str) -> str:
    """Return why a file or folder cannot be written, and what to do.

    Args:
        path: the file or folder.
        error: the error of the system, or of a library that writes files.
        choice: what to choose instead, such as ``another --output``.
    """
    code = error.errno if isinstance(error, OSError) else None
    blocking = next((parent for parent in (path, *path.parents) if parent.is_file()), None)
    if code in (errno.EEXIST, errno.ENOTDIR) and blocking is not None:
        return f"cannot write {path}: {blocking} is a file; choose {choice}"
    if code == errno.EISDIR:
        return f"cannot write {path}: it is a folder; choose {choice}"
    if code == errno.ENOENT and path.parent.is_dir():
        # Such as /proc.
        return f"cannot write {path}: nothing can be made in {path.parent}; choose {choice}"
    words = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    remedy = "free disk space, or " if code in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) else ""
    return f"cannot write {path}: {words}; {remedy}choose {choice}"


def require_writable(folder: Path, choice: str) -> None:
    """Make the parents of a new folder.

    Raises:
        UserError: they cannot be made, or nothing can be written there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent):
            pass
    except OSError as error:
        raise UserError(write_fault(folder, error, choice)) from error


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
