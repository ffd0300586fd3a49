"""The one LightningModule: any network, any rules, any dataset."""

import inspect
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.lookup import EmbeddingLookup
from lightning_dlrm.contracts.schema import DatasetSchema, Features
from lightning_dlrm.engine.averaging import KEY as AVERAGES
from lightning_dlrm.engine.averaging import Averaging, WeightAverages, average_rows, averaged_dense
from lightning_dlrm.engine.graphs import GraphedStep, SideStream
from lightning_dlrm.engine.guards import LossGuard, Position, refuse_bad_weights, warn_of_chance
from lightning_dlrm.engine.overhead import (
    changes_batches,
    give_hooks_back,
    give_transfers_back,
    hears_of_parts,
    lengthen_steps,
    pass_over_idle_hooks,
    pass_over_transfers,
    shorten_steps,
    tell_before_update,
)
from lightning_dlrm.engine.random_state import random_states, restore_random_states
from lightning_dlrm.engine.recorded import RecordedStep, is_recordable
from lightning_dlrm.kernels.choice import Kernels, choose
from lightning_dlrm.models.accounting import ModelSize, model_size
from lightning_dlrm.models.layers import MLP, DotInteraction
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.objectives.curves import ClickCurves, click_curves
from lightning_dlrm.objectives.losses import LogLoss, Loss
from lightning_dlrm.objectives.metrics import ClickMetrics
from lightning_dlrm.optim.dense import DenseOptimizer
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import UpdateRule
from lightning_dlrm.optim.schedules import Constant, Schedule, make_schedule, needs_total_steps, schedule_name
from lightning_dlrm.sharding.checkpoint import CheckpointReader, PieceTensors
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.tables.fbgemm_tables import FBGEMMTables, use_fbgemm
from lightning_dlrm.tables.host_tables import HostRows
from lightning_dlrm.tables.tables import EmbeddingTables
from lightning_dlrm.tracking import names


class CTRModule(pl.LightningModule):
    """A click-through-rate model under training.

    Args:
        network: makes the network from the dataset's features and the seed, such as DLRM or DCN.
        table_optimizer: rule for the embedding tables: SGD, Adagrad, RowWiseAdagrad or Adam.
        dense_optimizer: makes the optimizer of all other parameters: a class of torch.optim with its settings, from
            Python ``functools.partial(torch.optim.Adagrad, lr=0.01)``. Its state has the parameters' precision.
        schedule: makes the schedule of all learning rates, stepped after each optimizer step: Constant, Cosine,
            WarmupThenDecay, WarmupQuadraticDecay, or any torch.optim.lr_scheduler.LRScheduler; ``total_steps`` is
            filled in. None for constant rates.
        loss: what is minimised: LogLoss, WeightedLogLoss or FocalLoss; validations report the same metrics
            whatever it is.
        wide_optimizer: rule for linear terms' weights of ids, where they are not to have that of the tables (Cheng et
            al. 2016, section 3.3, train the wide and the deep part by two).
        kernels: what looks up and updates table rows, and on a CPU also multiplies pairs of vectors and makes the
            backward pass of ReLUs. plain: torch, on any device; native: C for a CPU, compiled by the machine's C
            compiler when first used, equal but for the order of some sums; triton: fused kernels for a CUDA device;
            auto: native on a CPU and triton on a CUDA device where they work, else plain; fbgemm: FBGEMM's tables,
            where it is installed.
        cuda_graphs: launch a whole step at once, for a CUDA device; batches of another size than the first (an epoch's
            last one) are trained on without. It needs the fused kernels.
        record_steps: on a CPU, in one process, record the operations of a step after the first hundred, and repeat
            them in the later ones: the same numbers, sooner. Steps with accumulated gradients or bags of ids, layers,
            losses and modules of your own, layers with hooks and tables in host memory are made as ever.
        averaging: take an average of many steps' weights for validations, tests and predictions; None for the
            last step's.
        schema: of the dataset; taken from the data.
        seed: of the initial weights; taken from seed_everything.

    Raises:
        UserError: the network does not fit the data, or a setting is out of range.
    """

    def __init__(
        self,
        network: Callable[[Features, int], CTRNetwork],
        table_optimizer: UpdateRule,
        dense_optimizer: DenseOptimizer,
        schedule: Schedule | None = None,
        loss: Loss | None = None,
        averaging: Averaging | None = None,
        *,
        wide_optimizer: UpdateRule | None = None,
        kernels: Kernels | Literal["fbgemm"] = "auto",
        cuda_graphs: bool = False,
        record_steps: bool = True,
        schema: DatasetSchema,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rules = {"table_optimizer": table_optimizer}
        if wide_optimizer is not None:
            rules["wide_optimizer"] = wide_optimizer
        for option, rule in rules.items():
            if not isinstance(rule, UpdateRule):
                name = getattr(rule, "__name__", type(rule).__name__)
                raise UserError(
                    f"{option} is {name}, which cannot update single rows of a table; "
                    "give a rule of lightning_dlrm.optim.rules, such as RowWiseAdagrad(0.01)"
                )
        self.make_network = network
        self.table_rule = table_optimizer
        self.dense_optimizer = dense_optimizer
        self.wide_rule = wide_optimizer
        self.schedule = schedule or Constant
        self.loss = loss or LogLoss()
        self.kernels = kernels
        self.cuda_graphs = cuda_graphs
        self.record_steps = record_steps
        self._recorded: GraphedStep | RecordedStep | None = None
        self._replayed = False
        """Whether this step's forward and backward pass were replayed."""
        self._side_stream: SideStream | None = None
        if averaging is not None and cuda_graphs:
            raise UserError(
                "averaging follows each step's rows, which a recorded step does not tell: set cuda_graphs to false"
            )
        self.averaging = averaging
        self.averages: WeightAverages | None = None
        self._saved_averages: tuple[dict[str, Any], CheckpointReader] | None = None
        self._steps_done = 0
        """Optimiser steps that the weights have seen, also when another trainer evaluates them."""
        self.schema = schema
        self.seed = seed
        self.network: CTRNetwork
        self.metrics = nn.ModuleDict({stage: ClickMetrics(Ranks) for stage in (names.VALIDATION, names.TEST)})
        with torch.device("meta"):
            # Nothing is allocated, and a network that does not fit the data is refused before they are prepared.
            made = network(schema.features, seed)
            self.size: ModelSize = model_size(made)
        if wide_optimizer is not None and not made.wide_lookups():
            raise UserError(
                f"wide_optimizer is given, but this {type(made).__name__} has no linear terms: set network.wide to "
                "true where the model has that option, or leave wide_optimizer out"
            )
        if wide_optimizer is not None and kernels == "fbgemm":
            raise UserError(
                "kernels fbgemm gives all tables one rule: leave wide_optimizer out, or set kernels to auto"
            )
        self._learning_rates = self._try_optimizer(made)
        rates = ", ".join(f"{name} {rate:g}" for name, rate in self.learning_rates().items())
        self.guard = LossGuard(
            f"lower the learning rates ({rates}), warm up longer, or set trainer.gradient_clip_val; what was saved "
            "before is untouched"
        )
        self._batch_size = 0
        self.results: dict[str, float] = {}
        """The last evaluation's metrics in full precision."""
        self.curves: ClickCurves | None = None
        """Of the last evaluation."""
        self.seconds = dict.fromkeys((names.FORWARD_SHARE, names.BACKWARD_SHARE, names.UPDATE_SHARE), 0.0)
        """What the parts of all training steps so far took."""
        self._began = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        # What is set at every step: torch would look each time whether it is a weight.
        if name in _SET_AT_EVERY_STEP:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def configure_model(self) -> None:
        # Lightning calls this once for every fit, validate, test and predict.
        if not hasattr(self, "network"):
            self.network = self.make_network(self.schema.features, self.seed)
            for module in self.network.modules():
                if isinstance(module, (EmbeddingLookup, MLP, DotInteraction)) and self.kernels != "fbgemm":
                    module.kernels = self.kernels

    def configure_optimizers(self) -> Any:
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            # A gradient scaler would unscale the dense gradients and pass over the tables' rows.
            raise UserError("precision 16-mixed scales the loss, which table rows do not support; use bf16-mixed")
        network = self.network
        if self.kernels == "fbgemm":
            # Here the rows are on their device, and the weights are still nobody's.
            use_fbgemm(network, type(self.table_rule).__name__, vars(self.table_rule))
        if self.trainer.world_size > 1 and any(isinstance(lookup, EmbeddingTables) for lookup in network.lookups()):
            raise UserError(
                "DDP averages no table rows: train in several processes with strategy embedding_sharded_ddp"
            )
        optimizer = self.make_optimizer(network)
        schedule = make_schedule(self.schedule, optimizer, self._total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def make_optimizer(self, network: CTRNetwork) -> CTROptimizer:
        """Of a network that ``make_network`` made."""
        return CTROptimizer(
            network.dense_parameters(),
            network.lookups(),
            self.dense_optimizer,
            self.table_rule,
            self.wide_rule,
            network.wide_lookups(),
        )

    def learning_rates(self) -> dict[str, float]:
        """Of each group of the optimiser, as given; the schedule changes them."""
        return self._learning_rates

    def _try_optimizer(self, network: CTRNetwork) -> dict[str, float]:
        """Make optimizer and schedule of a network on the meta device, and return the learning rate of each group.

        Raises:
            UserError: a setting is out of range, before the data are prepared.
        """
        optimizer = self.make_optimizer(network)
        rates = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
        make_schedule(self.schedule, optimizer, lambda: _TRIED_STEPS)
        return rates

    def rule_of(self, lookup: EmbeddingLookup, network: CTRNetwork) -> UpdateRule:
        """Of a lookup of such a network."""
        return self.wide_rule if self.wide_rule is not None and lookup in network.wide_lookups() else self.table_rule

    def _total_steps(self) -> int:
        """Optimiser steps of the whole fit.

        Lightning's own estimate would load the data, and with them lose the position of a resumed run.
        """
        trainer = self.trainer
        batches = getattr(trainer.datamodule, "training_batches", None)  # type: ignore[attr-defined]
        bounded = trainer.max_epochs not in (None, -1)
        if not (bounded and batches is not None) and trainer.max_steps == -1:
            needing = (
                "averaging" if not needs_total_steps(self.schedule) else f"the schedule {schedule_name(self.schedule)}"
            )
            raise UserError(f"{needing} needs to know the fit's length: set trainer.max_steps")
        if not (bounded and batches is not None):
            return trainer.max_steps
        steps = -(-batches // trainer.accumulate_grad_batches) * (trainer.max_epochs or 0)
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own clipping sees ``.grad`` only, so it would pass over the tables.
        if not gradient_clip_val:
            return
        ours: CTROptimizer = getattr(optimizer, "optimizer", optimizer)
        if gradient_clip_algorithm == "value":
            ours.clip_gradient_values(gradient_clip_val)
        else:
            ours.clip_gradient_norm(gradient_clip_val)

    def on_fit_start(self) -> None:
        self._check_kernels()
        self._check_graphs()
        # Another fit has another optimiser.
        self._recorded, self._replayed = None, False
        # Not before the weights are where they will be trained.
        if self.averaging is not None:
            start = self.averaging.start_share
            self.averages = WeightAverages(
                self.network, self.averaging, int(start * self._total_steps()) if start else 0
            )
            if self._saved_averages is not None:
                self.averages.load(*self._saved_averages)
                self._saved_averages = None

    def _check_kernels(self) -> None:
        """
        Raises:
            UserError: the kernels that are asked for do not work here, or some tables do not use them.
        """
        for lookup in self.network.lookups():
            if self.kernels in ("triton", "fbgemm") and type(lookup) not in (EmbeddingTables, FBGEMMTables):
                raise UserError(
                    f"kernels is {self.kernels}, which takes whole tables on one device, and some here are "
                    f"{type(lookup).__name__}: set kernels to auto"
                )
            if self.kernels != "fbgemm":
                device = lookup.device() if isinstance(lookup, HostRows) else lookup.weight.device
                choose(self.kernels, device.type, lookup.weight.dtype)

    def _check_graphs(self) -> None:
        """
        Raises:
            UserError: steps are to be recorded, and this fit's cannot be.
        """
        if not self.cuda_graphs:
            return
        trainer, device = self.trainer, self.trainer.strategy.root_device
        asked = {
            f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}": trainer.accumulate_grad_batches > 1,
            f"trainer.gradient_clip_val {trainer.gradient_clip_val}": bool(trainer.gradient_clip_val),
            f"training in {trainer.world_size} processes": trainer.world_size > 1,
        }
        if device.type != "cuda":
            raise UserError(f"cuda_graphs needs a CUDA device, and this fit is on {device.type}: set it to false")
        for what, is_asked in asked.items():
            if is_asked:
                raise UserError(f"cuda_graphs does not go with {what}: set it to false, or leave the other out")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """To a GPU in a stream of its own, beside the steps that still compute."""
        if device.type == batch.dense.device.type == "cpu":
            return batch
        if device.type != "cuda":
            return batch.to(device)
        if self._side_stream is None:
            self._side_stream = SideStream(device)
        return self._side_stream.send(batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self._replayed:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if not self._replayed:
            # Kernels of a CUDA graph write gradients where they are.
            optimizer.zero_grad(set_to_none=not isinstance(self._recorded, GraphedStep))

    def _recorder(self) -> GraphedStep | RecordedStep | None:
        """What makes this fit's steps by replaying one, where that is asked for and possible."""
        trainer, optimizer = self.trainer, self._optimizer()
        if self.cuda_graphs:
            half = trainer.precision_plugin.precision == "bf16-mixed"
            return GraphedStep(
                self.network,
                self._batch_loss,
                optimizer,
                lambda: torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False),
            )
        own_step = self._has_own("training_step", "backward", "_forward_backward", "_batch_loss")
        here = own_step and self.device.type == "cpu" and trainer.world_size == 1 and self.kernels != "fbgemm"
        if self.record_steps and here and is_recordable(self.network, self.loss):
            return RecordedStep(self.network, self._batch_loss, optimizer, settings=vars(self.loss))
        return None

    def _has_own(self, *hooks: str) -> bool:
        """Whether these are as they are here; a subclass may add to the loss, say."""
        return all(getattr(getattr(self, hook), "__func__", None) is getattr(CTRModule, hook) for hook in hooks)

    def _is_short(self, batch: Batch) -> bool:
        """Whether a step is a repeated one, and that is all that it is."""
        trainer, recorded = self.trainer, self._recorded
        assert isinstance(recorded, RecordedStep)
        return trainer.accumulate_grad_batches == 1 and not trainer.gradient_clip_val and recorded.repeats(batch)

    def _short_step(self, optimizer: CTROptimizer, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What Lightning does of such a step."""
        assert isinstance(self._recorded, RecordedStep)
        self._replayed = True
        outputs = self._make_gradients(batch, batch_idx, self._recorded.forward_backward)
        tell_before_update(self.trainer, optimizer)
        optimizer.step()
        self._count(names.UPDATE_SHARE, self._began)
        return outputs

    def _forward_backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and logits; where the step is replayed, its gradients are made with them."""
        recorded = self._recorded
        # Callbacks may change how many micro-batches a step has, from epoch to epoch.
        whole_step = self.trainer.accumulate_grad_batches == 1
        self._replayed = recorded is not None and whole_step and recorded.takes(batch)
        if isinstance(recorded, GraphedStep):
            self._optimizer().replay = recorded.update if self._replayed else None
        if recorded is not None and self._replayed:
            return recorded.forward_backward(batch)
        logits_B = self.network(batch.dense, batch.ids)
        return self._batch_loss(logits_B, batch), logits_B

    def _batch_loss(self, logits_B: Tensor, batch: Batch) -> Tensor:
        return self.loss.summed(logits_B, _labels(batch)) * (self.trainer.world_size / batch.global_size)

    def on_train_start(self) -> None:
        # Loaders that hold a batch ready tell of it; of others, nothing is fetched or sent ahead.
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "announce") and any(lookup.LOOKS_AHEAD for lookup in self.network.lookups()):
            loader.announce = lambda batch: self.network.announce(batch.ids)
        self._steps_done = self.trainer.global_step
        self._recorded = self._recorder()
        pass_over_idle_hooks(self.trainer.callbacks)  # type: ignore[attr-defined]
        self._pass_over_transfers()
        own_hooks = self._has_own(*_HOOKS_WITHIN_A_STEP)
        if isinstance(self._recorded, RecordedStep) and own_hooks and not hears_of_parts(self.trainer):
            shorten_steps(self.trainer, self._is_short, self._short_step)

    def _pass_over_transfers(self) -> None:
        datamodules = [] if self.trainer.datamodule is None else [self.trainer.datamodule]  # type: ignore[attr-defined]
        around = ("on_before_batch_transfer", "on_after_batch_transfer")
        changed = changes_batches([self, *datamodules], *around) or changes_batches(
            datamodules, "transfer_batch_to_device"
        )
        if self.device.type == "cpu" and self._has_own("transfer_batch_to_device") and not changed:
            pass_over_transfers(self)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.averages is not None:
            self.averages.before_batch(self.trainer.global_step)

    def on_train_end(self) -> None:
        self.end_steps()
        self._settle()

    def end_steps(self) -> None:
        """Leaves the trainer and this model as they were before training, also where it ends before its end."""
        self._recorded, self._replayed = None, False
        give_hooks_back(self.trainer.callbacks)  # type: ignore[attr-defined]
        lengthen_steps(self.trainer)
        give_transfers_back(self)

    def _settle(self) -> None:
        """Afterwards the tables' rows are where they belong."""
        for lookup in self.network.lookups():
            lookup.settle()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One slice's forward pass.

        The loss is the slice's sum times ranks / global size, so that the average over the ranks
        is the mean over the global batch whatever the slices' sizes.
        """
        return self._make_gradients(batch, batch_idx, self._forward_backward)

    # Lightning asks at every step for the names of its arguments, which Python would find out anew.
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def _make_gradients(
        self, batch: Batch, batch_idx: int, make: Callable[[Batch], tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """What a training step returns, of a loss and logits; watches them, and the time that they take."""
        began = time.perf_counter()
        loss, logits_B = make(batch)
        self._began = self._count(names.FORWARD_SHARE, began)
        trainer = self.trainer
        self._batch_size = batch.global_size * trainer.accumulate_grad_batches
        step_loss, logits_B = loss.detach(), logits_B.detach()
        self.guard.watch(step_loss, logits_B, Position(trainer.global_step + 1, trainer.current_epoch, batch_idx))
        if trainer.accumulate_grad_batches > 1:
            loss = loss * self._short_step_factor(batch_idx)
        return {"loss": loss, "logits": logits_B, "step_loss": step_loss}

    def on_before_backward(self, loss: Tensor) -> None:
        self._began = time.perf_counter()

    def on_after_backward(self) -> None:
        self._began = self._count(names.BACKWARD_SHARE, self._began)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Forward and backward pass are inside; the update is what follows them.
        super().optimizer_step(*args, **kwargs)
        self._count(names.UPDATE_SHARE, self._began)

    def _count(self, part: str, began: float) -> float:
        """Adds the time since ``began`` to a part's; returns now."""
        now = time.perf_counter()
        self.seconds[part] += now - began
        return now

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        step = self.trainer.global_step + 1
        if self._is_logged(step):
            # Together, so that every rank ends with the same words.
            Ranks().run_on_all_ranks(self.guard.check)
        if self._is_logged(step) or not self.guard.has_gradients:
            self.guard.remember_gradients(self.network, step)
        if self.averages is not None:
            self.averages.before_step(step - 1)
        self._steps_done = step

    def _is_logged(self, step: int) -> bool:
        """Whether figures are read from the device at this step anyway."""
        return step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def _short_step_factor(self, batch_idx: int) -> float:
        """Lightning divides by ``accumulate_grad_batches`` also where an epoch ends amid a step, with fewer."""
        micro = self.trainer.accumulate_grad_batches
        present = min(micro, self.trainer.num_training_batches - batch_idx // micro * micro)
        return micro / present

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, names.VALIDATION)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, names.TEST)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """``row`` int64 [B] and ``probability`` float32 [B]."""
        assert batch.rows is not None
        probability_B = self.network(batch.dense, batch.ids).cpu().double().sigmoid().float()
        return {"row": batch.rows, "probability": probability_B}

    def on_validation_epoch_start(self) -> None:
        self._put_averages_in()

    def on_validation_epoch_end(self) -> None:
        # Before anything is saved.
        self.give_weights_back()
        self._finish_evaluation(names.VALIDATION)

    def on_test_epoch_start(self) -> None:
        self._put_averages_in()

    def on_test_epoch_end(self) -> None:
        self.give_weights_back()
        self._finish_evaluation(names.TEST)

    def on_predict_epoch_start(self) -> None:
        self._put_averages_in()

    def on_predict_epoch_end(self) -> None:
        self.give_weights_back()

    def configure_callbacks(self) -> list[pl.Callback]:
        return [_CleansUp()]

    def _put_averages_in(self) -> None:
        if self.averages is not None:
            self.averages.put_in(self._steps_done)

    def give_weights_back(self) -> None:
        """Of an evaluation that takes averages: the weights as trained, also where it ends before its end."""
        if self.averages is not None:
            self.averages.take_out()

    def _evaluate(self, batch: Batch, stage: str) -> None:
        self._metrics(stage).update(self.network(batch.dense, batch.ids), _labels(batch))

    def _finish_evaluation(self, stage: str) -> None:
        metrics = self._metrics(stage)
        if not self.trainer.sanity_checking:
            self.results = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
            self.curves = click_curves(metrics.logits, metrics.labels, Ranks())
            if self.trainer.state.fn == "fit":
                self._warn_of_chance(metrics)
            # For callbacks such as EarlyStopping; the loggers get the full precision from the recorder.
            self.log_dict(self.results, logger=False, rank_zero_only=True)
        metrics.reset()

    def _warn_of_chance(self, metrics: ClickMetrics) -> None:
        optimum = self.data_schema().optimum.get(names.VALIDATION)
        if optimum is not None and optimum.auc <= 0.5:
            # Of labels that depend on nothing.
            return
        here = [
            sum(len(labels) for labels in metrics.labels),
            sum(int((labels > 0).sum()) for labels in metrics.labels),
        ]
        ranks = Ranks()
        samples, clicks = np.sum(ranks.all_gather(np.array(here)), axis=0).tolist()
        if ranks.rank > 0:
            return
        auc = self.results[f"{names.VALIDATION}/auc"]
        warn_of_chance(auc, clicks, samples, self._batch_size, self.learning_rates())

    def _metrics(self, stage: str) -> ClickMetrics:
        metrics = self.metrics[stage]
        assert isinstance(metrics, ClickMetrics)
        return metrics

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the tables and their optimiser state out of Lightning's dictionary: they are written
        piece by piece, without a copy.

        Raises:
            UserError: on all ranks, where a loss or a weight of one is not finite: a bad state never takes a
                good one's place.
        """

        def refuse_bad_state() -> None:
            self._settle()
            self.guard.check()
            refuse_bad_weights(self.network, checkpoint["global_step"], self.guard.advice)

        Ranks().run_on_all_ranks(refuse_bad_state)
        for key in self._table_keys():
            del checkpoint["state_dict"][key]
        if self.averages is not None:
            checkpoint[AVERAGES] = self.averages.state(checkpoint["global_step"])
        checkpoint["tables"] = self.table_pieces(with_state=bool(checkpoint.get("optimizer_states")))
        checkpoint["header"] = {
            "model": type(self.network).__name__,
            "encoding_fingerprint": self.schema.encoding_fingerprint,
            "data_fingerprint": self.data_schema().data_fingerprint,
            "step": checkpoint["global_step"],
            "epoch": checkpoint["epoch"],
        }
        checkpoint["random_state"] = random_states(self.device)

    def table_pieces(self, with_state: bool = True) -> list[PieceTensors]:
        """What this rank holds of the tables, of their optimiser state and averages; views of the live tensors."""
        slots: dict[EmbeddingLookup, dict[str, Tensor]] = {}
        if with_state:
            optimizer = self._optimizer()
            slots = dict(zip(optimizer.lookups, optimizer.table_state, strict=True))
        averages = {} if self.averages is None else self.averages.slots()

        def tensors_of(lookup: EmbeddingLookup) -> dict[str, Tensor]:
            return {"weight": lookup.weight, **slots.get(lookup, {}), **averages.get(lookup, {})}

        return [
            PieceTensors(piece, {name: piece.of(tensor) for name, tensor in tensors_of(lookup).items()})
            for lookup in self.network.lookups()
            for piece in lookup.pieces
        ]

    def dense_tensors(self) -> list[Tensor]:
        """All other weights and their optimiser state."""
        weights, state = self.network.dense_parameters(), self._optimizer().state
        kept = (values for weight in weights for values in state[weight].values())
        return [*weights, *(values for values in kept if torch.is_tensor(values))]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is of this model and data, and reads the tables in place.

        Raises:
            UserError: it is of another model, dataset encoding, or (to train on) other data.
        """
        reader: CheckpointReader = checkpoint["tables"]
        self._check_header(reader)
        if self.trainer.training and not checkpoint.get("optimizer_states"):
            raise UserError(
                f"checkpoint {reader.folder} holds weights only, so a fit cannot go on from it; validate, test and "
                "predict take it"
            )
        lookups, table_keys = self.network.lookups(), self._table_keys()
        theirs, ours = set(reader.manifest.tables), {table.name for lookup in lookups for table in lookup.tables}
        if theirs != ours:
            raise UserError(
                f"checkpoint {reader.folder} has tables {_few(theirs)}, this run needs {_few(ours)}: "
                "it is of another model or dataset"
            )
        dense = {k: tuple(v.shape) for k, v in self.state_dict().items() if k not in table_keys}
        saved = {k: tuple(v.shape) for k, v in checkpoint["state_dict"].items()}
        if dense != saved:
            key = min(k for k in dense.keys() | saved.keys() if dense.get(k) != saved.get(k))
            raise UserError(
                f"checkpoint {reader.folder} is of another model: {key} is {saved.get(key, 'missing')} there "
                f"and {dense.get(key, 'missing')} here; use the configuration it was trained with"
            )
        averages = checkpoint.get(AVERAGES)
        if self.trainer.training:
            self._keep_averages(averages, reader)
        else:
            # Those of an earlier fit: the weights are about to be others.
            self.averages = None
        if averages is not None and not self.trainer.training:
            names_here = {f"network.{name}": value for name, value in averages["dense"].items()}
            checkpoint["state_dict"] = averaged_dense(averages | {"dense": names_here}, checkpoint["state_dict"])
        with torch.no_grad():
            for lookup in lookups:
                for piece in lookup.pieces:
                    rows = piece.of(lookup.weight)
                    reader.read_rows(piece, "weight", rows)
                    if averages is not None and not self.trainer.training:
                        average_rows(averages, reader, piece, rows)
        # Loading a parameter from itself costs nothing; leaving it out would be an incomplete state.
        checkpoint["state_dict"] |= {key: lookup.weight for key, lookup in table_keys.items()}
        for state in checkpoint.get("optimizer_states", []):
            state["read_table_rows"] = reader.read_rows
        if "random_state" in checkpoint:
            restore_random_states(checkpoint["random_state"], self.device)

    def _keep_averages(self, averages: dict[str, Any] | None, reader: CheckpointReader) -> None:
        """
        Raises:
            UserError: the checkpoint has averages and this run wants none, or the other way round.
        """
        if (averages is None) != (self.averaging is None):
            has, wants = ("no averages", "some") if averages is None else ("averages", "none")
            raise UserError(
                f"checkpoint {reader.folder} has {has} of its weights and this run asks for {wants} "
                "(model.averaging): resume with the configuration it was trained with, or start a new run"
            )
        self._saved_averages = None if averages is None else (averages, reader)

    def _check_header(self, reader: CheckpointReader) -> None:
        header = reader.header
        if header["model"] != type(self.network).__name__:
            raise UserError(
                f"checkpoint {reader.folder} is of a {header['model']}, this run trains a "
                f"{type(self.network).__name__}: use the configuration it was trained with"
            )
        if header["encoding_fingerprint"] != self.schema.encoding_fingerprint:
            raise UserError(
                f"checkpoint {reader.folder} was trained on data encoded otherwise (fingerprint "
                f"{header['encoding_fingerprint'][:12]}, the data here have {self.schema.encoding_fingerprint[:12]}): "
                "encode the data with the vocabulary and protocol of the training data"
            )
        data = self.data_schema().data_fingerprint
        if self.trainer.training and header["data_fingerprint"] != data:
            raise UserError(
                f"checkpoint {reader.folder} was trained on other rows (fingerprint {header['data_fingerprint'][:12]}, "
                f"the data here have {data[:12]}): resume on the same dataset"
            )

    def data_schema(self) -> DatasetSchema:
        """The schema of the data at hand: complete once they are prepared."""
        datamodule = None if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]
        return getattr(datamodule, "schema", self.schema)

    def _table_keys(self) -> dict[str, EmbeddingLookup]:
        """The name in this module's state of each lookup's weight -> the lookup."""
        modules = self.network.named_modules(prefix="network")
        return {f"{name}.weight": module for name, module in modules if isinstance(module, EmbeddingLookup)}

    def _optimizer(self) -> CTROptimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, CTROptimizer)
        return optimizer


_TRIED_STEPS = 1000
"""Length of the fit whose schedule is tried; any will do."""

# The first by Lightning, which notes some thirty times a step which hook is running.
_SET_AT_EVERY_STEP = frozenset({"_current_fx_name", "_replayed", "_began", "_batch_size", "_steps_done"})

_HOOKS_WITHIN_A_STEP = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
)


class _CleansUp(pl.Callback):
    """Lightning tells callbacks alone of an error or of Ctrl-C."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, CTRModule)
        pl_module.give_weights_back()
        pl_module.end_steps()


def _labels(batch: Batch) -> Tensor:
    if batch.label is None:
        raise UserError("these rows have no labels: train and evaluate on a split that has them; 'predict' needs none")
    return batch.label


def _few(items: set[str]) -> str:
    listed = sorted(items)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
