"""A check of custom networks, for their authors' own tests."""

import inspect
import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.own_code import fault_in_own_code, with_place
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.contracts.terminal import counted
from lightning_dlrm.models.network import PROBABILITIES, CTRNetwork, fault_of_logits, returns_probabilities

FEATURES = Features(dense=3, tables={"C1": 5, "C2": 40, "C3": 2})
SAMPLES = 6
_SEEDS = 10
"""Networks of which each logit is looked at; half of the networks have a negative bias."""

MakeNetwork = Callable[[Features, int], CTRNetwork]


def check_network(make_network: MakeNetwork, features: Features = FEATURES) -> None:
    """Check that a network can be trained, sharded, compiled and resumed as the shipped ones are.

    Args:
        make_network: class or function that makes the network from features and a seed, as ``CTRModule`` takes it.
        features: dense inputs and tables of the data that the network is checked on.

    Raises:
        UserError: lists everything that was found wrong, a line each.
    """
    problems = list(_problems(make_network, features))
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        name = getattr(make_network, "__name__", repr(make_network))
        raise UserError(f"{name} cannot be trained as it is: {counted(len(problems), 'problem')}\n{listed}")


def _problems(make_network: MakeNetwork, features: Features) -> Iterator[str]:
    if inspect.isclass(make_network) and CTRNetwork not in inspect.getmro(make_network):
        yield f"{make_network.__name__} is not a subclass of CTRNetwork; derive your class from CTRNetwork"
        return
    try:
        network = make_network(features, 1)
    except Exception as error:
        yield f"the network cannot be made: make_network(features, seed) raises {_short(error)}"
        return
    if not isinstance(network, CTRNetwork):
        yield f"make_network(features, seed) returns a {type(network).__name__}; derive it from CTRNetwork"
        return
    if not hasattr(network, "training"):
        yield f"{with_place(type(network))} does not initialize its base; call super().__init__(features.dense) first"
        return
    yield from _build_problems(make_network, features, network)
    batches = {
        "one id per column": _one_hot(features),
        "bags of ids": _bags(features),
        "no samples": _one_hot(features, 0),
    }
    listed: set[str] = set()
    for kind, (dense_BI, ids) in batches.items():
        fault = _forward_fault(network, dense_BI, ids)
        # The same fault of another batch differs in sizes alone.
        if fault is not None and (words := re.sub(r"\d+", "", fault)) not in listed:
            listed.add(words)
            hint = "; a rank's slice of a batch may be empty" if kind == "no samples" else ""
            method = "score" if type(network).forward is CTRNetwork.forward else "forward"
            yield f"{method} of a batch with {kind} {fault}{hint}"
    dense_BI, ids = batches["one id per column"]
    if _forward_fault(network, dense_BI, ids) is None:
        checks = {
            "one sample": _sample_problems(network, dense_BI, ids),
            "training": _gradient_problems(network, dense_BI, ids),
            "score": _score_problems(network, dense_BI, ids),
            "signs": _sign_problems(make_network, features),
        }
        for what, problems in checks.items():
            try:
                yield from problems
            except Exception as error:
                yield f"the check of {what} raises {_short(error)}"


def _build_problems(make_network: MakeNetwork, features: Features, network: CTRNetwork) -> Iterator[str]:
    """How the network is made: sizes on the meta device, its seed, its tables."""
    try:
        with torch.device("meta"):
            make_network(features, 1)
    except Exception as error:
        yield f"it cannot be made under torch.device('meta'), where its size is counted: {_short(error)}"
    again, other = make_network(features, 1).state_dict(), make_network(features, 2).state_dict()
    state = network.state_dict()
    changed = [name for name, value in state.items() if not torch.equal(value, again[name])]
    if changed:
        yield f"two networks of one seed differ in {changed[0]}: draw parameters from the seed, such as by initialize"
    elif any(value.unique().numel() > 1 for value in state.values()) and all(
        torch.equal(value, other[name]) for name, value in state.items()
    ):
        yield "networks of two seeds are the same: pass the seed to Embeddings and initialize"
    for name, module in network.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield (
                f"{name} is a torch.nn.{type(module).__name__}, whose gradient is as large as its table and which no "
                "rank shares: use Embeddings of lightning_dlrm"
            )
    if type(network).multiply_adds is not CTRNetwork.multiply_adds and not network.multiply_adds() > 0:
        yield (
            f"multiply_adds() returns {network.multiply_adds()}; expected the multiply-adds of one sample; "
            "correct the method, or leave it out"
        )


def _forward_fault(network: CTRNetwork, dense_BI: Tensor, ids: SparseIds) -> str | None:
    """Return what is wrong with the logits of a batch, as the rest of a sentence; None if nothing is."""
    try:
        logits: object = network.eval()(dense_BI, ids)
    except Exception as error:
        return f"raises {_short(error)}"
    fault = fault_of_logits(logits, len(dense_BI))
    if fault is not None or not isinstance(logits, Tensor):
        return fault
    if not logits.isfinite().all():
        if network(dense_BI.nan_to_num(), ids).isfinite().all():
            return (
                "returns logits that are not finite: missing dense values are NaN, so pass dense features through "
                "self.missing first"
            )
        return (
            "returns logits that are not finite, also without missing dense values; expected finite ones: look for "
            "divisions by 0, and for logarithms and roots of numbers that may be 0 or negative"
        )
    return PROBABILITIES if returns_probabilities(logits) else None


def _sample_problems(network: CTRNetwork, dense_BI: Tensor, ids: SparseIds) -> Iterator[str]:
    logits_B = network(dense_BI, ids)
    alone = network(dense_BI[:1], SparseIds(values=ids.values[:1], tables=ids.tables))
    if not torch.allclose(alone, logits_B[:1], rtol=1e-4, atol=1e-6):
        yield "a sample's logit depends on the other samples of its batch in evaluation mode"


def _sign_problems(make_network: MakeNetwork, features: Features) -> Iterator[str]:
    """Whether some logit is below 0. Networks whose every logit is 0, such as a logistic regression, pass."""
    dense_BI, ids = _one_hot(features, 64)
    dense_BI = 4 * dense_BI - 2
    most = 0.0
    with torch.no_grad():
        for seed in range(_SEEDS):
            logits_B = make_network(features, seed).eval()(dense_BI, ids)
            if (logits_B < 0).any():
                return
            most = max(most, logits_B.max().item())
    if most > 0:
        yield "no logit is below 0: does the last layer end in a ReLU? Write MLP(..., linear_output=True)"


def _gradient_problems(network: CTRNetwork, dense_BI: Tensor, ids: SparseIds) -> Iterator[str]:
    logits_B = network.train()(dense_BI, ids)
    if not logits_B.requires_grad:
        yield "the logits require no gradient: nothing can be trained"
        return
    (logits_B * torch.linspace(-1, 2, SAMPLES)).sum().backward()
    for name, parameter in network.named_parameters():
        is_table = any(parameter is lookup.weight for lookup in network.lookups())
        if parameter.requires_grad and not is_table and parameter.grad is None:
            yield f"{name} gets no gradient, which DDP refuses on several ranks: use it in forward, or leave it out"
    for lookup in network.lookups():
        gradient = lookup.gradient()
        names = ", ".join(table.name for table in lookup.tables)
        if lookup.weight.requires_grad and gradient is None:
            yield f"the tables {names} get no gradient: use what their lookup returns"
        elif gradient is not None and not math.isfinite(gradient.values.sum().item()):
            yield f"the gradient of the tables {names} is not finite"
        lookup.clear_gradient()
    network.zero_grad()


def _score_problems(network: CTRNetwork, dense_BI: Tensor, ids: SparseIds) -> Iterator[str]:
    """Whether ``score`` is the rest of ``forward``, and torch.compile takes it as a whole."""
    if not network.has_score:
        return
    network.eval()
    vectors = network.lookup(ids)
    expected = network(dense_BI, ids)
    try:
        found = network.score(dense_BI, vectors)
    except Exception as error:
        yield f"score(dense, lookup(ids)) raises {_short(error)}; lookup returns {', '.join(vectors) or 'nothing'}"
        return
    fault = fault_of_logits(found, len(dense_BI))
    if fault is not None:
        yield f"score(dense, lookup(ids)) {fault}"
        return
    if not torch.equal(found, expected):
        yield "forward(dense, ids) is not score(dense, lookup(ids)), so that compiled and eager steps would differ"
    try:
        torch.compile(network.score, backend="eager", fullgraph=True)(dense_BI, vectors)
    except Exception as error:
        yield f"torch.compile does not take score as a whole, for model.compile: {_short(error)}"


def _one_hot(features: Features, samples: int = SAMPLES) -> tuple[Tensor, SparseIds]:
    generator = torch.Generator().manual_seed(0)
    dense_BI = torch.rand(samples, features.dense, generator=generator)
    if dense_BI.numel():
        dense_BI[0, 0] = torch.nan
    rows_F = torch.tensor(features.table_rows)
    values_BF = (torch.rand(samples, len(rows_F), generator=generator) * rows_F).int()
    return dense_BI, SparseIds(values=values_BF, tables=len(rows_F))


def _bags(features: Features) -> tuple[Tensor, SparseIds]:
    """Bags of 0 to 2 ids."""
    dense_BI, ids = _one_hot(features)
    lengths_b = torch.arange(SAMPLES * ids.tables) % 3
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_b.cumsum(0)])
    values_N = torch.repeat_interleave(ids.values.flatten(), lengths_b)
    return dense_BI, SparseIds(values=values_N, tables=ids.tables, offsets=offsets)


def _short(error: Exception) -> str:
    place, cause = fault_in_own_code(error)
    return f"{cause}{'' if place is None else f' ({place})'}"
