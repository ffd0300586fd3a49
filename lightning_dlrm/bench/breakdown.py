"""Time of a training step by part of the model and by kind of operator, from PyTorch's profiler.

``bench paper`` reads parts, which it compares with what each part must compute and move; ``compare`` reads kinds of
operators, which networks with different parts have in common. Both come from the same events.
"""

import bisect
import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_dlrm.bench.measurement import finisher

ROWS = "rows: gather, sort, scatter"
PRODUCTS = "matrix products"
COPIES = "copies"
ELEMENTWISE = "elementwise and sums"
OTHER = "other: autograd, Python"
KINDS = (PRODUCTS, ROWS, COPIES, ELEMENTWISE, OTHER)

_TORCH_WORDS: Mapping[str, tuple[str, ...]] = {
    PRODUCTS: ("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "linear", "gemm"),
    ROWS: (
        "embedding", "index", "gather", "scatter", "sort", "argsort", "unique", "cumsum", "searchsorted",
        "repeat_interleave",
    ),
    COPIES: ("cat", "stack", "copy", "clone", "fill", "zero", "contiguous", "to_copy", "memcpy", "memset"),
}  # fmt: skip
"""Kind -> first words of its operators; torch's other operators are elementwise, or sums."""
_OUR_WORDS: Mapping[str, tuple[str, ...]] = {
    ROWS: ("lookup", "update", "row", "rows", "tables", "embedding", "embeddings", "sort", "gather", "scatter", "pool"),
    PRODUCTS: ("mlp", "layers", "linear", "pair", "pairs", "products", "interaction", "cross"),
    ELEMENTWISE: ("relu", "loss"),
}
"""Kind -> words, any of which names its operators: those of this package, and autograd functions without operators."""
_OURS = "lightning_dlrm"
_MARK = "lightning_dlrm_part: "
_BEGIN, _END = "begin", "end"

Times = Mapping[tuple[str, str], float]
"""(part, kind) -> seconds of one step."""


def kind_of(operator: str) -> str:
    """Return the kind of an operator, by its name in the profiler.

    >>> [kind_of(name) for name in ("aten::addmm", "mkldnn::_linear_pointwise", "aten::index_select", "aten::add_")]
    ['matrix products', 'matrix products', 'rows: gather, sort, scatter', 'elementwise and sums']
    >>> [kind_of(name) for name in ("lightning_dlrm::update_rows", "_LookupIdsBackward", "lightning_dlrm::new")]
    ['rows: gather, sort, scatter', 'rows: gather, sort, scatter', 'other: autograd, Python']
    """
    namespace, _, name = operator.rpartition("::")
    if "autograd" in namespace:
        return OTHER
    if namespace in ("", _OURS):
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
        return next((kind for kind, known in _OUR_WORDS.items() if words.intersection(known)), OTHER)
    plain = name.strip("_")
    for kind, known in _TORCH_WORDS.items():
        if any(plain == word or plain.startswith(f"{word}_") for word in known):
            return kind
    return ELEMENTWISE


def mark(part: str) -> None:
    """Count the time from here on for a part of the model; time after ``mark("")`` is not counted."""
    with record_function(f"{_MARK}{part}"):
        pass


@contextlib.contextmanager
def marked_parts(network: nn.Module) -> Iterator[None]:
    """Mark where the forward and the backward pass of each part of a DLRM begin.

    The parts run one after the other, and backward in the opposite order. The time between the top MLP's forward and
    backward pass is that of the loss.

    Args:
        network: our DLRM, or the plain one.
    """

    def after(part: str, output: Tensor | list[Tensor]) -> None:
        mark("loss" if part == "top MLP" else "interaction forward")
        for tensor in output if isinstance(output, list) else [output]:
            # The hook runs when the gradient is ready, which is just before the part's own backward pass.
            tensor.register_hook(lambda _: mark(f"{part} backward"))

    tables = "embeddings" if hasattr(network, "embeddings") else "tables"
    handles = []
    for part, name in {"bottom MLP": "bottom", "tables": tables, "top MLP": "top"}.items():
        module = network.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, part=part: mark(f"{part} forward")))
        handles.append(module.register_forward_hook(lambda *given, part=part: after(part, given[-1])))

    def before_top(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].register_hook(lambda _: mark("interaction backward"))

    handles.append(network.get_submodule("top").register_forward_pre_hook(before_top))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def profile_steps(step: Callable[[int], object], count: int, device: torch.device) -> list[Times]:
    """Profile some training steps.

    On a CPU the times of a step add up to its wall time. On a CUDA device they are those of its kernels, each counted
    for the part and the operator that launched it.

    Args:
        step: makes the training step of the given number.
        count: number of steps.
        device: device of the steps.

    Returns:
        The times of each step.
    """
    on_gpu = device.type == "cuda"
    finish = finisher(device)
    # Without it, the profiler's library writes a line to stderr at each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        for number in range(count):
            mark(_BEGIN)
            step(number)
            finish()
            mark(_END)
    return _times_of_steps(profiled, on_gpu)


def _times_of_steps(profiled: profile, on_gpu: bool) -> list[Times]:
    found: Any = profiled.events()
    # The time of a CUDA kernel is also that of the CPU event that launched it.
    events = [event for event in found if event.device_type == DeviceType.CPU]
    marks = sorted(
        (event.time_range.start, event.name.removeprefix(_MARK)) for event in events if event.name.startswith(_MARK)
    )
    (thread,) = {event.thread for event in events if event.name == f"{_MARK}{_BEGIN}"}
    starts = [start for start, _ in marks]
    step_of = []
    steps: list[dict[tuple[str, str], float]] = []
    for (start, part), (end, _) in zip(marks, [*marks[1:], (starts[-1], "")], strict=True):
        if part == _BEGIN:
            steps.append(defaultdict(float))
        step_of.append(len(steps) - 1)
        if not on_gpu:
            # What no operator accounts for remains.
            steps[-1][part, OTHER] += (end - start) / 1e6
    for event in events:
        at = bisect.bisect_right(starts, event.time_range.start) - 1
        kind = kind_of(event.name)
        if at < 0 or event.name.startswith(_MARK) or (not on_gpu and (event.thread != thread or kind == OTHER)):
            continue
        times, part = steps[step_of[at]], marks[at][1]
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        times[part, kind] += seconds
        if not on_gpu:
            times[part, OTHER] -= seconds
    return [{key: max(value, 0.0) for key, value in step.items() if key[0] not in ("", _END)} for step in steps]


def by_part(times: Times) -> dict[str, float]:
    """Return the seconds of each part of the model."""
    seconds: dict[str, float] = defaultdict(float)
    for (part, _), value in times.items():
        seconds[part] += value
    return dict(seconds)


def by_kind(times: Times) -> dict[str, float]:
    """Return the seconds of each kind of operator."""
    return {kind: sum(value for (_, k), value in times.items() if k == kind) for kind in KINDS}
