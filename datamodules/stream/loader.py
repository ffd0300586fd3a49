"""The loaders that Lightning iterates: batches from a background thread, and a position to resume from."""

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.folder import Folder, part_files
from datamodules.stream.order import LANES, Order, Shuffle
from datamodules.stream.rows import Decoder, Rows
from datamodules.stream.sources import LARGE, CachedRows, Source, Window, batches_at_once, cache_rows, read_batches
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.memory import available_memory
from lightning_dlrm.contracts.schema import DatasetSchema, SplitName

log = logging.getLogger("lightning_dlrm")

Cache = Literal["none", "memory"]

_BATCHES_AHEAD = 32
_BYTES_AHEAD = 256 * 2**20


def require_kept(folder: str | Path | Folder, schema: DatasetSchema, group: str | None) -> None:
    """
    Raises:
        UserError: ``group`` names no kept column of a dataset folder.
    """
    kept = [column.name for column in schema.by_role("keep")]
    require(
        group is None or group in kept,
        f"{folder} has no kept column {group!r} to group by; it has {', '.join(kept) or 'none'}: name one of them, "
        "or preprocess the log again with the column in role keep",
    )


class Loader:
    """Splits of a dataset folder, batch by batch; each iteration serves every row once.

    Rank r of W reads the r-th of W contiguous ranges of the rows, in file order, so that at most one row group is read
    twice for each rank. All ranks have the same number of batches; a slice may be empty. (The rows of a global batch
    depend on W; the rows of an epoch do not.)

    Args:
        folder: the dataset folder, a path or a URL.
        schema: its schema.
        splits: one split of the schema, or several, one after the other.
        batch_size: rows of a global batch, over all ranks.
        rank, world: the rank whose slices of batches are served, and the world size.
        rows: fill ``Batch.rows``; the numbers continue from split to split.
        cache: ``memory`` to decode the rows once, when they are first needed, and keep them.
        threads: number of threads that decode.
        verify: compare the checksums of pages, at 15 ns a row or about 5% of the reader's speed.
        pin: put batches into page-locked memory, from which a GPU copies faster.
        copies: ranks that share this machine's memory.
        group: the kept column that ``Batch.group`` numbers; None for none.

    Raises:
        UserError: the rows to cache do not fit into memory, or ``group`` is not a kept column.
    """

    def __init__(
        self,
        folder: str | Path | Folder,
        schema: DatasetSchema,
        splits: Sequence[SplitName],
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        rows: bool = False,
        cache: Cache = "none",
        threads: int = 1,
        verify: bool = True,
        pin: bool = False,
        copies: int = 1,
        group: str | None = None,
    ) -> None:
        self.folder, self.schema, self.splits = Folder(folder), schema, tuple(splits)
        require_kept(folder, schema, group)
        self._group = group
        self.batch_size = batch_size
        self._rank, self._world, self._rows, self._threads, self._pin = rank, world, rows, threads, pin
        self._files = tuple(part_files(schema, self.splits))
        self._verify = verify
        self._caches = cache == "memory"
        self._cached_rows: Rows | None = None
        self._spare_buffer: Rows | None = None
        """Buffer of an earlier iteration: memory that was used before costs no page faults."""
        if self._caches:
            self._require_memory(copies)

    def __len__(self) -> int:
        """Return the global batches of an epoch. (Without a length Lightning prefetches a batch and loses it on
        resume.)"""
        return -(-sum(file.rows for file in self._files) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._iterate(self._order("none", lanes=self._world), 0)

    def _order(self, shuffle: Shuffle, seed: int = 0, epoch: int = 0, lanes: int | None = None) -> Order:
        groups = [file.row_groups for file in self._files]
        return Order(groups, batch_size=self.batch_size, shuffle=shuffle, seed=seed, epoch=epoch, lanes=lanes)

    def _cached_range(self) -> tuple[int, int]:
        """Return the positions of the first row that is kept in memory, and of the one after the last."""
        edges = self._order("none", lanes=self._world).edges
        return int(edges[self._rank]), int(edges[self._rank + 1])

    def _require_memory(self, copies: int) -> None:
        start, stop = self._cached_range()
        decoder, available = self._decoder(), available_memory()
        need = decoder.bytes_of(start, stop)
        require(
            need * copies <= available,
            f"data.cache is memory, but {stop - start:,} rows of the {'+'.join(self.splits)} split take "
            f"{need * copies / 2**30:.1f} GiB{f' in {copies} ranks' if copies > 1 else ''}, and "
            f"{available / 2**30:.1f} GiB are free: set data.cache to none",
        )

    def _iterate(self, order: Order, first: int, last: int | None = None) -> "BackgroundIterator":
        def batches() -> Generator[list[Batch], None, None]:
            # Set to None, because another iteration may begin before this one ends.
            buffer, self._spare_buffer = self._spare_buffer, None
            source, table_rows = self._source(order, buffer), self.schema.features.table_rows
            try:
                ranks = {"rank": self._rank, "world": self._world}
                for several in read_batches(source, order, first=first, last=last, rows=self._rows, **ranks):
                    for batch in several:
                        # The decoder has checked every value.
                        batch.checked_table_rows = table_rows
                    yield [batch.pin_memory() for batch in several] if self._pin else several
            finally:
                source.close()
                self._spare_buffer = source.buffer

        return BackgroundIterator(batches, _BATCHES_AHEAD, _BYTES_AHEAD)

    def _source(self, order: Order, buffer: Rows | None) -> Source:
        decoder = self._decoder()
        read: Callable[[int, np.ndarray | None], Rows] = decoder
        if self._caches:
            start, _ = self._cached_range()
            rows = self._decode_all(decoder, order)
            if order.shuffle != "window":
                return CachedRows(rows, start, order)

            def read(group: int, positions: np.ndarray | None) -> Rows:
                first = int(order.group_starts[group])
                if positions is not None:
                    return rows.take(first + positions)
                return rows.slice(first, first + int(order.group_rows[group]))

        return Window(
            read,
            decoder.empty,
            order,
            rank=self._rank,
            world=self._world,
            at_once=batches_at_once(order, self._world),
            threads=self._threads,
            buffer=buffer,
        )

    def _decoder(self) -> Decoder:
        return Decoder(self.folder, self.schema, self._files, self._verify, self._threads, self._group)

    def _decode_all(self, decoder: Decoder, order: Order) -> Rows:
        if self._cached_rows is None:
            began = time.perf_counter()
            self._cached_rows = cache_rows(decoder, order, *self._cached_range(), self._threads)
            log.info(
                "%s: %s rows kept in memory, %.1f MB, decoded in %.1f s",
                "+".join(self.splits),
                f"{len(self._cached_rows):,}",
                self._cached_rows.nbytes / 1e6,
                time.perf_counter() - began,
            )
        return self._cached_rows


class TrainingLoader(Loader):
    """A loader with an order for every epoch, and a position in them that a run resumes from.

    An iteration starts at the position and ends with the epoch; the next iteration serves the next epoch. If
    ``limit_epoch`` allows a next epoch, another thread begins to read it when twice as many rows are left as a window
    holds, so that its first batch is ready in time. ``state_dict`` holds the position, so that a run resumes with the
    next batch, on any number of ranks. Global batch k holds the same rows on any number of ranks.

    Args:
        shuffle: ``window``, ``full`` (which needs the cache) or ``none``; see ``datamodules.stream.order``.
        seed: of the orders.
        options: those of ``Loader``.
    """

    def __init__(
        self,
        folder: str | Path | Folder,
        schema: DatasetSchema,
        splits: Sequence[SplitName],
        *,
        shuffle: Shuffle,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(folder, schema, splits, **options)
        assert shuffle != "full" or self._caches
        self._shuffle: Shuffle = shuffle
        self._seed = seed
        self._epoch_batches = len(self)
        self._epochs = 0.0
        self._epoch = self._batch = 0
        self._next_epoch: tuple[int, BackgroundIterator] | None = None
        """The epoch after the one that is served, and its batches from the first on."""
        self.wait_seconds = 0.0
        """Time that the training loop has waited for batches since the loader was made."""
        self.prefetch: Callable[[Batch], None] | None = None
        """Called with each batch before the previous one is served; not with the first batch of an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        if self._batch >= self._epoch_batches:
            self._epoch, self._batch = self._epoch + 1, 0
        begun, self._next_epoch = self._next_epoch, None
        if begun is not None and begun[0] == self._epoch and self._batch == 0:
            source = begun[1]
        else:
            # Decoding starts now, not at the first batch.
            source = self._begin(self._epoch, self._batch)
        return self._count(source, self._epoch, self._batch)

    def limit_epoch(self, batches: int, epochs: float = 0) -> None:
        """End every epoch after so many batches, like a trainer that takes fewer than there are.

        Args:
            batches: of an epoch.
            epochs: number of epochs that are wanted; no other epoch is read before it is asked for.
        """
        self._epoch_batches, self._epochs = batches, epochs

    def drop_next_epoch(self) -> None:
        """Stop reading an epoch that will not be served."""
        begun, self._next_epoch = self._next_epoch, None
        if begun is not None:
            begun[1].close()

    def _batches_of_window(self) -> int:
        """Return the number of batches whose rows a window holds, which are read before the first batch is ready."""
        if self._shuffle != "window":
            return 1
        largest = max((rows for file in self._files for rows in file.row_groups), default=0)
        return -(-LANES * min(largest, LARGE) // self.batch_size)

    def _begin(self, epoch: int, first: int) -> "BackgroundIterator":
        order = self._order(self._shuffle, self._seed, epoch)
        return self._iterate(order, first, min(self._epoch_batches, order.batches))

    def rank_shares(self, world: int) -> np.ndarray:
        """Return the share of an epoch's rows that each rank serves, float64 [world]."""
        return self._order(self._shuffle, self._seed, self._epoch).rank_shares(world)

    def _cached_range(self) -> tuple[int, int]:
        # Any rank may need any row in some epoch.
        return 0, sum(file.rows for file in self._files)

    def _count(self, source: "BackgroundIterator", epoch: int, first: int) -> Iterator[Batch]:
        upcoming: Batch | None = None
        # While both epochs are read, each gets half of the threads' time, and the next epoch fills its window.
        near_end = self._epoch_batches - 2 * self._batches_of_window()
        for index in range(first, self._epoch_batches):
            start = time.perf_counter()
            batch = next(source) if upcoming is None else upcoming
            upcoming = next(source) if self.prefetch is not None and index + 1 < self._epoch_batches else None
            self.wait_seconds += time.perf_counter() - start
            if self.prefetch is not None and upcoming is not None:
                self.prefetch(upcoming)
            if index + 1 >= near_end and self._next_epoch is None and epoch + 1 < self._epochs:
                self._next_epoch = epoch + 1, self._begin(epoch + 1, 0)
            self._epoch, self._batch = epoch, index + 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position (of the next batch to be served) and the order that it belongs to."""
        return {"epoch": self._epoch, "batch": self._batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to a position.

        Raises:
            UserError: the position belongs to another order of samples.
        """
        for name, mine in self._identity().items():
            require(
                state.get(name) == mine,
                f"the checkpoint is from the middle of an epoch with {name.replace('_', ' ')} {state.get(name)}, "
                f"this run has {mine}: resume with the same data, seed, shuffle and batch size, or start a new run",
            )
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def _identity(self) -> dict[str, Any]:
        return {
            "data_fingerprint": self.schema.data_fingerprint,
            "splits": "+".join(self.splits),
            "shuffle": self._shuffle,
            "seed": self._seed,
            "batch_size": self.batch_size,
        }


class BackgroundIterator:
    """Runs an iterator in a thread, a bounded number of items and bytes ahead.

    An error in the thread is raised when its item is requested. The thread ends when the iterator is exhausted, closed
    or garbage-collected, and at the latest with the interpreter.

    Args:
        source: makes the iterator over lists of items, in the thread. Lists, because passing one item between threads
            costs more than a small batch. Items have their size as ``nbytes``.
        ahead: no list is made while so many items are waiting,
        bytes_ahead: or so many bytes of them.
    """

    def __init__(self, source: Callable[[], Generator[list[Any], None, None]], ahead: int, bytes_ahead: int) -> None:
        self._queue = _Queue(ahead, bytes_ahead)
        self._taken: deque[Any] = deque()
        thread = threading.Thread(target=_produce, args=(source, self._queue), name="batch reader", daemon=True)
        thread.start()
        # Also runs before the interpreter ends, because a thread inside pyarrow would crash then.
        self._finalizer = weakref.finalize(self, _stop, thread, self._queue)

    def __iter__(self) -> "BackgroundIterator":
        return self

    def __next__(self) -> Any:
        while self._finalizer.alive and not self._taken:
            items = self._queue.get()
            if isinstance(items, BaseException):
                self.close()
                raise items
            self._taken.extend(items)
        if not self._taken:
            raise StopIteration
        return self._taken.popleft()

    def close(self) -> None:
        """End the thread and discard its items."""
        self._taken.clear()
        self._finalizer()


class _Queue:
    """The queue of item lists between the background thread and its consumer."""

    def __init__(self, ahead: int, bytes_ahead: int) -> None:
        self._ahead, self._bytes_ahead = ahead, bytes_ahead
        self._lists: deque[tuple[list[Any] | BaseException, int, int]] = deque()
        self._count = self._bytes = 0
        self._stopped = False
        self._changed = threading.Condition()

    def put(self, items: list[Any] | BaseException) -> None:
        """Add items, or the error raised in their place."""
        count, size = (0, 0) if isinstance(items, BaseException) else (len(items), sum(item.nbytes for item in items))
        with self._changed:
            self._lists.append((items, count, size))
            self._count, self._bytes = self._count + count, self._bytes + size
            self._changed.notify_all()

    def get(self) -> list[Any] | BaseException:
        with self._changed:
            self._changed.wait_for(lambda: self._lists)
            items, count, size = self._lists.popleft()
            self._count, self._bytes = self._count - count, self._bytes - size
            self._changed.notify_all()
            return items

    def wait_until_wanted(self) -> bool:
        """Wait until another list is wanted or the iterator is stopped; return whether one is wanted."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or (self._count < self._ahead and self._bytes < self._bytes_ahead)
            )
            return not self._stopped

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


# A function without a reference to the iterator, so that the iterator can be garbage-collected.
def _produce(source: Callable[[], Generator[list[Any], None, None]], queue: _Queue) -> None:
    try:
        iterator = source()
        try:
            while queue.wait_until_wanted():
                queue.put(next(iterator))
        finally:
            iterator.close()
    except BaseException as error:  # including StopIteration, the end
        queue.put(error)


def _stop(thread: threading.Thread, queue: _Queue) -> None:
    queue.stop()
    if thread is not threading.current_thread():
        thread.join()
