"""File systems of this machine and of fsspec: find them, and turn their failures into messages."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_dlrm.contracts.errors import UserError, one_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def is_remote(place: str) -> bool:
    """Return whether a place is a URL rather than a path."""
    return "://" in place


def in_process_only(place: str) -> bool:
    """Return whether only this process can read a place."""
    return place.startswith("memory://")


def file_system(address: str) -> "tuple[AbstractFileSystem, str]":
    """Return the fsspec file system of a URL, and the path in it.

    Raises:
        UserError: fsspec does not know the file system, or its package is not installed.
    """
    # Imported here: most data are on this machine, and workers start faster without it.
    import fsspec

    kind = address.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise UserError(f"{address} needs a package that is not installed: {one_line(error)}") from error
    except ValueError as error:
        if kind in fsspec.available_protocols():
            raise _failure(address, "is not a valid URL", error, "correct the URL") from error
        raise UserError(
            f"{address}: fsspec does not know the protocol {kind}://; give a path, or a URL such as s3://, gs://, "
            "hf:// or https://"
        ) from error
    except Exception as error:
        raise _failure(
            address, "cannot be reached", error, "check the URL, the network and your credentials"
        ) from error
    return system, path


@contextmanager
def failures_as_user_errors(
    place: str,
    what: str = "cannot be read",
    remedy: str = "check the path and your access to it",
    *,
    passing: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn failures of a file system, each of which has exceptions of its own, into a UserError that names the place.

    The exceptions of a full disk pass unchanged.

    Args:
        place: a path or a URL.
        what: what happened to the place.
        remedy: what the user can do.
        passing: further exceptions that pass unchanged.

    Raises:
        UserError: no permission, no network, no such bucket, a folder in place of a file, ...
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, *passing)) or is_disk_full(error):
            raise
        raise _failure(place, what, error, remedy) from error


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, of Python or of pyarrow, means that a disk or a quota is full."""
    if not isinstance(error, OSError):
        return False
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or f"[errno {errno.ENOSPC}]" in str(error).lower()


def _failure(place: str, what: str, error: Exception, remedy: str) -> UserError:
    words = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return UserError(f"{place} {what} ({type(error).__name__}: {words}); {remedy}")
