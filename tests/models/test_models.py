"""Contract: DLRM and DCN are the published formulas, sizes and initial weights."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.schema import CRITEO_CATEGORICAL, Features
from lightning_dlrm.models.dcn import DCN, VectorCross
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.models.layers import DotInteraction
from lightning_dlrm.models.network import model_size

KAGGLE = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
PAPER = Features(dense=13, tables=dict(zip(CRITEO_CATEGORICAL, KAGGLE, strict=True)))
SMALL = Features(dense=2, tables={"A": 4, "B": 30, "C": 1})


def batch(size: int = 5) -> tuple[torch.Tensor, SparseIds]:
    ids = torch.stack([torch.arange(size) % rows for rows in SMALL.table_rows], 1).int()
    return torch.linspace(-1, 1, 2 * size).view(size, 2), SparseIds(values=ids, tables=3)


@pytest.mark.parametrize(
    ("network", "total", "dense", "flops"),
    [(DLRM, 540_677_217, 475_985, 959_968), (DCN, 540_558_554, 357_322, 713_106)],
)
def test_paper_sizes_are_counted_without_allocating(network: type, total: int, dense: int, flops: int) -> None:
    with torch.device("meta"):
        size = model_size(network(PAPER))
    assert (size.total, size.dense, size.tables) == (total, dense, 540_201_232)
    assert size.flops_per_sample_forward == flops
    assert size.flops_per_sample_training == 3 * flops


@pytest.mark.parametrize("self_interaction", [False, True])
def test_dot_interaction_takes_the_pairs_row_by_row(self_interaction: bool) -> None:
    vectors = torch.randn(3, 4, 5)
    expected = [
        (vectors[:, i] * vectors[:, j]).sum(1) for i in range(4) for j in range(i + 1 if self_interaction else i)
    ]
    found = DotInteraction(4, 5, self_interaction)(vectors[:, 0], vectors[:, 1:].flatten(1))
    torch.testing.assert_close(found, torch.cat([vectors[:, 0], torch.stack(expected, 1)], dim=1))


@pytest.mark.parametrize("interaction", ["dot", "cat"])
def test_dlrm_is_the_published_formula(interaction: str) -> None:
    network = DLRM(SMALL, seed=1, embedding_dim=4, bottom_mlp=[6, 4], top_mlp=[5], interaction=interaction)
    dense, ids = batch()
    x = dense
    for layer in network.bottom.linears():
        x = torch.relu(x @ layer.weight.T + layer.bias)
    vectors = [x] + [
        piece.of(network.lookups()[0].weight)[ids.values[:, f].long()]
        for f, piece in enumerate(network.lookups()[0].pieces)
    ]
    if interaction == "dot":
        x = torch.cat([x] + [(vectors[i] * vectors[j]).sum(1, keepdim=True) for i in range(4) for j in range(i)], 1)
    else:
        x = torch.cat(vectors, 1)
    first, last = network.top.linears()
    expected = torch.relu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(network(dense, ids), expected.squeeze(1))


def test_dcn_is_the_published_formula() -> None:
    network = DCN(SMALL, seed=1, embedding_dim=4, cross_layers=3, deep=[6, 5])
    nn.init.normal_(network.cross.bias)
    dense, ids = batch()
    vectors = [
        piece.of(network.lookups()[0].weight)[ids.values[:, f].long()]
        for f, piece in enumerate(network.lookups()[0].pieces)
    ]
    x0 = torch.cat([*vectors, dense], 1)
    cross = x0
    for w, b in zip(network.cross.weight, network.cross.bias, strict=True):
        cross = torch.stack([x0[i] * (cross[i] @ w) + b + cross[i] for i in range(len(x0))])
    deep = x0
    for layer in network.deep.linears():
        deep = torch.relu(deep @ layer.weight.T + layer.bias)
    (logit,) = network.logit.linears()
    expected = torch.cat([cross, deep], 1) @ logit.weight.T + logit.bias
    torch.testing.assert_close(network(dense, ids), expected.squeeze(1))


@pytest.mark.parametrize("network", [DLRM, DCN])
def test_gradients_in_float64(network: type) -> None:
    options = {"bottom_mlp": [6, 4], "top_mlp": [5]} if network is DLRM else {"cross_layers": 2, "deep": [6]}
    model = network(SMALL, seed=1, embedding_dim=4, **options).double()
    dense, ids = batch()
    dense = dense.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, ids), dense)


CROSSES = [
    {"cross": "vector"},
    {"cross": "matrix"},
    {"cross": "low_rank", "cross_rank": 3},
    {"cross": "mixture", "cross_rank": 3, "cross_experts": 2},
]


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize("options", CROSSES, ids=lambda o: o["cross"])
def test_every_kind_of_dcn_has_true_gradients_and_counts(options: dict, structure: str) -> None:
    model = DCN(SMALL, seed=1, embedding_dim=4, cross_layers=2, deep=[6, 5], structure=structure, **options).double()
    dense, ids = batch()
    assert torch.autograd.gradcheck(lambda x: model(x, ids), dense.double().requires_grad_())
    flops = FlopCounterMode(display=False)
    with flops:
        model(dense.double(), ids)
    # The counter knows matrix products only; scaling x_0 and weighing experts are ours to add.
    d, experts = 14, options.get("cross_experts", 0)
    scaling = 2 * (d + experts * d)
    if options["cross"] == "vector":
        scaling += 2 * d  # and a matrix-vector product, which the counter does not know
    assert model.multiply_adds() == flops.get_total_flops() // (2 * len(dense)) + scaling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross": "cubic"}, "one of vector, matrix, low_rank, mixture"),
        ({"cross": "low_rank"}, "needs cross_rank; it is missing"),
        ({"cross": "matrix", "cross_rank": 3}, "takes no cross_rank; it is 3"),
        ({"cross": "mixture", "cross_rank": 3}, "needs cross_experts"),
        ({"cross": "low_rank", "cross_rank": 50}, "expected 1 to 49"),
        ({"cross": "mixture", "cross_rank": 3, "cross_experts": 0}, "cross_experts is 0"),
        ({"structure": "beside"}, "one of parallel, stacked, stacked_parallel"),
    ],
)
def test_crosses_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DCN(SMALL, **options)


def test_initial_dense_weights_are_as_published() -> None:
    layer = DLRM(Features(dense=400, tables={"A": 2}), seed=1, bottom_mlp=[600, 16]).bottom.linears()[0]
    assert layer.weight.std().item() == pytest.approx((2 / 1000) ** 0.5, rel=0.01)
    assert layer.bias.std().item() == pytest.approx((1 / 600) ** 0.5, rel=0.1)
    cross = DCN(Features(dense=5000, tables={"A": 2}), seed=1, cross_layers=4, deep=[2]).cross
    assert cross.weight.std().item() == pytest.approx((2 / 5017) ** 0.5, rel=0.05)
    assert not cross.bias.any()


def test_initial_weights_are_a_function_of_the_seed() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.rand(seed + 1)  # the global random state must not matter
        return list(DLRM(SMALL, seed, embedding_dim=4, bottom_mlp=[4]).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottom_mlp": [8, 5]}, "bottom_mlp ends in 5 but embedding_dim is 16"),
        ({"bottom_mlp": []}, r"bottom_mlp is \[\], but this dataset has"),
        ({"interaction": "cat", "self_interaction": True}, "self_interaction needs interaction: dot"),
        ({"interaction": "sum"}, "one of dot, cat, projection, cross"),
        ({"top_mlp": [0]}, "each 1 or wider"),
    ],
)
def test_widths_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DLRM(SMALL, **options)


def test_dlrm_without_dense_features_and_dcn_without_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"has no dense features for DLRM.s bottom MLP: set bottom_mlp to \[\]"):
        DLRM(Features(dense=0, tables={"A": 3}))
    with pytest.raises(UserError, match="cross_layers is 0"):
        DCN(SMALL, cross_layers=0)


def test_the_order_of_the_sum_of_a_vector_cross_is_an_argument() -> None:
    # In float32 (1e8 + -1e8) + 1 is 1, and 1e8 + (-1e8 + 1) is 0.
    for left_to_right, expected in ((True, 1.0), (False, 0.0)):
        cross = VectorCross(1, 1, left_to_right)
        with torch.no_grad():
            cross.weight.fill_(1e8)
            cross.bias.fill_(-1e8)
        assert cross(torch.ones(1, 1)).item() == expected
    crosses = [DCN(SMALL, deep=[4], embed_dense=embed_dense).cross for embed_dense in (True, False)]
    assert [cross.left_to_right for cross in crosses if isinstance(cross, VectorCross)] == [True, False]


def test_cross_network_of_the_paper_counts_two_multiply_adds_a_weight() -> None:
    assert VectorCross(429, 6).multiply_adds() == 6 * 2 * 429
