"""The one LightningModule: any network, any optimizer, any dataset."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from lightning_dlrm.contracts.batch import Batch, require_batch
from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import DatasetSchema, Features
from lightning_dlrm.engine.averaging import AverageForEvaluation, Averaging, WeightAverages
from lightning_dlrm.engine.checkpoint_state import add_state, check_setup, optimizer_of, take_state
from lightning_dlrm.engine.compilation import CompilationLog, CompileMode, compile_mode, compile_score, compiled
from lightning_dlrm.engine.evaluation import Evaluation
from lightning_dlrm.engine.fit_length import fit_length, planned_steps, refuse_longer_fit
from lightning_dlrm.engine.guards import LossGuard, Position
from lightning_dlrm.engine.loading import KEY, describe_module, load_module, plain_options
from lightning_dlrm.engine.memory import datamodule_of, require_memory
from lightning_dlrm.engine.timing import StepTimer
from lightning_dlrm.engine.transfer import SideStream
from lightning_dlrm.kernels.choice import Kernels, choose
from lightning_dlrm.models.layers import MLP, DotInteraction, Dropout, initialize, place_dropout
from lightning_dlrm.models.network import CTRNetwork, ModelSize, model_size, require_logits
from lightning_dlrm.objectives.losses import LogLoss, Loss
from lightning_dlrm.objectives.metrics import ClickCurves
from lightning_dlrm.objectives.regularization import Regularization
from lightning_dlrm.optim.dense import DenseOptimizer, torch_class
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import UpdateRule, require_rules
from lightning_dlrm.optim.schedules import Constant, Schedule, make_schedule, schedule_name
from lightning_dlrm.sharding.checkpoint import CheckpointReader
from lightning_dlrm.sharding.collectives import Ranks, slice_start
from lightning_dlrm.tables.lookup import EmbeddingTables
from lightning_dlrm.tracking import names

log = logging.getLogger("lightning_dlrm")


class CTRModule(pl.LightningModule):
    """A click-through-rate model under training.

    A step is Lightning's automatic optimization: ``training_step`` returns the loss, and clipping, accumulation,
    precision, callbacks and loggers work as Lightning documents them.

    Args:
        network: makes the network from the dataset's features and the seed, such as DLRM or DCN.
        table_optimizer: update rule of the embedding tables: SGD, Adagrad, RowWiseAdagrad or Adam; None if all of them
            have tables.dense_gradients.
        dense_optimizer: makes the optimizer of all other parameters: a class of torch.optim with its settings, from
            Python ``functools.partial(torch.optim.Adagrad, lr=0.01)``. Its state has the parameters' precision.
        schedule: makes the schedule of all learning rates, stepped after each optimizer step: Constant, Cosine,
            WarmupThenDecay, WarmupQuadraticDecay, or another torch.optim.lr_scheduler.LRScheduler; ``total_steps`` is
            filled in. None for constant rates.
        loss: the loss: LogLoss, ProbabilityLogLoss, WeightedLogLoss or FocalLoss; validations report the same metrics
            with each of them.
        regularization: penalty of the size of parameters; None for no penalty.
        initialization: own (the network's own), or xavier: draw dense parameters as FuxiCTR does, all weights Xavier
            normal and all biases zero; for tables, set network.tables.initial_std.
        averaging: evaluate with an average of the parameters of many steps; None for the parameters of the last step.
        wide_optimizer: update rule of the linear terms' rows; None for that of the tables. Cheng et al. 2016, section
            3.3, use different optimizers for the wide and the deep part.
        kernels: implementation of lookups and updates of table rows, and on a CPU also of dot products and of the
            backward pass of ReLUs. plain: torch, on any device; native: C for a CPU, compiled by the machine's C
            compiler when first used, equal except for the order of some sums; triton: fused kernels for a CUDA
            device; auto: native on a CPU and triton on a CUDA device if they work there, else plain.
        compile: compile the network's dense arithmetic and the loss with torch.compile; true, or one of its modes:
            default, reduce-overhead (CUDA graphs), max-autotune, max-autotune-no-cudagraphs. The first steps take up to
            a minute longer. On a CPU a whole fit is not faster by it; on a GPU it is not yet measured.
        schema: schema of the dataset; taken from the data.
        seed: seed of the initial parameters; taken from seed_everything.

    Raises:
        UserError: the network does not fit the data, or a setting is out of range.
    """

    def __init__(
        self,
        network: Callable[[Features, int], CTRNetwork],
        table_optimizer: UpdateRule | None,
        dense_optimizer: DenseOptimizer,
        schedule: Schedule | None = None,
        loss: Loss | None = None,
        averaging: Averaging | None = None,
        *,
        wide_optimizer: UpdateRule | None = None,
        regularization: Regularization | None = None,
        initialization: Literal["own", "xavier"] = "own",
        kernels: Kernels = "auto",
        compile: bool | CompileMode = False,
        schema: DatasetSchema,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_rules(table_optimizer=table_optimizer, wide_optimizer=wide_optimizer)
        self.make_network = network
        self.table_rule, self.wide_rule = table_optimizer, wide_optimizer
        self.dense_optimizer = (
            torch_class(dense_optimizer) if isinstance(dense_optimizer, UpdateRule) else dense_optimizer
        )
        self.schedule = schedule or Constant
        self.loss = loss or LogLoss()
        self.regularization = regularization or Regularization()
        require(initialization in ("own", "xavier"), f"initialization {initialization!r} is not one of own, xavier")
        self.initialization = initialization
        self.kernels = kernels
        self.compile_mode = compile_mode(compile)
        self.schema, self.seed = schema, seed
        self.configuration: dict[str, Any] | None = None
        """The options as plain values, as in a configuration; None if they were given as objects."""
        self.network: CTRNetwork
        self.learning_rates: dict[str, float] = {}
        """Learning rate of each group of the optimizer before the schedule changes it."""
        self.size: ModelSize = self._size_of(network)
        self.validation, self.test = Evaluation(names.VALIDATION), Evaluation(names.TEST)
        self.results: dict[str, float] = {}
        """Metrics of the last evaluation, in full precision."""
        self.chance = ""  # why the AUC of a fit's last validation is no better than random, on rank 0
        self.curves: ClickCurves | None = None
        """Curves of the last evaluation."""
        self.averaging = None if averaging is None else AverageForEvaluation(averaging)
        self.timer = StepTimer()
        self.guard = LossGuard(self.learning_rates, schema.large_numbers)
        self._side_stream: SideStream | None = None
        self._batch_size = 0
        self._dropouts: list[Dropout] = []

    # --- building ---------------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Path | str,
        network: Callable[[Features, int], CTRNetwork] | None = None,
        *,
        schema: DatasetSchema | None = None,
        allow_nonfinite: bool = False,
    ) -> "CTRModule":
        """Return a module with the parameters of a checkpoint folder, on the CPU.

        Args:
            checkpoint_path: checkpoint folder, such as ``runs/NAME/checkpoints/best``.
            network: makes the network; needed for a custom network, because only classes of this package are imported.
            schema: schema of the data to score, such as ``RowEncoder(folder).schema``, which must have the encoding of
                the data that the model was trained on; by default no data are compared. Checkpoints of releases that
                did not keep a schema need it.
            allow_nonfinite: whether to load NaN and infinite values, which are refused by default.

        Raises:
            UserError: the checkpoint is damaged, has NaN or infinite values, does not say how its module is made, or
                was trained on data with another encoding than that of ``schema``.
        """
        return load_module(cls, CheckpointReader(Path(checkpoint_path), allow_nonfinite), network, schema)

    def setup(self, stage: str) -> None:
        check_setup(self)
        # A strategy that shards tables compares the memory itself, after it has made its plan.
        if not hasattr(self, "network") and not hasattr(self.trainer.strategy, "plan"):
            Ranks().run_on_all_ranks(lambda: require_memory(self))

    def configure_model(self) -> None:
        # Lightning calls this once for every fit, validate, test and predict.
        if hasattr(self, "network"):
            return
        self.network = self.make_network(self.schema.features, self.seed)
        if self.initialization == "xavier":
            initialize(self.network, self.seed, xavier=True)
        for module in self.network.modules():
            if isinstance(module, (EmbeddingTables, MLP, DotInteraction)):
                module.kernels = self.kernels
        if self.compile_mode is not None:
            compile_score(self.network, self.compile_mode)
            self.batch_loss = compiled(self.batch_loss, self.compile_mode)  # type: ignore[method-assign]

    def configure_callbacks(self) -> list[pl.Callback]:
        callbacks: list[pl.Callback] = [self.guard, self.timer]
        if self.averaging is not None:
            callbacks.append(self.averaging)
        return [*callbacks, CompilationLog()] if self.compile_mode is not None else callbacks

    def configure_optimizers(self) -> Any:
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            # A gradient scaler would unscale the dense gradients and pass over the tables' rows.
            raise UserError("precision 16-mixed scales gradients, which table rows do not support; use bf16-mixed")
        Ranks().run_on_all_ranks(lambda: _require_one_process(self))
        require(
            self.trainer.world_size <= 1 or all(lookup.placement.is_sharded for lookup in self.network.lookups()),
            "DDP does not average table rows: train in several processes with strategy embedding_sharded_ddp",
        )
        optimizer = self.make_optimizer(self.network)
        name = f"the schedule {schedule_name(self.schedule)}"
        # A fast_dev_run tries the code of a whole fit, in which a warm-up is short.
        is_try = bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
        schedule = make_schedule(
            self.schedule, optimizer, lambda: 1 << 40 if is_try else planned_steps(self.trainer, name)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def make_optimizer(self, network: CTRNetwork) -> CTROptimizer:
        """Return the optimizer of a network that ``make_network`` made."""
        return CTROptimizer(
            network.dense_parameters(),
            network.lookups(),
            self.dense_optimizer,
            self.table_rule,
            self.wide_rule,
            network.wide_lookups(),
        )

    def rule_of(self, lookup: EmbeddingTables, network: CTRNetwork) -> UpdateRule | None:
        """Return the update rule of one of a network's lookups; None if ``dense_optimizer`` updates it."""
        return self.wide_rule if self.wide_rule is not None and lookup in network.wide_lookups() else self.table_rule

    # --- a training step --------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits [B] of a batch.

        Raises:
            UserError: the network returns something else.
        """
        self.configure_model()
        logits_B: Tensor = self.network(batch.dense, batch.ids)
        require_logits(self.network, logits_B, len(batch))
        return logits_B

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``loss`` of a rank's slice of the global batch, and its ``logits`` [B].

        The loss is the slice's sum times ranks / global size: its average over the ranks, which DDP takes, is the
        mean over the global batch, whatever the sizes of the slices.
        """
        if self._dropouts:
            start = slice_start(batch.start, len(batch))
            place_dropout(self._dropouts, self.seed, f"{self.trainer.current_epoch}/{batch_idx}", start)
        # ``score(dense, lookup(ids))``: see CTRNetwork.forward. The network is called as a module, so that its hooks
        # and a ``forward`` of its own take effect.
        logits_B = self(batch)
        loss = self.batch_loss(logits_B, _labels(batch)) * (self.trainer.world_size / batch.global_size)
        # The last batch of an epoch may be smaller.
        self._batch_size = max(self._batch_size, batch.global_size * self.trainer.accumulate_grad_batches)
        position = Position(self.trainer.global_step + 1, self.trainer.current_epoch + 1, batch_idx + 1)
        self.guard.watch(loss.detach(), logits_B, position, self.network)
        total = self._scaled(loss + penalty_of(self.network, self.regularization), batch_idx)
        return {"loss": total, "step_loss": loss.detach(), "logits": logits_B.detach()}

    def batch_loss(self, logits_B: Tensor, label_B: Tensor) -> Tensor:
        """Return the loss summed over a rank's slice, a 0-dim tensor."""
        return self.loss.summed(logits_B, label_B)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own clipping sees ``.grad`` only, so it would pass over the tables.
        if gradient_clip_val:
            ours: CTROptimizer = getattr(optimizer, "optimizer", optimizer)
            by_value = gradient_clip_algorithm == "value"
            clip = ours.clip_gradient_values if by_value else ours.clip_gradient_norm
            clip(gradient_clip_val)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return the batch on the device; a side stream copies it to a GPU while earlier steps compute."""
        # Here, since a check on the device would wait for it.
        require_batch(batch, self.schema.features, self, datamodule_of(self))
        if device.type == batch.dense.device.type == "cpu":
            return batch
        if device.type != "cuda":
            return batch.to(device)
        if self._side_stream is None:
            self._side_stream = SideStream(device)
        return self._side_stream.send(batch)

    def on_fit_start(self) -> None:
        # Kernels that do not work on this machine end the fit before its first step.
        for lookup in self.network.lookups():
            choose(self.kernels, lookup.device.type, lookup.weight.dtype)
        # A network is given to load_from_checkpoint.
        left_out = [name for name in plain_options(self)[1] if name != "network"]
        if left_out and self.trainer.checkpoint_callbacks:
            log.warning(
                "checkpoints cannot describe %s, so load_from_checkpoint cannot make the module: give a class or a "
                "functools.partial of one instead of a function",
                " and ".join(left_out),
            )

    def on_train_start(self) -> None:
        self._dropouts = [layer for layer in self.network.modules() if isinstance(layer, Dropout)]
        # A loader that holds the next batch passes its ids to prefetch; with other loaders no rows are prefetched.
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "prefetch"):
            prefetches = any(lookup.prefetches for lookup in self.network.lookups())
            # A loader may have served another module before.
            loader.prefetch = (lambda batch: self.network.prefetch(batch.ids)) if prefetches else None
        for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            if isinstance(scheduler, OneCycleLR):
                refuse_longer_fit(scheduler.total_steps, fit_length(self.trainer).steps)

    def on_train_end(self) -> None:
        for lookup in self.network.lookups():
            lookup.flush()
        for layer in self._dropouts:
            layer.is_placed = False

    def _scaled(self, loss: Tensor, batch_idx: int) -> Tensor:
        """Return the loss scaled for a last step with fewer micro-batches.

        Lightning divides every loss by ``accumulate_grad_batches``, also if an epoch ends amid a step.
        """
        micro = self.trainer.accumulate_grad_batches
        present = min(micro, self.trainer.num_training_batches - batch_idx // micro * micro)
        return loss if present == micro else loss * (micro / present)

    # --- evaluations ------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        # An evaluation that was interrupted has left samples behind.
        self.validation.reset()

    def on_test_epoch_start(self) -> None:
        self.test.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation.update(self(batch), _labels(batch), batch.group)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test.update(self(batch), _labels(batch), batch.group)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``probability`` float32 [B], and ``row`` int64 [B] if the data number their rows."""
        rows = {} if batch.rows is None else {"row": batch.rows}
        return {**rows, "probability": self(batch).cpu().double().sigmoid().float()}

    def on_validation_epoch_end(self) -> None:
        self._finish(self.validation)

    def on_test_epoch_end(self) -> None:
        self._finish(self.test)

    def _finish(self, evaluation: Evaluation) -> None:
        if not self.trainer.sanity_checking:
            self.results, self.curves = evaluation.results(), evaluation.curves()
            fitting = self.trainer.state.fn == "fit"
            allow_nonfinite = getattr(self.trainer.strategy.checkpoint_io, "allow_nonfinite", False)
            if not allow_nonfinite and not math.isfinite(self.results[f"{evaluation.stage}/log_loss"]):
                if fitting:
                    # The error of a loss or a parameter is more precise.
                    self.guard.check_state(self.network, optimizer_of(self), self.trainer.global_step)
                evaluation.refuse_log_loss()
            if fitting:
                schema, rates, fault = self.data_schema(), self.learning_rates, self.guard.fault
                self.chance = evaluation.warn_of_chance(self.results, schema, self._batch_size, rates, fault)
            # For callbacks such as EarlyStopping, and what ``trainer.validate`` and ``test`` return: only metrics that
            # go to loggers too. During a fit MetricsLogger logs them. Lightning would round Python's floats.
            exact = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.results.items()}
            self.log_dict(exact, logger=not fitting, rank_zero_only=True)
        evaluation.reset()

    # --- checkpoints and data ---------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the tables as pieces and the module's options: see ``checkpoint_state`` and ``loading``."""
        add_state(self, checkpoint)
        checkpoint[KEY] = describe_module(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint and read the tables in place: see ``checkpoint_state.take_state``."""
        # Together, because a rank may read a damaged piece that the others do not need.
        Ranks().run_on_all_ranks(lambda: take_state(self, checkpoint, self.trainer.training))

    @property
    def averages(self) -> WeightAverages | None:
        """The averages of the parameters during a fit."""
        return None if self.averaging is None else self.averaging.averages

    def data_schema(self) -> DatasetSchema:
        """Return the schema of the current data, which is complete after they are prepared."""
        return getattr(datamodule_of(self), "schema", self.schema)

    def _size_of(self, make_network: Callable[[Features, int], CTRNetwork]) -> ModelSize:
        """
        Raises:
            UserError: the network does not fit the data or has no linear terms for ``wide_optimizer``, or a setting
                of the optimizer or the schedule is wrong.
        """
        with torch.device("meta"):
            # Nothing is allocated, and errors are found before the data are prepared.
            network = make_network(self.schema.features, self.seed)
        require(
            self.wide_rule is None or network.wide_lookups(),
            f"wide_optimizer is given, but the network {type(network).__name__} has no linear terms: set network.wide "
            "to true if the model has that option, or leave wide_optimizer out",
        )
        require(
            not self.regularization.covers_fields
            or all(lookup.dense_gradients for lookup in network.lookups() if lookup.weight.requires_grad),
            "regularization.fields_l1 and fields_l2 apply to whole tables, but gradients of tables have only the rows "
            "of a step: set network.tables.dense_gradients to true, or use l2 of table_optimizer, which applies to "
            "these rows",
        )
        optimizer = self.make_optimizer(network)
        self.learning_rates = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
        # The length of the fit is not known yet; any length shows whether the schedule accepts its settings.
        make_schedule(self.schedule, optimizer, lambda: 1 << 40)
        return model_size(network, self.schema.features)


def penalty_of(network: CTRNetwork, regularization: Regularization) -> Tensor | float:
    """Return the penalty of a network's parameters, a 0-dim tensor; 0 without one."""
    if regularization == Regularization():
        return 0.0
    fields = network.field_parameters()
    of_fields = {id(parameter) for parameter in fields}
    others = [parameter for parameter in network.parameters() if id(parameter) not in of_fields]
    return regularization.penalty(fields, others)


def _require_one_process(module: CTRModule) -> None:
    """
    Raises:
        UserError: tables have dense gradients, which no other rank would get.
    """
    world = module.trainer.world_size
    require(
        world <= 1 or not any(lookup.dense_gradients for lookup in module.network.lookups()),
        f"tables.dense_gradients trains in one process, but there are {world}: set trainer.devices and "
        "trainer.num_nodes to 1, or leave tables.dense_gradients out",
    )


def _labels(batch: Batch) -> Tensor:
    if batch.label is None:
        raise UserError(
            "these rows have no labels: train and evaluate on a split that has them; 'predict' needs no labels"
        )
    return batch.label
