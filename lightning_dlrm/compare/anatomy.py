"""The parts of a configuration: parameters of tables and dense parts, load of each rank, and the time of a step by
kind of operator, measured on this machine, outside Lightning."""

import contextlib
import hashlib
import itertools
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lightning_dlrm.bench.breakdown import KINDS, by_kind, profile_steps
from lightning_dlrm.cli.parser import build_model_and_data
from lightning_dlrm.cli.version import code_version
from lightning_dlrm.compare.runs import STEADY, Arm, Run
from lightning_dlrm.contracts.documents import read_json
from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.contracts.terminal import binary_size
from lightning_dlrm.engine.memory import DEFAULT_BATCH_SIZE, table_loads
from lightning_dlrm.sharding.balance import make_plan
from lightning_dlrm.sharding.costs import RankCost, TableLoad, parse_memory, rank_costs
from lightning_dlrm.sharding.plan import Plan, read_plan
from lightning_dlrm.tracking import names
from lightning_dlrm.tracking.run_folder import CONFIG, RunFolder

log = logging.getLogger("lightning_dlrm")

ROUNDS, WARM_UP, STEPS = 5, 2, 5
"""Rounds; steps of a round that do not count; steps that do."""
PAUSE_SECONDS = 0.5
"""Pause between rounds, so that a burst of other work on the machine does not slow all of them down."""
_PRECISIONS = ("32-true", "32", "64-true", "64", "bf16-mixed", "bf16")


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The rows of each rank."""

    plan: Plan
    loads: Sequence[TableLoad]
    costs: Sequence[RankCost]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Parameters by table and by dense part."""

    tables: Mapping[str, int]
    dense: Mapping[str, int]
    sharding: Sharding | None
    """None if one process held all tables."""
    batch_size: int
    """Samples of a training step, of all ranks together."""


def anatomy(run: Run) -> Anatomy:
    """Return the anatomy of a run's configuration, without allocating tables."""
    built = build_model_and_data(["--config", str(run.path / CONFIG)])
    module = built.module
    with torch.device("meta"):
        network = module.make_network(module.schema.features, module.seed)
    loads = table_loads(network, module)
    dense = {id(parameter) for parameter in network.dense_parameters()}
    parts = {name: _count(child.parameters(), dense) for name, child in network.named_children()}
    parts["other"] = _count(network.parameters(recurse=False), dense)
    ranks = int(run.final[names.RANKS])
    batch_size = getattr(built.datamodule, "batch_size", DEFAULT_BATCH_SIZE)
    return Anatomy(
        tables={load.name: load.rows * load.width for load in loads},
        dense={name: count for name, count in parts.items() if count},
        sharding=_sharding(run, loads, ranks, batch_size) if ranks > 1 else None,
        batch_size=batch_size,
    )


def merge_equal(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[list[str], Mapping[str, int]]]:
    """Return the names of each group of configurations with equal counts, and these counts."""
    groups: dict[frozenset[tuple[str, int]], list[str]] = {}
    for name, of_parts in counts.items():
        groups.setdefault(frozenset(of_parts.items()), []).append(name)
    return [(members, counts[members[0]]) for members in groups.values()]


def _count(parameters: Any, dense: set[int]) -> int:
    return sum(parameter.numel() for parameter in parameters if id(parameter) in dense)


def _sharding(run: Run, loads: Sequence[TableLoad], ranks: int, batch_size: int) -> Sharding:
    strategy = run.config["trainer"].get("strategy")
    options = strategy.get("init_args") or {} if isinstance(strategy, Mapping) else {}
    file, memory = options.get("plan"), options.get("memory_per_rank")
    if file is not None:
        plan = read_plan(Path(file))
    else:
        plan = make_plan(loads, ranks, batch_size, None if memory is None else parse_memory(memory, "memory_per_rank"))
    return Sharding(plan=plan, loads=loads, costs=rank_costs(plan, loads, batch_size))


# --- time of a step ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Measured steps of configurations beside those of their training."""

    alone: Mapping[str, Mapping[str, float]]
    """Measured configuration -> kind of operator -> milliseconds of a step."""
    in_training: Mapping[str, float]
    """Configuration -> milliseconds of a step in training, in the median of its runs."""
    notes: Sequence[str] = ()
    """Reason for each configuration that was not measured, or for all."""

    @property
    def slow_alone(self) -> list[str]:
        """The configurations whose steps took more than 1.5 times as long alone as in training."""
        return [arm for arm, times in self.alone.items() if sum(times.values()) > STEADY * self.in_training[arm] > 0]

    @property
    def slow_in_training(self) -> list[str]:
        """The configurations whose steps took more than 1.5 times as long in training as alone."""
        return [arm for arm, times in self.alone.items() if self.in_training[arm] > STEADY * sum(times.values()) > 0]

    @property
    def shown(self) -> Mapping[str, Mapping[str, float]]:
        """The measured steps; empty if they are unlike those of the training of a configuration, because other work may
        have disturbed them."""
        return {} if self.slow_alone or self.slow_in_training else self.alone


def measure_steps(arms: Sequence[Arm], anatomies: Mapping[str, Anatomy], cache: Path) -> StepTimes:
    """Measure a training step of each configuration.

    Args:
        arms: configurations; each is measured with the settings of its first run.
        anatomies: configuration -> its anatomy.
        cache: file with earlier measurements; those that are like the training are added to it, and not made again.
    """
    if not all(arm.is_steady(names.SAMPLES_PER_SECOND) for arm in arms):
        note = (
            "any configuration: the speeds of runs of one configuration differ by a factor of more than 1.5, so the "
            "machine was not quiet; to compare times, train again on a quiet machine, with another --output"
        )
        return StepTimes(alone={}, in_training={}, notes=[note])
    known = _known(cache)
    alone, notes, in_training = {}, [], {}
    for arm in arms:
        rate = arm.median(names.SAMPLES_PER_SECOND)
        in_training[arm.name] = 1e3 * anatomies[arm.name].batch_size / rate if rate > 0 else 0.0
        key = _key(arm)
        times = known.get(key)
        if times is None or not _alike(times, in_training[arm.name]):
            why_not = _obstacle(arm.runs[0])
            if why_not:
                notes.append(f"{arm.name}: {why_not}")
                continue
            log.info("measuring one step of %s by operator", arm.name)
            times = measure(arm.runs[0])
            if _alike(times, in_training[arm.name]):
                known[key] = times
                RunFolder(cache.parent).write_json(cache.name, known)
        alone[arm.name] = times
    return StepTimes(alone=alone, in_training=in_training, notes=notes)


def _alike(alone: Mapping[str, float], in_training: float) -> bool:
    """Whether a step took at most 1.5 times as long alone as in training, and the other way round."""
    low, high = sorted((sum(alone.values()), in_training))
    return high <= STEADY * low or not low


def _known(cache: Path) -> dict[str, dict[str, float]]:
    try:
        known = read_json(cache, dict[str, dict[str, float]], "it is measured again")
    except UserError:
        return {}
    return {key: times for key, times in known.items() if set(times) == set(KINDS)}


def _key(arm: Arm) -> str:
    """Return a key of everything that the times depend on."""
    gpus = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
    machine = (platform.node(), platform.machine(), torch.backends.cpu.get_cpu_capability(), *gpus)
    code = (ROUNDS, WARM_UP, STEPS, code_version(), torch.__version__, torch.get_num_threads())
    described = json.dumps([arm.settings, arm["data_fingerprint"], machine, code], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _obstacle(run: Run) -> str:
    """Return why a run's step cannot be measured here; empty if it can."""
    if run.final[names.RANKS] > 1:
        return f"its tables are on {run.final[names.RANKS]} ranks"
    precision = str(run.config["trainer"].get("precision") or "32-true")
    if precision not in _PRECISIONS:
        return f"only steps in {', '.join(_PRECISIONS)} are measured, and its precision is {precision}"
    needed, free = run.final[names.BYTES_PER_RANK], psutil.virtual_memory().available
    if needed * 1.5 > free:
        return f"its tables need {binary_size(needed)}, {binary_size(free)} are free"
    return ""


def measure(run: Run) -> dict[str, float]:
    """Measure steps with a run's configuration and data: kind of operator -> milliseconds.

    All of them are of one step, that of median time, so that they add up to a step that was made.
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
        # The choice of kernels was logged by the run.
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.WARNING)
        if precision.startswith("64"):
            torch.set_default_dtype(torch.float64)
            stack.callback(torch.set_default_dtype, torch.float32)
        module.configure_model()
        network = module.network.to(device)
        optimizer = module.make_optimizer(network)
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16"))

        def step(number: int) -> None:
            batch = batches[number]
            assert batch.label is not None
            optimizer.zero_grad()
            with mixed:
                loss = module.loss.summed(network(batch.dense, batch.ids), batch.label) / batch.global_size
            loss.backward()
            optimizer.step()

        steps = []
        for _ in range(ROUNDS):
            steps += profile_steps(step, len(batches), device)[WARM_UP:]
            time.sleep(PAUSE_SECONDS)
    kinds = sorted((by_kind(times) for times in steps), key=lambda of_step: sum(of_step.values()))
    median = kinds[(len(kinds) - 1) // 2]
    return {kind: 1e3 * median[kind] for kind in KINDS}


def _endless(data: Any) -> Any:
    while True:
        yield from data.train_dataloader()
