"""Contract: an MLP returns what its modules return, one after the other, whatever is put into or registered on them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.kernels.choice import choose
from lightning_dlrm.models.dcn import DCN
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.models.fused import fusible_layers
from lightning_dlrm.models.layers import MLP, DotInteraction
from lightning_dlrm.models.network import CTRNetwork


def make(linear_output: bool = True) -> tuple[MLP, Tensor]:
    torch.manual_seed(1)
    return MLP([5, 8, 8, 3], linear_output=linear_output), torch.randn(6, 5)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def put_tanh(mlp: MLP) -> None:
    mlp[1] = nn.Tanh()


def remove_relu(mlp: MLP) -> None:
    del mlp[3]


def append_linear(mlp: MLP) -> None:
    mlp.append(nn.Linear(3, 2))


def replace_forward(mlp: MLP) -> None:
    mlp[0].forward = lambda x: nn.Linear.forward(mlp[0], x) + 1


CHANGES: dict[str, Callable[[MLP], object]] = {
    "tanh": put_tanh,
    "no relu": remove_relu,
    "another layer": append_linear,
    "no bias": lambda mlp: mlp.__setitem__(2, nn.Linear(8, 8, bias=False)),
    "forward": replace_forward,
    "forward hook": lambda mlp: mlp[1].register_forward_hook(lambda module, inputs, output: output + 1),
    "forward pre-hook": lambda mlp: mlp[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "backward hook": lambda mlp: mlp[2].register_full_backward_hook(lambda module, grads, _: (grads[0] * 2,)),
    "backward pre-hook": lambda mlp: mlp[2].register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2,)),
    "pruning": lambda mlp: prune.l1_unstructured(mlp[0], "weight", 0.5),
    "parametrisation": lambda mlp: parametrize.register_parametrization(mlp[0], "weight", Double()),
    "weight norm": lambda mlp: parametrizations.weight_norm(mlp[2]),
    "frozen": lambda mlp: mlp[2].requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect_at_the_next_call(change: str) -> None:
    """Backward passes too, twice: pruned weights are computed anew at every call."""
    mlp, x = make()
    mlp(x).sum().backward()
    CHANGES[change](mlp)
    for _ in range(2):
        results = []
        for call in (mlp, lambda x: nn.Sequential.forward(mlp, x)):
            mlp.zero_grad()
            output = call(x)
            output.square().sum().backward()
            results.append([output, *(p.grad for p in mlp.parameters() if p.requires_grad)])
        torch.testing.assert_close(*results)


def test_an_input_of_another_width_is_refused_in_torchs_words() -> None:
    """Also if both widths are aligned with the same number of columns."""
    with pytest.raises(RuntimeError, match=r"\(6x38 and 37x8\)"):
        MLP([37, 8, 1])(torch.randn(6, 38))


@pytest.mark.parametrize("registered", ["one module", "all modules"])
def test_hooks_hear_of_each_module_until_they_are_removed(registered: str) -> None:
    mlp, x = make()
    seen: list[nn.Module] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(module)

    assert fusible_layers(mlp, x) is not None
    handle = register_module_forward_hook(hook) if registered == "all modules" else mlp[3].register_forward_hook(hook)
    mlp(x)
    assert seen == ([*mlp, mlp] if registered == "all modules" else [mlp[3]])
    handle.remove()
    assert fusible_layers(mlp, x) is not None


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_have_gradients(autocast: bool) -> None:
    mlp, x = make(linear_output=False)
    results = []
    for call in (mlp, lambda x: nn.Sequential.forward(mlp, x)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = call(x.requires_grad_())
        (slope,) = torch.autograd.grad(output.float().square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), list(mlp.parameters()), allow_unused=True))
    torch.testing.assert_close(*results, rtol=1e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-6)


def network_of(name: str) -> tuple[CTRNetwork, Tensor, SparseIds]:
    features = Features(dense=3, tables={"A": 9, "B": 7})
    network: CTRNetwork
    if name == "DLRM":
        network = DLRM(features, seed=1, embedding_dim=4, bottom_mlp=[8, 4], top_mlp=[8])
    else:
        network = DCN(features, seed=1, embedding_dim=4, cross_layers=2, deep=[8])
    ids = SparseIds(values=torch.arange(16, dtype=torch.int32).view(8, 2) % 7, tables=2)
    return network, torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), ids


@pytest.mark.parametrize("name", ["DLRM", "DCN"])
def test_networks_are_compiled_exported_and_profiled(name: str) -> None:
    network, dense_BI, ids = network_of(name)
    vectors = {key: value.detach() for key, value in network.lookup(ids).items()}
    expected = network.score(dense_BI, vectors)
    compiled = torch.compile(network.score, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(dense_BI, vectors), expected)
    expected.sum().backward()
    grads = {key: parameter.grad.clone() for key, parameter in network.named_parameters() if parameter.grad is not None}
    network.zero_grad()
    compiled(dense_BI, vectors).sum().backward()
    assert grads
    torch.testing.assert_close({key: network.get_parameter(key).grad for key in grads}, grads)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        network(dense_BI, ids)
    names = {event.key for event in profile.key_averages()}
    if choose("auto", "cpu", torch.float32) == "native":
        assert "lightning_dlrm::lookup" in names and ("lightning_dlrm::pair_products" in names) == (name == "DLRM")


class Score(nn.Module):
    def __init__(self, network: CTRNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        return self.network.score(dense_BI, vectors)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["DLRM", "DCN"])
def test_networks_are_exported(name: str, dynamic: bool) -> None:
    network, dense_BI, ids = network_of(name)
    vectors = {key: value.detach() for key, value in network.lookup(ids).items()}
    batch = {0: torch.export.Dim.AUTO} if dynamic else None
    exported = torch.export.export(
        Score(network), (dense_BI, vectors), dynamic_shapes=(batch, dict.fromkeys(vectors, batch)) if dynamic else None
    )
    few = slice(None, 5) if dynamic else slice(None)
    arguments = dense_BI[few], {key: value[few] for key, value in vectors.items()}
    torch.testing.assert_close(exported.module()(*arguments), network.score(*arguments))
    assert "lightning_dlrm" not in str(exported.graph)


def test_fake_tensors_have_the_results_shapes() -> None:
    interaction, (mlp, x) = DotInteraction(3, 4), make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert mlp(mode.from_tensor(x)).shape == (6, 3)
        assert interaction(torch.empty(6, 4), torch.empty(6, 8)).shape == (6, 4 + 3)
