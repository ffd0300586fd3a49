"""A fault in a class of the user's own is one line that names the class, its file and line, and what to write."""

import functools
import re
import sys
from pathlib import Path

import pytest

from lightning_dlrm.__main__ import main
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.own_code import fault_in_own_code
from lightning_dlrm.testing import check_network
from tests.cli.test_cli import FIT, QUICK, own_folders

__all__ = ["own_folders"]  # a fixture that every test uses

OWN = """
import pytorch_lightning as pl
import torch

from datamodules import Criteo
from lightning_dlrm import Batch, CTRNetwork, Embeddings, SparseIds
from lightning_dlrm.models.layers import MLP, initialize
from lightning_dlrm.objectives.losses import Loss
from lightning_dlrm.optim.rules import UpdateRule


class Good(CTRNetwork):
    def __init__(self, features, seed=0):
        super().__init__(features.dense)
        self.embeddings = Embeddings(features.tables, 2, seed)
        self.deep = MLP([features.dense, 1], linear_output=True)
        initialize(self, seed)

    def score(self, dense, vectors):
        return self.deep(self.missing(dense)).squeeze(1) + vectors["embeddings"].sum(1)


class NoFeatures(Good):
    def __init__(self):
        super().__init__()


class NoSeed(Good):
    def __init__(self, features):
        super().__init__(features)


class NoScore(CTRNetwork):
    def __init__(self, features, seed=0):
        super().__init__(features.dense)
        self.embeddings = Embeddings(features.tables, 2, seed)


class ScoreOneArg(Good):
    def score(self, vectors):
        return vectors["embeddings"].sum(1)


class TextResult(NoScore):
    def score(self, dense, vectors):
        return "x"


class NetworkNeeds(Good):
    def __init__(self, features, seed, magic):
        super().__init__(features, seed)


class NoInit(CTRNetwork):
    def __init__(self, features, seed=0):
        self.embeddings = Embeddings(features.tables, 2, seed)


class Divides(Good):
    def score(self, dense, vectors):
        return super().score(dense, vectors) / 0


class NoStep(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})


class NoRate(torch.optim.SGD):
    def __init__(self, params):
        torch.optim.Optimizer.__init__(self, params, {})


class OptimizerNeeds(torch.optim.SGD):
    def __init__(self, params, magic):
        super().__init__(params, lr=0.1)


class OptimizerRaises(torch.optim.SGD):
    def __init__(self, params, speed="fast"):
        super().__init__(params, lr=0.1 if speed < 0 else 1)


class NoState(UpdateRule):
    pass


class RuleNeeds(UpdateRule):
    def __init__(self, magic):
        super().__init__(0.1)


class StateOneArg(UpdateRule):
    def state(self):
        return {}


class NoRates(torch.optim.lr_scheduler.LRScheduler):
    pass


class ScheduleNeeds(torch.optim.lr_scheduler.LRScheduler):
    def __init__(self, optimizer, magic):
        super().__init__(optimizer)


class OneRate(torch.optim.lr_scheduler.LRScheduler):
    def get_lr(self):
        return 0.1


class NoCosts(Loss):
    pass


class MeanCosts(Loss):
    def costs(self, logits, targets):
        return (logits - targets).mean()


class LossNeeds(Loss):
    def __init__(self, magic):
        super().__init__()


class HookOneArg(pl.Callback):
    def on_train_start(self):
        pass


class CallbackNeeds(pl.Callback):
    def __init__(self, magic):
        pass


class NoSchema(pl.LightningDataModule):
    pass


class NoLoader(Criteo):
    train_dataloader = pl.LightningDataModule.train_dataloader


class NoneLoader(Criteo):
    def train_dataloader(self):
        return None


def first(samples):
    return samples[0]


class Tuples(Criteo):
    def train_dataloader(self):
        return torch.utils.data.DataLoader([self.changed(batch) for batch in super().train_dataloader()],
                                           collate_fn=first)

    def changed(self, batch):
        return batch.dense, batch.label


class Shapes(Tuples):
    def changed(self, batch):
        batch.dense = batch.dense[:, :1]
        batch.checked_table_rows = None
        return batch


class Types(Tuples):
    def changed(self, batch):
        batch.ids.values = batch.ids.values.float()
        batch.checked_table_rows = None
        return batch


class DataNeeds(Criteo):
    def __init__(self, magic):
        super().__init__()
"""

CASES = {
    "model.network": {
        "NoFeatures": "in NoFeatures.__init__: TypeError: .* define it as __init__(self, features, seed, ...)",
        "NoSeed": "in NoSeed.__init__: TypeError: .* define it as __init__(self, features, seed, ...)",
        "NoScore": "class NoScore: .*NoScore defines neither score nor forward; define score(self, dense_BI, vectors)",
        "ScoreOneArg": "in ScoreOneArg.score: TypeError: .* define it as score(self, dense_BI, vectors)",
        "TextResult": "TextResult.score (own.py, line .* returns a str; expected one logit for each sample",
        "NetworkNeeds": "model.network: magic of NetworkNeeds (own.py, line .* is missing; .* --model.network.magic",
        "NoInit": "in __init__: AttributeError: .* before Module.__init__() call; call super().__init__(...) first",
        "Divides": "NaN or infinite at step 1 .* before the first update, so learning rates are not the cause; ",
    },
    "model.dense_optimizer": {
        "NoStep": "class NoStep: NoStep does not define step; define step(self, closure=None)",
        "NoRate": "dense_optimizer NoRate (own.py, line .* has no lr",
        "OptimizerNeeds": "magic of OptimizerNeeds (own.py, line .* is missing; .* --model.dense_optimizer.magic",
        "OptimizerRaises": "in __init__: TypeError: '<' not supported",
    },
    "model.table_optimizer": {
        "NoState": "class NoState: .* does not define state; define state(self, weight_RD)",
        "StateOneArg": "in StateOneArg.state: TypeError: .* define it as state(self, weight_RD)",
        "RuleNeeds": "magic of RuleNeeds (own.py, line .* is missing",
    },
    "model.schedule": {
        "NoRates": "class NoRates: NoRates does not define get_lr; define get_lr(self)",
        "OneRate": "schedule OneRate (own.py, line .* 'float' object is not iterable",
        "ScheduleNeeds": "magic of ScheduleNeeds (own.py, line .* is missing",
    },
    "model.loss": {
        "NoCosts": "class NoCosts: .* does not define costs; define costs(self, logits_B, targets_B)",
        "MeanCosts": "MeanCosts.costs (own.py, line .* returns shape (); expected the cost of each sample",
        "LossNeeds": "magic of LossNeeds (own.py, line .* is missing",
    },
    "trainer.callbacks+": {
        "HookOneArg": "in HookOneArg.on_train_start: .* define it as on_train_start(self, trainer, pl_module)",
        "CallbackNeeds": "magic of CallbackNeeds (own.py, line .* is missing",
    },
    "data": {
        "NoSchema": "NoSchema (own.py, line .* has no schema; expected a DatasetSchema",
        "NoLoader": "class NoLoader: .* must be implemented .*; define train_dataloader(self)",
        "NoneLoader": "NoneLoader.train_dataloader returns no dataloader; expected a DataLoader",
        "Tuples": "a dataloader of Tuples (own.py, line .* yields a tuple; expected a Batch",
        "Shapes": "yields a batch whose dense has the shape (256, 1); expected (256, 13)",
        "Types": "yields a batch whose ids.values has the dtype torch.float32; expected torch.int32",
        "DataNeeds": "magic of DataNeeds (own.py, line .* is missing; .* --data.magic",
    },
}


@pytest.fixture(autouse=True)
def own(own_folders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module ``own`` in the current folder."""
    Path("own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "own", raising=False)


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in CASES.items() for name in names])
def test_a_fault_in_an_own_class_is_one_line(key: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, *QUICK, "--run_dir", "run", "--trust", "own", f"--{key}=own.{name}"]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    was_removed = any(line.endswith("run folder run is removed: the run has no results") for line in printed)
    assert was_removed == any(line.endswith("run folder: run") for line in printed) and not Path("run").exists()
    error = printed[-1]
    said = ".*".join(re.escape(part) for part in CASES[key][name].split(".*"))
    assert error.startswith("error: ") and re.search(said, error), error
    assert "own.py, line" in error or name in ("NoneLoader", "Divides"), error


def test_check_network_names_the_same_faults() -> None:
    import own

    for name, said in (("NoFeatures", "__init__"), ("ScoreOneArg", "score"), ("NoScore", "score")):
        with pytest.raises(UserError, match=rf"[;] define (it as )?{said}\(self, .*own.py, line \d+"):
            check_network(getattr(own, name))


def test_check_network_asks_for_defaults() -> None:
    import own

    required = r"own\.py, line \d+, in NetworkNeeds.__init__"
    with pytest.raises(UserError, match=rf"'magic'; give magic a default \({required}\)"):
        check_network(own.NetworkNeeds)


def test_of_two_classes_of_a_name_the_one_at_fault_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("other", "third"):
        Path(f"{name}.py").write_text(f"# {name}\n{OWN}")
        monkeypatch.delitem(sys.modules, name, raising=False)
    import other
    import own
    import third

    for module, file in ((own, "own.py"), (other, "other.py"), (third, "third.py")):
        for name in ("NoFeatures", "ScoreOneArg"):
            for make in (getattr(module, name), functools.partial(getattr(module, name))):
                with pytest.raises(UserError, match=rf"\({file}, line \d+, in {name}"):
                    check_network(make)
    for key, name in (("model.network", "NoFeatures"), ("model.network", "ScoreOneArg"),
                      ("model.table_optimizer", "StateOneArg"), ("trainer.callbacks+", "HookOneArg")):  # fmt: skip
        assert main([*FIT, *QUICK, "--run_dir", "run", "--trust", "third", f"--{key}=third.{name}"]) == 2
        assert "error: third.py, line" in capsys.readouterr().err
    # Without a frame that knows the class, no file is better than a wrong one.
    assert fault_in_own_code(TypeError("NoSeed.__init__() takes 2 positional arguments but 3 were given"))[0] is None
