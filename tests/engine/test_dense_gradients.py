"""Contract: tables with dense gradients train as ordinary parameters of torch.optim do: every row moves, penalties
cover whole tables, a fit resumes to the last bit; padding rows stay zero; what cannot work is refused in one line."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.engine import memory
from lightning_dlrm.engine.averaging import Averaging
from lightning_dlrm.engine.memory import count_memory
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models.baselines import DeepFM
from lightning_dlrm.models.dcn import DCN
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.objectives.regularization import Regularization
from lightning_dlrm.optim.rules import SGD
from lightning_dlrm.tables.embeddings import Embeddings, QuotientRemainder, TableSettings
from tests.engine.test_averaging import Stop
from tests.engine.test_fit import losses, trainer_of
from tests.toy import ToyData, toy_batch, toy_schema

ADAM = partial(torch.optim.Adam, lr=0.01)


def module_of(dense: bool = True, rule: SGD | None = None, **options: Any) -> CTRModule:
    settings = TableSettings(dense_gradients=dense, padding_row=0)
    network = partial(DeepFM, embedding_dim=4, deep=[8], tables=settings)
    given = {"dense_optimizer": ADAM, "schema": toy_schema(), "seed": 3, **options}
    return CTRModule(network, table_optimizer=rule, **given)


def test_sgd_moves_what_row_gradients_move() -> None:
    found = []
    for dense, rule in ((True, None), (False, SGD(0.5))):
        module = module_of(dense, rule, dense_optimizer=partial(torch.optim.SGD, lr=0.5))
        module.configure_model()
        optimizer = module.make_optimizer(module.network)
        norms = []
        for seed in range(3):
            optimizer.zero_grad()
            batch = toy_batch(40, seed)
            (module.batch_loss(module(batch), batch.label) / 40).backward()
            norms.append(optimizer.gradient_norm())
            optimizer.clip_gradient_norm(0.1)
            optimizer.step()
        found.append((torch.stack(norms), [lookup.weight.detach() for lookup in module.network.lookups()]))
    torch.testing.assert_close(*found)


def test_every_row_moves_and_a_fit_resumes_to_the_last_bit(tmp_path: Path) -> None:
    def fit(name: str, *callbacks: pl.Callback, checkpoint: str | None = None) -> CTRModule:
        module = module_of(regularization=Regularization(fields_l2=0.01), averaging=Averaging())
        trainer = trainer_of(tmp_path / name, every=4, callbacks=list(callbacks), max_epochs=2, max_steps=20)
        trainer.fit(module, ToyData(), ckpt_path=checkpoint)
        return module

    whole = fit("whole")
    with pytest.raises(KeyError):
        fit("parts", Stop(10))
    parts = fit("parts", checkpoint=str(tmp_path / "parts/checkpoints/last"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    states = [module.network.state_dict() for module in (whole, parts)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    before = module_of()
    before.configure_model()
    for old, new in zip(before.network.lookups(), whole.network.lookups(), strict=True):
        for piece in new.pieces:
            moved = (piece.of(new.weight) != piece.of(old.weight)).any(1)
            # Rows of linear terms start at zero, where the penalty has no gradient.
            assert not moved[0] and piece.of(new.weight)[0].eq(0).all() and (new.width == 1 or moved[1:].all())
    loaded = CTRModule.load_from_checkpoint(tmp_path / "whole/checkpoints/last")
    assert loaded.regularization == whole.regularization and loaded.table_rule is None


def test_memory_counts_gradients_and_state_of_whole_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of()
    with torch.device("meta"):
        network = module.make_network(module.schema.features, module.seed)
    counted = count_memory(module, network, samples=0)
    tables = 4 * 1108 * (4 + 1)
    assert counted["tables"] == tables and counted["optimizer_tables"] == 2 * tables
    assert counted["gradients"] == tables + counted["dense"]
    monkeypatch.setattr(memory, "available_memory", lambda: 50_000.0)
    with pytest.raises(
        UserError, match=r"what would fit: tables.dense_gradients false, with .* RowWiseAdagrad"
    ) as error:
        trainer_of(tmp_path).fit(module, ToyData())
    assert "\n" not in str(error.value) and "embedding_sharded_ddp" not in str(error.value)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "world_size", property(lambda trainer: 2))
    with pytest.raises(UserError, match=r"dense_gradients trains in one process, but there are 2: set trainer.devices"):
        trainer_of(tmp_path).fit(module_of(), ToyData())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dense": False},
            "table_optimizer is missing: give a rule such as RowWiseAdagrad, or set network.tables.dense_",
        ),
        ({"rule": SGD(0.1)}, "table_optimizer is given, but dense_optimizer updates all"),
        ({"wide_optimizer": SGD(0.1)}, "wide_optimizer is given, but dense_optimizer updates all"),
        (
            {"dense": False, "rule": SGD(0.1), "regularization": Regularization(fields_l1=1.0)},
            "fields_l1 and fields_l2 apply to whole tables, but gradients of tables have only the rows of a step: set "
            "network",
        ),
        ({"initialization": "normal"}, "initialization 'normal' is not one of own, xavier"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module_of(**options)


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"dense_gradients": True, "on_host": "all"}, "dense_gradients and tables.on_host exclude each other"),
        ({"initial_std": -1.0}, "initial_std is -1.0 and initial_bound None; expected a number of 0 or more"),
        ({"initial_std": 1.0, "initial_bound": 1.0}, "expected a number of 0 or more for one of them"),
        ({"padding_row": -1}, "padding_row is -1; expected the number of a row"),
    ):
        with pytest.raises(UserError, match=message):
            TableSettings(**settings)  # type: ignore[arg-type]
    with pytest.raises(
        UserError,
        match=r"padding_row is 4, and table A has 4 rows; expected a row that every table has",
    ):
        Embeddings({"A": 4}, 2, 1, TableSettings(padding_row=4))
    with pytest.raises(UserError, match=r"regularization.network_l2 is -1; expected a number of 0 or more"):
        Regularization(network_l2=-1)


@pytest.mark.parametrize("dense", [True, False])
def test_ids_of_the_padding_row_add_nothing(dense: bool) -> None:
    settings = TableSettings(padding_row=0, dense_gradients=dense, initial_std=0.5)
    tables = Embeddings({"A": 4, "B": 3}, 2, 1, settings)
    bags = SparseIds(values=torch.tensor([0, 1, 2, 0, 2]).int(), tables=2, offsets=torch.tensor([0, 2, 3, 4, 5]))
    without = SparseIds(values=torch.tensor([1, 2, 2]).int(), tables=2, offsets=torch.tensor([0, 1, 2, 2, 3]))
    with torch.no_grad():
        for group in tables.groups:
            for piece in group.lookup.pieces:
                assert piece.of(group.lookup.weight)[0].eq(0).all()
                piece.of(group.lookup.weight)[0] = 7
    torch.testing.assert_close(tables(bags), tables(without))
    one_hot = SparseIds(values=torch.tensor([[0, 1]]).int(), tables=2)
    assert tables(one_hot)[0, :2].eq(0).all() and tables(one_hot)[0, 2:].ne(0).all()
    tables(bags).sum().backward()
    gradient = tables.groups[0].lookup.gradient()
    assert gradient is not None and gradient.values[gradient.rows == 0].eq(0).all()
    replaced = Embeddings({"A": 4}, 2, 1, TableSettings(padding_row=0, quotient_remainder=QuotientRemainder(
        collisions=2, threshold=0)))  # fmt: skip
    assert replaced(SparseIds(values=torch.tensor([[0], [1]]).int(), tables=1)).ne(0).all(1).tolist() == [False, True]


def test_fuxictrs_initialization() -> None:
    features = Features(dense=50, tables={"A": 70_000, "B": 50})
    network = partial(DeepFM, embedding_dim=8, deep=[300], tables=TableSettings(initial_std=1e-4, padding_row=0))
    module = CTRModule(
        network, SGD(0.1), ADAM, initialization="xavier", schema=toy_schema({"A": 70_000, "B": 50}), seed=1
    )
    module.configure_model()
    for lookup in module.network.lookups():
        assert lookup.weight.std().item() == pytest.approx(1e-4, rel=0.05) and lookup.weight[0].eq(0).all()
    model: Any = module.network
    for layer in model.deep.linears():
        expected = (2 / (layer.in_features + layer.out_features)) ** 0.5
        assert layer.bias.eq(0).all() and layer.weight.std().item() == pytest.approx(expected, rel=0.1)
    wide: Any = network(features, 1)
    own = wide.fields.dense.std().item(), wide.linear.weight.std().item()
    nn_like = CTRModule(network, SGD(0.1), ADAM, initialization="xavier", schema=toy_schema(), seed=1)
    nn_like.make_network = lambda *_: wide
    nn_like.configure_model()
    assert own == (pytest.approx(0.01, rel=0.1), 0.0)
    assert wide.fields.dense.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert wide.linear.weight.std().item() == pytest.approx(1.0, rel=0.3)


def test_penalties_are_those_of_a_plain_sum() -> None:
    weights = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))]
    rule = Regularization(fields_l1=0.3, fields_l2=0.5, network_l1=0.2)
    expected = 0.3 * weights[0].abs().sum() + 0.25 * weights[0].square().sum() + 0.2 * weights[1].abs().sum()
    torch.testing.assert_close(rule.penalty(weights[:1], weights[1:]), expected)
    assert Regularization().penalty(weights, weights) == 0


def test_networks_without_dense_features_or_deep_layers() -> None:
    features, ids = Features(dense=0, tables={"A": 4, "B": 3}), torch.tensor([[1, 2], [3, 0]]).int()
    batch = torch.zeros(2, 0), SparseIds(values=ids, tables=2)
    for options in ({}, {"interaction": "cat"}, {"interaction": "projection", "projection": [[4], [8]]}):
        network = DLRM(features, 1, embedding_dim=4, bottom_mlp=[], top_mlp=[5], **options)  # type: ignore[arg-type]
        assert network(*batch).shape == (2,) and network.bottom is None
    assert DCN(features, 1, embedding_dim=4, deep=[])(*batch).shape == (2,)
    for given, message in (
        ({"structure": "stacked", "deep": []}, "structure stacked needs a deep network, and deep is empty"),
        ({"stacked_deep": [4]}, r"stacked_deep is \[4\] and structure parallel: give both, or neither"),
        ({"cross": "matrix", "cross_activation": "tanh"}, "cross_activation tanh needs cross: mixture; got matrix"),
    ):
        with pytest.raises(UserError, match=message):
            DCN(features, 1, **given)  # type: ignore[arg-type]
