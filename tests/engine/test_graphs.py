"""A recorded step trains as an eager one: ragged batches in padded places, growth, and batches it does not take.

Recording itself needs a GPU (``test_gpu.py``); here, replaying means doing the recorded work again.
"""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from datamodules.synthetic import RandomData
from lightning_dlrm.bench.contenders import Workload, draw_batch
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.engine.graphs import EAGER_STEPS, GraphedStep
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, UpdateRule

WORKLOAD = Workload(tables=(40, 3), dense=4, width=8, bottom=(8,), top=(6,), bags=(0, 5))


def loss_of(logits, batch):
    return nn.functional.binary_cross_entropy_with_logits(logits, batch.label.float(), reduction="mean")


def made(wide_rule: UpdateRule | None = None) -> tuple[CTRNetwork, CTROptimizer]:
    wide = wide_rule is not None
    network = DLRM(WORKLOAD.features, 1, embedding_dim=8, bottom_mlp=[8], top_mlp=[6], wide=wide)
    for lookup in network.lookups():
        lookup.kernels = "triton"
    return network, CTROptimizer(
        network.dense_parameters(), network.lookups(), Adam(0.01), Adam(0.01), wide_rule, network.wide_lookups()
    )


@pytest.mark.parametrize("wide_rule", [None, Adagrad(0.1)], ids=["two rules", "three rules"])
def test_replayed_steps_train_as_eager_ones(wide_rule: UpdateRule | None) -> None:
    pytest.importorskip(
        "triton", "3.9", reason="needs Triton 3.9, whose interpreter runs with NumPy 2.4: recorded steps are not tested"
    )
    recorded = []

    def record(work):
        recorded.append(work)
        return work

    network, optimizer = made(wide_rule)
    eager, eager_optimizer = made(wide_rule)
    graphs = GraphedStep(network, loss_of, optimizer, record=record)
    # More ids than there is room for in the seventh; the eighth is of another size.
    sizes = [8] * EAGER_STEPS + [8, 8, 8, 8, 5, 8]
    batches = [draw_batch(WORKLOAD, size, seed) for seed, size in enumerate(sizes)]
    batches[6] = max((draw_batch(WORKLOAD, 8, seed) for seed in range(100, 200)), key=lambda b: b.ids.values.numel())
    taken = []
    for batch in batches:
        optimizer.replay = None
        taken.append(graphs.takes(batch))
        if taken[-1]:
            loss, logits = graphs.forward_backward(batch)
            optimizer.replay = graphs.update
        else:
            optimizer.zero_grad(set_to_none=False)
            logits = network(batch.dense, batch.ids)
            loss = loss_of(logits, batch)
            loss.backward()
        optimizer.step()
        eager_optimizer.zero_grad()
        eager_logits = eager(batch.dense, batch.ids)
        eager_loss = loss_of(eager_logits, batch)
        eager_loss.backward()
        eager_optimizer.step()
        torch.testing.assert_close(loss.detach(), eager_loss.detach())
        torch.testing.assert_close(logits.detach(), eager_logits.detach())
    assert taken == [False] * EAGER_STEPS + [True, True, True, True, False, True]
    assert len(recorded) == 4  # forward and update, and both again for the larger batch
    for ours, theirs in zip(network.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(group["steps"].item() == len(batches) for group in optimizer.param_groups)


def test_rows_of_a_replayed_gradient_are_summed_anew_at_each_step() -> None:
    """Norms of gradients, and messages about them, ask for the sums that the fused update leaves out."""
    pytest.importorskip(
        "triton", "3.9", reason="needs Triton 3.9, whose interpreter runs with NumPy 2.4: recorded steps are not tested"
    )
    network, optimizer = made()
    lookup = optimizer.lookups[0]

    def record(work):
        work()

        def replay() -> None:
            # As a graph does: what it writes lies where it was.
            lookup.gradient().lookups[1].mul_(2)

        return replay

    graphs = GraphedStep(network, loss_of, optimizer, record=record)
    batch = draw_batch(WORKLOAD, 8, 0)
    graphs.forward_backward(batch)
    before = optimizer.gradient_norm(), lookup.gradient().values.clone()
    graphs.forward_backward(batch)
    torch.testing.assert_close(lookup.gradient().values, 2 * before[1])
    assert optimizer.gradient_norm() > before[0]


def test_graphs_are_refused_in_one_line_where_they_cannot_be() -> None:
    network = WORKLOAD.network()
    with pytest.raises(UserError, match="cuda_graphs needs tables on the GPU with the fused kernels"):
        GraphedStep(network, loss_of, CTROptimizer([], network.lookups(), SGD(0.1), SGD(0.1)))
    data = RandomData(tables=[20, 30], dense=3, train_rows=64, validation_rows=16, test_rows=0, batch_size=16)
    module = CTRModule(DLRM, SGD(0.1), SGD(0.1), schema=data.schema, cuda_graphs=True)
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(UserError, match="cuda_graphs needs a CUDA device, and this fit is on cpu"):
        trainer.fit(module, data)
