"""Batches, which data streams give to models.

Shape suffixes: B samples, F tables, I dense features, N indices of all bags together.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.own_code import with_place
from lightning_dlrm.contracts.schema import Features

NO_GROUP = -(2**63)
"""Number in ``Batch.group`` of samples without a value of the column."""


class BatchKey:
    """The identity of a batch's ids, which all copies of the ids share; a key of weak dictionaries."""


@dataclass(kw_only=True)
class SparseIds:
    """Row ids of every table for every sample, one-hot and multi-hot alike.

    One-hot: ``values`` is [B, F] and ``offsets`` is None. Multi-hot: ``values`` is [N], bag after
    bag, sample by sample and within a sample table by table: bag ``b * F + f`` spans
    ``offsets[b * F + f] : offsets[b * F + f + 1]`` and may be empty.
    """

    values: Tensor
    """int32 [B, F] or [N], each in [0, rows of its table)."""
    tables: int
    """F."""
    offsets: Tensor | None = None
    """int64 [B * F + 1], ascending from 0 to N."""
    weights: Tensor | None = None
    """float, shape of ``values``: per-sample weights, differentiable if they are learned; None means 1."""
    key: BatchKey = field(default_factory=BatchKey, init=False, repr=False, compare=False)
    """Key of the rows that lookups prefetch for these ids. Copies made by Batch have the same key; ids that are changed
    by ``map`` or ``dataclasses.replace`` have a new key, because they may need other rows."""

    def __len__(self) -> int:
        """B, the number of samples."""
        if self.offsets is None:
            return self.values.shape[0]
        return (self.offsets.shape[0] - 1) // self.tables if self.tables else 0

    def bag_of_each(self) -> Tensor:
        """Return the bag of each index: int64 [number of values]; bag ``b * F + f`` is of table f."""
        if self.offsets is None:
            return torch.arange(self.values.numel(), device=self.values.device)
        # With output_size, torch does not wait for a GPU.
        return torch.repeat_interleave(self.offsets.diff(), output_size=len(self.values))

    def lengths(self) -> Tensor:
        """Return the number of indices in each bag: int64 [B, F]."""
        if self.offsets is None:
            return torch.ones_like(self.values, dtype=torch.int64)
        return self.offsets.diff().view(-1, self.tables)

    def of_tables(self, columns_G: Tensor) -> "SparseIds":
        """Return the ids of some of the tables.

        Args:
            columns_G: int64 [G], positions among the F tables in any order; repeats are allowed.
        """
        if self.offsets is None:
            values = self.values.index_select(1, columns_G)
            weights = None if self.weights is None else self.weights.index_select(1, columns_G)
            return SparseIds(values=values, tables=len(columns_G), weights=weights)
        starts_b = self.offsets[:-1].view(-1, self.tables).index_select(1, columns_G).flatten()
        lengths_b = self.lengths().index_select(1, columns_G).flatten()
        ends_b = torch.cumsum(lengths_b, 0)
        # Each index keeps its place within its bag.
        moved_N = torch.repeat_interleave(starts_b - (ends_b - lengths_b), lengths_b)
        source_N = moved_N + torch.arange(len(moved_N), device=moved_N.device)
        return SparseIds(
            values=self.values[source_N],
            tables=len(columns_G),
            offsets=torch.cat([ends_b.new_zeros(1), ends_b]),
            weights=None if self.weights is None else self.weights[source_N],
        )

    def within(self, starts_F: Tensor, stops_F: Tensor) -> "SparseIds":
        """Return the ids in a range of each table's rows, counted from the range's first row, without all other ids."""
        bag_N, values_N = self.bag_of_each(), self.values.reshape(-1)
        table_N = bag_N % max(self.tables, 1)
        start_N = starts_F.index_select(0, table_N)
        kept_N = (values_N >= start_N) & (values_N < stops_F.index_select(0, table_N))
        ends_b = torch.bincount(bag_N[kept_N], minlength=len(self) * self.tables).cumsum(0)
        return SparseIds(
            values=(values_N - start_N)[kept_N].to(self.values.dtype),
            tables=self.tables,
            offsets=torch.cat([ends_b.new_zeros(1), ends_b]),
            weights=None if self.weights is None else self.weights.reshape(-1)[kept_N],
        )

    def without(self, row: int) -> "SparseIds":
        """Return the ids with weight 0 where they are ``row``, and with the same key."""
        kept = (self.values != row).to(torch.float32)
        ids = replace(self, weights=kept if self.weights is None else kept * self.weights)
        ids.key = self.key
        return ids

    def map(self, change: Callable[[Tensor | None], Any]) -> "SparseIds":
        """Return ids with changed tensors and a new key; ``change`` is called for each tensor, and for None."""
        return SparseIds(
            values=change(self.values),
            tables=self.tables,
            offsets=change(self.offsets),
            weights=change(self.weights),
        )


@dataclass(kw_only=True)
class Batch:
    """One rank's slice of a global batch."""

    label: Tensor | None
    """int8 [B], 0 or 1; None if the rows have no labels."""
    dense: Tensor
    """float32 [B, I]; NaN for missing values if the protocol does not replace them."""
    ids: SparseIds
    global_size: int
    """Samples of the global batch, over all ranks: the divisor of a mean over the batch."""
    start: int | None = None
    """Samples of the global batch in the slices of lower ranks; None if the stream does not say."""
    rows: Tensor | None = None
    """int64 [B]: position of each sample in its split, if the stream was asked for it."""
    group: Tensor | None = None
    """int64 [B]: a number of each sample, equal for equal values of a kept column and ``NO_GROUP`` without a value, if
    the stream was asked for it."""
    checked_table_rows: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)
    """``Features.table_rows`` of the features for which a loader has checked the values as ``check_values`` does; None
    if no loader has. Copies made by Batch keep it; ``dataclasses.replace`` resets it, because it may change values."""

    def __len__(self) -> int:
        return self.dense.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.label, self.dense, self.rows, self.group, self.ids.values, self.ids.offsets, self.ids.weights)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def check_form(self, features: Features, dtype: torch.dtype) -> None:
        """Check the shapes and dtypes of a batch's tensors.

        Args:
            features: features of the dataset.
            dtype: of the network's parameters, to which Lightning has converted the batch if it is not float32.

        Raises:
            UserError: one of them differs from what the fields of this class document.
        """
        samples, ids = len(self), self.ids
        sizes: dict[str, tuple[Tensor, tuple[int, ...]]]
        sizes = {} if self.label is None else {"label": (self.label, (samples,))}
        sizes["dense"] = (self.dense, (samples, features.dense))
        if ids.offsets is None:
            sizes["ids.values"] = (ids.values, (samples, len(features.tables)))
        else:
            sizes["ids.offsets"] = (ids.offsets, (samples * len(features.tables) + 1,))
        for name, (tensor, shape) in sizes.items():
            require(tensor.shape == shape, f"{name} has the shape {tuple(tensor.shape)}; expected {shape}")
        require(
            ids.tables == len(features.tables), f"ids.tables is {ids.tables}; expected {len(features.tables)} tables"
        )
        require(
            self.dense.dtype in (torch.float32, dtype),
            f"dense has the dtype {self.dense.dtype}; expected torch.float32",
        )
        require(
            ids.values.dtype in (torch.int32, torch.int64),
            f"ids.values has the dtype {ids.values.dtype}; expected torch.int32",
        )

    def check_values(self, features: Features) -> None:
        """Check the labels, dense values and one-hot ids of a batch on the CPU. NumPy starts no threads for it.

        Raises:
            UserError: a label is neither 0 nor 1, a dense value is infinite (NaN is a missing value), or a table does
                not have a one-hot id. (Lookups refuse multi-hot ids beyond all tables.)
        """
        remedy = "correct the datamodule or its data"
        label = np.empty(0) if self.label is None else self.label.double().numpy()
        if self.label is not None and (wrong := (label != 0) & (label != 1)).any():
            sample = int(wrong.argmax())
            raise UserError(
                f"sample {sample} of a batch has the label {label[sample]:g}; expected 0 (no "
                f"click) and 1 (click): {remedy}"
            )
        # A sum is cheaper than a look at each value.
        if not self.dense.sum().isfinite() and (infinite := self.dense.isinf()).any():
            sample, column = infinite.nonzero()[0].tolist()
            raise UserError(
                f"sample {sample} of a batch has the dense value {self.dense[sample, column].item()} in column "
                f"{column}; expected finite numbers, or NaN for a missing value: {remedy}"
            )
        if self.ids.offsets is not None:
            return
        ids_BF, rows_F = self.ids.values.numpy(), np.array(features.table_rows, np.int32)
        if (wrong_BF := (ids_BF >= rows_F) | (ids_BF < 0)).any():
            sample, table = np.argwhere(wrong_BF)[0].tolist()
            name, rows = list(features.tables.items())[table]
            raise UserError(
                f"sample {sample} of a batch has the id {ids_BF[sample, table]} of table {name}; expected 0 to "
                f"{rows - 1:,}: {remedy}"
            )

    def map(self, change: Callable[[Tensor | None], Any]) -> "Batch":
        """Return a copy of the batch; ``change`` copies each tensor, and is called for None.

        The ids keep their key: they must select the same rows.
        """
        ids = self.ids.map(change)
        ids.key = self.ids.key
        batch = Batch(
            label=change(self.label),
            dense=change(self.dense),
            ids=ids,
            global_size=self.global_size,
            start=self.start,
            rows=change(self.rows),
            group=change(self.group),
        )
        batch.checked_table_rows = self.checked_table_rows
        return batch

    def to(self, device: Any, non_blocking: bool = False) -> "Batch":
        """Return a copy on a device; copies from page-locked memory are asynchronous."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.to(device, non_blocking=non_blocking or tensor.is_pinned())

        return self.map(move)

    def pin_memory(self) -> "Batch":
        """Return a copy in page-locked memory."""
        return self.map(lambda tensor: None if tensor is None else tensor.pin_memory())


def require_batch(batch: object, features: Features, network: torch.nn.Module, datamodule: object) -> None:
    """Refuse what a dataloader yields if a network of these features cannot take it.

    Batches that a loader has checked cost nothing here; values of batches on a device are not read.

    Args:
        batch: what the dataloader yields.
        features: features of the dataset.
        network: its parameters have the dtype that dense values may have beside float32.
        datamodule: where the dataloader is from, for the message; None if it is unknown.

    Raises:
        UserError: it is not a Batch, or see ``Batch.check_form`` and ``Batch.check_values``.
    """
    if isinstance(batch, Batch) and batch.checked_table_rows == features.table_rows:
        return
    source = "a dataloader" if datamodule is None else f"a dataloader of {with_place(type(datamodule))}"
    if not isinstance(batch, Batch):
        raise UserError(
            f"{source} yields a {type(batch).__name__}; expected a Batch of lightning_dlrm: let it yield "
            "Batch(label=..., dense=..., ids=SparseIds(...), global_size=...)"
        )
    dtype = next((parameter.dtype for parameter in network.parameters()), torch.float32)
    try:
        batch.check_form(features, dtype)
    except UserError as error:
        raise UserError(f"{source} yields a batch whose {error}: correct the datamodule") from error
    if batch.dense.device.type == "cpu":
        batch.check_values(features)
