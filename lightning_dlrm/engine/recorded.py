"""For CPUs: the forward and backward pass of a training step, recorded once and then repeated operation by operation.

On a small batch, modules, autograd and the checks before each of some hundred small operations take as long as a third
of the arithmetic. A recorded step calls the same operations in the same order, so that it gives the same bits.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_dlrm.contracts.batch import Batch, SparseIds
from lightning_dlrm.contracts.lookup import EmbeddingLookup, RowGradient
from lightning_dlrm.kernels import native
from lightning_dlrm.kernels.choice import choose
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.tables.tables import EmbeddingTables

EAGER_STEPS = 100
"""First steps of a fit that are made without: recording takes about a second, which a short fit would not get back."""


class RecordedStep:
    """Records a step while it makes it, and repeats it from then on.

    A step is a list of operations on tensors: the batch's, and the weights where they are. Batches of another size than
    the recorded one, such as the last of an epoch, and those with bags of ids, whose number changes, are not taken:
    their steps are made eagerly.

    Args:
        network: one that ``is_recordable`` says yes to.
        loss: of logits [B] and a batch: the scalar to minimise.
        optimizer: of the network.
        eager_steps: how many steps are made before one is recorded; None for EAGER_STEPS.
        settings: what the loss depends on, beside the batch, and a callback may change.
    """

    def __init__(
        self,
        network: CTRNetwork,
        loss: Callable[[Tensor, Batch], Tensor],
        optimizer: CTROptimizer,
        eager_steps: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._network, self._loss = network, loss
        self._dense: list[Tensor] = optimizer.param_groups[0]["params"]
        self._lookups = optimizer.lookups
        self._left = EAGER_STEPS if eager_steps is None else eager_steps
        self._longest = 0
        self._like: tuple[Any, ...] | None = None
        """Sizes and types of the recorded batch."""
        self._settings = settings or {}
        self._watch(network.modules())
        self._switches: list[Any] = []
        self._repeat: Callable[..., list[Any]]
        self._of_lookup: list[EmbeddingLookup] = []

    def repeats(self, batch: Batch) -> bool:
        """Whether a batch's step is like the one that was recorded."""
        return self._like is not None and self._is_seen(batch) and self._like == _signature(batch) and self._holds()

    def takes(self, batch: Batch) -> bool:
        """Whether a batch's step is recorded or repeated; counts it if it is one of the first, which are not."""
        if self.repeats(batch):
            return True
        if not self._is_seen(batch) or (self._like is not None and self._holds()):
            return False
        # A callback has frozen a layer, for instance: what was recorded holds no more.
        self._like = None
        self._left -= 1
        self._longest = max(self._longest, len(batch))
        # Not the last batch of an epoch, which is like no other.
        return self._left < 0 and len(batch) == self._longest and not _is_heard(self._network)

    def forward_backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, 0-dim, and the logits [B], both detached; gradients are then where a backward pass leaves them."""
        if self._like is None:
            made = self._record(batch)
        else:
            # Nothing is differentiated or cast here: that was recorded.
            with torch.autocast("cpu", enabled=False), torch._C._AutoDispatchBelowAutograd():
                made = self._repeat(batch.dense, batch.ids.values, batch.label)
        loss, logits_B, gradients, of_rows = made
        for parameter, gradient in zip(self._dense, gradients, strict=True):
            parameter.grad = gradient
        for lookup in self._lookups:
            lookup.clear_gradient()
        for lookup, pieces in zip(self._of_lookup, of_rows, strict=True):
            lookup.add_gradient(RowGradient.from_lookups(*pieces))
        return loss, logits_B

    def _watch(self, parts: Iterable[nn.Module]) -> None:
        """Whose hooks and switches a step depends on."""
        self._parts = [*parts]
        self._dropouts = [part for part in self._parts if isinstance(part, nn.Dropout)]
        self._hooks = [getattr(part, name) for part in self._parts for name in _HOOKS]

    def _is_seen(self, batch: Batch) -> bool:
        """Whether a recording would show all that such a batch's step does."""
        if batch.ids.offsets is not None or batch.ids.weights is not None or batch.label is None:
            return False
        return not any(self._hooks) and not any(weight._backward_hooks for weight in self._dense)

    def _holds(self) -> bool:
        """Whether what was recorded is still what a step does."""
        return self._switches == self._switches_now()

    def _switches_now(self) -> list[Any]:
        """What changes a step without changing a number in a tensor."""
        return [
            *(part.training for part in self._parts),
            *(part.p for part in self._dropouts),
            *(weight.requires_grad for weight in self._dense),
            *(lookup.weight.requires_grad for lookup in self._lookups),
            # Views of them are kept.
            *(weight.data_ptr() for weight in self._dense),
            *self._settings.values(),
        ]

    def _record(self, batch: Batch) -> list[Any]:
        """Makes a batch's step, and keeps its operations."""
        made: list[Any] = []
        called: dict[nn.Module, None] = {}

        def make(dense_BI: Tensor, values_BF: Tensor, label_B: Tensor) -> list[Any]:
            ids = SparseIds(values=values_BF, tables=batch.ids.tables)
            here = Batch(label=label_B, dense=dense_BI, ids=ids, global_size=batch.global_size)
            # The tracer turns this off; without, a weight that is used twice is cast, and its gradient rounded, twice.
            torch.clear_autocast_cache()
            torch.set_autocast_cache_enabled(True)
            with _caught(self._lookups) as caught:
                logits_B = self._network(dense_BI, ids)
                loss = self._loss(logits_B, here)
                # Rows' gradients come with those of the tables, which are None.
                trained = [weight for weight in self._dense if weight.requires_grad]
                tables = [lookup.weight for lookup in self._lookups if lookup.weight.requires_grad]
                # As Lightning makes it, outside of the context that casts.
                with torch.autocast("cpu", enabled=False):
                    one = torch.ones((), dtype=loss.dtype)
                    found = torch.autograd.grad(loss, [*trained, *tables], one, allow_unused=True)
                by_weight = dict(zip(trained, found, strict=False))
                gradients = [by_weight.get(weight) for weight in self._dense]
            self._of_lookup = [lookup for lookup, _ in caught]
            made.extend(
                [
                    loss.detach(),
                    logits_B.detach(),
                    _owned(gradients, self._dense),
                    [pieces for _, pieces in caught],
                ]
            )
            return made

        told = register_module_forward_pre_hook(lambda part, _: called.setdefault(part))
        try:
            graph_module = make_fx(make)(batch.dense, batch.ids.values, batch.label)
        finally:
            told.remove()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            self._repeat = _repeater(graph_module)
        # Of the many others, such as layers within MLP, only the weights are used.
        self._watch(called)
        self._switches, self._like = self._switches_now(), _signature(batch)
        return made


def is_recordable(network: CTRNetwork, loss: Any) -> bool:
    """Whether steps of a network do the same operations for every batch of a size, as far as can be told: those of this
    project do, with their tables at hand and nobody listening to their layers."""
    known = {__name__.split(".")[0], "torch"}
    own = all(type(part).__module__.split(".")[0] in known for part in (*network.modules(), loss))
    at_hand = all(
        type(lookup) is EmbeddingTables and choose(lookup.kernels, "cpu", lookup.weight.dtype) != "triton"
        for lookup in network.lookups()
    )
    return own and at_hand and not _is_heard(network)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_heard(network: CTRNetwork) -> bool:
    """Whether somebody listens to layers, weights or autograd, which a repeated step would pass over."""
    heard = any(getattr(module, name) for module in network.modules() for name in _HOOKS)
    heard |= any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in network.parameters())
    return heard or torch.is_anomaly_enabled()


def _signature(batch: Batch) -> tuple[Any, ...]:
    """What a recorded step depends on beside the numbers in a batch."""
    assert batch.label is not None
    tensors = (batch.dense, batch.ids.values, batch.label)
    return batch.global_size, *(tensor.shape for tensor in tensors), *(tensor.dtype for tensor in tensors)


@contextmanager
def _caught(lookups: Sequence[EmbeddingLookup]) -> Iterator[list[tuple[EmbeddingLookup, tuple[Tensor | None, ...]]]]:
    """What the backward pass inside tells the lookups, in its order; they do not hear of it themselves."""
    caught: list[tuple[EmbeddingLookup, tuple[Tensor | None, ...]]] = []

    def catch(lookup: EmbeddingLookup) -> Callable[..., None]:
        return lambda *pieces: caught.append((lookup, pieces))

    for lookup in lookups:
        lookup.add_lookups = catch(lookup)  # type: ignore[method-assign]
    try:
        yield caught
    finally:
        for lookup in lookups:
            del lookup.add_lookups


def _owned(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients that may be changed in place, each for itself, as autograd leaves them: laid out as their weight, and
    no two in the same place."""
    places: set[int] = set()
    owned: list[Tensor | None] = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            place = gradient.untyped_storage().data_ptr()
            if place in places or gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)
            places.add(place)
        owned.append(gradient)
    return owned


def _repeater(graph_module: fx.GraphModule) -> Callable[..., list[Any]]:
    """A function that does a recorded graph's operations.

    Its own source text in place of fx's, which looks every operation up by name at every call, and every weight among a
    module's attributes: a tenth of a step of 128 samples.
    """
    nodes = _needed(graph_module.graph)
    fixed = _done_once(graph_module, nodes)
    constants: dict[str, Any] = {}
    names: dict[fx.Node, str] = {}
    # The first node after which a value is not needed.
    last = {value: node for node in nodes for value in node.all_input_nodes if value not in fixed}
    ends: dict[fx.Node, list[str]] = {}
    for value, node in last.items():
        ends.setdefault(node, []).append(value.name)

    def constant(value: Any) -> str:
        name = f"constant_{len(constants)}"
        constants[name] = value
        return name

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            if value not in names:
                names[value] = constant(fixed[value]) if value in fixed else value.name
            return names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        return repr(value) if value is None or isinstance(value, (bool, int, str)) else constant(value)

    arguments, lines = [], []
    for node in nodes:
        if node in fixed:
            continue
        if node.op == "placeholder":
            arguments.append(node.name)
        elif node.op == "output":
            lines.append(f"return {text(node.args[0])}")
        elif node.target is operator.getitem:
            lines.append(f"{node.name} = {text(node.args[0])}[{node.args[1]}]")
        else:
            # The function inside an operation's object, whose call would cost as much again as a small operation.
            operation = constant(native.implementation(_overload(node)) or _overload(node)._op)
            given = [*map(text, node.args), *(f"{name}={text(value)}" for name, value in node.kwargs.items())]
            lines.append(f"{node.name} = {operation}({', '.join(given)})")
        if node.op == "call_function" and node in ends:
            lines.append(f"{' = '.join(ends[node])} = None")
    parameters = ", ".join([*arguments, *(f"{name}={name}" for name in constants)])
    exec("\n    ".join([f"def repeat({parameters}):", *lines]), constants)
    repeat: Callable[..., list[Any]] = constants["repeat"]
    return repeat


def _needed(graph: fx.Graph) -> list[fx.Node]:
    """The operations, in order, without those that only show a tensor in another way to nobody."""
    aten = torch.ops.aten
    for node in graph.nodes:
        if node.target is aten.detach.default:
            # Nothing is differentiated when operations are repeated.
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.view.default and node.args[0].target is aten.view.default:
            node.update_arg(0, node.args[0].args[0])
    for node in reversed(graph.nodes):
        if not node.users and (node.target is operator.getitem or _is_view(node)):
            graph.erase_node(node)
    return list(graph.nodes)


def _done_once(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> dict[fx.Node, Any]:
    """What is the same at every step: weights, where they are, views of them, and numbers that come from no tensor."""
    # What is handed out or written to has to be new each time, and so has what it is a view of.
    new: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op == "output" or (node in new and _is_view(node)):
            new.update(node.all_input_nodes)
        elif node.op == "call_function" and node.target is not operator.getitem:
            new.update(_written(node))
    fixed: dict[fx.Node, Any] = {}
    numbers: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr":
            fixed[node] = getattr(graph_module, str(node.target))
        elif node.op == "call_function" and node.target is not operator.getitem and node not in new:
            if numbers.issuperset(node.all_input_nodes) and _says_the_same(node):
                numbers.add(node)
            elif not (_is_view(node) and node.all_input_nodes[0] in fixed):
                continue
            arguments, options = fx.map_arg((node.args, node.kwargs), fixed.__getitem__)
            fixed[node] = _overload(node)(*arguments, **options)
    return fixed


def _overload(node: fx.Node) -> torch._ops.OpOverload:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is not operator.getitem and _overload(node).is_view


def _says_the_same(node: fx.Node) -> bool:
    """Whether an operation gives the same for the same, and does nothing else."""
    operation = _overload(node)
    return not operation._schema.is_mutable and torch.Tag.nondeterministic_seeded not in operation.tags


def _written(node: fx.Node) -> list[fx.Node]:
    """What an operation changes in place."""
    schema = _overload(node)._schema.arguments
    given: dict[str, Any] = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    written = [argument.name for argument in schema if argument.alias_info is not None and argument.alias_info.is_write]
    return [given[name] for name in written if name in given]
