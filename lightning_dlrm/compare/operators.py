"""Where the time of a training step goes, by kind of operator: measured on this machine, outside Lightning.

``bench paper`` asks something else: how long each part of a DLRM takes, which is held against what the part must
compute and move. Kinds of operators are what networks of other parts have in common.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_dlrm.cli.settings import build_model_and_data
from lightning_dlrm.cli.version import code_version
from lightning_dlrm.compare.runs import Arm, Run
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.models.network import CTRNetwork
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import CONFIG, RunFolder

log = logging.getLogger("lightning_dlrm")

ROUNDS, WARM_UP, STEPS = 5, 2, 5
"""Each round has some steps that do not count, and some that do."""
PAUSE_SECONDS = 0.5
"""Between rounds, so that a burst of other work on the machine does not cover all of them."""
_PRECISIONS = ("32-true", "32", "64-true", "64", "bf16-mixed", "bf16")
_STEP = "compare_step_"

KINDS: Mapping[str, tuple[str, ...]] = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "linear", "gemm"),
    "rows: gather, sort, scatter": (
        "embedding", "index_select", "index_copy", "index_add", "index_put", "index", "gather", "scatter", "sort",
        "argsort", "unique", "cumsum", "searchsorted", "repeat_interleave",
    ),
    "copies": ("cat", "stack", "copy", "clone", "fill", "zero", "contiguous", "to_copy", "memcpy", "memset"),
}  # fmt: skip
"""Kind -> the words that name its operators; others of torch are elementwise, or sums."""
ELEMENTWISE, REST = "elementwise and sums", "autograd, Python"
ALL_KINDS = (*KINDS, ELEMENTWISE, REST)


def kind_of(operator: str) -> str:
    """Of an operator as the profiler names it.

    >>> [kind_of(name) for name in ("aten::addmm", "mkldnn::_linear_pointwise", "aten::index_select", "aten::add_")]
    ['matrix products', 'matrix products', 'rows: gather, sort, scatter', 'elementwise and sums']
    """
    namespace, _, name = operator.rpartition("::")
    if not namespace or "autograd" in namespace:
        return REST
    words = name.strip("_")
    for kind, known in KINDS.items():
        if any(words == word or words.startswith(f"{word}_") for word in known):
            return kind
    return ELEMENTWISE


def breakdown(arms: Sequence[Arm], cache: Path) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Milliseconds of a training step of each configuration, by kind of operator.

    Args:
        arms: one run of each is asked for its configuration.
        cache: file of what was measured before.

    Returns:
        Arm -> kind -> milliseconds; and for each arm that was not measured, why.
    """
    known = _known(cache)
    found, notes = {}, []
    for arm in arms:
        key = _key(arm)
        if key not in known:
            why_not = _obstacle(arm.runs[0])
            if why_not:
                notes.append(f"{arm.name}: {why_not}")
                continue
            log.info("a step of %s, operator by operator", arm.name)
            known[key] = measure(arm.runs[0])
            RunFolder(cache.parent).write_json(cache.name, known)
        found[arm.name] = known[key]
    return found, notes


def _known(cache: Path) -> dict[str, dict[str, float]]:
    try:
        known: dict[str, dict[str, float]] = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return known


def _key(arm: Arm) -> str:
    """Stands for all that the times depend on."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = (platform.node(), platform.machine(), torch.backends.cpu.get_cpu_capability(), *gpus)
    code = (ROUNDS, WARM_UP, STEPS, code_version(), torch.__version__, torch.get_num_threads())
    told = json.dumps([arm.settings, arm["data_fingerprint"], machine, code], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _obstacle(run: Run) -> str:
    if run.final[names.RANKS] > 1:
        return f"its tables lie on {run.final[names.RANKS]} ranks"
    precision = str(run.config["trainer"].get("precision") or "32-true")
    if precision not in _PRECISIONS:
        return f"only steps in {', '.join(_PRECISIONS)} are measured, and its precision is {precision}"
    needed, free = run.final[names.BYTES_PER_RANK], psutil.virtual_memory().available
    if needed * 1.5 > free:
        return f"its tables need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return ""


def measure(run: Run) -> dict[str, float]:
    """Of a run's configuration and data: kind -> milliseconds of a step, the least of some steps.

    The least, since what else the machine does makes steps longer, and never shorter.
    """
    built = build_model_and_data(["--config", str(run.path / CONFIG)])
    module, trainer = built.module, built.settings.trainer
    on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
    device = torch.device("cuda" if on_gpu else "cpu")
    precision = str(trainer.precision)
    data = built.datamodule
    data.prepare_data()
    batches = [batch.to(device) for batch in itertools.islice(_endless(data), WARM_UP + STEPS)]
    with contextlib.ExitStack() as stack:
        if precision.startswith("64"):
            torch.set_default_dtype(torch.float64)
            stack.callback(torch.set_default_dtype, torch.float32)
        module.configure_model()
        network = module.network.to(device)
        optimizer = module.make_optimizer(network)
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16"))
        # The profiler's library tells of its start and stop otherwise.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        steps = []
        for _ in range(ROUNDS):
            with profile(activities=_activities(on_gpu)) as profiled:
                for number, batch in enumerate(batches):
                    with record_function(f"{_STEP}{number}"):
                        _step(module, network, optimizer, batch, mixed)
                        if on_gpu:
                            torch.cuda.synchronize()
            steps += _by_step(profiled, on_gpu)[WARM_UP:]
            time.sleep(PAUSE_SECONDS)
    return {kind: min(step[kind] for step in steps) for kind in ALL_KINDS}


def _endless(data: Any) -> Any:
    while True:
        yield from data.train_dataloader()


def _activities(on_gpu: bool) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]


def _step(module: CTRModule, network: CTRNetwork, optimizer: CTROptimizer, batch: Batch, mixed: Any) -> None:
    assert batch.label is not None
    optimizer.zero_grad()
    with mixed:
        loss = module.loss.summed(network(batch.dense, batch.ids), batch.label) / batch.global_size
    loss.backward()
    optimizer.step()


def _by_step(profiled: profile, on_gpu: bool) -> list[dict[str, float]]:
    """Milliseconds of each step, by kind of operator."""
    events = profiled.events()
    assert events is not None
    marks = {e.name: e.time_range for e in events if e.name.startswith(_STEP) and e.device_type == DeviceType.CPU}
    spans = [marks[f"{_STEP}{number}"] for number in range(len(marks))]
    starts = [span.start for span in spans]
    found: list[dict[str, float]] = [dict.fromkeys(ALL_KINDS, 0.0) for _ in spans]
    for event in events:
        if event.device_type != DeviceType.CPU:
            # A kernel, whose time its operator has as well.
            continue
        step = bisect.bisect_right(starts, event.time_range.start) - 1
        if step < 0 or event.time_range.start > spans[step].end:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[step][kind_of(event.name)] += microseconds / 1e3
    return found
