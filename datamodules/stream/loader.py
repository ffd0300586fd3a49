"""The loaders that Lightning iterates: a background thread over the reader, and a position to resume from."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.parquet import part_files
from datamodules.stream.order import Order, Shuffle
from datamodules.stream.reader import Decoder, read_batches
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import DatasetSchema, SplitName

_BATCHES_AHEAD = 4


class Loader:
    """Splits of a dataset folder, batch by batch; each iteration gives every row once, in file order.

    Args:
        folder: the dataset folder.
        schema: its schema.
        splits: one split of the schema, or several, one after the other.
        batch_size: rows of a global batch, over all ranks.
        rank, world: whose slice of every batch, of how many.
        rows: fill ``Batch.rows``; rows are numbered on from split to split.
    """

    def __init__(
        self,
        folder: Path,
        schema: DatasetSchema,
        splits: Sequence[SplitName],
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        rows: bool = False,
    ) -> None:
        self.folder, self.schema, self.splits = Path(folder), schema, tuple(splits)
        self.batch_size = batch_size
        self._rank, self._world, self._rows = rank, world, rows
        self._files = tuple(part_files(schema, self.splits))

    def __len__(self) -> int:
        """Global batches of an epoch. (Without a length Lightning fetches ahead and loses a batch on resume.)"""
        return -(-sum(file.rows for file in self._files) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._iterate(self._order("none"), 0)

    def _order(self, shuffle: Shuffle, seed: int = 0, epoch: int = 0) -> Order:
        groups = [file.row_groups for file in self._files]
        return Order(groups, batch_size=self.batch_size, shuffle=shuffle, seed=seed, epoch=epoch)

    def _iterate(self, order: Order, first: int) -> "BackgroundIterator":
        def batches() -> Generator[Batch, None, None]:
            decoder = Decoder(self.folder, self.schema, self._files)
            try:
                yield from read_batches(
                    decoder, order, first=first, rank=self._rank, world=self._world, rows=self._rows
                )
            finally:
                decoder.close()

        return BackgroundIterator(batches, _BATCHES_AHEAD)


class TrainingLoader(Loader):
    """A loader with an order for every epoch and a position that moves on through them.

    Iterating starts at the position and ends with the epoch; the next iteration goes on with the
    next epoch. The position is what ``state_dict`` holds, so that a run resumes with the batch that
    would have come next, on any number of ranks.

    Args:
        shuffle: ``window`` or ``none``; see ``datamodules.stream.order``.
        seed: chooses the orders.
        options: those of ``Loader``.
    """

    def __init__(
        self,
        folder: Path,
        schema: DatasetSchema,
        splits: Sequence[SplitName],
        *,
        shuffle: Shuffle,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(folder, schema, splits, **options)
        self._shuffle: Shuffle = shuffle
        self._seed = seed
        self._epoch_batches = len(self)
        self._epoch = self._batch = 0
        self.wait_seconds = 0.0
        """Time that whoever iterates has waited for batches, since the loader was made."""

    def __iter__(self) -> Iterator[Batch]:
        if self._batch >= self._epoch_batches:
            self._epoch, self._batch = self._epoch + 1, 0
        order = self._order(self._shuffle, self._seed, self._epoch)
        # Decoding starts now, not at the first batch.
        return self._count(self._iterate(order, self._batch), self._epoch, self._batch)

    def limit_epoch(self, batches: int) -> None:
        """Ends every epoch after so many batches, as a trainer does that takes fewer than there are."""
        self._epoch_batches = batches

    def _count(self, source: Iterator[Batch], epoch: int, first: int) -> Iterator[Batch]:
        for index in range(first, self._epoch_batches):
            start = time.perf_counter()
            batch = next(source)
            self.wait_seconds += time.perf_counter() - start
            self._epoch, self._batch = epoch, index + 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position (of the next batch that will be handed out) and what it is a position in."""
        return {"epoch": self._epoch, "batch": self._batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a position.

        Raises:
            UserError: the position is one in another order of samples.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise UserError(
                    f"the checkpoint stopped amid data with {name.replace('_', ' ')} {state.get(name)}, this run has "
                    f"{mine}: resume with the same data, seed, shuffle and batch size, or start a new run"
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
    """Runs an iterator in a thread, a bounded number of items ahead.

    An error in the thread is raised where its item would have come. The thread ends when the
    iterator is exhausted, closed or dropped, and at the latest with the interpreter.

    Args:
        source: makes the iterator; called in the thread, which must be its only user.
        ahead: most items that wait to be handed out.
    """

    def __init__(self, source: Callable[[], Generator[Any, None, None]], ahead: int) -> None:
        items: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._items, self._slots, self._done = items, threading.Semaphore(ahead), False
        stop = threading.Event()
        thread = threading.Thread(
            target=_produce, args=(source, items, self._slots, stop), name="batch reader", daemon=True
        )
        thread.start()
        # Also runs before the interpreter ends: a thread inside pyarrow would crash then.
        self._finalizer = weakref.finalize(self, _stop, thread, self._slots, stop)

    def __iter__(self) -> "BackgroundIterator":
        return self

    def __next__(self) -> Any:
        if self._done:
            raise StopIteration
        kind, item = self._items.get()
        if kind == "item":
            self._slots.release()
            return item
        self.close()
        if kind == "error":
            raise item
        raise StopIteration

    def close(self) -> None:
        """Ends the thread; what it had ready is lost."""
        self._done = True
        self._finalizer()


# The thread's function knows nothing of the iterator, which could not be dropped otherwise.
def _produce(
    source: Callable[[], Generator[Any, None, None]],
    items: "queue.SimpleQueue[tuple[str, Any]]",
    slots: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        iterator = source()
        try:
            while slots.acquire() and not stop.is_set():
                items.put(("item", next(iterator)))
        finally:
            iterator.close()
    except StopIteration:
        items.put(("end", None))
    except BaseException as error:
        items.put(("error", error))


def _stop(thread: threading.Thread, slots: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    slots.release()
    if thread is not threading.current_thread():
        thread.join()
