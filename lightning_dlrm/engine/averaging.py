"""Averages of a model's parameters over the steps of a fit, tables included.

A table row that a step does not update keeps its value, so its average is updated later: just before the row changes,
for all steps in which it did not. A step then averages only the rows that it updates, and the result equals averaging
every row at every step.

Shape suffixes: R rows of this rank, U updated rows, D width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.engine.fit_length import planned_steps
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.sharding.checkpoint import CheckpointReader
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tables.table import TablePiece

AVERAGE, AVERAGED_STEPS = "average", "averaged_steps"
"""Slots of a table in a checkpoint: the average [R, D], and the number of steps in it, int32 [R]."""
KEY = "averages"
"""Key of all other state of the averages in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """Settings of an average of the parameters of many steps, which evaluations use and training does not.

    The average is exponential, a <- d a + (1 - d) w after each step, as in Polyak and Juditsky (1992) with a memory of
    1 / (1 - d) steps; until there are as many steps, all have the same weight. It takes as much memory as the
    parameters in float32 and 4 bytes a table row, and during a validation as much as the parameters once more.

    Args:
        decay: d, 0 to 1; 1 for the plain mean of all steps.
        start_share: share of the fit's steps before the first averaged step, 0 to below 1.
    """

    decay: float = 0.99
    start_share: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.decay <= 1, f"averaging.decay is {self.decay}; expected 0 to 1")
        require(
            0 <= self.start_share < 1, f"averaging.start_share is {self.start_share}; expected 0, or a share below 1"
        )


def kept_share(decay: float, before_U: Tensor, steps: int) -> Tensor:
    """Return the weight of an average of ``before_U`` steps in that of ``steps`` steps, float64 [U].

    Step k keeps min(d, (k - 1) / k) of the average, so that the first steps have the same weight. The product over k
    telescopes to m / n while (k - 1) / k is the smaller factor, and is a power of d after that.
    """
    before_U = before_U.double()
    if decay == 1:
        return before_U / steps
    equal = int(1 / (1 - decay))
    means_U = before_U.clamp(max=equal) / min(steps, equal)
    return means_U * decay ** (max(steps, equal) - before_U.clamp(min=equal))


def mix(average: Tensor, weight: Tensor, kept: Tensor | float) -> Tensor:
    """Return kept * average + (1 - kept) * weight, row by row, in the average's dtype, on the weight's device."""
    # After a fit on a GPU, the module is on the CPU.
    average, weight = average.to(weight.device), weight.to(average.dtype)
    share = torch.as_tensor(kept, dtype=torch.float64, device=weight.device)
    share = (1 - share).to(weight.dtype).view(-1, *[1] * (weight.dim() - 1)) if weight.dim() else 1 - share
    # If nothing is kept, the result is the weight itself, because an average of no steps may hold any values.
    return torch.where(share == 1, weight, torch.lerp(average, weight, share.to(weight.dtype)))


class WeightAverages:
    """The averages of a network under training.

    Args:
        network: the network; its parameters and floating-point buffers, such as running means of batch
            normalization, are averaged.
        settings: see Averaging.
        start_step: number of optimizer steps before the first averaged step.

    Raises:
        UserError: tables are in host memory.
    """

    def __init__(self, network: CTRNetwork, settings: Averaging, start_step: int) -> None:
        for lookup in network.lookups():
            require(
                not lookup.storage.on_host,
                "model.averaging needs tables on the training device, but tables.on_host keeps some in host memory: "
                "leave one of the two out",
            )
        self.settings = settings
        self.start_step = start_step
        self._network = network
        self.lookups = [lookup for lookup in network.lookups() if lookup.weight.requires_grad]
        self.dense = dict(_dense_tensors(network))
        self.dense_average = {name: _zeros_like(tensor) for name, tensor in self.dense.items()}
        self.dense_steps = 0
        # Pages of zeros take no memory until they are written.
        self.tables: list[dict[str, Tensor]] = [
            {
                AVERAGE: _zeros_like(lookup.weight.detach()),
                AVERAGED_STEPS: torch.zeros(len(lookup.weight), dtype=torch.int32, device=lookup.weight.device),
            }
            for lookup in self.lookups
        ]
        self._trained: list[tuple[Tensor, Tensor]] | None = None

    @torch.no_grad()
    def before_batch(self, steps_done: int) -> None:
        """Update the averages of dense parameters, before a forward pass changes running means."""
        counted = steps_done - self.start_step
        if counted > self.dense_steps:
            for name, value in self._dense_averages(counted).items():
                self.dense_average[name].copy_(value)
            self.dense_steps = counted

    @torch.no_grad()
    def before_step(self, steps_done: int) -> None:
        """Update the averages of the rows that the next step changes.

        Args:
            steps_done: number of optimizer steps before the next one.
        """
        counted = steps_done - self.start_step
        if counted < 1:
            return
        for lookup, state in zip(self.lookups, self.tables, strict=True):
            gradient = lookup.gradient()
            if gradient is not None:
                rows = gradient.rows
                kept_U = kept_share(self.settings.decay, state[AVERAGED_STEPS].index_select(0, rows), counted)
                weight_UD = lookup.weight.detach().index_select(0, rows)
                state[AVERAGE].index_copy_(0, rows, mix(state[AVERAGE].index_select(0, rows), weight_UD, kept_U))
                state[AVERAGED_STEPS].index_fill_(0, rows, counted)

    @torch.no_grad()
    def put_in(self, steps_done: int) -> None:
        """Replace the parameters by their averages over ``steps_done`` steps, until ``take_out``."""
        assert self._trained is None
        counted = steps_done - self.start_step
        if counted < 1:
            return
        # Since the fit the module may have been moved to another device and back, to other memory.
        self.dense = dict(_dense_tensors(self._network))
        weights = [(self.dense[name], value) for name, value in self._dense_averages(counted).items()]
        for lookup, state in zip(self.lookups, self.tables, strict=True):
            kept_R = kept_share(self.settings.decay, state[AVERAGED_STEPS], counted)
            weights.append((lookup.weight.data, mix(state[AVERAGE], lookup.weight.data, kept_R)))
        self._trained = [(weight, weight.clone()) for weight, _ in weights]
        for weight, average in weights:
            weight.copy_(average)

    @torch.no_grad()
    def take_out(self) -> None:
        """Restore the parameters that ``put_in`` replaced, bit for bit."""
        trained, self._trained = self._trained or [], None
        for weight, value in trained:
            weight.copy_(value)

    def slots(self) -> dict[EmbeddingTables, dict[str, Tensor]]:
        """Return the tensors that a checkpoint keeps of each table beside its rows and optimizer state."""
        assert self._trained is None
        return dict(zip(self.lookups, self.tables, strict=True))

    def state(self, steps_done: int) -> dict[str, Any]:
        """Return the state that a checkpoint keeps beside ``slots``."""
        return {
            "settings": asdict(self.settings) | {"start_step": self.start_step},
            "counted": max(0, steps_done - self.start_step),
            "dense": self.dense_average,
            "dense_steps": self.dense_steps,
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any], reader: CheckpointReader) -> None:
        """Load what ``state`` and ``slots`` returned.

        Raises:
            UserError: the averages were made with other settings.
        """
        ours = asdict(self.settings) | {"start_step": self.start_step}
        require(
            state["settings"] == ours,
            f"checkpoint {reader.folder} averages parameters with {_words(state['settings'])}, this run with "
            f"{_words(ours)}: resume with the same settings and length of the fit, or start a new run",
        )
        for name, average in self.dense_average.items():
            average.copy_(state["dense"][name])
        self.dense_steps = state["dense_steps"]
        for lookup, slots in zip(self.lookups, self.tables, strict=True):
            for piece in lookup.pieces:
                for slot, values in slots.items():
                    reader.read_rows(piece, slot, piece.of(values))

    def _dense_averages(self, counted: int) -> dict[str, Tensor]:
        kept = float(kept_share(self.settings.decay, torch.tensor(self.dense_steps), counted))
        return {name: mix(self.dense_average[name], tensor, kept) for name, tensor in self.dense.items()}


@torch.no_grad()
def average_rows(state: Mapping[str, Any], reader: CheckpointReader, piece: TablePiece, weight_RD: Tensor) -> None:
    """Replace rows that were read from a checkpoint by their saved averages, for an evaluation.

    Args:
        state: returned by ``WeightAverages.state``.
        reader: the checkpoint.
        piece: the piece of a table that the rows are.
        weight_RD: the trained rows; modified in place.
    """
    if state["counted"] < 1 or AVERAGE not in reader.manifest.tables[piece.name].shapes:
        return
    average_RD = _zeros_like(weight_RD)
    steps_R = torch.empty(len(weight_RD), dtype=torch.int32, device=weight_RD.device)
    reader.read_rows(piece, AVERAGE, average_RD)
    reader.read_rows(piece, AVERAGED_STEPS, steps_R)
    kept_R = kept_share(state["settings"]["decay"], steps_R, state["counted"])
    weight_RD.copy_(mix(average_RD, weight_RD, kept_R))


@torch.no_grad()
def averaged_dense(state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return dense parameters by name with averages in place of their values, for an evaluation."""
    if state["counted"] < 1:
        return dict(weights)
    kept = float(kept_share(state["settings"]["decay"], torch.tensor(state["dense_steps"]), state["counted"]))
    averages = state["dense"]
    return {name: mix(averages[name], w, kept) if name in averages else w for name, w in weights.items()}


def _dense_tensors(network: CTRNetwork) -> Iterator[tuple[str, Tensor]]:
    """Yield every floating-point tensor of the network's state that is not a table, with its name."""
    tables = {id(lookup.weight) for lookup in network.lookups()}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in tables and tensor.is_floating_point():
            yield name, tensor.detach() if isinstance(tensor, nn.Parameter) else tensor


def _zeros_like(weight: Tensor) -> Tensor:
    # In bfloat16 an average of many steps would stop changing: a step changes it by less than its precision.
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


class AverageForEvaluation(pl.Callback):
    """Callback that keeps averages of a module's parameters during a fit, and evaluates with them.

    Args:
        settings: see Averaging.
    """

    def __init__(self, settings: Averaging) -> None:
        self.settings = settings
        self.averages: WeightAverages | None = None
        self.saved: tuple[dict[str, Any], CheckpointReader] | None = None
        """State of the checkpoint from which the next fit continues."""
        self._steps_done = 0
        """Number of optimizer steps of the parameters; also valid when another trainer evaluates them."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # An earlier fit may have failed before it took the state.
        self.saved = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: Lightning has just moved the parameters to the training device.
        start = self.settings.start_share
        first_step = int(start * planned_steps(trainer, "averaging")) if start else 0
        self.averages = WeightAverages(pl_module.network, self.settings, first_step)  # type: ignore[arg-type]
        if self.saved is not None:
            self.averages.load(*self.saved)
            self.saved = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps_done = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        assert self.averages is not None
        self.averages.before_batch(trainer.global_step)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        assert self.averages is not None
        self.averages.before_step(trainer.global_step)
        self._steps_done = trainer.global_step + 1

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.averages is not None:
            self.averages.put_in(self._steps_done)

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        # A checkpoint that is saved after the validation holds the trained parameters.
        if self.averages is not None:
            self.averages.take_out()

    on_test_epoch_end = on_predict_epoch_end = on_exception = on_validation_epoch_end
