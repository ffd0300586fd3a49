"""Checkpoints: a folder that any number of ranks can write and any other number can open.

::

    manifest.json                    tables, slots and pieces; model, fingerprints, step
    tables/C3.0.safetensors          rows 0.. of table C3: tensor ``weight`` and one per optimiser slot
    tables/C3/linear.0.safetensors   the same of a further table of that column
    rest.pt                          dense weights and their optimiser, loops, loader, random states

A checkpoint is written aside, flushed to disk, and renamed: an interrupted save never takes the
place of a whole one. ``rest.pt`` is opened with ``weights_only``: no code in it is ever run.
"""

import dataclasses
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import file_sha256
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.tables.table import TablePiece

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REST = "rest.pt"


@dataclass(frozen=True)
class PieceTensors:
    """A piece of a table with everything there is for each of its rows."""

    piece: TablePiece
    tensors: Mapping[str, Tensor]
    """``weight`` [rows of the piece, D], and optimiser slots [rows of the piece, ...]."""


@dataclass(frozen=True, kw_only=True)
class PieceFile:
    """Where a range of a table's rows lies on disk."""

    start: int
    stop: int
    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TableEntry:
    """A table as the manifest describes it."""

    shapes: Mapping[str, tuple[int, ...]]
    """Global shape of ``weight`` and of each optimiser slot."""
    pieces: tuple[PieceFile, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds."""

    header: Mapping[str, Any]
    """JSON values about the run: model, fingerprints, step, epoch."""
    tables: Mapping[str, TableEntry]
    rest: PieceFile


def save_checkpoint(
    folder: Path,
    pieces: Sequence[PieceTensors],
    rest: Mapping[str, Any],
    header: Mapping[str, Any],
    ranks: Ranks | None = None,
) -> None:
    """Writes a checkpoint, replacing one of the same name; all ranks call it, and each writes its pieces.

    Args:
        folder: the checkpoint's name, such as ``checkpoints/last``; on a file system that all ranks see.
        pieces: of this rank; all ranks' pieces together cover every table.
        rest: tensors and plain Python values, small; rank 0's is written.
        header: JSON values for people and for checks before anything is loaded; rank 0's is written.
        ranks: who takes part; by default all ranks of the process group, if there is one.

    Raises:
        UserError: on all ranks, where one of them cannot write, or the disk is full. What was there
            before stays.
    """
    folder, ranks = Path(folder), ranks or Ranks()
    partial = _beside(folder, "partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "tables").mkdir(parents=True)

    def write_pieces() -> list[dict[str, Any]]:
        if not partial.is_dir():
            raise OSError(
                f"rank {ranks.rank} does not see {partial}: the run folder has to be one that all ranks share"
            )
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(lambda piece: _write_piece(partial, piece), pieces))

    def finish() -> None:
        torch.save(dict(rest), partial / REST)
        tables = _table_entries(entry for entries in written for entry in entries)
        manifest = Manifest(header=header, tables=tables, rest=_describe(partial, REST, 0, 0))
        document = {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
        (partial / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")
        _publish(partial, folder)

    try:
        ranks.run_on_rank_zero(_told_as_save_error(folder, begin))
        written = ranks.run_on_all_ranks(_told_as_save_error(folder, write_pieces))
        ranks.run_on_rank_zero(_told_as_save_error(folder, finish))
    except UserError:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def staging_bytes(pieces: Sequence[PieceTensors]) -> int:
    """Page-locked memory that ``save_checkpoint`` takes: for the largest of the pieces that lie on a GPU, as many as
    are written at a time."""
    sizes = (sum(tensor.nbytes for tensor in piece.tensors.values() if tensor.is_cuda) for piece in pieces)
    return sum(sorted(sizes, reverse=True)[: torch.get_num_threads()])


def _told_as_save_error(folder: Path, action: Callable[[], Any]) -> Callable[[], Any]:
    def act() -> Any:
        try:
            return action()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"cannot save the checkpoint {folder}: {error}; the previous one is untouched: "
                "free disk space or choose another --run_dir, then resume"
            ) from error

    return act


def _table_entries(written: Iterable[Mapping[str, Any]]) -> dict[str, TableEntry]:
    """Of what the ranks have written: table name -> its shapes and its pieces by ascending rows."""
    shapes: dict[str, Mapping[str, tuple[int, ...]]] = {}
    files: dict[str, list[PieceFile]] = {}
    for entry in written:
        shapes[entry["table"]] = {slot: tuple(shape) for slot, shape in entry["shapes"].items()}
        files.setdefault(entry["table"], []).append(PieceFile(**entry["file"]))
    return {
        name: TableEntry(shapes=shapes[name], pieces=tuple(sorted(of_table, key=lambda file: file.start)))
        for name, of_table in files.items()
    }


def rewrite_checkpoint(source: Path, folder: Path, bounds: Mapping[str, Sequence[int]] | None = None) -> None:
    """Writes a checkpoint again, with its tables cut otherwise; a piece per thread is in memory at a time.

    Args:
        source: the checkpoint.
        folder: of the new one.
        bounds: table name -> 0, where each piece but the first starts, the table's rows; None leaves
            tables whole.

    Raises:
        UserError: ``source`` is not whole, or ``folder`` exists or cannot be written.
    """
    if Path(folder).exists():
        raise UserError(f"{folder} exists; give another folder for the new checkpoint")
    reader = CheckpointReader(source)
    pieces = []
    for name, entry in reader.manifest.tables.items():
        rows = entry.shapes["weight"][0]
        for start, stop in itertools.pairwise((0, rows) if bounds is None else bounds[name]):
            piece = TablePiece(name=name, table_rows=rows, start=start, stop=stop, offset=0)
            pieces.append(PieceTensors(piece, _StoredRows(reader, piece)))
    save_checkpoint(folder, pieces, reader.rest(), reader.header)


class _StoredRows(Mapping[str, Tensor]):
    """A piece's rows in a checkpoint, each slot read when it is asked for."""

    def __init__(self, reader: "CheckpointReader", piece: TablePiece) -> None:
        self._reader, self._piece = reader, piece
        self._shapes = reader.manifest.tables[piece.name].shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, slot: str) -> Tensor:
        rows = self._piece.stop - self._piece.start
        dtype = self._reader.dtype(self._piece.name, slot)
        out = torch.empty(rows, *self._shapes[slot][1:], dtype=dtype)
        self._reader.read_rows(self._piece, slot, out)
        return out


def link_checkpoint(source: Path, folder: Path) -> None:
    """Gives a whole checkpoint a second name at no cost in disk: its files are never changed in place."""
    partial = _beside(folder, "partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=_link_or_copy)
        _publish(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot keep {source} as {folder}: {error}; free disk space, then resume") from error


def resolve_checkpoint(folder: Path) -> Path:
    """The folder that holds the checkpoint of this name.

    A save that was interrupted between its two renames leaves the previous checkpoint, whole,
    under another name.

    Raises:
        UserError: there is none.
    """
    folder = Path(folder)
    for candidate in (folder, _beside(folder, "previous")):
        if (candidate / MANIFEST).is_file():
            return candidate
    what = "is not a checkpoint folder (no manifest.json)" if folder.exists() else "does not exist"
    raise UserError(f"checkpoint {folder} {what}; expected a folder such as runs/NAME/checkpoints/last")


class CheckpointReader:
    """Reads a checkpoint; every file's checksum is compared before its content is used.

    Args:
        folder: of the checkpoint.

    Raises:
        UserError: there is no such checkpoint, it is of another version, or pieces are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = resolve_checkpoint(folder)
        self._checked: set[str] = set()
        try:
            document = json.loads((self.folder / MANIFEST).read_text())
            version = document.pop("format_version")
            if version != FORMAT_VERSION:
                raise UserError(
                    f"checkpoint {self.folder} has format version {version}; this release reads {FORMAT_VERSION}: "
                    "use the release that wrote it"
                )
            self.manifest = _parse_manifest(document)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / MANIFEST} is damaged ({error!r}); use another checkpoint") from error
        missing = [f.file for f in self._files() if not (self.folder / f.file).is_file()]
        if missing:
            raise UserError(f"checkpoint {self.folder} lacks {', '.join(missing)}; use another checkpoint")
        for part in self._files():
            if (self.folder / part.file).stat().st_size != part.bytes:
                raise UserError(f"checkpoint file {self.folder / part.file} is damaged (its size differs)")
        for name, entry in self.manifest.tables.items():
            _check_tiling(self.folder, name, entry)

    @property
    def header(self) -> Mapping[str, Any]:
        return self.manifest.header

    def rest(self) -> dict[str, Any]:
        """What ``save_checkpoint`` got as ``rest``.

        Raises:
            UserError: the file is damaged, or holds more than tensors and plain values.
        """
        self._check(self.manifest.rest)
        try:
            return torch.load(self.folder / REST, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{self.folder / REST} holds more than tensors and plain values, so it is not opened; "
                "use a checkpoint that this project wrote"
            ) from error

    def read_rows(self, piece: TablePiece, slot: str, out: Tensor) -> None:
        """Fills ``out`` with a piece's rows of one slot, whatever pieces they were written in.

        Raises:
            UserError: the checkpoint has no such table or slot, another shape, or a damaged file.
        """
        entry = self.manifest.tables.get(piece.name)
        if entry is None or slot not in entry.shapes:
            raise UserError(f"checkpoint {self.folder} has no {slot} for table {piece.name}: it is of another model")
        expected = (piece.table_rows, *out.shape[1:])
        if entry.shapes[slot] != expected:
            raise UserError(
                f"checkpoint {self.folder}: table {piece.name} has {slot} of shape {entry.shapes[slot]}, "
                f"this run needs {expected}: it is of another model or dataset"
            )
        for part in entry.pieces:
            start, stop = max(piece.start, part.start), min(piece.stop, part.stop)
            if start < stop:
                self._check(part)
                with safe_open(str(self.folder / part.file), framework="pt") as file:
                    rows = file.get_slice(slot)[start - part.start : stop - part.start]
                out[start - piece.start : stop - piece.start].copy_(rows)

    def dtype(self, table: str, slot: str) -> torch.dtype:
        """Of a slot's values as they are stored."""
        with safe_open(str(self.folder / self.manifest.tables[table].pieces[0].file), framework="pt") as file:
            return file.get_slice(slot)[:0].dtype

    def verify(self) -> None:
        """Compares every file's checksum.

        Raises:
            UserError: one differs.
        """
        for part in self._files():
            self._check(part)

    def _files(self) -> Iterable[PieceFile]:
        yield self.manifest.rest
        for entry in self.manifest.tables.values():
            yield from entry.pieces

    def _check(self, part: PieceFile) -> None:
        if part.file in self._checked:
            return
        path = self.folder / part.file
        if path.stat().st_size != part.bytes or file_sha256(path) != part.sha256:
            raise UserError(f"checkpoint file {path} is damaged (its checksum differs); use another checkpoint")
        self._checked.add(part.file)


def _check_tiling(folder: Path, name: str, entry: TableEntry) -> None:
    """The pieces of a table cover its rows, each once."""
    row = 0
    for part in sorted(entry.pieces, key=lambda part: part.start):
        if part.start != row:
            break
        row = part.stop
    rows = entry.shapes["weight"][0]
    if row != rows or sum(part.stop - part.start for part in entry.pieces) != rows:
        raise UserError(
            f"checkpoint {folder}: the pieces of table {name} do not cover its {rows} rows; use another one"
        )


def _parse_manifest(document: Mapping[str, Any]) -> Manifest:
    return Manifest(
        header=document["header"],
        tables={
            name: TableEntry(
                shapes={slot: tuple(shape) for slot, shape in entry["shapes"].items()},
                pieces=tuple(PieceFile(**part) for part in entry["pieces"]),
            )
            for name, entry in document["tables"].items()
        },
        rest=PieceFile(**document["rest"]),
    )


def _write_piece(partial: Path, piece: PieceTensors) -> dict[str, Any]:
    """Writes a piece's file; returns what ``_table_entries`` takes."""
    what = piece.piece
    name = f"tables/{what.name}.{what.start}.safetensors"
    (partial / name).parent.mkdir(parents=True, exist_ok=True)
    tensors = {slot: _in_host_memory(tensor.detach()) for slot, tensor in piece.tensors.items()}
    save_file(tensors, str(partial / name))
    # Each rank flushes its own files: on a network file system only the machine that wrote them can.
    _flush(partial / name)
    return {
        "table": what.name,
        "shapes": {slot: [what.table_rows, *tensor.shape[1:]] for slot, tensor in tensors.items()},
        "file": dataclasses.asdict(_describe(partial, name, what.start, what.stop)),
    }


def _in_host_memory(tensor: Tensor) -> Tensor:
    """On a CPU the live tensor itself, or a view of it; from a GPU a copy in page-locked memory."""
    if not tensor.is_cuda:
        return tensor.contiguous()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(tensor)


def _describe(partial: Path, name: str, start: int, stop: int) -> PieceFile:
    path = partial / name
    return PieceFile(start=start, stop=stop, file=name, bytes=path.stat().st_size, sha256=file_sha256(path))


def _publish(partial: Path, folder: Path) -> None:
    """Flushes a finished checkpoint to disk and gives it its name."""
    for path in [partial / MANIFEST, partial / REST, *(p for p in partial.rglob("*") if p.is_dir()), partial]:
        _flush(path)
    previous = _beside(folder, "previous")
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    partial.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # A file system without hard links.
        shutil.copy2(source, target)
