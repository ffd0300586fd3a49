"""A dataset folder on this machine or behind a URL: its file system, its schema, and its files by size and checksum.

``lightning_dlrm.contracts.schema`` defines what a dataset folder holds. Nothing here imports torch.
"""

import errno
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_dlrm.contracts.errors import UserError, one_line, require
from lightning_dlrm.contracts.schema import SCHEMA_FILE, SPLITS, DataFile, DatasetSchema

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

REMEDY = "restore the file, or make the dataset again"
"""What error messages advise for a missing or altered file."""

_CHECKSUM_BYTES = 1 << 20  # read at a time
_SIZES_AT_ONCE = 16  # requests in flight: a remote file system takes a while to answer each

_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "abfs": "adlfs",
    "az": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}
"""Protocol of a URL -> the package that fsspec needs for it."""


def is_remote(place: str) -> bool:
    """Return whether a place is a URL rather than a path."""
    return "://" in place


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
        remedy = f"; pip install {_PACKAGES[kind]}, or give a path" if kind in _PACKAGES else ""
        raise UserError(f"{address} needs a package that is not installed: {one_line(error)}{remedy}") from error
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
    """Turn the exceptions of any file system into a UserError that names the place.

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
    """Return whether an error, of Python or of pyarrow, means that a disk or a quota is full, or a file larger than
    allowed."""
    if not isinstance(error, OSError):
        return False
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return error.errno in numbers or any(f"[errno {number}]" in str(error).lower() for number in numbers)


def _failure(place: str, what: str, error: Exception, remedy: str) -> UserError:
    if "range requests" in str(error):
        remedy = "its server does not send parts of files: copy the files to this machine and give their path"
    words = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return UserError(f"{place} {what} ({type(error).__name__}: {words}); {remedy}")


def consistent(file: pq.ParquetFile, where: object, remedy: str = REMEDY) -> pq.ParquetFile:
    """Return a Parquet file that has been opened, if its footer agrees with itself.

    From a row group that is damaged to have billions of rows, pyarrow would read for minutes.

    Args:
        file: the file.
        where: its name, for the message.
        remedy: what to do, for the message.

    Raises:
        UserError: the rows of its row groups are not those of the file.
    """
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    require(
        sum(groups) == file.metadata.num_rows and min(groups, default=0) >= 0,
        f"{where} is altered: its footer counts {file.metadata.num_rows:,} rows, and {sum(groups):,} in row groups; "
        f"{remedy}",
    )
    return file


class Folder:
    """A folder given as a path, or as a URL of a file system that fsspec knows.

    Args:
        where: such as ``data/criteo``, ``s3://bucket/criteo``, ``gs://...`` or ``hf://...``; or a Folder.

    Raises:
        UserError: fsspec does not know the file system, or its package is not installed.
    """

    def __init__(self, where: "str | Path | Folder") -> None:
        self._name = str(where)
        self._remote: AbstractFileSystem | None = None
        if is_remote(self._name):
            self._remote, self._root = file_system(self._name)
        else:
            self._root = str(Path(self._name).expanduser())

    def __str__(self) -> str:
        return self._name

    def __truediv__(self, path: str) -> str:
        """Return the full path or URL of a file of the folder, for messages."""
        return f"{self._name.rstrip('/')}/{path}"

    @property
    def absolute(self) -> str:
        """The folder's name, valid in every working directory."""
        return str(Path(self._root).absolute()) if self._remote is None else self._name

    @property
    def local(self) -> Path | None:
        """The folder as a path; None for a URL."""
        return Path(self._root) if self._remote is None else None

    def size(self, path: str) -> int | None:
        """Return the bytes of a file; None if its server does not report them.

        Raises:
            FileNotFoundError: the file does not exist.
            UserError: the file system fails.
        """
        with self._failures(path):
            if self._remote is None:
                return Path(self._root, path).stat().st_size
            return self._remote.info(self._inner(path))["size"]

    def read(self, path: str) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: the file does not exist.
            UserError: the file cannot be read.
        """
        with self.open(path) as file:
            return file.read()

    @contextmanager
    def open(self, path: str) -> Iterator[IO[bytes]]:
        """Open a file for sequential reading.

        Raises:
            FileNotFoundError: the file does not exist.
            UserError: the file cannot be read.
        """
        with (
            self._failures(path),
            Path(self._root, path).open("rb")
            if self._remote is None
            else self._remote.open(self._inner(path), "rb") as file,
        ):
            yield file

    def open_parquet(self, path: str, verify: bool) -> pq.ParquetFile:
        """Open a Parquet file for reading row group by row group.

        Args:
            path: of the file, relative to the folder.
            verify: compare the checksums of its pages while reading.

        Raises:
            FileNotFoundError: the file does not exist.
            UserError: the file cannot be read, or is not Parquet.
        """
        with self._failures(path):
            try:
                if self._remote is None:
                    # The read-ahead of pyarrow would hold more than the current row group.
                    here = Path(self._root, path)
                    file = pq.ParquetFile(here, pre_buffer=False, page_checksum_verification=verify)
                    return consistent(file, self / path)
                # The columns of a row group lie side by side: one request reads it. The cache of fsspec would fetch
                # its neighbours too.
                source = pa.PythonFile(self._remote.open(self._inner(path), cache_type="none"), mode="r")
                file = pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=verify)
                return consistent(file, self / path)
            except (pa.ArrowInvalid, OSError) as error:
                if isinstance(error, OSError) and error.errno:
                    raise
                raise UserError(
                    f"{self / path} is altered: it is not a readable Parquet file ({one_line(error)}); {REMEDY}"
                ) from error

    @contextmanager
    def open_vocabulary(self, path: str) -> Iterator[pq.ParquetFile]:
        """Open a vocabulary file; the context turns failures to read it into UserErrors.

        Raises:
            UserError: the file is missing or altered.
        """
        try:
            with (
                failures_as_user_errors(self / path, "cannot be decoded", REMEDY, passing=(FileNotFoundError,)),
                self.open_parquet(path, verify=True) as file,
            ):
                yield file
        except FileNotFoundError as error:
            raise UserError(f"{self / path} is missing; {REMEDY}") from error

    def _inner(self, path: str) -> str:
        """Return the name of a file of the folder within its file system."""
        return f"{self._root.rstrip('/')}/{path}"

    def _failures(self, path: str) -> AbstractContextManager[None]:
        """Turn failures into UserErrors; callers handle FileNotFoundError."""
        remedy = "check the path and its permissions"
        if self._remote is not None:
            remedy = "check the URL, the network and your credentials"
        return failures_as_user_errors(self / path, remedy=remedy, passing=(FileNotFoundError,))


def load_schema(folder: str | Path | Folder) -> DatasetSchema:
    """Load the ``dataset.json`` of a dataset folder, also behind a URL.

    Raises:
        UserError: the file is missing, is not a schema of this version, or was altered.
    """
    where = Folder(folder)
    if where.local is not None:
        return DatasetSchema.load(where.local)
    try:
        return DatasetSchema.from_json(where.read(SCHEMA_FILE), where / SCHEMA_FILE)
    except FileNotFoundError as error:
        raise UserError(
            f"no dataset folder at {where}: {where / SCHEMA_FILE} does not exist; copy a folder there that "
            "'python -m lightning_dlrm preprocess' made"
        ) from error


def part_files(schema: DatasetSchema, splits: Sequence[str] = SPLITS) -> Iterator[DataFile]:
    """Yield the part files of some splits, in order; a split that the dataset lacks has none."""
    for name in splits:
        if name in schema.splits:
            yield from schema.splits[name].files


def check_sizes(folder: str | Path | Folder, files: Sequence[DataFile]) -> None:
    """Check that files exist and have their recorded size, without opening them.

    Raises:
        UserError: a file is missing, or its size differs from the one in ``dataset.json``.
    """
    where = Folder(folder)

    def size(file: DataFile) -> int | None:
        try:
            return where.size(file.path)
        except FileNotFoundError:
            return -1

    if len(files) == 1:
        sizes = [size(files[0])]
    else:
        with ThreadPoolExecutor(_SIZES_AT_ONCE) as pool:
            sizes = list(pool.map(size, files))
    for file, found in zip(files, sizes, strict=True):
        if found == -1:
            raise UserError(f"{where / file.path} is missing; {REMEDY}")
        if found is not None and found != file.bytes:
            what = "truncated" if found < file.bytes else "altered"
            raise UserError(
                f"{where / file.path} is {what}: it has {found} bytes, its dataset.json says {file.bytes}; {REMEDY}"
            )


def verify(folder: str | Path | Folder, schema: DatasetSchema, progress: bool = False) -> None:
    """Read every byte of a dataset and compare the checksums, at about 1 GB a second.

    Args:
        folder: the dataset folder.
        schema: its schema.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        UserError: a file is missing, truncated or altered.
    """
    where = Folder(folder)
    files = (*schema.vocabulary.values(), *part_files(schema))
    check_sizes(where, files)
    from tqdm import tqdm  # preprocess starts sooner without it

    with tqdm(
        total=sum(file.bytes for file in files),
        desc="Verifying",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:
        for file in files:
            checksum = hashlib.sha256()
            with where.open(file.path) as stored:
                while piece := stored.read(_CHECKSUM_BYTES):
                    checksum.update(piece)
                    bar.update(len(piece))
            require(
                checksum.hexdigest() == file.sha256,
                f"{where / file.path} is altered: its sha256 is {checksum.hexdigest()[:12]}..., its dataset.json "
                f"says {file.sha256[:12]}...; {REMEDY}",
            )
