"""Contract: every network is its published formula, has true gradients, counts what it costs, sees no
missing values, and learns."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models import baselines
from lightning_dlrm.models.autoint import AutoInt
from lightning_dlrm.models.baselines import (
    DeepFM,
    FactorizationMachine,
    LogisticRegression,
    MatrixFactorization,
    WideAndDeep,
    XDeepFM,
)
from lightning_dlrm.models.dcn import DCN
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.models.finalmlp import FinalMLP
from lightning_dlrm.models.layers import (
    MLP,
    BatchNorm,
    CompressedInteraction,
    Dropout,
    PairwiseSum,
    place_dropout,
)
from lightning_dlrm.models.masknet import MaskNet
from lightning_dlrm.models.network import CTRNetwork, model_size
from lightning_dlrm.objectives.losses import LogLoss
from lightning_dlrm.optim.rules import Adagrad, Adam
from lightning_dlrm.tables.embeddings import MixedDimensions, QuotientRemainder, TableSettings
from tests.toy import optimizer_of, toy_batch, toy_schema

SMALL = Features(dense=2, tables={"A": 4, "B": 30, "C": 1}, dense_names=("x0", "x1"))
TRICK = TableSettings(quotient_remainder=QuotientRemainder(collisions=3, threshold=5), pooling_weights="learned")
NARROW = TableSettings(mixed_dimensions=MixedDimensions(temperature=0.4))
MIXED = TableSettings(mixed_dimensions=MixedDimensions(temperature=0.4), project=True)
DLRM_WIDTHS: dict[str, Any] = {"embedding_dim": 4, "bottom_mlp": [6, 4], "top_mlp": [5]}

NETWORKS: dict[str, tuple[type[CTRNetwork], dict[str, Any]]] = {
    "DLRM": (DLRM, DLRM_WIDTHS),
    "DLRM cat": (DLRM, DLRM_WIDTHS | {"interaction": "cat", "tables": NARROW}),
    "DLRM projection": (DLRM, DLRM_WIDTHS | {"interaction": "projection", "projection": [[6, 8], [12]]}),
    "DLRM cross": (
        DLRM, DLRM_WIDTHS | {"interaction": "cross", "cross": "low_rank", "cross_layers": 2, "cross_rank": 3}),
    "DLRM tricks": (DLRM, DLRM_WIDTHS | {"tables": TRICK, "missing": "learned"}),
    "DLRM mixed": (DLRM, DLRM_WIDTHS | {"tables": MIXED}),
    "DLRM batch norm": (DLRM, DLRM_WIDTHS | {"batch_norm": True}),
    "DLRM wide": (DLRM, DLRM_WIDTHS | {"wide": True, "missing": "learned"}),
    "DCN": (DCN, {"embedding_dim": 4, "cross_layers": 2, "deep": [6]}),
    "DCN wide": (DCN, {"embedding_dim": 4, "cross_layers": 2, "deep": [6], "wide": True}),
    "DCN stacked matrix": (
        DCN, {"embedding_dim": 4, "cross_layers": 2, "deep": [6], "cross": "matrix", "structure": "stacked"}),
    "DCN batch norm": (DCN, {"embedding_dim": 4, "cross_layers": 2, "deep": [6], "batch_norm": True, "tables": MIXED}),
    "DCN vectors": (
        DCN, {"embedding_dim": 4, "cross_layers": 2, "deep": [6], "embed_dense": True, "structure": "stacked_parallel",
              "stacked_deep": [5], "tables": TableSettings(padding_row=0)}),
    "DCN crosses alone": (
        DCN, {"embedding_dim": 4, "cross_layers": 2, "deep": [], "cross": "mixture", "cross_rank": 2,
              "cross_experts": 2, "cross_activation": "tanh", "tables": TableSettings(dense_gradients=True)}),
    "LogisticRegression": (LogisticRegression, {"missing": "learned"}),
    "MatrixFactorization": (MatrixFactorization, {"columns": None, "embedding_dim": 4}),
    "FactorizationMachine": (FactorizationMachine, {"embedding_dim": 4}),
    "MLP": (baselines.MLP, {"embedding_dim": 4, "deep": [6]}),
    "WideAndDeep": (WideAndDeep, {"embedding_dim": 4, "deep": [6], "batch_norm": True}),
    "WideAndDeep vectors": (WideAndDeep, {"embedding_dim": 4, "deep": [6], "embed_dense": True, "linear_bias": False}),
    "DeepFM": (DeepFM, {"embedding_dim": 4, "deep": [6]}),
    "XDeepFM": (XDeepFM, {"embedding_dim": 4, "cin_layers": [3, 2], "deep": [6], "tables": MIXED}),
    "FinalMLP": (
        FinalMLP, {"embedding_dim": 4, "first": [6, 4], "second": [6], "heads": 2, "gate": [3],
                   "context2": ["C", "A", "x1"]}),
    "FinalMLP without gates": (
        FinalMLP, {"embedding_dim": 4, "first": [4], "second": [6], "gates": False, "batch_norm": [True, False],
                   "tables": TableSettings(dense_gradients=True)}),
    "AutoInt": (AutoInt, {"embedding_dim": 4, "attention": [6, 6], "deep": [6], "scale": True, "wide": True}),
    "AutoInt alone": (AutoInt, {"embedding_dim": 4, "attention": [4], "heads": 1, "residual": False, "deep": []}),
    "MaskNet": (MaskNet, {"embedding_dim": 4, "blocks": [24, 12], "reduction": 0.5}),
    "MaskNet parallel": (
        MaskNet, {"embedding_dim": 4, "structure": "parallel", "blocks": [24, 20], "deep": [], "field_norm": False}),
}  # fmt: skip
every_network = pytest.mark.parametrize("name", NETWORKS)


def make(name: str, features: Features = SMALL) -> CTRNetwork:
    kind, options = NETWORKS[name]
    if "context2" in options and features is not SMALL:
        options = options | {"context2": [list(features.tables)[1], features.dense_names[0]]}
    if "columns" in options:
        options = options | {"columns": list(features.tables)[:2]}
    return kind(features, 1, **options)


def batch(size: int = 5) -> tuple[Tensor, SparseIds]:
    ids = torch.stack([torch.arange(size) % rows for rows in SMALL.table_rows], 1).int()
    return torch.linspace(-1, 1, 2 * size).view(size, 2), SparseIds(values=ids, tables=3)


def shake(network: CTRNetwork) -> CTRNetwork:
    """Random weights everywhere, also where they start at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return network


@every_network
def test_gradients_in_float64(name: str) -> None:
    network = shake(make(name).double())
    dense, ids = batch()
    # Of the input, and of every dense weight.
    assert torch.autograd.gradcheck(lambda x: network(x, ids), dense.double().requires_grad_())
    for key, parameter in network.named_parameters():
        if any(parameter is lookup.weight for lookup in network.lookups()):
            continue

        def at(value: Tensor, key: str = key) -> Tensor:
            return torch.func.functional_call(network, {key: value}, (dense.double(), ids))

        # Along a random direction, since every element of many weights would take seconds; hence the narrow tolerance.
        start = parameter.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(at, start, fast_mode=True, atol=1e-7, rtol=1e-5), key


@every_network
def test_table_gradients_are_those_of_finite_differences(name: str) -> None:
    network = shake(make(name).double())
    dense, ids = batch()
    network(dense.double(), ids).square().sum().backward()
    for lookup in network.lookups():
        gradient = lookup.gradient()
        for row, values in zip(gradient.rows[:3].tolist(), gradient.values, strict=False):
            with torch.no_grad():
                ends = []
                for step in (1e-6, -1e-6):
                    lookup.weight[row, 0] += step
                    ends.append(network(dense.double(), ids).square().sum())
                    lookup.weight[row, 0] -= step
            assert values[0].item() == pytest.approx((ends[0] - ends[1]).item() / 2e-6, rel=1e-4, abs=1e-6)


@every_network
def test_every_network_learns(name: str) -> None:
    network = make(name, toy_schema().features)
    optimizer, losses = optimizer_of(network, Adagrad(0.05), Adam(0.05)), []
    for epoch in range(3):
        for seed in range(15):
            data = toy_batch(64, seed)
            optimizer.zero_grad()
            loss = LogLoss().summed(network(data.dense, data.ids), data.label) / 64
            loss.backward()
            optimizer.step()
            losses.append((epoch, loss.item()))
    mean = [sum(loss for e, loss in losses if e == epoch) / 15 for epoch in range(3)]
    assert mean[2] < min(mean[0], 0.69) - 0.03, mean


@every_network
def test_costs_are_counted_without_allocating(name: str) -> None:
    with torch.device("meta"):
        size = model_size(make(name))
    network = make(name).double()
    assert size == model_size(network)
    assert size.total == sum(parameter.numel() for parameter in network.parameters())
    dense, ids = batch()
    flops = FlopCounterMode(display=False)
    with flops:
        network(dense.double(), ids)
    # The counter takes whole squares of dot products, and knows no products element by element.
    counted = flops.get_total_flops() // (2 * len(dense))
    by_element = {"MLP": 0, "DLRM cat": 0, "DLRM projection": 0, "WideAndDeep": 2, "DeepFM": 2 + 8 + 5 * 4}
    if name in by_element:
        assert network.multiply_adds() == counted + by_element[name]
    assert network.multiply_adds() >= 1


@every_network
def test_missing_dense_values_are_zero_or_learned(name: str) -> None:
    network = shake(make(name)).eval()
    dense, ids = batch()
    dense[1, 0] = dense[2, 1] = float("nan")
    logits = network(dense, ids)
    assert logits.isfinite().all()
    value = network.missing.value
    stand_in = torch.zeros(2) if value is None else value
    filled = dense.clone()
    filled[1, 0], filled[2, 1] = stand_in[0], stand_in[1]
    torch.testing.assert_close(logits, network(filled, ids))
    if value is not None:
        logits.sum().backward()
        assert value.grad.abs().max() > 0


@every_network
def test_an_empty_slice_has_no_logits(name: str) -> None:
    network = make(name)
    ids = SparseIds(values=torch.zeros(0, 3, dtype=torch.int32), tables=3)
    logits = network(torch.zeros(0, 2), ids)
    assert logits.shape == (0,)
    logits.sum().backward()


def linear(network: Any, dense: Tensor, ids: SparseIds) -> Tensor:
    lookup = network.tables
    weights = [p.of(lookup.weight)[ids.values[:, f].long(), 0] for f, p in enumerate(lookup.pieces)]
    return sum(weights) + dense @ network.weight + network.bias


def fields(network: Any, dense: Tensor, ids: SparseIds) -> list[Tensor]:
    (group,) = network.embeddings.groups
    vectors = [p.of(group.lookup.weight)[ids.values[:, f].long()] for f, p in enumerate(group.lookup.pieces)]
    scaled = [dense[:, i, None] * network.dense[i] for i in range(dense.shape[1])]
    return scaled + vectors if network.dense_first else vectors + scaled


def layers(x: Tensor, stack: MLP) -> Tensor:
    """Linear layers with ReLUs between them."""
    linears = stack.linears()
    for i, layer in enumerate(linears):
        x = x @ layer.weight.T + layer.bias
        x = x.relu() if i + 1 < len(linears) else x
    return x


def pairs(vectors: list[Tensor]) -> Tensor:
    return sum((a * b).sum(1) for a, b in itertools.combinations(vectors, 2))


def rows(lookup: Any, ids: SparseIds, columns: list[int]) -> list[Tensor]:
    return [p.of(lookup.weight)[ids.values[:, c].long()] for p, c in zip(lookup.pieces, columns, strict=True)]


def final_mlp(n: Any, x: Tensor, ids: SparseIds) -> Tensor:
    e = torch.cat(fields(n.fields, x, ids), 1)
    gated = [e, e]
    if n.gate1 is not None:
        vector = n.gate1.vector.expand(len(x), -1)
        context = torch.cat([x[:, 1:] * n.gate2.dense.weight, *rows(n.gate2.tables, ids, [0, 2])], 1)
        gated = [e * 2 * layers(c, g.layers).sigmoid() for c, g in ((vector, n.gate1), (context, n.gate2))]
    a, b = (mlp(v).double() for mlp, v in zip((n.first, n.second), gated, strict=True))
    heads, p, q = n.fusion.products.shape
    linear = sum((v * w.weight).sum(1) + w.bias for v, w in ((a, n.fusion.first), (b, n.fusion.second)))
    return linear + sum(
        a[:, h * p + i] * n.fusion.products[h, i, j] * b[:, h * q + j]
        for h, i, j in itertools.product(range(heads), range(p), range(q))
    )


def auto_int(n: Any, x: Tensor, ids: SparseIds) -> Tensor:
    e = torch.stack(fields(n.fields, x, ids), 1)
    y = e
    for layer in n.attention:
        q, k, v = (y @ w.weight.T for w in (layer.query, layer.key, layer.value))
        width, mixed = q.shape[2] // layer.heads, []
        for h in range(layer.heads):
            own = slice(h * width, (h + 1) * width)
            products = torch.einsum("bik,bjk->bij", q[..., own], k[..., own]) * layer.scale
            mixed.append(torch.einsum("bij,bjk->bik", products.softmax(2), v[..., own]))
        same = y if layer.residual is None else y @ layer.residual.weight.T
        y = (torch.cat(mixed, 2) + (same if layer.adds_input else 0)).relu()
    logits = layers(y.flatten(1), n.logit).squeeze(1)
    if n.deep is None:
        return logits
    wide = sum(rows(n.wide.tables, ids, [0, 1, 2])).squeeze(1) + x @ n.wide.weight
    return logits + layers(e.flatten(1), n.deep).squeeze(1) + wide


def mask_net(n: Any, x: Tensor, ids: SparseIds) -> Tensor:
    vectors = fields(n.fields, x, ids)
    e = v = torch.cat(vectors, 1)
    if len(n.field_norms):
        v = torch.cat([norm(vector) for norm, vector in zip(n.field_norms, vectors, strict=True)], 1)
    outputs = []
    for block in n.blocks:
        outputs.append(block.norm((layers(e, block.mask) * v) @ block.hidden.weight.T).relu())
        v = outputs[-1] if n.is_serial else v
    return layers(v if n.is_serial else torch.cat(outputs, 1), n.logit).squeeze(1)


FORMULAS: dict[str, Callable[[Any, Tensor, SparseIds], Tensor]] = {
    "LogisticRegression": lambda n, x, ids: linear(n.linear, x, ids),
    "MatrixFactorization": lambda n, x, ids: (
        n.mean
        + sum(p.of(n.biases.weight)[ids.values[:, f].long(), 0] for f, p in enumerate(n.biases.pieces))
        + pairs([p.of(n.vectors.weight)[ids.values[:, f].long()] for f, p in enumerate(n.vectors.pieces)])
    ),
    "FactorizationMachine": lambda n, x, ids: linear(n.linear, x, ids) + pairs(fields(n.fields, x, ids)),
    "DeepFM": lambda n, x, ids: (
        linear(n.linear, x, ids)
        + pairs(fields(n.fields, x, ids))
        + layers(torch.cat(fields(n.fields, x, ids), 1), n.deep).squeeze(1)
    ),
    "FinalMLP": final_mlp,
    "FinalMLP without gates": final_mlp,
    "AutoInt": auto_int,
    "AutoInt alone": auto_int,
    "MaskNet": mask_net,
    "MaskNet parallel": mask_net,
    "MLP": lambda n, x, ids: layers(torch.cat([n.embeddings(ids), x], 1), n.deep).squeeze(1),
    "WideAndDeep": lambda n, x, ids: linear(n.wide, x, ids) + n.deep(torch.cat([n.embeddings(ids), x], 1)).squeeze(1),
    "XDeepFM": lambda n, x, ids: (
        linear(n.linear, x, ids)
        + layers(n.cin(n.fields(x, n.fields.lookup(ids))), n.cin_output).squeeze(1)
        + layers(n.fields(x, n.fields.lookup(ids)).flatten(1), n.deep).squeeze(1)
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_baselines_are_the_published_formulas(name: str) -> None:
    network = shake(make(name).double())
    dense, ids = batch()
    torch.testing.assert_close(network(dense.double(), ids), FORMULAS[name](network, dense.double(), ids))


def test_compressed_interaction_is_the_published_formula() -> None:
    cin = CompressedInteraction(3, 4, [2, 5]).double()
    x0 = torch.randn(6, 3, 4, dtype=torch.float64)
    x, outputs = x0, []
    for layer, rows in zip(cin.layers, (2, 5), strict=True):
        weight = layer.weight.view(rows, x.shape[1], 3)
        x = torch.stack(
            [
                sum(weight[h, i, j] * x[:, i] * x0[:, j] for i in range(x.shape[1]) for j in range(3)) + layer.bias[h]
                for h in range(rows)
            ],
            1,
        )
        outputs.append(x.sum(2))
    torch.testing.assert_close(cin(x0), torch.cat(outputs, 1))
    assert cin.multiply_adds() == 4 * (3 * 2 * (3 + 1) + 2 * 5 * (3 + 1))


def test_pairwise_sum_is_over_all_pairs() -> None:
    vectors = torch.randn(6, 5, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(PairwiseSum()(vectors), pairs(list(vectors.unbind(1))))
    assert torch.autograd.gradcheck(PairwiseSum(), vectors)


def test_projection_interaction_is_that_of_torchrec() -> None:
    network = shake(make("DLRM projection").double())
    dense, ids = batch()
    bottom = layers(dense.double(), network.bottom).relu()
    joined = torch.cat([bottom, network.embeddings(ids)], 1)
    left = layers(joined, network.interaction.left).relu().view(5, 2, 4)
    right = layers(joined, network.interaction.right).relu().view(5, 4, 3)
    products = torch.stack([(left[:, i] * right[:, :, j]).sum(1) for i in range(2) for j in range(3)], 1)
    expected = layers(torch.cat([bottom, products], 1), network.top).squeeze(1)
    torch.testing.assert_close(network(dense.double(), ids), expected)


def test_batch_norm_follows_every_hidden_layer_and_bears_one_sample() -> None:
    stack = MLP([3, 8, 4, 1], linear_output=True, batch_norm=True)
    assert [type(layer) for layer in stack] == [nn.Linear, BatchNorm, nn.ReLU] * 2 + [nn.Linear]
    x = torch.randn(64, 3)
    hidden = stack[0](x)
    normal = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(stack[1](hidden), normal, rtol=1e-4, atol=1e-4)
    assert stack(x[:1]).isfinite().all()
    stack(x[:0]).sum().backward()


def test_tables_of_every_kind_have_names_of_their_own() -> None:
    for name in NETWORKS:
        tables = [table.name for lookup in make(name).lookups() for table in lookup.tables]
        assert len(set(tables)) == len(tables), name
    assert [t.name for lookup in make("DeepFM").lookups() for t in lookup.tables] == [
        "A/linear", "B/linear", "C/linear", "A", "B", "C",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (DLRM, {"interaction": "projection"}, "needs projection, which is missing: give two lists"),
        (DLRM, {"interaction": "projection", "projection": [[32], [20]]}, "ends in 20 and embedding_dim is 16"),
        (DLRM, {"interaction": "projection", "projection": [[32]]}, r"projection is \[\[32\]\]; expected two"),
        (DLRM, {"interaction": "cross", "cross": "matrix"}, "needs cross_layers, which is missing: give a number"),
        (DLRM, {"interaction": "cross", "cross_layers": 2}, "needs cross, which is missing: give vector, matrix"),
        (DLRM, {"cross": "matrix"}, "cross needs interaction: cross; got dot"),
        (DLRM, {"cross_rank": 3}, "cross_rank needs interaction: cross; got dot"),
        (DLRM, {"interaction": "cat", "projection": [[16], [16]]}, "projection needs interaction: projection; got cat"),
        (
            DLRM,
            {"tables": TableSettings(dims={"B": 8})},
            "B has the width 8 and .*tables.project to true",
        ),
        (FactorizationMachine, {"tables": TableSettings(dims={"B": 8})}, "FactorizationMachine needs vectors of one"),
        (XDeepFM, {"cin_layers": []}, "cin_layers is"),
        (FinalMLP, {"context1": ["Z"]}, "context1 names Z, which is not a field; the fields are x0, x1, A, B, C"),
        (FinalMLP, {"context2": ["x0", "A", "A"]}, "context2 names A twice; expected each field once"),
        (FinalMLP, {"heads": 3}, "heads 3; expected widths whose last ones are multiples of heads"),
        (FinalMLP, {"gates": False, "context2": ["A"]}, "context1 and context2 are for gates, and gates is false"),
        (FinalMLP, {"dropout": [0.1]}, r"dropout \[0.1\]; expected a value, or two each"),
        (AutoInt, {"attention": [5]}, r"attention is \[5\] and heads 2; expected at least one width, each a multiple"),
        (MaskNet, {"blocks": []}, r"blocks is \[\]; expected at least one width"),
        (MaskNet, {"deep": [4]}, r"deep is \[4\], which needs structure: parallel"),
        (MaskNet, {"structure": "beside"}, "'beside' is not one of serial, parallel"),
        (MatrixFactorization, {"columns": ["A"]}, "two columns among A, B, C"),
        (MatrixFactorization, {"columns": ["A", "Z"]}, "two columns among A, B, C"),
        (baselines.MLP, {"missing": "mean"}, "not one of zero, learned"),
        (baselines.MLP, {"deep": [0]}, "each 1 or wider"),
    ],
)
def test_what_does_not_fit_is_refused(network: type, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        network(SMALL, **options)


@pytest.mark.parametrize(("narrow", "wide"), [("DLRM", "DLRM wide"), ("DCN", "DCN wide")])
def test_a_wide_part_adds_a_logistic_regression(narrow: str, wide: str) -> None:
    network, without, linear = make(wide), make(narrow), LogisticRegression(SMALL, 1)
    assert isinstance(network, DLRM | DCN) and network.wide is not None
    dense = torch.randn(9, 2, generator=torch.Generator().manual_seed(1))
    ids = SparseIds(values=torch.tensor([[i % 4, i * 3, 0] for i in range(9)], dtype=torch.int32), tables=3)
    torch.testing.assert_close(network(dense, ids), without(dense, ids))  # it starts at zero
    with torch.no_grad():
        for parameter, twin in zip(network.wide.parameters(), linear.linear.parameters(), strict=True):
            twin.copy_(parameter.normal_(generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(network(dense, ids), without(dense, ids) + linear(dense, ids))
    assert network.multiply_adds() == without.multiply_adds() + linear.multiply_adds()


def test_masks_of_a_global_batch_are_the_same_in_any_slices() -> None:
    layers = [Dropout(0.3), Dropout(0.3)]
    ones = torch.ones(4096, 64, dtype=torch.float64)

    def masks(batch: str, start: int, stop: int) -> Tensor:
        place_dropout(layers, seed=1, batch=batch, start=start)
        return torch.stack([layer(ones[start:stop]) for layer in layers]) != 0

    whole = masks("0/1", 0, 4096)
    assert torch.equal(torch.cat([masks("0/1", 0, 1000), masks("0/1", 1000, 1000), masks("0/1", 1000, 4096)], 1), whole)
    # As independent draws: shares of samples, columns and all, and of what two layers, batches and neighbours share.
    other, left_out = masks("0/2", 0, 4096), ~whole
    for pair in ((left_out[0], left_out[1]), (left_out[0], ~other[0]), (left_out[0, 1:], left_out[0, :-1])):
        assert (pair[0] & pair[1]).double().mean() == pytest.approx(0.09, abs=0.003)
    for over, draws in ((1, 4096), (2, 64)):
        shares = left_out.double().mean(over)
        assert shares.mean() == pytest.approx(0.3, abs=0.004)
        assert shares.std() == pytest.approx((0.21 / draws) ** 0.5, rel=0.15)
    assert torch.equal(layers[0](ones).unique(), torch.tensor([0, 1 / 0.7], dtype=torch.float64))
    assert torch.equal(layers[0].eval()(ones), ones)


@pytest.mark.parametrize("samples", [1, 7])
def test_batch_norm_over_ranks_is_that_of_the_batch(samples: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64) + 100
    plain, ours = BatchNorm(5).double(), BatchNorm(5).double()
    ours.sum_over_ranks = lambda value: value
    for _ in range(2):
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = ours(mine), plain(theirs)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-8)
    if samples > 1:
        torch.testing.assert_close(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_dropout_leaves_out_hidden_outputs_in_training_only(batch_norm: bool) -> None:
    torch.manual_seed(1)
    layers = MLP([3, 4000, 1], linear_output=True, batch_norm=batch_norm, dropout=0.25)
    plain = MLP([3, 4000, 1], linear_output=True, batch_norm=batch_norm)
    plain.load_state_dict({k.replace("3.", "2.") if not batch_norm else k.replace("4.", "3."): v
                           for k, v in layers.state_dict().items()})  # fmt: skip
    x = torch.randn(5, 3)
    torch.testing.assert_close(layers.eval()(x), plain.eval()(x))
    assert isinstance(layers[-1], nn.Linear) and isinstance(layers[-2], nn.Dropout)
    hidden = nn.Sequential(*list(layers)[:-1]).train()(x)
    kept = hidden[hidden != 0]
    assert len(kept) / (nn.Sequential(*list(plain)[:-1]).train()(x) != 0).sum().item() == pytest.approx(0.75, abs=0.03)
    with pytest.raises(UserError, match=r"dropout is 1\.0; expected 0 or more, below 1"):
        MLP([3, 1], dropout=1.0)


def test_initial_rows_within_the_bound_given() -> None:
    tables = TableSettings(initial_bound=0.01, quotient_remainder=QuotientRemainder(collisions=3, threshold=5))
    network = DLRM(SMALL, 1, **DLRM_WIDTHS, tables=tables)
    for lookup in network.lookups():
        assert 0.005 < lookup.weight.abs().max() <= 0.01
    with pytest.raises(UserError, match=r"tables.initial_bound is -1; expected a number of 0 or more"):
        TableSettings(initial_bound=-1)
