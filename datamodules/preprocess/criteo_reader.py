"""The reader of Criteo's text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from datamodules.preprocess.criteo_tsv import COLUMNS, parse, parse_good, piece_of_plain, pieces_of_text
from datamodules.preprocess.sources import RawFile
from datamodules.preprocess.staging import Reader
from datamodules.values import staged_name
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, CRITEO_DENSE

_STAGED = {name: staged_name("number", name) for name in CRITEO_DENSE} | {
    name: staged_name("hash", name) for name in CRITEO_CATEGORICAL
}


@dataclass(frozen=True, kw_only=True)
class CriteoReader(Reader):
    """Reader of the pieces of a file of Criteo's text, with a parser for this format."""

    labelled: bool

    expected = f"Criteo lines of {len(COLUMNS)} fields"

    @property
    def key(self) -> list[Any]:
        return ["criteo"]

    def pieces(self, source: RawFile, index: int | None, piece_bytes: int) -> Iterator[bytes]:
        if index is None:
            yield from pieces_of_text(source, piece_bytes)
        else:
            yield piece_of_plain(source, index, piece_bytes)

    def parse(self, piece: bytes) -> list[pa.Table]:
        return _staged([parse(piece, self.labelled)] if piece else [])

    def parse_good(self, piece: bytes) -> tuple[list[pa.Table], list[tuple[int, str]]]:
        tables, faults = parse_good(piece, self.labelled) if piece else ([], [])
        return _staged(tables), faults

    def count_lines(self, piece: bytes, rows: int) -> int:
        return rows


def _staged(tables: list[pa.Table]) -> list[pa.Table]:
    return [table.rename_columns([_STAGED.get(name, name) for name in table.column_names]) for table in tables]
