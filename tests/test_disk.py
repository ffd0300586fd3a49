"""Contract: a file system that refuses a flush or a lock draws one warning; any other failure of it is raised."""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from datamodules.preprocess.pipeline import preprocess
from datamodules.preprocess.progress import Progress
from lightning_dlrm.contracts import disk
from lightning_dlrm.sharding.checkpoint import CheckpointReader
from tests.raw_criteo import generated_lines, written
from tests.sharding.test_checkpoint import write


@pytest.fixture(autouse=True)
def warns_again() -> None:
    disk._warn.cache_clear()


def refusing(number: int) -> Any:
    """Return a call that the file system answers with an error."""

    def call(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_refused_calls_draw_one_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(number))
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    for _ in range(2):
        disk.flush(tmp_path)
        with (tmp_path / "lock").open("w") as file:
            assert disk.lock(file)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "the file system cannot flush folders",
        "the file system cannot lock files",
    ]


def test_other_failures_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        assert disk.lock(first) and not disk.lock(second)
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        disk.flush(tmp_path)
    with (tmp_path / "lock").open("w") as file, pytest.raises(OSError, match="Input/output error"):
        disk.lock(file)


def test_datasets_and_checkpoints_are_made_without_flushes_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: refusing(errno.EINVAL)() if stat.S_ISDIR(os.fstat(fd).st_mode) else real(fd)
    )
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    raw = written(tmp_path / "train.txt", generated_lines(200))
    schema = preprocess("kaggle", "dlrm", [raw], tmp_path / "out", progress=Progress(show=False), workers=1)
    assert sum(split.rows for split in schema.splits.values()) == 200
    write(tmp_path / "last")
    CheckpointReader(tmp_path / "last").verify()
