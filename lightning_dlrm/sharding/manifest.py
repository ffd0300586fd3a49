"""The manifest of a checkpoint: its tables, the files of their pieces, and facts about the run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_dlrm.contracts.documents import is_inner_path, read_json
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import file_sha256

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class PieceFile:
    """The file that holds a range of a table's rows."""

    start: int
    stop: int
    file: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        require(is_inner_path(self.file), f"the file {self.file!r} leads out of its folder")
        require(0 <= self.start <= self.stop and self.bytes >= 0, f"{self.file} has a negative size or number of rows")

    @classmethod
    def of(cls, folder: Path, name: str, start: int, stop: int) -> "PieceFile":
        """Return the entry of a finished file."""
        path = folder / name
        return cls(start=start, stop=stop, file=name, bytes=path.stat().st_size, sha256=file_sha256(path))


@dataclass(frozen=True, kw_only=True)
class TableEntry:
    """The manifest's entry of a table."""

    shapes: Mapping[str, tuple[int, ...]]
    """Global shape of ``weight`` and of each tensor of optimizer state."""
    pieces: tuple[PieceFile, ...]

    def __post_init__(self) -> None:
        weight = self.shapes.get("weight", ())
        require(len(weight) == 2 and self.pieces, "a table has no shape of its weight, or no pieces")
        elements = 0
        for slot, shape in self.shapes.items():
            require(is_inner_path(slot), f"{slot!r} is not the name of a tensor")
            require(shape and shape[0] == weight[0] and min(shape) > 0, f"{slot} has the shape {list(shape)}")
            elements += math.prod(shape)
        # So that no more memory is allocated than the files can fill.
        require(
            elements <= sum(piece.bytes for piece in self.pieces), "the shapes of a table are larger than its files"
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a checkpoint."""

    header: Mapping[str, Any]
    """JSON values about the run: model, fingerprints, step, epoch."""
    tables: Mapping[str, TableEntry]
    rest: PieceFile

    @property
    def bytes(self) -> int:
        """Bytes of all files that the manifest lists."""
        return self.rest.bytes + sum(part.bytes for entry in self.tables.values() for part in entry.pieces)

    def __post_init__(self) -> None:
        kinds = {"model": str, "encoding_fingerprint": str, "data_fingerprint": str, "step": int, "epoch": int}
        for name, kind in kinds.items():
            require(type(self.header.get(name, kind())) is kind, f"{name} is not of the type {kind.__name__}")
        for name in self.tables:
            require(is_inner_path(name), f"the name of the table {name!r} leads out of the checkpoint's folder")


@dataclass(frozen=True, kw_only=True)
class _Version:
    format_version: int


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        UserError: it cannot be read, has another version or form, or does not have all rows of a table.
    """
    version = read_json(folder / MANIFEST, _Version, "use another checkpoint").format_version
    require(
        version == FORMAT_VERSION,
        f"checkpoint {folder} has format version {version}; this release reads {FORMAT_VERSION}: "
        "use the release that wrote it",
    )
    manifest = read_json(folder / MANIFEST, Manifest, "use another checkpoint")
    for name, entry in manifest.tables.items():
        _check_tiling(folder, name, entry)
    return manifest


def _check_tiling(folder: Path, name: str, entry: TableEntry) -> None:
    """Check that the pieces of a table cover each of its rows once."""
    row = 0
    for part in sorted(entry.pieces, key=lambda part: part.start):
        if part.start != row:
            break
        row = part.stop
    rows = entry.shapes["weight"][0]
    require(
        row == rows and sum(part.stop - part.start for part in entry.pieces) == rows,
        f"checkpoint {folder}: the pieces of table {name} do not cover its {rows} rows; use another checkpoint",
    )
