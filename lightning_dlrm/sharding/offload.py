"""Choice of the tables that stay in host memory if they do not all fit on one device."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.sharding.costs import TableLoad, UniqueRows, format_bytes

_CACHED_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class HostPlacement:
    """Tables on the device, and tables in host memory."""

    on_host: tuple[str, ...]
    """Names of the tables in host memory."""
    cut: Mapping[str, int]
    """Name of a table in ``on_host`` -> number of its first rows that are on the device."""
    device_bytes: int
    """Bytes on the device: tables with their optimizer state, and the cached rows."""
    cached_bytes: int
    """Bytes of cached rows: those of three batches, which are fetched, used and written back."""
    host_bytes: int
    fetched: Mapping[str, float]
    """Table in host memory -> expected unique rows of a batch, which each step fetches and writes back."""
    bus_bytes: float
    """Bytes that a step moves to the device; as many move back."""


class _Offload:
    """Arithmetic on tables of which some are in host memory."""

    def __init__(self, tables: Sequence[TableLoad], batch_size: int) -> None:
        self.tables = {table.name: table for table in tables}
        self.traffic = {table.name: UniqueRows(table, batch_size) for table in tables}
        self.first: dict[str, int] = {}
        """Name of a table in host memory -> number of its first rows that are on the device."""

    def fetched(self, name: str) -> float:
        """Return the expected rows of a batch that are fetched from host memory."""
        return self.traffic[name].between(self.first.get(name, 0), self.tables[name].rows)

    def fetched_bytes(self, name: str) -> float:
        return self.fetched(name) * self.tables[name].bytes_per_row

    def first_bytes(self, host: Iterable[str]) -> int:
        return sum(self.first.get(name, 0) * self.tables[name].bytes_per_row for name in host)

    def cached(self, host: Iterable[str]) -> int:
        """Return the bytes of cached rows if these tables are in host memory."""
        return _CACHED_BATCHES * sum(math.ceil(self.fetched_bytes(name)) for name in host)

    def on_device(self, host: set[str]) -> int:
        """Return the bytes on the device if these tables are in host memory."""
        whole = sum(table.bytes for name, table in self.tables.items() if name not in host)
        return whole + self.first_bytes(host) + self.cached(host)

    def choose(self, movable: Iterable[str], memory: int) -> set[str]:
        """Return the names of the tables to keep in host memory."""
        host: set[str] = set()
        idlest = sorted(movable, key=lambda name: (self.fetched(name) / self.tables[name].bytes, name))
        for name in idlest:
            if self.on_device(host) <= memory:
                break
            # If most rows of a table are cached anyway, the whole table takes less memory.
            if self.on_device(host | {name}) < self.on_device(host):
                host.add(name)
        for name in reversed(idlest):
            if name in host and self.on_device(host - {name}) <= memory:
                host.remove(name)
        return host


def place_tables(tables: Sequence[TableLoad], movable: Iterable[str], batch_size: int, memory: int) -> HostPlacement:
    """Choose which tables stay in host memory.

    Tables move to the host by ascending number of rows that a batch needs for each byte of the table. Tables that fit
    on the device afterwards move back. The memory that then remains is given in equal parts to the first rows of the
    tables in host memory, which are expected to be the busiest rows.

    Args:
        tables: tables of the network.
        movable: names of the tables that may stay in host memory.
        batch_size: samples of a batch.
        memory: bytes that tables, their optimizer state and the cached rows may take on the device.

    Raises:
        UserError: the device has too little memory; the message has the missing bytes.
    """
    offload = _Offload(tables, batch_size)
    host = offload.choose(set(movable), memory)
    device_bytes = offload.on_device(host)
    missing = device_bytes - memory
    require(
        missing <= 0,
        f"the tables and cached rows on the device take {device_bytes:,} bytes ({format_bytes(device_bytes)}), the "
        f"device has {memory:,}: {missing:,} bytes ({format_bytes(missing)}) too few; "
        f"{format_bytes(offload.cached(host))} are for the cached rows of three batches: use a smaller batch or a "
        "smaller width",
    )
    # Tables that share a column stay whole: an id reads a row of each of them.
    cuttable = [table for table in tables if table.name in host and "/" not in table.name]
    # No table fits with all of its rows, or it would have moved back.
    cut = {table.name: -missing // len(cuttable) // table.bytes_per_row for table in cuttable}
    offload.first = {name: first for name, first in cut.items() if first}
    return HostPlacement(
        on_host=tuple(table.name for table in tables if table.name in host),
        cut=offload.first,
        device_bytes=offload.on_device(host),
        cached_bytes=offload.cached(host),
        host_bytes=sum(offload.tables[name].bytes for name in host) - offload.first_bytes(host),
        fetched={table.name: offload.fetched(table.name) for table in tables if table.name in host},
        bus_bytes=sum(map(offload.fetched_bytes, host)),
    )
