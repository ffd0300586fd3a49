"""FBGEMM's tables do what ours do, in our memory: vectors, rows, optimiser state, also with clipped gradients."""

import pytest
import torch

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.lookup import Table
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule
from lightning_dlrm.tables.fbgemm_tables import FBGEMMTables, use_fbgemm
from lightning_dlrm.tables.tables import EmbeddingTables
from tests.kernels.test_kernels import ROWS, one_hot, ragged


def tables(width: int = 8) -> torch.nn.Module:
    whole = EmbeddingTables([Table.of_column(f"C{i}", rows) for i, rows in enumerate(ROWS)], width, seed=1)
    return torch.nn.ModuleDict({"lookup": whole})


@pytest.mark.parametrize("rule", [SGD(0.3), Adagrad(0.1, initial_accumulator=0.1), RowWiseAdagrad(0.1, epsilon=1e-6)])
@pytest.mark.parametrize("clipped", [False, True])
def test_they_train_as_ours(rule: UpdateRule, clipped: bool) -> None:
    pytest.importorskip("fbgemm_gpu", reason="FBGEMM is not installed: its tables are not tested")
    ours, theirs = tables(), tables()
    use_fbgemm(theirs, type(rule).__name__, vars(rule))
    lookups = ours["lookup"], theirs["lookup"]
    assert isinstance(lookups[1], FBGEMMTables)
    assert [*dict(theirs.named_parameters())] == ["lookup.weight"] == [*theirs.state_dict()]
    optimizers = [CTROptimizer([], [lookup], rule, rule) for lookup in lookups]
    generator = torch.Generator().manual_seed(0)
    batches = [
        one_hot(40, generator),
        ragged(30, generator),
        ragged(30, generator, weighted=True),
        one_hot(0, generator),
    ]
    for step, ids in enumerate(batches):
        vectors = []
        for lookup, optimizer in zip(lookups, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"].fill_(0.1 / (step + 1))
            optimizer.zero_grad()
            out = lookup(ids)
            vectors.append(out.detach())
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(step)))
            if clipped:
                optimizer.clip_gradient_norm(1.0)
            optimizer.step()
        torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lookups[1].weight, lookups[0].weight, rtol=1e-4, atol=1e-6)
    for slot, values in optimizers[0].table_state[0].items():
        torch.testing.assert_close(optimizers[1].table_state[0][slot], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "width", "message"),
    [
        (Adam(0.1), 8, "no rule Adam for tables"),
        (SGD(0.1, l2=0.1), 8, "neither l2 nor weight_decay"),
        (SGD(0.1), 5, "multiples of 4, and one here is 5"),
    ],
)
def test_what_it_has_not_is_refused(rule: UpdateRule, width: int, message: str) -> None:
    pytest.importorskip("fbgemm_gpu", reason="FBGEMM is not installed: its tables are not tested")
    with pytest.raises(UserError, match=message):
        use_fbgemm(tables(width), type(rule).__name__, vars(rule))
