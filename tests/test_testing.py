"""Contract: ``check_network`` passes what can be trained, and names each mistake of what cannot."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dlrm import (
    DCN,
    DLRM,
    AutoInt,
    CTRNetwork,
    DeepFM,
    Embeddings,
    Features,
    FinalMLP,
    MaskNet,
    UserError,
    check_network,
)
from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.models.baselines import LogisticRegression, MatrixFactorization, XDeepFM
from lightning_dlrm.models.layers import MLP, initialize
from lightning_dlrm.models.network import require_logits
from lightning_dlrm.testing import FEATURES


class Own(CTRNetwork):
    """The tables' vectors and the dense features through an MLP; what its subclasses get wrong is right here."""

    def __init__(self, features: Features, seed: int) -> None:
        super().__init__(features.dense)
        self.embeddings = Embeddings(features.tables, 4, seed)
        self.top = MLP([4 * len(features.tables) + features.dense, 8, 1], linear_output=True)
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        return self.top(torch.cat([self.missing(dense_BI), vectors["embeddings"]], dim=1)).squeeze(1)


@pytest.mark.parametrize(
    "make",
    [
        Own,
        partial(DLRM, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8], wide=True),
        partial(DCN, embedding_dim=4, cross_layers=2, deep=[8], batch_norm=True, dropout=0.2),
        partial(DeepFM, embedding_dim=4, deep=[8]),
        partial(XDeepFM, embedding_dim=4, deep=[8], cin_layers=[3]),
        partial(FinalMLP, embedding_dim=4, first=[8], second=[4], heads=2, context2=["C2"]),
        partial(AutoInt, embedding_dim=4, attention=[4], deep=[8], wide=True),
        partial(MaskNet, embedding_dim=4, structure="parallel", blocks=[4, 4], deep=[4]),
        LogisticRegression,
        partial(MatrixFactorization, columns=["C1", "C2"], embedding_dim=4),
    ],
    ids=lambda make: getattr(make, "func", make).__name__,
)
def test_networks_that_can_be_trained(make: Callable[[Features, int], CTRNetwork]) -> None:
    check_network(make)


class ForwardAlone(Own):
    score = CTRNetwork.score

    def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        return self.top(torch.cat([self.missing(dense_BI), self.embeddings(ids)], dim=1)).squeeze(1)


class NoInit(CTRNetwork):
    def __init__(self, features: Features, seed: int) -> None:
        self.tables = features.tables


class KeepsNaN(Own):
    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        return self.top(torch.cat([dense_BI, vectors["embeddings"]], dim=1)).squeeze(1)


class WrongShape(Own):
    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        return super().score(dense_BI, vectors)[:, None]


class Nothing(Own):
    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Any:
        return None


class Labelled(Own):
    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Any:
        return {"logits": super().score(dense_BI, vectors)}


class Swapped(Labelled):
    def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        logits_B: Tensor = super().forward(dense_BI, ids)["logits"]
        return logits_B


class Probabilities(Own):
    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        return super().score(dense_BI, vectors)[:, None].sigmoid().squeeze(1)


class LogOfZero(Own):
    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        return super().score(dense_BI, vectors) + (0 * self.missing(dense_BI)).sum(1).log()


class Unused(Own):
    def __init__(self, features: Features, seed: int) -> None:
        super().__init__(features, seed)
        self.spare = nn.Parameter(torch.zeros(3))


class WithoutSeed(Own):
    def __init__(self, features: Features, seed: int) -> None:
        super().__init__(features, 7)


class DrawsAnew(Own):
    def __init__(self, features: Features, seed: int) -> None:
        super().__init__(features, seed)
        nn.init.normal_(self.top[0].weight)  # type: ignore[arg-type]


class OwnTable(Own):
    def __init__(self, features: Features, seed: int) -> None:
        super().__init__(features, seed)
        self.table = nn.Embedding(5, 1)
        nn.init.zeros_(self.table.weight)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        return super().score(dense_BI, vectors) + self.table.weight.sum()


class MixesSamples(Own):
    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        logits_B = super().score(dense_BI, vectors)
        return logits_B - logits_B.mean()


class OtherForward(Own):
    def forward(self, dense_BI: Tensor, ids: SparseIds) -> Tensor:
        return 2 * super().forward(dense_BI, ids)


class EndsInReLU(Own):
    def __init__(self, features: Features, seed: int) -> None:
        super().__init__(features, seed)
        self.top = MLP([4 * len(features.tables) + features.dense, 8, 1])
        initialize(self, seed)


class WrongKey(Own):
    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        return vectors["tables"].sum(1)


class WrongOwnKey(Own):
    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        return vectors["embeddings"].sum(1) * {"scale": 2.0}["weight"]


class OptionalVectors(Own):
    """Asks for vectors that it does not have."""

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        try:
            return super().score(dense_BI, {"embeddings": vectors["others"]})
        except KeyError:
            assert vectors.get("others") is None and list(vectors) == ["embeddings"]
            return super().score(dense_BI, vectors)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()


class OneIdOnly(Own):
    def lookup(self, ids: SparseIds) -> dict[str, Tensor]:
        values_BF = ids.values[:, : ids.tables]
        return {"embeddings": self.embeddings(SparseIds(values=values_BF, tables=ids.tables))}


def test_a_network_may_ask_for_vectors_that_it_lacks() -> None:
    check_network(OptionalVectors)


def test_a_network_with_forward_alone() -> None:
    check_network(ForwardAlone)
    network = ForwardAlone(FEATURES, 1)
    require_logits(network, torch.zeros(3), 3)
    for found, words in (
        (torch.zeros(3, 1), r"shape \(3, 1\)"),
        (torch.zeros(3).int(), "dtype torch.int32"),
        ((), "a tuple"),
    ):
        wrong = rf"ForwardAlone.forward \(.*test_testing.py, line \d+\) returns {words}; expected one logit"
        with pytest.raises(UserError, match=wrong):
            require_logits(network, found, 3)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda features, seed: nn.Linear(1, 1), "returns a Linear; derive it from CTRNetwork"),
        (lambda features: Own(features, 1), "cannot be made: make_network.features, seed. raises TypeError"),
        (CTRNetwork, "cannot be made|defines neither score nor forward"),
        (Plain, "- Plain is not a subclass of CTRNetwork; derive your class from CTRNetwork"),
        (NoInit, r"NoInit \(.*test_testing.py, line \d+\) does not initialize its base; call super\(\).__init__\("),
        (EndsInReLU, "no logit is below 0: does the last layer end in a ReLU"),
        (WrongKey, "score of a batch .* no key 'tables'; the keys of vectors are embeddings .*in score"),
        (WrongOwnKey, r"score of a batch .* KeyError: 'weight' \(.*in score\)"),
        (KeepsNaN, "missing dense values are NaN"),
        (WrongShape, r"returns shape \(6, 1\); expected one logit for each sample, \(6,\)"),
        (Nothing, "returns None; expected one logit for each sample"),
        (Labelled, "returns a dict; expected one logit for each sample"),
        (Swapped, r"score.dense, lookup.ids.. returns a dict"),
        (Probabilities, "returns probabilities; expected logits"),
        (LogOfZero, "returns logits that are not finite, also without missing dense values"),
        (Unused, "spare gets no gradient, which DDP refuses"),
        (WithoutSeed, "networks of two seeds are the same"),
        (DrawsAnew, "two networks of one seed differ in top.0.weight"),
        (OwnTable, r"table is a torch.nn.Embedding"),
        (MixesSamples, "depends on the other samples"),
        (OtherForward, r"forward\(dense, ids\) is not score"),
        (OneIdOnly, "a batch with bags of ids"),
    ],
)
def test_each_mistake_is_named(make: Callable[[Features, int], CTRNetwork], words: str) -> None:
    with pytest.raises(UserError, match=words) as found:
        check_network(make)
    # One fault is listed once, whatever batch has it.
    if make in (WrongShape, Nothing, Labelled, KeepsNaN, EndsInReLU, WrongKey, WrongOwnKey, Plain):
        assert ": 1 problem\n" in str(found.value)
