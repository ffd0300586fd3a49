"""Training steps on devices that are not there, with fake tensors: shapes, dtypes and devices, and no values.

    python -m tests.kernels.fake_devices

prints a line for each case: its name, and ``ok`` or an error. A fake tensor raises an error if an operator takes
tensors of several devices, and if the host reads a value, or a shape that depends on values. Kernels run by their fake
implementations.

Autograd and Python's indexing need a device guard, which torch's build for CPUs lacks for CUDA. So steps run on a
device named ``fakegpu``, for which torch lets Python register a guard, and on ``cuda:0`` a lookup and updates.

Not covered: values, streams, autocast to bfloat16, collectives (an exchange returns an empty tensor of its shape).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lightning_dlrm.kernels import choice

NAME = "fakegpu"


class Guard(torch._C._acc.DeviceGuard):
    """Device guard that has nothing to switch."""

    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


class RankOfTwo:
    """Rank 0 of two; what it would receive has the right shape."""

    rank, ranks = 0, 2

    def all_to_all(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Any:
        from lightning_dlrm.sharding.collectives import AsyncCollective

        assert len(values) == sum(sent)
        return AsyncCollective(values, values.new_empty((sum(received), *values.shape[1:])), None)


def faked(mode: FakeTensorMode, network: Any, device: str) -> Any:
    """Replace the network's parameters and buffers by fake ones on a device."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = mode.from_tensor(parameter.detach()).to(device)
            setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, mode.from_tensor(buffer).to(device))
    return network


def batch_on(mode: FakeTensorMode, batch: Any, device: str) -> Any:
    return batch.map(lambda tensor: None if tensor is None else mode.from_tensor(tensor).to(device))


def report(name: str, run: Callable[[], object]) -> None:
    try:
        run()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
    else:
        print(f"{name}: ok", flush=True)


def main() -> None:
    # Other modules take the name when they are imported.
    choice.choose = lambda asked, device, dtype: "triton" if device in (NAME, "cuda") else "native"  # type: ignore
    from tests.sharding import test_host_reads as steps

    _setup_privateuseone_for_python_backend(NAME, device_guard=Guard())
    one_hot, bags = (steps.draw_batch(workload, 6, 0) for workload in (steps.WORKLOAD, steps.BAGS))
    for config in steps.CONFIGS:
        for rule in steps.RULES if config == "dlrm" else steps.RULES[:1]:
            for kind, batch in (("one-hot", one_hot), ("bags", bags)):
                if config == "dlrm" or kind == "one-hot":
                    name = f"{config}, {kind}, {type(rule).__name__}"
                    report(f"whole step: {name}", lambda: whole_step(steps, config, rule, batch))  # noqa: B023
    for config in ("dlrm", "dcn", "mlperf_v2"):
        report(f"built there: {config}", lambda: build_and_step(steps, config, one_hot))  # noqa: B023
    report("on cuda: one-hot", lambda: look_up_and_update(steps, one_hot))
    for name, workload, pooled in (
        ("one-hot", steps.WORKLOAD, ()),
        ("bags", steps.BAGS, ()),
        ("pooled", steps.BAGS, ("C1", "C3")),
    ):
        report(f"rank of two: {name}", lambda: sharded_step(steps, workload, pooled))  # noqa: B023
    report("a summed gradient", lambda: whole_step(steps, "dlrm", steps.RULES[0], one_hot, clips=True))
    report("a constant on the host", lambda: whole_step(steps, "dlrm", steps.RULES[0], one_hot, constant="cpu"))


def whole_step(
    steps: Any, config: str, rule: Any, batch: Any, clips: bool = False, constant: str | None = None
) -> None:
    real = steps.shipped(config)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        network = faked(mode, real, NAME)
        if constant is not None:
            (piece,) = (module for module in network.modules() if hasattr(module, "row_offsets"))
            piece.row_offsets = piece.row_offsets.to(constant)
        loss = steps.training_step(network, rule, "auto", clips)(batch_on(mode, batch, NAME))
        assert loss.device.type == NAME and loss.shape == ()


def build_and_step(steps: Any, config: str, batch: Any) -> None:
    """A step of a network that is built on the device, as Lightning and ``bench gpu`` build it, who then move buffers
    there."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        # Without a number, torch asks for the device's current one.
        with torch.device(NAME, 0):
            network = steps.shipped(config)
        assert {parameter.device.type for parameter in network.parameters()} == {NAME}
        for module in network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(NAME))
        steps.training_step(network, steps.RULES[0], "auto")(batch_on(mode, batch, NAME))


def look_up_and_update(steps: Any, batch: Any) -> None:
    """Lookup, and an update with a gradient of the vectors' shape, by the rules whose code does not index."""
    from lightning_dlrm.tables.gradients import LookupGradient

    (tables,) = steps.shipped("dlrm").lookups()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        faked(mode, tables, "cuda:0")
        ids = batch_on(mode, batch, "cuda:0").ids
        vectors_BFD = tables(ids)
        assert vectors_BFD.device == torch.device("cuda:0") and vectors_BFD.shape == (6, 3, 16)
        rows_N, bag_N = tables.placement.source(tables, ids, True).request.rows_and_bags()
        for rule in (rule for rule in steps.RULES if not isinstance(rule, steps.RowWiseAdagrad)):
            optimizer = steps.CTROptimizer([], [tables], torch.optim.SGD, rule)
            tables.add_gradient(LookupGradient(rows_N, vectors_BFD.view(-1, 16), bag_N))
            optimizer.step()
            tables.clear_gradient()


def sharded_step(steps: Any, workload: Any, pooled: Sequence[str]) -> None:
    """Two steps of rank 0 of two, the second with prefetched ids; the sizes of exchanges are those of real ids."""
    from functools import partial

    from lightning_dlrm.sharding.placement import ShardedPlacement
    from lightning_dlrm.tables import host
    from lightning_dlrm.tables.lookup import placed_by

    plan = steps.halves(workload, pooled)
    with placed_by(partial(ShardedPlacement, plan=plan, ranks=RankOfTwo())):
        real = steps.shipped("dlrm")
    batches = [steps.draw_batch(workload, 6, seed) for seed in range(2)]
    (tables,) = real.lookups()
    sizes = []
    for batch in batches:
        sent_W2 = tables.placement._rows.request(batch.ids).counts_of_ranks(2)
        # Rank 1 requests as much of this rank as this rank itself.
        sizes.append(torch.stack([sent_W2, sent_W2[:1].expand(2, 2)]))
    known = iter(sizes)

    class KnownSizes(host.Copies):
        def begin_on_host(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
            counted, real_sizes = compute(), next(known)
            assert counted.shape == real_sizes.shape and counted.device.type == NAME
            return lambda: real_sizes

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        network = faked(mode, real, NAME)
        host._copies[torch.device(NAME, 0)] = KnownSizes()
        tables.placement._counts_2C = mode.from_tensor(tables.placement._counts_2C).to(NAME)
        step = steps.training_step(network, steps.RULES[2], "auto")
        here, upcoming = (batch_on(mode, batch, NAME) for batch in batches)
        step(here)
        on_host = batches[1].ids.map(lambda tensor: None if tensor is None else mode.from_tensor(tensor))
        on_host.key = upcoming.ids.key
        network.prefetch(on_host)
        step(upcoming)
        assert next(known, None) is None


if __name__ == "__main__":
    main()
