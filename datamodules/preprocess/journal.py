"""Records of finished files in a working folder, so that a killed run can be resumed.

A file is written under another name, closed and renamed; then its record is written in the same way. So a record means
a complete file, whenever the process was killed, and processes on any number of machines never write the same record.
After a power failure a file may still be short: records hold checksums, also of themselves, and ``discard_damaged``
compares them before a run resumes.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightning_dlrm.contracts import disk
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import file_sha256

_SUFFIX = ".json"
_PARTIAL = ".partial"

LOCKED: list[IO[str]] = []
"""Open files by which this process holds locks; a process that is forked from it closes its copies."""


def fingerprint(content: Any) -> str:
    """Return a SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a unique name to write to, which becomes ``path`` if the context ends without an error."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left of ``written_aside`` below a folder."""
    for path in _files_below(folder):
        if path.name.startswith(".") and path.name.endswith(_PARTIAL):
            path.unlink(missing_ok=True)


def record(
    path: Path, facts: Mapping[str, Any], files: tuple[Path, ...] = (), known: Mapping[Path, str] | None = None
) -> dict[str, Any]:
    """Record that a step is finished.

    Args:
        path: of the record, without its suffix.
        facts: JSON values to remember.
        files: the files that the step has written, complete and in their place, below ``path``'s parent.
        known: the SHA-256 of some of them, if it has been computed already.

    Returns:
        The facts.
    """
    kept = dict(facts)
    content = {
        "facts": kept,
        "files": [
            {
                "path": os.path.relpath(file, path.parent),
                "bytes": file.stat().st_size,
                "sha256": (known or {}).get(file) or file_sha256(file),
            }
            for file in files
        ],
    }
    with written_aside(path.with_name(path.name + _SUFFIX)) as partial:
        partial.write_text(json.dumps({**content, "check": fingerprint(content)}))
    return kept


def recorded(path: Path) -> dict[str, Any] | None:
    """Return the facts of a finished step, None if it is not finished.

    Args:
        path: of the record, without its suffix.
    """
    content = _content(path)
    return None if content is None else content["facts"]


def _content(path: Path) -> dict[str, Any] | None:
    """Return the content of a record, None if there is none or it is damaged."""
    try:
        content = json.loads(path.with_name(path.name + _SUFFIX).read_text())
        return content if content.pop("check") == fingerprint(content) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def find_records(folder: Path) -> list[Path]:
    """Return all records below a folder, each without its suffix."""
    return sorted(
        path.with_name(path.name.removesuffix(_SUFFIX))
        for path in _files_below(folder)
        if path.name.endswith(_SUFFIX) and not path.name.startswith(".")
    )


def _files_below(folder: Path) -> Iterator[Path]:
    return (Path(root) / name for root, _, names in os.walk(folder) for name in names)


def discard_damaged(path: Path) -> bool:
    """Remove a record if a file of it is missing or altered; return whether it was removed.

    Args:
        path: of the record, without its suffix.
    """
    content = _content(path)
    if content is not None and all(_is_whole(path.parent / file["path"], file) for file in content["files"]):
        return False
    path.with_name(path.name + _SUFFIX).unlink(missing_ok=True)
    return True


def _is_whole(path: Path, recorded: Mapping[str, Any]) -> bool:
    try:
        return path.stat().st_size == recorded["bytes"] and file_sha256(path) == recorded["sha256"]
    except OSError:
        return False


@contextmanager
def locked(folder: Path, output: str) -> Iterator[None]:
    """Lock a folder for this process; the lock ends with the process at the latest.

    Raises:
        UserError: the folder is not writable, or another run has locked it.
    """
    busy = UserError(f"another run is making {output}; wait for it, or choose another --output")
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename == str(path):
            raise busy from None  # the run that finished removed it between the two calls
        raise UserError(f"cannot write to {folder.parent} ({error.strerror}); choose another --output") from error
    with file:
        if not disk.lock(file):
            raise busy
        try:
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise busy
        except FileNotFoundError:
            raise busy from None
        LOCKED.append(file)
        try:
            yield
        finally:
            LOCKED.remove(file)
