"""A recorded step trains as an eager one, to the last bit, whatever the network."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.optimization.automatic import _AutomaticOptimization
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from datamodules.synthetic import RandomData
from lightning_dlrm.bench.contenders import Workload, draw_batch
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.recorded import RecordedStep, _repeater, is_recordable
from lightning_dlrm.models.baselines import DeepFM, FactorizationMachine, LogisticRegression, WideAndDeep, XDeepFM
from lightning_dlrm.models.dcn import DCN
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.objectives.losses import LogLoss
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD, RowWiseAdagrad
from lightning_dlrm.tables.embeddings import QuotientRemainder, TableSettings

TABLES = (400, 3, 50)
WORKLOAD = Workload(tables=TABLES, dense=4, width=8)
"""Its batches; networks are those below."""
MLP = {"bottom_mlp": [16, 8], "top_mlp": [16]}

NETWORKS: dict[str, Callable[[Features, int], CTRNetwork]] = {
    "dlrm": partial(DLRM, embedding_dim=8, **MLP),
    "dlrm, wide, dropout, learned missing values": partial(
        DLRM, embedding_dim=8, wide=True, dropout=0.3, missing="learned", **MLP
    ),
    "dlrm, other interactions": partial(
        DLRM, embedding_dim=8, interaction="projection", projection=[[16, 8], [8, 16]], **MLP
    ),
    "dlrm, mixture of crosses": partial(
        DLRM,
        embedding_dim=8,
        interaction="cross",
        cross="mixture",
        cross_layers=2,
        cross_rank=4,
        cross_experts=2,
        **MLP,
    ),
    "dlrm, narrow and replaced tables, learned pooling": partial(
        DLRM,
        embedding_dim=8,
        tables=TableSettings(
            dims={"C2": 4},
            project=True,
            quotient_remainder=QuotientRemainder(collisions=5, threshold=100),
            pooling_weights="learned",
        ),
        **MLP,
    ),
    "dcn": partial(DCN, embedding_dim=8, cross="vector", cross_layers=2, deep=[16]),
    "dcn v2, wide": partial(DCN, embedding_dim=8, cross="matrix", cross_layers=2, deep=[16], wide=True),
    "logistic regression": LogisticRegression,
    "factorisation machine": partial(FactorizationMachine, embedding_dim=8),
    "wide and deep": partial(WideAndDeep, embedding_dim=8, deep=[16]),
    "deepfm, normalised": partial(DeepFM, embedding_dim=8, deep=[16], batch_norm=True),
    "xdeepfm": partial(XDeepFM, embedding_dim=8, deep=[16], cin_layers=[4, 4]),
}


def mean_loss(logits: Tensor, batch: Batch) -> Tensor:
    return LogLoss().summed(logits, batch.label) / batch.global_size


def train(
    make: Callable[[Features, int], CTRNetwork], batches: list[Batch], precision: str, recorded: bool
) -> tuple[list[Tensor], CTRNetwork, list[bool]]:
    """The loss of each step, the network, and which steps were repeated."""
    torch.manual_seed(1)
    network = make(WORKLOAD.features, 1)
    rule = RowWiseAdagrad(0.05)
    optimizer = CTROptimizer(network.dense_parameters(), network.lookups(), SGD(0.1), rule)
    recorder = RecordedStep(network, mean_loss, optimizer, eager_steps=2)
    losses, taken = [], []
    for batch in batches:
        taken.append(recorded and recorder.takes(batch))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if taken[-1]:
                loss, _ = recorder.forward_backward(batch)
            else:
                optimizer.zero_grad()
                loss = mean_loss(network(batch.dense, batch.ids), batch)
        if not taken[-1]:
            loss.backward()
        if len(losses) == 5:
            # In place, as clipping does.
            optimizer.clip_gradient_norm(0.01)
        optimizer.step()
        losses.append(loss.detach())
    return losses, network, taken


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("network", NETWORKS)
def test_repeated_steps_train_as_eager_ones(network: str, precision: str) -> None:
    # The sixth batch is smaller, the eighth has a missing value.
    batches = [draw_batch(WORKLOAD, 20 if seed == 5 else 32, seed) for seed in range(10)]
    batches[7].dense[3, 1] = float("nan")
    losses, ours, taken = train(NETWORKS[network], batches, precision, recorded=True)
    expected, eager, _ = train(NETWORKS[network], batches, precision, recorded=False)
    assert taken == [False, False, True, True, True, False, True, True, True, True]
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    for (name, weight), other in zip(ours.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


def test_large_layers_take_other_kernels_and_repeat_them_too() -> None:
    make = partial(DLRM, embedding_dim=8, bottom_mlp=[512, 512, 8], top_mlp=[512])
    batches = [draw_batch(WORKLOAD, 64, seed) for seed in range(5)]
    losses, *_ = train(make, batches, "float32", recorded=True)
    expected, *_ = train(make, batches, "float32", recorded=False)
    assert torch.equal(torch.stack(losses), torch.stack(expected))


def test_bags_and_weighted_ids_are_not_taken() -> None:
    workload = Workload(tables=TABLES, dense=4, width=8, bags=(0, 3))
    network = NETWORKS["dlrm"](workload.features, 1)
    optimizer = CTROptimizer(network.dense_parameters(), network.lookups(), SGD(0.1), SGD(0.1))
    recorder = RecordedStep(network, mean_loss, optimizer, eager_steps=0)
    assert not recorder.takes(draw_batch(workload, 8, 1))
    batch = draw_batch(WORKLOAD, 8, 1)
    batch.ids.weights = torch.ones(8, len(TABLES))
    assert not recorder.takes(batch)
    batch.ids.weights = None
    assert recorder.takes(batch)


def test_frozen_layers_and_new_listeners_are_noticed() -> None:
    network = NETWORKS["dlrm"](WORKLOAD.features, 1)
    optimizer = CTROptimizer(network.dense_parameters(), network.lookups(), SGD(0.1), SGD(0.1))
    recorder = RecordedStep(network, mean_loss, optimizer, eager_steps=0)
    batch = draw_batch(WORKLOAD, 8, 1)
    for frozen in (False, True, False):
        network.bottom.requires_grad_(not frozen)
        for _ in range(2):
            assert recorder.takes(batch)
            recorder.forward_backward(batch)
            recorded = [weight.grad for weight in network.dense_parameters()]
            optimizer.zero_grad()
            mean_loss(network(batch.dense, batch.ids), batch).backward()
            for found, weight in zip(recorded, network.dense_parameters(), strict=True):
                assert (found is None) == (weight.grad is None)
                assert found is None or torch.equal(found, weight.grad)
    network.top.register_forward_hook(lambda *_: None)
    recorder = RecordedStep(network, mean_loss, optimizer, eager_steps=0)
    assert not recorder.takes(batch)


class OwnNetwork(DLRM):
    """What a user may write: nobody knows whether it does the same at every step."""


def test_only_networks_that_are_known_and_unheard_are_recorded() -> None:
    loss = LogLoss()
    network = NETWORKS["dlrm"](WORKLOAD.features, 1)
    assert is_recordable(network, loss)
    assert not is_recordable(OwnNetwork(WORKLOAD.features, 1, embedding_dim=8, **MLP), loss)
    assert not is_recordable(network, mean_loss)
    handle = network.top.register_forward_hook(lambda *_: None)
    assert not is_recordable(network, loss)
    handle.remove()
    handle = network.top[0].weight.register_hook(lambda gradient: gradient)
    assert not is_recordable(network, loss)
    handle.remove()
    assert is_recordable(network, loss)
    with torch.autograd.set_detect_anomaly(True):
        assert not is_recordable(network, loss)
    on_host = DLRM(WORKLOAD.features, 1, embedding_dim=8, tables=TableSettings(on_host="all"), **MLP)
    assert not is_recordable(on_host, loss)


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.replayed: list[bool] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["step_loss"])
        self.replayed.append(module._replayed)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_repeats_its_steps_and_its_numbers_stay(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    monkeypatch.setattr("lightning_dlrm.engine.recorded.EAGER_STEPS", 3)
    runs = []
    for record in (True, False):
        pl.seed_everything(1, verbose=False)
        data = RandomData(tables=list(TABLES), dense=3, train_rows=200, validation_rows=32, test_rows=0, batch_size=16)
        module = CTRModule(
            partial(DLRM, embedding_dim=8, dropout=0.2, **MLP),
            RowWiseAdagrad(0.05),
            SGD(0.1),
            schema=data.schema,
            record_steps=record,
        )
        told = Losses()
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            precision=precision,
            gradient_clip_val=0.5,
            val_check_interval=5,
            callbacks=[told],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, data)
        runs.append((torch.stack(told.losses), told.replayed, dict(module.network.named_parameters())))
    (losses, replayed, weights), (expected, never, others) = runs
    # 13 batches an epoch, the last of 8 rows.
    assert replayed == [*[False] * 3, *[True] * 9, False, *[True] * 12, False] and not any(never)
    assert torch.equal(losses, expected)
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def fitted(record: bool, fits: int = 1, loops: list[Any] | None = None, **options: Any) -> dict[str, Tensor]:
    """The weights after fits of three epochs of 13 batches, the last of each of half the size; adds to ``loops`` what
    Lightning has counted."""
    pl.seed_everything(1, verbose=False)
    make_data = options.pop("data", RandomData)
    data = make_data(tables=list(TABLES), dense=3, train_rows=200, validation_rows=0, test_rows=0, batch_size=16)
    make = partial(DLRM, embedding_dim=8, **MLP)
    kind = options.pop("kind", CTRModule)
    module = kind(make, RowWiseAdagrad(0.05), SGD(0.1), schema=data.schema, record_steps=record)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    for _ in range(fits):
        trainer = pl.Trainer(max_epochs=3, accelerator="cpu", **quiet, **options)
        trainer.fit(module, data)
        if loops is not None:
            loops.append(trainer.fit_loop.state_dict())
        assert module._on_before_batch_transfer.__func__ is pl.LightningModule._on_before_batch_transfer
    return dict(module.network.named_parameters())


class Penalised(CTRModule):
    """What a user may write: a loss with a penalty on weights."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        out = super().training_step(batch, batch_idx)
        out["loss"] = out["loss"] + 0.1 * self.network.top[0].weight.square().sum()
        return out


@pytest.mark.parametrize(
    "case", ["accumulated later", "a callback's function, two fits", "own training step", "own hook", "profiler"]
)
def test_whatever_a_fit_is_made_of_its_numbers_stay(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr("lightning_dlrm.engine.recorded.EAGER_STEPS", 3)
    called = []
    options: dict[str, Any] = {
        "accumulated later": {"callbacks": [pl.callbacks.GradientAccumulationScheduler({1: 3})]},
        "a callback's function, two fits": {
            "callbacks": [pl.callbacks.LambdaCallback(on_train_batch_end=lambda *_: called.append(1)), pl.Callback()],
            "fits": 2,
        },
        "own training step": {"kind": Penalised},
        "own hook": {"kind": Observes},
        "profiler": {"profiler": "simple"},
    }[case]
    weights, others = fitted(True, **options), fitted(False, **options)
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert len(called) == (2 * 2 * 3 * 13 if "fits" in options else 0)


class Hears(pl.Callback):
    """Counts the calls of a hook; ``clip`` sets a limit of the gradients' norm in the second epoch."""

    def __init__(self, hook: str, clip: bool = False) -> None:
        self.calls = 0
        self._clip = clip
        setattr(self, hook, self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if self._clip and trainer.current_epoch == 1:
            trainer.gradient_clip_val = 0.01


@pytest.mark.parametrize(
    "hook, clip, by_lightning",
    [
        # Three first steps, the one that is recorded, and the last batch of each epoch.
        ("on_before_optimizer_step", False, 3 + 1 + 3),
        ("on_train_batch_end", True, 3 + 1 + 1 + 26),
        ("on_after_backward", False, 39),
        ("on_before_zero_grad", False, 39),
    ],
)
def test_repeated_steps_pass_over_lightnings_loop_where_nobody_hears(
    monkeypatch: pytest.MonkeyPatch, hook: str, clip: bool, by_lightning: int
) -> None:
    monkeypatch.setattr("lightning_dlrm.engine.recorded.EAGER_STEPS", 3)
    made, run = [], _AutomaticOptimization.run
    monkeypatch.setattr(_AutomaticOptimization, "run", lambda self, *given: made.append(1) or run(self, *given))
    loops: list[Any] = []
    callback = Hears(hook, clip)
    weights = fitted(True, loops=loops, callbacks=[callback])
    assert len(made) == by_lightning
    assert callback.calls == 39
    others = fitted(False, loops=loops, callbacks=[Hears(hook, clip)])
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert loops[0] == loops[1]


class Doubles(RandomData):
    """A dataset whose batches are changed after they were moved."""

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch.dense = batch.dense * 2
        return batch


class Fails(pl.Callback):
    """Ends the first fit by an error, after some repeated steps."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1
        if self.steps == 8:
            raise RuntimeError("as planned")


def test_what_an_error_ends_leaves_nothing_for_the_next_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dlrm.engine.recorded.EAGER_STEPS", 3)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    found = []
    for fails in (True, False):
        pl.seed_everything(1, verbose=False)
        options = {"tables": list(TABLES), "dense": 3, "train_rows": 200, "validation_rows": 0, "test_rows": 0}
        data = RandomData(**options, batch_size=16)
        first, second = (
            CTRModule(partial(DLRM, embedding_dim=8, **MLP), SGD(0.1), SGD(0.1), schema=data.schema) for _ in range(2)
        )
        trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[Fails()] if fails else [], **quiet)
        if fails:
            with pytest.raises(RuntimeError, match="as planned"):
                trainer.fit(first, data)
            assert "run" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
            assert "_on_before_batch_transfer" not in vars(first)
        pl.seed_everything(2, verbose=False)
        trainer = pl.Trainer(max_epochs=2, accelerator="cpu", **quiet)
        trainer.fit(second, data)
        found.append(torch.cat([weight.flatten() for weight in second.network.parameters()]))
    assert torch.equal(*found)


class Observes(CTRModule):
    """What a user may write: a hook within a step that changes gradients."""

    def on_after_backward(self) -> None:
        super().on_after_backward()
        self.network.top[0].weight.grad *= 0.5


def test_hooks_around_the_transfer_of_batches_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dlrm.engine.recorded.EAGER_STEPS", 3)
    plain = fitted(True)
    weights, others = fitted(True, data=Doubles), fitted(False, data=Doubles)
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert not torch.equal(weights["bottom.0.weight"], plain["bottom.0.weight"])


def test_weights_that_are_put_elsewhere_are_noticed() -> None:
    network = NETWORKS["dlrm"](WORKLOAD.features, 1)
    optimizer = CTROptimizer(network.dense_parameters(), network.lookups(), SGD(0.1), SGD(0.1))
    recorder = RecordedStep(network, mean_loss, optimizer, eager_steps=0)
    batch = draw_batch(WORKLOAD, 8, 1)
    recorder.takes(batch)
    recorder.forward_backward(batch)
    assert recorder.repeats(batch)
    weight = network.top[0].weight
    weight.data = weight.detach() * 2
    assert not recorder.repeats(batch) and recorder.takes(batch)
    loss, _ = recorder.forward_backward(batch)
    assert torch.equal(loss, mean_loss(network(batch.dense, batch.ids), batch))


def test_what_is_written_or_handed_out_is_made_anew() -> None:
    """Repeated, a step gives each time what it gave first, and nobody shares what another may change."""

    def step(x: Tensor) -> list[Tensor]:
        ones = torch.ones(3)
        kept = torch.ones(3) * 2
        written = torch.ones(3)
        written.mul_(x)
        return [x + kept, ones, written, torch.rand(3)]

    repeat = _repeater(make_fx(step)(torch.ones(3)))
    first, second = repeat(torch.ones(3) * 2), repeat(torch.ones(3) * 3)
    assert first[0].tolist() == [4] * 3 and second[0].tolist() == [5] * 3
    assert first[1].data_ptr() != second[1].data_ptr()
    assert first[2].tolist() == [2] * 3 and second[2].tolist() == [3] * 3
    assert not torch.equal(first[3], second[3])
