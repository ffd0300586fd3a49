"""Tables in pieces on all ranks, each piece in the host memory of its rank.

The rows that the ranks ask for are fetched as soon as their ids have arrived, while the batch before is
under way; vectors travel from device to device, as those of other tables.

Shape suffixes: D width, E entries, V units that all ranks ask of this one.
"""

import torch
from torch import Tensor

from lightning_dlrm.contracts.lookup import RowGradient
from lightning_dlrm.sharding.lookup import Request, ShardedTables, sum_units
from lightning_dlrm.sharding.needs import Asked
from lightning_dlrm.tables.host_tables import HostRows, RowsAtHand


class ShardedHostTables(HostRows, ShardedTables):
    """Those pieces that a plan gives to this rank, in host memory; for the arguments see ShardedTables."""

    @staticmethod
    def _place(device: torch.device) -> torch.device:
        return torch.device("cpu")

    def device(self) -> torch.device:
        """See HostRows.device."""
        return self.rows.table_offsets.device

    def _send_ids(self, request: Request) -> None:
        super()._send_ids(request)
        if request.fetched is None:
            request.fetched = self.begin(
                lambda: Asked.of(self._copies().on_host(request.entries), None, request.pooled).rows
            )

    def _await(self, request: Request) -> None:
        # From now on an update of theirs is told to others only.
        request.fetched = request.fetched.rows()
        super()._await(request)

    def _units(self, request: Request) -> Tensor:
        rows: RowsAtHand = request.fetched
        return sum_units(rows.weight, rows.lookups.positions(), request.here)

    def _take_gradients(self, request: Request) -> None:
        rows, asked = request.fetched, request.here
        grad_VD = self._received(request.gradients)
        values_UD = rows.lookups.sum_gradients(grad_VD, asked.units, asked.factors)
        self.hold(rows, RowGradient(rows.lookups.rows.long(), values_UD))
