"""Checkpoints: a folder that any number of ranks can write and any number of ranks can open.

::

    manifest.json                    tables, state and pieces; model, fingerprints, step
    tables/C3.0.safetensors          rows 0.. of table C3: ``weight`` and each tensor of optimizer state
    tables/C3/linear.0.safetensors   the same of a further table of that column
    rest.pt                          dense parameters, their optimizer state, loops, loader, random states

A checkpoint is written to a temporary folder, flushed to disk, and renamed: an interrupted save never
replaces a complete checkpoint. ``rest.pt`` is opened with ``weights_only``, which runs no code from it.

A *slot* is ``weight`` or the name of a tensor of optimizer state with a first dimension of rows.
"""

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dlrm.contracts.disk import flush
from lightning_dlrm.contracts.errors import UserError, nearest, nearest_path, one_line, require
from lightning_dlrm.contracts.schema import file_sha256
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.sharding.finite import is_finite, nonfinite_tensors
from lightning_dlrm.sharding.manifest import FORMAT_VERSION, MANIFEST, Manifest, PieceFile, TableEntry, read_manifest
from lightning_dlrm.tables.table import TablePiece

_WEIGHT_TYPES = ("F16", "BF16", "F32", "F64")
REST = "rest.pt"
CHECKED_REST = ("state_dict", "optimizer_states", "averages")
"""Keys of ``rest.pt`` whose tensors are finite; best scores of callbacks may be infinite."""


@dataclass(frozen=True)
class PieceTensors:
    """A piece of a table with its rows and their optimizer state."""

    piece: TablePiece
    tensors: Mapping[str, Tensor]
    """``weight`` [rows of the piece, D], and optimizer state [rows of the piece, ...]."""


def save_checkpoint(
    folder: Path,
    pieces: Sequence[PieceTensors],
    rest: Mapping[str, Any],
    header: Mapping[str, Any],
    ranks: Ranks | None = None,
) -> None:
    """Write a checkpoint, or replace one of the same name; all ranks call this, and each writes its pieces.

    Args:
        folder: the checkpoint's name, such as ``checkpoints/last``, on a file system that all ranks share.
        pieces: pieces of this rank; the pieces of all ranks together cover every table.
        rest: small tensors and plain Python values; those of rank 0 are written.
        header: JSON values about the run, which can be checked before tensors are loaded; those of rank 0 are
            written.
        ranks: the ranks that hold the pieces; by default all ranks of the process group, if there is one.

    Raises:
        UserError: on all ranks, if a rank cannot write or the disk is full. The previous checkpoint stays.
    """
    folder, ranks = Path(folder), ranks or Ranks()
    partial = _hidden_sibling(folder, "partial")

    @_save_errors(folder)
    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "tables").mkdir(parents=True)

    @_save_errors(folder)
    def write_pieces() -> list[dict[str, Any]]:
        if not partial.is_dir():
            raise OSError(
                f"rank {ranks.rank} does not see {partial}: put the run folder on a file system that all ranks share"
            )
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(lambda piece: _write_piece(partial, piece), pieces))

    @_save_errors(folder)
    def finish() -> None:
        torch.save(dict(rest), partial / REST)
        tables = _table_entries(entry for entries in written for entry in entries)
        manifest = Manifest(header=header, tables=tables, rest=PieceFile.of(partial, REST, 0, 0))
        document = {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
        (partial / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")
        _publish(partial, folder)

    try:
        ranks.run_on_rank_zero(begin)
        written = ranks.run_on_all_ranks(write_pieces)
        ranks.run_on_rank_zero(finish)
    finally:
        # After an error or Ctrl-C; a complete checkpoint has another name by now.
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def staging_bytes(pieces: Sequence[PieceTensors]) -> int:
    """Return the page-locked memory that ``save_checkpoint`` takes: the largest pieces on a GPU, one per thread."""
    sizes = (sum(tensor.nbytes for tensor in piece.tensors.values() if tensor.is_cuda) for piece in pieces)
    return sum(sorted(sizes, reverse=True)[: torch.get_num_threads()])


@contextmanager
def _save_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"cannot save the checkpoint {folder}: {one_line(error)}; an earlier one is unchanged: free disk space and "
            "resume, or choose another folder (--run_dir of fit, --output of checkpoint)"
        ) from error


def _table_entries(written: Iterable[Mapping[str, Any]]) -> dict[str, TableEntry]:
    """Return the manifest's entries of all tables from the results of ``_write_piece``; pieces by ascending rows."""
    shapes: dict[str, Mapping[str, tuple[int, ...]]] = {}
    files: dict[str, list[PieceFile]] = {}
    for entry in written:
        shapes[entry["table"]] = {slot: tuple(shape) for slot, shape in entry["shapes"].items()}
        files.setdefault(entry["table"], []).append(PieceFile(**entry["file"]))
    return {
        name: TableEntry(shapes=shapes[name], pieces=tuple(sorted(of_table, key=lambda file: file.start)))
        for name, of_table in files.items()
    }


def link_checkpoint(source: Path, folder: Path) -> None:
    """Give a checkpoint a second name by hard links: its files are never changed in place."""
    partial = _hidden_sibling(folder, "partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=_link_or_copy)
        _publish(partial, folder)
    except OSError as error:
        raise UserError(f"cannot copy checkpoint {source} to {folder}: {error}; free disk space and resume") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def resolve_checkpoint(folder: Path) -> Path:
    """Return the folder that holds the checkpoint of a name.

    A save that was interrupted between its two renames leaves the previous checkpoint under another name.

    Raises:
        UserError: there is no such checkpoint.
    """
    folder = Path(folder)
    for candidate in (folder, _hidden_sibling(folder, "previous")):
        if (candidate / MANIFEST).is_file():
            return candidate
    inner = ("checkpoints/best", "checkpoints/last", "best", "last")
    if found := [str(folder / name) for name in inner if (folder / name / MANIFEST).is_file()]:
        raise UserError(f"{folder} is not a checkpoint, but a folder with checkpoints: give {' or '.join(found)}")
    what = "is not a checkpoint folder (no manifest.json)" if folder.exists() else "does not exist"
    what = "is a file" if folder.is_file() else what
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if len(missing) > 1:
        first = missing[-1]
        expected = nearest_path(first) or "; expected a folder such as runs/NAME/checkpoints/last"
        raise UserError(f"checkpoint {folder} does not exist: there is no folder {first}{expected}")
    beside = [name for name in ("best", "last") if (folder.parent / name / MANIFEST).is_file()]
    meant = nearest(folder.name, beside)
    expected = meant or "; expected a folder such as runs/NAME/checkpoints/last"
    raise UserError(f"checkpoint {folder} {what}{expected}")


class CheckpointReader:
    """Reader of a checkpoint, which verifies the checksum of every file that it uses.

    Args:
        folder: folder of the checkpoint.
        allow_nonfinite: whether to read rows of tables that are NaN or infinite.

    Raises:
        UserError: the checkpoint does not exist or has another version, or pieces are missing.
    """

    def __init__(self, folder: Path, allow_nonfinite: bool = False) -> None:
        self.folder = resolve_checkpoint(folder)
        self.allow_nonfinite = allow_nonfinite
        self._checked: set[str] = set()
        self.manifest = read_manifest(self.folder)
        outside = [
            f.file for f in self._files() if not (self.folder / f.file).resolve().is_relative_to(self.folder.resolve())
        ]
        require(
            not outside, f"checkpoint {self.folder} has links out of its folder: {', '.join(outside)}; copy its files"
        )
        missing = [f.file for f in self._files() if not (self.folder / f.file).is_file()]
        require(not missing, f"checkpoint {self.folder} lacks {', '.join(missing)}; use another checkpoint")
        for part in self._files():
            require(
                (self.folder / part.file).stat().st_size == part.bytes,
                f"checkpoint file {self.folder / part.file} is damaged (its size differs); use another checkpoint",
            )

    @property
    def header(self) -> Mapping[str, Any]:
        return self.manifest.header

    def rest(self) -> dict[str, Any]:
        """Return the values that ``save_checkpoint`` got as ``rest``.

        Raises:
            UserError: the file is damaged, or holds objects other than tensors and plain values.
        """
        self._check(self.manifest.rest)
        path = self.folder / self.manifest.rest.file
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path} holds more than tensors and plain values; use a checkpoint that this project wrote"
            ) from error
        except Exception as error:  # torch raises many classes of errors for a damaged file
            raise UserError(f"{path} is damaged ({one_line(error)}); use another checkpoint") from error
        require(isinstance(found, dict), f"{path} does not hold a dictionary; use another checkpoint")
        return found

    def read_rows(self, piece: TablePiece, slot: str, out: Tensor) -> None:
        """Fill ``out`` with a piece's rows of one slot; the rows may come from several stored pieces.

        A stored piece is verified by the reader of its first row, so that ranks that share it hash it once; its damage
        is an error of that rank, which must reach the others before the rows are used.

        Raises:
            UserError: the checkpoint does not have the table or slot, has another shape, is damaged, or has rows that
                are NaN or infinite.
        """
        entry = self.manifest.tables.get(piece.name)
        if entry is None or slot not in entry.shapes:
            raise UserError(f"checkpoint {self.folder} has no {slot} for table {piece.name}: it is of another model")
        expected = (piece.table_rows, *out.shape[1:])
        require(
            entry.shapes[slot] == expected,
            f"checkpoint {self.folder}: table {piece.name} has {slot} of shape {entry.shapes[slot]}, "
            f"this run needs {expected}: it is of another model or dataset",
        )
        for part in entry.pieces:
            start, stop = max(piece.start, part.start), min(piece.stop, part.stop)
            if start < stop:
                read = out[start - piece.start : stop - piece.start]
                checking = self._checking(part) if start == part.start else nullcontext()
                with checking, self._opened(part, entry) as file:
                    read.copy_(file.get_slice(slot)[start - part.start : stop - part.start])
                    finite = self.allow_nonfinite or is_finite(read)
                if not finite:
                    raise self.nonfinite(_describe_rows(read, slot, piece.name, start, part))

    def dtype(self, table: str, slot: str) -> torch.dtype:
        """Return the stored dtype of a slot."""
        entry = self.manifest.tables[table]
        with self._opened(entry.pieces[0], entry) as file:
            return file.get_slice(slot)[:0].dtype

    @contextmanager
    def _opened(self, part: PieceFile, entry: TableEntry) -> Iterator[Any]:
        """Open a file of a table, and compare its header with the manifest.

        Raises:
            UserError: it cannot be read, or its tensors have other names, shapes or types.
        """
        path = self.folder / part.file
        try:
            with safe_open(str(path), framework="pt") as file:
                found = {slot: tuple(file.get_slice(slot).get_shape()) for slot in file.keys()}  # noqa: SIM118
                expected = {slot: (part.stop - part.start, *shape[1:]) for slot, shape in entry.shapes.items()}
                types = {slot: file.get_slice(slot).get_dtype() for slot in found}
                require(
                    found == expected and types["weight"] in _WEIGHT_TYPES,
                    f"checkpoint file {path} has tensors of other shapes or types ({found}, {types}) than its manifest "
                    f"says ({expected}); use another checkpoint",
                )
                yield file
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"checkpoint file {path} is damaged ({one_line(error)}); use another checkpoint") from error

    def verify(self) -> None:
        """Verify the checksum of every file, and that no parameter and no optimizer state is NaN or infinite.

        Raises:
            UserError: a checksum differs, or elements are not finite.
        """
        damaged = [message for part in self._files() if (message := self._damage(part))]
        require(not damaged, "; ".join(damaged))
        rest = self.rest()
        bad = [f"{name} ({REST})" for key in CHECKED_REST for name in nonfinite_tensors(rest.get(key), key)]
        for name, entry in self.manifest.tables.items():
            for part in entry.pieces:
                with self._opened(part, entry) as file:
                    for slot in entry.shapes:
                        if not is_finite(rows := file.get_tensor(slot)):
                            bad.append(_describe_rows(rows, slot, name, part.start, part))
        if bad:
            raise self.nonfinite("; ".join(bad))

    def verify_files(self, ranks: Ranks) -> None:
        """Verify the checksum of every file, each rank of a share of the files; all ranks call it together.

        Raises:
            UserError: on all ranks, if a checksum differs.
        """
        files = list(self._files())

        def check() -> None:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(self._check, files[ranks.rank :: ranks.ranks]))

        ranks.run_on_all_ranks(check)
        self._checked |= {part.file for part in files}

    def nonfinite(self, where: str) -> UserError:
        return UserError(
            f"checkpoint {self.folder} has NaN or infinite values: {where}; use an earlier checkpoint, or examine this "
            "checkpoint with --allow_nonfinite true"
        )

    @contextmanager
    def _checking(self, part: PieceFile) -> Iterator[None]:
        """Context in which a file is read while its checksum is computed; a wrong checksum precedes other errors."""
        with ThreadPoolExecutor(1) as pool:
            check = pool.submit(self._check, part)
            try:
                yield
            finally:
                check.result()

    def _damage(self, part: PieceFile) -> str:
        """Return the fault of a file; empty if its checksum is right."""
        try:
            self._check(part)
            return ""
        except UserError as error:
            return str(error)

    def _files(self) -> Iterable[PieceFile]:
        yield self.manifest.rest
        for entry in self.manifest.tables.values():
            yield from entry.pieces

    def _check(self, part: PieceFile) -> None:
        if part.file in self._checked:
            return
        path = self.folder / part.file
        require(
            path.stat().st_size == part.bytes and file_sha256(path) == part.sha256,
            f"checkpoint file {path} is damaged (its checksum differs); use another checkpoint",
        )
        self._checked.add(part.file)


def _describe_rows(rows: Tensor, slot: str, table: str, start: int, part: PieceFile) -> str:
    """Return which rows of a table, from row ``start`` on, are not finite."""
    first = int((~rows.isfinite()).nonzero()[0, 0])
    return f"{slot} of table {table}, first in row {start + first:,} ({part.file})"


def _write_piece(partial: Path, piece: PieceTensors) -> dict[str, Any]:
    """Write the file of a piece, and return its entry for ``_table_entries``."""
    rows = piece.piece
    name = f"tables/{rows.name}.{rows.start}.safetensors"
    (partial / name).parent.mkdir(parents=True, exist_ok=True)
    tensors = {slot: _in_host_memory(tensor.detach()) for slot, tensor in piece.tensors.items()}
    save_file(tensors, str(partial / name))
    # Each rank flushes its own files: on a network file system only the machine that wrote them can.
    flush(partial / name)
    return {
        "table": rows.name,
        "shapes": {slot: [rows.table_rows, *tensor.shape[1:]] for slot, tensor in tensors.items()},
        "file": dataclasses.asdict(PieceFile.of(partial, name, rows.start, rows.stop)),
    }


def _in_host_memory(tensor: Tensor) -> Tensor:
    """Return the tensor itself on a CPU, or a copy in page-locked memory of a tensor on a GPU."""
    if not tensor.is_cuda:
        return tensor.contiguous()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(tensor)


def _publish(partial: Path, folder: Path) -> None:
    """Flush a complete checkpoint to disk and rename it."""
    for path in [partial / MANIFEST, partial / REST, *(p for p in partial.rglob("*") if p.is_dir()), partial]:
        flush(path)
    previous = _hidden_sibling(folder, "previous")
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    partial.rename(folder)
    flush(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _hidden_sibling(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # The file system has no hard links.
        shutil.copy2(source, target)
