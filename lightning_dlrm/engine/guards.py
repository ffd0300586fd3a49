"""Guards of a fit: a NaN or infinite loss or parameter ends it, and predictions at chance level draw a warning."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.models.network import PROBABILITIES, CTRNetwork, place_of, returns_probabilities
from lightning_dlrm.objectives.metrics import chance_deviation, click_rate_log_loss
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.sharding.finite import is_finite, nonfinite_tensors

log = logging.getLogger("lightning_dlrm")

_SCALE = "make the dataset with transform: standard or log1p of these columns"
_LARGE_GRADIENT = 1e3
"""Element of a gradient from which on a gradient of an earlier step is worth naming."""
_DIVERGED = 3
"""Ratio of the log loss to that of the click rate alone, above which a fit has diverged."""


@dataclass(frozen=True)
class Position:
    """The step and batch of a loss."""

    step: int
    """Optimizer step, from 1."""
    epoch: int
    """Epoch, from 1."""
    batch: int
    """Batch of the epoch, from 1."""


class LossGuard(pl.Callback):
    """Callback that ends a fit if a loss, a parameter or an element of the optimizer state is NaN or infinite.

    Losses and logits stay on the device until ``check`` reads them together, before the update of each logged step,
    before each save and at the end. Between checks nothing is computed or read, so the host does not wait for the
    device. Parameters and optimizer state are read before each save and at the end.

    Args:
        rates: learning rates by group, for the message about a NaN or infinite loss.
        large_numbers: dense columns with large numbers, for the message; see ``DatasetSchema.large_numbers``.
    """

    MOST_KEPT = 1024
    """Number of losses after which ``watch`` calls ``check``."""

    def __init__(self, rates: Mapping[str, float], large_numbers: str = "") -> None:
        listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        self._scale = f"the data have large numbers in {large_numbers}: {_SCALE}; or " if large_numbers else ""
        self.advice = (
            f"{self._scale}lower the learning rates ({listed}), warm up longer, or set trainer.gradient_clip_val"
        )
        self.fault = ""
        """What is wrong with the logits of the first batch; empty if nothing is."""
        self._seen_first = False
        self._unseen: list[tuple[Position, Tensor, Tensor]] = []
        self._largest: tuple[int, dict[str, float]] = (0, {})
        self._saved_step = -1

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: object) -> None:
        step = trainer.global_step + 1
        is_logged = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if is_logged:
            # Together, so that every rank ends with the same message.
            Ranks().run_on_all_ranks(self.check)
        if is_logged or not self._largest[1]:
            self.remember_gradients(pl_module.network, step)  # type: ignore[arg-type]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Of a fit that does not save its last step.
        if trainer.global_step != self._saved_step:
            self.check_state(pl_module.network, pl_module.optimizers(False), trainer.global_step)  # type: ignore[arg-type]

    def check_state(self, network: CTRNetwork, optimizer: CTROptimizer | None, step: int) -> None:
        """Check every loss since the last check, and the whole state of the model; all ranks call it together.

        Args:
            network: the network under training.
            optimizer: its optimizer; None to check parameters only.
            step: number of steps done.

        Raises:
            UserError: on all ranks, if a loss, a parameter or an element of the optimizer state of a rank is NaN or
                infinite.
        """

        def check() -> None:
            for lookup in network.lookups():
                lookup.flush()
            self.check()
            refuse_bad_state(network, optimizer, step, self.advice)

        Ranks().run_on_all_ranks(check)
        self._saved_step = step

    def watch(self, loss: Tensor, logits_B: Tensor, position: Position, network: CTRNetwork) -> None:
        """Keep the loss of a batch (0-dim) and its logits, detached, until the next check; warn if those of the first
        batch are probabilities.

        All ranks call it together, because after ``MOST_KEPT`` losses they check together.

        Raises:
            UserError: on all ranks, if a loss of a rank was NaN or infinite.
        """
        if not self._seen_first:
            self._seen_first = True
            if returns_probabilities(logits_B):
                self.fault = f"{place_of(network)} {PROBABILITIES}"
                if Ranks().rank == 0:
                    log.warning(self.fault)
        self._unseen.append((position, loss, logits_B.detach()))
        if len(self._unseen) >= self.MOST_KEPT:
            Ranks().run_on_all_ranks(self.check)

    def remember_gradients(self, network: CTRNetwork, step: int) -> None:
        """Read the largest gradients of a step from the device and keep them for the message."""
        self._largest = (step, gradient_sizes(network))

    def check(self) -> None:
        """Check every loss since the last check.

        Raises:
            UserError: a loss was NaN or infinite.
        """
        unseen, self._unseen = self._unseen, []
        if not unseen or torch.stack([loss for _, loss, _ in unseen]).isfinite().all():
            return
        position, _, logits_B = next(entry for entry in unseen if not entry[1].isfinite())
        samples = (~logits_B.isfinite()).nonzero().flatten().tolist()
        # If all samples are bad, none of them is the cause.
        where = f", first in sample {samples[0]} of it, counted from 0" if 0 < len(samples) < len(logits_B) else ""
        last = unseen[-1][0].step
        found = f"; found after step {last}" if last > position.step else ""
        if position.step == 1:
            raise UserError(
                f"the loss is NaN or infinite at step 1 (batch {position.batch} of epoch 1{where}), before the first "
                f"update, so learning rates are not the cause; {self._scale}look in the network and the loss for a "
                "division by 0, a logarithm of 0, or dense values that self.missing has not replaced; check_network "
                "tests a network"
            )
        step, sizes = self._largest
        listed = ", ".join(f"{name} {size:.3g}" for name, size in list(sizes.items())[:3])
        gradients = f"; largest gradients at step {step}: {listed}" if sizes else ""
        if sizes and step < position.step - 1 and all(size < _LARGE_GRADIENT for size in sizes.values()):
            # Small gradients of an earlier step do not show what went wrong.
            gradients = "; set trainer.log_every_n_steps to 1 to see the largest gradients of the step before"
        raise UserError(
            f"the loss is NaN or infinite at step {position.step} (batch {position.batch} of epoch "
            f"{position.epoch}{where}{found}): {self.advice}{gradients}"
        )


def gradient_sizes(network: CTRNetwork) -> dict[str, float]:
    """Return name of a parameter or lookup -> its largest gradient by magnitude; NaN first, then descending."""
    largest: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and parameter.numel():
            largest[name] = parameter.grad.abs().max()
    for lookup in network.lookups():
        gradient = lookup.gradient()
        if gradient is not None and gradient.values.numel():
            largest[f"rows of {lookup.tables[0].name}..{lookup.tables[-1].name}"] = gradient.values.abs().max()
    # One read of the device, whatever the number of parameters.
    values = torch.stack([size.double() for size in largest.values()]).tolist() if largest else []
    sizes = dict(zip(largest, values, strict=True))
    return dict(sorted(sizes.items(), key=lambda item: (not math.isnan(item[1]), -item[1])))


def refuse_bad_state(network: CTRNetwork, optimizer: CTROptimizer | None, step: int, advice: str) -> None:
    """Check every parameter and the optimizer state, before a save and at the end of a fit.

    Raises:
        UserError: an element is NaN or infinite.
    """
    bad = [name for name, parameter in network.named_parameters() if not is_finite(parameter.detach())]
    if optimizer is not None:
        dense = {name: optimizer.state.get(parameter) for name, parameter in network.named_parameters()}
        tables = {
            f"rows of {lookup.tables[0].name}..{lookup.tables[-1].name}": state
            for lookup, state in zip(optimizer.lookups, optimizer.table_state, strict=True)
            if lookup.tables
        }
        bad += nonfinite_tensors({"dense": dense, "tables": tables}, "optimizer state")
    require(not bad, f"{', '.join(bad[:3])} is NaN or infinite after step {step}, so nothing is saved: {advice}")


def words_of_chance(
    auc: float,
    clicks: int,
    samples: int,
    batch_size: int,
    rates: Mapping[str, float],
    large_numbers: str = "",
    log_loss: float = math.nan,
    fault: str = "",
) -> str:
    """Return what is wrong and what to do if an AUC is no better than that of random predictions; else no words.

    Args:
        auc: the AUC.
        clicks: number of clicked samples.
        samples: number of samples.
        batch_size: batch size of training.
        rates: learning rates by group.
        large_numbers: dense columns with large numbers, see ``DatasetSchema.large_numbers``.
        log_loss: the log loss.
        fault: what is wrong with the logits, which is then the only cause that is named.
    """
    others = samples - clicks
    if not (clicks and others and math.isfinite(auc)):
        return ""
    noise = chance_deviation(clicks, others)
    if auc - 0.5 > 3 * noise:
        return ""
    found = (
        f"AUC {auc:.4f} is no better than random predictions (0.5 give or take {3 * noise:.4f}, three standard "
        f"deviations with {samples:,} samples). Likely cause"
    )
    if fault:
        return f"{found}: {fault}"
    large = f"large numbers in {large_numbers}: {_SCALE}; " if large_numbers else ""
    zero = ""
    if abs(log_loss - math.log(2)) < 0.001:
        zero = "; or all logits are about 0, because the last layer ends in a ReLU (see linear_output of MLP)"
    listed = " and ".join(f"{rate:g} for {group}" for group, rate in rates.items())
    entropy = click_rate_log_loss(clicks / samples)
    if log_loss > _DIVERGED * entropy:
        return (
            f"{found}{'s' * bool(large)}: {large}learning rates ({listed}) that are too high: the log loss is "
            f"{log_loss:.3g}, and {entropy:.3g} for the click rate alone. Try a tenth of the rates"
        )
    return (
        f"{found}s: {large}too few steps, or learning rates ({listed}) that "
        f"do not suit batches of {batch_size:,}: try ten times the rates if the loss hardly changed, else a tenth{zero}"
    )
