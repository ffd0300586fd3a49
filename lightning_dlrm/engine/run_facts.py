"""Facts of a run that do not change while it trains, and its peak memory."""

import resource
import sys

import pytorch_lightning as pl
import torch

from lightning_dlrm.engine.module import CTRModule
from lightning_dlrm.engine.strategy import EmbeddingShardedDDP, table_loads
from lightning_dlrm.tracking import names


def describe(trainer: pl.Trainer, module: CTRModule) -> dict[str, float]:
    """Return sizes of the model, rows and bytes per rank, and the best reachable scores of planted data."""
    size, strategy, loads = module.size, trainer.strategy, table_loads(module.network, module)
    if isinstance(strategy, EmbeddingShardedDDP):
        held = strategy.held(loads)
    else:
        held = {names.ROWS_PER_RANK: sum(load.rows for load in loads)}
        held |= {names.BYTES_PER_RANK: sum(load.bytes for load in loads)}
        if on_host := sum(load.bytes for load in loads if load.on_host):
            held[names.HOST_BYTES] = on_host
    facts: dict[str, float] = {
        names.PARAMETERS_TABLES: size.tables,
        names.PARAMETERS_DENSE: size.dense,
        names.PARAMETERS_TOTAL: size.total,
        names.FLOPS_FORWARD: size.flops_per_sample_forward,
        names.FLOPS_TRAINING: size.flops_per_sample_training,
        names.RANKS: trainer.world_size,
        **held,
    }
    optimum = module.data_schema().optimum.get(names.VALIDATION)
    if optimum is not None:
        facts |= {names.OPTIMUM_AUC: optimum.auc, names.OPTIMUM_LOG_LOSS: optimum.log_loss}
    return facts


def fingerprints(module: CTRModule) -> dict[str, str]:
    """Return the dataset, protocol and fingerprints of a run's data."""
    schema = module.data_schema()
    return {
        "dataset": schema.dataset,
        "protocol": schema.protocol,
        "encoding_fingerprint": schema.encoding_fingerprint,
        "data_fingerprint": schema.data_fingerprint,
    }


def peak_memory() -> dict[str, float]:
    """Return the peak memory of this process in bytes: resident, and allocated on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak: dict[str, float] = {names.PEAK_MEMORY: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak[names.PEAK_DEVICE_MEMORY] = torch.cuda.max_memory_allocated()
    return peak
